//! Another configuration or another number of workers: nothing is lost.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::daemon::{Daemon, signal};
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::{clients, eventually, pattern, within};

fn main() {
    support::run(tests![
        reloads_under_load_lose_nothing,
        scaling_up_and_down_under_load_loses_nothing,
        sessions_of_every_kind_are_handed_over,
        a_wrong_file_changes_nothing_and_is_told,
        an_address_that_is_taken_is_found_before_any_worker_is_touched,
        a_removed_listener_keeps_its_sessions_and_serves_its_queue,
        a_new_listener_serves_when_the_reload_returns,
        a_dry_run_says_what_would_change_and_touches_nothing,
        sighup_reloads,
        counters_go_on_over_reloads,
        many_reloads_leave_nothing_behind,
        rebalance_makes_the_workers_even,
        scale_stands_over_reloads_until_the_file_changes,
        a_worker_killed_during_a_reload_is_replaced,
        what_needs_a_restart_is_refused,
    ])
}

fn config(workers: usize, server: &str, more: &str) -> String {
    format!(
        "[daemon]\nworkers = {workers}\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\n\
         upstream = \"back\"\n[[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n{more}"
    )
}

/// A command that succeeds, and after which all sessions were handed over.
#[track_caller]
fn succeed(daemon: &Daemon, arguments: &[&str]) -> String {
    let text = daemon.succeed(arguments);
    daemon.assert_all_handed_over();
    text
}

/// Short connections and long sessions with checked payloads, all of which
/// must be served without one error while something is done to the daemon.
fn under_load(daemon: &Daemon, disturb: impl FnOnce()) {
    clients::under_load(None, disturb);
    assert!(daemon.status().workers.iter().all(|worker| worker.restarts == 0), "{}", daemon.log());
}

fn reloads_under_load_lose_nothing() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(3, &server.to_string(), ""));
    under_load(&daemon, || {
        for round in 1..=10 {
            assert_eq!(succeed(&daemon, &["reload"]).trim(), format!("generation {} serves", round + 1));
        }
    });
    assert_eq!(daemon.status().generation, 11);
    assert!(daemon.status().workers.iter().all(|worker| worker.generation == 11));
}

fn scaling_up_and_down_under_load_loses_nothing() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(4, &server.to_string(), ""));
    under_load(&daemon, || {
        for count in ["1", "6", "2", "4"] {
            succeed(&daemon, &["scale", count]);
            assert_eq!(daemon.status().workers.len().to_string(), count);
        }
    });
}

fn sessions_of_every_kind_are_handed_over() {
    let (server, _) = tcp_server("127.0.0.1:0", |mut stream| {
        // Everything in, then as much out: half-closed for long.
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        stream.write_all(&all)
    });
    let daemon = Daemon::ready(&config(2, &server.to_string(), ""));
    let mut idle: Vec<TcpStream> = (0..300).map(|_| connect(local(8080))).collect();
    // Stuck: the client reads nothing of what comes back.
    let mut stuck = connect(local(8080));
    stuck.write_all(&pattern(0, 40_000_000)).unwrap();
    stuck.shutdown(Shutdown::Write).unwrap();
    eventually("all are sessions", || daemon.listener("front").active == 301);
    for _ in 0..3 {
        succeed(&daemon, &["reload"]);
        assert_eq!(daemon.listener("front").active, 301, "{:?}", daemon.listener("front").ended);
    }
    let mut back = Vec::new();
    stuck.read_to_end(&mut back).unwrap();
    assert!(back == pattern(0, 40_000_000), "{} bytes", back.len());
    for client in &mut idle {
        client.write_all(b"still").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).expect("an idle session goes on");
        assert_eq!(back, b"still");
    }
    eventually("all have ended", || daemon.listener("front").active == 0);
    assert_eq!(daemon.listener("front").ended.get("finished"), Some(&301));
}

fn a_wrong_file_changes_nothing_and_is_told() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(2, &server.to_string(), ""));
    let pids: Vec<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
    daemon.rewrite(&config(2, &server.to_string(), "").replace("mode = ", "mdoe = "));
    let (code, text) = daemon.run(&["reload"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("evenkeel.toml:") && text.contains("did you mean"), "{text}");
    let status = daemon.status();
    assert_eq!((status.generation, status.workers.iter().map(|w| w.pid).collect::<Vec<_>>()), (1, pids));
    exchange(&mut connect(local(8080)), b"x").unwrap();
}

fn an_address_that_is_taken_is_found_before_any_worker_is_touched() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(2, &server.to_string(), ""));
    let pids: Vec<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
    let taken = std::net::TcpListener::bind("127.0.0.1:8099").unwrap();
    let more =
        "[[listener]]\nname = \"new\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8099\"\nservice = \"echo\"\n";
    daemon.rewrite(&config(2, &server.to_string(), more));
    let (code, text) = daemon.run(&["reload"]);
    assert_eq!(code, Some(1));
    assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
    // And where the probe finds nothing, but a new worker's bind fails.
    daemon.rewrite(&config(2, &server.to_string(), &more.replace("127.0.0.1:8099", "192.0.2.7:80")));
    let (code, text) = daemon.run(&["reload"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("192.0.2.7"), "{text}");
    let status = daemon.status();
    assert_eq!((status.generation, status.workers.iter().map(|w| w.pid).collect::<Vec<_>>()), (1, pids));
    drop(taken);
    daemon.rewrite(&config(2, &server.to_string(), more));
    succeed(&daemon, &["reload"]);
    exchange(&mut connect(local(8099)), b"x").unwrap();
}

fn a_removed_listener_keeps_its_sessions_and_serves_its_queue() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let extra =
        "[[listener]]\nname = \"old\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8090\"\nupstream = \"back\"\n";
    let daemon = Daemon::ready(&config(2, &server.to_string(), extra));
    let mut sessions: Vec<TcpStream> = (0..20).map(|_| connect(local(8090))).collect();
    for session in &mut sessions {
        exchange(session, b"before").unwrap();
    }
    daemon.rewrite(&config(2, &server.to_string(), ""));
    // Some wait in the queues of workers that do not run while it begins.
    let pids: Vec<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
    pids.iter().for_each(|&pid| signal(pid, Signal::SIGSTOP));
    let mut waiting: Vec<TcpStream> = (0..20).map(|_| connect(local(8090))).collect();
    waiting.iter_mut().for_each(|client| client.write_all(b"waited").unwrap());
    daemon.signal(Signal::SIGHUP);
    eventually("it is proved", || daemon.log().contains("generation 2 is being proved"));
    pids.iter().for_each(|&pid| signal(pid, Signal::SIGCONT));
    eventually("it serves", || daemon.log().contains("generation 2 serves"));
    for client in &mut waiting {
        let mut answer = [0; 6];
        client.read_exact(&mut answer).expect("who waited is served");
    }
    for session in &mut sessions {
        exchange(session, b"after").expect("a session of a removed listener goes on");
    }
    let error = TcpStream::connect(local(8090)).expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!((daemon.listener("old").active, daemon.listener("old").bind.len()), (40, 0));
    drop((sessions, waiting));
    eventually("the last has ended", || daemon.listener("old").active == 0);
    succeed(&daemon, &["reload"]);
    assert!(!daemon.status().listeners.iter().any(|listener| listener.name == "old"));
}

fn a_new_listener_serves_when_the_reload_returns() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(3, &server.to_string(), ""));
    for port in 8100..8105 {
        let more = format!(
            "[[listener]]\nname = \"new\"\nmode = \"tcp\"\nbind = \"127.0.0.1:{port}\"\nservice = \"echo\"\n"
        );
        daemon.rewrite(&config(3, &server.to_string(), &more));
        succeed(&daemon, &["reload"]);
        for _ in 0..20 {
            exchange(&mut connect(local(port)), b"at once").unwrap();
        }
    }
}

fn a_dry_run_says_what_would_change_and_touches_nothing() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(2, &server.to_string(), ""));
    assert!(succeed(&daemon, &["reload", "--dry-run"]).contains("nothing changes"));
    let more =
        "[[listener]]\nname = \"new\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8099\"\nservice = \"echo\"\n";
    daemon.rewrite(&config(3, &server.to_string(), more));
    let text = succeed(&daemon, &["reload", "--dry-run"]);
    assert!(text.contains("listener new is new") && text.contains("[daemon] changes"), "{text}");
    assert!(text.contains("cost: 3 workers are replaced"), "{text}");
    assert_eq!(daemon.status().generation, 1);
}

fn sighup_reloads() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(2, &server.to_string(), ""));
    daemon.signal(Signal::SIGHUP);
    eventually("generation 2", || daemon.status().generation == 2);
    eventually("it is over", || daemon.log().contains("generation 2 serves"));
    let told = daemon.notified().join("\n");
    assert!(told.contains("RELOADING=1") && told.contains("MONOTONIC_USEC="), "{told}");
    assert!(told.rfind("READY=1") > told.find("RELOADING=1"), "{told}");
    daemon.rewrite("rubbish");
    daemon.signal(Signal::SIGHUP);
    eventually("it is refused", || daemon.log().contains("not reloaded"));
    assert_eq!(daemon.status().generation, 2);
}

fn counters_go_on_over_reloads() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(4, &server.to_string(), ""));
    let mut sessions: Vec<TcpStream> = (0..40).map(|_| connect(local(8080))).collect();
    for session in &mut sessions {
        exchange(session, &[1; 100]).unwrap();
    }
    let mut last = 0;
    for arguments in [&["reload"][..], &["scale", "2"], &["reload"], &["scale", "5"], &["reload"]] {
        succeed(&daemon, arguments);
        exchange(&mut connect(local(8080)), &[1; 100]).unwrap();
        let listener = daemon.listener("front");
        assert!(listener.connections > last, "{} after {last}", listener.connections);
        last = listener.connections;
    }
    eventually("the short ones have ended", || daemon.listener("front").active == 40);
    let listener = daemon.listener("front");
    assert_eq!((listener.connections, listener.bytes_in, listener.bytes_out), (45, 4500, 4500));
    assert_eq!(listener.spread.per_slot.iter().sum::<u64>(), 45);
    let servers = &daemon.status().upstreams[0].servers;
    assert_eq!((servers[0].connections, servers[0].active), (45, 40));
    drop(sessions);
    eventually("all have ended", || daemon.listener("front").ended.get("finished") == Some(&45));
}

/// Descriptors of the supervisor, and the number of processes.
fn weight(daemon: &Daemon) -> (usize, usize) {
    let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    (fds, daemon.children().len())
}

/// Anonymous memory of the supervisor, in KiB.
fn memory(daemon: &Daemon) -> usize {
    let text = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = text.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Two hundred; with `EVENKEEL_SOAK=5`, a thousand.
fn many_reloads_leave_nothing_behind() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(2, &server.to_string(), ""));
    let mut session = connect(local(8080));
    exchange(&mut session, b"x").unwrap();
    for _ in 0..3 {
        succeed(&daemon, &["reload"]);
    }
    let settled = || {
        eventually("old processes are gone", || daemon.children().len() == 3);
        weight(&daemon)
    };
    // What the allocator keeps for itself is there after some more.
    for _ in 0..20 {
        succeed(&daemon, &["reload"]);
    }
    let (before, memory_before) = (settled(), memory(&daemon));
    let count = 200 * support::soak();
    for _ in 0..count {
        succeed(&daemon, &["reload"]);
    }
    // Who saw the last child go has not let go of what it held yet.
    eventually("nothing is left behind", || settled() <= before);
    let more = memory(&daemon).saturating_sub(memory_before);
    assert!(more < 512, "{more} KiB more after {count} reloads");
    println!("{count} reloads: {before:?} descriptors and processes as before, {more} KiB more");
    exchange(&mut session, b"x").expect("it was handed over each time");
}

fn rebalance_makes_the_workers_even() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(1, &server.to_string(), ""));
    let mut sessions: Vec<TcpStream> = (0..200).map(|_| connect(local(8080))).collect();
    for session in &mut sessions {
        exchange(session, b"x").unwrap();
    }
    succeed(&daemon, &["scale", "4"]);
    assert_eq!(daemon.listener("front").active_per_slot, [200, 0, 0, 0]);
    assert_eq!(succeed(&daemon, &["rebalance"]).trim(), "150 sessions moved");
    assert_eq!(daemon.listener("front").active_per_slot, [50; 4]);
    for session in &mut sessions {
        exchange(session, b"y").expect("a session that moved goes on");
    }
}

fn scale_stands_over_reloads_until_the_file_changes() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(2, &server.to_string(), ""));
    succeed(&daemon, &["scale", "3"]);
    succeed(&daemon, &["reload"]);
    assert_eq!(daemon.status().workers.len(), 3);
    daemon.rewrite(&config(1, &server.to_string(), ""));
    succeed(&daemon, &["reload"]);
    assert_eq!(daemon.status().workers.len(), 1);
}

fn a_worker_killed_during_a_reload_is_replaced() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(3, &server.to_string(), ""));
    for round in 0..10 {
        let pid = daemon.worker(round % 3).pid;
        daemon.signal(Signal::SIGHUP);
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), Signal::SIGKILL);
        within(Duration::from_secs(30), "all serve", || {
            let status = daemon.status();
            status.workers.len() == 3 && status.workers.iter().all(|worker| worker.state == "ready")
        });
        for _ in 0..20 {
            exchange(&mut connect(local(8080)), b"x").expect("nobody is refused");
        }
    }
    eventually("no change is under way", || daemon.run(&["reload"]).0 == Some(0));
    eventually("old processes are gone", || daemon.children().len() == 4);
}

fn what_needs_a_restart_is_refused() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(1, &server.to_string(), ""));
    let text = config(1, &server.to_string(), "");
    daemon.rewrite(&text.replace("[daemon]\n", "[daemon]\nuser = \"nobody\"\n"));
    let (code, text) = daemon.run(&["reload"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("user cannot change while the daemon runs"), "{text}");
}
