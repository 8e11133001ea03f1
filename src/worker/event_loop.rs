//! The worker's one loop: events, then work, then deadlines.
//!
//! A turn takes the events, accepts up to a budget, drives each session that
//! has something to do once, and sees to deadlines. The clock is read once a
//! turn. With nothing to do it sleeps without a time-out.

mod accepting;
mod leaving;
mod orders;
mod passing_on;
mod settling;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use tracing::error;

use passing_on::{Incoming, Outgoing};

use super::birth::Born;
use super::complaints::Complaints;
use super::datagrams::{self, Datagrams};
use super::elsewhere::Elsewhere;
use super::handover::{Passing, Receivers};
use super::keeper::Guard;
use super::leave::Leave;
use super::listeners::{self, Listeners};
use super::load::Load;
use super::pace::Pace;
use super::sessions::{self, Sessions};
use super::test_hook::Busy;
use crate::config::Mode;
use crate::control::misbehave;
use crate::control::{FromWorker, Place};
use crate::counters::Process;
use crate::keep::Keep;
use crate::supervision::watch::DOZE;
use crate::sys::channel::Channel;
use crate::sys::clock::{self, Millis};
use crate::sys::process;

/// Descriptors that are no session's: standard error, epoll, the channel, the
/// counters and what the system libraries open.
const RESERVED_FILES: u64 = 64;

/// Tokens of what is no session: the highest bit, which a packed key has not.
pub const SPECIAL: usize = 1 << 63;
const CHANNEL: Token = Token(SPECIAL);

/// The bell that tells of a change on the upstream board.
const BOARD: Token = Token(SPECIAL | (FIRST_PEER - 1));

/// The end of its keeper.
const KEEPER: Token = Token(SPECIAL | (FIRST_PEER - 2));

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

struct Loop<'a> {
    born: &'a Born,
    guard: Option<Guard>,
    /// Its predecessor's sessions are on their way here.
    recovers: bool,
    poll: Poll,
    channel: Channel,
    listeners: Listeners,
    /// Places whose sockets outlive the daemon.
    outliving: Vec<Place>,
    sessions: Sessions<'a>,
    datagrams: Datagrams<'a>,
    session_limit: usize,
    load: Option<&'a Load>,
    pace: Pace,
    busy: Busy,
    leave: Option<Leave>,
    /// Its slot's sockets, until the supervisor says `Serve`.
    unserved: Vec<(Place, OwnedFd)>,
    /// Senders that were announced before it serves.
    before_serving: Option<Vec<Incoming>>,
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
    if born.on_trial {
        if misbehave::is_told("trial") {
            std::process::abort();
        }
        state.tell(&FromWorker::Ready);
        return ExitCode::SUCCESS;
    }
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
        let context = born.context()?;
        match born.recovers {
            true => context.counters.begin_recovery(&born.layout),
            false => context.counters.begin_life(&born.layout),
        }
        debug_assert_eq!(context.all.len(), born.slot_count);
        let regions = 2 * born.slot_count + born.earlier.as_ref().map_or(0, Elsewhere::region_count);
        let reserved = RESERVED_FILES + regions as u64 + 2 * sockets.len() as u64;
        // Two ends a pipe.
        let reserved = reserved + 2 * sessions::pipe_count(born.slot_count) as u64;
        let files = process::file_limit().saturating_sub(reserved);
        let modes = |mode: Mode| context.config.listeners.iter().any(|listener| listener.mode == mode);
        // Where both modes are served, flows have half of the descriptors.
        let for_flows = if modes(Mode::Tcp) && modes(Mode::Udp) { files / 2 } else { files };
        // Two descriptors a session.
        let for_sessions = if modes(Mode::Udp) { files - for_flows } else { files };
        let session_limit = (for_sessions / 2).max(1) as usize;
        let keep =
            Keep::create(session_limit).inspect_err(|error| error!(%error, "no memory to keep")).ok()?;
        // While there is little memory to be copied.
        let is_kept = born.config.daemon.crash_proof && !born.on_trial;
        let guard = if is_kept { Guard::begin(born, &channel, keep.as_fd(), clock::coarse()) } else { None };
        let poll = Poll::new().ok()?;
        let registry = poll.registry().try_clone().ok()?;
        if let Some(guard) = &guard {
            guard.register(&registry, KEEPER);
        }
        let bell = born.board_bell.as_raw_fd();
        poll.registry().register(&mut SourceFd(&bell), BOARD, Interest::READABLE).ok()?;
        let datagrams = Datagrams::new(context.clone(), registry, for_flows as usize, clock::coarse());
        keep.flows(datagrams.memory().as_raw_fd());
        let state = Loop {
            born,
            guard,
            recovers: born.recovers,
            poll,
            channel,
            listeners: Listeners::default(),
            datagrams,
            outliving: born.outliving.clone(),
            sessions: Sessions::new(context, keep, clock::coarse()),
            session_limit,
            load: born.load.as_ref(),
            pace: Pace::begin(clock::coarse()),
            busy: Busy::of_slot(born.slot),
            leave: None,
            unserved: sockets,
            before_serving: Some(Vec::new()),
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

    fn serve(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut over = clock::coarse();
        loop {
            let timeout = self.next_wake(over).map(|at| Duration::from_millis(at.saturating_sub(over)));
            self.sessions.context().sleep(over);
            // An interruption, as by being stopped and continued, is a turn
            // without events.
            if let Err(error) = self.poll.poll(&mut events, timeout)
                && error.kind() != io::ErrorKind::Interrupted
            {
                return Err(error);
            }
            let now = clock::coarse();
            self.wake(over, now);
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
                    KEEPER => self.handle_keeper_ended(now),
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
            self.settle_gauges();
            self.tend_keeper(now);
            let is_left = self.handle_leave(now);
            self.sessions.flush_log();
            if is_left {
                return Ok(());
            }
            over = clock::coarse();
            self.publish_lag(over.saturating_sub(now));
            self.pace.handle_turn(over);
            if let Some(load) = self.load {
                load.end_turn(now, over, self.sessions.len());
            }
            #[cfg(debug_assertions)]
            self.hang.spin_if_told(self.sessions.keep());
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
            self.guard.as_ref().and_then(Guard::next_deadline),
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

    /// Shows that the loop turns again, and says so where nobody may be looking.
    fn wake(&self, slept_since: Millis, now: Millis) {
        self.sessions.context().beat(now);
        // This look at the clock comes after the mark: a supervisor that had
        // looked before it, and looks no more, did so less than `DOZE` ago, or
        // is told.
        if clock::coarse().saturating_sub(slept_since) >= DOZE {
            self.tell(&FromWorker::Awake);
        }
    }

    fn publish_lag(&self, turn: Millis) {
        let lag = self.sessions.context().counters.process(Process::LoopLag);
        let turn = turn * 1_000;
        let old = lag.get();
        // The longest turn, forgotten by an eighth a turn.
        let new = turn.max(old - old.div_ceil(8));
        if new != old {
            lag.set(new);
        }
    }
}
