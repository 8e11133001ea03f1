//! Replacing the running program by the file at its path.
//!
//! ```text
//!   Checking: the new image reads the file and says what it understands
//!      v
//!   Trying: a worker of it is born, opens nothing, says Ready, ends
//!      v
//!   exec in place, everything kept (state, take_up)
//!      v
//!   Proving: as a reload; until its first swap any failure leads back
//!      v
//!   Replacing: the workers hand over, then the steward is a new one
//! ```
//!
//! One file is opened once, and it is what is checked, tried and run. The
//! process stays, with its children, sockets, counters, programs and signals.
//! Up to the first swap a refusal changes nothing; the image before is kept
//! open to be gone back to.

mod state;
mod take_up;

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use mio::Token;
use tracing::{error, info, warn};

pub use state::{AccessLogState, ChildState, Packer, SlotState, Unpacker, probe};
pub use take_up::{Left, left, resume};

use self::state::{FORMAT, PROGRAM, Probe};
use super::generation::Generation;
use super::slot::{Process, Slot};
use super::{Refusal, Supervisor};
use crate::control::FromWorker;
use crate::counters;
use crate::logging::Log;
use crate::sys::clock::{self, Millis};
use crate::sys::exec;
use crate::sys::process::{Child, Image};
use crate::sys::shared;

/// How long the new image may take to read the file, and then to bring up a
/// worker, in milliseconds.
const PATIENCE: Millis = 20_000;
/// The most that it may say.
const MOST_BYTES: usize = 16 << 20;
/// As much of its complaints as is passed on.
const MOST_WORDS: usize = 4 * 1024;

/// An upgrade under way.
#[derive(Debug)]
pub struct Upgrade {
    /// Who is to be told the end.
    requester: Option<u64>,
    /// The new image; from `Proving` on the one to go back to.
    image: Image,
    stage: Stage,
    deadline: Option<Millis>,
}

#[derive(Debug)]
enum Stage {
    Checking(Consulted),
    Trying { worker: Process, ready: bool },
    Proving,
    Replacing,
}

/// A child that says something of its image.
#[derive(Debug)]
struct Consulted {
    child: Child,
    out: OwnedFd,
    err: OwnedFd,
}

/// Another image is to be run in place of this one.
#[derive(Debug)]
pub struct Departure {
    requester: Option<u64>,
    image: Image,
    /// Why this one goes back; empty where it goes on.
    words: String,
}

impl Upgrade {
    /// Whether this is the new image, and its reload may still be refused.
    pub fn is_proving(&self) -> bool {
        matches!(self.stage, Stage::Proving)
    }

    /// When it is given up.
    pub fn deadline(&self) -> Option<Millis> {
        self.deadline
    }
}

impl Supervisor {
    /// Begins; the answer comes when it serves, or is refused.
    pub(super) fn upgrade(&mut self, requester: Option<u64>) -> Result<(), Refusal> {
        self.check_no_change()?;
        if self.transfers.under_way.is_some() {
            return Err(Refusal::new(1, "another change is under way", "try again in a moment"));
        }
        let path = &self.prepared.program;
        let refused = |text: String| {
            let advice = "put an evenkeel there, or restart the daemon from where it is now";
            Refusal::new(1, format!("{}: {text}", path.display()), advice)
        };
        let image = Image::open(path).map_err(|error| refused(error.to_string()))?;
        if !image.is_program().map_err(|error| refused(error.to_string()))? {
            return Err(refused("this is no program of this system (no ELF header)".into()));
        }
        let memory = |name| shared::unsealed(name).map_err(Refusal::of_system);
        let (out, err) = (memory("evenkeel-probe")?, memory("evenkeel-complaints")?);
        let mut arguments = vec!["upgrade-probe".to_string()];
        if let Some(file) = &self.start.file.path {
            arguments.extend(["-c".to_string(), file.display().to_string()]);
        }
        let copies =
            out.try_clone().and_then(|out| Ok((out, err.try_clone()?))).map_err(Refusal::of_system)?;
        let child = image.consult(&arguments, copies.0, copies.1);
        let child = child.map_err(|error| refused(format!("it cannot be run: {error}")))?;
        info!("upgrade: {} is checked", path.display());
        let stage = Stage::Checking(Consulted { child, out, err });
        self.upgrade = Some(Upgrade { requester, image, stage, deadline: Some(clock::coarse() + PATIENCE) });
        Ok(())
    }

    /// The upgrade's own processes: looked at when a child has ended.
    pub(super) fn reap_upgrade(&mut self) {
        let Some(upgrade) = &mut self.upgrade else { return };
        match &mut upgrade.stage {
            Stage::Checking(consulted) => {
                let Ok(Some(status)) = consulted.child.try_wait() else { return };
                let said = consulted.said();
                if !status.success() {
                    let why = format!("the new program does not accept the configuration ({status})");
                    return self.abort_upgrade(&[why, said.1].join("\n"));
                }
                if let Err(why) = self.judge(&said.0) {
                    self.abort_upgrade(&why);
                }
            }
            Stage::Trying { worker, .. } => {
                let token = worker.token;
                let Some(status) = worker.try_wait() else { return };
                self.read_trial(token);
                let Some(Upgrade { stage: Stage::Trying { worker, ready }, .. }) = &mut self.upgrade else {
                    return;
                };
                worker.close_channel(self.poll.registry());
                if *ready && status.success() {
                    self.set_out();
                } else {
                    self.abort_upgrade(&format!("a worker of the new program ended: {status}"));
                }
            }
            Stage::Proving | Stage::Replacing => {}
        }
    }

    /// What the new image says of itself; a trial worker where it will do.
    fn judge(&mut self, said: &[u8]) -> Result<(), String> {
        let probe: Probe = serde_json::from_slice(said)
            .map_err(|_| "the new program is no evenkeel that can be upgraded to".to_string())?;
        if probe.program != PROGRAM {
            return Err(format!("the new program is {}, not {PROGRAM}", probe.program));
        }
        if probe.format != FORMAT || probe.shape != counters::SHAPE {
            return Err(format!(
                "evenkeel {} takes over from format {} of the running state, and this is format {FORMAT}: \
                 it takes a restart",
                probe.version, probe.format
            ));
        }
        let json = serde_json::to_vec(&probe.config).map_err(|error| error.to_string())?;
        let generation = Generation::for_trial(&self.generation, &json, probe.words, probe.board_words);
        let generation = Rc::new(generation.map_err(|refusal| refusal.text)?);
        let token = self.new_token();
        let Some(upgrade) = &mut self.upgrade else { return Ok(()) };
        info!("upgrade: evenkeel {} is tried", probe.version);
        let registry = self.poll.registry();
        let worker =
            Slot::new(0).spawn_as(&upgrade.image, &self.prepared, &generation, registry, token, true);
        let worker = worker.map_err(|error| format!("a worker of the new program: {error}"))?;
        upgrade.stage = Stage::Trying { worker, ready: false };
        upgrade.deadline = Some(clock::coarse() + PATIENCE);
        Ok(())
    }

    /// What the trial worker says; false where the token is somebody else's.
    pub(super) fn read_trial(&mut self, token: Token) -> bool {
        let mut failure = None;
        {
            let Some(Upgrade { stage: Stage::Trying { worker, ready }, .. }) = &mut self.upgrade else {
                return false;
            };
            if worker.token != token {
                return false;
            }
            while let Some((message, _)) = worker.receive(self.poll.registry()) {
                match message {
                    FromWorker::Ready => *ready = true,
                    FromWorker::Failed { text, advice, .. } => failure = Some(format!("{text}\n{advice}")),
                    _ => {}
                }
            }
        }
        if let Some(why) = failure {
            self.abort_upgrade(&format!("a worker of the new program cannot work: {}", why.trim_end()));
        }
        true
    }

    /// Nothing was touched: the running image goes on.
    pub(super) fn abort_upgrade(&mut self, why: &str) {
        let early =
            |upgrade: &mut Upgrade| matches!(upgrade.stage, Stage::Checking(_) | Stage::Trying { .. });
        let Some(upgrade) = self.upgrade.take_if(early) else { return };
        match upgrade.stage {
            Stage::Checking(mut consulted) => {
                let _ = consulted.child.kill();
                let _ = consulted.child.wait();
            }
            Stage::Trying { mut worker, .. } => {
                worker.close_channel(self.poll.registry());
                worker.kill();
                worker.wait();
            }
            Stage::Proving | Stage::Replacing => {}
        }
        self.end_refused(upgrade.requester, why.trim_end());
    }

    /// The image that runs now is the last one, whichever it is.
    pub(super) fn forget_upgrade(&mut self, why: &str) {
        self.abort_upgrade(why);
        self.upgrade = None;
        if let Some(departure) = self.departure.take() {
            self.end_refused(departure.requester, why);
        }
    }

    /// Gives up on a new image that does not answer.
    pub(super) fn handle_upgrade_deadline(&mut self) {
        let over = |upgrade: &Upgrade| upgrade.deadline.is_some_and(|at| at <= clock::coarse());
        if self.upgrade.as_ref().is_some_and(over) {
            self.abort_upgrade(&format!("the new program gave no answer within {} s", PATIENCE / 1_000));
        }
    }

    fn set_out(&mut self) {
        let Some(Upgrade { requester, image, .. }) = self.upgrade.take() else { return };
        info!("upgrade: the new program takes over");
        self.departure = Some(Departure { requester, image, words: String::new() });
    }

    /// Runs the other image; returns only where that fails.
    pub(super) fn depart(&mut self, log: &mut Log) {
        let Some(Departure { requester, image, words }) = self.departure.take() else { return };
        self.cut_inquiries();
        let (state, fds) = self.pack(requester);
        let json = serde_json::to_vec(&state).expect("plain data");
        log.flush();
        let error = match shared::sealed("evenkeel-state", &json) {
            Ok(sealed) => exec::replace(&image, sealed.as_fd(), &fds, &words),
            Err(error) => error,
        };
        error!(%error, "the other program cannot be run");
        let why = if words.is_empty() { format!("it cannot be run: {error}") } else { words };
        self.answer(requester, Err(format!("not upgraded: {why}")));
        self.finish_reload_notice();
    }

    /// This image is the new one: its workers are proved like those of a
    /// reload, with the file as it is.
    pub(super) fn prove_upgrade(&mut self) {
        let requester = self.upgrade.as_ref().and_then(|upgrade| upgrade.requester);
        if let Err(refusal) = self.reload_file(requester, false) {
            self.turn_back(&format!("{}\n{}", refusal.text, refusal.advice));
        }
    }

    /// Whether an image stands by to which a refusal leads back.
    pub(super) fn turn_back(&mut self, why: &str) -> bool {
        let proving = |upgrade: &mut Upgrade| matches!(upgrade.stage, Stage::Proving);
        let Some(Upgrade { requester, image, .. }) = self.upgrade.take_if(proving) else { return false };
        warn!("going back to the program before: {}", why.trim_end());
        self.departure = Some(Departure { requester, image, words: why.trim_end().to_string() });
        true
    }

    /// From here on there is no way back.
    pub(super) fn commit_upgrade(&mut self) {
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.stage = Stage::Replacing;
        }
    }

    /// Every slot serves with this image: the steward is the last of the old.
    /// What it still owes is told first, and where the counters are: it may
    /// answer somebody yet. True where this was an upgrade.
    pub(super) fn finish_upgrade(&mut self, text: &str) -> bool {
        let Some(upgrade) = self.upgrade.take() else { return false };
        info!("upgraded: {text}");
        self.answer(upgrade.requester, Ok(text.to_string()));
        self.steward.retire(self.poll.registry(), clock::coarse());
        true
    }
}

impl Consulted {
    /// Both its outputs, as far as they are of use.
    fn said(&self) -> (Vec<u8>, String) {
        let read = |fd: &OwnedFd, most| {
            let copy = fd.try_clone();
            copy.and_then(|fd| shared::read_sealed_up_to(fd, most)).unwrap_or_default()
        };
        let words = String::from_utf8_lossy(&read(&self.err, MOST_BYTES)).chars().take(MOST_WORDS).collect();
        (read(&self.out, MOST_BYTES), words)
    }
}
