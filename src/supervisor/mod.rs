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
mod leave;
mod ledger;
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
mod upgrade;
mod watch;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{ExitCode, ExitStatus};
use std::rc::Rc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::Signal;
use tracing::{error, info, warn};

use crate::board::Overrides;
use crate::config::{Config, Workers};
use crate::control::{FromSteward, FromWorker, Request, ToSteward, ToWorker, WorkerState};
use crate::counters::Process;
use crate::logging::Log;
use crate::supervision::watch::Watch;
use crate::supervision::{Action, Event, Phase, Supervision};
use crate::sys::clock::{self, Millis};
use crate::sys::signals::Signals;
use generation::Generation;
use inquiry::Inquiry;
use leave::Leave;
use notify::{Facts, Notify};
use park::Lot;
use prepare::Prepared;
use reload::{Reload, Transfers};
use seen::Seen;
use shift::Shift;
use slot::{Role, Slot};
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

    /// Lets supervision decide, and does what it says.
    fn step(&mut self, event: Event) -> Result<(), Refusal> {
        for action in self.supervision.step(event, clock::coarse()) {
            match action {
                Action::Spawn(slot) => self.spawn(slot)?,
                Action::Lend { slot, to } => self.lend(slot, to),
                Action::Recall { slot, from } => {
                    self.slots[from].tell(&ToWorker::Recall { slot });
                    self.to_give_back.push((from, slot));
                }
                Action::Drain(slot) => self.drain(slot),
                Action::Kill(slot) => {
                    if let Some(process) = &mut self.slots[slot].current {
                        process.kill();
                    }
                }
                Action::Announce => self.announce(),
                Action::Finish => self.finishing = true,
            }
        }
        Ok(())
    }

    fn spawn(&mut self, slot: usize) -> Result<(), Refusal> {
        // The daemon is over: a worker that was killed for that is no crash,
        // and nobody would end a new one.
        if self.end.is_some() {
            return Ok(());
        }
        if self.take_proved(slot) {
            return Ok(());
        }
        let token = self.new_token();
        let generation = Rc::clone(&self.generation);
        match self.slots[slot].spawn(&self.prepared, &generation, self.poll.registry(), token) {
            Ok(process) => {
                self.slots[slot].current = Some(process);
                if self.owes_flows_to(slot) {
                    self.slots[slot].tell(&ToWorker::Hold);
                }
                self.hand_over_again(slot);
                self.slots[slot].tell(&ToWorker::Serve);
                self.watch.begin(slot, clock::coarse());
                Ok(())
            }
            Err(error) if self.announced => {
                error!(slot, %error, "no worker could be started");
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
        let Some(generation) = self.slots[to].current.as_ref().map(|process| Rc::clone(&process.generation))
        else {
            return;
        };
        let sockets = self.slots[slot].duplicates(&generation);
        self.slots[to].lend(slot, &sockets);
    }

    fn drain(&mut self, slot: usize) {
        let limit = self.leave.as_ref().and_then(|leave| leave.left(clock::coarse()));
        if self.is_parking {
            self.park(slot, limit);
        } else {
            self.slots[slot].drain(limit);
        }
    }

    fn announce(&mut self) {
        self.announced = true;
        let listeners: Vec<String> =
            self.generation.config.listeners.iter().map(|l| l.name.clone()).collect();
        info!("ready: {} workers accept on {}", self.slots.len(), listeners.join(", "));
        // Whoever hears that all is ready and asks is not told otherwise.
        self.tell_steward();
        self.notify.announce(clock::coarse(), &self.facts());
        if let Some(greeting) = self.start.greeting.take() {
            eprint!("{greeting}");
        }
    }

    /// Ends the daemon when the last process of the last slot has left.
    fn check_finished(&mut self) {
        let finishes = self.slots.iter().chain(&self.retiring).any(|slot| !slot.old.is_empty());
        if self.finishing && !finishes && self.end.is_none() {
            info!("every worker has left");
            if self.is_parking {
                self.store_lots();
            }
            self.end = Some(self.leave.as_ref().map_or(ExitCode::SUCCESS, Leave::exit_code));
        }
    }

    /// The slot, retiring or not, of the process with this token.
    fn locate(&mut self, token: Token) -> Option<(usize, bool, Role)> {
        for (retiring, slots) in [(false, &mut self.slots), (true, &mut self.retiring)] {
            for (index, slot) in slots.iter_mut().enumerate() {
                if let Some((role, _)) = slot.find(token) {
                    return Some((index, retiring, role));
                }
            }
        }
        None
    }

    fn slot_mut(&mut self, index: usize, retiring: bool) -> &mut Slot {
        if retiring { &mut self.retiring[index] } else { &mut self.slots[index] }
    }

    fn read_process(&mut self, token: Token) -> Result<(), Refusal> {
        if self.read_trial(token) {
            return Ok(());
        }
        // Looked up each time: a message may change the slots.
        while let Some((index, retiring, role)) = self.locate(token) {
            let slots = if retiring { &mut self.retiring } else { &mut self.slots };
            let Some((_, process)) = slots[index].find(token) else { return Ok(()) };
            let Some((message, fds)) = process.receive(self.poll.registry()) else { return Ok(()) };
            self.handle_worker(token, (index, retiring, role), message, fds)?;
        }
        Ok(())
    }

    fn handle_worker(
        &mut self,
        token: Token,
        (slot, retiring, role): (usize, bool, Role),
        message: FromWorker,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        match message {
            FromWorker::Sockets(places) => {
                let Some((_, process)) = self.slot_mut(slot, retiring).find(token) else { return Ok(()) };
                let generation = Rc::clone(&process.generation);
                if let Err(error) = self.slot_mut(slot, retiring).hold(&generation, places, fds) {
                    warn!(slot, %error, "the worker's sockets were refused");
                }
            }
            FromWorker::Opened if role == Role::Next => self.handle_proved(slot),
            FromWorker::Opened if role == Role::Current => self.step(Event::Opened(slot))?,
            FromWorker::Ready if role == Role::Current => {
                info!(slot, pid = self.slots[slot].pid(), "worker ready");
                self.step(Event::Ready(slot))?;
                self.unpark(slot);
            }
            FromWorker::Opened | FromWorker::Ready => {}
            FromWorker::Unparked => self.handle_unparked(slot),
            FromWorker::QueuesClosed if retiring => self.retiring[slot].release_sockets(),
            FromWorker::QueuesClosed if role == Role::Old => {
                let generation = Rc::clone(&self.generation);
                self.slots[slot].release_all_but(&generation);
            }
            FromWorker::QueuesClosed => self.slots[slot].release_sockets(),
            FromWorker::HandedOver { moved, left, gone } => {
                info!(slot, "{moved} sessions handed over, {left} left");
                if role == Role::Old && gone && !retiring {
                    // The rest goes to whoever comes next in that place.
                    info!(slot, "the worker that was to have them is being replaced");
                } else if role == Role::Old {
                    self.slot_mut(slot, retiring).handed_over = true;
                    self.handle_handed_over(slot, retiring);
                } else {
                    self.handle_shared(slot);
                }
            }
            FromWorker::Held if role == Role::Current && !retiring => self.handle_held(slot),
            FromWorker::FlowsPassed { moved, left } if role == Role::Current && !retiring => {
                self.handle_flows_passed(slot, moved, left);
            }
            FromWorker::Held | FromWorker::FlowsPassed { .. } => {}
            FromWorker::Found { id } => self.handle_found(token, id, fds),
            FromWorker::Failed { text, advice, .. } if role == Role::Next => {
                self.abort_reload(&format!("{text}\n{advice}"));
            }
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
                    let limit = self.generation.config.daemon.drain_timeout;
                    self.handle_leave(Some(limit.as_millis() as u64), signal == Signal::SIGTERM)?;
                }
                Signal::SIGQUIT => self.handle_leave(None, false)?,
                Signal::SIGHUP => {
                    self.notify_reloading();
                    if let Err(refusal) = self.reload_file(None, false) {
                        error!("not reloaded: {}", refusal.text);
                        self.seen.note_reload(false, &refusal.text);
                        self.finish_reload_notice();
                    }
                }
                Signal::SIGUSR2 => {
                    self.notify_reloading();
                    if let Err(refusal) = self.upgrade(None) {
                        error!("not upgraded: {}", refusal.text);
                        self.finish_reload_notice();
                    }
                }
                Signal::SIGUSR1 => self.reopen_logs(),
                other => warn!("{other} does nothing yet"),
            }
        }
        Ok(())
    }

    /// Whoever rotated the access log has renamed it before.
    fn reopen_logs(&mut self) {
        match access_log::open(&self.generation.config) {
            Ok(file) => {
                self.prepared.access_log.set_file(file);
                self.tell_of_access_log();
                info!("log files opened anew");
            }
            Err(refusal) => error!("{}; the old one is written on", refusal.text),
        }
    }

    fn tell_of_access_log(&mut self) {
        self.steward.send(&ToSteward::AccessLog, &self.prepared.access_log.of_steward());
    }

    fn reap(&mut self) -> Result<(), Refusal> {
        for (number, slot) in self.slots.iter().enumerate() {
            if let Some(is_stopped) = slot.try_stop() {
                let what = if is_stopped { "stopped: it gets nothing new" } else { "continued" };
                warn!(slot = number, "worker {what}");
                self.steering.handle_stop(number, is_stopped);
            }
        }
        let all = self.slots.iter_mut().chain(&mut self.retiring);
        let ended: Vec<(Token, ExitStatus)> = all
            .flat_map(Slot::processes)
            .filter_map(|process| Some((process.token, process.try_wait()?)))
            .collect();
        for (token, status) in ended {
            // Its last words came before its end.
            self.read_process(token)?;
            self.handle_ended(token, status)?;
        }
        self.reap_upgrade();
        if self.steward.reap(self.poll.registry(), clock::coarse()) {
            self.start_steward();
        }
        Ok(())
    }

    fn handle_ended(&mut self, token: Token, status: ExitStatus) -> Result<(), Refusal> {
        self.forget_in_inquiries(token);
        let Some((index, retiring, role)) = self.locate(token) else { return Ok(()) };
        let slot = if retiring { &mut self.retiring[index] } else { &mut self.slots[index] };
        if let Some((_, process)) = slot.find(token) {
            process.close_channel(self.poll.registry());
        }
        match role {
            Role::Current => {
                slot.handed_over = false;
                // At once, not only when a successor says so.
                slot.forget_gauges(token);
                slot.current = None;
                if status.success() && self.leave.is_some() {
                    info!(slot = index, "worker has left");
                } else {
                    warn!(slot = index, "worker ended: {status}");
                    self.count_end(index, status);
                }
                self.note_shift_end_of(index);
                self.step(Event::Exited { slot: index, clean: status.success() })?;
                self.handle_shared(index);
            }
            Role::Next => {
                slot.next = None;
                self.abort_reload(&format!("worker {index} ended: {status}"));
            }
            Role::Old => {
                slot.forget_gauges(token);
                slot.old.retain(|process| process.token != token);
                if !status.success() {
                    warn!(slot = index, "an old worker ended: {status}");
                }
                slot.handed_over = true;
                self.fold_ledgers();
                self.handle_handed_over(index, retiring);
            }
        }
        self.retiring.retain(|slot| !slot.old.is_empty());
        Ok(())
    }

    /// The first call begins to leave, the second ends at once.
    fn handle_leave(&mut self, limit: Option<Millis>, may_park: bool) -> Result<(), Refusal> {
        if let Some(leave) = &mut self.leave {
            warn!("a second signal: leaving at once");
            leave.fail();
            self.end = Some(leave.exit_code());
            self.kill_all();
            return Ok(());
        }
        let park = may_park && self.is_to_park();
        self.forget_upgrade("the daemon leaves");
        self.abort_reload("the daemon leaves");
        info!("leaving: nothing new is taken, what is here is finished");
        self.notify.begin_leave(clock::coarse());
        self.leave = Some(Leave::begin(clock::coarse(), limit));
        if park {
            info!("sessions are parked for the next start");
            self.is_parking = true;
        } else {
            self.store.clear(clock::coarse());
        }
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
        self.slots.iter_mut().chain(&mut self.retiring).for_each(Slot::kill);
        self.steward.end();
    }

    fn start_steward(&mut self) {
        let now = clock::coarse();
        if self.leave.is_some() && self.end.is_some() {
            return;
        }
        let started = self.steward.start(
            &self.prepared,
            &self.generation,
            &self.start.config_path,
            self.poll.registry(),
            STEWARD,
        );
        if let Err(error) = started {
            error!(%error, "the steward could not be started");
            self.steward.handle_failure(now);
        }
        self.told.clear();
        self.seen.forget_told();
        self.steering.forget_told();
        self.strangers.forget_told();
        self.tables_changed = true;
        self.tell_of_access_log();
        self.overrides_changed = true;
        self.tell_steward();
    }

    fn read_steward(&mut self) {
        while let Some(message) = self.steward.receive(self.poll.registry()) {
            match message {
                FromSteward::Ready => info!("steward ready"),
                FromSteward::Figures => self.tell_figures(),
                FromSteward::Request { id, request } => self.handle_request(id, request),
            }
        }
    }

    fn handle_request(&mut self, id: u64, request: Request) {
        let now = match request {
            Request::Drain if self.leave.is_some() => Ok(Some(String::new())),
            Request::Drain => {
                let limit = self.generation.config.daemon.drain_timeout;
                self.handle_leave(Some(limit.as_millis() as u64), false).map(|()| Some(String::new()))
            }
            Request::Stop => {
                info!("stopped by the control socket");
                self.end = Some(ExitCode::SUCCESS);
                self.slots.iter_mut().chain(&mut self.retiring).for_each(Slot::kill);
                Ok(Some(String::new()))
            }
            Request::Reload { dry_run: true } => self.reload_file(Some(id), true),
            Request::Reload { dry_run: false } => {
                self.notify_reloading();
                self.reload_file(Some(id), false).inspect_err(|refusal| {
                    self.seen.note_reload(false, &refusal.text);
                    self.finish_reload_notice();
                })
            }
            Request::Scale(count) => self.scale(count, id).map(|()| None),
            Request::Rebalance => self.rebalance(id).map(|()| None),
            Request::NoteJob(job) => {
                self.noted_job = Some(job);
                Ok(Some(String::new()))
            }
            Request::Upgrade => {
                self.notify_reloading();
                self.upgrade(Some(id)).map(|()| None).inspect_err(|_| self.finish_reload_notice())
            }
            Request::Sessions(query) => {
                self.ask_workers(id, &query).map(|()| None).map_err(|text| Refusal::new(1, text, ""))
            }
            Request::Server { upstream, server, change } => {
                let config = &self.generation.config;
                let changed = self.overrides.handle_change(config, &upstream, &server, change);
                self.overrides_changed = true;
                changed
                    .map(|text| {
                        info!("{text}");
                        Some(text)
                    })
                    .map_err(|text| Refusal::new(1, text, ""))
            }
        };
        match now {
            // The answer comes when it is done.
            Ok(None) => {}
            Ok(Some(text)) => self.answer(Some(id), Ok(text)),
            Err(refusal) => {
                let advice =
                    if refusal.advice.is_empty() { String::new() } else { format!("\n  {}", refusal.advice) };
                self.answer(Some(id), Err(format!("{}{advice}", refusal.text)));
            }
        }
    }

    fn answer(&mut self, requester: Option<u64>, answer: Result<String, String>) {
        if let Some(id) = requester {
            // Whoever asks for the status next sees what was changed.
            self.tell_steward();
            self.steward.send(&ToSteward::Answer { id, answer }, &[]);
        }
    }

    /// systemd(1): the reload ends with the next READY=1.
    fn notify_reloading(&self) {
        self.notify.begin_reload();
    }

    fn finish_reload_notice(&self) {
        self.notify.end_reload();
    }

    /// Tells the steward what changed since it was last told.
    fn tell_steward(&mut self) {
        // Before the tables: a new owner writes no board without it.
        if self.overrides_changed {
            let message = ToSteward::Overrides(self.overrides.list());
            self.overrides_changed = !self.steward.send(&message, &[]);
        }
        if self.tables_changed && self.send_tables() {
            self.tables_changed = false;
        }
        let known = self.supervision.slot_count().min(self.slots.len());
        let states: Vec<WorkerState> = (0..known).map(|slot| self.state(slot)).collect();
        if states != self.told && self.steward.send(&ToSteward::Workers(states.clone()), &[]) {
            self.told = states;
        }
        self.tell_seen();
        let steward = &mut self.steward;
        self.steering.tell(|message| steward.send(message, &[]));
        self.strangers.tell(|message| steward.send(message, &[]));
    }

    /// How the daemon is, for systemd.
    fn facts(&self) -> Facts {
        let (slots, now) = (0..self.slots.len(), clock::coarse());
        let is_ready = |slot: &usize| matches!(self.supervision.phase(*slot), Phase::Ready { .. });
        Facts {
            ready_count: slots.clone().filter(is_ready).count(),
            active: self.slots.iter().map(|slot| slot.count(Process::Active)).sum(),
            accepted: self.slots.iter().map(|slot| slot.count(Process::Accepted)).collect(),
            leaving: self.leave.is_some(),
            tended: slots.clone().all(|slot| self.supervision.is_tended(slot, now)),
        }
    }

    fn state(&self, slot: usize) -> WorkerState {
        let state = match self.supervision.phase(slot) {
            Phase::Unborn | Phase::Starting => "starting",
            Phase::Waiting { .. } => "backoff",
            Phase::Ready { .. } => "ready",
            Phase::Hung { .. } => "hung",
            Phase::Draining | Phase::Gone => "draining",
        };
        let restart_reasons = self.restart_reasons(slot);
        WorkerState {
            slot,
            pid: self.slots[slot].pid(),
            generation: self.slots[slot]
                .current
                .as_ref()
                .map_or(self.generation.number, |p| p.generation.number),
            state: state.into(),
            restarts: restart_reasons.values().sum(),
            restart_reasons,
            helped_by: self.supervision.lent_to(slot),
        }
    }
}
