//! The steward: the unprivileged process that speaks with callers.
//!
//! It answers the control socket, which the supervisor bound and passed on, and
//! owns the upstream board (`servers`). It
//! reads the workers' counters in shared memory and what the supervisor last
//! said of them, so a question costs neither of them anything; only what is to
//! change something goes to the supervisor, as a typed request.
//!
//! Threads: one a caller, at most `control_socket::MAX_CALLERS`, and one that
//! listens to the supervisor. It ends with its supervisor, and may be killed
//! at any time: traffic never passes here, and a new one takes its place.

mod access_log;
mod admin;
mod checks;
mod control_socket;
mod figures;
pub mod names;
mod report;
pub mod servers;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nix::sys::signal::Signal;
use tracing::{error, warn};

use access_log::AccessLog;

use crate::board::Overrides;
use crate::config::Config;
use crate::control::sessions::{Found, MOST_SESSIONS, Query};
use crate::control::{
    self, DaemonState, FromSteward, ListenerFigures, Request, StewardBirth, Table, ToSteward, WorkerState,
};
use crate::counters::Layout;
use crate::steering::Expected;
use crate::sys::channel::Channel;
use crate::sys::shared::{self, Region};
use crate::sys::{accounts, process, signals};
use admin::Admin;
use figures::Figures;
use servers::{Servers, WrittenBoard};

/// How long a steward without a supervisor goes on answering what was asked.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long the supervisor may take for what it was asked: a reload waits for
/// the queues of removed listeners and for sessions to move.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// What all threads of the steward know.
#[derive(Debug)]
struct Knowledge {
    birth: StewardBirth,
    view: RwLock<Arc<View>>,
    workers: Mutex<Vec<WorkerState>>,
    /// By listener, sockets of other programs on its addresses.
    strangers: Mutex<BTreeMap<String, Vec<String>>>,
    /// By listener: the mechanism in force, and what slots should have got.
    steering: Mutex<HashMap<String, (String, Expected)>>,
    daemon: Mutex<DaemonState>,
    figures: Figures,
    servers: Arc<Servers>,
    channel: Channel,
    pending: Mutex<Pending>,
    /// Requests that are being answered.
    busy: AtomicUsize,
    access_log: Arc<AccessLog>,
}

/// Where the counters are: those of the present generation and of what is left
/// of earlier ones.
#[derive(Debug, Default)]
struct View {
    generation: u64,
    /// The present configuration first.
    configs: Vec<(Config, Layout)>,
    tables: Vec<(Table, Region)>,
}

/// What the supervisor answered: a text, or what the workers found and how
/// many of them were silent.
#[derive(Debug)]
enum Answer {
    Text(Result<String, String>),
    Found { memories: Vec<OwnedFd>, silent: usize },
}

/// Requests that the supervisor has not answered.
#[derive(Debug, Default)]
struct Pending {
    last_id: u64,
    waiting: HashMap<u64, Sender<Answer>>,
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
    process::leave_oom_protection();
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or("the birth came with too few descriptors");
    let config = shared::read_sealed(next()?).map_err(|e| e.to_string())?;
    let config: Config = serde_json::from_slice(&config).map_err(|e| e.to_string())?;
    let listener = UnixListener::from(next()?);
    let servers = Servers::new(next()?, next()?);
    if let Some(account) = birth.account {
        accounts::become_account(account, accounts::Keep::Nothing)
            .map_err(|e| format!("cannot become uid {}: {e}", account.uid))?;
    }
    if accounts::current_uid() != 0 {
        accounts::drop_capabilities(accounts::Keep::Nothing).map_err(|e| format!("capabilities: {e}"))?;
    }
    process::set_no_new_privileges().map_err(|e| e.to_string())?;
    let _log = control::start_log(&config.log, "steward");
    let knowledge = Arc::new(Knowledge {
        birth,
        view: RwLock::default(),
        workers: Mutex::default(),
        strangers: Mutex::default(),
        steering: Mutex::default(),
        daemon: Mutex::default(),
        figures: Figures::default(),
        servers,
        channel,
        pending: Mutex::default(),
        busy: AtomicUsize::new(0),
        access_log: Arc::default(),
    });
    // Nobody is answered before the counters are known: they would seem to
    // have gone back.
    let mut admin = Admin::default();
    while !knowledge.is_complete() {
        if !hear(&knowledge, &mut admin)? {
            return Ok(());
        }
    }
    control::send(&knowledge.channel, &FromSteward::Ready, &[]).map_err(|e| e.to_string())?;
    checks::start(Arc::clone(&knowledge.servers), knowledge.birth.is_first);
    let answering = Arc::clone(&knowledge);
    std::thread::spawn(move || control_socket::serve(&listener, &answering));
    admin.begin();
    while hear(&knowledge, &mut admin)? {}
    // Who asked for the end is still to be told that it was done, and the last
    // sessions are still to be logged.
    let deadline = Instant::now() + LAST_WORDS;
    let busy = || knowledge.busy.load(Ordering::Acquire) > 0 || !knowledge.access_log.is_idle();
    while busy() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Takes in one message; false where the supervisor is gone.
fn hear(knowledge: &Arc<Knowledge>, admin: &mut Admin) -> Result<bool, String> {
    match control::receive(&knowledge.channel) {
        Ok(None) => return Ok(false),
        Ok(Some((ToSteward::Strangers(found), _))) => {
            *knowledge.strangers.lock().expect("no thread panics with it") = found;
        }
        Ok(Some((ToSteward::Workers(workers), _))) => {
            *knowledge.workers.lock().expect("no thread panics with it") = workers;
        }
        Ok(Some((ToSteward::Tables { generation, config_count, boards, tables }, fds))) => {
            let (view, boards) = View::open(generation, config_count, boards, tables, fds)?;
            let view = Arc::new(view);
            knowledge.servers.handle_view(Arc::clone(&view), boards);
            *knowledge.view.write().expect("no thread panics with it") = view;
        }
        Ok(Some((ToSteward::Overrides(list), _))) => {
            knowledge.servers.handle_overrides(Overrides::from_list(list));
        }
        Ok(Some((ToSteward::Steering { listener, active, shares }, _))) => {
            let counts = report::connections(&knowledge.view(), &listener, shares.len());
            let mut steering = knowledge.steering.lock().expect("no thread panics with it");
            let expected = match steering.remove(&listener) {
                Some((_, mut expected)) => {
                    expected.handle_change(counts.iter().sum(), shares);
                    expected
                }
                None => Expected::resume(&counts, shares),
            };
            steering.insert(listener, (active, expected));
        }
        Ok(Some((ToSteward::Daemon(state), _))) => {
            *knowledge.daemon.lock().expect("no thread panics with it") = state;
        }
        Ok(Some((ToSteward::Admin { address }, fds))) => {
            admin.serve_at(address.zip(fds.into_iter().next()), knowledge);
        }
        Ok(Some((ToSteward::Figures, fds))) => match read_figures(fds) {
            Ok(figures) => knowledge.figures.handle_come(figures),
            Err(error) => warn!(%error, "the sockets' figures were not understood"),
        },
        Ok(Some((ToSteward::Answer { id, answer }, _))) => knowledge.handle_answer(id, Answer::Text(answer)),
        Ok(Some((ToSteward::Found { id, silent }, memories))) => {
            knowledge.handle_answer(id, Answer::Found { memories, silent });
        }
        Ok(Some((ToSteward::AccessLog, fds))) => {
            let mut fds = fds.into_iter();
            if let Some(source) = fds.next() {
                knowledge.access_log.aim(source, fds.next());
            }
        }
        Ok(Some((ToSteward::Birth(_), _))) => warn!("a second birth"),
        Err(error) if error.raw_os_error().is_some() => return Ok(false),
        Err(error) => warn!(%error, "a message of the supervisor was not understood"),
    }
    Ok(true)
}

fn read_figures(fds: Vec<OwnedFd>) -> std::io::Result<Vec<ListenerFigures>> {
    let memory = fds.into_iter().next().ok_or(std::io::ErrorKind::InvalidData)?;
    Ok(serde_json::from_slice(&shared::read_sealed(memory)?)?)
}

impl View {
    fn open(
        generation: u64,
        config_count: usize,
        boards: Vec<usize>,
        tables: Vec<Table>,
        fds: Vec<OwnedFd>,
    ) -> Result<(View, Vec<WrittenBoard>), String> {
        if fds.len() != config_count + boards.len() + tables.len() || config_count == 0 {
            return Err("the tables came with other descriptors than they need".into());
        }
        let mut fds = fds.into_iter();
        let mut configs = Vec::new();
        for fd in fds.by_ref().take(config_count) {
            let bytes = shared::read_sealed(fd).map_err(|e| e.to_string())?;
            let config: Config = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
            let layout = Layout::of(&config);
            configs.push((config, layout));
        }
        let mut written = Vec::new();
        for config in boards {
            let fd = fds.next().ok_or("counted above")?;
            let region = Region::open(fd).map_err(|e| e.to_string())?;
            written.push(WrittenBoard { config, region });
        }
        let open = |(table, fd)| Region::open_read_only(fd).map(|region| (table, region));
        let tables = tables.into_iter().zip(fds).map(open).collect::<Result<Vec<_>, _>>();
        Ok((View { generation, configs, tables: tables.map_err(|e| e.to_string())? }, written))
    }
}

impl Knowledge {
    fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().expect("no thread panics with it"))
    }

    fn is_complete(&self) -> bool {
        !self.view().configs.is_empty() && !self.workers.lock().expect("no thread panics with it").is_empty()
    }

    /// What waits at the sockets now.
    fn figures(&self) -> Arc<Vec<ListenerFigures>> {
        self.figures.fresh(|| {
            if let Err(error) = control::send(&self.channel, &FromSteward::Figures, &[]) {
                warn!(%error, "the supervisor was not asked for figures");
            }
        })
    }

    fn handle_answer(&self, id: u64, answer: Answer) {
        let waiting = self.pending.lock().expect("no thread panics with it").waiting.remove(&id);
        if let Some(waiting) = waiting {
            let _ = waiting.send(answer);
        }
    }

    /// Asks the supervisor for something to be done and waits until it is.
    fn ask(&self, request: Request) -> Result<String, String> {
        match self.answer_to(request)? {
            Answer::Text(answer) => answer,
            Answer::Found { .. } => Err("the supervisor answered something else".into()),
        }
    }

    /// The sessions that the query takes, and how many workers were silent.
    fn find_sessions(&self, query: Query) -> Result<(Found, usize), String> {
        let limit = query.limit.min(MOST_SESSIONS);
        let filter = query.filter.clone();
        let (memories, silent) = match self.answer_to(Request::Sessions(query))? {
            Answer::Found { memories, silent } => (memories, silent),
            Answer::Text(answer) => return Err(answer.err().unwrap_or_default()),
        };
        let mut all = Found::default();
        for memory in memories {
            let text = shared::read_sealed(memory).map_err(|e| e.to_string())?;
            all.add(serde_json::from_slice(&text).map_err(|e| e.to_string())?, limit);
        }
        let view = self.view();
        let mistake = view.configs.first().and_then(|(config, _)| filter.mistake(config));
        match mistake.filter(|_| all.matched == 0) {
            Some(mistake) => Err(mistake),
            None => Ok((all, silent)),
        }
    }

    fn answer_to(&self, request: Request) -> Result<Answer, String> {
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
        match receiver.recv_timeout(ANSWER_LIMIT) {
            Ok(answer) => Ok(answer),
            Err(_) => {
                self.pending.lock().expect("no thread panics with it").waiting.remove(&id);
                Err("the supervisor gave no answer".into())
            }
        }
    }
}
