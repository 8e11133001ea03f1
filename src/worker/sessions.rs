//! The TCP sessions of a worker: sockets around `relay::Session`.
//!
//! ```text
//!   accept --> (Header) --> Connecting --connected--> Open --Done--> (Resetting) --> gone
//!                              |   ^                    |                 ^
//!                              |   +-- next server      +---- timeouts ---+
//!                              +--> Waiting (no descriptor, server's queue full) --> Connecting
//! ```
//!
//! A session that ends by a reset waits in Resetting until what was sent to
//! the other side is acknowledged: a reset throws away what is still queued.
//! Bounded by the descriptors of the process; each session has one deadline.

mod census;
mod connect;
mod entrance;
mod list;
mod moving;
mod options;
mod picking;
mod story;
mod waiting;

use std::cell::{OnceCell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Once;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use connect::Attempt;
use options::Lacks;
use waiting::Waiting;

use super::complaints::Complaints;
use super::departures::Departures;
use super::elsewhere::Elsewhere;
use super::gate::Gate;
use crate::balance::Balancer;
use crate::board::Board;
use crate::config::{Config, ServerAddress, Target};
use crate::counters::{ASLEEP, Counters, Layout, OfListener, OfServer, Process};
use crate::deadline::Deadlines;
use crate::handover::Story;
use crate::keep::{self, Keep};
use crate::ports::Ports;
use crate::proxy_protocol::Ends;
use crate::relay::{self, CloseReason, Drive, End, Lent, MAX_PIPED, Pipes, Readiness, Session, Side};
use crate::slab::{Key, Slab};
use crate::sys::bell::Bell;
use crate::sys::clock::{self, Millis};
use crate::sys::pipe::Pipe;
use crate::sys::stream::Stream;
use crate::worker::access_log::AccessLog;

/// Bytes that one session may move each way in one turn, so that a busy one
/// does not keep the others waiting.
const BUDGET: usize = 1 << 20;
/// After so many sessions a turn beats once more: with thousands in bulk it
/// takes long without being stuck.
const BEAT_EVERY: usize = 64;
/// How often a session that waits for acknowledgements is looked at.
const RESET_CHECK: Millis = 20;

/// Pipes of all workers together, of a megabyte each: half of what the kernel
/// grants a user without privileges, because in a reload there are two workers
/// a slot.
const PIPES_OF_DAEMON: usize = 32;
/// And of one worker.
const PIPES_OF_WORKER: usize = 16;

impl End for Stream {
    type Pipe = Pipe;

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        Stream::receive(self, into)
    }
    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Stream::send(self, bytes)
    }
    fn finish(&self) -> io::Result<()> {
        Stream::finish(self)
    }
    fn fill(&self, pipe: &Pipe, most: usize) -> io::Result<usize> {
        pipe.fill(self, most)
    }
    fn drain(&self, pipe: &Pipe, most: usize) -> io::Result<usize> {
        pipe.drain(self, most)
    }
}

impl relay::Pipe for Pipe {
    fn take(&self, into: &mut [u8]) -> io::Result<usize> {
        Pipe::take(self, into)
    }
    fn number(&self) -> i32 {
        Pipe::number(self)
    }
}

/// How many pipes each of so many workers may have.
pub fn pipe_count(slot_count: usize) -> usize {
    (PIPES_OF_DAEMON / slot_count.max(1)).clamp(1, PIPES_OF_WORKER)
}

fn open_pipe() -> Option<Pipe> {
    static SAID: Once = Once::new();
    match Pipe::open(MAX_PIPED) {
        Ok(pipe) => Some(pipe),
        Err(error) => {
            SAID.call_once(|| tracing::debug!(%error, "no pipe of 1 MiB: bulk is copied"));
            None
        }
    }
}

/// Who this worker is, and what every session and flow needs.
#[derive(Clone, Debug)]
pub struct Context<'a> {
    pub slot: usize,
    pub generation: u64,
    pub config: &'a Config,
    pub layout: &'a Layout,
    pub counters: Counters<'a>,
    /// Every slot's counters.
    pub all: Vec<Counters<'a>>,
    /// Who may come in at each listener.
    pub gates: Rc<[Gate]>,
    /// Where ended sessions and flows are told, if they are.
    pub access_log: Option<&'a RefCell<AccessLog>>,
    /// How the servers stand.
    pub board: Board<'a>,
    /// To be rung when traffic fails.
    pub failure_bell: &'a Bell,
    /// What the generation before still has.
    pub earlier: Option<&'a Elsewhere>,
    /// What the generation after has, once there is one.
    pub later: &'a OnceCell<Elsewhere>,
}

impl Context<'_> {
    /// A balancer for each upstream, which knows the board: what arrives from
    /// another process is known by its server's name.
    pub fn balancers(&self, now: Millis) -> Vec<Balancer> {
        let seed = (u64::from(std::process::id()) << 32) ^ now;
        let upstreams = self.config.upstreams.iter().enumerate();
        let balancers = upstreams.map(|(number, upstream)| {
            let mut balancer = Balancer::new(upstream, self.slot, self.all.len(), seed);
            balancer.refresh(&self.board, number);
            balancer
        });
        balancers.collect()
    }

    /// Sessions of a place over all slots, as far as the others have told.
    pub fn active_at(&self, upstream: usize, place: usize) -> u64 {
        let number = self.layout.place(upstream, place);
        let own: u64 = self.all.iter().map(|slot| slot.server(number, OfServer::Active).get()).sum();
        let others = self.earlier.into_iter().chain(self.later.get());
        own + others.map(|other| other.active_at(upstream, place)).sum::<u64>()
    }

    /// Real traffic has met a place that fails, by its number among all.
    pub fn count_failure(&self, number: usize) {
        self.counters.server(number, OfServer::Failures).add(1);
        self.failure_bell.ring();
    }

    /// Shows the supervisor that the loop turns.
    pub fn beat(&self, now: Millis) {
        self.counters.process(Process::Beat).set(now);
    }

    /// Shows the supervisor that the loop sleeps until something happens.
    pub fn sleep(&self, now: Millis) {
        self.counters.process(Process::Beat).set(now | ASLEEP);
    }
}

/// All sessions of the worker.
#[derive(Debug)]
pub struct Sessions<'a> {
    context: Context<'a>,
    slab: Slab<Entry>,
    deadlines: Deadlines,
    /// Sessions with something to do in the next turn.
    queue: Vec<Key>,
    /// The memory of the last turn's queue.
    spare_queue: Vec<Key>,
    balancers: Vec<Balancer>,
    /// Each upstream's epoch when the board was last looked at for sessions.
    seen_epochs: Vec<u64>,
    waiting: Waiting,
    keep: Keep,
    pipes: Pipes<Pipe>,
    fired: Vec<u32>,
    complaints: Complaints,
    departures: Departures,
    ports: Ports,
}

#[derive(Debug)]
struct Entry {
    session: Session,
    client: Stream,
    server: Option<Stream>,
    /// The server's place in its upstream, once one is picked.
    server_index: Option<u32>,
    /// Who had that place then: another address may have it by now.
    incarnation: u32,
    listener: u32,
    /// Where its client is counted among the listener's sources.
    source: u32,
    /// What a PROXY header said of the client; else its own socket knows.
    origin: Option<Box<Ends>>,
    stage: Stage,
    queued: bool,
    half_closed: bool,
    /// Options that its server's socket is still to get.
    lacks: Lacks,
    /// On its way to or from another process: nobody drives it.
    frozen: bool,
    born: Millis,
    /// When the last byte moved.
    moved: Millis,
    /// For the access log, where there is one.
    story: Option<Box<Story>>,
}

#[derive(Debug)]
enum Stage {
    /// Another process accepted it, and had no time for more.
    Accepted {
        header_read: bool,
        counted: bool,
    },
    /// A PROXY header is awaited.
    Header {
        until: Millis,
    },
    /// A connect is under way. What an attempt remembers no open session has a
    /// use for.
    Connecting(Box<Attempt>),
    /// A connect could not begin, and is tried again; or every server is full.
    Waiting(Box<Attempt>),
    Open,
    /// Both directions are over; the sides are reset when they have what was
    /// sent to them.
    Resetting {
        reason: CloseReason,
        until: Millis,
    },
}

impl<'a> Sessions<'a> {
    pub fn new(context: Context<'a>, keep: Keep, now: Millis) -> Sessions<'a> {
        let balancers = context.balancers(now);
        let pipes = Pipes::new(pipe_count(context.all.len()), open_pipe);
        Sessions {
            complaints: Complaints::default(),
            departures: Departures::new(context.config.upstreams.len(), context.slot),
            ports: Ports::of_host(),
            context,
            slab: Slab::new(),
            deadlines: Deadlines::new(now),
            queue: Vec::new(),
            spare_queue: Vec::new(),
            seen_epochs: vec![0; balancers.len()],
            waiting: Waiting::new(balancers.len()),
            balancers,
            keep,
            pipes,
            fired: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.slab.len()
    }

    /// Sessions over all slots, as far as the others have told.
    pub fn len_of_daemon(&self) -> u64 {
        self.context.all.iter().map(|counters| counters.process(Process::Active).get()).sum()
    }

    pub fn context(&self) -> &Context<'a> {
        &self.context
    }

    /// A session of a client that was accepted; `None` where it had to be
    /// closed at once.
    fn insert(
        &mut self,
        registry: &Registry,
        listener: usize,
        (client, peer): (Stream, SocketAddr),
        source: u32,
        now: Millis,
    ) -> Option<Key> {
        let session = match self.context.config.listeners[listener].target {
            Target::Upstream(_) => Session::relay(),
            Target::Service(service) => Session::of_service(Some(service)),
        };
        let fd = client.as_raw_fd();
        let entry = Entry {
            session,
            client,
            server: None,
            server_index: None,
            incarnation: 0,
            listener: listener as u32,
            source,
            origin: None,
            stage: Stage::Open,
            queued: false,
            half_closed: false,
            lacks: Lacks::Nothing,
            frozen: false,
            born: now,
            moved: now,
            story: self.begin_story(peer),
        };
        let key = self.slab.insert(entry);
        let slot = keep::Slot {
            state: keep::State::Accepted,
            listener: listener as u16,
            client: Some(fd),
            born: now,
            ..keep::Slot::default()
        };
        self.keep.begin(key.index, &slot);
        self.tell(key);
        self.count_accepted(listener);
        let counters = &self.context.counters;
        counters.process(Process::Active).add(1);
        counters.listener(listener, OfListener::Active).add(1);
        if register(registry, fd, key, Side::Client).is_err() {
            self.close(key, CloseReason::NoResources, now);
            return None;
        }
        Some(key)
    }

    fn identity(&self, listener: usize) -> String {
        let Context { slot, generation, config, .. } = &self.context;
        let name = &config.listeners[listener].name;
        format!("evenkeel listener={name} slot={slot} pid={} generation={generation}\n", std::process::id())
    }

    /// An event at one of a session's sockets. One that is gone is no error:
    /// its events may come late.
    pub fn handle_event(&mut self, registry: &Registry, event: &mio::event::Event, now: Millis) {
        let (key, bit) = Key::unpack(event.token().0 as u64);
        let side = if bit { Side::Server } else { Side::Client };
        let Some(entry) = self.slab.get_mut(key).filter(|entry| !entry.frozen) else { return };
        entry.session.handle_ready(
            side,
            Readiness {
                readable: event.is_readable(),
                writable: event.is_writable(),
                probe: event.is_read_closed() || event.is_error() || event.is_priority(),
            },
        );
        match entry.stage {
            Stage::Open => {
                if !std::mem::replace(&mut entry.queued, true) {
                    self.queue.push(key);
                }
            }
            Stage::Connecting(_) if side == Side::Server => {
                let failed = event.is_error() || event.is_write_closed();
                if event.is_writable() || failed {
                    self.handle_connected(registry, key, failed, now);
                }
            }
            // It waits for its turn: nobody is to hear of what it sent.
            Stage::Waiting(ref attempt) if attempt.waits_since.is_some() && event.is_error() => {
                self.close(key, CloseReason::ClientReset, now);
            }
            Stage::Header { .. } => {
                let ended = event.is_read_closed() || event.is_error();
                self.read_header(registry, key, ended, now);
            }
            // A client that has reset meanwhile sent something before,
            // perhaps: that is delivered first, as everywhere.
            Stage::Connecting(_) | Stage::Waiting(_) => {}
            Stage::Accepted { .. } | Stage::Resetting { .. } => {}
        }
    }

    fn enqueue(&mut self, key: Key) {
        if let Some(entry) = self.slab.get_mut(key)
            && !entry.queued
            && !entry.frozen
        {
            entry.queued = true;
            self.queue.push(key);
        }
    }

    /// Whether a turn would move anything.
    pub fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Drives each session that has something to do once.
    pub fn turn(&mut self, now: Millis) {
        let spare = std::mem::take(&mut self.spare_queue);
        let mut queue = std::mem::replace(&mut self.queue, spare);
        for (index, key) in queue.drain(..).enumerate() {
            if index % BEAT_EVERY == BEAT_EVERY - 1 {
                self.context.beat(clock::coarse());
            }
            self.drive(key, now);
        }
        self.spare_queue = queue;
        self.take_pipe_away(now);
    }

    /// Where a session in bulk found no pipe, one that has had its for long is
    /// to keep its bytes in memory.
    fn take_pipe_away(&mut self, now: Millis) {
        let Some(holder) = self.pipes.take_wish(now) else { return };
        let key = self.slab.key_at(holder.session).expect("a session gives its pipe back when it ends");
        let entry = self.slab.get_mut(key).expect("just found");
        let (keep, pipes) = (&mut self.keep, &mut self.pipes);
        entry.session.unpipe(usize::from(holder.half), &mut Lent { keep, pipes, session: key.index, now });
        if entry.session.is_broken() {
            self.enqueue(key);
        }
    }

    fn drive(&mut self, key: Key, now: Millis) {
        let Some(entry) = self.slab.get_mut(key) else { return };
        entry.queued = false;
        if entry.frozen || !matches!(entry.stage, Stage::Open) {
            return;
        }
        let before = entry.session.client_bytes();
        let server = entry.server.as_ref().unwrap_or(&entry.client);
        let mut lent = Lent { keep: &mut self.keep, pipes: &mut self.pipes, session: key.index, now };
        let result = entry.session.drive([&entry.client, server], &mut lent, BUDGET);
        let after = entry.session.client_bytes();
        let listener = entry.listener as usize;
        if before != after {
            entry.moved = now;
            self.keep.moved(key.index, now);
            let counters = &self.context.counters;
            counters.listener(listener, OfListener::BytesIn).add(after[0] - before[0]);
            counters.listener(listener, OfListener::BytesOut).add(after[1] - before[1]);
            entry.quicken(before[0], after[0]);
        }
        match result {
            Drive::Done(reason) => return self.close(key, reason, now),
            Drive::Again => {
                entry.queued = true;
                self.queue.push(key);
            }
            Drive::Idle => {}
        }
        if !entry.half_closed && entry.session.is_half_closed() {
            // From here on another, usually shorter, time-out holds.
            entry.half_closed = true;
            self.set_deadline(key, now);
        }
    }

    /// When the next deadline is due, in milliseconds.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.deadlines.next().into_iter().chain(self.waiting.next_look()).min()
    }

    /// Ends or moves on what is due.
    pub fn handle_deadlines(&mut self, registry: &Registry, now: Millis) {
        let mut fired = std::mem::take(&mut self.fired);
        self.deadlines.advance(now, &mut fired);
        for index in fired.drain(..) {
            if let Some(key) = self.slab.key_at(index) {
                self.handle_deadline(registry, key, now);
            }
        }
        self.fired = fired;
        self.serve_waiting(registry, now);
    }

    fn handle_deadline(&mut self, registry: &Registry, key: Key, now: Millis) {
        self.settle(key, now);
        let entry = self.slab.get_mut(key).expect("the caller found it");
        match &mut entry.stage {
            Stage::Open => match due(entry, self.context.config) {
                Some((due, reason)) if due <= now => self.close(key, reason, now),
                _ => self.set_deadline(key, now),
            },
            Stage::Accepted { .. } => {}
            Stage::Header { .. } => self.refuse(key, CloseReason::ProxyTimeout, now),
            Stage::Connecting(_) => self.handle_connect_timeout(registry, key, now),
            Stage::Waiting(attempt) if attempt.waits_since.is_some() => {
                self.close(key, CloseReason::QueueTimeout, now);
            }
            Stage::Waiting(attempt) if attempt.until <= now => self.close(key, CloseReason::NoResources, now),
            Stage::Waiting(_) => {
                let Stage::Waiting(attempt) = std::mem::replace(&mut entry.stage, Stage::Open) else {
                    unreachable!("matched above");
                };
                self.begin_connect(registry, key, attempt, now);
            }
            Stage::Resetting { reason, until } => {
                let (reason, until) = (*reason, *until);
                if until <= now || !entry.has_unsent(reason) {
                    self.remove(key, reason);
                } else {
                    self.deadlines.set(key.index, now + RESET_CHECK);
                }
            }
        }
    }

    /// Sets the deadline of an open session: of its time-outs the nearest. It
    /// is left standing while bytes flow, and looked at again when it fires.
    fn set_deadline(&mut self, key: Key, now: Millis) {
        let Some(entry) = self.slab.get(key) else { return };
        let end = due(entry, self.context.config).map(|(due, _)| due);
        match end.into_iter().chain(entry.settles_at()).min() {
            Some(due) => self.deadlines.set(key.index, due.max(now)),
            None => self.deadlines.clear(key.index),
        }
    }

    /// Ends a session. Unless it finished, both sides are to see a reset, not
    /// an orderly end; what was sent to them before goes first.
    fn close(&mut self, key: Key, reason: CloseReason, now: Millis) {
        let Some(entry) = self.slab.get_mut(key) else { return };
        self.keep.close(key.index, reason);
        let (keep, pipes) = (&mut self.keep, &mut self.pipes);
        entry.session.abandon(&mut Lent { keep, pipes, session: key.index, now });
        if reason == CloseReason::Finished {
            return self.remove(key, reason);
        }
        for stream in [Some(&entry.client), entry.server.as_ref()].into_iter().flatten() {
            let _ = stream.reset_on_close();
        }
        let waits = reason.broken_side().is_some() || reason == CloseReason::MaxAge;
        if waits && entry.has_unsent(reason) {
            let tcp = &self.context.config.listeners[entry.listener as usize].tcp;
            let until = now + millis(tcp.half_close_timeout).max(1_000);
            entry.stage = Stage::Resetting { reason, until };
            self.deadlines.set(key.index, now + RESET_CHECK);
            return;
        }
        self.remove(key, reason);
    }

    fn remove(&mut self, key: Key, reason: CloseReason) {
        let Some(mut entry) = self.slab.remove(key) else { return };
        self.keep.close(key.index, reason);
        self.abandon_parts(&mut entry, key);
        self.deadlines.clear(key.index);
        self.waiting.look_soon();
        self.log_end(&entry, reason);
        self.context.counters.ended(entry.listener as usize, reason).add(1);
        self.count_gone(&entry);
        // Closes its sockets.
        drop(entry);
        self.keep.free(key.index);
    }

    /// Gives back what its relay has borrowed.
    fn abandon_parts(&mut self, entry: &mut Entry, key: Key) {
        let (keep, pipes) = (&mut self.keep, &mut self.pipes);
        entry.session.abandon(&mut Lent { keep, pipes, session: key.index, now: 0 });
    }

    /// What outlives this process.
    pub fn keep(&mut self) -> &mut Keep {
        &mut self.keep
    }

    /// It lives here no more, whatever the reason.
    fn count_gone(&self, entry: &Entry) {
        let counters = &self.context.counters;
        counters.process(Process::Active).less_one();
        counters.listener(entry.listener as usize, OfListener::Active).less_one();
        self.context.handle_left(entry.listener as usize, entry.source);
        if let Some(server) = self.server_number(entry) {
            counters.server(server, OfServer::Active).less_one();
        }
    }

    /// The number of the session's place among all places of servers.
    fn server_number(&self, entry: &Entry) -> Option<usize> {
        let Target::Upstream(upstream) = self.context.config.listeners[entry.listener as usize].target else {
            return None;
        };
        entry.server_index.map(|index| self.context.layout.place(upstream, index as usize))
    }

    /// Resets every session that is left.
    pub fn close_all(&mut self, reason: CloseReason) {
        for key in self.slab.keys() {
            if let Some(entry) = self.slab.get(key) {
                let _ = entry.client.reset_on_close();
                if let Some(server) = &entry.server {
                    let _ = server.reset_on_close();
                }
            }
            self.remove(key, reason);
        }
    }
}

impl Entry {
    /// Whether a side that still lives has not acknowledged everything.
    fn has_unsent(&self, reason: CloseReason) -> bool {
        let unsent = |side, stream: &Stream| {
            reason.broken_side() != Some(side) && stream.unsent().is_ok_and(|count| count > 0)
        };
        unsent(Side::Client, &self.client)
            || self.server.as_ref().is_some_and(|server| unsent(Side::Server, server))
    }
}

/// When an open session is to end if nothing moves, and why.
fn due(entry: &Entry, config: &Config) -> Option<(Millis, CloseReason)> {
    let tcp = &config.listeners[entry.listener as usize].tcp;
    let (timeout, reason) = if entry.half_closed {
        (tcp.half_close_timeout, CloseReason::HalfCloseTimeout)
    } else {
        (tcp.idle_timeout, CloseReason::IdleTimeout)
    };
    let silent = (!timeout.is_zero()).then(|| (entry.moved + millis(timeout), reason));
    let aged = (!tcp.max_age.is_zero()).then(|| {
        let age = millis(tcp.max_age);
        // Up to a tenth less, by the descriptor and time of birth: clients
        // that came together do not all come back together.
        let seed = (entry.born ^ (entry.client.as_raw_fd() as u64) << 20).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (entry.born + age - age / 10 * (seed >> 54) / 1024, CloseReason::MaxAge)
    });
    silent.into_iter().chain(aged).min_by_key(|(due, _)| *due)
}

/// Both directions at once, and urgent data as an event: epoll reports a
/// change, so this is the only registration that a session needs.
fn register(registry: &Registry, fd: i32, key: Key, side: Side) -> io::Result<()> {
    let token = Token(key.pack(side == Side::Server) as usize);
    let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
    registry.register(&mut SourceFd(&fd), token, interest)
}

fn millis(duration: std::time::Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 4).min(u64::MAX / 4)
}

fn is_unix(address: &ServerAddress) -> bool {
    matches!(address, ServerAddress::Unix(_))
}
