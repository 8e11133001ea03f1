//! Taking up what the image before this one left, or going back to it.
//!
//! ```text
//!   inherited --understood--> built --> a reload proves it --first swap--> the old image is forgotten
//!       \--no, or a panic------>\--refused----->\--> exec back, with the reason
//! ```
//!
//! Until everything is built the descriptors that were left are not touched:
//! the image before finds all as it left it. Later it gets a state of the same
//! format, written by this one.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::rc::Rc;

use mio::unix::SourceFd;
use mio::{Interest, Poll};
use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;
use tracing::{info, warn};

use super::state::{FORMAT, GenerationState, State, Unpacker};
use super::{Stage, Upgrade};
use crate::board::Overrides;
use crate::config;
use crate::control::misbehave;
use crate::counters;
use crate::supervision::watch::Watch;
use crate::supervisor::File as ConfigFile;
use crate::supervisor::access_log::AccessLog;
use crate::supervisor::admin::Admin;
use crate::supervisor::generation::Generation;
use crate::supervisor::keep::Keepers;
use crate::supervisor::notify::Notify;
use crate::supervisor::prepare::Prepared;
use crate::supervisor::reload::Transfers;
use crate::supervisor::seen::Seen;
use crate::supervisor::slot::Slot;
use crate::supervisor::steering::Steering;
use crate::supervisor::steward::Steward;
use crate::supervisor::store::{Returned, Store};
use crate::supervisor::{FIRST_PROCESS, HANDLED, Refusal, SIGNALS, STEWARD, Start, Supervisor};
use crate::sys::bell::Bell;
use crate::sys::clock;
use crate::sys::exec;
use crate::sys::process::Image;
use crate::sys::shared;
use crate::sys::signals::Signals;

/// What was left to this image.
#[derive(Debug)]
pub struct Left {
    state: OwnedFd,
    number: RawFd,
    /// Why the image to which this one gave way sent it back; empty where this
    /// is the new one.
    words: String,
}

/// The least that has to be understood, to go back.
#[derive(Deserialize)]
struct Essence {
    format: u32,
    version: String,
    image: RawFd,
}

/// What the image before this one left; `None` where this is a start.
pub fn left() -> Option<Left> {
    let (number, words) = exec::inherited()?;
    Some(Left { state: exec::duplicate(number).ok()?, number, words })
}

/// Goes on where the image before this one stopped.
pub fn resume(left: Left, file: ConfigFile) -> Result<ExitCode, Refusal> {
    // They have been blocked all along; this is where they are read again.
    let signals = Signals::block(&HANDLED).map_err(Refusal::of_system)?;
    let bytes = left
        .state
        .try_clone()
        .and_then(shared::read_sealed)
        .map_err(|error| Refusal::new(1, format!("the state of the image before: {error}"), ""))?;
    let essence: Essence = serde_json::from_slice(&bytes)
        .map_err(|error| Refusal::new(1, format!("the state of the image before: {error}"), ""))?;
    let built = catch_unwind(AssertUnwindSafe(|| build(&left, &essence, &bytes, file, signals)));
    let built = built.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        Err(format!("it panicked while it took over: {text}"))
    });
    let (mut supervisor, unpacker) = match built {
        Ok(built) => built,
        Err(why) => return Err(go_back(&left, &essence, &why)),
    };
    unpacker.finish(&[left.number]);
    let log = crate::control::start_log(&supervisor.generation.config.log, "supervisor");
    crate::sys::process::set_name("ek-supervisor");
    supervisor.tables_changed = true;
    // Who ended meanwhile made no sound in this image.
    supervisor.reap()?;
    if left.words.is_empty() {
        info!("evenkeel {} takes over from {}", env!("CARGO_PKG_VERSION"), essence.version);
        supervisor.prove_upgrade();
    } else {
        let requester = supervisor.upgrade.take().and_then(|upgrade| upgrade.requester);
        supervisor.end_refused(requester, &left.words);
    }
    drop(left);
    supervisor.live(log)
}

/// Returns only where the image before cannot be run any more.
fn go_back(left: &Left, essence: &Essence, why: &str) -> Refusal {
    if !left.words.is_empty() {
        return Refusal::new(1, format!("the state that came back cannot be read: {why}"), "");
    }
    eprintln!("evenkeel: going back to evenkeel {}: {why}", essence.version);
    let image = match exec::duplicate(essence.image) {
        Ok(fd) => Image::from_fd(fd),
        Err(error) => return Refusal::new(1, format!("{why}; and the image before is gone: {error}"), ""),
    };
    // Its duplicate is what the image before finds.
    exec::close(left.number);
    let error = exec::replace(&image, left.state.as_fd(), &[], why);
    Refusal::new(1, format!("{why}; and the image before cannot be run: {error}"), "")
}

fn build(
    left: &Left,
    essence: &Essence,
    bytes: &[u8],
    file: ConfigFile,
    signals: Signals,
) -> Result<(Supervisor, Unpacker), String> {
    let is_new = left.words.is_empty();
    if essence.format != FORMAT || (is_new && misbehave::is_told("format")) {
        return Err(format!("its state is of format {}, this is {FORMAT}", essence.format));
    }
    let state: State = serde_json::from_slice(bytes).map_err(|error| format!("its state: {error}"))?;
    if state.shape != counters::SHAPE {
        return Err("it counts in another way".into());
    }
    let mut unpacker = Unpacker::default();
    let generation = |state: &GenerationState, unpacker: &mut Unpacker| restore(state, unpacker);
    let generations = state.generations.iter().map(|state| generation(state, &mut unpacker).map(Rc::new));
    let generations: Vec<Rc<Generation>> = generations.collect::<Result<_, _>>()?;
    let past = state.past.as_ref().map(|past| generation(past, &mut unpacker)).transpose()?;
    let current = Rc::clone(generations.first().ok_or("it left no configuration")?);
    let poll = Poll::new().map_err(text)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&signals.as_fd());
    poll.registry().register(&mut SourceFd(&fd), SIGNALS, Interest::READABLE).map_err(text)?;
    let mut last_token = FIRST_PROCESS;
    let mut unpack_slots = |states: Vec<_>, unpacker: &mut Unpacker| {
        let slots = states
            .into_iter()
            .map(|state| Slot::unpack(state, unpacker, &generations, poll.registry(), &mut last_token));
        slots.collect::<Result<Vec<Slot>, String>>()
    };
    let slots = unpack_slots(state.slots, &mut unpacker)?;
    let retiring = unpack_slots(state.retiring, &mut unpacker)?;
    let steward = match state.steward {
        Some(steward) => Steward::unpack(&steward, &mut unpacker, poll.registry(), STEWARD)?,
        None => Steward::default(),
    };
    let steering = Steering::unpack(state.steering, &mut unpacker, &current, &slots)?;
    if is_new && misbehave::is_told("take-up") {
        panic!("told to by a test");
    }
    let now = clock::coarse();
    let hang_timeout = current.config.daemon.hang_timeout.as_millis() as u64;
    let mut watch = Watch::new(state.supervision.slot_count(), hang_timeout);
    for slot in slots.iter().filter(|slot| slot.current.is_some()) {
        watch.resume(slot.number, now);
    }
    let image = Image::from_fd(unpacker.take(state.image)?);
    let upgrade = Upgrade { requester: state.requester, image, stage: Stage::Proving, deadline: None };
    let loads = steering.loads().transpose().map_err(text)?;
    let control = UnixListener::from(unpacker.take(state.control)?);
    let own = Image::own().map_err(text)?;
    let access_log = AccessLog::unpack(&state.access_log, &mut unpacker)?;
    let admin = state.admin.map(|(address, number)| {
        let listener = unpacker.take(number)?.into();
        Ok::<Admin, String>(Admin { address, listener })
    });
    let admin = admin.transpose()?;
    // Last of all: dropping it would let go of the lock.
    let lock = Flock::lock(File::from(unpacker.take(state.lock)?), FlockArg::LockExclusiveNonblock);
    let prepared = Prepared {
        image: own,
        program: state.program,
        account: state.account,
        loads,
        access_log,
        admin,
        started: state.started,
        control,
        board_bell: Bell::from_fd(unpacker.take(state.bells[0])?),
        failure_bell: Bell::from_fd(unpacker.take(state.bells[1])?),
        started_at: state.started_at,
        notes: Vec::new(),
        socket: state.socket.clone(),
        lock: lock.map_err(|(_, error)| format!("the lock: {error}"))?,
    };
    let supervisor = Supervisor {
        start: Start {
            config: current.config.clone(),
            config_path: state.config_path,
            control_socket: state.socket,
            greeting: None,
            file,
        },
        prepared,
        poll,
        signals,
        generation: current,
        slots,
        retiring,
        steward,
        supervision: state.supervision,
        steering,
        watch,
        notify: Notify::of_environment(now),
        reload: None,
        transfers: Transfers::default(),
        scaled: state.scaled,
        past,
        leave: None,
        end: None,
        announced: true,
        finishing: false,
        last_token,
        told: Vec::new(),
        tables_changed: false,
        overrides: Overrides::from_list(state.overrides),
        overrides_changed: true,
        shift: None,
        strangers: Default::default(),
        to_give_back: state.to_give_back,
        keepers: Keepers::unpack(state.keepers.0, state.keepers.1),
        inquiries: Vec::new(),
        store: Store::of_environment(&Returned::default()),
        lots: Vec::new(),
        parked_steering: None,
        is_parking: false,
        noted_job: None,
        upgrade: Some(upgrade),
        departure: None,
        seen: Seen::unpack(state.seen),
    };
    Ok((supervisor, unpacker))
}

fn restore(state: &GenerationState, unpacker: &mut Unpacker) -> Result<Generation, String> {
    let json = shared::read_sealed(unpacker.take(state.config)?).map_err(text)?;
    let config = config::read_older(&json)
        .map_err(|error| format!("the configuration of generation {}: {error}", state.number))?;
    let regions = state.regions.iter().map(|number| unpacker.take(*number));
    let regions = regions.collect::<Result<_, _>>()?;
    Generation::restore(state.number, config, regions, unpacker.take(state.board)?)
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

impl Supervisor {
    /// The other image could not go on: everything is as it was.
    pub(super) fn end_refused(&mut self, requester: Option<u64>, why: &str) {
        warn!("not upgraded: {why}");
        self.answer(requester, Err(format!("not upgraded, and nothing has changed: {why}")));
        self.finish_reload_notice();
    }
}
