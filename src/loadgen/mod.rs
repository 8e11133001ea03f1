//! `evenkeel bench`: makes load, checks every byte that comes back, and tells
//! how fast, how evenly and with what losses it was served.
//!
//! The main thread prepares a `plan`, starts one `engine` a thread, and
//! collects what they count; `outcome` sums it up, `print` and `page` show it.
//! It ends by the plan's time or amount of work, or when nothing ever answers.

mod args;
mod arrivals;
mod client;
mod collector;
mod daemon;
mod dialogue;
mod engine;
mod flow;
mod identity;
mod interrupt;
mod machine;
mod message;
mod outcome;
mod page;
mod pattern;
mod plan;
mod print;
mod progress;
mod sampler;
mod session;
mod sockets;
mod tally;
mod values;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

pub use args::Args;
use daemon::Snapshot;
use engine::Engine;
use message::Shared;
use outcome::{Looks, Outcome};
use plan::{Plan, Refusal};
use progress::Progress;
use sampler::Sampler;
use tally::Tally;

/// How long the daemon's counters may take to show the last connection.
const SETTLE: Duration = Duration::from_secs(1);

/// Runs the benchmark that was typed, prints its result, and returns its exit
/// code: 0, 1 when a limit was not kept or nothing was answered, 2 for usage.
pub fn run(args: &Args) -> ExitCode {
    match run_plan(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(refusal) => {
            eprintln!("evenkeel bench: {}", refusal.text);
            ExitCode::from(refusal.code)
        }
    }
}

fn run_plan(args: &Args) -> Result<bool, Refusal> {
    let plan = Plan::prepare(args)?;
    let report = args.report.as_deref().map(open_report).transpose()?;
    let mut looks = Looks::default();
    let socket = first_look(args, &plan, &mut looks)?;
    let shared = Arc::new(Shared {
        noise: pattern::Noise::new(plan.seed),
        plan,
        answered: AtomicBool::new(false),
        interrupted: AtomicBool::new(false),
        began: Instant::now(),
    });
    interrupt::watch(&shared);
    let sampler = socket.clone().map(|socket| Sampler::start(socket, Arc::clone(&shared)));
    let collected = make_load(&shared)?;
    looks.worst_active = sampler.and_then(Sampler::finish);
    if let Some(socket) = &socket {
        last_look(socket, &shared.plan, &collected.total, &mut looks);
    }
    let outcome = Outcome::new(args, &shared.plan, collected, looks, shared.began);
    show(args, &outcome, report)?;
    Ok(outcome.passed)
}

/// Starts the threads and collects until all have ended.
fn make_load(shared: &Arc<Shared>) -> Result<collector::Collected, Refusal> {
    let (sender, receiver) = crossbeam_channel::unbounded();
    let failed =
        |error: std::io::Error| Refusal::failed(format!("a thread of the load generator failed: {error}"));
    let mut threads = Vec::new();
    for index in 0..shared.plan.threads {
        let engine = Engine::new(Arc::clone(shared), sender.clone(), index).map_err(failed)?;
        let builder = thread::Builder::new().name(format!("bench-{index}"));
        threads.push(builder.spawn(move || engine.run()).map_err(failed)?);
    }
    drop(sender);
    let mut progress = Progress::new(&shared.plan, shared.began);
    let collected = collector::collect(&receiver, shared.plan.threads, shared.began, &mut progress);
    for thread in threads {
        thread.join().expect("a thread of the load generator does not panic").map_err(failed)?;
    }
    Ok(collected)
}

/// Looks at the daemon before the run. A socket that was typed must work; the
/// default one is used if it does.
fn first_look(args: &Args, plan: &Plan, looks: &mut Looks) -> Result<Option<PathBuf>, Refusal> {
    let socket = args.socket.clone().unwrap_or_else(daemon::default_socket);
    if args.socket.is_none() && !socket.exists() {
        return Ok(None);
    }
    match daemon::look(&socket, plan.transport.name(), plan.target) {
        Ok(snapshot) => {
            looks.before = Some(snapshot);
            Ok(Some(socket))
        }
        Err(error) if args.socket.is_some() => {
            let code = if crate::control::client::is_forbidden(&socket) { 77 } else { 1 };
            Err(Refusal { code, text: error })
        }
        Err(error) => {
            looks.notes.push(format!("no spread from the control socket: {error}"));
            Ok(None)
        }
    }
}

/// Looks again, until all connections of the run are counted.
fn last_look(socket: &Path, plan: &Plan, total: &Tally, looks: &mut Looks) {
    let Some(before) = looks.before.clone() else {
        return;
    };
    let deadline = Instant::now() + SETTLE;
    let counted =
        |after: &Snapshot| outcome::difference(&before.per_slot, &after.per_slot).iter().sum::<u64>();
    loop {
        match daemon::look(socket, plan.transport.name(), plan.target) {
            Ok(after) if counted(&after) >= total.connections || Instant::now() >= deadline => {
                note_others(counted(&after), plan, total, looks);
                looks.after = Some(after);
                return;
            }
            Err(error) if Instant::now() >= deadline => {
                looks.notes.push(format!("no spread from the control socket after the run: {error}"));
                return;
            }
            Ok(_) | Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The daemon should have counted what we made, no more and no less.
fn note_others(counted: u64, plan: &Plan, total: &Tally, looks: &mut Looks) {
    let made = total.connections;
    // A flow whose datagrams were all lost never came to be at the daemon.
    let may_be_lost = plan.transport == args::Transport::Udp && total.error_count() > 0;
    if counted < made && !may_be_lost {
        looks.notes.push(format!(
            "the daemon counted {counted} of {made} connections: does another program share the port? \
             See `evenkeel doctor`"
        ));
    } else if counted > made + made / 100 {
        looks.notes.push(format!("the daemon counted {counted} connections, {made} of them from here"));
    }
}

/// Before the run, so that a bad path costs no run.
fn open_report(path: &Path) -> Result<std::fs::File, Refusal> {
    std::fs::File::create(path)
        .map_err(|error| Refusal::failed(format!("--report {}: {error}", path.display())))
}

fn show(args: &Args, outcome: &Outcome, report: Option<std::fs::File>) -> Result<(), Refusal> {
    if let Some(mut file) = report {
        file.write_all(page::page(outcome).as_bytes())
            .map_err(|error| Refusal::failed(format!("the report cannot be written: {error}")))?;
    }
    let mut text = if args.json {
        serde_json::to_string_pretty(outcome).expect("an outcome has only finite numbers and string keys")
    } else {
        print::table(outcome)
    };
    if args.json {
        text.push('\n');
        // The reason for exit code 1 belongs where a person looks.
        outcome.failures.iter().for_each(|failure| eprintln!("evenkeel bench: {failure}"));
    }
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Refusal::failed(format!("the result cannot be written: {error}")))
        }
        _ => Ok(()),
    }
}
