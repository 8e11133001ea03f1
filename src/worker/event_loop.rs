//! The worker's one loop: events, then work, then deadlines.
//!
//! A turn takes the events, accepts up to a budget, drives each session that
//! has something to do once, and sees to deadlines. The clock is read once a
//! turn. With nothing to do it sleeps without a time-out.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use tracing::{error, info, warn};

use super::birth::Born;
use super::complaints::Complaints;
use super::datagrams::{self, Datagrams};
use super::gate::Gate;
use super::handover::{Cargo, Load as Freight, Passing, Progress, Receivers, Sender};
use super::leave::{Leave, Step};
use super::listeners::{self, Accepted, Listeners, PAUSE};
use super::load::Load;
use super::sessions::{self, Context, Sessions};
use super::test_hook::Busy;
use crate::board::Board;
use crate::config::Mode;
use crate::control::sessions::Query;
use crate::control::{self, FromWorker, Place, ToWorker};
use crate::counters::{Counters, Process};
use crate::relay::CloseReason;
use crate::sys::channel::Channel;
use crate::sys::clock::{self, Millis};
use crate::sys::{handshakes, process, shared};

/// Connections that one socket may bring in one turn.
const ACCEPT_BUDGET: usize = 64;
/// Descriptors that are no session's: standard error, epoll, the channel, the
/// counters and what the system libraries open.
const RESERVED_FILES: u64 = 64;

/// Tokens of what is no session: the highest bit, which a packed key has not.
pub const SPECIAL: usize = 1 << 63;
const CHANNEL: Token = Token(SPECIAL);

/// The bell that tells of a change on the upstream board.
const BOARD: Token = Token(SPECIAL | (FIRST_PEER - 1));

/// Channels to other workers, from here on by a running number.
const FIRST_PEER: usize = 1 << 32;

/// The token of a listening socket.
pub fn listener_token(index: usize) -> Token {
    Token(SPECIAL | (index + 1))
}

/// The number of a special token.
pub fn special_number(token: Token) -> usize {
    token.0 & !SPECIAL
}

/// Sessions on their way out.
struct Outgoing {
    sender: Sender,
    /// The worker leaves afterwards, and has so long for what cannot move.
    then_leave: Option<Option<Millis>>,
}

struct Loop<'a> {
    poll: Poll,
    channel: Channel,
    listeners: Listeners,
    /// Places whose sockets outlive the daemon.
    outliving: Vec<Place>,
    sessions: Sessions<'a>,
    datagrams: Datagrams<'a>,
    session_limit: usize,
    load: Option<&'a Load>,
    busy: Busy,
    leave: Option<Leave>,
    /// Its slot's sockets, until the supervisor says `Serve`.
    unserved: Vec<(Place, OwnedFd)>,
    /// Those of them that another process had before.
    kept: Vec<Place>,
    sender: Option<Outgoing>,
    passing: Option<Passing>,
    receivers: Receivers,
    peer_count: usize,
    /// The supervisor is gone; at this time the worker begins to leave.
    orphaned_until: Option<Millis>,
    is_orphan: bool,
    paused_before: bool,
    complaints: Complaints,
    #[cfg(debug_assertions)]
    hang: super::hang::Hang,
}

/// Serves until told to leave; the process's exit code.
pub fn run(mut born: Born, channel: Channel) -> ExitCode {
    let sockets = std::mem::take(&mut born.sockets);
    let Some(mut state) = Loop::new(&born, sockets, channel) else { return ExitCode::from(1) };
    match state.serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(%error, "the event loop failed");
            ExitCode::from(1)
        }
    }
}

impl<'a> Loop<'a> {
    fn new(born: &'a Born, sockets: Vec<(Place, OwnedFd)>, channel: Channel) -> Option<Loop<'a>> {
        let over = |region: &'a crate::sys::shared::Region| Counters::over(region.words(), &born.layout);
        let counters = over(&born.own)?;
        counters.begin_life(&born.layout);
        let context = Context {
            slot: born.slot,
            generation: born.generation,
            config: &born.config,
            layout: &born.layout,
            counters,
            access_log: born.access_log.as_ref(),
            all: born.all.iter().map(over).collect::<Option<Vec<_>>>()?,
            gates: born.config.listeners.iter().map(Gate::of).collect(),
            board: Board::over(born.board.words(), &born.board_layout)?,
            failure_bell: &born.failure_bell,
        };
        debug_assert_eq!(context.all.len(), born.slot_count);
        let reserved = RESERVED_FILES + born.slot_count as u64 + 2 * sockets.len() as u64;
        // Two ends a pipe.
        let reserved = reserved + 2 * sessions::pipe_count(born.slot_count) as u64;
        let files = process::file_limit().saturating_sub(reserved);
        let modes = |mode: Mode| context.config.listeners.iter().any(|listener| listener.mode == mode);
        // Where both modes are served, flows have half of the descriptors.
        let for_flows = if modes(Mode::Tcp) && modes(Mode::Udp) { files / 2 } else { files };
        // Two descriptors a session.
        let for_sessions = if modes(Mode::Udp) { files - for_flows } else { files };
        let session_limit = (for_sessions / 2).max(1) as usize;
        let poll = Poll::new().ok()?;
        let bell = born.board_bell.as_raw_fd();
        poll.registry().register(&mut SourceFd(&bell), BOARD, Interest::READABLE).ok()?;
        let state = Loop {
            poll,
            channel,
            listeners: Listeners::default(),
            datagrams: Datagrams::new(context.clone(), for_flows as usize, clock::coarse()),
            outliving: born.outliving.clone(),
            sessions: Sessions::new(context, clock::coarse()),
            session_limit,
            load: born.load.as_ref(),
            busy: Busy::of_slot(born.slot),
            leave: None,
            unserved: sockets,
            kept: born.kept.clone(),
            sender: None,
            passing: None,
            receivers: Receivers::default(),
            peer_count: 0,
            orphaned_until: None,
            is_orphan: false,
            paused_before: false,
            complaints: Complaints::default(),
            #[cfg(debug_assertions)]
            hang: super::hang::Hang::of_environment(born.slot),
        };
        state.begin().inspect_err(|error| error!(%error, "cannot begin")).ok()
    }

    fn begin(self) -> io::Result<Loop<'a>> {
        self.channel.set_nonblocking()?;
        let channel = self.channel.as_fd().as_raw_fd();
        self.poll.registry().register(&mut SourceFd(&channel), CHANNEL, Interest::READABLE)?;
        Ok(self)
    }

    /// The supervisor lets it accept.
    fn begin_serving(&mut self, now: Millis) {
        self.datagrams.hold(self.receivers.is_shut(now));
        for (place, socket) in std::mem::take(&mut self.unserved) {
            let kept = self.kept.contains(&place);
            if let Err(error) = self.add(place, socket, None, kept) {
                error!(%error, "a listener cannot be polled");
                std::process::exit(1);
            }
        }
        self.tell(&FromWorker::Ready);
    }

    fn add(&mut self, place: Place, socket: OwnedFd, lent_by: Option<usize>, kept: bool) -> io::Result<()> {
        if self.datagrams.takes(place) {
            self.datagrams.add(self.poll.registry(), place, socket, lent_by, kept)
        } else {
            self.listeners.add(self.poll.registry(), place, socket, lent_by)
        }
    }

    fn tell(&self, message: &FromWorker) {
        if let Err(error) = control::send(&self.channel, message, &[])
            && !self.is_orphan
        {
            warn!(%error, "the supervisor did not take a message");
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        loop {
            let now = clock::coarse();
            let timeout = self.next_wake(now).map(|at| Duration::from_millis(at.saturating_sub(now)));
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            let now = clock::coarse();
            self.sessions.context().beat(now);
            if let Some(load) = self.load {
                load.begin_turn(now);
            }
            for event in &events {
                self.busy.burn();
                match event.token() {
                    CHANNEL => self.handle_channel(now),
                    BOARD => {
                        self.sessions.handle_board(now);
                        self.datagrams.handle_board();
                    }
                    token if datagrams::is_token(token) => self.datagrams.handle_event(token),
                    token if token.0 & SPECIAL != 0 && special_number(token) >= FIRST_PEER => {
                        self.handle_peer(token, now);
                    }
                    token if token.0 & SPECIAL != 0 => {
                        self.listeners.handle_ready(listeners::index_of(token))
                    }
                    _ => self.sessions.handle_event(self.poll.registry(), event, now),
                }
            }
            let before = self.sessions.len();
            self.sessions.turn(now);
            self.sessions.handle_deadlines(self.poll.registry(), now);
            self.datagrams.turn(self.poll.registry(), now);
            self.datagrams.handle_deadlines(now);
            if self.sessions.len() < before {
                self.listeners.end_pause(self.poll.registry(), now);
            }
            self.accept(now);
            self.drive_handover(now);
            self.tend_gate(now);
            let over = self.handle_leave(now);
            self.sessions.flush_log();
            if over {
                return Ok(());
            }
            self.publish_lag(now);
            if let Some(load) = self.load {
                load.end_turn(now, clock::coarse(), self.sessions.len());
            }
            #[cfg(debug_assertions)]
            self.hang.spin_if_told();
        }
    }

    /// When the loop has to run again though nothing happens; `now` where
    /// there is work left.
    fn next_wake(&self, now: Millis) -> Option<Millis> {
        if self.sessions.has_work() || self.datagrams.has_work() || self.listeners.has_ready(now) {
            return Some(now);
        }
        let leave = self.leave.as_ref().and_then(Leave::next_deadline);
        let sessions_may_go = self.sessions_may_go();
        let handover =
            self.sender.as_ref().and_then(|outgoing| outgoing.sender.next_deadline(now, sessions_may_go));
        let flows = self.datagrams.next_deadline();
        [
            handover,
            self.passing.as_ref().and_then(|passing| passing.next_deadline(now)),
            self.receivers.next_deadline(),
            flows,
            self.sessions.next_deadline(),
            self.listeners.pause_end(),
            leave,
            self.orphaned_until,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn publish_lag(&self, since: Millis) {
        let lag = self.sessions.context().counters.process(Process::LoopLag);
        let turn = clock::coarse().saturating_sub(since) * 1_000;
        let old = lag.get();
        // The longest turn, forgotten by an eighth a turn.
        let new = turn.max(old - old.div_ceil(8));
        if new != old {
            lag.set(new);
        }
    }

    fn accept(&mut self, now: Millis) {
        if self.listeners.pause_end().is_some_and(|end| end <= now) {
            self.listeners.end_pause(self.poll.registry(), now);
        }
        for index in self.listeners.ready(now) {
            for _ in 0..ACCEPT_BUDGET {
                if !self.listeners.is_ready(index) {
                    break;
                }
                if self.is_full() {
                    return self.pause(now, None);
                }
                if self.is_listener_full(index) {
                    self.hold(index, now);
                    break;
                }
                match self.listeners.accept(index) {
                    Accepted::Connection(listener, stream, peer) => {
                        self.sessions.open(self.poll.registry(), listener, stream, peer, now);
                    }
                    Accepted::Empty => break,
                    Accepted::Gone => {}
                    Accepted::Exhausted(error) => return self.pause(now, Some(error)),
                }
            }
        }
    }

    /// Whether this worker or the whole daemon has all the sessions it may.
    fn is_full(&self) -> bool {
        let limit = self.sessions.context().config.daemon.max_connections;
        self.sessions.len() >= self.session_limit || (limit > 0 && self.sessions.len_of_daemon() >= limit)
    }

    fn is_listener_full(&self, index: usize) -> bool {
        let listener = self.listeners.listener_of(index);
        listener.is_some_and(|listener| self.sessions.context().is_listener_full(listener))
    }

    /// The same for one socket, whose listener has all the sessions it may.
    fn hold(&mut self, index: usize, now: Millis) {
        self.listeners.hold(self.poll.registry(), index, now + PAUSE);
        let context = self.sessions.context();
        context.counters.process(Process::AcceptPauses).add(1);
        let Some(listener) = self.listeners.listener_of(index) else { return };
        if let Some(untold) = self.complaints.note(listener, "max_connections", now) {
            let config = &context.config.listeners[listener];
            warn!(
                "listener {} has all of its max_connections = {}: new clients wait in the queue; counted as \
                 accept_pauses, {untold} more since the last such line",
                config.name, config.limits.max_connections
            );
        }
    }

    /// What waits in the queues stays there, and is accepted later.
    fn pause(&mut self, now: Millis, error: Option<io::Error>) {
        self.listeners.pause(self.poll.registry(), now + PAUSE);
        if let Some(error) = error {
            self.sessions.context().counters.process(Process::AcceptPauses).add(1);
            if !std::mem::replace(&mut self.paused_before, true) {
                warn!(%error, "accepting pauses; further pauses are counted as accept_pauses");
            }
        } else {
            self.sessions.context().counters.process(Process::AcceptPauses).add(1);
        }
    }

    fn handle_channel(&mut self, now: Millis) {
        loop {
            match control::receive::<ToWorker>(&self.channel) {
                Ok(Some((message, fds))) => self.handle_message(message, fds, now),
                Ok(None) => return self.handle_orphaned(now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.raw_os_error().is_some() => return self.handle_orphaned(now),
                Err(error) => warn!(%error, "a message of the supervisor was not understood"),
            }
        }
    }

    fn handle_message(&mut self, message: ToWorker, fds: Vec<OwnedFd>, now: Millis) {
        match message {
            ToWorker::Lend { slot, places } => match control::pair_up(places, fds) {
                Ok(sockets) => self.handle_loan(slot, sockets),
                Err(error) => warn!(%error, "a loan was refused"),
            },
            // Having been woken is the answer.
            ToWorker::Ask => {}
            ToWorker::Sessions { id, query } => self.answer(id, &query, now),
            ToWorker::Recall { slot } => {
                self.listeners.give_back(self.poll.registry(), slot);
                self.datagrams.give_back(self.poll.registry(), slot);
            }
            ToWorker::Drain { limit } => self.begin_leave(now, limit),
            ToWorker::Serve => self.begin_serving(now),
            ToWorker::HandOver { removed, limit } => {
                // The slot's line is its successor's from here on.
                self.load = None;
                self.begin_handover(fds, &removed, limit, now);
            }
            ToWorker::Share { count } => self.begin_sending(fds, Freight::Sessions(count), None, now),
            ToWorker::TakeOver { flows } => self.begin_receiving(fds, flows, now),
            ToWorker::Hold => {
                // What came so far is of flows that are here.
                self.datagrams.drain_fronts(self.poll.registry(), now);
                self.receivers.hold(now);
                self.datagrams.hold(true);
                self.tell(&FromWorker::Held);
            }
            ToWorker::Release => self.receivers.release(),
            ToWorker::PassFlows { to } => self.begin_passing(to, fds, now),
            ToWorker::Birth { .. } | ToWorker::Sockets(_) | ToWorker::Begin => {
                warn!("a message of the birth came late");
            }
        }
    }

    /// A list of many thousands takes milliseconds, as often as it is asked.
    fn answer(&mut self, id: u64, query: &Query, now: Millis) {
        let found = self.sessions.answer(query, now);
        let sealed = serde_json::to_vec(&found)
            .map_err(io::Error::from)
            .and_then(|text| shared::sealed("evenkeel-sessions", &text));
        match sealed {
            Ok(memory) => {
                if let Err(error) = control::send(&self.channel, &FromWorker::Found { id }, &[memory.as_fd()])
                {
                    warn!(%error, "the supervisor did not take the list of sessions");
                }
            }
            Err(error) => warn!(%error, "the sessions could not be listed"),
        }
    }

    fn handle_loan(&mut self, slot: usize, sockets: Vec<(Place, OwnedFd)>) {
        info!("accepting for the empty slot {slot} as well");
        for (place, socket) in sockets {
            if place.listener >= self.sessions.context().config.listeners.len() {
                continue;
            }
            if let Err(error) = self.add(place, socket, Some(slot), true) {
                warn!(%error, "a lent socket could not be polled");
            }
        }
    }

    /// Its successor gets everything. What waits in queues that nobody will
    /// have any more is accepted first.
    fn begin_handover(&mut self, fds: Vec<OwnedFd>, removed: &[Place], limit: Option<Millis>, now: Millis) {
        self.listeners.close_all_but(self.poll.registry(), removed);
        // Of a slot that goes, nobody will read what waits.
        self.datagrams.drain_fronts(self.poll.registry(), now);
        self.datagrams.stop_receiving(self.poll.registry());
        if !self.listeners.is_empty() {
            self.begin_leave(now, limit);
        }
        if let Some(mut outgoing) = self.sender.take() {
            // Its receiver died, and this is the next one.
            outgoing.sender.fail("another receiver", &mut self.cargo(now));
        }
        self.begin_sending(fds, Freight::Everything, Some(limit), now);
    }

    fn cargo(&mut self, now: Millis) -> Cargo<'_, 'a> {
        let Self { sessions, datagrams, poll, .. } = self;
        Cargo { sessions, datagrams, registry: poll.registry(), now }
    }

    /// What waits in queues that nobody will have any more comes first.
    fn sessions_may_go(&self) -> bool {
        let leaves = self.sender.as_ref().is_some_and(|outgoing| outgoing.then_leave.is_some());
        !leaves || self.listeners.is_empty()
    }

    /// Clients' datagrams come to other slots: their flows go there.
    fn begin_passing(&mut self, to: Vec<usize>, fds: Vec<OwnedFd>, now: Millis) {
        let mut fds = fds.into_iter();
        let routes = fds.next().ok_or(io::ErrorKind::InvalidData.into()).and_then(shared::read_sealed);
        let routes = routes.and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
        let routes = routes.unwrap_or_else(|error: io::Error| {
            warn!(%error, "the routes were not understood: flows stay");
            Vec::new()
        });
        let ways: Vec<(usize, Channel, Token)> = to
            .into_iter()
            .zip(fds)
            .map(|(slot, fd)| (slot, Channel::from_fd(fd), self.peer_token()))
            .collect();
        let before = self.passing.take();
        self.passing = Some(Passing::begin(&routes, ways, &mut self.cargo(now), before));
    }

    /// Clients' datagrams are read only while the gate is open.
    fn tend_gate(&mut self, now: Millis) {
        if self.datagrams.is_held() && !self.receivers.is_shut(now) {
            self.datagrams.hold(false);
            self.receivers.forget_deadlines(now);
        }
    }

    fn begin_sending(
        &mut self,
        fds: Vec<OwnedFd>,
        load: Freight,
        then_leave: Option<Option<Millis>>,
        now: Millis,
    ) {
        let token = self.peer_token();
        let channel = fds.into_iter().next().map(Channel::from_fd);
        let sender =
            channel.map(|channel| Sender::new(channel, self.poll.registry(), token, load, &self.datagrams));
        match (sender, self.sender.is_some()) {
            (Some(Ok(sender)), false) => self.sender = Some(Outgoing { sender, then_leave }),
            _ => {
                warn!("sessions cannot be handed over");
                if let Some(limit) = then_leave {
                    self.datagrams.linger(now);
                    self.begin_leave(now, limit);
                }
            }
        }
    }

    fn begin_receiving(&mut self, fds: Vec<OwnedFd>, flows: bool, now: Millis) {
        let token = self.peer_token();
        let Some(channel) = fds.into_iter().next().map(Channel::from_fd) else { return };
        if let Err(error) = self.receivers.add(channel, self.poll.registry(), token, flows, now) {
            warn!(%error, "sessions cannot be taken over");
        }
        self.datagrams.hold(self.receivers.is_shut(now));
    }

    fn peer_token(&mut self) -> Token {
        self.peer_count += 1;
        Token(SPECIAL | (FIRST_PEER + self.peer_count))
    }

    fn handle_peer(&mut self, token: Token, now: Millis) {
        let room = self.session_limit;
        let Self { sessions, datagrams, poll, receivers, .. } = self;
        receivers.step(token, &mut Cargo { sessions, datagrams, registry: poll.registry(), now }, room);
    }

    /// Sends on what may go.
    fn drive_handover(&mut self, now: Millis) {
        let sessions_may_go = self.sessions_may_go();
        let Self { sessions, datagrams, poll, sender, passing, .. } = self;
        let mut cargo = Cargo { sessions, datagrams, registry: poll.registry(), now };
        let told = passing.as_mut().and_then(|passing| passing.step(&mut cargo));
        if passing.as_mut().is_some_and(|passing| passing.is_over(&mut cargo)) {
            *passing = None;
        }
        let progress = sender.as_mut().map(|outgoing| outgoing.sender.step(&mut cargo, sessions_may_go));
        if let Some(message) = told {
            self.tell(&message);
        }
        let moved = match progress {
            None | Some(Progress::Waiting) => return,
            Some(Progress::Done { moved } | Progress::Failed { moved }) => moved,
        };
        let then_leave = self.sender.take().and_then(|outgoing| outgoing.then_leave);
        self.tell(&FromWorker::HandedOver { moved, left: self.sessions.len() + self.datagrams.len() });
        if let Some(limit) = then_leave {
            self.datagrams.linger(now);
            self.leave = Some(Leave::finishing(now, limit));
        }
    }

    fn handle_orphaned(&mut self, now: Millis) {
        if std::mem::replace(&mut self.is_orphan, true) {
            return;
        }
        let channel = self.channel.as_fd().as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&channel));
        let timeout = self.sessions.context().config.daemon.orphan_timeout;
        warn!("the supervisor is gone; serving on, accepting for {} s", timeout.as_secs_f32());
        self.orphaned_until = Some(now + timeout.as_millis() as u64);
    }

    fn begin_leave(&mut self, now: Millis, limit: Option<Millis>) {
        self.orphaned_until = None;
        if self.leave.is_some() {
            return;
        }
        // A filter there would keep the next daemon's clients out.
        self.listeners.let_go(self.poll.registry(), &self.outliving);
        if let Err(error) = self.listeners.keep_out() {
            warn!(%error, "new handshakes cannot be kept out");
        }
        self.datagrams.begin_leave();
        self.leave = Some(Leave::begin(now, limit));
    }

    /// Moves the leave on; true where the worker is done.
    fn handle_leave(&mut self, now: Millis) -> bool {
        if self.sender.is_some() && self.listeners.is_empty() {
            return false;
        }
        if self.orphaned_until.is_some_and(|until| until <= now) {
            let limit = self.sessions.context().config.daemon.drain_timeout;
            self.begin_leave(now, Some(limit.as_millis() as u64));
        }
        loop {
            let Some(leave) = &mut self.leave else { return false };
            match leave.step(now, self.sessions.len() + self.datagrams.len()) {
                Step::Wait => return false,
                Step::Look => {
                    if handshakes::half_open(&self.ports()) == Some(false)
                        && let Some(leave) = &mut self.leave
                    {
                        leave.handle_nothing_half_open();
                    }
                }
                Step::Empty => {
                    self.listeners.expect_all();
                    self.accept_all(now);
                    let leave = self.leave.as_mut().expect("looked at above");
                    if self.listeners.pause_end().is_some_and(|end| end > now) && !leave.is_over(now) {
                        // Out of descriptors: the queue is served as sessions end.
                        return false;
                    }
                    leave.handle_closed();
                    self.listeners.close(self.poll.registry());
                    self.tell(&FromWorker::QueuesClosed);
                    self.sessions.turn(now);
                }
                Step::Exit => {
                    self.datagrams.close_all(CloseReason::Drained, now);
                    return true;
                }
                Step::GiveUp => {
                    let count = self.sessions.len();
                    let flows = self.datagrams.len();
                    warn!("drain_timeout is over: {count} sessions are reset, {flows} flows ended");
                    self.sessions.close_all(CloseReason::Drained);
                    self.datagrams.close_all(CloseReason::Drained, now);
                    return true;
                }
            }
        }
    }

    fn accept_all(&mut self, now: Millis) {
        while self.listeners.has_ready(now) {
            self.accept(now);
        }
    }

    fn ports(&self) -> Vec<u16> {
        let listeners = &self.sessions.context().config.listeners;
        let port = |place: Place| listeners[place.listener].bind[place.address].port();
        self.listeners.sockets().map(|(place, _)| port(place)).collect()
    }
}
