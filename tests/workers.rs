//! The process model: sockets that outlive workers, deaths, orphans, limits.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::daemon::{Daemon, evenkeel, runs, signal};
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::{eventually, pace, within};

fn main() {
    support::run(tests![
        every_slot_has_its_own_socket_and_the_supervisor_the_same,
        a_killed_worker_loses_no_waiting_connection,
        fifty_kills_in_a_row_lose_only_what_the_killed_held,
        an_empty_slot_is_served_by_a_neighbour,
        counters_survive_their_worker,
        orphans_serve_on_and_then_leave_without_a_reset,
        a_worker_out_of_descriptors_pauses_and_recovers,
        at_its_own_limit_a_worker_leaves_connections_in_the_queue,
        max_connections_holds_over_all_workers,
        more_connections_than_descriptors_allow_is_an_error,
        a_killed_steward_disturbs_nobody_and_comes_back,
        workers_and_steward_give_up_the_user needs ["root"],
        a_port_in_use_is_refused_with_its_holder,
        a_port_that_could_be_shared_is_refused_too,
        share_ports_starts_beside_another_program,
        a_low_port_without_permission_names_the_capability needs ["root"],
        a_second_daemon_on_the_same_control_socket_is_refused,
        a_file_where_the_control_socket_is_to_be_is_left_alone,
        ready_means_that_every_worker_accepts_on_every_listener,
        a_user_that_does_not_exist_is_a_configuration_error,
        workers_inherit_nothing_that_is_not_theirs,
        a_worker_that_says_nothing_has_one_thread,
        a_busy_worker_waits_for_its_turn,
        a_policy_that_somebody_chose_stays,
    ])
}

const IDENTIFY: &str =
    "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"identify\"\n";

fn identify(workers: usize) -> Daemon {
    Daemon::ready(&format!("[daemon]\nworkers = {workers}\n{IDENTIFY}"))
}

fn echo_daemon(workers: usize) -> Daemon {
    Daemon::ready(&format!("[daemon]\nworkers = {workers}\n{}", IDENTIFY.replace("identify", "echo")))
}

/// Waits until a slot's second worker accepts.
#[track_caller]
fn wait_replaced(daemon: &Daemon, slot: usize) {
    eventually("a new worker", || {
        // One document: the old worker's end may come between two.
        let worker = daemon.worker(slot);
        worker.restarts == 1 && worker.state == "ready"
    });
}

/// The slot that answered.
fn slot_of(stream: &mut TcpStream) -> std::io::Result<usize> {
    let mut line = Vec::new();
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&line).into_owned();
    let slot = line.split_once("slot=").and_then(|(_, rest)| rest.split(' ').next()).expect("a slot");
    Ok(slot.parse().expect("a number"))
}

/// Inodes of the sockets that a process has open.
fn sockets_of(pid: u32) -> BTreeSet<String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("a living process");
    let links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    links
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_string()))
        .collect()
}

/// Inodes of the sockets that listen at a port.
fn listening(port: u16) -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/net/tcp").expect("the table");
    let rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
    let here = format!(":{port:04X}");
    rows.filter(|row| row[1].ends_with(&here) && row[3] == "0A").map(|row| row[9].to_string()).collect()
}

fn every_slot_has_its_own_socket_and_the_supervisor_the_same() {
    let daemon = identify(4);
    let all = listening(8080);
    assert_eq!(all.len(), 4);
    assert!(sockets_of(daemon.pid()).is_superset(&all), "the supervisor holds each");
    let mut seen = BTreeSet::new();
    for slot in 0..4 {
        let own: BTreeSet<String> = sockets_of(daemon.worker(slot).pid).intersection(&all).cloned().collect();
        assert_eq!(own.len(), 1, "slot {slot} has one and no sibling's");
        seen.extend(own);
    }
    assert_eq!(seen, all);
}

fn a_killed_worker_loses_no_waiting_connection() {
    let daemon = echo_daemon(2);
    let pid = daemon.worker(1).pid;
    // The supervisor too: it would steer clients away from a stopped worker.
    daemon.signal(Signal::SIGSTOP);
    signal(pid, Signal::SIGSTOP);
    // About 200 of 400 wait at the stopped worker; each has sent already.
    let mut clients: Vec<TcpStream> = (0..400).map(|_| connect(local(8080))).collect();
    for client in &mut clients {
        client.write_all(b"waiting").unwrap();
    }
    let before = daemon.worker(1).accepted;
    signal(pid, Signal::SIGKILL);
    daemon.signal(Signal::SIGCONT);
    for (index, client) in clients.iter_mut().enumerate() {
        let mut answer = [0; 7];
        client.read_exact(&mut answer).unwrap_or_else(|error| panic!("client {index}: {error}"));
        assert_eq!(&answer, b"waiting");
    }
    let waited = daemon.worker(1).accepted - before;
    assert!(waited > 100, "only {waited} connections waited in the killed worker's queue");
    assert_eq!(daemon.listener("front").ended.get("worker_lost"), None);
}

fn fifty_kills_in_a_row_lose_only_what_the_killed_held() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    // Eight slots: fifty deaths in one or two would spend the test in backoff.
    let daemon = Daemon::ready(&format!(
        "[daemon]\nworkers = 8\n{}[[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n",
        IDENTIFY.replace("service = \"identify\"", "upstream = \"back\"")
    ));
    let stop = AtomicBool::new(false);
    let (good, lost) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // A refusal would end the test: nobody may be refused.
                    let mut client = connect(local(8080));
                    for _ in 0..20 {
                        match exchange(&mut client, &[7; 500]) {
                            Ok(answer) => {
                                assert!(answer == [7; 500]);
                                good.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(error) => {
                                assert_ne!(error.kind(), ErrorKind::WouldBlock, "nobody may hang");
                                lost.fetch_add(1, Ordering::Relaxed);
                                break;
                            }
                        }
                    }
                }
            });
        }
        for round in 0..50 {
            let mut pid = 0;
            let slot = round % 8;
            within(Duration::from_secs(20), "the slot is filled again", || {
                let worker = daemon.worker(slot);
                pid = worker.pid;
                worker.state == "ready"
            });
            let before = good.load(Ordering::Relaxed);
            signal(pid, Signal::SIGKILL);
            eventually("traffic goes on", || good.load(Ordering::Relaxed) > before + 20);
        }
        stop.store(true, Ordering::Relaxed);
    });
    within(Duration::from_secs(60), "all slots are filled", || {
        daemon.status().workers.iter().all(|worker| worker.state == "ready")
    });
    let (good, lost) = (good.load(Ordering::Relaxed), lost.load(Ordering::Relaxed));
    let listener = daemon.listener("front");
    let held = listener.ended.get("worker_lost").copied().unwrap_or(0);
    assert_eq!(daemon.status().workers.iter().map(|worker| worker.restarts).sum::<u64>(), 50);
    assert!(good > 1000, "only {good} exchanges");
    assert!(lost <= held, "{lost} clients lost their session, the killed workers held {held}");
    eventually("nothing is left", || daemon.listener("front").active == 0);
    let listener = daemon.listener("front");
    assert_eq!(listener.connections, listener.ended.values().sum::<u64>(), "{:?}", listener.ended);
}

fn an_empty_slot_is_served_by_a_neighbour() {
    let daemon = identify(2);
    // Killed again and again, it waits longer each time.
    within(Duration::from_secs(60), "slot 1 is helped", || {
        let worker = daemon.worker(1);
        if worker.state == "ready" && worker.pid != 0 && runs(worker.pid) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker.pid as i32), Signal::SIGKILL);
        }
        worker.helped_by == Some(0) && worker.state == "backoff"
    });
    // Half of these are steered to the empty slot's queue.
    let begin = Instant::now();
    for _ in 0..60 {
        assert_eq!(slot_of(&mut connect(local(8080))).unwrap(), 0);
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "they waited: {:?}", begin.elapsed());
    within(Duration::from_secs(40), "slot 1 is filled again", || {
        let worker = daemon.worker(1);
        worker.state == "ready" && worker.helped_by.is_none()
    });
    let slots: BTreeSet<usize> = (0..60).map(|_| slot_of(&mut connect(local(8080))).unwrap()).collect();
    // All 60 at one slot by chance: 2 in 2^60.
    assert_eq!(slots.len(), 2);
}

fn counters_survive_their_worker() {
    let text = IDENTIFY.replace("identify", "echo");
    let daemon = Daemon::ready(&format!("[daemon]\nworkers = 1\ncrash_proof = false\n{text}"));
    for _ in 0..100 {
        exchange(&mut connect(local(8080)), b"12345").unwrap();
    }
    let mut held = connect(local(8080));
    exchange(&mut held, b"12345").unwrap();
    eventually("the others have ended", || daemon.listener("front").active == 1);
    daemon.kill_worker(0);
    wait_replaced(&daemon, 0);
    let listener = daemon.listener("front");
    assert_eq!((listener.connections, listener.bytes_in, listener.active), (101, 505, 0));
    assert_eq!(listener.ended.get("worker_lost"), Some(&1));
}

fn orphans_serve_on_and_then_leave_without_a_reset() {
    let config = format!(
        "[daemon]\nworkers = 2\norphan_timeout = \"1500ms\"\ndrain_timeout = \"20s\"\n{}",
        IDENTIFY.replace("identify", "echo")
    );
    let mut daemon = Daemon::ready(&config);
    let workers: Vec<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
    let mut old = connect(local(8080));
    exchange(&mut old, b"before").unwrap();
    daemon.signal(Signal::SIGKILL);
    daemon.wait(Duration::from_secs(5));
    let begin = Instant::now();
    let mut served = 0;
    loop {
        match TcpStream::connect_timeout(&local(8080), Duration::from_secs(10)) {
            Ok(mut client) => {
                client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                assert_eq!(
                    exchange(&mut client, b"orphaned").expect("whoever is let in is served"),
                    b"orphaned"
                );
                served += 1;
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(begin.elapsed() >= Duration::from_millis(1400), "they stopped after {:?}", begin.elapsed());
    assert!(served > 10);
    exchange(&mut old, b"still there").expect("an old session goes on");
    drop(old);
    eventually("the orphans are gone", || !workers.iter().any(|&pid| runs(pid)));
}

/// CPU time of a process, in clock ticks of 10 ms.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn limit_files(pid: u32, count: usize) {
    let done =
        Command::new("prlimit").args(["--pid", &pid.to_string(), &format!("--nofile={count}:")]).status();
    assert!(done.expect("prlimit of util-linux").success());
}

fn a_worker_out_of_descriptors_pauses_and_recovers() {
    let daemon = echo_daemon(1);
    let pid = daemon.worker(0).pid;
    let mut clients: Vec<TcpStream> = (0..5).map(|_| connect(local(8080))).collect();
    for client in &mut clients {
        exchange(client, b"first").unwrap();
    }
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    limit_files(pid, open + 10);
    clients.extend((0..40).map(|_| connect(local(8080))));
    for client in &mut clients[5..] {
        client.write_all(b"later").unwrap();
    }
    eventually("it pauses", || daemon.worker(0).accept_pauses > 2);
    let before = cpu_ticks(pid);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        for client in &mut clients[..5] {
            exchange(client, b"first").expect("sessions that were there go on");
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    assert!(cpu_ticks(pid) - before < 30, "it spins: {} ticks in a second", cpu_ticks(pid) - before);
    let active = daemon.worker(0).active;
    assert!((6..=20).contains(&active), "{active} sessions");
    clients.drain(..5);
    limit_files(pid, 1000);
    for client in &mut clients {
        let mut answer = [0; 5];
        client.read_exact(&mut answer).expect("who waited is served");
        assert_eq!(&answer, b"later");
    }
}

fn at_its_own_limit_a_worker_leaves_connections_in_the_queue() {
    let config = format!("[daemon]\nworkers = 1\n{}", IDENTIFY.replace("identify", "echo"));
    let mut daemon = Daemon::start_with(&config, |command| {
        let program = command.get_program().to_owned();
        let arguments: Vec<_> = command.get_args().map(|a| a.to_owned()).collect();
        let environment: Vec<_> =
            command.get_envs().filter_map(|(k, v)| Some((k.to_owned(), v?.to_owned()))).collect();
        let folder = environment.iter().find(|(k, _)| k == "NOTIFY_SOCKET").expect("set").1.clone();
        let log = fs::File::create(std::path::Path::new(&folder).with_file_name("log")).unwrap();
        *command = Command::new("prlimit");
        command.arg("--nofile=200").arg(program).args(arguments).envs(environment).stderr(log);
    });
    daemon.wait_ready();
    let mut clients: Vec<TcpStream> = (0..150).map(|_| connect(local(8080))).collect();
    for client in &mut clients {
        client.write_all(b"hello").unwrap();
    }
    eventually("it is full", || daemon.worker(0).accept_pauses > 2);
    let active = daemon.worker(0).active;
    assert!((50..80).contains(&active), "{active} of (200 - reserve) / 2");
    // Each that ends lets in one that waits.
    while let Some(mut client) = clients.pop() {
        client.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        let mut answer = [0; 5];
        if client.read_exact(&mut answer).is_err() {
            clients.insert(0, client);
        }
    }
}

fn max_connections_holds_over_all_workers() {
    let config =
        format!("[daemon]\nworkers = 4\nmax_connections = 20\n{}", IDENTIFY.replace("identify", "echo"));
    let daemon = Daemon::ready(&config);
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = connect(local(8080));
        exchange(&mut client, b"x").unwrap();
        clients.push(client);
    }
    let mut waiting = connect(local(8080));
    waiting.write_all(b"y").unwrap();
    eventually("somebody pauses", || daemon.status().workers.iter().any(|w| w.accept_pauses > 0));
    assert_eq!(daemon.listener("front").active, 20);
    clients.pop();
    let mut answer = [0];
    waiting.read_exact(&mut answer).expect("the place that became free is used");
}

fn more_connections_than_descriptors_allow_is_an_error() {
    let mut daemon =
        Daemon::start(&format!("[daemon]\nworkers = 1\nmax_connections = 500000000\n{IDENTIFY}"));
    assert_eq!(daemon.wait(Duration::from_secs(10)).code(), Some(78), "{}", daemon.log());
    daemon.says("max_connections = 500000000, but");
}

fn a_killed_steward_disturbs_nobody_and_comes_back() {
    let mut daemon = echo_daemon(2);
    let workers: BTreeSet<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
    let mut client = connect(local(8080));
    for _ in 0..5 {
        let mut steward = None;
        eventually("a steward", || {
            steward = daemon.children().into_iter().find(|pid| !workers.contains(pid));
            steward.is_some()
        });
        signal(steward.expect("waited for"), Signal::SIGKILL);
        exchange(&mut client, b"undisturbed").unwrap();
        exchange(&mut connect(local(8080)), b"undisturbed").unwrap();
        assert_eq!(daemon.status().workers.len(), 2);
    }
    drop(client);
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait(Duration::from_secs(10)).success());
}

fn workers_and_steward_give_up_the_user() {
    let config = format!(
        "[daemon]\nworkers = 2\nuser = \"nobody\"\n{}",
        IDENTIFY.replace("127.0.0.1:8080", "127.0.0.1:80")
    );
    let daemon = Daemon::ready(&config);
    let uids = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find(|line| line.starts_with("Uid:")).unwrap().to_string()
    };
    assert_eq!(uids(daemon.pid()), "Uid:\t0\t0\t0\t0");
    let children = daemon.children();
    assert_eq!(children.len(), 3);
    for pid in children {
        assert_eq!(uids(pid), "Uid:\t65534\t65534\t65534\t65534");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(
            status.contains("CapEff:\t0000000000000000") && status.contains("NoNewPrivs:\t1"),
            "{status}"
        );
    }
    daemon.kill_worker(0);
    wait_replaced(&daemon, 0);
    assert!(uids(daemon.worker(0).pid).contains("65534"));
    for _ in 0..20 {
        slot_of(&mut connect(local(80))).unwrap();
    }
}

fn a_port_in_use_is_refused_with_its_holder() {
    let _holder = TcpListener::bind("127.0.0.1:8080").unwrap();
    let mut daemon = Daemon::start(&format!("[daemon]\nworkers = 2\n{IDENTIFY}"));
    assert_eq!(daemon.wait(Duration::from_secs(10)).code(), Some(69));
    let log = daemon.log();
    assert!(log.contains("listener \"front\": 127.0.0.1:8080/tcp"), "{log}");
    assert!(log.contains(&format!("pid {}", std::process::id())), "{log}");
}

fn a_port_that_could_be_shared_is_refused_too() {
    let first = identify(1);
    let mut second = Daemon::start(&format!("[daemon]\nworkers = 1\n{IDENTIFY}"));
    assert_eq!(second.wait(Duration::from_secs(10)).code(), Some(69));
    let log = second.log();
    assert!(log.contains(&format!("pid {}", first.pid())), "{log}");
    assert_eq!(listening(8080).len(), 1);
}

fn share_ports_starts_beside_another_program() {
    let _first = identify(1);
    let _second = Daemon::ready(&format!("[daemon]\nworkers = 1\nshare_ports = true\n{IDENTIFY}"));
    assert_eq!(listening(8080).len(), 2);
    for _ in 0..20 {
        slot_of(&mut connect(local(8080))).unwrap();
    }
}

fn a_low_port_without_permission_names_the_capability() {
    let config = format!("[daemon]\nworkers = 1\n{}", IDENTIFY.replace("8080", "81"));
    let mut daemon = Daemon::start_with(&config, |command| {
        let folder = command.get_envs().find(|(key, _)| *key == "NOTIFY_SOCKET").and_then(|(_, value)| value);
        let folder = std::path::Path::new(folder.expect("set")).parent().expect("a folder");
        fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        std::os::unix::process::CommandExt::uid(command, 65534);
    });
    assert_eq!(daemon.wait(Duration::from_secs(10)).code(), Some(77), "{}", daemon.log());
    daemon.says("CAP_NET_BIND_SERVICE");
}

fn a_second_daemon_on_the_same_control_socket_is_refused() {
    let first = identify(1);
    let path = first.folder().join("second.toml");
    let text =
        format!("[daemon]\ncontrol_socket = {:?}\n{}", first.socket(), IDENTIFY.replace("8080", "8081"));
    fs::write(&path, text).unwrap();
    let second = evenkeel(&["run", "-c", path.to_str().unwrap()]);
    assert_eq!(second.status.code(), Some(69));
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains(&format!("another evenkeel (pid {})", first.pid())), "{text}");
    assert_eq!(first.status().pid, first.pid(), "the first is not disturbed");
}

fn a_file_where_the_control_socket_is_to_be_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (file, config) = (folder.path().join("precious"), folder.path().join("evenkeel.toml"));
    fs::write(&file, "keep me").unwrap();
    fs::write(&config, format!("[daemon]\ncontrol_socket = {file:?}\n{IDENTIFY}")).unwrap();
    let refused = evenkeel(&["run", "-c", config.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("precious") && text.contains("not a socket"), "{text}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "keep me");
}

fn ready_means_that_every_worker_accepts_on_every_listener() {
    let config = format!(
        "[daemon]\nworkers = 4\n{IDENTIFY}{}",
        IDENTIFY.replace("front", "other").replace("8080", "8081")
    );
    for _ in 0..5 {
        let daemon = Daemon::ready(&config);
        assert_eq!((listening(8080).len(), listening(8081).len()), (4, 4));
        assert!(daemon.status().workers.iter().all(|worker| worker.state == "ready"));
    }
}

fn a_user_that_does_not_exist_is_a_configuration_error() {
    let mut daemon = Daemon::start(&format!("[daemon]\nuser = \"nobody-of-that-name\"\n{IDENTIFY}"));
    assert_eq!(daemon.wait(Duration::from_secs(10)).code(), Some(78));
    daemon.says("user \"nobody-of-that-name\" does not exist");
}

fn workers_inherit_nothing_that_is_not_theirs() {
    let daemon = identify(3);
    for slot in 0..3 {
        let pid = daemon.worker(slot).pid;
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
        assert!(!environment.contains("NOTIFY_SOCKET"));
        let fds: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .flatten()
            .filter_map(|fd| Some(fs::read_link(fd.path()).ok()?.display().to_string()))
            .collect();
        // Its listener and its channel; anything else would be a ghost.
        assert_eq!(fds.iter().filter(|fd| fd.starts_with("socket:")).count(), 2, "{fds:?}");
        assert!(!fds.iter().any(|fd| fd.contains("control.lock")), "{fds:?}");
    }
}

/// A second one makes each of its system calls dearer.
fn a_worker_that_says_nothing_has_one_thread() {
    let daemon = Daemon::ready(
        "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"echo\"\n",
    );
    exchange(&mut connect(local(8080)), b"served").expect("it serves");
    for worker in daemon.status().workers {
        let threads = fs::read_dir(format!("/proc/{}/task", worker.pid)).expect("a living process").count();
        assert_eq!(threads, 1, "worker {}", worker.slot);
    }
}

fn a_busy_worker_waits_for_its_turn() {
    if pace::policy(std::process::id()) != libc::SCHED_OTHER {
        support::skip("somebody chose another policy for the tests");
    }
    let daemon = echo_daemon(1);
    pace::goes_with_the_load(&[daemon.worker(0).pid], local(8080));
}

/// With so little to do a worker would take another one.
fn a_policy_that_somebody_chose_stays() {
    let config = format!("[daemon]\nworkers = 1\n{}", IDENTIFY.replace("identify", "echo"));
    let mut daemon = Daemon::start_under(&config, &["chrt", "--batch", "0"], |_| ());
    daemon.wait_ready();
    let pid = daemon.worker(0).pid;
    let mut client = connect(local(8080));
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        exchange(&mut client, b"now and then").expect("an answer");
        assert_eq!(pace::policy(pid), libc::SCHED_BATCH);
        std::thread::park_timeout(Duration::from_millis(20));
    }
}
