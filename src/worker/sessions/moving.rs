//! Sessions on their way to another process, and those that arrive.
//!
//! A session that is sent is frozen: out of epoll, out of the queue, without a
//! deadline, until the receiver has acknowledged it (then it is forgotten) or
//! has not (then it is thawed and goes on). One that arrives lies still until
//! the acknowledgement is out: never do two processes drive it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use mio::Registry;
use mio::unix::SourceFd;

use super::connect::Attempt;
use super::options::Lacks;
use super::{Entry, Sessions, Stage, is_unix, register};
use crate::config::Target;
use crate::counters::{OfListener, OfServer, Process};
use crate::handover::{self, Arrival, Record};
use crate::relay::{CloseReason, Readiness, Side};
use crate::slab::Key;
use crate::sources::UNCOUNTED;
use crate::sys::clock::Millis;
use crate::sys::stream::Stream;

/// One session that is being sent.
#[derive(Debug)]
pub struct Parcel {
    pub key: Key,
    pub record: Record,
    pub kept: Vec<u8>,
}

impl Sessions<'_> {
    /// Freezes up to so many sessions that can travel, and no more once their
    /// bytes make a large bundle.
    pub fn pack(&mut self, registry: &Registry, count: usize, now: Millis) -> Vec<Parcel> {
        let mut parcels = Vec::new();
        let mut kept = 0;
        for key in self.slab.keys() {
            if parcels.len() == count || kept >= handover::ENOUGH_BYTES {
                break;
            }
            if let Some(parcel) = self.describe(key, now) {
                kept += parcel.kept.len();
                let entry = self.slab.get_mut(key).expect("just described");
                entry.frozen = true;
                for stream in [Some(&entry.client), entry.server.as_ref()].into_iter().flatten() {
                    // Closing alone would not end it: a duplicate will live on.
                    let _ = registry.deregister(&mut SourceFd(&stream.as_raw_fd()));
                }
                self.deadlines.clear(key.index);
                parcels.push(parcel);
            }
        }
        parcels
    }

    fn describe(&mut self, key: Key, now: Millis) -> Option<Parcel> {
        let entry = self.slab.get_mut(key).filter(|entry| entry.is_movable())?;
        entry.session.unpipe_all(&mut self.pipes, now);
        let Some((relay, kept)) = entry.session.snapshot() else {
            // A pipe failed: the next turn ends it.
            self.enqueue(key);
            return None;
        };
        let entry = self.slab.get(key).expect("just found");
        let listener = &self.context.config.listeners[entry.listener as usize];
        let name = |index: u32| match listener.target {
            Target::Upstream(upstream) => self.place_name(upstream, index as usize),
            Target::Service(_) => String::new(),
        };
        let stage = match &entry.stage {
            Stage::Open => handover::Stage::Open,
            Stage::Connecting(attempt) | Stage::Waiting(attempt) => handover::Stage::Connecting {
                until: attempt.until,
                tried: attempt.tried.iter().map(|&index| name(index)).collect(),
                failure: attempt.failure,
                waits_since: attempt.waits_since,
            },
            Stage::Header { until } => handover::Stage::Header { until: *until },
            Stage::Resetting { .. } => return None,
        };
        // A server that the configuration has no more keeps its session.
        let server = entry.server.as_ref().map(|_| entry.server_index.map_or(String::new(), name));
        let record = Record {
            listener: listener.name.clone(),
            server,
            stage,
            relay,
            origin: entry.origin.as_deref().copied(),
            born: entry.born,
            moved: entry.moved,
            story: entry.story.as_deref().cloned(),
        };
        Some(Parcel { key, record, kept })
    }

    /// The sockets of a frozen session, in the bundle's order.
    pub fn sockets(&self, key: Key) -> Vec<BorrowedFd<'_>> {
        let entry = self.slab.get(key).expect("frozen sessions stay");
        [Some(&entry.client), entry.server.as_ref()].into_iter().flatten().map(AsFd::as_fd).collect()
    }

    /// The receiver has it: nothing of it is left here.
    pub fn forget(&mut self, key: Key) {
        if let Some(mut entry) = self.slab.remove(key) {
            entry.session.abandon(&mut self.pipes);
            self.deadlines.clear(key.index);
            self.count_gone(&entry);
        }
    }

    /// The receiver has not: it goes on here.
    pub fn thaw(&mut self, registry: &Registry, key: Key, now: Millis) {
        if let Some(entry) = self.slab.get_mut(key) {
            entry.frozen = false;
            self.activate(registry, key, now);
        }
    }

    /// Takes in a session; it lies still until `activate`. `None` where its
    /// listener is not known here.
    pub fn take(&mut self, arrival: Arrival, mut sockets: Vec<OwnedFd>, now: Millis) -> Option<Key> {
        let Arrival { record, session } = arrival;
        let config = self.context.config;
        let listener = config.listeners.iter().position(|listener| listener.name == record.listener)?;
        let upstream = match config.listeners[listener].target {
            Target::Upstream(upstream) => Some(upstream),
            Target::Service(_) => None,
        };
        if let Some(upstream) = upstream {
            // A place may have got its address just now.
            self.balancers[upstream].refresh(&self.context.board, upstream);
        }
        let find = |name: &String| self.place_named(upstream?, name).map(|place| place as u32);
        let server_index = record.server.as_ref().and_then(find);
        if sockets.len() != record.socket_count() {
            return None;
        }
        let server = if sockets.len() == 2 { sockets.pop().map(Stream::from) } else { None };
        let client = Stream::from(sockets.pop()?);
        let unknown = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let origin = record.origin.map(|ends| ends.source);
        let address = || origin.or_else(|| client.peer().ok().flatten()).unwrap_or(unknown);
        let stage = match record.stage {
            handover::Stage::Header { until } => Stage::Header { until },
            handover::Stage::Open => Stage::Open,
            handover::Stage::Connecting { until, tried, failure, waits_since } => {
                upstream?;
                let tried = tried.iter().filter_map(find).collect();
                let attempt = Attempt { client: address(), until, began: None, tried, failure, waits_since };
                let attempt = Box::new(attempt);
                // Without its server in this configuration the connect that is
                // under way is given up for the next one.
                if server.is_some() && server_index.is_some() {
                    Stage::Connecting(attempt)
                } else {
                    Stage::Waiting(attempt)
                }
            }
        };
        // Who is still to say who it is was not let in yet.
        let counted = self.context.counts_sources(listener) && !matches!(stage, Stage::Header { .. });
        let source =
            if counted { self.context.handle_taken(listener, address().ip(), now) } else { UNCOUNTED };
        let waiting = matches!(stage, Stage::Waiting(_));
        let half_closed = session.is_half_closed();
        let place = |index: u32| self.balancers[upstream?].places().get(index as usize);
        let incarnation = server_index.and_then(place).map_or(0, |place| place.incarnation);
        let entry = Entry {
            session,
            client,
            server: server.filter(|_| !waiting),
            server_index: server_index.filter(|_| !waiting),
            incarnation,
            listener: listener as u32,
            source,
            origin: record.origin.map(Box::new),
            stage,
            queued: false,
            half_closed,
            lacks: Lacks::Nothing,
            frozen: true,
            born: record.born,
            moved: record.moved,
            story: record.story.filter(|_| self.context.access_log.is_some()).map(Box::new),
        };
        Some(self.slab.insert(entry))
    }

    /// What was taken in is about to be acknowledged.
    pub fn count_taken(&self, key: Key) {
        let Some(entry) = self.slab.get(key) else { return };
        let counters = &self.context.counters;
        counters.process(Process::Active).add(1);
        counters.listener(entry.listener as usize, OfListener::Active).add(1);
        if let Some(server) = self.server_number(entry) {
            counters.server(server, OfServer::Active).add(1);
        }
    }

    /// Lets a session that lay still go on: everything is tried once, because
    /// the edges that told what was ready are lost.
    pub fn activate(&mut self, registry: &Registry, key: Key, now: Millis) {
        let Some(entry) = self.slab.get_mut(key) else { return };
        entry.frozen = false;
        let all = Readiness { readable: true, writable: true, probe: false };
        entry.session.handle_ready(Side::Client, all);
        if matches!(entry.stage, Stage::Open) {
            entry.session.handle_ready(Side::Server, all);
        }
        if let Err(error) = register_both(registry, entry, key) {
            tracing::warn!(%error, "a session that was handed over cannot be polled");
            return self.close(key, CloseReason::NoResources, now);
        }
        let is_unix = self.server_is_unix(key);
        let entry = self.slab.get_mut(key).expect("still there");
        if is_unix {
            entry.session.probe_always(Side::Server);
        } else if matches!(entry.stage, Stage::Open) && entry.server.is_some() {
            // What the sender has set already does no harm twice.
            entry.lacks = Lacks::All;
        }
        let entry = self.slab.get(key).expect("still there");
        match &entry.stage {
            Stage::Open if self.is_to_be_reset(key) => self.close(key, CloseReason::ServerDown, now),
            Stage::Open => {
                self.set_deadline(key, now);
                self.enqueue(key);
            }
            Stage::Connecting(attempt) => self.deadlines.set(key.index, attempt.until.max(now)),
            // Back into the queue, at the place that is due to it.
            Stage::Waiting(attempt) if attempt.waits_since.is_some() => {
                let (attempt, upstream) = (attempt.clone(), self.upstream(key));
                if let Some(upstream) = upstream {
                    self.wait(upstream, key, attempt, now);
                }
            }
            Stage::Waiting(_) => self.deadlines.set(key.index, now),
            Stage::Header { until } => {
                self.deadlines.set(key.index, (*until).max(now));
                self.read_header(registry, key, false, now);
            }
            Stage::Resetting { .. } => unreachable!("what resets does not travel"),
        }
    }

    fn server_is_unix(&self, key: Key) -> bool {
        let Some(entry) = self.slab.get(key) else { return false };
        match (self.context.config.listeners[entry.listener as usize].target, entry.server_index) {
            (Target::Upstream(upstream), Some(index)) => is_unix(self.server_at(upstream, index as usize)),
            _ => false,
        }
    }
}

fn register_both(registry: &Registry, entry: &Entry, key: Key) -> io::Result<()> {
    register(registry, entry.client.as_raw_fd(), key, Side::Client)?;
    match &entry.server {
        Some(server) => register(registry, server.as_raw_fd(), key, Side::Server),
        None => Ok(()),
    }
}

impl Entry {
    fn is_movable(&self) -> bool {
        !self.frozen && !matches!(self.stage, Stage::Resetting { .. }) && !self.session.is_broken()
    }
}
