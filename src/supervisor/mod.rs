//! The supervisor: the parent of all, small, privileged, single-threaded.
//!
//! It owns the slots: each one's sockets (duplicates of what its worker
//! opened), its counters, and the process that fills it. It decides by
//! `supervision::Supervision` and carries out; it parses nothing from the
//! network. It ends when it was told to leave and every worker is gone, and
//! keeps its privilege until then: later workers need the same uid to bind.

mod leave;
mod prepare;
mod slot;
mod steering;
mod steward;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::Signal;
use sd_notify::NotifyState;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::control::{FromSteward, FromWorker, Request, ToSteward, WorkerState};
use crate::supervision::{Action, Event, Phase, Supervision};
use crate::sys::clock::{self, Millis};
use crate::sys::signals::Signals;
use leave::Leave;
use prepare::Prepared;
use slot::Slot;
use steering::Steering;
use steward::Steward;

/// What `evenkeel run` was asked to run.
#[derive(Debug)]
pub struct Start {
    /// The configuration, checked.
    pub config: Config,
    /// Where it was read, for `status`.
    pub config_path: String,
    /// Where the control socket is to be.
    pub control_socket: std::path::PathBuf,
    /// Lines for a newcomer, printed once everything serves.
    pub greeting: Option<String>,
}

/// What ends a start, for the operator.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What is the case.
    pub text: String,
    /// What to do; may be empty.
    pub advice: String,
    /// The process's exit code.
    pub exit_code: u8,
}

const SIGNALS: Token = Token(0);
const STEWARD: Token = Token(1);
const FIRST_SLOT: usize = 16;

const HANDLED: [Signal; 7] = [
    Signal::SIGCHLD,
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

struct Supervisor {
    start: Start,
    prepared: Prepared,
    poll: Poll,
    signals: Signals,
    slots: Vec<Slot>,
    steward: Steward,
    supervision: Supervision,
    steering: Steering,
    leave: Option<Leave>,
    /// Set when the daemon is over.
    end: Option<ExitCode>,
    announced: bool,
    told: Vec<WorkerState>,
}

/// Runs the daemon until it has left; its exit code.
pub fn run(start: Start) -> Result<ExitCode, Refusal> {
    // Before anything is started: a signal that comes early waits.
    let signals = Signals::block(&HANDLED).map_err(Refusal::of_system)?;
    let (mut prepared, slots) = prepare::prepare(&start)?;
    let _log = crate::control::start_log(&start.config.log, "supervisor");
    crate::sys::process::set_name("ek-supervisor");
    let supervision = Supervision::new(slots.len());
    let steering = Steering::prepare(&start.config, slots.len());
    prepared.loads = steering.loads().transpose().map_err(Refusal::of_system)?;
    let poll = Poll::new().map_err(Refusal::of_system)?;
    let fd = signals.as_fd().as_raw_fd();
    poll.registry().register(&mut SourceFd(&fd), SIGNALS, Interest::READABLE).map_err(Refusal::of_system)?;
    let mut supervisor = Supervisor {
        start,
        prepared,
        poll,
        signals,
        slots,
        steward: Steward::default(),
        supervision,
        steering,
        leave: None,
        end: None,
        announced: false,
        told: Vec::new(),
    };
    supervisor.serve()
}

impl Refusal {
    fn new(exit_code: u8, text: impl Into<String>, advice: impl Into<String>) -> Refusal {
        Refusal { text: text.into(), advice: advice.into(), exit_code }
    }

    fn of_system(error: io::Error) -> Refusal {
        Refusal::new(1, format!("the system refused: {error}"), "")
    }
}

impl Supervisor {
    fn serve(&mut self) -> Result<ExitCode, Refusal> {
        info!("evenkeel {} starts {} workers", env!("CARGO_PKG_VERSION"), self.slots.len());
        self.step(Event::Begin)?;
        self.start_steward();
        let mut events = Events::with_capacity(128);
        while self.end.is_none() {
            let timeout =
                self.next_wake().map(|at| Duration::from_millis(at.saturating_sub(clock::coarse())));
            // The coarse clock steps by some milliseconds: never spin for it.
            let timeout = timeout.map(|timeout| timeout.max(Duration::from_millis(1)));
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(Refusal::of_system)?,
            }
            for event in &events {
                match event.token() {
                    SIGNALS => {}
                    STEWARD => self.read_steward(),
                    Token(token) => self.read_slot(token - FIRST_SLOT)?,
                }
            }
            self.handle_signals()?;
            self.step(Event::Tick)?;
            self.handle_leave_deadline();
            self.steering.update(clock::coarse(), &self.supervision, &self.slots);
            if self.steward.is_due(clock::coarse()) {
                self.start_steward();
            }
            self.tell_steward();
        }
        self.steward.end();
        Ok(self.end.expect("the loop's condition"))
    }

    fn next_wake(&self) -> Option<Millis> {
        let leave = self.leave.as_ref().and_then(Leave::kill_at);
        let steering = self.steering.next_deadline(clock::coarse());
        [self.supervision.next_deadline(), self.steward.due_at(), leave, steering].into_iter().flatten().min()
    }

    /// Lets supervision decide, and does what it says.
    fn step(&mut self, event: Event) -> Result<(), Refusal> {
        for action in self.supervision.step(event, clock::coarse()) {
            match action {
                Action::Spawn(slot) => self.spawn(slot)?,
                Action::Lend { slot, to } => self.lend(slot, to),
                Action::Recall { slot, from } => self.slots[from].recall(slot),
                Action::Drain(slot) => self.drain(slot),
                Action::Announce => self.announce(),
                Action::Finish => self.finish(),
            }
        }
        Ok(())
    }

    fn spawn(&mut self, slot: usize) -> Result<(), Refusal> {
        match self.slots[slot].spawn(&self.prepared, self.poll.registry(), Token(FIRST_SLOT + slot)) {
            Ok(()) => Ok(()),
            Err(error) if self.announced => {
                error!(slot, %error, "no worker could be started");
                self.slots[slot].forget_process(self.poll.registry());
                self.step(Event::Exited { slot, clean: false })
            }
            Err(error) => {
                self.kill_all();
                Err(Refusal::new(1, format!("worker {slot} could not be started: {error}"), ""))
            }
        }
    }

    fn lend(&mut self, slot: usize, to: usize) {
        warn!("slot {slot} stays empty: slot {to} accepts for it");
        // Duplicates first: two slots cannot be borrowed at once.
        let sockets = self.slots[slot].duplicates();
        self.slots[to].lend(slot, &sockets);
    }

    fn drain(&mut self, slot: usize) {
        let limit = self.leave.as_ref().and_then(|leave| leave.left(clock::coarse()));
        self.slots[slot].drain(limit);
    }

    fn announce(&mut self) {
        self.announced = true;
        let listeners: Vec<String> = self.start.config.listeners.iter().map(|l| l.name.clone()).collect();
        info!("ready: {} workers accept on {}", self.slots.len(), listeners.join(", "));
        let status = format!("{} workers, {} listeners", self.slots.len(), listeners.len());
        if let Err(error) = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&status)]) {
            warn!(%error, "systemd could not be told");
        }
        if let Some(greeting) = self.start.greeting.take() {
            eprint!("{greeting}");
        }
    }

    fn finish(&mut self) {
        let left = self.leave.as_ref();
        info!("every worker has left");
        self.end = Some(left.map_or(ExitCode::SUCCESS, Leave::exit_code));
    }

    fn read_slot(&mut self, slot: usize) -> Result<(), Refusal> {
        loop {
            let Some((message, fds)) = self.slots[slot].receive(self.poll.registry()) else { return Ok(()) };
            self.handle_worker(slot, message, fds)?;
        }
    }

    fn handle_worker(&mut self, slot: usize, message: FromWorker, fds: Vec<OwnedFd>) -> Result<(), Refusal> {
        match message {
            FromWorker::Sockets(places) => {
                self.slots[slot].hold(places, fds);
                self.steering.handle_sockets(&self.slots[slot]);
            }
            FromWorker::Opened => self.step(Event::Opened(slot))?,
            FromWorker::Ready => {
                info!(slot, pid = self.slots[slot].pid(), "worker ready");
                self.step(Event::Ready(slot))?;
            }
            FromWorker::QueuesClosed => self.slots[slot].release_sockets(),
            FromWorker::Failed { text, advice, exit_code } if !self.announced => {
                self.kill_all();
                return Err(Refusal { text, advice, exit_code });
            }
            FromWorker::Failed { text, .. } => error!(slot, "{text}"),
        }
        Ok(())
    }

    fn handle_signals(&mut self) -> Result<(), Refusal> {
        while let Some(signal) = self.signals.next() {
            match signal {
                Signal::SIGCHLD => self.reap()?,
                Signal::SIGTERM | Signal::SIGINT => {
                    let limit = self.start.config.daemon.drain_timeout;
                    self.handle_leave(Some(limit.as_millis() as u64))?;
                }
                Signal::SIGQUIT => self.handle_leave(None)?,
                other => warn!("{other} does nothing yet"),
            }
        }
        Ok(())
    }

    fn reap(&mut self) -> Result<(), Refusal> {
        for slot in 0..self.slots.len() {
            if let Some(is_stopped) = self.slots[slot].try_stop() {
                let what = if is_stopped { "stopped: it gets nothing new" } else { "continued" };
                warn!(slot, "worker {what}");
                self.steering.handle_stop(slot, is_stopped);
            }
            let Some(status) = self.slots[slot].try_wait() else { continue };
            // Its last words came before its end.
            self.read_slot(slot)?;
            self.slots[slot].forget_process(self.poll.registry());
            if status.success() && self.leave.is_some() {
                info!(slot, "worker has left");
            } else {
                warn!(slot, "worker ended: {status}");
            }
            self.step(Event::Exited { slot, clean: status.success() })?;
        }
        if self.steward.reap(self.poll.registry(), clock::coarse()) {
            self.start_steward();
        }
        Ok(())
    }

    /// The first call begins to leave, the second ends at once.
    fn handle_leave(&mut self, limit: Option<Millis>) -> Result<(), Refusal> {
        if let Some(leave) = &mut self.leave {
            warn!("a second signal: leaving at once");
            leave.fail();
            self.end = Some(leave.exit_code());
            self.kill_all();
            return Ok(());
        }
        info!("leaving: nothing new is taken, what is here is finished");
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        self.leave = Some(Leave::begin(clock::coarse(), limit));
        self.step(Event::Leave)
    }

    /// Workers end by themselves at the deadline; one that does not is stuck.
    fn handle_leave_deadline(&mut self) {
        if let Some(leave) = &mut self.leave
            && leave.kill_at().is_some_and(|at| at <= clock::coarse())
            && self.end.is_none()
        {
            error!("workers are stuck past drain_timeout: killed");
            leave.fail();
            self.end = Some(leave.exit_code());
            self.kill_all();
        }
    }

    fn kill_all(&mut self) {
        for slot in &mut self.slots {
            slot.kill();
        }
        self.steward.end();
    }

    fn start_steward(&mut self) {
        let now = clock::coarse();
        if self.leave.is_some() && self.end.is_some() {
            return;
        }
        if let Err(error) = self.steward.start(&self.prepared, &self.start, self.poll.registry(), STEWARD) {
            error!(%error, "the steward could not be started");
            self.steward.handle_failure(now);
        }
        self.told.clear();
        self.steering.forget_told();
        self.tell_steward();
    }

    fn read_steward(&mut self) {
        while let Some(message) = self.steward.receive(self.poll.registry()) {
            match message {
                FromSteward::Ready => info!("steward ready"),
                FromSteward::Request { id, request } => {
                    let result = self.handle_request(request);
                    let error = result.err().map(|refusal| refusal.text);
                    self.steward.send(&ToSteward::Answer { id, error });
                }
            }
        }
    }

    fn handle_request(&mut self, request: Request) -> Result<(), Refusal> {
        match request {
            Request::Drain if self.leave.is_some() => Ok(()),
            Request::Drain => {
                let limit = self.start.config.daemon.drain_timeout;
                self.handle_leave(Some(limit.as_millis() as u64))
            }
            Request::Stop => {
                info!("stopped by the control socket");
                self.end = Some(ExitCode::SUCCESS);
                for slot in &mut self.slots {
                    slot.kill();
                }
                Ok(())
            }
        }
    }

    /// Tells the steward what changed since it was last told.
    fn tell_steward(&mut self) {
        let states: Vec<WorkerState> = (0..self.slots.len()).map(|slot| self.state(slot)).collect();
        if states != self.told && self.steward.send(&ToSteward::Workers(states.clone())) {
            self.told = states;
        }
        let steward = &mut self.steward;
        self.steering.tell(|message| steward.send(message));
    }

    fn state(&self, slot: usize) -> WorkerState {
        let state = match self.supervision.phase(slot) {
            Phase::Unborn | Phase::Starting => "starting",
            Phase::Waiting { .. } => "backoff",
            Phase::Ready { .. } => "ready",
            Phase::Draining | Phase::Gone => "draining",
        };
        WorkerState {
            slot,
            pid: self.slots[slot].pid(),
            generation: prepare::FIRST_GENERATION,
            state: state.into(),
            restarts: self.supervision.restarts(slot),
            helped_by: self.supervision.lent_to(slot),
        }
    }
}
