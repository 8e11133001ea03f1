//! A worker that dies loses nothing: its keeper has what it had.
//!
//! Every byte is checked by its place in its stream at both ends, so a lost, a
//! doubled or a moved one shows. `EVENKEEL_SOAK=10` kills ten times as often.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use support::daemon::{Daemon, children_of, name_of, runs, signal};
use support::servers::{connect, local};
use support::steady::{Load, Seen, Servers};
use support::{eventually, pattern, postgres, within};

fn main() {
    support::run(tests![
        a_session_goes_on_when_its_worker_is_killed,
        a_worker_that_faults_loses_nothing_either,
        keeper_and_worker_killed_in_turn_lose_nothing,
        workers_killed_under_load_lose_nothing,
        kills_in_the_middle_of_a_recovery_lose_nothing,
        kills_in_the_middle_of_a_reload_lose_nothing,
        a_killed_worker_of_a_leaving_daemon_loses_nothing,
        a_session_whose_numbers_do_not_agree_is_reset_and_counted,
        without_crash_proof_there_is_no_keeper,
        no_keeper_outlives_the_daemon,
        pgbench_through_kills_meets_no_error needs ["pgbench", "setpriv"],
    ])
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
    children_of(daemon.pid()).into_iter().find(is_it)
}

fn wait_for(daemon: &Daemon, name: &str) -> u32 {
    let mut found = None;
    within(Duration::from_secs(60), name, || {
        found = process(daemon, name);
        found.is_some()
    });
    found.expect("waited for")
}

/// Kills a slot's worker, unless it is being replaced just then. Who that is
/// the daemon knows: a keeper that has just begun is called as its worker.
fn kill(daemon: &Daemon, slot: usize) -> bool {
    let Ok(answer) = daemon.ask("status") else { return false };
    let worker = answer["status"]["workers"][slot]["pid"].as_u64().filter(|pid| *pid != 0);
    worker.is_some_and(|pid| nix::sys::signal::kill(Pid::from_raw(pid as i32), Signal::SIGKILL).is_ok())
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

/// A client of one session, which must go on whatever happens.
struct Client {
    stream: TcpStream,
    at: usize,
}

impl Client {
    fn new() -> Client {
        let mut client = Client { stream: connect(local(8080)), at: 0 };
        client.exchange();
        client
    }

    fn try_exchange(&mut self) -> std::io::Result<()> {
        self.stream.write_all(&pattern(self.at, 100))?;
        let mut answer = [0; 100];
        self.stream.read_exact(&mut answer)?;
        assert_eq!(answer[..], pattern(self.at, 100));
        self.at += 100;
        Ok(())
    }

    #[track_caller]
    fn exchange(&mut self) {
        self.try_exchange().expect("it goes on");
    }
}

fn a_session_goes_on_when_its_worker_is_killed() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let daemon = start(&servers.config(1, ""));
    let mut client = Client::new();
    for round in 1..=5 {
        wait_for(&daemon, "ek-keeper-0");
        signal(wait_for(&daemon, "ek-worker-0"), Signal::SIGKILL);
        client.exchange();
        eventually("it is counted", || {
            let worker = daemon.worker(0);
            worker.restarts == round && worker.state == "ready" && worker.active == 1
        });
    }
    assert_nothing_lost(&daemon, &seen);
    let listener = daemon.listener("plain");
    assert_eq!((listener.connections, listener.active, listener.ended.len()), (1, 1, 0), "{listener:?}");
    let keeper = daemon.worker(0).keeper.expect("one is shown");
    assert_eq!((keeper.takeovers, keeper.sessions, keeper.self_check_resets, keeper.lost), (5, 5, 0, 0));
    assert_eq!(Some(keeper.pid), process(&daemon, "ek-keeper-0"));
}

fn a_worker_that_faults_loses_nothing_either() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let daemon = start(&servers.config(1, ""));
    let mut client = Client::new();
    for which in [Signal::SIGABRT, Signal::SIGILL, Signal::SIGABRT] {
        wait_for(&daemon, "ek-keeper-0");
        let worker = wait_for(&daemon, "ek-worker-0");
        signal(worker, which);
        eventually("it is dead", || !runs(worker));
        client.exchange();
    }
    assert_nothing_lost(&daemon, &seen);
}

fn keeper_and_worker_killed_in_turn_lose_nothing() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let daemon = start(&servers.config(1, ""));
    let mut client = Client::new();
    for round in 0..20 {
        let name = ["ek-keeper-0", "ek-worker-0"][round % 2];
        let dead = wait_for(&daemon, name);
        signal(dead, Signal::SIGKILL);
        client.exchange();
        // Both at once would be too much.
        within(Duration::from_secs(60), "there is another one", || {
            process(&daemon, name).is_some_and(|pid| pid != dead)
                && daemon.worker(0).state == "ready"
                && daemon.worker(0).keeper.map(|keeper| keeper.pid) == process(&daemon, "ek-keeper-0")
        });
    }
    client.exchange();
    assert_nothing_lost(&daemon, &seen);
    assert_eq!(daemon.worker(0).restarts, 10);
}

/// Kills so many workers at moments that look like chance, under load.
fn kill_under_load(
    workers: usize,
    count: usize,
    pause: u64,
    with_flows: bool,
    mut also: impl FnMut(&Daemon, usize),
) {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let daemon = start(&servers.config(workers, ""));
    let load = Load::begin(&seen, with_flows);
    let mut chance = Chance(0x9E37_79B9);
    let mut kills = 0;
    while kills < count * support::soak() {
        std::thread::park_timeout(Duration::from_micros(chance.below(pause * 1_000)));
        kills += usize::from(kill(&daemon, chance.below(workers as u64) as usize));
        also(&daemon, kills);
    }
    let before = seen.exchanges.load(Relaxed);
    within(Duration::from_secs(60), "the load goes on", || seen.exchanges.load(Relaxed) > before + 200);
    load.end();
    assert_nothing_lost(&daemon, &seen);
    let resets: u64 = daemon
        .status()
        .workers
        .iter()
        .filter_map(|worker| Some(worker.keeper.as_ref()?.self_check_resets))
        .sum();
    assert_eq!(resets, 0, "{}", daemon.log());
}

fn workers_killed_under_load_lose_nothing() {
    kill_under_load(3, 100, 60, true, |_, _| {});
}

/// Less than a worker's birth takes.
fn kills_in_the_middle_of_a_recovery_lose_nothing() {
    kill_under_load(2, 60, 12, false, |_, _| {});
}

fn kills_in_the_middle_of_a_reload_lose_nothing() {
    kill_under_load(2, 40, 40, false, |daemon, kills| {
        if kills % 5 == 0 {
            // Refused where one is under way still.
            daemon.signal(Signal::SIGHUP);
        }
    });
}

fn a_killed_worker_of_a_leaving_daemon_loses_nothing() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let mut daemon = start(&servers.config(1, "drain_timeout = \"60s\""));
    let mut client = Client::new();
    daemon.signal(Signal::SIGTERM);
    eventually("it leaves", || daemon.worker(0).state == "draining");
    client.exchange();
    signal(wait_for(&daemon, "ek-worker-0"), Signal::SIGKILL);
    client.exchange();
    assert!(daemon.log().contains("1 go on"), "{}", daemon.log());
    drop(client);
    assert_eq!(daemon.wait(Duration::from_secs(30)).code(), Some(0), "{}", daemon.log());
    assert_eq!(seen.losses(), 0);
}

fn a_session_whose_numbers_do_not_agree_is_reset_and_counted() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let folder = tempfile::tempdir().unwrap();
    let order = folder.path().join("order");
    let mut daemon = Daemon::start_with(&servers.config(1, ""), |command| {
        command.env("EVENKEEL_TEST_HANG", &order);
    });
    daemon.wait_ready();
    let mut client = Client::new();
    wait_for(&daemon, "ek-keeper-0");
    std::fs::write(&order, "corrupt 0").unwrap();
    client.exchange();
    eventually("it is done", || !order.exists());
    signal(wait_for(&daemon, "ek-worker-0"), Signal::SIGKILL);
    assert!(client.try_exchange().is_err(), "what may be wrong is never sent");
    eventually("it is counted", || {
        daemon.worker(0).keeper.is_some_and(|keeper| keeper.self_check_resets == 1)
    });
    eventually("it is lost", || daemon.listener("plain").ended.get("worker_lost") == Some(&1));
    Client::new();
}

fn without_crash_proof_there_is_no_keeper() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let daemon = start(&servers.config(1, "crash_proof = false"));
    let mut client = Client::new();
    assert!(process(&daemon, "ek-keeper-0").is_none() && daemon.worker(0).keeper.is_none());
    daemon.kill_worker(0);
    assert!(client.try_exchange().is_err());
    eventually("it is counted", || daemon.listener("plain").ended.get("worker_lost") == Some(&1));
}

fn no_keeper_outlives_the_daemon() {
    for (signals, code) in [
        (&[Signal::SIGTERM][..], Some(0)),
        (&[Signal::SIGTERM, Signal::SIGTERM], Some(1)),
        (&[Signal::SIGKILL], None),
    ] {
        let seen = Arc::<Seen>::default();
        let servers = Servers::start(&seen);
        let mut daemon = start(&servers.config(2, "orphan_timeout = \"1s\""));
        let client = Client::new();
        let keepers = [wait_for(&daemon, "ek-keeper-0"), wait_for(&daemon, "ek-keeper-1")];
        for which in signals {
            daemon.signal(*which);
            eventually("it is heard", || code.is_none() || daemon.log().contains("leaving"));
        }
        if signals.len() == 1 {
            drop(client);
        }
        assert_eq!(daemon.wait(Duration::from_secs(30)).code(), code, "{signals:?} {}", daemon.log());
        eventually("the keepers are gone", || !keepers.iter().any(|pid| runs(*pid)));
    }
}

fn pgbench_through_kills_meets_no_error() {
    let Some(programs) = postgres::programs() else {
        eprintln!("SKIPPED: the PostgreSQL server is not installed");
        return;
    };
    let database = postgres::Postgres::start(9001, programs);
    let daemon = start(&format!(
        "[daemon]\nworkers = 2\n[[listener]]\nname = \"db\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8432\"\n\
         upstream = \"db\"\n[[upstream]]\nname = \"db\"\n[[upstream.server]]\naddress = \"{}\"\n",
        database.address
    ));
    std::thread::scope(|scope| {
        let benches = [&["-S", "-n", "-c", "4", "-T", "5"][..], &["-S", "-n", "-C", "-c", "2", "-T", "5"]];
        let benches = benches.map(|arguments| {
            scope.spawn(move || {
                let done = postgres::pgbench(local(8432), arguments).output().expect("pgbench runs");
                let text = String::from_utf8_lossy(&done.stdout).into_owned()
                    + &String::from_utf8_lossy(&done.stderr);
                assert!(
                    done.status.success() && !text.contains("abort") && !text.contains("error"),
                    "{text}"
                );
                println!("{text}");
            })
        });
        let mut kills = 0;
        while benches.iter().any(|bench| !bench.is_finished()) {
            kills += usize::from(kill(&daemon, kills % 2));
            std::thread::park_timeout(Duration::from_millis(60));
        }
        assert!(kills > 20, "{kills}");
        benches.into_iter().for_each(|bench| bench.join().expect("pgbench meets no error"));
    });
}
