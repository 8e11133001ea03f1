//! From an accepted client to a server that took the connection.
//!
//! A server that fails is not tried again for this session; up to `retries`
//! others are. What is no server's fault (no descriptor, no local port) is
//! counted as such and spoils nobody's record.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;

use mio::Registry;

use super::options::Lacks;
use super::{Sessions, Stage, is_unix, millis, register};
use crate::balance::Pick;
use crate::config::{SendProxy, ServerAddress, Target};
use crate::counters::{OfListener, OfServer, Process};
use crate::keep::State;
use crate::proxy_protocol::{Ends, Header, Transport};
use crate::relay::{CloseReason, Readiness, Side};
use crate::slab::Key;
use crate::sys::clock::{self, Millis};
use crate::sys::stream::{self, Connecting, connect_tcp, connect_unix};

/// How long a connect waits that could not begin, in milliseconds.
const RETRY_AFTER: Millis = 20;

/// What a session remembers on its way to a server.
#[derive(Clone, Debug)]
pub(super) struct Attempt {
    /// Whose session it is.
    pub client: SocketAddr,
    /// When the present connect, or the wait for one, is given up.
    pub until: Millis,
    /// When the present connect began, in microseconds: a tick of the coarse
    /// clock is longer than most connects take. `None` where another process
    /// began it.
    pub began: Option<u64>,
    /// The servers that failed.
    pub tried: Vec<u32>,
    /// How the last of them did.
    pub failure: CloseReason,
    /// Since when it waits for a place at a server, if it has to.
    pub waits_since: Option<Millis>,
}

/// Why a connect could not begin or did not succeed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// The server's doing: the next one is tried.
    Server,
    /// A full queue of a Unix socket, or no descriptor: later, the same again.
    Later,
    /// No local port towards this server.
    NoPorts,
}

impl Refusal {
    fn of(error: &io::Error) -> Refusal {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Refusal::Later,
            Some(libc::EADDRNOTAVAIL) => Refusal::NoPorts,
            _ => Refusal::Server,
        }
    }
}

impl Sessions<'_> {
    /// Connects to the next server that may be tried.
    pub(super) fn begin_connect(
        &mut self,
        registry: &Registry,
        key: Key,
        mut attempt: Box<Attempt>,
        now: Millis,
    ) {
        self.keep.stand(key.index, State::Connecting, attempt.until);
        loop {
            let upstream = self.upstream(key).expect("only a session with an upstream connects");
            let server = match self.pick(upstream, &attempt, now) {
                Pick::Place(place) if self.reserve(upstream, place) => place,
                Pick::Place(_) | Pick::Full => return self.wait(upstream, key, attempt, now),
                Pick::Tried => return self.close(key, attempt.failure, now),
                Pick::Nobody => return self.close(key, CloseReason::NoServer, now),
            };
            attempt.waits_since = None;
            let number = self.context.layout.place(upstream, server);
            attempt.began = Some(clock::precise_micros());
            match self.connect(upstream, server, attempt.client.ip(), now) {
                Ok(connecting) => {
                    let (stream, done) = match connecting {
                        Connecting::Done(stream) => (stream, true),
                        Connecting::UnderWay(stream) => (stream, false),
                    };
                    if register(registry, stream.as_raw_fd(), key, Side::Server).is_err() {
                        self.unreserve(number);
                        return self.close(key, CloseReason::NoResources, now);
                    }
                    let unix = is_unix(self.server_at(upstream, server));
                    self.keep.connect(key.index, server as u32, stream.as_raw_fd(), unix);
                    let incarnation = self.balancers[upstream].places()[server].incarnation;
                    let entry = self.slab.get_mut(key).expect("the caller holds it");
                    entry.server = Some(stream);
                    entry.server_index = Some(server as u32);
                    if let Some(story) = &mut entry.story {
                        story.connect_began = Some(now);
                        story.retries = attempt.tried.len() as u32;
                    }
                    entry.incarnation = incarnation;
                    self.tell(key);
                    self.deadlines.set(key.index, attempt.until);
                    self.slab.get_mut(key).expect("the caller holds it").stage = Stage::Connecting(attempt);
                    if done {
                        self.establish(key, now);
                    }
                    return;
                }
                Err(error) => match self.refused(number, &error) {
                    Refusal::Later => {
                        self.deadlines.set(key.index, (now + RETRY_AFTER).min(attempt.until));
                        let entry = self.slab.get_mut(key).expect("the caller holds it");
                        entry.stage = Stage::Waiting(attempt);
                        return;
                    }
                    refusal => {
                        attempt.failure = self.note(refusal, number);
                        attempt.tried.push(server as u32);
                    }
                },
            }
        }
    }

    /// A place that was reserved is used no more.
    fn unreserve(&mut self, number: usize) {
        self.context.counters.server(number, OfServer::Active).less_one();
        self.waiting.look_soon();
    }

    fn refused(&mut self, number: usize, error: &io::Error) -> Refusal {
        self.unreserve(number);
        Refusal::of(error)
    }

    /// Counts a refusal where it belongs.
    fn note(&self, refusal: Refusal, server: usize) -> CloseReason {
        match refusal {
            Refusal::NoPorts => CloseReason::NoPorts,
            Refusal::Later => CloseReason::NoResources,
            Refusal::Server => {
                self.context.count_failure(server);
                CloseReason::ConnectFailed
            }
        }
    }

    fn connect(
        &mut self,
        upstream: usize,
        server: usize,
        client: IpAddr,
        now: Millis,
    ) -> io::Result<Connecting> {
        match self.address_at(upstream, server) {
            Some(ServerAddress::Ip(address)) => {
                let config = &self.context.config.upstreams[upstream];
                let (departures, ports) = (&mut self.departures, &mut self.ports);
                let connect = |from| ports.connect(|window| connect_tcp(address, from, window));
                let (shortages, result) =
                    departures.connect((upstream, config), client, address, now, connect);
                self.context.counters.process(Process::PortShortages).add(shortages);
                result
            }
            Some(ServerAddress::Unix(path)) => connect_unix(&path),
            Some(ServerAddress::Name { .. } | ServerAddress::Srv(_)) | None => {
                Err(io::ErrorKind::Unsupported.into())
            }
        }
    }

    /// The server's socket says that the connect is decided; `failed` where
    /// with an error: without one there is none to ask for.
    pub(super) fn handle_connected(&mut self, registry: &Registry, key: Key, failed: bool, now: Millis) {
        if !failed {
            return self.establish(key, now);
        }
        let entry = self.slab.get(key).expect("the caller found it");
        let server = entry.server.as_ref().expect("a connecting session has a server's socket");
        match server.take_error() {
            Ok(None) => self.establish(key, now),
            Ok(Some(error)) | Err(error) => {
                let number = self.server_number(entry).expect("a connecting session has a server");
                let failure = self.note(Refusal::of(&error), number);
                self.try_next(registry, key, failure, now);
            }
        }
    }

    /// The server did not answer in time.
    pub(super) fn handle_connect_timeout(&mut self, registry: &Registry, key: Key, now: Millis) {
        let entry = self.slab.get(key).expect("the caller found it");
        let number = self.server_number(entry).expect("a connecting session has a server");
        self.context.count_failure(number);
        self.try_next(registry, key, CloseReason::ConnectTimeout, now);
    }

    /// Gives the present server up and begins with the next.
    fn try_next(&mut self, registry: &Registry, key: Key, failure: CloseReason, now: Millis) {
        let number = self.server_number(self.slab.get(key).expect("the caller found it"));
        let number = number.expect("a connecting session has a server");
        self.unreserve(number);
        let entry = self.slab.get_mut(key).expect("the caller found it");
        let server = entry.server_index.take().expect("a connecting session has a server");
        // Closing it also ends its registration: there is no duplicate.
        self.keep.give_up_server(key.index);
        entry.server = None;
        let Stage::Connecting(mut attempt) = std::mem::replace(&mut entry.stage, Stage::Open) else {
            unreachable!("only a connecting session gives up its server");
        };
        attempt.tried.push(server);
        attempt.failure = failure;
        attempt.until = now + self.connect_timeout(key);
        (attempt.began, attempt.waits_since) = (None, None);
        self.begin_connect(registry, key, attempt, now);
    }

    /// The first attempt of a new session.
    pub(super) fn first_attempt(&self, key: Key, client: SocketAddr, now: Millis) -> Box<Attempt> {
        let until = now + self.connect_timeout(key);
        let failure = CloseReason::ConnectFailed;
        Box::new(Attempt { client, until, began: None, tried: Vec::new(), failure, waits_since: None })
    }

    pub(super) fn connect_timeout(&self, key: Key) -> Millis {
        let upstream = self.upstream(key).expect("only a session with an upstream connects");
        millis(self.context.config.upstreams[upstream].connect_timeout)
    }

    pub(super) fn upstream(&self, key: Key) -> Option<usize> {
        let listener = self.slab.get(key)?.listener as usize;
        match self.context.config.listeners[listener].target {
            Target::Upstream(upstream) => Some(upstream),
            Target::Service(_) => None,
        }
    }

    /// The session has its server: bytes may flow.
    fn establish(&mut self, key: Key, now: Millis) {
        let entry = self.slab.get_mut(key).expect("the caller found it");
        let stage = std::mem::replace(&mut entry.stage, Stage::Open);
        entry.moved = now;
        if let Some(story) = &mut entry.story {
            story.established = Some(now);
        }
        entry.session.handle_ready(Side::Server, Readiness { writable: true, ..Readiness::default() });
        let mut began = None;
        if let Stage::Connecting(attempt) = stage {
            began = attempt.began;
            self.introduce(key, attempt.client);
        }
        self.keep.stand(key.index, State::Open, now);
        self.tell(key);
        let number = self.server_number(self.slab.get(key).expect("still there"));
        let number = number.expect("an established session has a server");
        self.context.counters.server(number, OfServer::Connections).add(1);
        if let Some(began) = began {
            let took = clock::precise_micros().saturating_sub(began);
            self.context.counters.count_connect(number, took);
        }
        let upstream = self.upstream(key).expect("an established session has an upstream");
        let index = self.slab.get(key).expect("still there").server_index;
        let index = index.expect("an established session has a server") as usize;
        let unix = is_unix(self.server_at(upstream, index));
        let entry = self.slab.get_mut(key).expect("still there");
        if unix {
            entry.session.probe_always(Side::Server);
        } else {
            entry.lacks = Lacks::All;
        }
        self.set_deadline(key, now);
        self.enqueue(key);
    }

    /// Puts a PROXY header in front of what the client sends, where its
    /// upstream wants one.
    fn introduce(&mut self, key: Key, client: SocketAddr) {
        let Some(upstream) = self.upstream(key) else { return };
        let version = self.context.config.upstreams[upstream].send_proxy;
        if version == SendProxy::Off {
            return;
        }
        let entry = self.slab.get_mut(key).expect("the caller found it");
        let ends = entry.origin.as_deref().copied().unwrap_or_else(|| {
            // A socket that was reset meanwhile knows its own address still.
            let local = entry.client.local().ok().flatten();
            let unknown = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
            Ends { source: client, destination: local.unwrap_or(unknown) }
        });
        let header = match version {
            SendProxy::Off => return,
            SendProxy::V1 => Header::version_1(&ends),
            SendProxy::V2 => Header::version_2(&ends, Transport::Stream),
        };
        let count = entry.session.introduce(header.as_bytes(), &entry.client, &mut self.keep, key.index);
        let listener = entry.listener as usize;
        self.context.counters.listener(listener, OfListener::BytesIn).add(count as u64);
        if let Some(server) = entry.server.as_ref().filter(|_| count == 0) {
            // Nagle would keep the first request until the header is
            // acknowledged, which a server puts off by 40 ms.
            let _ = stream::set_quick(server);
        }
    }
}
