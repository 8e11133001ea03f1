//! What a worker leaves behind when it is killed: where each session stands,
//! and the bytes that it has taken from one side and not yet given to the
//! other.
//!
//! ```text
//!   words:  [ head | pipes | bundle | a slot a session | its extra | chunks ]
//!   bytes:  [ scratch | small chunks | large chunks ]
//! ```
//!
//! The worker writes as it works (`Keep`), by plain stores and no system call;
//! when it is dead somebody who has its descriptors reads (`Remains`), asks the
//! kernel what was really read and written (`sys::counts`), and computes what
//! is owed (`recover`). Position independent: only numbers of places lie there.
//! Sparse: what was never used costs nothing.
//!
//! What holds at every instruction of the worker, because of the order of its
//! stores (each is a release):
//!
//! - A slot names a descriptor after it was opened, and not any more before it
//!   is closed. So a number in a slot is never another session's socket.
//! - The bytes that a direction owes lie in the kernel, in a pipe, in a chunk
//!   or in the scratch that say so: who reads claims first (the scratch, with
//!   the count of bytes that had left before), and what moves from scratch or
//!   pipe to a chunk is claimed by the chunk before the other lets go. Two
//!   may claim the same bytes for a moment; they agree.
//! - A chunk's claim is its last store, and the first that is undone.
//! - Bytes that did not come from the peer (a preface) or do not go to the other
//!   side (a PROXY header) are counted in the slot before they are sent or read.
//! - An end of file is marked before it is passed on, an end before a socket is
//!   closed, and a slot is free after both are.
//!
//! Owned by one worker for life. Bounded by the layout: a session without a
//! slot is not kept, and one without a chunk ends.

mod chunks;
mod extra;
mod layout;
#[cfg(test)]
mod model;
mod parcels;
mod recovery;
mod remains;
mod slot;
#[cfg(test)]
mod tests;

pub use chunks::{Owner, Residue, SCRATCH_BYTES};
pub use layout::Layout;
pub use parcels::{Fate, Heir, Kernel, Listener, Names, adopt};
pub use recovery::{Direction, Failure, Held, Sight, Verdict, recover};
pub use remains::{Bundle, Item, Receipt, Remains};
pub use slot::{Slot, State};

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::atomic::Ordering::{Relaxed, Release};

use crate::handover::Story;
use crate::proxy_protocol::Ends;
use crate::relay::CloseReason;
use crate::sys::area::Area;
use chunks::Pool;
use layout::{BUNDLE, BUNDLE_ITEMS, FLOWS, PIPES, RECEIPT, RECEIVING, SLOTS_USED, VERSION_WORD};

/// The writing side.
#[derive(Debug)]
pub struct Keep {
    layout: Layout,
    area: Area,
    pool: Pool,
    /// Slots that were ever used.
    used: u32,
}

impl Keep {
    /// New memory for so many sessions.
    pub fn create(session_count: usize) -> io::Result<Keep> {
        let layout = Layout::for_sessions(session_count);
        let area = Area::create("evenkeel-keep", layout.word_count(), layout.byte_count())?;
        let keep = Keep { layout, area, pool: Pool::default(), used: 0 };
        keep.put(VERSION_WORD, layout.version());
        Ok(keep)
    }

    /// How it is laid out.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    fn get(&self, at: usize) -> u64 {
        self.area.words()[at].load(Relaxed)
    }

    /// Every store there is.
    fn put(&self, at: usize, value: u64) {
        #[cfg(test)]
        model::step();
        self.area.words()[at].store(value, Release);
    }

    /// Where a session's slot begins, if it has one.
    fn slot_at(&self, session: u32) -> Option<usize> {
        self.layout.slot(session)
    }

    fn change(&self, session: u32, word: usize, change: impl FnOnce(u64) -> u64) {
        if let Some(at) = self.slot_at(session) {
            self.put(at + word, change(self.get(at + word)));
        }
    }

    /// What a slot says.
    pub fn slot(&self, session: u32) -> Option<Slot> {
        let at = self.slot_at(session)?;
        Some(Slot::of_words([0, 1, 2, 3].map(|word| self.get(at + word))))
    }

    /// A client was accepted, or a session came from another process: all that
    /// is known of it.
    pub fn begin(&mut self, session: u32, slot: &Slot) {
        let Some(at) = self.slot_at(session) else { return };
        if session >= self.used {
            self.used = session + 1;
            self.put(SLOTS_USED, u64::from(self.used));
        }
        let generation = slot::generation(self.get(at));
        let words = slot.to_words(generation);
        // The state comes last.
        for word in [1, 2, 3, 0] {
            self.put(at + word, words[word]);
        }
    }

    /// It came from another process, which knows now that it is here.
    pub fn settle(&self, session: u32) {
        self.change(session, 0, |word| word & !slot::ARRIVING);
    }

    /// Where it stands, and until when, or since when, that lasts.
    pub fn stand(&self, session: u32, state: State, time: u64) {
        self.change(session, 2, |word| slot::with_time(word, time));
        self.change(session, 0, |word| slot::with_state(word, state));
    }

    /// A byte has moved.
    pub fn moved(&self, session: u32, now: u64) {
        self.change(session, 2, |word| slot::with_time(word, now));
    }

    /// So long a PROXY header is about to be read, which says this.
    pub fn header(&self, session: u32, length: usize, origin: Option<&Ends>) {
        let Some(at) = self.layout.extra(session) else { return };
        if let Some(origin) = origin {
            extra::write_origin(origin, |word, value| self.put(at + word, value));
            self.change(session, 0, |word| word | slot::HAS_ORIGIN);
        }
        self.change(session, 3, |word| slot::with_header(word, length));
    }

    /// So many bytes of ours go to the other side first. They are claimed
    /// already.
    pub fn preface(&self, session: u32, length: usize) {
        self.change(session, 3, |word| slot::with_preface(word, length));
    }

    /// A server's socket was opened.
    pub fn connect(&self, session: u32, place: u32, server: RawFd, is_unix: bool) {
        self.change(session, 2, |word| slot::with_place(word, Some(place)));
        self.change(session, 0, |word| slot::with_unix(word, is_unix));
        self.change(session, 1, |word| slot::with_server(word, Some(server)));
    }

    /// The server's socket is about to be closed, and the session goes on.
    pub fn give_up_server(&self, session: u32) {
        self.change(session, 1, |word| slot::with_server(word, None));
        self.change(session, 2, |word| slot::with_place(word, None));
    }

    /// One side has finished, which is about to be passed on.
    pub fn finish(&self, owner: Owner) {
        self.change(owner.session, 0, |word| word | slot::eof(owner.half));
    }

    /// One side broke; what it sent before is still delivered.
    pub fn break_off(&self, session: u32, reason: CloseReason) {
        self.change(session, 0, |word| slot::with_reason(word, reason));
    }

    /// It is over, and its sockets are about to be closed.
    pub fn close(&self, session: u32, reason: CloseReason) {
        self.change(session, 0, |word| slot::with_state(slot::with_reason(word, reason), State::Closing));
    }

    /// Its sockets are closed.
    pub fn free(&self, session: u32) {
        self.change(session, 0, slot::freed);
    }

    /// What the access log will say of it.
    pub fn tell(&self, session: u32, story: &Story) {
        let Some(at) = self.layout.extra(session) else { return };
        extra::write_story(story, |word, value| self.put(at + word, value));
        self.change(session, 0, |word| word | slot::HAS_STORY);
    }

    /// How often its workers have died of it.
    pub fn crashed(&self, session: u32, count: u8) {
        self.change(session, 0, |word| slot::with_crashes(word, count));
    }

    /// These are about to be sent through a channel, in this order.
    pub fn send(&self, channel: RawFd, number: u64, items: impl Iterator<Item = Item>) {
        let mut count = 0;
        for item in items.take(BUNDLE_ITEMS) {
            self.put(BUNDLE + 2 + count, item.to_word());
            count += 1;
        }
        self.put(BUNDLE + 1, number);
        self.put(BUNDLE, (channel as u64 + 1) << 32 | count as u64);
    }

    /// What became of them is known.
    pub fn sent(&self) {
        self.put(BUNDLE, 0);
    }

    /// Whether a message is being taken in whose sockets no slot names yet.
    pub fn receiving(&self, is: bool) {
        self.put(RECEIVING, is.into());
    }

    /// It is about to be said that a bundle has arrived, but for these of it, a
    /// bit each.
    pub fn begin_receipt(&self, channel: RawFd, number: u64, refused: [u64; 4]) {
        self.put(RECEIPT + 1, number);
        refused.into_iter().enumerate().for_each(|(at, bits)| self.put(RECEIPT + 2 + at, bits));
        self.put(RECEIPT, channel as u64 + 1);
    }

    /// It was said, and they are settled.
    pub fn end_receipt(&self) {
        self.put(RECEIPT, 0);
    }

    /// Where the UDP flows are (`flow::Remains`).
    pub fn flows(&self, memory: RawFd) {
        self.put(FLOWS, memory as u64 + 1);
    }

    /// What a direction reads from now on goes into this pipe.
    pub fn claim_pipe(&self, owner: Owner, pipe: u8, reader: RawFd) {
        let Some(at) = pipe_at(pipe) else { return };
        self.put(at + 1, reader as u64);
        self.put(at, owner.code());
    }

    /// A pipe is empty, or nobody wants what is in it.
    pub fn release_pipe(&self, pipe: u8) {
        if let Some(at) = pipe_at(pipe) {
            self.put(at, 0);
        }
    }
}

impl AsFd for Keep {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.area.as_fd()
    }
}

/// Where a pipe's words lie.
fn pipe_at(pipe: u8) -> Option<usize> {
    (usize::from(pipe) < layout::PIPE_COUNT).then(|| PIPES + 2 * usize::from(pipe))
}
