//! The supervisor: the parent of all, small, privileged, single-threaded.
//!
//! It owns the slots: each one's sockets (duplicates of what its worker
//! opened), its counters, and the process that fills it. It decides by
//! `supervision::Supervision` and carries out; it parses nothing from the
//! network. It ends when it was told to leave and every worker is gone, and
//! keeps its privilege until then: later workers need the same uid to bind.

mod access_log;
mod activation;
mod admin;
mod figures;
mod generation;
mod inquiry;
mod keep;
mod leave;
mod ledger;
mod lives;
mod notify;
mod park;
mod plan;
mod prepare;
mod reload;
mod seen;
mod shift;
mod slot;
mod steering;
mod steward;
mod store;
mod strangers;
mod telling;
mod upgrade;
mod watch;
mod wishes;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::Signal;
use tracing::{info, warn};

use crate::board::Overrides;
use crate::config::{Config, Workers};
use crate::control::WorkerState;
use crate::logging::Log;
use crate::supervision::watch::Watch;
use crate::supervision::{Event, Supervision};
use crate::sys::clock::{self, Millis};
use crate::sys::signals::Signals;
use generation::Generation;
use inquiry::Inquiry;
use keep::Keepers;
use leave::Leave;
use notify::Notify;
use park::Lot;
use prepare::Prepared;
use reload::{Reload, Transfers};
use seen::Seen;
use shift::Shift;
use slot::Slot;
use steering::Steering;
use steward::Steward;
use store::Store;
use strangers::Strangers;
use upgrade::{Departure, Upgrade};

pub use park::pending_job;
pub use upgrade::{Left, left, probe, resume};

/// What `evenkeel run` was asked to run.
pub struct Start {
    /// The configuration, checked.
    pub config: Config,
    /// Where it was read, for `status`.
    pub config_path: String,
    /// Where the control socket is to be.
    pub control_socket: std::path::PathBuf,
    /// Lines for a newcomer, printed once everything serves.
    pub greeting: Option<String>,
    /// How the file is read.
    pub file: File,
}

/// The configuration's file as `run` was told of it.
pub struct File {
    /// Its path; `None` where `run` finds it by itself.
    pub path: Option<std::path::PathBuf>,
    /// Reads it again, for a reload; an error's text tells all that is wrong
    /// with it.
    pub read_again: Box<dyn Fn() -> Result<Config, String>>,
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
/// Processes have tokens from here on, none twice.
const FIRST_PROCESS: usize = 16;

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
    generation: Rc<Generation>,
    slots: Vec<Slot>,
    /// Slots that were given up and whose processes still finish.
    retiring: Vec<Slot>,
    steward: Steward,
    supervision: Supervision,
    steering: Steering,
    watch: Watch,
    notify: Notify,
    reload: Option<Reload>,
    shift: Option<Shift>,
    strangers: Strangers,
    /// Helpers, and the slots whose flows they have to give back.
    to_give_back: Vec<(usize, usize)>,
    keepers: Keepers,
    transfers: Transfers,
    /// What `scale` set, and what the file said then.
    scaled: Option<(usize, Workers)>,
    /// What earlier generations and slots have counted.
    past: Option<Generation>,
    leave: Option<Leave>,
    inquiries: Vec<Inquiry>,
    /// systemd's fd store.
    store: Store,
    /// What is parked, or was.
    lots: Vec<Lot>,
    /// How flows were steered when parking began.
    parked_steering: Option<OwnedFd>,
    /// The leave parks.
    is_parking: bool,
    /// What systemd is about to do, as the unit's ExecStop= said.
    noted_job: Option<String>,
    /// Set when the daemon is over.
    end: Option<ExitCode>,
    announced: bool,
    /// No slot has a current worker any more; old ones may still finish.
    finishing: bool,
    /// The running program is being replaced.
    upgrade: Option<Upgrade>,
    /// Another image is to be run as soon as this turn of the loop is over.
    departure: Option<Departure>,
    last_token: usize,
    told: Vec<WorkerState>,
    seen: Seen,
    tables_changed: bool,
    /// What the operator changed about servers at run time.
    overrides: Overrides,
    overrides_changed: bool,
}

/// Runs the daemon until it has left; its exit code.
pub fn run(start: Start) -> Result<ExitCode, Refusal> {
    // Before anything is opened: what systemd passed is known by number.
    let passed = crate::sys::activation::take().map_err(Refusal::of_system)?;
    // Before anything is started: a signal that comes early waits.
    let signals = Signals::block(&HANDLED).map_err(Refusal::of_system)?;
    let (passed, mut returned) = store::part(passed);
    let mut store = Store::of_environment(&returned);
    let (mut prepared, generation, mut slots) = prepare::prepare(&start, passed, &mut returned)?;
    store.remove(&returned.useless);
    let lots = returned.lots.into_iter().map(|(slot, a, b)| Lot::returned(slot, a, b)).collect();
    let log = crate::control::start_log(&start.config.log, "supervisor");
    prepared.notes.iter().for_each(|note| warn!("{note}"));
    crate::sys::process::set_name("ek-supervisor");
    let poll = Poll::new().map_err(Refusal::of_system)?;
    let fd = signals.as_fd().as_raw_fd();
    poll.registry().register(&mut SourceFd(&fd), SIGNALS, Interest::READABLE).map_err(Refusal::of_system)?;
    let generation = Rc::new(generation);
    let mut steering = Steering::prepare(&generation);
    if let Some(memory) = returned.steering {
        let left = crate::sys::shared::read_sealed(memory).map_err(|error| error.to_string());
        match left.and_then(|json| serde_json::from_slice::<Vec<_>>(&json).map_err(|error| error.to_string()))
        {
            Ok(left) => steering.resume(&left),
            Err(error) => warn!(%error, "parked flows are steered anew"),
        }
    }
    prepared.loads = steering.loads().transpose().map_err(Refusal::of_system)?;
    let slot_count = generation.slot_count();
    let hang_timeout = start.config.daemon.hang_timeout.as_millis() as u64;
    slots.iter_mut().for_each(|slot| slot.ledgers.push(Rc::clone(&generation)));
    let mut supervisor = Supervisor {
        start,
        prepared,
        poll,
        signals,
        generation,
        slots,
        retiring: Vec::new(),
        steward: Steward::default(),
        watch: Watch::new(slot_count, hang_timeout),
        notify: Notify::of_environment(clock::coarse()),
        supervision: Supervision::new(slot_count),
        steering,
        reload: None,
        shift: None,
        strangers: Strangers::default(),
        to_give_back: Vec::new(),
        keepers: Keepers::default(),
        transfers: Transfers::default(),
        scaled: None,
        past: None,
        leave: None,
        inquiries: Vec::new(),
        store,
        lots,
        parked_steering: None,
        is_parking: false,
        noted_job: None,
        end: None,
        announced: false,
        finishing: false,
        upgrade: None,
        departure: None,
        last_token: FIRST_PROCESS,
        told: Vec::new(),
        seen: Seen::default(),
        tables_changed: false,
        overrides: Overrides::default(),
        overrides_changed: false,
    };
    info!("evenkeel {} starts {} workers", env!("CARGO_PKG_VERSION"), supervisor.slots.len());
    supervisor.step(Event::Begin)?;
    supervisor.start_steward();
    supervisor.live(log)
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
    /// Serves until the end; another image may go on meanwhile.
    fn live(mut self, mut log: Log) -> Result<ExitCode, Refusal> {
        loop {
            self.serve()?;
            if let Some(code) = self.end {
                self.steward.end();
                return Ok(code);
            }
            // Comes back where the other image cannot be run.
            self.depart(&mut log);
        }
    }

    /// Until the daemon is over, or another image is to be run.
    fn serve(&mut self) -> Result<(), Refusal> {
        let mut events = Events::with_capacity(128);
        // Flows that are just moving arrive first.
        while self.end.is_none() && (self.departure.is_none() || self.shift.is_some()) {
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
                    token => self.read_process(token)?,
                }
            }
            self.handle_signals()?;
            self.step(Event::Tick)?;
            self.watch_workers()?;
            self.handle_leave_deadline();
            self.handle_reload_deadline();
            self.handle_upgrade_deadline();
            self.end_stuck_old();
            if self.leave.is_none() {
                self.store.update(clock::coarse(), &self.slots);
            }
            self.handle_shift_deadline();
            self.end_inquiries();
            self.check_finished();
            self.steer();
            if self.notify.is_due(clock::coarse()) {
                self.notify.tick(clock::coarse(), &self.facts());
            }
            if self.steward.is_due(clock::coarse()) {
                self.start_steward();
            }
            self.tell_steward();
            // Last, for it takes a while.
            if self.look_for_strangers() {
                self.tell_steward();
            }
        }
        Ok(())
    }

    /// Brings the steering up to date, flows included.
    fn steer(&mut self) {
        self.update_steering();
        self.begin_shift();
        self.check_shifted();
    }

    fn update_steering(&mut self) {
        let flow_slots = self.flow_slots();
        let now = clock::coarse();
        self.steering.update(now, &self.supervision, &self.slots, &self.generation, flow_slots);
    }

    fn next_wake(&self) -> Option<Millis> {
        let leave = self.leave.as_ref().and_then(Leave::kill_at);
        let reload = self.reload.as_ref().map(Reload::deadline);
        let watched = [self.watch.next_deadline(), self.notify.next_deadline()];
        let upgrade = self.upgrade.as_ref().and_then(Upgrade::deadline);
        let shift = self.shift.as_ref().map(Shift::deadline);
        let own = [self.supervision.next_deadline(), self.steward.due_at(), leave, reload, upgrade, shift];
        let steering = [
            self.steering.next_deadline(clock::coarse()),
            self.inquiry_deadline(),
            self.store.next_deadline(),
            self.old_deadline(),
        ];
        let strangers = self.announced.then(|| self.strangers.due_at()).filter(|_| self.leave.is_none());
        own.into_iter()
            .chain(strangers.filter(|_| self.reload.is_none()).map(Some))
            .chain(watched)
            .chain(steering)
            .flatten()
            .min()
    }
}
