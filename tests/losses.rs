//! What is lost when something is done to the daemon: nothing, for everything
//! that is planned; and for a crash what the dead worker held, counted.
//!
//! Each event happens twenty times under `support::load`, so for about ten
//! seconds; `EVENKEEL_SOAK=10` makes it ten times as many (and the limit of a
//! test ten times as long).

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::daemon::{Daemon, signal};
use support::load::{Load, Servers};
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::upgradable::Upgradable;
use support::{eventually, pattern, postgres, within};

fn main() {
    support::run(tests![
        reloads_lose_nothing,
        reloads_of_the_upstream_alone_lose_nothing,
        scaling_up_and_down_loses_nothing,
        rebalancing_loses_nothing,
        upgrades_lose_nothing,
        killed_stewards_lose_nothing,
        a_killed_worker_without_a_keeper_loses_what_it_held_and_no_more,
        a_hanging_worker_without_a_keeper_loses_what_it_held_and_no_more,
        killed_workers_lose_nothing,
        hanging_workers_lose_nothing,
        a_supervisor_slow_to_speak_loses_nothing needs ["strace"],
        pgbench_and_a_hundred_sessions_see_no_change needs ["pgbench", "setpriv", "a PostgreSQL server"],
    ])
}

/// How often each event happens.
fn rounds() -> usize {
    20 * support::soak()
}

/// A change, once no other one is under way.
#[track_caller]
fn succeed(daemon: &Daemon, arguments: &[&str]) {
    daemon.change(arguments);
}

/// Does something twenty times under load; nothing is lost.
fn under_load(workers: usize, event: impl Fn(&Daemon, &Servers, usize)) {
    times_under_load(rounds(), workers, event);
}

fn times_under_load(count: usize, workers: usize, event: impl Fn(&Daemon, &Servers, usize)) {
    let servers = Servers::start();
    let daemon = Daemon::ready(&servers.config(workers, ""));
    during_load(&daemon, || (0..count).for_each(|round| event(&daemon, &servers, round)));
}

/// Something that is done to a daemon under load; nothing is lost.
fn during_load(daemon: &Daemon, events: impl FnOnce()) {
    during(Load::begin(), daemon, events);
}

fn during(load: Load, daemon: &Daemon, events: impl FnOnce()) {
    events();
    let questions = load.tally.questions.load(Relaxed);
    eventually("the load goes on", || load.tally.questions.load(Relaxed) > questions + 20);
    let tally = load.end();
    println!("{tally:?}");
    let listeners = daemon.status().listeners;
    assert_eq!(tally.losses(), 0, "{tally:?}\n{listeners:#?}\n{}", daemon.log());
    // None of them had to be left behind, either.
    for trouble in ["a hand-over stopped", "a hand-over was", "left to drain", "come, "] {
        assert!(!daemon.log().contains(trouble), "{}", daemon.log());
    }
    assert!(daemon.status().workers.iter().all(|worker| worker.restarts == 0), "{}", daemon.log());
    for listener in daemon.status().listeners {
        assert!(listener.dropped.is_empty(), "{:?}", listener.dropped);
        let lost: Vec<&String> = listener.ended.keys().filter(|reason| *reason != "finished").collect();
        assert!(lost.is_empty(), "{listener:?}");
    }
}

fn reloads_lose_nothing() {
    under_load(3, |daemon, servers, round| {
        // Another value that workers act upon.
        daemon.rewrite(
            &servers
                .config(3, "")
                .replace("mode = \"tcp\"\n", &format!("mode = \"tcp\"\nbacklog = {}\n", 1000 + round)),
        );
        succeed(daemon, &["reload"]);
    });
}

fn reloads_of_the_upstream_alone_lose_nothing() {
    under_load(3, |daemon, servers, round| {
        let balance = ["round-robin", "least-connections"][round % 2];
        let text = servers
            .config(3, "")
            .replace("[[upstream.server]]", &format!("balance = \"{balance}\"\n[[upstream.server]]"));
        daemon.rewrite(&text);
        succeed(daemon, &["reload"]);
    });
}

fn scaling_up_and_down_loses_nothing() {
    // Twenty times up and twenty times down.
    under_load(1, |daemon, _, round| {
        succeed(daemon, &["scale", ["4", "3", "6"][round % 3]]);
        succeed(daemon, &["scale", ["1", "2"][round % 2]]);
    });
}

fn rebalancing_loses_nothing() {
    under_load(4, |daemon, _, _| succeed(daemon, &["rebalance"]));
}

/// Each time to another file, so that every process is of another program.
fn upgrades_lose_nothing() {
    let servers = Servers::start();
    let it = Upgradable::ready(&servers.config(3, ""));
    let pid = it.daemon.pid();
    during_load(&it.daemon, || {
        for round in 1..=rounds() {
            it.install_version(round);
            assert_eq!(it.upgrade().trim(), format!("generation {} serves", round + 1));
            // With the steward.
            it.runs_the_file_alone(4);
        }
    });
    assert_eq!(it.daemon.status().pid, pid, "the same process");
}

/// Between any two words of the supervisor its workers have time for everything
/// that they can do: a flow that has arrived where its listening socket has
/// not would lose what its server sends.
fn a_supervisor_slow_to_speak_loses_nothing() {
    let servers = Servers::start();
    let slow = ["strace", "-D", "-qq", "-o", "/dev/null", "-e", "inject=sendmsg:delay_enter=20000"];
    let mut daemon = Daemon::start_under(&servers.config(2, ""), &slow, |_| {});
    daemon.wait_ready();
    during(Load::of_questions(), &daemon, || (0..3).for_each(|_| succeed(&daemon, &["reload"])));
    during_load(&daemon, || {
        for arguments in [&["reload"][..], &["scale", "4"], &["scale", "1"], &["scale", "2"], &["rebalance"]]
        {
            succeed(&daemon, arguments);
        }
    });
}

/// Eight times: after that it is started anew only every half minute.
fn killed_stewards_lose_nothing() {
    times_under_load(8, 2, |daemon, _, _| {
        let workers: Vec<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
        let steward = *daemon.children().iter().find(|pid| !workers.contains(pid)).expect("a steward");
        signal(steward, Signal::SIGKILL);
        within(Duration::from_secs(60), "another steward answers", || {
            daemon.children().iter().all(|pid| *pid != steward) && daemon.ask("status").is_ok()
        });
    });
}

/// Long sessions that exchange something now and then; how many were lost.
fn broken(sessions: &mut Vec<TcpStream>) -> u64 {
    let before = sessions.len();
    sessions.retain_mut(|session| {
        exchange(session, &pattern(9, 300)).is_ok_and(|answer| answer == pattern(9, 300))
    });
    (before - sessions.len()) as u64
}

/// What status says was lost is what clients lost, exactly: what the worker
/// held, or nothing where it had a keeper.
fn crashes(count: usize, crash_proof: bool, environment: &std::path::Path, crash: impl Fn(&Daemon, usize)) {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let text = format!(
        "[daemon]\nworkers = 3\ncrash_proof = {crash_proof}\nhang_timeout = \"500ms\"\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\n\
         upstream = \"back\"\n[[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n"
    );
    let mut daemon = Daemon::start_with(&text, |command| {
        command.env("EVENKEEL_TEST_HANG", environment);
    });
    daemon.wait_ready();
    let mut sessions = Vec::new();
    let mut lost = 0;
    for round in 0..count {
        while sessions.len() < 60 {
            let mut session = connect(local(8080));
            exchange(&mut session, b"begin").expect("a new session");
            sessions.push(session);
        }
        let held = daemon.listener("front").active_per_slot[round % 3];
        let restarts = daemon.worker(round % 3).restarts;
        crash(&daemon, round % 3);
        within(Duration::from_secs(60), "it is replaced", || {
            let worker = daemon.worker(round % 3);
            worker.restarts > restarts && worker.state == "ready"
        });
        let now = broken(&mut sessions);
        let due = if crash_proof { 0 } else { held };
        assert_eq!(now, due, "round {round}: {:?}", daemon.listener("front"));
        lost += now;
        assert_eq!(daemon.listener("front").ended.get("worker_lost").copied().unwrap_or(0), lost);
    }
    assert!(crash_proof || lost > 0);
    let listener = daemon.listener("front");
    assert_eq!(listener.connections, listener.active + listener.ended.values().sum::<u64>());
    println!("{lost} sessions lost in {count} crashes, each counted");
}

fn killed(crash_proof: bool) {
    crashes(rounds(), crash_proof, std::path::Path::new("/nonexistent"), |daemon, slot| {
        daemon.kill_worker(slot);
    });
}

fn hung(crash_proof: bool) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hang");
    let count = 5 * support::soak();
    crashes(count, crash_proof, &file, |daemon, slot| {
        std::fs::write(&file, slot.to_string()).unwrap();
        // One that sleeps reads no orders: a question wakes everybody.
        let _ = daemon.ask("sessions");
    });
}

fn a_killed_worker_without_a_keeper_loses_what_it_held_and_no_more() {
    killed(false);
}

fn a_hanging_worker_without_a_keeper_loses_what_it_held_and_no_more() {
    hung(false);
}

fn killed_workers_lose_nothing() {
    killed(true);
}

fn hanging_workers_lose_nothing() {
    hung(true);
}

fn pgbench_and_a_hundred_sessions_see_no_change() {
    let programs = postgres::programs().expect("the test needs it");
    let database = postgres::Postgres::start(9001, programs);
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let text = |workers: usize| {
        let mut text = format!("[daemon]\nworkers = {workers}\n");
        for (name, port, server) in [("db", 8432, database.address), ("echo", 8080, server)] {
            text += &format!(
                "[[listener]]\nname = \"{name}\"\nmode = \"tcp\"\nbind = \"127.0.0.1:{port}\"\nupstream = \"{name}\"\n\
                 [[upstream]]\nname = \"{name}\"\n[[upstream.server]]\naddress = \"{server}\"\n"
            );
        }
        text
    };
    let it = Upgradable::ready(&text(4));
    let daemon = &it.daemon;
    let mut sessions: Vec<TcpStream> = (0..100).map(|_| connect(local(8080))).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let bench = scope.spawn(|| bench_until(&stop));
        let ending = Stop(&stop);
        change_and_exchange(&it, &mut sessions);
        drop(ending);
        bench.join().expect("pgbench meets no error");
    });
    assert!(
        daemon.listener("db").ended.keys().all(|reason| reason == "finished"),
        "{:?}",
        daemon.listener("db").ended
    );
}

/// Stops what goes on beside a test at its end, however it ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// One run after another, so that every change meets one.
fn bench_until(stop: &AtomicBool) {
    while !stop.load(Relaxed) {
        // -C: a connection for each transaction.
        let arguments = ["-S", "-n", "-C", "-c", "4", "-T", "4"];
        let done = postgres::pgbench(local(8432), &arguments).output().expect("pgbench runs");
        let text =
            String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && !text.contains("abort") && !text.contains("error"), "{text}");
        println!("{text}");
    }
}

/// Every planned change, and after each an exchange on every session.
fn change_and_exchange(it: &Upgradable, sessions: &mut [TcpStream]) {
    let daemon = &it.daemon;
    let changes = [&["scale", "1"][..], &["scale", "6"], &["upgrade"]];
    let steps: Vec<&[&str]> =
        std::iter::repeat_n(&["reload"][..], 10 * support::soak()).chain(changes).collect();
    it.install_version(1);
    for (step, arguments) in steps.iter().enumerate() {
        succeed(daemon, arguments);
        for (number, session) in sessions.iter_mut().enumerate() {
            let bytes = pattern(step * 1000 + number, 1000);
            session.write_all(&bytes).unwrap();
            let mut answer = vec![0; bytes.len()];
            session
                .read_exact(&mut answer)
                .unwrap_or_else(|e| panic!("{arguments:?}: {e}\n{}", daemon.log()));
            assert!(answer == bytes);
        }
    }
    it.runs_the_file_alone(7);
}
