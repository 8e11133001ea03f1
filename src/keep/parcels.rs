//! A dead worker's sessions as the records that a living one sends in a
//! hand-over.
//!
//! Nothing is closed and nothing is written here, so it may be done again after
//! whoever was to have them has died too; but bytes in a pipe are taken out of
//! it, so a parcel is kept until its receipt.

use std::collections::HashSet;
use std::io;
use std::os::fd::RawFd;

use super::chunks::Owner;
use super::extra;
use super::recovery::{Direction, Failure, Held, Sight, Verdict, recover};
use super::remains::{ClaimTable, Remains};
use super::slot::{Slot, State};
use crate::config::Service;
use crate::handover::{Record, Stage};
use crate::relay::{CloseReason, Progress, Side, Snapshot};
use crate::sys::counts::TcpCounts;

/// What the kernel is asked, by number of a descriptor.
pub trait Kernel {
    /// The counts of a TCP connection.
    fn counts(&self, socket: RawFd) -> io::Result<TcpCounts>;
    /// How many bytes lie in a pipe.
    fn piped(&self, pipe: RawFd) -> io::Result<usize>;
    /// Takes bytes out of a pipe.
    fn take(&self, pipe: RawFd, into: &mut [u8]) -> io::Result<usize>;
    /// The client's address.
    fn peer(&self, socket: RawFd) -> Option<std::net::SocketAddr>;
}

/// What the configuration calls things.
pub trait Names {
    /// A listener by number.
    fn listener(&self, number: u16) -> Option<Listener<'_>>;
    /// The server at a place of a listener's upstream, empty where the
    /// configuration has it no more.
    fn server(&self, listener: u16, place: u32) -> String;
}

/// A listener of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Listener<'a> {
    /// Its name.
    pub name: &'a str,
    /// What answers there, if no upstream does.
    pub service: Option<Service>,
}

/// A session, and what is to be done.
#[derive(Debug)]
pub struct Heir {
    /// Its number in the remains.
    pub session: u32,
    /// Whether it came from another process that may have it still.
    pub is_arriving: bool,
    /// What is to be done.
    pub fate: Fate,
}

/// What is to be done with a session.
#[derive(Debug)]
pub enum Fate {
    /// It goes on elsewhere.
    Send {
        /// As a living worker packs it.
        record: Box<Record>,
        /// With these bytes.
        kept: Vec<u8>,
        /// The client's socket, and the server's where the record has one.
        sockets: Vec<RawFd>,
        /// A socket to a server that is of no use, to be closed.
        useless: Option<RawFd>,
    },
    /// It ends: these sockets are to be closed.
    Close {
        /// The client's and the server's.
        sockets: Vec<RawFd>,
        /// By a reset, once what was sent is acknowledged.
        reset: bool,
        /// What is to be sent before that.
        owed: Option<(RawFd, Vec<u8>)>,
        /// Why.
        reason: CloseReason,
        /// What its worker said and what the kernel counted did not agree.
        is_disagreement: bool,
    },
}

impl Remains {
    /// What is to be done with each session. Bytes are taken out of pipes as it
    /// goes on.
    pub fn inherit<'a>(
        &'a self,
        kernel: &'a impl Kernel,
        names: &'a impl Names,
    ) -> impl Iterator<Item = Heir> + 'a {
        let claims = self.claims();
        self.slots().map(move |(session, slot)| {
            let one = One { remains: self, kernel, names, claims: &claims, session, slot: &slot };
            Heir { session, is_arriving: slot.is_arriving, fate: one.fate() }
        })
    }

    /// Every descriptor that a slot or a claim names.
    pub fn named_descriptors(&self) -> HashSet<RawFd> {
        let sockets = self.slots().flat_map(|(_, slot)| [slot.client, slot.server]).flatten();
        sockets.chain(self.claims().pipes()).collect()
    }
}

/// A client that was accepted and that no slot names: as if it were accepted
/// now.
pub fn adopt(listener: &Listener, now: u64) -> Record {
    record(listener, Stage::Accepted { header_read: false, counted: false }, now)
}

fn record(listener: &Listener, stage: Stage, now: u64) -> Record {
    Record {
        listener: listener.name.to_string(),
        server: None,
        stage,
        relay: Snapshot::begin(listener.service),
        origin: None,
        born: now,
        moved: now,
        story: None,
        crashes: 0,
    }
}

fn reset_by(side: Side) -> CloseReason {
    match side {
        Side::Client => CloseReason::ClientReset,
        Side::Server => CloseReason::ServerReset,
    }
}

/// One session that is looked at.
struct One<'a, K, N> {
    remains: &'a Remains,
    kernel: &'a K,
    names: &'a N,
    claims: &'a ClaimTable,
    session: u32,
    slot: &'a Slot,
}

impl<K: Kernel, N: Names> One<'_, K, N> {
    fn fate(&self) -> Fate {
        self.send_or_close().unwrap_or_else(|failure| self.close_for(failure))
    }

    fn close_for(&self, failure: Failure) -> Fate {
        let reason = match failure {
            Failure::Lost(side) => reset_by(side),
            Failure::Uncertain | Failure::Disagreement => CloseReason::WorkerLost,
        };
        self.close(true, None, reason, failure == Failure::Disagreement)
    }

    fn close(
        &self,
        reset: bool,
        owed: Option<(RawFd, Vec<u8>)>,
        reason: CloseReason,
        is_disagreement: bool,
    ) -> Fate {
        let sockets = [self.slot.client, self.slot.server].into_iter().flatten().collect();
        Fate::Close { sockets, reset, owed, reason, is_disagreement }
    }

    fn send_or_close(&self) -> Result<Fate, Failure> {
        let slot = self.slot;
        if slot.state == State::Closing {
            let reason = slot.reason.unwrap_or(CloseReason::WorkerLost);
            return Ok(self.close(reason != CloseReason::Finished, None, reason, false));
        }
        let listener = self.names.listener(slot.listener).ok_or(Failure::Disagreement)?;
        let client = slot.client.ok_or(Failure::Disagreement)?;
        let (claims, pipes) = self.claims_of_both()?;
        let tcp_server = slot.server.filter(|_| !slot.is_unix);
        let counts = [Some(client), tcp_server].map(|fd| fd.and_then(|fd| self.kernel.counts(fd).ok()));
        let verdict = recover(&Sight { slot, service: listener.service, counts, claims });
        match verdict {
            Verdict::Enter { header_read } => {
                let stage = Stage::Accepted { header_read, counted: true };
                Ok(self.send(&listener, stage, None))
            }
            Verdict::AwaitHeader => Ok(self.send(&listener, Stage::Header { until: slot.time }, None)),
            Verdict::Connect => Ok(self.send(&listener, self.connecting(), None)),
            Verdict::Connecting => Ok(self.send(&listener, self.connecting(), slot.server)),
            Verdict::Open(directions) => self.go_on(&listener, directions, pipes),
            Verdict::End { lost, owed } => {
                let owed = lost.zip(owed).and_then(|(side, held)| {
                    let socket = [slot.client, slot.server][side.other() as usize]?;
                    Some((socket, self.bytes(&held, pipes[side as usize]).ok()?))
                });
                let reason = slot.reason.or(lost.map(reset_by)).unwrap_or(CloseReason::Finished);
                Ok(self.close(reason != CloseReason::Finished, owed, reason, false))
            }
            Verdict::Reset(failure) => Err(failure),
        }
    }

    fn claims_of_both(&self) -> Result<([super::recovery::Claims; 2], [Option<RawFd>; 2]), Failure> {
        let of = |half: u8| {
            let owner = Owner { session: self.session, half };
            self.claims.of(owner, |pipe| self.kernel.piped(pipe)).map_err(|_| Failure::Disagreement)
        };
        let ((up, up_pipe), (down, down_pipe)) = (of(0)?, of(1)?);
        Ok(([up, down], [up_pipe, down_pipe]))
    }

    fn connecting(&self) -> Stage {
        let slot = self.slot;
        let is_queued = slot.state == State::Queued;
        Stage::Connecting {
            until: slot.time,
            // Which servers were tried is forgotten: they may be tried again.
            tried: Vec::new(),
            failure: CloseReason::ConnectFailed,
            waits_since: is_queued.then_some(slot.time),
        }
    }

    /// A session of which nothing is owed.
    fn send(&self, listener: &Listener, stage: Stage, server: Option<RawFd>) -> Fate {
        let useless = self.slot.server.filter(|_| server.is_none());
        let record = self.describe(listener, stage, server.is_some());
        let sockets = self.slot.client.into_iter().chain(server).collect();
        Fate::Send { record: Box::new(record), kept: Vec::new(), sockets, useless }
    }

    fn go_on(
        &self,
        listener: &Listener,
        directions: [Direction; 2],
        pipes: [Option<RawFd>; 2],
    ) -> Result<Fate, Failure> {
        let mut kept = Vec::new();
        for (direction, pipe) in directions.iter().zip(pipes) {
            kept.extend(self.bytes(&direction.held, pipe).map_err(|_| Failure::Disagreement)?);
        }
        let progress = directions.map(|direction| Progress {
            received: direction.received,
            sent: direction.sent,
            kept: direction.held.len() as u32,
            has_ended: direction.has_ended,
        });
        let slot = self.slot;
        let mut record = self.describe(listener, Stage::Open, slot.server.is_some());
        record.relay = Snapshot::resume(listener.service, progress);
        let sockets = slot.client.into_iter().chain(slot.server).collect();
        Ok(Fate::Send { record: Box::new(record), kept, sockets, useless: None })
    }

    fn describe(&self, listener: &Listener, stage: Stage, has_server: bool) -> Record {
        let slot = self.slot;
        let extra = (slot.has_origin || slot.has_story).then(|| self.remains.extra(self.session));
        let origin = extra.as_ref().filter(|_| slot.has_origin).map(extra::read_origin);
        let client = || origin.map(|ends| ends.source).or_else(|| self.kernel.peer(slot.client?));
        let story = extra.as_ref().filter(|_| slot.has_story);
        let story = story.and_then(|words| Some(extra::read_story(words, client()?)));
        let moved = if slot.state == State::Open { slot.time } else { slot.born };
        let name = || slot.place.map_or(String::new(), |place| self.names.server(slot.listener, place));
        let server = has_server.then(name);
        let crashes = slot.crashes;
        Record { server, origin, moved, story, crashes, ..record(listener, stage, slot.born) }
    }

    fn bytes(&self, held: &Held, pipe: Option<RawFd>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(held.len());
        self.remains.copy(held, &mut bytes)?;
        let mut at = bytes.len();
        bytes.resize(at + held.piped, 0);
        while at < bytes.len() {
            let pipe = pipe.ok_or(io::ErrorKind::NotFound)?;
            match self.kernel.take(pipe, &mut bytes[at..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => at += count,
            }
        }
        Ok(bytes)
    }
}
