//! One TCP session: bytes from a client to a server and back, and how it ends.
//!
//! ```text
//!   each direction   Open --end of file read--> Finishing --residue out--> Ended
//!   the session      Done(Finished) when both have ended;
//!                    Done(a reset) when one side broke and what it had sent
//!                    before is delivered
//! ```
//!
//! Owned by `worker::tcp`. Holds no socket and reads no clock: the caller
//! lends the two ends and says which became ready. Never waits: `drive` stops
//! at would-block or at its budget. An idle session owns no buffer: bytes pass
//! through the caller's scratch, or in bulk through its pipes, and only what the
//! other side would not take is kept: at most one read, of `MAX_READ` bytes, or
//! one filling of a pipe, of `MAX_PIPED`, a direction.

mod bulk;
mod pipes;
mod preface;
mod reason;
mod snapshot;
#[cfg(test)]
mod tests;

use std::io;

use serde::{Deserialize, Serialize};

pub use bulk::MAX_PIPED;
pub use pipes::{Holder, Pipe, Pipes};
pub use reason::CloseReason;
pub use snapshot::{Progress, Snapshot};

use crate::config::Service;
use crate::keep::{Keep, Owner, Residue};

/// The largest single read. Larger reads were no faster (measured: 256 KiB
/// took 30 % less CPU a byte than 64 KiB); it also bounds what is kept when
/// the other side stops reading.
pub const MAX_READ: usize = 1 << MAX_READ_BITS;
const MAX_READ_BITS: u8 = 18;
const FIRST_READ_BITS: u8 = 16;
const MIN_READ_BITS: u8 = 14;

/// A byte stream that never waits.
pub trait End {
    /// What can carry its bytes to another one without a copy.
    type Pipe: Pipe;
    /// Receives; 0 = the other side has finished.
    fn receive(&self, into: &mut [u8]) -> io::Result<usize>;
    /// Sends what can be taken.
    fn send(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Says that nothing more will come.
    fn finish(&self) -> io::Result<()>;
    /// Moves at most so many bytes into an empty pipe; 0 = only `receive` can
    /// tell what comes next.
    fn fill(&self, pipe: &Self::Pipe, most: usize) -> io::Result<usize>;
    /// Moves at most so many bytes, which are there, out of a pipe.
    fn drain(&self, pipe: &Self::Pipe, most: usize) -> io::Result<usize>;
}

/// What a session borrows for one call of `drive`.
#[derive(Debug)]
pub struct Lent<'a, P> {
    /// Where bytes lie that are on their way, and what is told of it.
    pub keep: &'a mut Keep,
    /// Pipes for bulk.
    pub pipes: &'a mut Pipes<P>,
    /// The session's number, under which it holds a pipe and keeps bytes.
    pub session: u32,
    /// In milliseconds.
    pub now: u64,
}

impl<P> Lent<'_, P> {
    fn owner(&self, half: usize) -> Owner {
        Owner { session: self.session, half: half as u8 }
    }
}

/// The two sides of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Side {
    Client,
    Server,
}

impl Side {
    /// The opposite one.
    pub fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }
}

/// What `drive` wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drive {
    /// Both sides would block: an event will tell.
    Idle,
    /// The budget is spent. No new edge will come: drive it again.
    Again,
    /// The session is over, and the caller closes both sides. After a reset
    /// it resets the other side, once what was sent to it is acknowledged.
    Done(CloseReason),
}

/// What became ready at one side's socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct Readiness {
    /// Bytes, an end or an error can be received.
    pub readable: bool,
    /// Something can be sent.
    pub writable: bool,
    /// The end of the stream, an error or urgent data is among what waits, so
    /// a short read does not mean that all was read.
    pub probe: bool,
}

/// The state of one session.
#[derive(Debug)]
pub struct Session {
    sides: [SideState; 2],
    halves: [Half; 2],
    /// The side that broke first.
    broken: Option<Side>,
}

/// Readiness is remembered until a call would block: edge-triggered epoll
/// reports a change, not a state.
#[derive(Debug)]
struct SideState {
    readable: bool,
    writable: bool,
    probe: bool,
    broken: Option<CloseReason>,
}

/// One direction.
#[derive(Debug)]
struct Half {
    from: Side,
    /// `None`: what arrives is dropped.
    to: Option<Side>,
    state: HalfState,
    /// The next read's size as a power of two: it grows while reads come full
    /// and are taken whole, and shrinks when the other side blocks, so that a
    /// slow reader costs little memory.
    read_bits: u8,
    /// Its bytes are never spliced.
    copies: bool,
    /// The pipe that it has borrowed, by number.
    pipe: Option<u8>,
    /// Bytes in that pipe.
    piped: u32,
    /// Bytes that came in large reads in a row.
    streak: u32,
    residue: Option<Residue>,
    received: u64,
    sent: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum HalfState {
    Open,
    Finishing,
    Ended,
}

/// Why a direction stopped.
#[derive(PartialEq, Eq)]
enum Stop {
    Blocked,
    Spent,
    Ended,
}

impl Session {
    /// A client joined to a server.
    pub fn relay() -> Session {
        Session::new(Half::new(Side::Client, Some(Side::Server)), Half::new(Side::Server, Some(Side::Client)))
    }

    /// A client that gets back what it sends.
    pub fn echo() -> Session {
        Session::new(Half::new(Side::Client, Some(Side::Client)), Half::ended())
    }

    /// A client of a service, or of an upstream.
    pub fn of_service(service: Option<Service>) -> Session {
        match service {
            None => Session::relay(),
            Some(Service::Echo | Service::Identify) => Session::echo(),
            Some(Service::Discard) => Session::discard(),
        }
    }

    /// A client whose bytes are dropped.
    pub fn discard() -> Session {
        Session::new(Half::new(Side::Client, None), Half::ended())
    }

    fn new(up: Half, down: Half) -> Session {
        let side = || SideState { readable: false, writable: true, probe: false, broken: None };
        Session { sides: [side(), side()], halves: [up, down], broken: None }
    }

    /// Remembers what an event said.
    pub fn handle_ready(&mut self, side: Side, readiness: Readiness) {
        let state = &mut self.sides[side as usize];
        state.readable |= readiness.readable | readiness.probe;
        state.writable |= readiness.writable;
        state.probe |= readiness.probe;
        if readiness.probe {
            self.handle_probe(side);
        }
    }

    /// From now on this side is read until it would block: a short read from
    /// a Unix socket may also mean a border between its writers' credentials.
    pub fn probe_always(&mut self, side: Side) {
        self.sides[side as usize].probe = true;
    }

    /// Moves bytes both ways, at most about `budget` of them each way (an
    /// upload must not starve its own answers).
    pub fn drive<E: End>(&mut self, ends: [&E; 2], lent: &mut Lent<'_, E::Pipe>, budget: usize) -> Drive {
        let mut spent = false;
        for half in 0..2 {
            spent |= self.pump(half, ends, lent, budget) == Stop::Spent;
        }
        // The second direction may have found the side broken that the first
        // one sends to or still has to read from.
        if self.broken.is_some() {
            spent |= self.pump(0, ends, lent, budget) == Stop::Spent;
        }
        match self.verdict() {
            Some(reason) => Drive::Done(reason),
            None if spent => Drive::Again,
            None => Drive::Idle,
        }
    }

    fn verdict(&self) -> Option<CloseReason> {
        if let Some(side) = self.broken {
            let delivered =
                self.halves.iter().all(|half| half.from != side || half.state == HalfState::Ended);
            return if delivered { self.sides[side as usize].broken } else { None };
        }
        let ended = self.halves.iter().all(|half| half.state == HalfState::Ended);
        ended.then_some(CloseReason::Finished)
    }

    /// Moves bytes in one direction until something stops it.
    fn pump<E: End>(
        &mut self,
        half: usize,
        ends: [&E; 2],
        lent: &mut Lent<'_, E::Pipe>,
        budget: usize,
    ) -> Stop {
        let stop = self.move_on(half, ends, lent, budget);
        self.put_back(half, lent);
        stop
    }

    fn move_on<E: End>(
        &mut self,
        half: usize,
        ends: [&E; 2],
        lent: &mut Lent<'_, E::Pipe>,
        budget: usize,
    ) -> Stop {
        let mut left = budget;
        loop {
            let (from, to, state) = {
                let half = &self.halves[half];
                (half.from, half.to, half.state)
            };
            if state == HalfState::Ended {
                return Stop::Ended;
            }
            if to.is_some_and(|to| self.sides[to as usize].broken.is_some()) {
                self.halves[half].end(lent.keep);
                return Stop::Ended;
            }
            if to.is_some_and(|to| !self.sides[to as usize].writable) {
                // With nothing to send there may still be an end to pass on.
                if self.halves[half].keeps_any() || state == HalfState::Open {
                    return Stop::Blocked;
                }
            }
            if self.halves[half].residue.is_some() {
                self.send_residue(half, ends, lent);
            } else if self.halves[half].piped > 0 {
                self.drain(half, ends, lent);
            } else if state == HalfState::Finishing {
                self.finish(half, ends, lent);
            } else if !self.sides[from as usize].readable {
                return Stop::Blocked;
            } else if left == 0 {
                return Stop::Spent;
            } else {
                let moved = if self.halves[half].is_bulk() { self.fill(half, ends, lent) } else { None };
                let moved = moved.unwrap_or_else(|| self.transfer(half, ends, lent));
                left = left.saturating_sub(moved);
            }
        }
    }

    fn send_residue<E: End>(&mut self, half: usize, ends: [&E; 2], lent: &mut Lent<'_, E::Pipe>) {
        let to = self.halves[half].to.expect("only a direction with a receiver keeps bytes");
        let mut residue = self.halves[half].residue.take().expect("the caller looked");
        let length = lent.keep.rest_length(&residue);
        lent.keep.claim_sending(lent.owner(half));
        let sent = ends[to as usize].send(lent.keep.rest(&residue));
        if let Ok(count) = sent {
            self.halves[half].sent += count as u64;
            if count == length {
                lent.keep.release(residue);
            } else {
                lent.keep.advance(&mut residue, count);
                self.halves[half].residue = Some(residue);
                self.sides[to as usize].writable = false;
            }
        } else {
            self.halves[half].residue = Some(residue);
        }
        lent.keep.unclaim();
        if let Err(error) = sent {
            self.handle_send_error(to, &error, lent);
        }
    }

    /// The end of the stream goes on to the other side, unless it was no
    /// orderly one. Where it is the last of the session, closing says it.
    fn finish<E: End>(&mut self, half: usize, ends: [&E; 2], lent: &mut Lent<'_, E::Pipe>) {
        let Half { from, to, .. } = self.halves[half];
        let is_last = self.broken.is_none() && self.halves[1 - half].state == HalfState::Ended;
        if self.sides[from as usize].broken.is_none()
            && !is_last
            && let Some(to) = to
            && let Err(error) = ends[to as usize].finish()
        {
            self.break_side(to, &error, lent.keep, lent.session);
        }
        self.halves[half].end(lent.keep);
    }

    /// One read, and the write of what it brought; answers how much that was.
    fn transfer<E: End>(&mut self, half: usize, ends: [&E; 2], lent: &mut Lent<'_, E::Pipe>) -> usize {
        // From before the read until what it brought is out or kept.
        lent.keep.claim(lent.owner(half), self.halves[half].sent);
        let moved = self.transfer_claimed(half, ends, lent);
        lent.keep.unclaim();
        moved
    }

    fn transfer_claimed<E: End>(
        &mut self,
        half: usize,
        ends: [&E; 2],
        lent: &mut Lent<'_, E::Pipe>,
    ) -> usize {
        let Half { from, to, read_bits, .. } = self.halves[half];
        let scratch = lent.keep.scratch();
        let size = scratch.len().min(1 << read_bits);
        let count = match ends[from as usize].receive(&mut scratch[..size]) {
            Ok(0) => {
                self.handle_end(half, lent.keep, lent.session);
                return 0;
            }
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.sides[from as usize].readable = false;
                return 0;
            }
            Err(error) => {
                // The kernel hands out what came before a reset first, so
                // nothing more can be read.
                self.break_side(from, &error, lent.keep, lent.session);
                self.halves[half].state = HalfState::Finishing;
                return 0;
            }
        };
        let sent = to.map(|to| ends[to as usize].send(&scratch[..count]));
        self.halves[half].received += count as u64;
        self.halves[half].handle_read(count, count == size);
        if count < size && !self.sides[from as usize].probe {
            self.sides[from as usize].readable = false;
        }
        let (Some(to), Some(sent)) = (to, sent) else { return count };
        let sent = match sent {
            Ok(sent) => sent,
            Err(error) => {
                self.handle_send_error(to, &error, lent);
                0
            }
        };
        let own = &mut self.halves[half];
        own.sent += sent as u64;
        if sent < count {
            // A short write filled the send buffer: an edge will come.
            self.sides[to as usize].writable = false;
            own.read_bits = own.read_bits.saturating_sub(1).max(MIN_READ_BITS);
            self.keep_from_scratch(lent.owner(half), sent, count, lent.keep);
        } else if count == size {
            own.read_bits = (own.read_bits + 1).min(MAX_READ_BITS);
        }
        count
    }

    /// Keeps this part of the scratch for the other side.
    fn keep_from_scratch(&mut self, owner: Owner, from: usize, to: usize, keep: &mut Keep) {
        let half = usize::from(owner.half);
        debug_assert!(self.halves[half].residue.is_none(), "nothing is received while something waits");
        if from == to {
            return;
        }
        self.halves[half].residue = keep.keep_scratch(owner, from, to, self.halves[half].sent);
        if self.halves[half].residue.is_none() {
            // Bytes that are lost end the session, and never silently.
            self.halves[half].end(keep);
            self.break_side(self.halves[half].from, &io::ErrorKind::OutOfMemory.into(), keep, owner.session);
        }
    }

    /// A side has finished: from here on an end is passed on.
    fn handle_end(&mut self, half: usize, keep: &Keep, session: u32) {
        keep.finish(Owner { session, half: half as u8 });
        self.halves[half].state = HalfState::Finishing;
    }

    fn handle_send_error<P>(&mut self, to: Side, error: &io::Error, lent: &mut Lent<'_, P>) {
        if error.kind() == io::ErrorKind::WouldBlock {
            self.sides[to as usize].writable = false;
        } else {
            self.break_side(to, error, lent.keep, lent.session);
        }
    }

    /// A side is gone. What it sent before may still wait to be read.
    fn break_side(&mut self, side: Side, error: &io::Error, keep: &Keep, session: u32) {
        let state = &mut self.sides[side as usize];
        state.readable = true;
        state.probe = true;
        let reason = *state.broken.get_or_insert(CloseReason::of_error(side, error));
        if self.broken.is_none() {
            self.broken = Some(side);
            keep.break_off(session, reason);
        }
    }

    /// Whether one side has finished and the other has not.
    pub fn is_half_closed(&self) -> bool {
        self.broken.is_some()
            || self.halves.iter().any(|half| half.to.is_some() && half.state != HalfState::Open)
    }

    /// Whether a side broke: what is left of the session ends where it is.
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Bytes received from the client, and sent to it.
    pub fn client_bytes(&self) -> [u64; 2] {
        let to_client = self.halves.iter().filter(|half| half.to == Some(Side::Client));
        [self.halves[0].received, to_client.map(|half| half.sent).sum()]
    }

    /// Bytes that were received and not yet sent.
    pub fn kept_bytes(&self, keep: &Keep) -> usize {
        let residue = |half: &Half| half.residue.as_ref().map_or(0, |residue| keep.rest_length(residue));
        self.halves.iter().map(|half| residue(half) + half.piped as usize).sum()
    }
}

impl Half {
    fn new(from: Side, to: Option<Side>) -> Half {
        Half {
            from,
            to,
            state: HalfState::Open,
            read_bits: FIRST_READ_BITS,
            copies: false,
            pipe: None,
            piped: 0,
            streak: 0,
            residue: None,
            received: 0,
            sent: 0,
        }
    }

    fn ended() -> Half {
        Half { state: HalfState::Ended, ..Half::new(Side::Server, None) }
    }

    fn keeps_any(&self) -> bool {
        self.residue.is_some() || self.piped > 0
    }

    /// What it keeps nobody waits for; its pipe goes back at the next turn.
    fn end(&mut self, keep: &mut Keep) {
        self.state = HalfState::Ended;
        if let Some(residue) = self.residue.take() {
            keep.release(residue);
        }
    }
}
