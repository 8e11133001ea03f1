//! Workers that live and do nothing: found, replaced, their queues served;
//! and everything that only looks like one.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::daemon::{Daemon, signal};
use support::servers::{connect, exchange, local};
use support::{eventually, within};

fn main() {
    support::run(tests![
        a_stopped_worker_is_replaced_in_time_and_who_waits_is_served,
        a_worker_that_is_stopped_while_nothing_happens_is_replaced_too,
        a_worker_that_burns_cpu_is_replaced,
        a_worker_that_hangs_while_leaving_is_replaced_and_its_queue_served,
        slots_that_a_scale_brought_are_watched_too,
        a_worker_that_hangs_on_waking_from_a_long_rest_is_replaced,
        a_worker_that_is_stopped_during_a_long_rest_is_replaced,
        an_idle_daemon_wakes_neither_its_workers_nor_its_supervisor,
        a_tree_that_was_paused_kills_nobody,
        a_supervisor_that_was_paused_kills_nobody,
    ])
}

const FRONT: &str = "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\n";

fn daemon(workers: usize, hang_timeout: &str, service: &str) -> Daemon {
    Daemon::ready(&config(workers, hang_timeout, service))
}

fn config(workers: usize, hang_timeout: &str, service: &str) -> String {
    format!(
        "[daemon]\nworkers = {workers}\nhang_timeout = \"{hang_timeout}\"\n{FRONT}service = \"{service}\"\n"
    )
}

fn restarts(daemon: &Daemon) -> Vec<u64> {
    daemon.status().workers.iter().map(|worker| worker.restarts).collect()
}

/// Connects until it has so many sessions at slots other than this one.
fn sessions_elsewhere(slot: usize, count: usize) -> Vec<TcpStream> {
    let mut sessions = Vec::new();
    while sessions.len() < count {
        let mut client = connect(local(8080));
        let mut line = Vec::new();
        let mut byte = [0];
        while byte[0] != b'\n' {
            client.read_exact(&mut byte).expect("a line");
            line.push(byte[0]);
        }
        if !String::from_utf8_lossy(&line).contains(&format!("slot={slot} ")) {
            sessions.push(client);
        }
    }
    sessions
}

/// Watches something for a while; the time itself is what is tested.
fn meanwhile(span: Duration, mut look: impl FnMut()) {
    let begin = Instant::now();
    while begin.elapsed() < span {
        look();
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

fn a_stopped_worker_is_replaced_in_time_and_who_waits_is_served() {
    let timeout = Duration::from_millis(1_000);
    let daemon = daemon(4, "1s", "identify");
    let others = sessions_elsewhere(1, 12);
    let pid = daemon.worker(1).pid;
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut others = others;
            while !stop.load(Ordering::Relaxed) {
                for client in &mut others {
                    let answer = exchange(client, b"undisturbed").expect("the others go on");
                    assert_eq!(answer, b"undisturbed");
                }
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let before = daemon.worker(1).accepted;
        let begin = Instant::now();
        signal(pid, Signal::SIGSTOP);
        // What was steered to the stopped worker before that was noticed waits.
        let mut clients: Vec<TcpStream> = (0..400).map(|_| connect(local(8080))).collect();
        for client in &mut clients {
            client.write_all(b"waiting").expect("the kernel takes it");
        }
        eventually("the slot is filled again", || {
            let worker = daemon.worker(1);
            worker.restarts == 1 && worker.state == "ready"
        });
        let took = begin.elapsed();
        assert!(took <= timeout + Duration::from_secs(1), "replaced after {took:?}");
        for (index, client) in clients.iter_mut().enumerate() {
            let mut answer = Vec::new();
            while !answer.ends_with(b"waiting") {
                let mut byte = [0];
                client.read_exact(&mut byte).unwrap_or_else(|error| panic!("client {index}: {error}"));
                answer.push(byte[0]);
            }
        }
        stop.store(true, Ordering::Relaxed);
        let waited = daemon.worker(1).accepted - before;
        // Steering leaves a stopped worker out as soon as the supervisor hears
        // of it: of these 400 hardly any wait there, where it was a quarter.
        assert!(waited < 100, "{waited} were steered to the stopped worker");
        println!("replaced after {took:?}, {waited} had waited");
    });
    assert!(rounds.load(Ordering::Relaxed) > 10);
    assert_eq!(restarts(&daemon), [0, 1, 0, 0]);
    daemon.says("slot=1");
    daemon.says("worker hung: no sign of life for 1");
}

fn a_worker_that_is_stopped_while_nothing_happens_is_replaced_too() {
    let daemon = daemon(2, "300ms", "echo");
    signal(daemon.worker(0).pid, Signal::SIGSTOP);
    eventually("it is replaced", || {
        let worker = daemon.worker(0);
        worker.restarts == 1 && worker.state == "ready"
    });
    assert_eq!(restarts(&daemon), [1, 0]);
}

fn a_worker_that_burns_cpu_is_replaced() {
    if !cfg!(debug_assertions) {
        support::skip("a release build has no way to make a worker hang");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let order = folder.path().join("hang");
    let mut daemon = Daemon::start_with(&config(2, "300ms", "echo"), |command| {
        command.env("EVENKEEL_TEST_HANG", &order);
    });
    daemon.wait_ready();
    // In one step, so that no worker reads half of it.
    fs::write(folder.path().join("draft"), "1").expect("a file");
    fs::rename(folder.path().join("draft"), &order).expect("the same folder");
    eventually("slot 1 took the order", || {
        let _ = exchange(&mut connect(local(8080)), b"x");
        !order.exists()
    });
    eventually("it is replaced", || {
        let worker = daemon.worker(1);
        worker.restarts == 1 && worker.state == "ready"
    });
    for _ in 0..50 {
        exchange(&mut connect(local(8080)), b"served").expect("both slots serve");
    }
}

fn a_worker_that_hangs_while_leaving_is_replaced_and_its_queue_served() {
    let mut daemon = daemon(1, "300ms", "echo");
    signal(daemon.worker(0).pid, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..50).map(|_| connect(local(8080))).collect();
    for client in &mut clients {
        client.write_all(b"waiting").expect("the kernel takes it");
    }
    daemon.signal(Signal::SIGTERM);
    for client in &mut clients {
        let mut answer = [0; 7];
        client.read_exact(&mut answer).expect("who waited is served by the next worker");
    }
    drop(clients);
    assert!(daemon.wait(Duration::from_secs(10)).success(), "{}", daemon.log());
    daemon.says("worker hung");
}

fn slots_that_a_scale_brought_are_watched_too() {
    let daemon = daemon(2, "300ms", "echo");
    let scale = |count: &str| drop(daemon.succeed(&["scale", count]));
    scale("4");
    // While it is being born it has more time.
    eventually("it serves", || daemon.worker(3).state == "ready");
    signal(daemon.worker(3).pid, Signal::SIGSTOP);
    eventually("it is replaced", || {
        let worker = daemon.worker(3);
        worker.restarts == 1 && worker.state == "ready"
    });
    scale("1");
    eventually("it serves", || daemon.worker(0).state == "ready");
    signal(daemon.worker(0).pid, Signal::SIGSTOP);
    eventually("it is replaced", || {
        let worker = daemon.worker(0);
        worker.restarts == 1 && worker.state == "ready"
    });
    exchange(&mut connect(local(8080)), b"served").expect("it serves");
}

/// How often a process went to sleep by itself.
fn sleeps(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a living process");
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.expect("the kernel counts them").trim().parse().expect("a number")
}

/// The workers and the supervisor.
fn tree(daemon: &Daemon) -> Vec<u32> {
    let workers = daemon.status().workers;
    workers.iter().map(|worker| worker.pid).chain([daemon.pid()]).collect()
}

/// Waits until none of these processes wakes for so long.
fn wait_for_rest(pids: &[u32], span: Duration) {
    let count = || pids.iter().map(|&pid| sleeps(pid)).collect::<Vec<u64>>();
    within(Duration::from_secs(30), "nobody wakes", || {
        let before = count();
        meanwhile(span, || {});
        before == count()
    });
}

fn an_idle_daemon_wakes_neither_its_workers_nor_its_supervisor() {
    let daemon = daemon(4, "300ms", "echo");
    let mut session = connect(local(8080));
    exchange(&mut session, b"before").expect("it serves");
    // A session that is open and silent wakes nobody either. Ten times the
    // time-out: a daemon that looks at its workers would have done so.
    wait_for_rest(&tree(&daemon), Duration::from_secs(3));
    exchange(&mut session, b"after").expect("it serves");
    assert_eq!(restarts(&daemon), [0; 4]);
    assert!(!daemon.log().contains("hung"), "{}", daemon.log());
}

/// Whether the process ends in time, without asking the daemon, which would
/// wake it.
fn is_gone(pid: u32) -> bool {
    !fs::exists(format!("/proc/{pid}")).expect("it can be looked at")
}

fn a_worker_that_hangs_on_waking_from_a_long_rest_is_replaced() {
    if !cfg!(debug_assertions) {
        println!("SKIPPED: a release build has no way to make a worker hang");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let order = folder.path().join("hang");
    let mut daemon = Daemon::start_with(&config(1, "300ms", "echo"), |command| {
        command.env("EVENKEEL_TEST_HANG", &order);
    });
    daemon.wait_ready();
    let pid = daemon.worker(0).pid;
    wait_for_rest(&tree(&daemon), Duration::from_secs(1));
    fs::write(folder.path().join("draft"), "0").expect("a file");
    fs::rename(folder.path().join("draft"), &order).expect("the same folder");
    let _client = connect(local(8080));
    eventually("it took the order", || !order.exists());
    eventually("it is ended", || is_gone(pid));
    eventually("it is replaced", || daemon.worker(0).restarts == 1 && daemon.worker(0).state == "ready");
    exchange(&mut connect(local(8080)), b"served").expect("it serves");
}

fn a_worker_that_is_stopped_during_a_long_rest_is_replaced() {
    let daemon = daemon(2, "300ms", "echo");
    let pids = tree(&daemon);
    wait_for_rest(&pids, Duration::from_secs(1));
    signal(pids[1], Signal::SIGSTOP);
    eventually("it is ended", || is_gone(pids[1]));
    eventually("it is replaced", || daemon.worker(1).restarts == 1 && daemon.worker(1).state == "ready");
    assert_eq!(restarts(&daemon), [0, 1]);
}

fn stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
}

fn a_tree_that_was_paused_kills_nobody() {
    let daemon = daemon(4, "300ms", "echo");
    let mut session = connect(local(8080));
    exchange(&mut session, b"before").expect("it serves");
    let pids: Vec<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
    // The pause begins at another point between two looks each time.
    for round in 0..8 {
        meanwhile(Duration::from_millis(45 * round), || {});
        let tree: Vec<u32> = [daemon.pid()].into_iter().chain(pids.clone()).collect();
        tree.iter().for_each(|&pid| signal(pid, Signal::SIGSTOP));
        eventually("all are stopped", || tree.iter().all(|&pid| stopped(pid)));
        meanwhile(Duration::from_millis(900), || {});
        // The supervisor first: it must not judge by what it slept through.
        tree.iter().for_each(|&pid| signal(pid, Signal::SIGCONT));
        exchange(&mut session, b"after").expect("the session goes on");
    }
    meanwhile(Duration::from_millis(900), || {});
    assert_eq!(restarts(&daemon), [0; 4]);
}

fn a_supervisor_that_was_paused_kills_nobody() {
    let daemon = daemon(2, "300ms", "echo");
    for _ in 0..3 {
        daemon.signal(Signal::SIGSTOP);
        within(Duration::from_secs(5), "it is stopped", || stopped(daemon.pid()));
        meanwhile(Duration::from_millis(1_000), || {});
        daemon.signal(Signal::SIGCONT);
        meanwhile(Duration::from_millis(600), || {});
    }
    assert_eq!(restarts(&daemon), [0; 2]);
}
