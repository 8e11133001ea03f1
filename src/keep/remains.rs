//! The reading side: what a dead worker left.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering::Acquire;

use super::chunks::{Chunk, Owner, SCRATCH_BYTES, first, scratch_claim};
use super::layout::{
    BUNDLE, BUNDLE_ITEMS, CHUNKS_USED, EXTRA_WORDS, FLOWS, Layout, PIPE_COUNT, PIPES, RECEIPT, RECEIVING,
    SCRATCH_BASE, SCRATCH_CLAIM, SLOTS_USED, VERSION_WORD,
};
use super::recovery::{Claims, Held};
use super::slot::{self, Slot, State};
use crate::sys::area;
use crate::sys::shared::Region;

/// The memory of a worker that is dead. Reads it anew at each call.
#[derive(Debug)]
pub struct Remains {
    layout: Layout,
    region: Region,
}

/// Who claims what, gathered once.
#[derive(Debug, Default)]
pub(super) struct ClaimTable {
    scratch: Option<(Owner, u64)>,
    chunks: HashMap<Owner, (u32, Chunk)>,
    /// By owner the pipe's reading end.
    pipes: HashMap<Owner, RawFd>,
}

/// Sessions on their way to another process when the worker died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// The way there.
    pub channel: RawFd,
    /// Its number.
    pub number: u64,
    /// What, in the order of the bundle.
    pub items: Vec<Item>,
}

/// What a bundle holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Item {
    /// A session by its number.
    Session(u32),
    /// A flow by its place.
    Flow(u32),
    /// Something that ends with its worker.
    Other,
}

impl Item {
    pub(super) fn to_word(self) -> u64 {
        match self {
            Item::Other => 0,
            Item::Session(number) => 1 << 32 | u64::from(number),
            Item::Flow(place) => 2 << 32 | u64::from(place),
        }
    }

    fn of_word(word: u64) -> Item {
        match word >> 32 {
            1 => Item::Session(word as u32),
            2 => Item::Flow(word as u32),
            _ => Item::Other,
        }
    }
}

/// What the worker was about to say, or had said, when it died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// To whom.
    pub channel: RawFd,
    /// Which bundle has arrived.
    pub number: u64,
    /// But for these of it, a bit each.
    pub refused: [u64; 4],
}

impl Remains {
    /// The memory of a worker, by its descriptor. An error where it is none of
    /// ours.
    pub fn open(fd: OwnedFd) -> io::Result<Remains> {
        let region = Region::open(fd)?;
        let version = region.words().first().map_or(0, |word| word.load(Acquire));
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "no memory of a worker of this version");
        let layout = Layout::of_version(version).ok_or_else(wrong)?;
        if region.words().len() * 8 < layout.word_count() * 8 + layout.byte_count() {
            return Err(wrong());
        }
        debug_assert_eq!(VERSION_WORD, 0);
        Ok(Remains { layout, region })
    }

    fn get(&self, at: usize) -> u64 {
        self.region.words()[at].load(Acquire)
    }

    /// Every session that the worker had, by its number.
    pub fn slots(&self) -> impl Iterator<Item = (u32, Slot)> + '_ {
        let used = self.get(SLOTS_USED).min(u64::from(u32::MAX)) as u32;
        (0..used).filter_map(|session| {
            let slot = self.slot(session)?;
            (slot.state != State::Free).then_some((session, slot))
        })
    }

    /// One of them.
    pub fn slot(&self, session: u32) -> Option<Slot> {
        let at = self.layout.slot(session)?;
        Some(Slot::of_words([0, 1, 2, 3].map(|word| self.get(at + word))))
    }

    pub(super) fn extra(&self, session: u32) -> [u64; EXTRA_WORDS] {
        let at = self.layout.extra(session).expect("the caller has its slot");
        std::array::from_fn(|word| self.get(at + word))
    }

    /// A session is somebody else's now, or over: it is found no more.
    pub fn forget(&self, session: u32) {
        if let Some(at) = self.layout.slot(session) {
            let freed = slot::freed(self.get(at));
            self.region.words()[at].store(freed, std::sync::atomic::Ordering::Release);
        }
    }

    /// Who was on the way to another process.
    pub fn bundle(&self) -> Option<Bundle> {
        let word = self.get(BUNDLE);
        let channel = descriptor(word >> 32)?;
        let count = (word as u32 as usize).min(BUNDLE_ITEMS);
        let items = (0..count).map(|item| Item::of_word(self.get(BUNDLE + 2 + item))).collect();
        Some(Bundle { channel, number: self.get(BUNDLE + 1), items })
    }

    /// Whether sockets were coming that no slot names yet: their sender has
    /// them.
    pub fn is_receiving(&self) -> bool {
        self.get(RECEIVING) != 0
    }

    /// The receipt that was being given.
    pub fn receipt(&self) -> Option<Receipt> {
        let channel = descriptor(self.get(RECEIPT))?;
        let refused = [2, 3, 4, 5].map(|word| self.get(RECEIPT + word));
        Some(Receipt { channel, number: self.get(RECEIPT + 1), refused })
    }

    /// The descriptor of the memory in which the flows lie.
    pub fn flows(&self) -> Option<RawFd> {
        descriptor(self.get(FLOWS))
    }

    /// Sessions that the worker was at work on.
    pub fn in_use(&self) -> Vec<u32> {
        let claims = self.claims();
        let owners = claims.scratch.iter().map(|(owner, _)| owner);
        let mut sessions: Vec<u32> = owners.map(|owner| owner.session).collect();
        sessions.sort_unstable();
        sessions.dedup();
        sessions
    }

    /// What became of them is known now.
    pub fn forget_bundle(&self) {
        self.region.words()[BUNDLE].store(0, std::sync::atomic::Ordering::Release);
    }

    /// Who claims what.
    pub(super) fn claims(&self) -> ClaimTable {
        let mut table = ClaimTable::default();
        let (claim, base) = (self.get(SCRATCH_CLAIM), self.get(SCRATCH_BASE));
        let owner = Owner::of_code(claim).filter(|&owner| scratch_claim(owner, base) == claim);
        table.scratch = owner.map(|owner| (owner, base));
        for class in 0..2 {
            let used = (self.get(CHUNKS_USED + class) as usize).min(self.layout.chunk_count()) as u32;
            let begin = first(&self.layout, class);
            for number in begin..begin + used {
                let at = self.layout.chunk(number);
                let chunk = Chunk::of_words([self.get(at), self.get(at + 1)]);
                if let Some(owner) = chunk.owner {
                    table.chunks.insert(owner, (number, chunk));
                }
            }
        }
        for pipe in 0..PIPE_COUNT {
            let at = PIPES + 2 * pipe;
            if let Some(owner) = Owner::of_code(self.get(at)) {
                table.pipes.insert(owner, self.get(at + 1) as RawFd);
            }
        }
        table
    }

    /// Adds bytes that lie in the scratch or a chunk.
    pub(super) fn copy(&self, held: &Held, into: &mut Vec<u8>) -> io::Result<()> {
        let mut read = |at: usize, length: usize| {
            let begin = into.len();
            into.resize(begin + length, 0);
            area::read_at(self.region.as_fd(), self.layout.word_count(), at, &mut into[begin..])
        };
        if !held.scratch.is_empty() {
            debug_assert!(held.scratch.end <= SCRATCH_BYTES);
            read(held.scratch.start, held.scratch.len())?;
        }
        if let Some((number, range)) = &held.chunk {
            read(self.layout.chunk_bytes(*number) + range.start, range.len())?;
        }
        Ok(())
    }
}

/// What is stored is one more.
fn descriptor(word: u64) -> Option<RawFd> {
    RawFd::try_from(word.checked_sub(1)?).ok()
}

impl ClaimTable {
    /// What a direction claims, and its pipe, of whose fill `piped` is asked.
    pub(super) fn of(
        &self,
        owner: Owner,
        piped: impl FnOnce(RawFd) -> io::Result<usize>,
    ) -> io::Result<(Claims, Option<RawFd>)> {
        let scratch = self.scratch.filter(|(by, _)| *by == owner).map(|(_, base)| base);
        let chunk = self.chunks.get(&owner).copied();
        let pipe = self.pipes.get(&owner).copied();
        let fill = pipe.map(piped).transpose()?;
        Ok((Claims { scratch, chunk, pipe: fill }, pipe))
    }

    /// The pipes that somebody claims.
    pub(super) fn pipes(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.pipes.values().copied()
    }
}
