//! systemd: the units, what it is told, the sockets that it passes, and the
//! service under a real one that is booted for the test.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};
use support::clients::{traffic_goes_on, try_exchange, under_traffic};
use support::daemon::{Daemon, program, signal};
use support::machine::Machine;
use support::servers::{connect, exchange, local};
use support::{eventually, pace, within};

fn main() {
    support::run(tests![
        systemd_analyze_has_nothing_to_say_about_the_units needs ["systemd-analyze"],
        the_exposure_is_low needs ["systemd-analyze"],
        the_watchdog_is_fed_at_half_its_time_and_not_by_a_stopped_supervisor,
        systemd_is_told_how_it_goes_and_asked_for_time_to_leave,
        passed_sockets_are_served_and_outlive_the_daemon,
        more_sockets_than_workers_are_all_served,
        missing_sockets_are_opened_by_the_same_user,
        a_socket_of_no_listener_is_closed_and_said,
        sockets_for_another_process_are_left_alone,
        the_unit_starts_and_stops_within_the_drain_timeout needs ["a machine"],
        a_restart_with_a_socket_unit_refuses_nobody needs ["a machine"],
        a_killed_supervisor_is_replaced_at_once needs ["a machine"],
        a_reload_tells_systemctl_how_it_went needs ["a machine"],
        a_change_that_would_leave_a_socket_without_a_reader_is_refused needs ["a machine"],
        udp_sockets_of_a_socket_unit_are_served_and_not_to_be_stolen needs ["a machine"],
        a_stopped_supervisor_is_replaced_by_the_watchdog needs ["a machine"],
        too_few_lines_in_the_socket_unit_are_refused_with_their_number needs ["a machine"],
        the_root_drop_in_keeps_the_supervisor_root_alone needs ["a machine"],
        a_port_in_use_is_said_in_words_by_the_hardened_unit needs ["a machine"],
        a_leave_by_the_control_socket_is_followed_by_a_start needs ["a machine"],
        a_wrong_configuration_is_not_tried_again needs ["a machine"],
    ])
}

const FRONT: &str =
    "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"echo\"\n";

/// The units as they are installed, with a program that exists here.
fn units(drop_in: Option<&Path>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let service = fs::read_to_string("systemd/evenkeel.service").expect("the unit");
    let service = service.replace("/usr/bin/evenkeel", program());
    fs::write(folder.path().join("evenkeel.service"), service).expect("a file");
    fs::copy("systemd/evenkeel.socket", folder.path().join("evenkeel.socket")).expect("a file");
    if let Some(drop_in) = drop_in {
        let into = folder.path().join("evenkeel.service.d");
        fs::create_dir(&into).expect("a folder");
        fs::copy(drop_in, into.join(drop_in.file_name().expect("a name"))).expect("a file");
    }
    folder
}

fn drop_ins() -> Vec<std::path::PathBuf> {
    let folder = fs::read_dir("systemd/drop-ins").expect("the drop-ins");
    folder.map(|entry| entry.expect("an entry").path()).collect()
}

fn systemd_analyze_has_nothing_to_say_about_the_units() {
    let drop_ins = drop_ins();
    assert!(drop_ins.len() >= 3);
    for drop_in in [None].into_iter().chain(drop_ins.iter().map(Some)) {
        let folder = units(drop_in.map(|path| path.as_path()));
        let done = Command::new("systemd-analyze")
            .arg("verify")
            .args(["evenkeel.service", "evenkeel.socket"].map(|unit| folder.path().join(unit)))
            .output()
            .expect("systemd-analyze");
        let said = [done.stdout, done.stderr].concat();
        // It exits with 0 where it does not know a key.
        assert!(said.is_empty(), "{drop_in:?}: {}", String::from_utf8_lossy(&said));
    }
}

fn the_exposure_is_low() {
    // Tenths: the service as it is, and with what each drop-in opens.
    let limits =
        [("", 16), ("socket.conf", 16), ("pinning.conf", 16), ("transparent.conf", 18), ("root.conf", 25)];
    for (name, limit) in limits {
        let drop_in = Path::new("systemd/drop-ins").join(name);
        let folder = units((!name.is_empty()).then_some(drop_in.as_path()));
        let done = Command::new("systemd-analyze")
            .args(["security", "--offline=yes", &format!("--threshold={limit}")])
            .arg(folder.path().join("evenkeel.service"))
            .output()
            .expect("systemd-analyze");
        let table = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success(), "{name}: over {limit}\n{table}");
    }
}

fn the_watchdog_is_fed_at_half_its_time_and_not_by_a_stopped_supervisor() {
    let mut daemon = Daemon::start_with(&format!("[daemon]\nworkers = 2\n{FRONT}"), |command| {
        command.env("WATCHDOG_USEC", "400000");
    });
    daemon.wait_ready();
    let fed = |daemon: &Daemon| daemon.notified().iter().filter(|text| text.contains("WATCHDOG=1")).count();
    fed(&daemon);
    let begin = Instant::now();
    let mut count = 0;
    within(Duration::from_secs(10), "it is fed ten times", || {
        count += fed(&daemon);
        count >= 10
    });
    // Ten times 200 ms, and not more often than that.
    let took = begin.elapsed();
    assert!((1_700..4_000).contains(&took.as_millis()), "{took:?}");
    daemon.signal(Signal::SIGSTOP);
    fed(&daemon);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(700) {
        assert_eq!(fed(&daemon), 0, "somebody else feeds it");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    daemon.signal(Signal::SIGCONT);
    eventually("it is fed again", || fed(&daemon) > 0);
}

fn systemd_is_told_how_it_goes_and_asked_for_time_to_leave() {
    let mut daemon = Daemon::start(&format!("[daemon]\nworkers = 2\n{FRONT}"));
    let mut texts = Vec::new();
    eventually("READY=1", || {
        texts.extend(daemon.notified());
        texts.iter().any(|text| text.contains("READY=1"))
    });
    assert!(texts.concat().contains("STATUS=2 workers, 0 connections, 0 new/s"), "{texts:?}");
    let mut client = connect(local(8080));
    exchange(&mut client, b"x").unwrap();
    eventually("a status with a connection", || {
        texts.extend(daemon.notified());
        texts
            .iter()
            .any(|text| text.contains("STATUS=2 workers, 1 connections, ") && text.contains("spread 2.00"))
    });
    daemon.signal(Signal::SIGTERM);
    let wanted = ["STOPPING=1", "EXTEND_TIMEOUT_USEC=15000000", "STATUS=leaving: 1 connections left"];
    eventually("all that concerns a leave", || {
        texts.extend(daemon.notified());
        wanted.iter().all(|wanted| texts.iter().any(|text| text.contains(wanted)))
    });
    drop(client);
    assert!(daemon.wait(Duration::from_secs(10)).success());
}

/// A group of listening sockets as systemd opens it: blocking, shared.
fn group(port: u16, count: usize) -> Vec<OwnedFd> {
    let open = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("an option");
        socket.set_reuse_port(true).expect("an option");
        socket.bind(&local(port).into()).expect("a free port");
        socket.listen(128).expect("a listener");
        socket.into()
    };
    (0..count).map(|_| open()).collect()
}

/// Starts a daemon that gets these as descriptors 3, 4 and so on.
fn activated(config: &str, sockets: &[OwnedFd], pid: &str) -> Daemon {
    let raw: Vec<i32> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    let count = raw.len();
    Daemon::start_with(config, |command| {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_owned()).collect();
        let environment: Vec<_> =
            command.get_envs().filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned()))).collect();
        let log = Path::new(&environment[0].1).with_file_name("log");
        let log = fs::File::create(log).expect("a log file");
        *command = Command::new("sh");
        command.args(["-c", &format!("LISTEN_PID={pid} exec \"$0\" \"$@\""), program()]).args(arguments);
        command.envs(environment).env("LISTEN_FDS", count.to_string()).env("LISTEN_FDNAMES", "web:web");
        command.stdin(Stdio::null()).stderr(log);
        // SAFETY: the closure calls fcntl and dup2 alone, which are
        // async-signal-safe, on numbers that the parent has open.
        unsafe {
            command.pre_exec(move || {
                // Out of the way of each other first.
                let high: Vec<i32> = raw.iter().map(|&fd| libc::fcntl(fd, libc::F_DUPFD, 100)).collect();
                for (index, fd) in high.into_iter().enumerate() {
                    libc::dup2(fd, 3 + index as i32);
                    libc::close(fd);
                }
                Ok(())
            });
        }
    })
}

fn inodes(port: u16) -> usize {
    let table = fs::read_to_string("/proc/net/tcp").expect("the table");
    let here = format!(":{port:04X}");
    let rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&here) && row[3] == "0A").count()
}

fn serve(count: usize) {
    for _ in 0..count {
        assert_eq!(exchange(&mut connect(local(8080)), b"hello").expect("served"), b"hello");
    }
}

fn passed_sockets_are_served_and_outlive_the_daemon() {
    let sockets = group(8080, 2);
    let config = format!("[daemon]\nworkers = 2\n{FRONT}");
    let mut daemon = activated(&config, &sockets, "$$");
    daemon.wait_ready();
    assert_eq!(inodes(8080), 2, "nobody opened another");
    serve(60);
    let accepted: Vec<u64> = daemon.status().workers.iter().map(|worker| worker.accepted).collect();
    // All 60 at one slot by chance: 2 in 2^60.
    assert!(accepted.iter().all(|&count| count > 0), "{accepted:?}");
    daemon.kill_worker(1);
    eventually("a new worker", || daemon.worker(1).restarts == 1 && daemon.worker(1).state == "ready");
    serve(20);
    let mut held = connect(local(8080));
    exchange(&mut held, b"x").unwrap();
    daemon.signal(Signal::SIGTERM);
    eventually("it leaves", || daemon.log().contains("leaving"));
    exchange(&mut held, b"x").expect("an open session goes on");
    drop(held);
    assert!(daemon.wait(Duration::from_secs(10)).success());
    // Nobody is refused, and nobody's SYN is dropped, while no daemon runs.
    let mut waiting: Vec<TcpStream> = (0..40).map(|_| connect(local(8080))).collect();
    waiting.iter_mut().for_each(|client| client.write_all(b"waiting").expect("the kernel takes it"));
    let mut next = activated(&config, &sockets, "$$");
    next.wait_ready();
    for client in &mut waiting {
        let mut answer = [0; 7];
        client.read_exact(&mut answer).expect("who waited is served by the next daemon");
    }
}

fn more_sockets_than_workers_are_all_served() {
    let sockets = group(8080, 3);
    let mut daemon = activated(&format!("[daemon]\nworkers = 2\n{FRONT}"), &sockets, "$$");
    daemon.wait_ready();
    serve(90);
    assert_eq!(inodes(8080), 3);
    assert!(
        daemon.log().contains("systemd passed 3 sockets for 127.0.0.1:8080 to 2 workers"),
        "{}",
        daemon.log()
    );
}

fn missing_sockets_are_opened_by_the_same_user() {
    let sockets = group(8080, 2);
    let mut daemon = activated(&format!("[daemon]\nworkers = 3\n{FRONT}"), &sockets, "$$");
    daemon.wait_ready();
    assert_eq!(inodes(8080), 3);
    serve(60);
    daemon.says("slots 2 to 2 open their own");
}

fn a_socket_of_no_listener_is_closed_and_said() {
    let mut sockets = group(8080, 1);
    sockets.push(TcpListener::bind("127.0.0.1:9090").expect("a free port").into());
    let mut daemon = activated(&format!("[daemon]\nworkers = 1\n{FRONT}"), &sockets, "$$");
    daemon.wait_ready();
    serve(5);
    let log = daemon.log();
    assert!(
        log.contains("descriptor 4 from systemd (web: 127.0.0.1:9090/tcp) belongs to no listener"),
        "{log}"
    );
}

fn sockets_for_another_process_are_left_alone() {
    let sockets = group(9090, 1);
    let mut daemon = activated(&format!("[daemon]\nworkers = 1\n{FRONT}"), &sockets, "1");
    daemon.wait_ready();
    serve(5);
    assert!(!daemon.log().contains("systemd"), "{}", daemon.log());
}

fn oom_score(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("a living process").trim().to_string()
}

fn the_unit_starts_and_stops_within_the_drain_timeout() {
    // The drain may take longer than TimeoutStopSec=: it asks for more.
    let config = format!(
        "[daemon]\nworkers = 2\ndrain_timeout = \"1m\"\n{}",
        FRONT.replace("127.0.0.1:8080", "127.0.0.1:80")
    );
    let machine = Machine::boot(&[
        ("/etc/evenkeel/evenkeel.toml", &config),
        ("/etc/systemd/system/evenkeel.service.d/more.conf", "[Service]\nTimeoutStopSec=1s\n"),
    ]);
    machine.systemctl(&["start", "evenkeel"]);
    assert_eq!(machine.property("ActiveState"), "active");
    assert!(machine.property("StatusText").starts_with("2 workers, "), "{}", machine.property("StatusText"));
    try_exchange(local(80)).expect("a low port of a user who is not root");
    let status = machine.status();
    assert_eq!(status["workers"].as_array().expect("an array").len(), 2);
    let supervisor = machine.supervisor();
    for pid in support::daemon::children_of(supervisor) {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a living process");
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or("").to_string();
        assert!(!line("Uid:").contains("\t0\t"), "{text}");
        assert_eq!(line("CapEff:"), "CapEff:\t0000000000000000");
        assert_eq!(line("CapAmb:"), "CapAmb:\t0000000000000000");
        assert_eq!(line("Seccomp:"), "Seccomp:\t2");
        assert_eq!(oom_score(pid), "0", "a child dies before the supervisor does");
    }
    // Where the host lets nobody lower it, systemd passes over that.
    println!("oom_score_adj of the supervisor: {}", oom_score(supervisor));
    let limits = fs::read_to_string(format!("/proc/{supervisor}/limits")).expect("a living process");
    println!("{}", limits.lines().find(|line| line.starts_with("Max open files")).unwrap_or(""));
    let mut session = connect(local(80));
    exchange(&mut session, b"x").unwrap();
    // Under all that the unit forbids a killed worker still loses nothing.
    let workers = || {
        let children = support::daemon::children_of(supervisor).into_iter();
        let workers = children.filter(|pid| support::daemon::name_of(*pid).starts_with("ek-worker-"));
        workers.collect::<Vec<u32>>()
    };
    let killed = workers();
    assert_eq!(killed.len(), 2);
    killed.iter().for_each(|pid| support::daemon::signal(*pid, nix::sys::signal::Signal::SIGKILL));
    exchange(&mut session, b"of another worker").expect("its keeper has it");
    eventually("both are replaced, and kept", || {
        let status = machine.status();
        let is_kept = |slot: usize| {
            let worker = &status["workers"][slot];
            worker["state"] == "ready" && worker["keeper"]["pid"].as_u64().is_some_and(|pid| pid > 0)
        };
        is_kept(0) && is_kept(1) && workers().len() == 2
    });
    pace::goes_with_the_load(&workers(), local(80));
    machine.systemctl(&["stop", "--no-block", "evenkeel"]);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(4) {
        exchange(&mut session, b"still here").expect("the session goes on past TimeoutStopSec");
        std::thread::park_timeout(Duration::from_millis(50));
    }
    assert_eq!(machine.property("ActiveState"), "deactivating");
    assert!(machine.property("StatusText").starts_with("leaving: "), "{}", machine.property("StatusText"));
    drop(session);
    machine.wait_for(Duration::from_secs(10), "ActiveState", "inactive");
    assert_eq!(machine.property("Result"), "success");
    assert!(!machine.path("/run/evenkeel").exists(), "nothing is left behind");
}

const SOCKET: &str =
    "[Socket]\nListenStream=127.0.0.1:8080\nListenStream=127.0.0.1:8080\nReusePort=yes\nBacklog=4096\n";

/// A machine with two workers on sockets that systemd opens.
fn socket_machine(more: &str, workers: usize) -> Machine {
    let config = format!("[daemon]\nworkers = {workers}\ndrain_timeout = \"2s\"\n{FRONT}");
    let drop_in = fs::read_to_string("systemd/drop-ins/socket.conf").expect("the drop-in");
    Machine::boot(&[
        ("/etc/evenkeel/evenkeel.toml", &config),
        ("/etc/systemd/system/evenkeel.socket", SOCKET),
        ("/etc/systemd/system/evenkeel.service.d/socket.conf", &drop_in),
        ("/etc/systemd/system/evenkeel.service.d/more.conf", more),
    ])
}

fn a_restart_with_a_socket_unit_refuses_nobody() {
    let machine = socket_machine("", 2);
    machine.systemctl(&["start", "evenkeel.socket", "evenkeel.service"]);
    assert!(machine.log().contains("ready: 2 workers"), "{}", machine.log());
    let mut pids = vec![machine.supervisor()];
    let (served, errors) = under_traffic(|served| {
        for _ in 0..5 {
            traffic_goes_on(served);
            machine.systemctl(&["restart", "evenkeel"]);
            pids.push(machine.supervisor());
        }
        traffic_goes_on(served);
    });
    println!("{served} sessions over 5 restarts, {} errors", errors.len());
    assert!(errors.is_empty(), "{} of {served}: {:?}", errors.len(), errors.first());
    pids.dedup();
    assert_eq!(pids.len(), 6, "it was restarted each time: {pids:?}");
    assert_eq!(machine.property("NRestarts"), "0");
}

fn a_killed_supervisor_is_replaced_at_once() {
    a_supervisor_is_replaced(Signal::SIGKILL, Duration::from_secs(4));
}

fn a_stopped_supervisor_is_replaced_by_the_watchdog() {
    a_supervisor_is_replaced(Signal::SIGSTOP, Duration::from_secs(8));
}

fn a_supervisor_is_replaced(by: Signal, limit: Duration) {
    let machine = socket_machine("[Service]\nWatchdogSec=2s\n", 2);
    machine.systemctl(&["start", "evenkeel.socket", "evenkeel.service"]);
    let before = machine.supervisor();
    let mut took = Duration::ZERO;
    let (served, errors) = under_traffic(|served| {
        traffic_goes_on(served);
        let begin = Instant::now();
        signal(before, by);
        within(Duration::from_secs(15), "a new supervisor", || {
            let now = machine.supervisor();
            now != 0 && now != before && machine.property("ActiveState") == "active"
        });
        took = begin.elapsed();
        traffic_goes_on(served);
    });
    println!("replaced after {took:?}; {served} sessions, {} of them broken", errors.len());
    assert_eq!(machine.property("NRestarts"), "1");
    assert!(took < limit, "{took:?}");
    let refused = errors.iter().filter(|error| {
        matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::TimedOut | ErrorKind::WouldBlock)
    });
    assert_eq!(refused.count(), 0, "{errors:?}");
    // Each of the four clients has one session open when all are killed.
    assert!(errors.len() <= 4, "{errors:?}");
}

fn too_few_lines_in_the_socket_unit_are_refused_with_their_number() {
    let machine = socket_machine("", 3);
    let done = machine.run(&["systemctl", "start", "evenkeel.socket", "evenkeel.service"]);
    assert!(!done.status.success());
    let log = machine.log();
    assert!(
        log.contains("systemd passed 2 sockets for 127.0.0.1:8080, and 3 workers need one each"),
        "{log}"
    );
    assert!(log.contains("ListenStream=127.0.0.1:8080 3 times"), "{log}");
    machine.wait_for(Duration::from_secs(5), "ExecMainStatus", "78");
    assert_eq!(machine.property("NRestarts"), "0", "a new start would heal nothing");
}

fn a_wrong_configuration_is_not_tried_again() {
    let machine = Machine::boot(&[("/etc/evenkeel/evenkeel.toml", "[daemon]\nworkers = \"many\"\n")]);
    assert!(!machine.run(&["systemctl", "start", "evenkeel"]).status.success());
    machine.wait_for(Duration::from_secs(5), "ActiveState", "failed");
    assert_eq!(
        (machine.property("ExecMainStatus"), machine.property("NRestarts")),
        ("78".into(), "0".into())
    );
    assert!(machine.log().contains("evenkeel.toml:2:11"), "{}", machine.log());
}

fn the_root_drop_in_keeps_the_supervisor_root_alone() {
    let config = format!("[daemon]\nworkers = 2\nhang_timeout = \"300ms\"\nuser = \"nobody\"\n{FRONT}");
    let drop_in = fs::read_to_string("systemd/drop-ins/root.conf").expect("the drop-in");
    let machine = Machine::boot(&[
        ("/etc/evenkeel/evenkeel.toml", &config),
        ("/etc/systemd/system/evenkeel.service.d/root.conf", &drop_in),
    ]);
    machine.systemctl(&["start", "evenkeel"]);
    let uid = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a living process");
        text.lines().find(|line| line.starts_with("Uid:")).unwrap_or("").to_string()
    };
    let supervisor = machine.supervisor();
    assert_eq!(uid(supervisor), "Uid:\t0\t0\t0\t0");
    let mut children = support::daemon::children_of(supervisor);
    assert!(children.iter().all(|&pid| uid(pid) == "Uid:\t65534\t65534\t65534\t65534"));
    children.retain(|&pid| !support::daemon::name_of(pid).starts_with("ek-keeper"));
    assert_eq!(children.len(), 3);
    // It can still end what belongs to another user.
    let worker = children[0];
    signal(worker, Signal::SIGSTOP);
    eventually("the hung worker is replaced", || !support::daemon::runs(worker));
    try_exchange(local(8080)).expect("served");
}

fn a_port_in_use_is_said_in_words_by_the_hardened_unit() {
    let machine =
        Machine::boot(&[("/etc/evenkeel/evenkeel.toml", &format!("[daemon]\nworkers = 2\n{FRONT}"))]);
    let holder = TcpListener::bind("127.0.0.1:8080").expect("a free port");
    machine.systemctl(&["start", "--no-block", "evenkeel"]);
    eventually("it is said", || machine.log().contains("127.0.0.1:8080/tcp"));
    println!("{}", machine.log());
    // It heals by itself: each start tries again.
    drop(holder);
    machine.wait_for(Duration::from_secs(20), "ActiveState", "active");
}

fn a_leave_by_the_control_socket_is_followed_by_a_start() {
    let machine =
        Machine::boot(&[("/etc/evenkeel/evenkeel.toml", &format!("[daemon]\nworkers = 2\n{FRONT}"))]);
    machine.systemctl(&["start", "evenkeel"]);
    let before = machine.supervisor();
    let begin = Instant::now();
    assert!(machine.run(&["evenkeel", "drain"]).status.success());
    eventually("another supervisor", || {
        let now = machine.supervisor();
        now != 0 && now != before
    });
    println!("an idle daemon left and came back within {:?}", begin.elapsed());
    assert_eq!(machine.property("NRestarts"), "1");
}

fn a_reload_tells_systemctl_how_it_went() {
    let machine = socket_machine("", 2);
    machine.systemctl(&["start", "evenkeel.socket", "evenkeel.service"]);
    let supervisor = machine.supervisor();
    let mut session = connect(local(8080));
    exchange(&mut session, b"before").expect("served");
    let file = machine.path("/etc/evenkeel/evenkeel.toml");
    let good = fs::read_to_string(&file).expect("the file");
    fs::write(&file, good.replace("drain_timeout = \"2s\"", "drain_timeout = \"3s\"")).expect("written");
    machine.systemctl(&["reload", "evenkeel"]);
    assert_eq!(machine.status()["generation"], 2);
    exchange(&mut session, b"after").expect("the session went on");
    fs::write(&file, good.replace("workers", "worker")).expect("written");
    assert!(!machine.run(&["systemctl", "reload", "evenkeel"]).status.success(), "a refusal is a failure");
    assert!(machine.log().contains("worker"), "{}", machine.log());
    assert_eq!((machine.property("ActiveState"), machine.supervisor()), ("active".into(), supervisor));
    exchange(&mut session, b"still").expect("the session went on");
    // The sockets are systemd's still, after another generation took them up.
    fs::write(&file, &good).expect("written");
    let (served, errors) = under_traffic(|served| {
        traffic_goes_on(served);
        machine.systemctl(&["restart", "evenkeel"]);
        traffic_goes_on(served);
    });
    assert!(errors.is_empty(), "{} of {served}: {:?}", errors.len(), errors.first());
}

fn udp_sockets_of_a_socket_unit_are_served_and_not_to_be_stolen() {
    let config = format!("[daemon]\nworkers = 2\n{}", FRONT.replace("\"tcp\"", "\"udp\""));
    let drop_in = fs::read_to_string("systemd/drop-ins/socket.conf").expect("the drop-in");
    let machine = Machine::boot(&[
        ("/etc/evenkeel/evenkeel.toml", &config),
        ("/etc/systemd/system/evenkeel.socket", &SOCKET.replace("ListenStream", "ListenDatagram")),
        ("/etc/systemd/system/evenkeel.service.d/socket.conf", &drop_in),
    ]);
    machine.systemctl(&["start", "evenkeel.socket", "evenkeel.service"]);
    for _ in 0..20 {
        let client = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        client.set_read_timeout(Some(Duration::from_secs(10))).expect("a time-out");
        client.send_to(b"hello", local(8080)).expect("sent");
        let mut answer = [0; 16];
        let (count, from) = client.recv_from(&mut answer).expect("an answer");
        assert_eq!((&answer[..count], from), (&b"hello"[..], local(8080)));
    }
    // A socket of another user that sets SO_REUSEADDR gets the port of one
    // that sets it too, with all its datagrams.
    let thief = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
    thief.set_reuse_address(true).expect("an option");
    let stolen = thief.bind(&local(8080).into());
    assert_eq!(stolen.expect_err("the port is taken").kind(), ErrorKind::AddrInUse);
}

fn a_change_that_would_leave_a_socket_without_a_reader_is_refused() {
    let machine = socket_machine("", 2);
    machine.systemctl(&["start", "evenkeel.socket", "evenkeel.service"]);
    for (count, word) in [
        ("1", "nobody would serve the socket at 127.0.0.1:8080"),
        ("3", "ListenStream=127.0.0.1:8080 3 times"),
    ] {
        let done = machine.run(&["evenkeel", "scale", count]);
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        println!("scale {count}: {text}");
        assert!(!done.status.success() && text.contains(word), "{text}");
    }
    let file = machine.path("/etc/evenkeel/evenkeel.toml");
    let text = fs::read_to_string(&file).expect("the file").replace(":8080", ":8081");
    fs::write(&file, text).expect("written");
    assert!(!machine.run(&["systemctl", "reload", "evenkeel"]).status.success());
    serve(60);
    assert_eq!(machine.status()["workers"].as_array().expect("an array").len(), 2);
}
