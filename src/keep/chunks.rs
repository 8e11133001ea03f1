//! Where bytes lie that one side gave and the other has not taken: the
//! worker's one scratch while a read is being passed on, a chunk where the
//! other side blocked.
//!
//! A chunk has two words: who claims it, with its length; and how many bytes
//! had left that direction before its first, with how many of it have left
//! since. A claim is stored last. Chunks are used again last in, first out; of
//! those that are free at most `WARM` keep their memory.

use super::Keep;
use super::layout::{CHUNKS_USED, Layout, SCRATCH_BASE, SCRATCH_CLAIM};
use super::recovery::SENDING;

/// What one read may bring.
pub const SCRATCH_BYTES: usize = 1 << 18;
/// What is left of a read fits into a small chunk, and what was in a pipe into
/// a large one.
pub(super) const SMALL_BYTES: usize = SCRATCH_BYTES;
pub(super) const LARGE_BYTES: usize = 1 << 20;
/// Free chunks of each size that keep their memory, for the next who needs one.
const WARM: usize = 16;

const OWNER_BITS: u32 = 34;
const LENGTH: u64 = 0x1f_ffff;
/// The count of bytes that had left, as much of it as is kept: more than can be
/// on its way.
const BASE_BITS: u32 = 43;
const BASE: u64 = (1 << BASE_BITS) - 1;

/// One direction of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The session's number, which is its slot's.
    pub session: u32,
    /// 0 from the client, 1 from the server.
    pub half: u8,
}

impl Owner {
    /// Never 0, which is nobody.
    pub(super) fn code(self) -> u64 {
        (u64::from(self.session) << 1 | u64::from(self.half)) + 1
    }

    pub(super) fn of_code(code: u64) -> Option<Owner> {
        let code = (code & ((1 << OWNER_BITS) - 1)).checked_sub(1)?;
        Some(Owner { session: (code >> 1) as u32, half: (code & 1) as u8 })
    }
}

/// Bytes in a chunk that have not all been sent. It has to be given back
/// (`Keep::release`).
#[derive(Debug, PartialEq, Eq)]
pub struct Residue {
    /// The chunk, plus one.
    number: std::num::NonZeroU32,
    sent: u32,
}

/// Which chunks are free.
#[derive(Debug, Default)]
pub(super) struct Pool {
    sizes: [Size; 2],
}

#[derive(Debug, Default)]
struct Size {
    free: Vec<u32>,
    used: u32,
}

/// A chunk's two words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub owner: Option<Owner>,
    pub length: usize,
    base: u64,
    /// So many of its bytes have left, as far as the worker came to know.
    pub sent: usize,
}

impl Chunk {
    pub(super) fn of_words([claim, base]: [u64; 2]) -> Chunk {
        Chunk {
            owner: Owner::of_code(claim),
            length: (claim >> OWNER_BITS & LENGTH) as usize,
            base: base & BASE,
            sent: (base >> BASE_BITS) as usize,
        }
    }

    /// How many bytes lie between its first and this count of the direction.
    pub(super) fn offset(&self, count: u64) -> usize {
        (count.wrapping_sub(self.base) & BASE) as usize
    }
}

/// Says a part of the count once more: nothing else would tell that one of
/// both was spoilt.
pub(super) fn scratch_claim(owner: Owner, sent: u64) -> u64 {
    owner.code() | sent << OWNER_BITS
}

impl Keep {
    /// The worker's one buffer.
    pub fn scratch(&mut self) -> &mut [u8] {
        &mut self.area.bytes_mut()[..SCRATCH_BYTES]
    }

    /// What is read into the scratch from now on is this direction's, of which
    /// so many bytes have been sent.
    pub fn claim(&self, owner: Owner, sent: u64) {
        self.put(SCRATCH_BASE, sent);
        self.put(SCRATCH_CLAIM, scratch_claim(owner, sent));
    }

    /// What is kept of this direction is being sent: of some receivers nobody
    /// else could tell how much they took.
    pub fn claim_sending(&self, owner: Owner) {
        self.claim(owner, SENDING);
    }

    /// Nothing in the scratch is anybody's.
    pub fn unclaim(&self) {
        self.put(SCRATCH_CLAIM, 0);
    }

    /// Keeps what lies in the scratch from here to there, behind so many bytes
    /// that have been sent. `None` where there is no chunk left.
    pub fn keep_scratch(&mut self, owner: Owner, from: usize, to: usize, sent: u64) -> Option<Residue> {
        let number = self.take_chunk(to - from)?;
        let at = self.layout.chunk_bytes(number);
        self.area.bytes_mut().copy_within(from..to, at);
        Some(self.claim_chunk(number, owner, to - from, sent))
    }

    /// The same for bytes that are not in the scratch.
    pub fn keep_bytes(&mut self, owner: Owner, bytes: &[u8], sent: u64) -> Option<Residue> {
        let residue = self.reserve(owner, bytes.len(), sent, |into| into.copy_from_slice(bytes))?;
        Some(residue)
    }

    /// Keeps so many bytes, which `fill` puts there before they are claimed.
    fn reserve(
        &mut self,
        owner: Owner,
        length: usize,
        sent: u64,
        fill: impl FnOnce(&mut [u8]),
    ) -> Option<Residue> {
        let number = self.take_chunk(length)?;
        let at = self.layout.chunk_bytes(number);
        fill(&mut self.area.bytes_mut()[at..at + length]);
        Some(self.claim_chunk(number, owner, length, sent))
    }

    /// A claimed chunk that is about to be filled from the direction's pipe,
    /// from its beginning: as much of it is good as is not in the pipe any more.
    pub fn reserve_for_pipe(&mut self, owner: Owner, length: usize, sent: u64) -> Option<Residue> {
        let number = self.take_chunk(length)?;
        Some(self.claim_chunk(number, owner, length, sent))
    }

    /// All bytes of a chunk, sent or not.
    pub fn whole_mut(&mut self, residue: &Residue) -> &mut [u8] {
        let length = self.length(residue);
        let at = self.layout.chunk_bytes(residue.number());
        &mut self.area.bytes_mut()[at..at + length]
    }

    /// What is still to be sent.
    pub fn rest(&self, residue: &Residue) -> &[u8] {
        let at = self.layout.chunk_bytes(residue.number());
        &self.area.bytes()[at + residue.sent as usize..at + self.length(residue)]
    }

    /// How much that is.
    pub fn rest_length(&self, residue: &Residue) -> usize {
        self.length(residue) - residue.sent as usize
    }

    fn length(&self, residue: &Residue) -> usize {
        Chunk::of_words([self.get(self.layout.chunk(residue.number())), 0]).length
    }

    /// So many bytes more have been sent.
    pub fn advance(&self, residue: &mut Residue, count: usize) {
        residue.sent += count as u32;
        let at = self.layout.chunk(residue.number()) + 1;
        self.put(at, self.get(at) & BASE | u64::from(residue.sent) << BASE_BITS);
    }

    /// All have been sent, or nobody wants them.
    pub fn release(&mut self, residue: Residue) {
        let number = residue.number();
        self.put(self.layout.chunk(number), 0);
        let class = usize::from(number as usize >= self.layout.chunk_count());
        self.pool.sizes[class].free.push(number);
        if self.pool.sizes[class].free.len() > WARM {
            let at = self.layout.chunk_bytes(number);
            let size = [SMALL_BYTES, LARGE_BYTES][class];
            // Where the system will not have it back, it is used again here.
            let _ = self.area.discard(at..at + size);
        }
    }

    fn take_chunk(&mut self, length: usize) -> Option<u32> {
        let class = usize::from(length > SMALL_BYTES);
        if length > LARGE_BYTES {
            return None;
        }
        if let Some(number) = self.pool.sizes[class].free.pop() {
            return Some(number);
        }
        let size = &mut self.pool.sizes[class];
        if size.used as usize >= self.layout.chunk_count() {
            return None;
        }
        let index = size.used;
        size.used += 1;
        self.put(CHUNKS_USED + class, u64::from(index) + 1);
        Some(first(&self.layout, class) + index)
    }

    fn claim_chunk(&self, number: u32, owner: Owner, length: usize, sent: u64) -> Residue {
        let at = self.layout.chunk(number);
        self.put(at + 1, sent & BASE);
        self.put(at, owner.code() | (length as u64) << OWNER_BITS);
        let number = std::num::NonZeroU32::new(number + 1).expect("fewer chunks than 2^32");
        Residue { number, sent: 0 }
    }
}

impl Residue {
    fn number(&self) -> u32 {
        self.number.get() - 1
    }
}

/// The number of the first chunk of a size.
pub(super) fn first(layout: &Layout, class: usize) -> u32 {
    (class * layout.chunk_count()) as u32
}
