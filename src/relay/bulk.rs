//! Bulk passes by through a pipe, without being copied.
//!
//! ```text
//!   Copying --256 KiB in large reads--> Bulk --small ones, a slow receiver--> Copying
//! ```
//!
//! In Bulk a direction borrows a pipe, fills it, empties it, and gives it back
//! as soon as it is empty; where none is free it copies. What is in a pipe is
//! kept like any other byte: it is sent before an end or a reset is passed on,
//! and `unpipe` turns it into plain bytes.

use std::io;

use super::{End, Lent};
use super::{Half, HalfState, Pipe, Session, Side};
use crate::keep::Owner;

/// The most that is put into a pipe at once, and so the most that a direction
/// keeps: larger ones were no faster.
pub const MAX_PIPED: usize = 1 << 20;
/// So much in large reads makes bulk.
const BULK_AFTER: u32 = 256 << 10;
/// More is not remembered, so that a few small reads end it.
const REMEMBERED: u32 = 1 << 20;
/// What is smaller is cheaper copied.
const LARGE: usize = 32 << 10;

impl Half {
    pub(super) fn is_bulk(&self) -> bool {
        self.streak >= BULK_AFTER && !self.copies && self.to.is_some()
    }

    /// Counts a read that was copied; `full` where there may be more.
    pub(super) fn handle_read(&mut self, count: usize, full: bool) {
        let is_large = full || count >= LARGE;
        self.streak = if is_large { REMEMBERED.min(self.streak + count as u32) } else { 0 };
    }

    fn handle_piped(&mut self, count: usize) {
        self.piped = count as u32;
        self.received += count as u64;
        self.streak =
            if count < LARGE { self.streak / 2 } else { REMEMBERED.min(self.streak + count as u32) };
    }
}

impl Session {
    /// Moves bytes into a pipe; how many. `None` where they have to be copied.
    pub(super) fn fill<E: End>(
        &mut self,
        half: usize,
        ends: [&E; 2],
        lent: &mut Lent<'_, E::Pipe>,
    ) -> Option<usize> {
        let own = &mut self.halves[half];
        if own.pipe.is_none() {
            own.pipe = lent.pipes.lend(lent.session, half as u8, lent.now);
        }
        let number = own.pipe?;
        let pipe = lent.pipes.get(number);
        lent.keep.claim_pipe(lent.owner(half), number, pipe.number());
        let from = own.from;
        match ends[from as usize].fill(pipe, MAX_PIPED) {
            // An end of file, or urgent data, which no pipe takes up: only a
            // read can tell.
            Ok(0) => {
                own.copies = true;
                return None;
            }
            Ok(count) => {
                own.handle_piped(count);
                return Some(count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.sides[from as usize].readable = false;
            }
            Err(error) if is_unsupported(&error) => {
                own.copies = true;
                return None;
            }
            Err(error) => {
                self.break_side(from, &error, lent.keep, lent.session);
                self.halves[half].state = HalfState::Finishing;
            }
        }
        Some(0)
    }

    /// Moves bytes out of the pipe.
    pub(super) fn drain<E: End>(&mut self, half: usize, ends: [&E; 2], lent: &mut Lent<'_, E::Pipe>) {
        let own = &mut self.halves[half];
        let to = own.to.expect("only a direction with a receiver has a pipe");
        let pipe = lent.pipes.get(own.pipe.expect("bytes are in a pipe"));
        match ends[to as usize].drain(pipe, own.piped as usize) {
            Ok(count) if count > 0 => {
                own.piped -= count as u32;
                own.sent += count as u64;
            }
            Err(error) if !is_unsupported(&error) => self.handle_send_error(to, &error, lent),
            // The receiver takes bytes from no pipe.
            Ok(_) | Err(_) => {
                own.copies = true;
                self.unpipe(half, lent);
            }
        }
    }

    /// Gives back a pipe that is empty, or whose bytes nobody waits for.
    pub(super) fn put_back<P>(&mut self, half: usize, lent: &mut Lent<'_, P>) {
        let own = &mut self.halves[half];
        let Some(number) = own.pipe else { return };
        if own.state == HalfState::Ended && own.piped > 0 {
            lent.keep.release_pipe(number);
            lent.pipes.discard(number);
        } else if own.piped > 0 {
            return;
        } else {
            lent.keep.release_pipe(number);
            if lent.pipes.take_back(number, lent.now) {
                own.streak = 0;
            }
        }
        own.pipe = None;
        own.piped = 0;
    }

    /// Turns what is in a direction's pipe into plain bytes, and gives the pipe
    /// back.
    pub fn unpipe<P: Pipe>(&mut self, half: usize, lent: &mut Lent<'_, P>) {
        let own = &mut self.halves[half];
        let Some(number) = own.pipe else { return };
        if own.piped == 0 {
            return self.put_back(half, lent);
        }
        let owner = Owner { session: lent.session, half: half as u8 };
        let Some(residue) = lent.keep.reserve_for_pipe(owner, own.piped as usize, own.sent) else {
            return self.lose_pipe(half, &io::ErrorKind::OutOfMemory.into(), lent);
        };
        let length = own.piped as usize;
        let mut at = 0;
        while at < length {
            match lent.pipes.get(number).take(&mut lent.keep.whole_mut(&residue)[at..]) {
                Ok(count) if count > 0 => at += count,
                failure => {
                    let error = failure.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                    lent.keep.release(residue);
                    return self.lose_pipe(half, &error, lent);
                }
            }
        }
        let own = &mut self.halves[half];
        own.residue = Some(residue);
        (own.piped, own.streak) = (0, 0);
        self.put_back(half, lent);
    }

    /// Bytes that are lost end the session, and never silently.
    fn lose_pipe<P>(&mut self, half: usize, error: &io::Error, lent: &mut Lent<'_, P>) {
        let own = &mut self.halves[half];
        let from = own.from;
        if let Some(number) = own.pipe.take() {
            lent.keep.release_pipe(number);
            lent.pipes.discard(number);
        }
        own.piped = 0;
        own.end(lent.keep);
        self.break_side(from, error, lent.keep, lent.session);
    }

    /// The same as `unpipe` for both directions, before a snapshot.
    pub fn unpipe_all<P: Pipe>(&mut self, lent: &mut Lent<'_, P>) {
        (0..2).for_each(|half| self.unpipe(half, lent));
    }

    /// Gives back whatever it has borrowed: the session is over.
    pub fn abandon<P>(&mut self, lent: &mut Lent<'_, P>) {
        for half in &mut self.halves {
            if let Some(number) = half.pipe.take() {
                lent.keep.release_pipe(number);
                lent.pipes.discard(number);
                half.piped = 0;
            }
            if let Some(residue) = half.residue.take() {
                lent.keep.release(residue);
            }
        }
    }

    /// A side's end, error or urgent data has come into sight: what it sent is
    /// read, not spliced, from here on.
    pub(super) fn handle_probe(&mut self, side: Side) {
        self.halves.iter_mut().filter(|half| half.from == side).for_each(|half| half.copies = true);
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}
