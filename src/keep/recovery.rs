//! What is owed to a session whose worker was killed: from what it left and
//! from what the kernel has counted.
//!
//! ```text
//!   read from a side      consumed(its socket), less a PROXY header
//!   written to a side     written(its socket)
//!   owed to a side        read from the other + our preface - written to it
//! ```
//!
//! What is owed has to lie where the remains say, to the byte; else the session
//! is reset, because nothing wrong may ever be sent. A Unix socket has no
//! counts: there the worker's own are taken, which are exact unless it was
//! killed in the middle of a call for that very session. Pure.

use std::ops::Range;

use super::chunks::{Chunk, SCRATCH_BYTES};
use super::slot::{Slot, State};
use crate::config::Service;
use crate::relay::Side;
use crate::sys::counts::{TcpCounts, TcpState};

/// The base of a claim that means a call for a chunk's bytes, not the scratch.
pub(super) const SENDING: u64 = u64::MAX;

/// All that is known of a session.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// What its worker said.
    pub slot: &'a Slot,
    /// What answers it, where that is no server.
    pub service: Option<Service>,
    /// The client's socket and the server's; `None` where the kernel counts
    /// nothing.
    pub counts: [Option<TcpCounts>; 2],
    pub(super) claims: [Claims; 2],
}

/// Where the bytes of a direction may lie.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Claims {
    /// The scratch, and the count of bytes that had left.
    pub scratch: Option<u64>,
    /// A chunk by number.
    pub chunk: Option<(u32, Chunk)>,
    /// How many lie in its pipe.
    pub pipe: Option<usize>,
}

/// Where the bytes that are owed lie, in the order in which they go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// This part of the scratch.
    pub scratch: Range<usize>,
    /// This part of a chunk.
    pub chunk: Option<(u32, Range<usize>)>,
    /// So many in the direction's pipe.
    pub piped: usize,
}

impl Held {
    /// How many they are.
    pub fn len(&self) -> usize {
        self.scratch.len() + self.chunk.as_ref().map_or(0, |(_, range)| range.len()) + self.piped
    }

    /// Whether nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One direction of a session that goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    /// Bytes that came from the side.
    pub received: u64,
    /// Bytes that went to the other, ours among them.
    pub sent: u64,
    /// The end of it was passed on.
    pub has_ended: bool,
    /// What is owed.
    pub held: Held,
}

/// What becomes of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was done for it: it is like one that is accepted now. Where a
    /// PROXY header is required, `header_read` says whether it was read.
    #[allow(missing_docs)]
    Enter { header_read: bool },
    /// Its PROXY header is awaited.
    AwaitHeader,
    /// It is to be connected. A server's socket that it has is of no use.
    Connect,
    /// A connect is under way, or decided.
    Connecting,
    /// Bytes flow.
    Open([Direction; 2]),
    /// It was ending: in an orderly way, or because a side was lost; then what
    /// is owed to the other goes there first.
    #[allow(missing_docs)]
    End { lost: Option<Side>, owed: Option<Held> },
    /// It cannot go on.
    Reset(Failure),
}

/// Why a session cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A side was reset.
    Lost(Side),
    /// Its worker was killed in the middle of a call of which nobody counts.
    Uncertain,
    /// What the worker said and what the kernel has counted do not agree.
    Disagreement,
}

/// What becomes of a session.
pub fn recover(sight: &Sight) -> Verdict {
    let Some(client) = sight.counts[0] else { return Verdict::Reset(Failure::Disagreement) };
    let verdict = judge(sight, client);
    if verdict != Verdict::Reset(Failure::Disagreement) {
        return verdict;
    }
    // A reset behind our own end looks like the peer's end, and what was not
    // acknowledged counts as unwritten: after one, counts agree with nothing.
    let is_closed =
        |&side: &Side| sight.counts[side as usize].is_some_and(|counts| counts.state == TcpState::Close);
    let lost = [Side::Client, Side::Server].into_iter().find(is_closed);
    Verdict::Reset(lost.map_or(Failure::Disagreement, Failure::Lost))
}

fn judge(sight: &Sight, client: TcpCounts) -> Verdict {
    let slot = sight.slot;
    match slot.state {
        State::Free | State::Closing => Verdict::End { lost: None, owed: None },
        // Nothing was passed on to it, so nobody closed it in an orderly way.
        State::Accepted | State::Header if is_lost(sight, Side::Client) => {
            Verdict::End { lost: Some(Side::Client), owed: None }
        }
        State::Accepted | State::Header => match client.consumed() {
            0 if slot.state == State::Header => Verdict::AwaitHeader,
            0 => Verdict::Enter { header_read: false },
            read if read == u64::from(slot.header) => Verdict::Enter { header_read: true },
            _ => Verdict::Reset(Failure::Disagreement),
        },
        // Something of ours was on its way to the server: it is connected.
        State::Connecting if slot.preface > 0 && slot.server.is_some() => open(sight, &client),
        State::Connecting | State::Queued => connecting(sight, &client),
        State::Open => open(sight, &client),
    }
}

fn connecting(sight: &Sight, client: &TcpCounts) -> Verdict {
    let slot = sight.slot;
    if !is_lost(sight, Side::Client) && client.consumed() != u64::from(slot.header) {
        return Verdict::Reset(Failure::Disagreement);
    }
    match (slot.server, sight.counts[1]) {
        (None, _) => Verdict::Connect,
        (Some(_), None) if slot.is_unix => Verdict::Connecting,
        (Some(_), None) => Verdict::Connect,
        // The worker may have read the error already, which nobody can again.
        (Some(_), Some(server)) if server.state == TcpState::Close && !server.has_error => Verdict::Connect,
        (Some(_), Some(server)) if server.written(true) > 0 && server.state != TcpState::Close => {
            Verdict::Reset(Failure::Disagreement)
        }
        (Some(_), Some(_)) => Verdict::Connecting,
    }
}

fn open(sight: &Sight, client: &TcpCounts) -> Verdict {
    let lost = [Side::Client, Side::Server].map(|side| is_lost(sight, side));
    let broken = sight.slot.reason.and_then(|reason| reason.broken_side());
    let directions = match sight.service {
        None => relayed(sight, client, broken, lost),
        Some(Service::Echo | Service::Identify) => echoed(sight, client, broken.is_some() || lost[0]),
        Some(Service::Discard) => {
            let received = client.consumed().saturating_sub(sight.slot.header.into());
            Ok([Direction { received, ..Direction::default() }, ended()])
        }
    };
    let directions = match directions {
        Ok(directions) => directions,
        Err(failure) => return Verdict::Reset(failure),
    };
    // A reset whose error was read looks like an end of file from now on, and
    // where the end was read before, nobody reads the error.
    let silent = [Side::Client, Side::Server].into_iter().find(|&side| {
        let is_told = |counts: TcpCounts| counts.has_error && !sight.slot.finished[side as usize];
        lost[side as usize] && !sight.counts[side as usize].is_some_and(is_told)
    });
    if let Some(side) = broken.or(silent) {
        let [up, down] = directions;
        let held = if side == Side::Client { up.held } else { down.held };
        let is_owed = !held.is_empty() && !lost[side.other() as usize];
        return Verdict::End { lost: Some(side), owed: is_owed.then_some(held) };
    }
    if directions.iter().all(|direction| direction.has_ended) {
        return Verdict::End { lost: None, owed: None };
    }
    Verdict::Open(directions)
}

/// Whether a side was reset. Both ends in an orderly way, too, make it Close;
/// then we have passed an end on to it.
fn is_lost(sight: &Sight, side: Side) -> bool {
    let closed = sight.counts[side as usize].filter(|counts| counts.state == TcpState::Close);
    closed.is_some_and(|counts| counts.has_error || !sight.slot.finished[side.other() as usize])
}

fn relayed(
    sight: &Sight,
    client: &TcpCounts,
    broken: Option<Side>,
    lost: [bool; 2],
) -> Result<[Direction; 2], Failure> {
    let slot = sight.slot;
    if slot.server.is_none() || (sight.counts[1].is_none() && !slot.is_unix) {
        return Err(Failure::Disagreement);
    }
    let gone = [Side::Client, Side::Server].map(|side| lost[side as usize] || broken == Some(side));
    let (header, preface) = (u64::from(slot.header), u64::from(slot.preface));
    let from_client = client.consumed().checked_sub(header).map(|read| read + preface);
    let from_client = if gone[0] { None } else { Some(from_client.ok_or(Failure::Disagreement)?) };
    let from_server = sight.counts[1].filter(|_| !gone[1]).map(|counts| counts.consumed());
    let to_client = (!gone[0]).then(|| client.written(false));
    let to_server = sight.counts[1].filter(|_| !gone[1]).map(|counts| counts.written(true));
    // How much came of a last read, nobody can tell any more.
    let of_lost = |side: Side, failure| match failure {
        Failure::Uncertain if gone[side as usize] => Failure::Lost(side),
        failure => failure,
    };
    let up = direction(from_client, to_server, gone[1], &sight.claims[0]);
    let mut up = up.map_err(|failure| of_lost(Side::Client, failure))?;
    up.received = up.received.saturating_sub(preface);
    up.has_ended = !gone[1] && sight.counts[1].is_some_and(|counts| counts.state.has_our_fin());
    let down = direction(from_server, to_client, gone[0], &sight.claims[1]);
    let mut down = down.map_err(|failure| of_lost(Side::Server, failure))?;
    down.has_ended = !gone[0] && client.state.has_our_fin();
    if [&up, &down].into_iter().any(|direction| direction.has_ended && !direction.held.is_empty()) {
        // Behind its end nothing is owed.
        return Err(Failure::Disagreement);
    }
    Ok([up, down])
}

fn echoed(sight: &Sight, client: &TcpCounts, gone: bool) -> Result<[Direction; 2], Failure> {
    if gone {
        return Err(Failure::Lost(Side::Client));
    }
    let preface = u64::from(sight.slot.preface);
    let read = client.consumed().checked_sub(sight.slot.header.into()).ok_or(Failure::Disagreement)?;
    let mut up = direction(Some(read + preface), Some(client.written(false)), false, &sight.claims[0])?;
    up.received -= preface.min(up.received);
    up.has_ended = client.state.has_our_fin();
    Ok([up, ended()])
}

fn ended() -> Direction {
    Direction { has_ended: true, ..Direction::default() }
}

/// What is owed, from how much was read and how much was written, where that
/// is known; `is_deaf` where nobody is there to take it.
fn direction(
    read: Option<u64>,
    written: Option<u64>,
    is_deaf: bool,
    claims: &Claims,
) -> Result<Direction, Failure> {
    let direction = |received: u64, held: Held| {
        let sent = received.saturating_sub(held.len() as u64);
        Direction { received, sent, has_ended: false, held }
    };
    if is_deaf {
        return Ok(direction(read.unwrap_or(0), Held::default()));
    }
    let held = match (read, written) {
        (Some(read), Some(written)) => counted(read, written, claims)?,
        (read, written) => told(read, written, claims)?,
    };
    let received = read.or(written.map(|written| written + held.len() as u64));
    Ok(direction(received.unwrap_or(held.len() as u64), held))
}

/// The kernel has counted both ends.
fn counted(read: u64, written: u64, claims: &Claims) -> Result<Held, Failure> {
    let owed = read.checked_sub(written).and_then(|owed| usize::try_from(owed).ok());
    let owed = owed.ok_or(Failure::Disagreement)?;
    let piped = claims.pipe.unwrap_or(0);
    if owed == 0 && piped == 0 {
        return Ok(Held::default());
    }
    let copied = owed.checked_sub(piped).ok_or(Failure::Disagreement)?;
    let held = if let Some((number, chunk)) = claims.chunk {
        let from = chunk.offset(written);
        // What is in the pipe is the end of what the chunk is to have.
        let is_whole = from.checked_add(owed) == Some(chunk.length) && chunk.sent <= from;
        (is_whole && (piped == 0 || from == 0)).then(|| Held {
            chunk: Some((number, from..from + copied)),
            piped,
            ..Held::default()
        })
    } else if copied == 0 {
        Some(Held { piped, ..Held::default() })
    } else {
        let from = claims.scratch.and_then(|base| written.checked_sub(base));
        let range = from.and_then(|from| {
            let (from, to) = (usize::try_from(from).ok()?, usize::try_from(from).ok()?.checked_add(owed)?);
            (to <= SCRATCH_BYTES && piped == 0).then_some(from..to)
        });
        range.map(|scratch| Held { scratch, ..Held::default() })
    };
    held.ok_or(Failure::Disagreement)
}

/// The kernel has not: what the worker said is exact, unless it was in a call.
fn told(read: Option<u64>, written: Option<u64>, claims: &Claims) -> Result<Held, Failure> {
    let piped = claims.pipe.unwrap_or(0);
    if let Some((number, chunk)) = claims.chunk {
        // A reader that is counted settles where the chunk ends, a writer how
        // much of it has left.
        if read.is_some_and(|read| chunk.offset(read) != chunk.length) {
            return Err(Failure::Disagreement);
        }
        let from = match written {
            Some(written) => chunk.offset(written),
            None if claims.scratch == Some(SENDING) => return Err(Failure::Uncertain),
            None => chunk.sent,
        };
        let to = chunk.length.checked_sub(piped).filter(|&to| from <= to && (piped == 0 || from == 0));
        let to = to.ok_or(Failure::Disagreement)?;
        return Ok(Held { chunk: Some((number, from..to)), piped, ..Held::default() });
    }
    match (claims.scratch, read) {
        (None, _) => Ok(Held { piped, ..Held::default() }),
        // Nothing was read yet.
        (Some(base), Some(read)) if read == base && piped == 0 => Ok(Held::default()),
        (Some(_), _) => Err(Failure::Uncertain),
    }
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
