//! Health checks with real servers: every kind of check, under traffic, with
//! servers that come and go, and with a steward that dies.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::daemon::{Daemon, children_of, runs, signal};
use support::datagrams::{self, let_pass, try_ask};
use support::health::{SEEN, Switched, ask_for, reason, server, told, wait_state, who};
use support::servers::{local, tcp_server};
use support::{eventually, within};

fn main() {
    support::run(tests![
        a_refusing_server_is_down_and_comes_back,
        a_server_that_dies_under_traffic_costs_no_client_once_it_is_seen,
        an_exchange_over_tcp_looks_for_its_bytes,
        an_exchange_over_udp_moves_flows_away,
        a_command_decides_and_its_last_line_is_the_reason,
        a_command_that_hangs_is_killed_with_its_children,
        an_nginx_status_page_is_checked needs ["nginx"],
        a_unix_server_is_checked,
        checks_go_where_traffic_goes_from_the_same_source_with_a_proxy_header,
        a_flapping_server_is_told_once,
        a_disabled_server_shows_no_check_of_before,
        without_checks_failures_of_traffic_take_a_server_down_and_it_is_tried_again,
        failures_of_traffic_count_beside_checks,
        a_new_steward_goes_on_from_the_verdicts_of_the_last,
        a_reload_keeps_verdicts_and_takes_up_new_checks,
        three_hundred_servers_are_checked_once_a_host_without_a_thread_each,
        a_steward_that_was_stopped_gives_a_fresh_round,
    ])
}

/// A daemon on 127.0.0.1:8080 in front of these servers.
fn forward(health: &str, servers: &[&str]) -> Daemon {
    Daemon::ready(&config(health, servers))
}

fn config(health: &str, servers: &[&str]) -> String {
    let mut text = format!(
        "[daemon]\nworkers = 2\n\
         [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"back\"\n\
         [[upstream]]\nname = \"back\"\nretries = 0\n[upstream.health]\n{health}\n"
    );
    for server in servers {
        text += &format!("[[upstream.server]]\naddress = \"{server}\"\n");
    }
    text
}

const FAST: &str = "interval = \"100ms\"\ntimeout = \"5s\"\nrise = 2\nfall = 2\n";

fn front() -> SocketAddr {
    local(8080)
}

fn a_refusing_server_is_down_and_comes_back() {
    let mut one = Switched::on("127.0.0.1:9001", "one");
    let _two = Switched::on("127.0.0.1:9002", "two");
    let daemon = forward(FAST, &["127.0.0.1:9001", "127.0.0.1:9002"]);
    within(SEEN, "both were checked", || {
        ["127.0.0.1:9001", "127.0.0.1:9002"]
            .iter()
            .all(|a| server(&daemon, "back", a)["check"]["last"] == "good")
    });
    one.turn_off();
    wait_state(&daemon, "back", "127.0.0.1:9001", "down");
    assert_eq!(reason(&daemon, "back", "127.0.0.1:9001"), "connect: connection refused");
    for _ in 0..20 {
        assert_eq!(who(front()).expect("served"), "two");
    }
    one.turn_on();
    wait_state(&daemon, "back", "127.0.0.1:9001", "up");
    within(SEEN, "it serves again", || who(front()).is_ok_and(|name| name == "one"));
    let check = &server(&daemon, "back", "127.0.0.1:9001")["check"];
    assert_eq!(check["kind"], "connect");
    assert!(check["latency_us"].as_u64().is_some(), "{check}");
    assert_eq!(told(&daemon, &["127.0.0.1:9001", "is down", "connection refused"]), 1, "{}", daemon.log());
    assert_eq!(told(&daemon, &["127.0.0.1:9001", "is up"]), 1);
    assert_eq!(told(&daemon, &["127.0.0.1:9002"]), 0, "nothing is said of the other");
}

fn a_server_that_dies_under_traffic_costs_no_client_once_it_is_seen() {
    let mut one = Switched::on("127.0.0.1:9001", "one");
    let _two = Switched::on("127.0.0.1:9002", "two");
    // No retries: whoever is sent to a dead server sees it.
    let daemon = forward(FAST, &["127.0.0.1:9001", "127.0.0.1:9002"]);
    for _ in 0..3 {
        let clients: Vec<_> =
            (0..3).map(|_| std::thread::spawn(|| ask_for(front(), Duration::from_millis(800)))).collect();
        one.turn_off();
        wait_state(&daemon, "back", "127.0.0.1:9001", "down");
        // What began before may fail.
        clients.into_iter().for_each(|client| drop(client.join().expect("a client")));
        let (answered, errors) = ask_for(front(), Duration::from_millis(500));
        assert!(answered > 0 && errors.is_empty(), "{answered} answered, then {errors:?}");
        let clients: Vec<_> =
            (0..3).map(|_| std::thread::spawn(|| ask_for(front(), Duration::from_millis(1500)))).collect();
        one.turn_on();
        wait_state(&daemon, "back", "127.0.0.1:9001", "up");
        for client in clients {
            let (answered, errors) = client.join().expect("a client");
            assert!(answered > 0 && errors.is_empty(), "while it came back: {errors:?}");
        }
    }
}

fn an_exchange_over_tcp_looks_for_its_bytes() {
    let good = Arc::new(AtomicBool::new(true));
    let said = Arc::clone(&good);
    let (address, _) = tcp_server("127.0.0.1:0", move |mut stream| {
        let mut question = [0; 6];
        stream.read_exact(&mut question)?;
        assert_eq!(&question, b"PING\r\n");
        // In two pieces.
        stream.write_all(b"+PO")?;
        stream.write_all(if said.load(Ordering::SeqCst) { b"NG\x01" } else { b"OR\x02" })
    });
    let health = format!("check = \"exchange\"\nsend = 'PING\\r\\n'\nexpect = '+PONG\\x01'\n{FAST}");
    let address = address.to_string();
    let daemon = forward(&health, &[&address]);
    within(SEEN, "a good check", || server(&daemon, "back", &address)["check"]["last"] == "good");
    good.store(false, Ordering::SeqCst);
    wait_state(&daemon, "back", &address, "down");
    assert_eq!(reason(&daemon, "back", &address), "\"+PONG.\" is not in the answer \"+POOR.\"");
    good.store(true, Ordering::SeqCst);
    wait_state(&daemon, "back", &address, "up");
}

fn an_exchange_over_udp_moves_flows_away() {
    let well = Arc::new(AtomicBool::new(true));
    let answering = Arc::clone(&well);
    // Silent when it is not well: no refusal tells anybody.
    let (one, _) = datagrams::udp_server("127.0.0.1:0", move |bytes| {
        answering
            .load(Ordering::SeqCst)
            .then(|| if bytes == b"well?" { b"well".to_vec() } else { b"one".to_vec() })
    });
    let (two, _) = datagrams::udp_server("127.0.0.1:0", |bytes| {
        Some(if bytes == b"well?" { b"well".to_vec() } else { b"two".to_vec() })
    });
    let daemon = Daemon::ready(&format!(
        "[daemon]\nworkers = 2\n\
         [[listener]]\nname = \"front\"\nmode = \"udp\"\nbind = \"127.0.0.1:8053\"\nupstream = \"back\"\n\
         [[upstream]]\nname = \"back\"\n\
         [upstream.health]\ncheck = \"exchange\"\nsend = \"well?\"\nexpect = \"well\"\n\
         interval = \"100ms\"\ntimeout = \"500ms\"\nrise = 2\nfall = 2\n\
         [[upstream.server]]\naddress = \"{one}\"\n[[upstream.server]]\naddress = \"{two}\"\n"
    ));
    let clients: Vec<UdpSocket> = (0..8).map(|_| datagrams::client("127.0.0.1:0")).collect();
    let ask = |client: &UdpSocket| {
        let answer = try_ask(client, local(8053), b"who");
        answer.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    };
    let before: Vec<String> = clients.iter().map(ask).collect();
    assert!(before.iter().any(|name| name == "one") && before.iter().any(|name| name == "two"), "{before:?}");
    well.store(false, Ordering::SeqCst);
    wait_state(&daemon, "back", &one.to_string(), "down");
    assert_eq!(reason(&daemon, "back", &one.to_string()), "no answer within 500ms");
    let after: Vec<String> = clients.iter().map(ask).collect();
    assert!(after.iter().all(|name| name == "two"), "{after:?}");
    well.store(true, Ordering::SeqCst);
    wait_state(&daemon, "back", &one.to_string(), "up");
}

/// A script in the test's folder.
fn script(folder: &Path, text: &str) -> String {
    let path = folder.join("check.sh");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("a script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
    path.display().to_string()
}

fn a_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    // The steward may be another user.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).expect("its mode");
    folder
}

fn a_command_decides_and_its_last_line_is_the_reason() {
    let folder = a_folder();
    let bad = folder.path().join("bad");
    let path = script(
        folder.path(),
        &format!(
            "test -e {} || exit 0\necho asked\necho \"$EVENKEEL_SERVER of $EVENKEEL_UPSTREAM: $1\"\nexit 4",
            bad.display()
        ),
    );
    let _server = Switched::on("127.0.0.1:9001", "one");
    let health = format!("check = \"command\"\ncommand = [\"{path}\", \"the lag\"]\n{FAST}");
    let daemon = forward(&health, &["127.0.0.1:9001"]);
    within(SEEN, "a good check", || server(&daemon, "back", "127.0.0.1:9001")["check"]["last"] == "good");
    fs::write(&bad, "").expect("a file");
    wait_state(&daemon, "back", "127.0.0.1:9001", "down");
    assert_eq!(reason(&daemon, "back", "127.0.0.1:9001"), "exit code 4: 127.0.0.1:9001 of back: the lag");
    fs::remove_file(&bad).expect("it is there");
    wait_state(&daemon, "back", "127.0.0.1:9001", "up");
}

fn a_command_that_hangs_is_killed_with_its_children() {
    let folder = a_folder();
    let pids = folder.path().join("pids");
    let text =
        format!("echo $$ >> {0}\nsleep 600 &\necho $! >> {0}\necho still thinking\nwait", pids.display());
    let path = script(folder.path(), &text);
    let _server = Switched::on("127.0.0.1:9001", "one");
    let health = format!(
        "check = \"command\"\ncommand = [\"{path}\"]\ninterval = \"100ms\"\ntimeout = \"400ms\"\nrise = 1\nfall = 2\n"
    );
    let daemon = forward(&health, &["127.0.0.1:9001"]);
    wait_state(&daemon, "back", "127.0.0.1:9001", "down");
    assert_eq!(reason(&daemon, "back", "127.0.0.1:9001"), "no end within 400ms, killed: still thinking");
    let known = || -> Vec<u32> {
        let text = fs::read_to_string(&pids).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    // At most the one check that runs now, with its child.
    eventually("earlier checks are gone", || {
        let pids = known();
        pids.len() > 6 && pids.iter().filter(|&&pid| runs(pid)).count() <= 2
    });
    drop(daemon);
    // The steward was killed, so nobody was left to kill them but the kernel.
    let left = known().into_iter().step_by(2);
    eventually("no check outlives its steward", || left.clone().all(|pid| !runs(pid)));
    known().into_iter().filter(|&pid| runs(pid)).for_each(|pid| signal(pid, Signal::SIGKILL));
}

struct Nginx {
    child: Child,
    folder: tempfile::TempDir,
}

impl Nginx {
    fn start(status: u16) -> Nginx {
        let folder = a_folder();
        Nginx::write(&folder, status);
        let child = Command::new("nginx")
            .arg("-p")
            .arg(folder.path())
            .args(["-c", "nginx.conf", "-e", "stderr"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx");
        Nginx { child, folder }
    }

    fn write(folder: &tempfile::TempDir, status: u16) {
        let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
        let text = format!(
            "{user} daemon off; worker_processes 1; pid {0}/pid; error_log stderr;\nevents {{}}\n\
             http {{ access_log off; client_body_temp_path {0}/t; proxy_temp_path {0}/p; fastcgi_temp_path {0}/f;\n\
             uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;\n\
             server {{ listen 127.0.0.1:9001; server_name _; location / {{ return 404; }} }}\n\
             server {{ listen 127.0.0.1:9001; server_name web.example;\n\
               location = /health {{ return {status} \"state\\n\"; }}\n\
               location / {{ return 200 \"page\\n\"; }} }} }}\n",
            folder.path().display()
        );
        fs::write(folder.path().join("nginx.conf"), text).expect("a configuration");
    }

    fn reload(&self, status: u16) {
        Nginx::write(&self.folder, status);
        signal(self.child.id(), Signal::SIGHUP);
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let children = children_of(self.child.id());
        // The master first, or it would start others.
        let _ = self.child.kill();
        let _ = self.child.wait();
        children.into_iter().filter(|&pid| runs(pid)).for_each(|pid| signal(pid, Signal::SIGKILL));
    }
}

fn an_nginx_status_page_is_checked() {
    let nginx = Nginx::start(204);
    let health = format!(
        "check = \"http\"\npath = \"/health\"\nhost = \"web.example\"\nexpect_status = [\"200-299\", \"401\"]\n{FAST}"
    );
    let daemon = forward(&health, &["127.0.0.1:9001"]);
    within(SEEN, "nginx is up", || {
        let server = server(&daemon, "back", "127.0.0.1:9001");
        server["state"] == "up" && server["check"]["last"] == "good"
    });
    nginx.reload(503);
    wait_state(&daemon, "back", "127.0.0.1:9001", "down");
    assert_eq!(reason(&daemon, "back", "127.0.0.1:9001"), "status 503, not 200-299, 401");
    let shown = daemon.command(&["status"]);
    assert!(
        String::from_utf8_lossy(&shown.stdout).contains("http: status 503, not 200-299, 401"),
        "{shown:?}"
    );
    nginx.reload(401);
    wait_state(&daemon, "back", "127.0.0.1:9001", "up");
}

fn a_unix_server_is_checked() {
    let folder = a_folder();
    let path = folder.path().join("server.sock");
    let address = format!("unix:{}", path.display());
    let daemon = forward(FAST, &[&address]);
    wait_state(&daemon, "back", &address, "down");
    assert!(
        reason(&daemon, "back", &address).starts_with("connect: no such file"),
        "{}",
        reason(&daemon, "back", &address)
    );
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("its mode");
    std::thread::spawn(move || listener.incoming().for_each(drop));
    wait_state(&daemon, "back", &address, "up");
}

fn checks_go_where_traffic_goes_from_the_same_source_with_a_proxy_header() {
    type Heard = Arc<Mutex<Vec<(SocketAddr, Vec<u8>)>>>;
    let heard = Heard::default();
    let listen = |heard: Heard| {
        tcp_server("127.0.0.1:0", move |mut stream| {
            let mut bytes = Vec::new();
            let peer = stream.peer_addr()?;
            stream.read_to_end(&mut bytes)?;
            heard.lock().expect("no thread panics with it").push((peer, bytes));
            Ok(())
        })
        .0
    };
    let one = listen(Arc::clone(&heard));
    let two = listen(Arc::clone(&heard));
    let upstream = |name: &str, proxy: &str, address: SocketAddr| {
        format!(
            "[[upstream]]\nname = \"{name}\"\nsend_proxy = \"{proxy}\"\nsource = \"127.0.0.7\"\n\
             [upstream.health]\n{FAST}[[upstream.server]]\naddress = \"{address}\"\n"
        )
    };
    let listener = |name: &str, port: u16| {
        format!(
            "[[listener]]\nname = \"{name}\"\nmode = \"tcp\"\nbind = \"127.0.0.1:{port}\"\nupstream = \"{name}\"\n"
        )
    };
    let _daemon = Daemon::ready(&format!(
        "{}{}{}{}",
        listener("v1", 8081),
        listener("v2", 8082),
        upstream("v1", "v1", one),
        upstream("v2", "v2", two)
    ));
    within(SEEN, "checks with both headers", || {
        let heard = heard.lock().expect("no thread panics with it");
        let count = |header: &[u8]| heard.iter().filter(|(_, bytes)| bytes == header).count();
        count(b"PROXY UNKNOWN\r\n") >= 2 && count(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0") >= 2
    });
    let heard = heard.lock().expect("no thread panics with it");
    assert!(heard.iter().all(|(peer, _)| peer.ip().to_string() == "127.0.0.7"), "{heard:?}");
}

fn a_disabled_server_shows_no_check_of_before() {
    let daemon = forward(FAST, &["127.0.0.1:9001"]);
    wait_state(&daemon, "back", "127.0.0.1:9001", "down");
    assert!(reason(&daemon, "back", "127.0.0.1:9001").contains("refused"));
    daemon.succeed(&["server", "disable", "back/127.0.0.1:9001"]);
    let disabled = server(&daemon, "back", "127.0.0.1:9001");
    assert_eq!((&disabled["state"], disabled.get("check")), (&"disabled".into(), None));
    daemon.succeed(&["server", "ready", "back/127.0.0.1:9001"]);
    eventually("it is checked again", || server(&daemon, "back", "127.0.0.1:9001")["check"]["last"] == "bad");
}

fn a_flapping_server_is_told_once() {
    let folder = a_folder();
    let bad = folder.path().join("bad");
    let path = script(folder.path(), &format!("test ! -e {}", bad.display()));
    let _server = Switched::on("127.0.0.1:9001", "one");
    let health = format!(
        "check = \"command\"\ncommand = [\"{path}\"]\ninterval = \"50ms\"\ntimeout = \"5s\"\nrise = 1\nfall = 1\npassive = false\n"
    );
    let daemon = forward(&health, &["127.0.0.1:9001"]);
    within(SEEN, "a good check", || server(&daemon, "back", "127.0.0.1:9001")["check"]["last"] == "good");
    for _ in 0..6 {
        fs::write(&bad, "").expect("a file");
        wait_state(&daemon, "back", "127.0.0.1:9001", "down");
        fs::remove_file(&bad).expect("it is there");
        wait_state(&daemon, "back", "127.0.0.1:9001", "up");
    }
    let check = server(&daemon, "back", "127.0.0.1:9001")["check"].clone();
    assert_eq!((&check["flapping"], &check["rise_needed"]), (&true.into(), &8.into()), "{check}");
    let lines = |words: &[&str]| told(&daemon, &[&["127.0.0.1:9001"], words].concat());
    assert_eq!(
        (lines(&["is down"]), lines(&["is up"]), lines(&["goes up and down"])),
        (2, 2, 1),
        "{}",
        daemon.log()
    );
}

fn without_checks_failures_of_traffic_take_a_server_down_and_it_is_tried_again() {
    let mut one = Switched::on("127.0.0.1:9001", "one");
    let _two = Switched::on("127.0.0.1:9002", "two");
    let health = "check = \"none\"\ninterval = \"200ms\"\nfall = 3\n";
    let daemon = forward(health, &["127.0.0.1:9001", "127.0.0.1:9002"]);
    assert!(ask_for(front(), Duration::from_millis(200)).1.is_empty());
    one.turn_off();
    within(SEEN, "its failures take it down", || {
        let _ = who(front());
        server(&daemon, "back", "127.0.0.1:9001")["state"] == "down"
    });
    assert_eq!(server(&daemon, "back", "127.0.0.1:9001")["check"]["last"], "traffic");
    let log = daemon.log();
    let why = log.lines().find(|line| line.contains("127.0.0.1:9001 is down: ")).unwrap_or_default();
    let count = why.split("is down: ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    assert!(count >= Some(3_u32), "as many as `fall` are told: {why}");
    // It is tried, fails, and rests longer, while nobody is told again.
    within(SEEN, "it was tried", || {
        let _ = who(front());
        server(&daemon, "back", "127.0.0.1:9001")["failures"].as_u64() > Some(4)
    });
    assert_eq!(told(&daemon, &["127.0.0.1:9001", "is down"]), 1, "{}", daemon.log());
    one.turn_on();
    within(SEEN, "it serves again", || who(front()).is_ok_and(|name| name == "one"));
    within(SEEN, "it is told", || told(&daemon, &["127.0.0.1:9001", "is up"]) == 1);
    within(SEEN, "it is shown", || server(&daemon, "back", "127.0.0.1:9001")["check"]["last"] == "good");
    assert_eq!(server(&daemon, "back", "127.0.0.1:9002")["state"], "up");
}

fn failures_of_traffic_count_beside_checks() {
    let mut one = Switched::on("127.0.0.1:9001", "one");
    let _two = Switched::on("127.0.0.1:9002", "two");
    let _monitor = Switched::on("127.0.0.1:9100", "monitor");
    // The checks ask another port, which is well all the time, and seldom.
    let health = "port = 9100\ninterval = \"60s\"\nfall = 3\nrise = 1\n";
    let daemon = forward(health, &["127.0.0.1:9001", "127.0.0.1:9002"]);
    one.turn_off();
    within(SEEN, "its failures take it down", || {
        let _ = who(front());
        server(&daemon, "back", "127.0.0.1:9001")["state"] == "down"
    });
    let (_, errors) = ask_for(front(), Duration::from_millis(300));
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(told(&daemon, &["127.0.0.1:9001", "is down", "of its traffic"]), 1, "{}", daemon.log());
}

/// The steward among the daemon's processes.
fn steward(daemon: &Daemon) -> u32 {
    let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let mut found = None;
    eventually("a steward", || {
        found = daemon.children().into_iter().find(|&pid| name(pid).trim() == "ek-steward");
        found.is_some()
    });
    found.expect("waited for")
}

fn a_new_steward_goes_on_from_the_verdicts_of_the_last() {
    let mut one = Switched::on("127.0.0.1:9001", "one");
    let _two = Switched::on("127.0.0.1:9002", "two");
    let daemon = forward(FAST, &["127.0.0.1:9001", "127.0.0.1:9002"]);
    one.turn_off();
    wait_state(&daemon, "back", "127.0.0.1:9001", "down");
    for _ in 0..3 {
        let old = steward(&daemon);
        let clients = std::thread::spawn(|| ask_for(front(), Duration::from_millis(1500)));
        signal(old, Signal::SIGKILL);
        eventually("a new steward", || steward(&daemon) != old);
        within(SEEN, "it checks", || {
            let check = server(&daemon, "back", "127.0.0.1:9001")["check"].clone();
            check["bad"].as_u64() > Some(2)
        });
        let (answered, errors) = clients.join().expect("a client");
        assert!(answered > 0 && errors.is_empty(), "the dead server was used: {errors:?}");
    }
    assert_eq!(told(&daemon, &["is down"]), 1, "{}", daemon.log());
    assert_eq!(told(&daemon, &["is up"]), 0, "{}", daemon.log());
    one.turn_on();
    wait_state(&daemon, "back", "127.0.0.1:9001", "up");
}

fn a_reload_keeps_verdicts_and_takes_up_new_checks() {
    let mut one = Switched::on("127.0.0.1:9001", "one");
    let _two = Switched::on("127.0.0.1:9002", "two");
    let servers = ["127.0.0.1:9001", "127.0.0.1:9002"];
    let daemon = forward(FAST, &servers);
    one.turn_off();
    wait_state(&daemon, "back", "127.0.0.1:9001", "down");
    let reload = |health: &str, servers: &[&str]| {
        daemon.rewrite(&config(health, servers));
        let generation = daemon.status().generation;
        daemon.signal(Signal::SIGHUP);
        within(SEEN, "a new generation", || daemon.status().generation > generation);
    };
    let clients = std::thread::spawn(|| ask_for(front(), Duration::from_millis(1500)));
    let slow = "interval = \"1h\"\n";
    reload(slow, &servers);
    assert_eq!(server(&daemon, "back", "127.0.0.1:9001")["state"], "down");
    let (answered, errors) = clients.join().expect("a client");
    assert!(answered > 0 && errors.is_empty(), "the dead server was used: {errors:?}");
    // A server that is new is checked at once, whatever the interval.
    reload(slow, &[servers[0], servers[1], "127.0.0.1:9003"]);
    wait_state(&daemon, "back", "127.0.0.1:9003", "down");
    reload("check = \"exchange\"\nsend = \"?\"\nexpect = \"two\"\ninterval = \"100ms\"\n", &servers);
    within(SEEN, "the new check is at work", || {
        let check = server(&daemon, "back", "127.0.0.1:9002")["check"].clone();
        check["kind"] == "exchange" && check["last"] == "good"
    });
    assert_eq!(server(&daemon, "back", "127.0.0.1:9001")["state"], "down");
}

fn three_hundred_servers_are_checked_once_a_host_without_a_thread_each() {
    const SERVERS: usize = 300;
    let listener = TcpListener::bind("0.0.0.0:9000").expect("a free port");
    let checks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&checks);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    let addresses: Vec<String> =
        (0..SERVERS).map(|i| format!("127.0.{}.{}:9000", 1 + i / 250, 1 + i % 250)).collect();
    let servers: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let daemon = forward("interval = \"1s\"\ntimeout = \"20s\"\n", &servers);
    let steward = steward(&daemon);
    within(SEEN, "every server was checked", || {
        let status = daemon.ask("status").unwrap_or_default();
        let servers = status["status"]["upstreams"][0]["servers"].as_array().cloned().unwrap_or_default();
        servers.len() == SERVERS && servers.iter().all(|server| server["check"]["last"] == "good")
    });
    let threads = fs::read_dir(format!("/proc/{steward}/task")).expect("it lives").count();
    assert!(threads < 20, "{threads} threads");
    let (begin, before) = (Instant::now(), checks.load(Ordering::SeqCst));
    let_pass(Duration::from_secs(4));
    let rate = (checks.load(Ordering::SeqCst) - before) as f64 / begin.elapsed().as_secs_f64();
    // 300 a second within a tenth; two workers that checked would make 600. A
    // loaded machine may fall behind, never run ahead.
    assert!(rate < 360.0 && rate > 60.0, "{rate} checks a second");
}

fn a_steward_that_was_stopped_gives_a_fresh_round() {
    let folder = a_folder();
    let path = script(folder.path(), "exec sleep 2");
    let _server = Switched::on("127.0.0.1:9001", "one");
    // What is under way when the steward stops has timed out when it goes on.
    let health = format!(
        "check = \"command\"\ncommand = [\"{path}\"]\ninterval = \"50ms\"\ntimeout = \"4s\"\nrise = 1\nfall = 1\n"
    );
    let daemon = forward(&health, &["127.0.0.1:9001"]);
    within(SEEN, "a good check", || server(&daemon, "back", "127.0.0.1:9001")["check"]["last"] == "good");
    let steward = steward(&daemon);
    for pid in children_of(steward) {
        // Its end must not come in time either.
        signal(pid, Signal::SIGSTOP);
    }
    signal(steward, Signal::SIGSTOP);
    let_pass(Duration::from_secs(7));
    signal(steward, Signal::SIGCONT);
    within(SEEN, "it is noticed", || told(&daemon, &["fresh round"]) >= 1);
    let good = server(&daemon, "back", "127.0.0.1:9001")["check"]["good"].as_u64();
    within(SEEN, "checks go on", || {
        server(&daemon, "back", "127.0.0.1:9001")["check"]["good"].as_u64() > good
    });
    assert_eq!(told(&daemon, &["is down"]), 0, "{}", daemon.log());
}
