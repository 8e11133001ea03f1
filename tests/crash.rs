//! A worker that dies loses nothing: its keeper has what it had.
//!
//! Every byte is checked by its place in its stream at both ends, so a lost, a
//! doubled or a moved one shows. `EVENKEEL_SOAK=10` kills ten times as often, and
//! `EVENKEEL_SOAK=50` two thousand times under packet loss.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::signal::Signal;
use support::crashes::{Chance, kill, process, self_check_resets, start, wait_for};
use support::daemon::{Daemon, runs, signal};
use support::nginx::Running;
use support::servers::{connect, local};
use support::steady::{Load, Seen, Servers};
use support::{eventually, pattern, within};

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
        a_session_at_which_workers_fault_twice_is_reset_and_its_client_named needs ["strace"],
        keeper_and_worker_killed_at_once_lose_what_they_had_and_nothing_else,
        a_kernel_without_pidfds_means_no_keeper_and_that_is_said_once needs ["strace"],
        without_crash_proof_there_is_no_keeper,
        no_keeper_outlives_the_daemon,
        workers_killed_under_packet_loss_lose_nothing needs ["nft"],
    ])
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
    (with_flows, with_checks): (bool, bool),
    mut also: impl FnMut(&Daemon, usize),
) {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let mut config = servers.config(workers, "");
    if !with_checks {
        let none = "[upstream.health]\ncheck = \"none\"\n[[upstream.server]]";
        config = config.replace("[[upstream.server]]", none);
    }
    let daemon = start(&config);
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
    assert_eq!(self_check_resets(&daemon), 0, "{}", daemon.log());
}

fn workers_killed_under_load_lose_nothing() {
    kill_under_load(3, 100, 60, (true, true), |_, _| {});
}

/// One segment of fifty is lost, so that much is under way that nobody has
/// acknowledged. (A segment of the handshake as well: no checks, which would
/// find a server that does not answer within a second.)
fn workers_killed_under_packet_loss_lose_nothing() {
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft");
    let rules = "table inet lossy {\n chain input {\n  type filter hook input priority 0;\n  \
                 meta l4proto tcp numgen random mod 50 < 1 counter drop\n }\n}\n";
    nft.stdin.take().expect("piped").write_all(rules.as_bytes()).expect("nft reads");
    if !nft.wait().expect("nft").success() {
        support::skip("the kernel has no nftables with numgen");
    }
    kill_under_load(3, 40, 100, (false, false), |_, _| {});
    let counted = Command::new("nft").args(["list", "ruleset"]).output().expect("nft");
    let text = String::from_utf8_lossy(&counted.stdout).into_owned();
    assert!(text.contains("counter packets ") && !text.contains("counter packets 0 "), "{text}");
}

/// Less than a worker's birth takes.
fn kills_in_the_middle_of_a_recovery_lose_nothing() {
    kill_under_load(2, 60, 12, (false, true), |_, _| {});
}

fn kills_in_the_middle_of_a_reload_lose_nothing() {
    kill_under_load(2, 40, 40, (false, true), |daemon, kills| {
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

/// Makes a worker fault in its next read.
fn spoil(worker: u32) -> Running {
    let fault = ["-qq", "-o", "/dev/null", "-e", "inject=recvfrom:signal=SIGABRT:when=1", "-p"];
    let strace = Running(Command::new("strace").args(fault).arg(worker.to_string()).spawn().expect("strace"));
    eventually("it is watched", || {
        let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    });
    strace
}

fn a_session_at_which_workers_fault_twice_is_reset_and_its_client_named() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let daemon = start(&servers.config(1, ""));
    let mut other = Client::new();
    let mut client = Client::new();
    let named = client.stream.local_addr().unwrap();
    let fault = || {
        wait_for(&daemon, "ek-keeper-0");
        let worker = wait_for(&daemon, "ek-worker-0");
        (worker, spoil(worker))
    };
    // Once may be chance.
    let (first, _strace) = fault();
    client.exchange();
    assert!(!runs(first));
    let _strace = fault();
    assert!(client.try_exchange().is_err(), "{}", daemon.log());
    daemon.says(&format!("the session of {named} was being worked on at two crashes: reset"));
    other.exchange();
}

fn keeper_and_worker_killed_at_once_lose_what_they_had_and_nothing_else() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let daemon = start(&servers.config(2, ""));
    let mut clients: Vec<Client> = (0..40).map(|_| Client::new()).collect();
    let lost = daemon.worker(0).active;
    let (keeper, worker) = (wait_for(&daemon, "ek-keeper-0"), wait_for(&daemon, "ek-worker-0"));
    // So that it begins no other keeper, and accepts nobody.
    signal(worker, Signal::SIGSTOP);
    let mut waiting: Vec<Client> = (0..40).map(|_| Client { stream: connect(local(8080)), at: 0 }).collect();
    signal(keeper, Signal::SIGKILL);
    eventually("the keeper is dead", || !runs(keeper));
    signal(worker, Signal::SIGKILL);
    waiting.iter_mut().for_each(Client::exchange);
    let broken = clients.iter_mut().filter_map(|client| client.try_exchange().err()).count() as u64;
    assert_eq!(broken, lost, "{}", daemon.log());
    assert!((1..40).contains(&lost), "40 connections over 2 slots, all in one: 2 in 2^40");
    eventually("they are counted", || {
        daemon.listener("plain").ended.get("worker_lost").copied() == Some(lost)
    });
}

fn a_kernel_without_pidfds_means_no_keeper_and_that_is_said_once() {
    let seen = Arc::<Seen>::default();
    let servers = Servers::start(&seen);
    let old = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "inject=pidfd_open:error=ENOSYS"];
    let mut daemon = Daemon::start_under(&servers.config(2, ""), &old, |command| {
        command.env("EVENKEEL_TEST_HASTE", "1");
    });
    daemon.wait_ready();
    Client::new();
    eventually("status says it", || {
        let reasons = daemon.status().workers.into_iter().map(|worker| worker.keeper?.unavailable);
        reasons.into_iter().all(|reason| reason.is_some_and(|reason| reason.contains("pidfd")))
    });
    let (_, table) = daemon.run(&["status"]);
    assert!(table.contains("pidfd"), "{table}");
    daemon.kill_worker(1);
    Client::new();
    let warning = "sessions do not survive the death of their worker";
    assert_eq!(daemon.log().matches(warning).count(), 1, "{}", daemon.log());
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
