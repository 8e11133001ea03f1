//! The steward: the unprivileged process that speaks with callers.
//!
//! It answers the control socket, which the supervisor bound and passed on. It
//! reads the workers' counters in shared memory and what the supervisor last
//! said of them, so a question costs neither of them anything; only what is to
//! change something goes to the supervisor, as a typed request.
//!
//! Threads: one a caller, at most `control_socket::MAX_CALLERS`, and one that
//! listens to the supervisor. It ends with its supervisor, and may be killed
//! at any time: traffic never passes here, and a new one takes its place.

mod control_socket;
mod report;

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nix::sys::signal::Signal;
use tracing::{error, warn};

use crate::config::Config;
use crate::control::{self, FromSteward, Request, StewardBirth, ToSteward, WorkerState};
use crate::counters::Layout;
use crate::steering::Expected;
use crate::sys::channel::Channel;
use crate::sys::shared::{self, Region};
use crate::sys::{accounts, process, signals};

/// How long a steward without a supervisor goes on answering what was asked.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What all threads of the steward know.
#[derive(Debug)]
struct Knowledge {
    birth: StewardBirth,
    config: Config,
    layout: Layout,
    regions: Vec<Region>,
    workers: Mutex<Vec<WorkerState>>,
    /// By listener: the mechanism in force, and what slots should have got.
    steering: Mutex<HashMap<usize, (String, Expected)>>,
    channel: Channel,
    pending: Mutex<Pending>,
    /// Requests that are being answered.
    busy: AtomicUsize,
}

/// Requests that the supervisor has not answered.
#[derive(Debug, Default)]
struct Pending {
    last_id: u64,
    waiting: HashMap<u64, Sender<Option<String>>>,
}

/// The steward process, from its first instruction to its exit code.
pub fn main() -> ExitCode {
    let channel = match process::inherited_channel() {
        Ok(channel) => channel,
        Err(error) => {
            eprintln!("evenkeel: the steward is started by `evenkeel run` alone: {error}");
            return ExitCode::from(2);
        }
    };
    let from_outside =
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
    let _ = signals::ignore(&from_outside);
    let _ = signals::unblock_all();
    match serve(channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            error!("{text}");
            eprintln!("evenkeel: steward: {text}");
            ExitCode::from(1)
        }
    }
}

fn serve(channel: Channel) -> Result<(), String> {
    let Some((message, fds)) = control::receive(&channel).map_err(|e| e.to_string())? else { return Ok(()) };
    let ToSteward::Birth(birth) = message else {
        return Err("the supervisor did not begin with a birth".into());
    };
    process::set_name("ek-steward");
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or("the birth came with too few descriptors");
    let config = shared::read_sealed(next()?).map_err(|e| e.to_string())?;
    let config: Config = serde_json::from_slice(&config).map_err(|e| e.to_string())?;
    let listener = UnixListener::from(next()?);
    let regions =
        fds.map(Region::open_read_only).collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    if let Some(account) = birth.account {
        accounts::become_account(account).map_err(|e| format!("cannot become uid {}: {e}", account.uid))?;
    }
    process::set_no_new_privileges().map_err(|e| e.to_string())?;
    let _log = control::start_log(&config.log, "steward");
    let layout = Layout::of(&config);
    let workers = Mutex::new(Vec::new());
    let steering = Mutex::new(HashMap::new());
    let pending = Mutex::new(Pending::default());
    let busy = AtomicUsize::new(0);
    let knowledge =
        Arc::new(Knowledge { birth, config, layout, regions, workers, steering, channel, pending, busy });
    control::send(&knowledge.channel, &FromSteward::Ready, &[]).map_err(|e| e.to_string())?;
    let answering = Arc::clone(&knowledge);
    std::thread::spawn(move || control_socket::serve(&listener, &answering));
    listen_to_supervisor(&knowledge)?;
    // Who asked for the end is still to be told that it was done.
    let deadline = Instant::now() + LAST_WORDS;
    while knowledge.busy.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Until the supervisor ends.
fn listen_to_supervisor(knowledge: &Knowledge) -> Result<(), String> {
    loop {
        match control::receive(&knowledge.channel) {
            Ok(None) => return Ok(()),
            Ok(Some((ToSteward::Workers(workers), _))) => {
                *knowledge.workers.lock().expect("no thread panics with it") = workers;
            }
            Ok(Some((ToSteward::Steering { listener, active, expected }, _))) => {
                let mut steering = knowledge.steering.lock().expect("no thread panics with it");
                steering.insert(listener, (active, expected));
            }
            Ok(Some((ToSteward::Answer { id, error }, _))) => {
                let waiting = knowledge.pending.lock().expect("no thread panics with it").waiting.remove(&id);
                if let Some(waiting) = waiting {
                    let _ = waiting.send(error);
                }
            }
            Ok(Some((ToSteward::Birth(_), _))) => warn!("a second birth"),
            Err(error) if error.raw_os_error().is_some() => return Ok(()),
            Err(error) => warn!(%error, "a message of the supervisor was not understood"),
        }
    }
}

impl Knowledge {
    /// Asks the supervisor and waits for its answer.
    fn ask(&self, request: Request) -> Result<(), String> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let id = {
            let mut pending = self.pending.lock().expect("no thread panics with it");
            pending.last_id += 1;
            let id = pending.last_id;
            pending.waiting.insert(id, sender);
            id
        };
        control::send(&self.channel, &FromSteward::Request { id, request }, &[])
            .map_err(|error| format!("the supervisor cannot be reached: {error}"))?;
        match receiver.recv_timeout(control_socket::PATIENCE) {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(error),
            Err(_) => {
                self.pending.lock().expect("no thread panics with it").waiting.remove(&id);
                Err("the supervisor gave no answer".into())
            }
        }
    }
}
