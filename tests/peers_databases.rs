//! Redis and PostgreSQL behind the daemon, driven by their own benchmarks,
//! while servers are drained, killed and brought back.

mod support;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use support::daemon::Daemon;
use support::health::{SEEN, server, wait_state};
use support::postgres::{self, Postgres};
use support::within;

fn main() {
    support::run(tests![
        redis_benchmark_meets_no_error_while_servers_are_drained_killed_and_brought_back
            needs ["redis-server", "redis-benchmark"],
        pgbench_meets_no_error_while_servers_are_drained_killed_and_brought_back needs ["pgbench", "a PostgreSQL server"],
    ])
}

const FRONT: &str = "127.0.0.1:8080";

/// A daemon in front of two servers.
fn forward(health: &str, servers: [SocketAddr; 2]) -> Daemon {
    Daemon::ready(&format!(
        "[daemon]\nworkers = 2\n\
         [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"{FRONT}\"\nupstream = \"db\"\n\
         [[upstream]]\nname = \"db\"\nbalance = \"least-connections\"\n\
         [upstream.health]\n{health}\ninterval = \"200ms\"\ntimeout = \"5s\"\nrise = 2\nfall = 2\n\
         [[upstream.server]]\naddress = \"{}\"\n[[upstream.server]]\naddress = \"{}\"\n",
        servers[0], servers[1]
    ))
}

fn order(daemon: &Daemon, what: &str, server: SocketAddr) {
    daemon.succeed(&["server", what, &format!("db/{server}")]);
}

fn active(daemon: &Daemon, address: SocketAddr) -> u64 {
    server(daemon, "db", &address.to_string())["active"].as_u64().expect("a number")
}

fn wait_both_up(daemon: &Daemon, servers: [SocketAddr; 2]) {
    for address in servers {
        within(SEEN, "a good check", || {
            let server = server(daemon, "db", &address.to_string());
            server["state"] == "up" && server["check"]["last"] == "good"
        });
    }
}

fn answers(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
}

/// A folder that any user may use.
fn a_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).expect("its mode");
    folder
}

struct Redis {
    address: SocketAddr,
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Redis {
    fn start(port: u16) -> Redis {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut redis = Redis { address, folder: a_folder(), child: None };
        redis.run();
        redis
    }

    fn run(&mut self) {
        let mut command = Command::new("redis-server");
        command.args(["--port", &self.address.port().to_string(), "--bind", "127.0.0.1", "--save", ""]);
        command.arg("--dir").arg(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::null());
        self.child = Some(command.spawn().expect("redis-server"));
        within(SEEN, "redis answers", || answers(self.address));
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A benchmark with so many sessions, each kept for so many requests.
fn redis_benchmark(sessions: u32, requests: u32) -> Child {
    let (host, port) = FRONT.split_once(':').expect("an address");
    Command::new("redis-benchmark")
        .args(["-h", host, "-p", port, "-q", "-t", "set,get", "-P", "1"])
        .args(["-c", &sessions.to_string(), "-n", &requests.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("redis-benchmark")
}

#[track_caller]
fn succeeds(benchmark: Child) {
    let output = benchmark.wait_with_output().expect("a benchmark");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("rror"), "{output:?}");
}

fn redis_benchmark_meets_no_error_while_servers_are_drained_killed_and_brought_back() {
    let (mut one, two) = (Redis::start(9001), Redis::start(9002));
    let servers = [one.address, two.address];
    let health = "check = \"exchange\"\nsend = 'PING\\r\\n'\nexpect = \"+PONG\"";
    let daemon = forward(health, servers);
    wait_both_up(&daemon, servers);

    // Drained: who has a session keeps it, nobody new comes.
    let benchmark = redis_benchmark(20, 60_000);
    within(SEEN, "sessions on both", || servers.iter().all(|server| active(&daemon, *server) > 0));
    order(&daemon, "drain", one.address);
    let during = redis_benchmark(10, 5_000);
    succeeds(during);
    succeeds(benchmark);
    within(SEEN, "drained", || active(&daemon, one.address) == 0);
    order(&daemon, "ready", one.address);
    wait_state(&daemon, "db", &one.address.to_string(), "up");

    // Killed: each benchmark has one session, so those fail that were there.
    let before = daemon.listener("front").connections;
    let benchmarks: Vec<Child> = (0..12).map(|_| redis_benchmark(1, 1_000_000)).collect();
    // Each asks for the server's configuration in a session of its own first.
    within(SEEN, "twelve sessions on both", || {
        let begun = daemon.listener("front").connections - before;
        let active = servers.map(|server| active(&daemon, server));
        begun >= 24 && active.iter().sum::<u64>() == 12 && active.iter().all(|&count| count > 0)
    });
    let there = active(&daemon, one.address);
    one.kill();
    wait_state(&daemon, "db", &one.address.to_string(), "down");
    // Once it is seen nobody meets it.
    succeeds(redis_benchmark(10, 5_000));
    let mut failed = 0;
    for mut benchmark in benchmarks {
        let ended = benchmark.try_wait().expect("our child");
        failed += u64::from(ended.is_some_and(|status| !status.success()));
        let _ = benchmark.kill();
        let _ = benchmark.wait();
    }
    assert!(failed <= there, "{failed} of 12 failed, {there} were there");

    // Brought back: under traffic.
    let benchmark = redis_benchmark(20, 60_000);
    one.run();
    wait_state(&daemon, "db", &one.address.to_string(), "up");
    let connections =
        || server(&daemon, "db", &one.address.to_string())["connections"].as_u64().expect("a number");
    let before = connections();
    succeeds(redis_benchmark(20, 20_000));
    assert!(connections() > before, "it got none of the new sessions");
    succeeds(benchmark);
}

/// Selects for so many seconds with so many sessions; `-C` connects anew for
/// each transaction.
fn pgbench(seconds: u32, sessions: u32, more: &[&str]) -> Child {
    let (seconds, sessions) = (seconds.to_string(), sessions.to_string());
    let arguments = [&["-S", "-n", "-T", &seconds, "-c", &sessions][..], more].concat();
    postgres::pgbench(FRONT.parse().expect("an address"), &arguments).spawn().expect("pgbench")
}

fn pgbench_meets_no_error_while_servers_are_drained_killed_and_brought_back() {
    let programs = postgres::programs().expect("it is installed");
    let (mut one, two) = (Postgres::start(9001, programs.clone()), Postgres::start(9002, programs.clone()));
    let servers = [one.address, two.address];
    // A command as a health check, as people have for databases.
    let isready = programs.join("pg_isready");
    let script = format!(
        "exec {} -q -h \\\"${{EVENKEEL_SERVER%:*}}\\\" -p \\\"${{EVENKEEL_SERVER##*:}}\\\"",
        isready.display()
    );
    let health = format!("check = \"command\"\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]");
    let daemon = forward(&health, servers);
    wait_both_up(&daemon, servers);

    // Drained: sessions stay, new ones go to the other server.
    let staying = pgbench(5, 8, &[]);
    let changing = pgbench(5, 2, &["-C"]);
    within(SEEN, "sessions on both", || servers.iter().all(|server| active(&daemon, *server) > 1));
    order(&daemon, "drain", one.address);
    no_errors(staying, 8);
    no_errors(changing, 2);
    within(SEEN, "drained", || active(&daemon, one.address) == 0);
    order(&daemon, "ready", one.address);
    wait_state(&daemon, "db", &one.address.to_string(), "up");

    // Killed: its sessions end, the others go on.
    let sum = |of: &str| {
        let figures = servers.iter().map(|address| server(&daemon, "db", &address.to_string())[of].as_u64());
        figures.map(|figure| figure.expect("a number")).sum::<u64>()
    };
    let before = sum("connections");
    let staying = pgbench(6, 8, &[]);
    // Before its eight it opens one to look around, which closes.
    within(SEEN, "eight sessions", || sum("connections") >= before + 9 && sum("active") == 8);
    let there = active(&daemon, one.address);
    assert!(there > 0 && there < 8, "{there} of 8");
    one.kill();
    wait_state(&daemon, "db", &one.address.to_string(), "down");
    // Once it is seen nobody meets it, however often they connect.
    no_errors(pgbench(2, 4, &["-C"]), 4);
    let output = staying.wait_with_output().expect("pgbench");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let aborted = said.matches(" aborted in ").count() as u64;
    assert!((1..=there).contains(&aborted), "{aborted} sessions ended, {there} were there: {said}");

    // Brought back under traffic.
    let changing = pgbench(5, 4, &["-C"]);
    one.run();
    wait_state(&daemon, "db", &one.address.to_string(), "up");
    let before = server(&daemon, "db", &one.address.to_string())["connections"].as_u64();
    within(SEEN, "it serves again", || {
        server(&daemon, "db", &one.address.to_string())["connections"].as_u64() > before
    });
    no_errors(changing, 4);
}

#[track_caller]
fn no_errors(pgbench: Child, sessions: u32) {
    let output = pgbench.wait_with_output().expect("pgbench");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert!(!err.contains("aborted") && !err.contains("error"), "{sessions} sessions: {out}{err}");
    assert!(out.contains("number of failed transactions: 0 "), "{out}");
}
