//! Where everything lies in the area, for a number of sessions.

use super::chunks::{LARGE_BYTES, SCRATCH_BYTES, SMALL_BYTES};
use super::slot::SLOT_WORDS;

/// The version of the layout: somebody else's remains are not read.
const VERSION: u64 = 1;

pub(super) const VERSION_WORD: usize = 0;
pub(super) const SLOTS_USED: usize = 1;
/// Chunks of each size that were ever used.
pub(super) const CHUNKS_USED: usize = 2;
/// Who has claimed the scratch, and the count of bytes that had left before.
pub(super) const SCRATCH_CLAIM: usize = 4;
pub(super) const SCRATCH_BASE: usize = 5;
/// 1 while a message with sockets is being taken in.
pub(super) const RECEIVING: usize = 6;
/// The receipt that is being given: its channel, its number, who was refused.
pub(super) const RECEIPT: usize = 8;
/// The descriptor of the memory in which the UDP flows lie.
pub(super) const FLOWS: usize = 7;
const HEAD_WORDS: usize = 16;

/// For each pipe who has it, and its reading end.
pub(super) const PIPES: usize = HEAD_WORDS;
pub(super) const PIPE_COUNT: usize = 16;

/// The bundle of a hand-over that is under way: its channel, its number, and
/// who is in it.
pub(super) const BUNDLE: usize = PIPES + 2 * PIPE_COUNT;
pub(super) const BUNDLE_ITEMS: usize = 254;

const SLOTS: usize = BUNDLE + 2 + BUNDLE_ITEMS;
pub(super) const EXTRA_WORDS: usize = 8;
pub(super) const CHUNK_WORDS: usize = 2;

/// More directions than that do not keep bytes at once: their chunks alone
/// would be 64 GiB.
const MOST_CHUNKS: usize = 1 << 22;

/// Where everything lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    slots: usize,
    /// Of each size.
    chunks: usize,
}

impl Layout {
    /// Room for so many sessions, and for what both directions of each keep.
    pub fn for_sessions(count: usize) -> Layout {
        let slots = count.clamp(1, 1 << 31);
        Layout { slots, chunks: (2 * slots).min(MOST_CHUNKS) }
    }

    /// The size of the words.
    pub fn word_count(&self) -> usize {
        self.chunk_words() + 2 * self.chunks * CHUNK_WORDS
    }

    /// The size of the bytes.
    pub fn byte_count(&self) -> usize {
        SCRATCH_BYTES + self.chunks * (SMALL_BYTES + LARGE_BYTES)
    }

    pub(super) fn version(&self) -> u64 {
        VERSION << 32 | self.slots as u64
    }

    /// The layout of an area that says so of itself.
    pub(super) fn of_version(word: u64) -> Option<Layout> {
        (word >> 32 == VERSION).then(|| Layout::for_sessions(word as u32 as usize))
    }

    pub(super) fn slot(&self, session: u32) -> Option<usize> {
        ((session as usize) < self.slots).then(|| SLOTS + session as usize * SLOT_WORDS)
    }

    pub(super) fn extra(&self, session: u32) -> Option<usize> {
        let extras = SLOTS + self.slots * SLOT_WORDS;
        ((session as usize) < self.slots).then(|| extras + session as usize * EXTRA_WORDS)
    }

    fn chunk_words(&self) -> usize {
        SLOTS + self.slots * (SLOT_WORDS + EXTRA_WORDS)
    }

    /// How many chunks of each size there are.
    pub(super) fn chunk_count(&self) -> usize {
        self.chunks
    }

    /// Where a chunk's words are. Large ones are numbered behind the small.
    pub(super) fn chunk(&self, number: u32) -> usize {
        self.chunk_words() + number as usize * CHUNK_WORDS
    }

    /// Where a chunk's bytes are.
    pub(super) fn chunk_bytes(&self, number: u32) -> usize {
        let number = number as usize;
        if number < self.chunks {
            SCRATCH_BYTES + number * SMALL_BYTES
        } else {
            SCRATCH_BYTES + self.chunks * SMALL_BYTES + (number - self.chunks) * LARGE_BYTES
        }
    }
}
