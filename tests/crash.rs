//! A worker that dies loses nothing: its keeper has what it had.
//!
//! Every byte is checked by its place in its stream at both ends, so a lost, a
//! doubled or a moved one shows. `EVENKEEL_SOAK=10` kills ten times as often.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::signal::Signal;
use support::daemon::{Daemon, children_of, name_of, runs, signal};
use support::steady::{Load, Seen, Servers};
use support::{eventually, within};

fn main() {
    support::run(tests![a_session_goes_on_when_its_worker_is_killed, workers_killed_under_load_lose_nothing,])
}

/// A daemon whose dead workers are replaced at once, however often they die.
fn start(text: &str) -> Daemon {
    let mut daemon = Daemon::start_with(text, |command| {
        command.env("EVENKEEL_TEST_HASTE", "1");
    });
    daemon.wait_ready();
    daemon
}

/// The process of this name, as `ek-worker-0`.
fn process(daemon: &Daemon, name: &str) -> Option<u32> {
    let is_it = |pid: &u32| runs(*pid) && name_of(*pid) == name;
    // A keeper is called as its worker for a moment, and is the younger one.
    children_of(daemon.pid()).into_iter().filter(is_it).min()
}

fn wait_for(daemon: &Daemon, name: &str) -> u32 {
    let mut found = None;
    within(Duration::from_secs(60), name, || {
        found = process(daemon, name);
        found.is_some()
    });
    found.expect("waited for")
}

/// Kills a slot's worker, unless it is being replaced just then.
fn kill(daemon: &Daemon, slot: usize) -> bool {
    let worker = process(daemon, &format!("ek-worker-{slot}"));
    worker.inspect(|pid| signal(*pid, Signal::SIGKILL)).is_some()
}

/// Numbers that look like chance, the same in every run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[track_caller]
fn assert_nothing_lost(daemon: &Daemon, seen: &Seen) {
    let ended: Vec<_> = daemon.status().listeners.into_iter().map(|listener| listener.ended).collect();
    println!("{seen:?} {ended:?}");
    assert_eq!(seen.losses(), 0, "{seen:?}\n{}", daemon.log());
}

fn a_session_goes_on_when_its_worker_is_killed() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let daemon = start(&servers.config(1, ""));
    let mut session = support::servers::connect(support::servers::local(8080));
    let mut at = 0;
    let mut exchange = |session: &mut std::net::TcpStream| {
        use std::io::{Read, Write};
        session.write_all(&support::pattern(at, 100)).expect("it goes on");
        let mut answer = [0; 100];
        session.read_exact(&mut answer).expect("it goes on");
        assert_eq!(answer[..], support::pattern(at, 100));
        at += 100;
    };
    exchange(&mut session);
    for round in 1..=5 {
        wait_for(&daemon, "ek-keeper-0");
        signal(wait_for(&daemon, "ek-worker-0"), Signal::SIGKILL);
        exchange(&mut session);
        eventually("it is counted", || {
            let worker = daemon.worker(0);
            worker.restarts == round && worker.state == "ready" && worker.active == 1
        });
    }
    assert_nothing_lost(&daemon, &seen);
    let listener = daemon.listener("plain");
    assert_eq!((listener.connections, listener.active, listener.ended.len()), (1, 1, 0), "{listener:?}");
}

fn workers_killed_under_load_lose_nothing() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let workers = 3;
    let daemon = start(&servers.config(workers, ""));
    let load = Load::begin(&seen, false);
    let mut chance = Chance(0x9E37_79B9);
    let mut kills = 0;
    while kills < 100 * support::soak() {
        std::thread::park_timeout(Duration::from_millis(chance.below(60)));
        kills += usize::from(kill(&daemon, chance.below(workers as u64) as usize));
    }
    let before = seen.exchanges.load(Relaxed);
    within(Duration::from_secs(60), "the load goes on", || seen.exchanges.load(Relaxed) > before + 200);
    load.end();
    assert_nothing_lost(&daemon, &seen);
}
