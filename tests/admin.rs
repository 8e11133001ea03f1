//! The admin address: what it answers, that it moves and stays, and that
//! nobody who reaches it can slow traffic or fill memory.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::daemon::{Daemon, program, signal};
use support::http::{self, get, get_with};
use support::servers::{connect, exchange, local};
use support::{eventually, within};

fn main() {
    support::run(tests![
        every_path_answers_what_it_is_for,
        nothing_but_get_and_head_and_the_known_paths_is_served,
        a_foreign_host_name_is_refused_on_loopback,
        a_taken_admin_port_is_explained_and_ends_the_start_with_69,
        a_reload_moves_the_admin_address_and_takes_it_away,
        a_reload_to_a_taken_admin_port_is_refused_and_changes_nothing,
        a_killed_steward_refuses_nobody,
        health_says_that_the_daemon_leaves,
        health_says_that_a_slot_is_empty,
        rubbish_huge_and_slow_requests_harm_nobody,
        those_who_sit_and_wait_keep_nobody_out,
        the_document_of_the_control_socket_names_every_command,
        only_the_daemons_user_and_group_reach_the_control_socket needs ["root"],
    ])
}

const ADMIN: u16 = 9180;
const FRONT: &str =
    "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"echo\"\n";

fn config(admin: &str) -> String {
    format!("[daemon]\nworkers = 2\n{admin}{FRONT}")
}

fn daemon() -> Daemon {
    let daemon = Daemon::ready(&config("admin = \"127.0.0.1:9180\"\n"));
    // READY=1 speaks of the workers; the steward is a moment later.
    serves(ADMIN);
    daemon
}

#[track_caller]
fn serves(port: u16) {
    eventually("the admin address answers", || {
        http::send(local(port), "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .is_ok_and(|answer| answer.status == 200)
    });
}

fn every_path_answers_what_it_is_for() {
    let daemon = daemon();
    let page = get(local(ADMIN), "/");
    assert_eq!((page.status, page.field("content-type")), (200, "text/html; charset=utf-8"));
    assert!(page.body.starts_with("<!DOCTYPE html>") && page.body.trim_end().ends_with("</html>"));
    let policy = page.field("content-security-policy");
    assert!(policy.starts_with("default-src 'none'; style-src 'nonce-"), "{policy}");
    let status = get(local(ADMIN), "/status.json");
    assert_eq!((status.status, status.field("content-type")), (200, "application/json"));
    assert_eq!(status.json()["listeners"][0]["name"], "front");
    assert_eq!(status.json()["pid"], daemon.pid());
    let health = get(local(ADMIN), "/healthz");
    assert_eq!((health.status, health.body.as_str()), (200, "ok\n"));
    let metrics = get(local(ADMIN), "/metrics");
    assert!(metrics.body.contains("evenkeel_build_info{version=\"") && metrics.body.ends_with("# EOF\n"));
    assert_eq!(metrics.field("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    let open = get_with(local(ADMIN), "/metrics", "Accept: application/openmetrics-text;version=1.0.0\r\n");
    assert_eq!(open.field("content-type"), "application/openmetrics-text; version=1.0.0; charset=utf-8");
    for answer in [page, status, health, metrics, open] {
        assert_eq!(answer.field("x-content-type-options"), "nosniff");
        assert_eq!(answer.field("cache-control"), "no-store");
        assert_eq!(answer.field("access-control-allow-origin"), "");
        assert!(answer.field("content-security-policy").starts_with("default-src 'none'"));
    }
}

fn nothing_but_get_and_head_and_the_known_paths_is_served() {
    let _daemon = daemon();
    let status = |request: &str| http::send(local(ADMIN), request).expect("an answer");
    for path in ["/nothing", "/status.json/", "//", "/../etc/passwd", "/%2e%2e/"] {
        assert_eq!(get(local(ADMIN), path).status, 404, "{path}");
    }
    assert_eq!(get(local(ADMIN), "/healthz?probe=1").status, 200);
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"] {
        let request = format!(
            "{method} / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
        );
        let answer = status(&request);
        assert_eq!((answer.status, answer.field("allow")), (405, "GET, HEAD"), "{method}");
    }
    for path in ["/", "/metrics", "/status.json", "/healthz"] {
        let answer = status(&format!("HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
        assert_eq!((answer.status, answer.body.as_str()), (200, ""), "{path}");
        assert!(answer.field("content-length").parse::<usize>().is_ok_and(|length| length > 0), "{answer:?}");
    }
    // One connection serves several requests.
    let mut stream = connect(local(ADMIN));
    for _ in 0..3 {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"ok\n") {
            stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
    }
}

fn a_foreign_host_name_is_refused_on_loopback() {
    let _daemon = daemon();
    let ask = |host: &str| {
        let request = format!("GET /status.json HTTP/1.1\r\n{host}Connection: close\r\n\r\n");
        http::send(local(ADMIN), &request).expect("an answer").status
    };
    assert_eq!(ask("Host: rebound.example:9180\r\n"), 421);
    assert_eq!(ask("Host: localhost:9180\r\n"), 200);
    assert_eq!(ask("Host: [::1]\r\n"), 200);
}

fn a_taken_admin_port_is_explained_and_ends_the_start_with_69() {
    let _holder = TcpListener::bind(local(ADMIN)).unwrap();
    let mut daemon = Daemon::start(&config("admin = \"127.0.0.1:9180\"\n"));
    let status = daemon.wait(Duration::from_secs(20));
    assert_eq!(status.code(), Some(69), "{}", daemon.log());
    let log = daemon.log();
    assert!(log.contains("admin: 127.0.0.1:9180/tcp is held by pid"), "{log}");
}

/// Brings another `[daemon]` line into force; what `reload` said.
fn reload(daemon: &Daemon, line: &str) -> Result<serde_json::Value, String> {
    let path = daemon.folder().join("evenkeel.toml");
    let old = fs::read_to_string(&path).unwrap();
    let kept: String = old.lines().filter(|l| !l.starts_with("admin")).map(|l| format!("{l}\n")).collect();
    fs::write(&path, kept.replace("workers = 2\n", &format!("workers = 2\n{line}"))).unwrap();
    let request = serde_json::json!({"command": "reload"});
    evenkeel::control::client::ask(&daemon.socket(), &request, Duration::from_secs(60))
}

fn a_reload_moves_the_admin_address_and_takes_it_away() {
    let daemon = daemon();
    reload(&daemon, "admin = \"127.0.0.1:9181\"\n").expect("a reload");
    serves(9181);
    eventually("the old address is closed", || TcpStream::connect(local(ADMIN)).is_err());
    // To a wider address on the same port, which overlaps with the present one.
    reload(&daemon, "admin = \"0.0.0.0:9181\"\n").expect("a reload");
    serves(9181);
    reload(&daemon, "").expect("a reload");
    eventually("no address is left", || TcpStream::connect(local(9181)).is_err());
    reload(&daemon, "admin = \"127.0.0.1:9180\"\n").expect("a reload");
    serves(ADMIN);
    assert_eq!(get(local(ADMIN), "/status.json").json()["generation"], 5);
}

fn a_reload_to_a_taken_admin_port_is_refused_and_changes_nothing() {
    let daemon = daemon();
    let _holder = TcpListener::bind(local(9181)).unwrap();
    let error = reload(&daemon, "admin = \"127.0.0.1:9181\"\n").expect_err("the port is taken");
    assert!(error.contains("admin: 127.0.0.1:9181/tcp is held by pid"), "{error}");
    let status = get(local(ADMIN), "/status.json").json();
    assert_eq!((&status["generation"], &status["reload"]["success"]), (&1.into(), &false.into()));
    assert!(status["reload"]["text"].as_str().unwrap().contains("admin: 127.0.0.1:9181"));
}

/// The steward's process.
fn steward(daemon: &Daemon) -> u32 {
    let named =
        |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "ek-steward\n");
    daemon.children().into_iter().find(named).expect("a steward")
}

fn a_killed_steward_refuses_nobody() {
    let daemon = daemon();
    for _ in 0..3 {
        let old = steward(&daemon);
        signal(old, Signal::SIGKILL);
        // At once, while none is there: it waits in the queue that the
        // supervisor keeps. A connection of before is lost, a new one is not.
        let answer = get(local(ADMIN), "/healthz");
        assert_eq!(answer.status, 200, "{answer:?}");
        eventually("another steward", || {
            daemon.children().iter().any(|&pid| {
                pid != old
                    && fs::read_to_string(format!("/proc/{pid}/comm"))
                        .is_ok_and(|name| name == "ek-steward\n")
            })
        });
    }
}

fn health_says_that_the_daemon_leaves() {
    let mut daemon = daemon();
    let mut client = connect(local(8080));
    exchange(&mut client, b"x").unwrap();
    daemon.signal(Signal::SIGTERM);
    let mut answer = http::Answer::default();
    eventually("health speaks of the leave", || {
        answer = get(local(ADMIN), "/healthz");
        answer.status == 503
    });
    assert_eq!(answer.body, "draining: the daemon is leaving\n");
    drop(client);
    assert!(daemon.wait(Duration::from_secs(20)).success());
}

fn health_says_that_a_slot_is_empty() {
    let daemon = daemon();
    // Death after death, until the slot stays empty for a while.
    let mut answer = http::Answer::default();
    within(Duration::from_secs(30), "health speaks of the slot", || {
        let worker = daemon.status().workers[1].clone();
        if worker.pid != 0 && worker.state == "ready" {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker.pid as i32), Signal::SIGKILL);
        }
        answer = get(local(ADMIN), "/healthz");
        answer.status == 503
    });
    assert!(answer.body.starts_with("slot 1 does not serve: "), "{answer:?}");
    within(Duration::from_secs(40), "health again", || get(local(ADMIN), "/healthz").status == 200);
}

/// Resident memory of a process in KiB.
fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a living process");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("its memory");
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number")
}

fn rubbish_huge_and_slow_requests_harm_nobody() {
    let daemon = daemon();
    let pid = steward(&daemon);
    for path in ["/", "/metrics", "/status.json"] {
        get(local(ADMIN), path);
    }
    let before = memory(pid);
    let over = Arc::new(AtomicBool::new(false));
    let huge_field = format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "a".repeat(1 << 20));
    let many_fields = format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "A: b\r\n".repeat(5_000));
    let huge_path = format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "b".repeat(1 << 20));
    let huge_body = format!(
        "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{}",
        "c".repeat(1 << 20)
    );
    let smuggled =
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\nzzz"
            .to_string();
    let pipelined = "GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(200);
    let rubbish = "\u{0}\u{1}\u{16}\u{3}\u{1}rubbish\r\n\r\n".repeat(100);
    let kinds = Arc::new([huge_field, many_fields, huge_path, huge_body, smuggled, pipelined, rubbish]);
    let bad = (0..4).map(|thread| {
        let kinds = Arc::clone(&kinds);
        std::thread::spawn(move || {
            for turn in 0..750 {
                let Ok(mut stream) = TcpStream::connect(local(ADMIN)) else { continue };
                let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
                let _ = stream.write_all(kinds[(turn + thread) % kinds.len()].as_bytes());
            }
        })
    });
    let bad: Vec<_> = bad.collect();
    // Meanwhile others never finish their request.
    let mut slow = Vec::new();
    for _ in 0..200 {
        let mut stream = connect(local(ADMIN));
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: loc").unwrap();
        slow.push(stream);
    }
    let watched = Arc::clone(&over);
    let peak = std::thread::spawn(move || {
        let mut peak = 0;
        while !watched.load(Ordering::SeqCst) {
            peak = peak.max(memory(pid));
            std::thread::park_timeout(Duration::from_millis(10));
        }
        peak
    });
    // Traffic goes on as if nothing were.
    let mut slowest = Duration::ZERO;
    let mut exchanged = 0;
    while bad.iter().any(|thread| !thread.is_finished()) {
        let begin = Instant::now();
        let mut client = connect(local(8080));
        assert_eq!(exchange(&mut client, b"hello").unwrap(), b"hello");
        slowest = slowest.max(begin.elapsed());
        exchanged += 1;
    }
    bad.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(get(local(ADMIN), "/healthz").status, 200);
    over.store(true, Ordering::SeqCst);
    let peak = peak.join().unwrap();
    println!(
        "3,000 bad requests: memory {before} KiB, peak {peak} KiB; {exchanged} exchanges, slowest {slowest:?}"
    );
    assert_eq!(steward(&daemon), pid, "the same steward");
    assert!(peak < before + 24 * 1024, "{before} KiB grew to {peak} KiB");
    // Generous: a machine that runs other tests beside this one.
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    assert_eq!(daemon.status().workers.iter().map(|worker| worker.restarts).sum::<u64>(), 0);
}

fn those_who_sit_and_wait_keep_nobody_out() {
    let _daemon = daemon();
    let address: SocketAddr = local(ADMIN);
    let idle: Vec<TcpStream> = (0..300).map(|_| connect(address)).collect();
    let begin = Instant::now();
    for _ in 0..20 {
        assert_eq!(get(address, "/metrics").status, 200);
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    // Most of them were closed to make room.
    let closed = |mut stream: &TcpStream| {
        stream.set_nonblocking(true).unwrap();
        matches!(stream.read(&mut [0; 8]), Ok(0))
    };
    // Before a head's limit, which would close them too.
    within(Duration::from_secs(4), "the oldest are closed", || {
        idle.iter().filter(|stream| closed(stream)).count() >= 200
    });
}

fn the_document_of_the_control_socket_names_every_command() {
    let daemon = daemon();
    let document = fs::read_to_string("docs/CONTROL.md").expect("part of the repository");
    let error = daemon.ask("nothing").expect_err("no such command");
    let (_, known) = error.split_once("known are ").expect("the known ones");
    for command in known.split(", ") {
        assert!(
            document.contains(&format!("{{\"command\":\"{command}\"")),
            "{command} is not in docs/CONTROL.md"
        );
    }
}

fn only_the_daemons_user_and_group_reach_the_control_socket() {
    let daemon = daemon();
    let ask = |uid: u32, gid: u32| {
        // The program may lie where another user cannot go: a copy does not.
        let copy = daemon.folder().join("evenkeel");
        if !copy.exists() {
            fs::copy(program(), &copy).unwrap();
        }
        let mut command = Command::new(copy);
        command.args(["status", "--socket"]).arg(daemon.socket()).uid(uid).gid(gid);
        command.output().expect("the program runs")
    };
    let mode = fs::metadata(daemon.socket()).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o660);
    let refused = ask(65_534, 65_534);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(77), "{said}");
    assert!(said.contains("only the daemon's user and group may ask it"), "{said}");
    let own_group = ask(65_534, 0);
    assert!(own_group.status.success(), "{own_group:?}");
}
