//! What every test with real processes uses.
//!
//! Each test runs in a process of its own, in a network namespace of its own
//! (inside a user namespace where the user is not root): two tests that share
//! a SO_REUSEPORT port would steal each other's connections. What cannot run
//! here is reported as ignored, with `SKIPPED:` and the reason: all tests where
//! the host allows neither namespace, those that need what is missing, and
//! those that find it out by themselves (`skip`).
//!
//! ```ignore
//! mod support;
//! fn main() { support::run(tests![one_test, another_test]) }
//! ```

#![allow(dead_code)]

pub mod browser;
pub mod clients;
pub mod crashes;
pub mod daemon;
pub mod datagrams;
pub mod health;
pub mod http;
pub mod load;
pub mod machine;
pub mod nginx;
pub mod pace;
pub mod postgres;
pub mod resolver;
pub mod schema;
pub mod servers;
pub mod steady;
pub mod upgradable;

use std::io::{Read, Write};
use std::panic::{catch_unwind, resume_unwind};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use evenkeel::sys::isolated::{self, Network};
use libtest_mimic::{Arguments, Completion, Failed, Measurement, Trial};

/// Set for the process that runs one test.
const INSIDE: &str = "EVENKEEL_TEST_INSIDE";
/// The exit code of a test's process that cannot do here what it is for.
const SKIPPED: i32 = 77;
/// No test takes longer; one that does hangs.
const TEST_LIMIT: Duration = Duration::from_secs(180);
/// Nor a bench.
const BENCH_LIMIT: Duration = Duration::from_secs(1200);

/// A test's name, its body, and the programs that it needs.
pub struct Test {
    pub name: &'static str,
    pub body: fn(),
    pub needs: &'static [&'static str],
}

/// `tests![name, other needs ["nginx", "curl"]]`
#[macro_export]
macro_rules! tests {
    ($($name:ident $(needs [$($need:literal),*])?),* $(,)?) => {
        vec![$($crate::support::Test {
            name: stringify!($name), body: $name, needs: &[$($($need),*)?],
        }),*]
    };
}

/// Runs the tests; the main function of a test program.
pub fn run(tests: Vec<Test>) {
    if let Ok(name) = std::env::var(INSIDE) {
        return run_inside(&tests, &name);
    }
    let mut arguments = Arguments::from_args();
    let is_bench = arguments.bench;
    if is_bench {
        // One at a time, or they would measure each other.
        arguments.test_threads = Some(1);
    }
    let no_network = missing_network();
    let trials = tests.into_iter().map(|test| {
        let missing = no_network.clone().or_else(|| missing_program(test.needs));
        let name = test.name;
        match missing {
            Some(reason) => Trial::ignorable_test(name, move || Ok(ignored(&reason))),
            None if is_bench => Trial::bench(name, move |_| in_own_process(name, BENCH_LIMIT).map(End::took)),
            None => Trial::ignorable_test(name, move || {
                in_own_process(name, TEST_LIMIT * soak() as u32).map(End::completion)
            }),
        }
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

fn run_inside(tests: &[Test], name: &str) {
    let network = isolated::leave_network().expect("a network of its own");
    if name == PROBE {
        std::process::exit(if network == Network::Shared { 1 } else { 0 });
    }
    assert_ne!(network, Network::Shared, "the host allows no network namespace");
    let test = tests.iter().find(|test| test.name == name).expect("the test exists");
    if let Err(panic) = catch_unwind(test.body) {
        let Skip(reason) = *panic.downcast().unwrap_or_else(|other| resume_unwind(other));
        println!("{reason}");
        std::process::exit(SKIPPED);
    }
}

/// Ends a test that finds out by itself that it cannot run here: it is reported
/// as ignored, with the reason.
pub fn skip(reason: &str) -> ! {
    // Unwinds like a panic, so that what the test started is ended, and says nothing.
    resume_unwind(Box::new(Skip(reason.to_string())))
}

struct Skip(String);

fn ignored(reason: &str) -> Completion {
    Completion::ignored_with(format!("SKIPPED: {}", reason.trim_end()))
}

/// How a test's process ended that did not fail.
enum End {
    Passed(Measurement),
    Skipped(String),
}

impl End {
    fn completion(self) -> Completion {
        match self {
            End::Passed(_) => Completion::Completed,
            End::Skipped(reason) => ignored(&reason),
        }
    }

    fn took(self) -> Option<Measurement> {
        match self {
            End::Passed(took) => Some(took),
            End::Skipped(_) => None,
        }
    }
}

const PROBE: &str = "is a network of its own possible?";

fn missing_network() -> Option<String> {
    let status = Command::new(std::env::current_exe().expect("a test program"))
        .env(INSIDE, PROBE)
        .stderr(Stdio::null())
        .status()
        .expect("a test program can be started");
    (!status.success()).then(|| "this host allows no network namespace".to_string())
}

/// Why a test cannot run here; `root` stands for the right to be two users,
/// `ebpf` for that to load programs, `a machine` for what it takes to boot a systemd.
fn missing_program(needs: &[&str]) -> Option<String> {
    let paths = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let installed =
        |name: &str| paths.split(':').any(|folder| std::path::Path::new(folder).join(name).exists());
    needs.iter().find_map(|&need| match need {
        "a machine" => machine::missing(),
        "a PostgreSQL server" => {
            postgres::programs().is_none().then(|| "the PostgreSQL server is not installed".to_string())
        }
        "root" => (!other_users()).then(|| "only root has a second user".to_string()),
        "ebpf" => (!evenkeel::sys::bpf::is_permitted())
            .then(|| "this user may load no eBPF program (CAP_BPF)".to_string()),
        program => (!installed(program)).then(|| format!("{program} is not installed")),
    })
}

/// Are there several users for this one? In a user namespace of one user only
/// root in name.
pub fn other_users() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    nix::unistd::geteuid().is_root() && map.split_whitespace().nth(2).is_some_and(|count| count != "1")
}

fn in_own_process(name: &str, limit: Duration) -> Result<End, Failed> {
    let begin = Instant::now();
    let mut child = Command::new(std::env::current_exe()?)
        .env(INSIDE, name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut out = child.stdout.take().expect("piped");
    let mut err = child.stderr.take().expect("piped");
    let text = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = err.read_to_string(&mut text);
        text
    });
    let printed = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = out.read_to_string(&mut text);
        text
    });
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            return Err(format!("no end after {} s", limit.as_secs()).into());
        }
        std::thread::park_timeout(Duration::from_millis(10));
    };
    // Shown with --nocapture or where it failed.
    let printed = printed.join().unwrap_or_default();
    let text = text.join().unwrap_or_default();
    match status.code() {
        Some(0) => {
            let _ = std::io::stderr().write_all(printed.as_bytes());
            let avg = begin.elapsed().as_nanos() as u64;
            Ok(End::Passed(Measurement { avg, variance: 0 }))
        }
        Some(SKIPPED) => Ok(End::Skipped(printed)),
        _ => Err(format!("{status}\n{printed}{text}").into()),
    }
}

/// How many times longer than usual tests of endurance are to take:
/// `$EVENKEEL_SOAK`, else 1.
pub fn soak() -> usize {
    std::env::var("EVENKEEL_SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(1).max(1)
}

/// Waits until something holds; fails where it does not within ten seconds.
#[track_caller]
pub fn eventually(what: &str, condition: impl FnMut() -> bool) {
    within(Duration::from_secs(10), what, condition);
}

/// Waits until something holds; fails where it does not in time.
#[track_caller]
pub fn within(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Bytes that differ at every position, so that a lost, doubled or moved one
/// shows.
pub fn pattern(from: usize, count: usize) -> Vec<u8> {
    (from..from + count).map(|i| (i.wrapping_mul(31) ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}
