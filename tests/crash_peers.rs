//! Real programs at both ends, while worker after worker is killed between
//! them: none of them notices.

mod support;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use support::crashes::{Chance, kill, self_check_resets, start};
use support::daemon::Daemon;
use support::nginx::{self, Running};
use support::servers::local;
use support::{eventually, pattern, postgres};

fn main() {
    support::run(tests![
        pgbench_meets_no_error needs ["pgbench", "setpriv", "a PostgreSQL server"],
        an_ssh_session_goes_on needs ["sshd", "ssh", "ssh-keygen"],
        a_client_of_http_2_meets_no_error needs ["nginx", "h2load"],
    ])
}

/// A daemon with two workers before the server at this port.
fn before(server: u16) -> Daemon {
    start(&format!(
        "[daemon]\nworkers = 2\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\n\
         upstream = \"back\"\n[[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"127.0.0.1:{server}\"\n"
    ))
}

/// Kills workers at moments that look like chance, until that holds; at least
/// so many.
fn kill_until(daemon: &Daemon, least: usize, kills: &AtomicUsize, mut is_over: impl FnMut() -> bool) {
    let mut chance = Chance(0x9E37_79B9);
    while !is_over() {
        std::thread::park_timeout(Duration::from_micros(chance.below(120_000)));
        kills.fetch_add(usize::from(kill(daemon, chance.below(2) as usize)), Relaxed);
    }
    let kills = kills.load(Relaxed);
    println!("{kills} kills");
    assert!(kills >= least, "{kills}");
    assert_eq!(self_check_resets(daemon), 0, "{}", daemon.log());
    let ended = daemon.listener("front").ended;
    assert!(!ended.contains_key("worker_lost"), "{ended:?}");
}

fn kills_to_do() -> usize {
    30 * support::soak()
}

fn pgbench_meets_no_error() {
    let database = postgres::Postgres::start(9001, postgres::programs().expect("looked for"));
    let daemon = before(database.address.port());
    let seconds = 5 * support::soak();
    // One with four sessions, and one with a connection each transaction.
    let [few, many] = ["-S -n -c 4 -T", "-S -n -C -c 2 -T"].map(|options| format!("{options} {seconds}"));
    std::thread::scope(|scope| {
        let benches = [few, many].map(|options| {
            scope.spawn(move || {
                let arguments: Vec<&str> = options.split(' ').collect();
                let done = postgres::pgbench(local(8080), &arguments).output().expect("pgbench runs");
                let text = String::from_utf8_lossy(&done.stdout).into_owned()
                    + &String::from_utf8_lossy(&done.stderr);
                assert!(
                    done.status.success() && !text.contains("abort") && !text.contains("error"),
                    "{text}"
                );
            })
        });
        kill_until(&daemon, 20, &AtomicUsize::new(0), || benches.iter().all(|bench| bench.is_finished()));
        benches.into_iter().for_each(|bench| bench.join().expect("pgbench meets no error"));
    });
}

/// A server for this very user, at port 9022, and what a client needs to say.
fn sshd(folder: &Path) -> (Running, Vec<String>) {
    let name = |name: &str| folder.join(name).display().to_string();
    for key in ["host", "key"] {
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f", &name(key)])
            .status()
            .expect("ssh-keygen");
        assert!(made.success());
    }
    if nix::unistd::geteuid().is_root() {
        // Where its unit would have made it.
        let _ = std::fs::create_dir("/run/sshd");
    }
    let options = [
        "ListenAddress=127.0.0.1:9022",
        "StrictModes=no",
        "UsePAM=no",
        "PidFile=none",
        "PermitRootLogin=yes",
        &format!("HostKey={}", name("host")),
        &format!("AuthorizedKeysFile={}", name("key.pub")),
    ];
    let program = ["/usr/sbin/sshd", "/usr/bin/sshd"].into_iter().find(|path| Path::new(path).exists());
    let mut command = Command::new(program.expect("looked for"));
    command.args(["-D", "-e", "-f", "/dev/null"]);
    options.iter().for_each(|option| {
        command.args(["-o", option]);
    });
    let log = std::fs::File::create(folder.join("log")).expect("our folder");
    let sshd = Running(command.stdin(Stdio::null()).stderr(log).spawn().expect("sshd starts"));
    eventually("sshd listens", || std::net::TcpStream::connect(local(9022)).is_ok());
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
    let user = user.map_or_else(|| support::skip("this user has no name"), |user| user.name);
    let client = ["-F", "none", "-p", "8080", "-i", &name("key"), "-o", "BatchMode=yes"];
    let trust =
        ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"];
    let whom = format!("{user}@127.0.0.1");
    (sshd, client.into_iter().chain(trust).chain([whom.as_str()]).map(str::to_string).collect())
}

/// A session with its end, in which the far end sends back all that comes.
fn ssh(arguments: &[String]) -> Child {
    let mut command = Command::new("ssh");
    command.args(arguments).arg("cat").stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn().expect("ssh starts")
}

/// Every packet has a check sum under a key: a byte more, less or elsewhere
/// ends the session.
fn an_ssh_session_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_sshd, arguments) = sshd(folder.path());
    let daemon = before(9022);
    let kills = AtomicUsize::new(0);
    let (kills, is_enough) = (&kills, || kills.load(Relaxed) >= kills_to_do());
    std::thread::scope(|scope| {
        // One that types, and one that copies.
        let typing = ssh(&arguments);
        let typist = scope.spawn(move || {
            let mut child = typing;
            let (mut to, mut from) =
                (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
            let mut at = 0;
            while !is_enough() {
                to.write_all(&pattern(at, 40)).expect("ssh goes on");
                let mut answer = [0; 40];
                from.read_exact(&mut answer).expect("ssh goes on");
                assert_eq!(answer[..], pattern(at, 40));
                at += 40;
            }
            drop(to);
            assert!(child.wait().expect("ssh").success());
            at
        });
        let mut copying = ssh(&arguments);
        let mut to = copying.stdin.take().expect("piped");
        let writer = scope.spawn(move || {
            let mut at = 0;
            while !is_enough() {
                to.write_all(&pattern(at, 30_000)).expect("ssh goes on");
                at += 30_000;
            }
            at
        });
        let mut from = copying.stdout.take().expect("piped");
        let reader = scope.spawn(move || {
            let (mut at, mut buffer) = (0, vec![0; 64 * 1024]);
            loop {
                let count = from.read(&mut buffer).expect("a pipe");
                if count == 0 {
                    return at;
                }
                assert!(buffer[..count] == pattern(at, count), "at {at}");
                at += count;
            }
        });
        kill_until(&daemon, kills_to_do(), kills, || {
            [&typist, &writer, &reader].iter().all(|thread| thread.is_finished())
        });
        let (typed, copied) = (typist.join().expect("typed"), writer.join().expect("written"));
        assert_eq!(reader.join().expect("read"), copied);
        assert!(copying.wait().expect("ssh").success());
        println!("{typed} bytes typed, {copied} copied");
        assert!(typed > 0 && copied > 1_000_000, "{typed} {copied}");
    });
}

/// Many streams in each of a few connections.
fn a_client_of_http_2_meets_no_error() {
    let folder = nginx::a_folder();
    for (name, size) in [("small", 200), ("medium", 16_000), ("large", 400_000)] {
        std::fs::write(folder.path().join("files").join(name), pattern(0, size)).expect("our folder");
    }
    let _nginx = nginx::start(folder.path());
    let daemon = before(9002);
    let kills = AtomicUsize::new(0);
    let kills = &kills;
    std::thread::scope(|scope| {
        let client = scope.spawn(move || {
            let mut requests = 0;
            while kills.load(Relaxed) < kills_to_do() {
                let done = Command::new("h2load")
                    .args(["-n", "3000", "-c", "4", "-m", "10"])
                    .args(["small", "medium", "large"].map(|file| format!("http://127.0.0.1:8080/{file}")))
                    .output()
                    .expect("h2load runs");
                let text = String::from_utf8_lossy(&done.stdout).into_owned();
                let all =
                    "3000 total, 3000 started, 3000 done, 3000 succeeded, 0 failed, 0 errored, 0 timeout";
                assert!(done.status.success() && text.contains(all), "{text}");
                requests += 3000;
            }
            requests
        });
        kill_until(&daemon, kills_to_do(), kills, || client.is_finished());
        println!("{} requests", client.join().expect("h2load meets no error"));
    });
}
