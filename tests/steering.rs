//! Steering by the real daemon: what each way promises, with and without the
//! right to load programs, while workers come and go.

mod support;

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use evenkeel::sys::process::{pin_to_cpu, usable_cpu_numbers};
use nix::sys::signal::Signal;
use socket2::{Domain, SockAddr, Socket, Type};
use support::daemon::{Daemon, signal};
use support::{eventually, within};

fn main() {
    support::run(tests![
        hash_spreads_by_the_tables_shares needs ["ebpf"],
        a_source_keeps_its_slot needs ["ebpf"],
        kill_9_moves_no_other_sources_slot needs ["ebpf"],
        cpu_steers_to_the_slots_of_the_clients_cpu needs ["ebpf"],
        load_aware_evens_out_what_is_open needs ["ebpf"],
        load_aware_avoids_busy_workers needs ["ebpf"],
        every_address_of_a_listener_is_steered needs ["ebpf"],
        a_stopped_worker_gets_nothing_new_and_nobody_is_refused needs ["ebpf"],
        a_slot_that_backs_off_gets_nothing_new_and_nobody_is_refused needs ["ebpf"],
        cap_bpf_alone_is_enough needs ["ebpf", "setpriv"],
        without_the_right_classic_bpf_keeps_the_promise,
        without_the_right_hash_is_the_kernels_and_still_leaves_out_who_is_away,
        without_the_right_load_aware_says_that_it_is_hash,
        without_the_right_cpu_steers_all_the_same,
        a_pinned_worker_stays_on_its_cpu,
        udp_goes_by_source_by_flow_and_at_random needs ["ebpf"],
        udp_by_cpu_goes_to_the_slots_of_the_clients_cpu needs ["ebpf"],
        udp_load_aware_takes_new_flows_from_a_busy_worker needs ["ebpf"],
    ])
}

fn config(workers: usize, steering: &str) -> String {
    format!(
        "[daemon]\nworkers = {workers}\nhang_timeout = \"1m\"\npin_workers = {}\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\n\
         bind = \"127.0.0.1:8080\"\nservice = \"identify\"\nsteering = \"{steering}\"\n",
        steering == "cpu"
    )
}

/// One connection from an address; the stream and the slot that answered.
#[track_caller]
fn open(from: IpAddr, to: SocketAddr) -> (TcpStream, usize) {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.bind(&SockAddr::from(SocketAddr::new(from, 0))).unwrap();
    socket.connect(&SockAddr::from(to)).expect("nobody is refused");
    // Closed by a reset, so that no port stays in TIME_WAIT.
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut line = [0; 200];
    let count = stream.read(&mut line).expect("an answer");
    let line = String::from_utf8_lossy(&line[..count]).into_owned();
    let slot = line.split(" slot=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    (stream, slot.unwrap_or_else(|| panic!("no identity: {line:?}")))
}

#[track_caller]
fn slot_of(from: impl Into<IpAddr>) -> usize {
    open(from.into(), support::servers::local(8080)).1
}

/// So many connections one after the other; how many each slot answered.
#[track_caller]
fn counts(slot_count: usize, count: usize) -> Vec<u64> {
    let mut counts = vec![0; slot_count];
    (0..count).for_each(|_| counts[slot_of([127, 0, 0, 1])] += 1);
    counts
}

fn sources() -> impl Iterator<Item = IpAddr> {
    (1..=60).map(|i| IpAddr::from([127, 0, i, 1]))
}

#[track_caller]
fn slots_of_sources() -> HashMap<IpAddr, usize> {
    sources().map(|from| (from, slot_of(from))).collect()
}

fn shares(daemon: &Daemon) -> Vec<f64> {
    daemon.listener("front").shares
}

#[track_caller]
fn wait_for_share(daemon: &Daemon, slot: usize, present: bool) {
    within(Duration::from_secs(20), "the slot's share", || (shares(daemon)[slot] > 0.0) == present);
}

fn active(daemon: &Daemon) -> String {
    daemon.listener("front").steering_active
}

/// Chi-square at p = 0.0001: fails by chance once in ten thousand runs.
fn hash_spreads_by_the_tables_shares() {
    // Three slots: 342, 341 and 341 of 1024 buckets.
    let daemon = Daemon::ready(&config(3, "hash"));
    assert_eq!(active(&daemon), "ebpf-table");
    eventually("all slots have their share", || shares(&daemon).iter().all(|share| *share > 0.3));
    let counts = counts(3, 6000);
    let spread = daemon.listener("front").spread;
    assert_eq!(spread.per_slot, counts, "the slots say the same as the counters");
    assert!(spread.p_value > 0.0001, "{spread:?}");
}

fn a_source_keeps_its_slot() {
    let daemon = Daemon::ready(&config(4, "source"));
    assert_eq!(active(&daemon), "ebpf-table");
    let first = slots_of_sources();
    // Four slots of which one gets none of 60: once in 8 million runs.
    assert_eq!(first.values().collect::<HashSet<_>>().len(), 4);
    for _ in 0..3 {
        assert_eq!(slots_of_sources(), first);
    }
}

fn kill_9_moves_no_other_sources_slot() {
    let daemon = Daemon::ready(&config(4, "source"));
    let before = slots_of_sources();
    for round in 0..4 {
        let killed = round % 4;
        daemon.kill_worker(killed);
        // At once, while the slot is empty or already filled again, and later.
        for (from, slot) in slots_of_sources() {
            assert!(slot == before[&from] || before[&from] == killed, "{from} moved from {}", before[&from]);
        }
        wait_for_share(&daemon, killed, true);
        eventually("the worker is back", || daemon.worker(killed).state == "ready");
        assert_eq!(slots_of_sources(), before, "everybody is where it was");
    }
}

fn cpu_steers_to_the_slots_of_the_clients_cpu() {
    let cpus = usable_cpu_numbers();
    let daemon = Daemon::ready(&config(2 * cpus.len(), "cpu"));
    assert_eq!(active(&daemon), "ebpf-table");
    by_cpu(&cpus);
}

/// On loopback a packet is received on the CPU that sent it.
fn by_cpu(cpus: &[usize]) {
    for (at, cpu) in cpus.iter().enumerate() {
        pin_to_cpu(*cpu).unwrap();
        let counts = counts(2 * cpus.len(), 200);
        let own: Vec<u64> = counts.iter().skip(at).step_by(cpus.len()).copied().collect();
        assert_eq!(own.iter().sum::<u64>(), 200, "CPU {cpu}: {counts:?}");
        // Both slots of the CPU: one gets none of 200 once in 2^199 runs.
        assert!(own.iter().all(|count| *count > 0), "CPU {cpu}: {counts:?}");
    }
}

fn load_aware_evens_out_what_is_open() {
    let hold = |steering: &str| {
        let daemon = Daemon::ready(&config(4, steering));
        let _open: Vec<TcpStream> =
            (0..200).map(|_| open([127, 0, 0, 1].into(), support::servers::local(8080)).0).collect();
        let listener = daemon.listener("front");
        assert_eq!((listener.active, listener.steering_active.as_str()), (200, "ebpf-table"));
        *listener.active_per_slot.iter().max().unwrap()
    };
    let (hash, load_aware) = (hold("hash"), hold("load-aware"));
    println!("most of 200 open ones on one of 4 slots: hash {hash}, load-aware {load_aware}");
    // 50 is even. The hash has a standard deviation of 6, two choices of 1 or
    // 2; a worker that has a slow turn may be passed over for a while.
    assert!(load_aware <= 60, "{load_aware}");
}

fn load_aware_avoids_busy_workers() {
    let mut daemon = Daemon::start_with(&config(4, "load-aware"), |command| {
        command.env("EVENKEEL_TEST_BUSY_SLOTS", "0,1:50ms");
    });
    daemon.wait_ready();
    // Until it was found out who is busy.
    within(Duration::from_secs(60), "both busy slots are eased", || {
        counts(4, 10);
        shares(&daemon)[..2].iter().all(|share| *share < 0.1)
    });
    let counts = counts(4, 300);
    println!("slots 0 and 1 busy: {counts:?}");
    // Where nobody looked, half. Eased, both of two choices fall on these
    // slots once in a thousand times, and each is tried again after some
    // seconds; 30 leaves room for a few such trials.
    assert!(counts[0] + counts[1] <= 30, "{counts:?}");
    assert!(counts[2] + counts[3] >= 270 && counts[2].abs_diff(counts[3]) < 100, "{counts:?}");
}

fn every_address_of_a_listener_is_steered() {
    let text = config(4, "source").replace("\"127.0.0.1:8080\"", "[\"127.0.0.1:8080\", \"[::1]:8080\"]");
    let daemon = Daemon::ready(&text);
    assert_eq!(active(&daemon), "ebpf-table");
    let to: SocketAddr = "[::1]:8080".parse().unwrap();
    let six: HashSet<usize> = (0..20).map(|_| open(to.ip(), to).1).collect();
    let four: HashSet<usize> = (0..20).map(|_| slot_of([127, 0, 0, 7])).collect();
    assert_eq!((six.len(), four.len()), (1, 1));
}

fn a_stopped_worker_gets_nothing_new_and_nobody_is_refused() {
    let daemon = Daemon::ready(&config(3, "hash"));
    let pid = daemon.worker(1).pid;
    signal(pid, Signal::SIGSTOP);
    wait_for_share(&daemon, 1, false);
    let stopped = counts(3, 600);
    assert_eq!(stopped[1], 0);
    signal(pid, Signal::SIGCONT);
    wait_for_share(&daemon, 1, true);
    let both = counts(3, 600);
    assert!(both[1] > 0, "none of 600: {both:?}");
    // The time without it is not held against the spread (p = 0.0001).
    let spread = daemon.listener("front").spread;
    assert!(spread.p_value > 0.0001, "{spread:?}");
}

/// Kills a slot's worker until it backs off for a second or more.
fn crash_loop(daemon: &Daemon, slot: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "it never backs off for long");
        let worker = daemon.worker(slot);
        if worker.restarts >= 7 && worker.state == "backoff" {
            return;
        }
        if worker.pid != 0 && worker.state != "backoff" {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker.pid as i32), Signal::SIGKILL);
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn a_slot_that_backs_off_gets_nothing_new_and_nobody_is_refused() {
    let daemon = Daemon::ready(&config(3, "hash"));
    crash_loop(&daemon, 2);
    wait_for_share(&daemon, 2, false);
    let restarts = daemon.worker(2).restarts;
    let mut before = counts(3, 50);
    while daemon.worker(2).restarts == restarts && daemon.worker(2).state == "backoff" {
        assert_eq!(before[2], 0);
        before = counts(3, 50);
        if before[2] > 0 {
            // Only where it came back meanwhile.
            eventually("it is back", || daemon.worker(2).state == "ready");
        }
    }
    wait_for_share(&daemon, 2, true);
    assert!(counts(3, 600)[2] > 0);
}

/// Lets another user reach what the daemon needs.
fn give_to_nobody(command: &mut Command) {
    let config = command.get_args().last().expect("the configuration's path").to_owned();
    let folder = Path::new(&config).parent().unwrap();
    chown(folder, Some(NOBODY), Some(NOBODY)).unwrap();
    let everyone = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(folder.join("notify"), everyone).unwrap();
}

const NOBODY: u32 = 65_534;

/// A daemon that may load no program. Where the tests themselves may not, it
/// is one already.
fn unprivileged(workers: usize, steering: &str) -> Daemon {
    let mut daemon = Daemon::start_with(&config(workers, steering), |command| {
        if evenkeel::sys::bpf::is_permitted() {
            give_to_nobody(command);
            std::os::unix::process::CommandExt::uid(command, NOBODY);
        }
    });
    daemon.wait_ready();
    daemon
}

fn cap_bpf_alone_is_enough() {
    let nobody = NOBODY.to_string();
    let setpriv = [
        "setpriv",
        "--reuid",
        &nobody,
        "--regid",
        &nobody,
        "--clear-groups",
        "--inh-caps",
        "-all,+bpf",
        "--ambient-caps",
        "-all,+bpf",
        "--bounding-set",
        "-all,+bpf",
    ];
    let mut daemon = Daemon::start_under(&config(3, "source"), &setpriv, give_to_nobody);
    daemon.wait_ready();
    assert_eq!(active(&daemon), "ebpf-table");
    assert_eq!(slots_of_sources(), slots_of_sources());
    let workers = daemon.status().workers;
    for pid in std::iter::once(daemon.pid()).chain(workers.iter().map(|worker| worker.pid)) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let bounding = status.lines().find(|line| line.starts_with("CapBnd:")).unwrap();
        assert!(bounding.ends_with("0000008000000000"), "CAP_BPF alone: {bounding}");
    }
}

fn without_the_right_classic_bpf_keeps_the_promise() {
    let daemon = unprivileged(4, "source");
    assert_eq!(active(&daemon), "cbpf");
    let log = daemon.log();
    assert_eq!(log.matches("AmbientCapabilities=CAP_BPF").count(), 1, "{log}");
    let before = slots_of_sources();
    // Four slots of which one gets none of 60: once in 8 million runs.
    assert_eq!(before.values().collect::<HashSet<_>>().len(), 4);
    let killed = 1;
    crash_loop(&daemon, killed);
    wait_for_share(&daemon, killed, false);
    for (from, slot) in slots_of_sources() {
        assert!(slot == before[&from] || before[&from] == killed, "{from} moved from {}", before[&from]);
    }
    wait_for_share(&daemon, killed, true);
    eventually("the worker is back", || daemon.worker(killed).state == "ready");
    assert_eq!(slots_of_sources(), before, "everybody is where it was");
}

fn without_the_right_hash_is_the_kernels_and_still_leaves_out_who_is_away() {
    let daemon = unprivileged(3, "hash");
    assert_eq!(active(&daemon), "hash");
    let pid = daemon.worker(1).pid;
    // The supervisor's own child may be stopped by us alone, who are root.
    signal(pid, Signal::SIGSTOP);
    wait_for_share(&daemon, 1, false);
    assert_eq!(active(&daemon), "cbpf");
    let counts_without = counts(3, 600);
    // 300 each, with a standard deviation of 12: by chance once in a million.
    assert!(counts_without[1] == 0 && counts_without[0].abs_diff(300) < 60, "{counts_without:?}");
    signal(pid, Signal::SIGCONT);
    wait_for_share(&daemon, 1, true);
    eventually("the kernel's hash is back", || active(&daemon) == "hash");
    assert!(counts(3, 600)[1] > 0);
}

fn without_the_right_load_aware_says_that_it_is_hash() {
    let daemon = unprivileged(2, "load-aware");
    let listener = daemon.listener("front");
    assert_eq!((listener.steering.as_str(), listener.steering_active.as_str()), ("load-aware", "hash"));
    assert_eq!(listener.steering_in_force(), "hash");
    daemon.says("front by load-aware");
    assert_eq!(counts(2, 100).iter().sum::<u64>(), 100);
}

fn without_the_right_cpu_steers_all_the_same() {
    let cpus = usable_cpu_numbers();
    let mut daemon = Daemon::start_with(&config(2 * cpus.len(), "cpu"), |command| {
        command.env("EVENKEEL_NO_EBPF", "1");
    });
    daemon.wait_ready();
    assert_eq!(active(&daemon), "cbpf");
    by_cpu(&cpus);
}

/// The slots that answered twenty datagrams, from one port or from twenty.
fn slots_of_datagrams(steering: &str, one_port: bool, cpu: Option<usize>) -> HashSet<usize> {
    let daemon = Daemon::ready(&config(4, steering).replace("\"tcp\"", "\"udp\""));
    assert_eq!(active(&daemon), "ebpf-table");
    // After the start: the daemon would be kept to that CPU as well.
    cpu.into_iter().for_each(|cpu| pin_to_cpu(cpu).unwrap());
    let socket = || {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    };
    let one = socket();
    let ask = |_| {
        let other = socket();
        let client = if one_port { &one } else { &other };
        client.send_to(b"?", "127.0.0.1:8080").unwrap();
        let mut answer = [0; 200];
        let count = client.recv(&mut answer).expect("an answer");
        let text = String::from_utf8_lossy(&answer[..count]).into_owned();
        text.split(" slot=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    (0..20).map(ask).collect()
}

/// Twenty draws over four slots are one slot once in 10^11 times.
fn udp_goes_by_source_by_flow_and_at_random() {
    assert_eq!(slots_of_datagrams("hash", true, None).len(), 1);
    assert!(slots_of_datagrams("hash", false, None).len() > 1);
    assert_eq!(slots_of_datagrams("load-aware", true, None).len(), 1);
    assert_eq!(slots_of_datagrams("source", false, None).len(), 1);
    assert!(slots_of_datagrams("random", true, None).len() > 1);
}

fn a_pinned_worker_stays_on_its_cpu() {
    let cpus = usable_cpu_numbers();
    let daemon = Daemon::ready(&config(cpus.len() + 1, "cpu"));
    for worker in daemon.status().workers {
        let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid)).unwrap();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        assert_eq!(allowed.trim(), cpus[worker.slot % cpus.len()].to_string());
    }
}

/// UDP is steered with every datagram, so by load it is the table that is
/// refilled: a slow slot keeps a thirtieth of its part.
fn udp_load_aware_takes_new_flows_from_a_busy_worker() {
    let text = config(4, "load-aware").replace("\"tcp\"", "\"udp\"");
    let mut daemon = Daemon::start_with(&text, |command| {
        command.env("EVENKEEL_TEST_BUSY_SLOTS", "0:50ms");
    });
    daemon.wait_ready();
    let ask = |count: usize| {
        for _ in 0..count {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket.send_to(b"?", support::servers::local(8080)).unwrap();
            socket.recv_from(&mut [0; 500]).expect("an answer");
        }
    };
    within(Duration::from_secs(60), "the busy slot is eased", || {
        ask(10);
        shares(&daemon)[0] < 0.05
    });
    let before = daemon.listener("front").spread.per_slot;
    ask(200);
    let after = daemon.listener("front").spread.per_slot;
    let new: Vec<u64> = before.iter().zip(&after).map(|(before, after)| after - before).collect();
    // Due about 2 of 200 (a fair part would be 50); it is tried again after
    // some seconds, for which 20 leaves room.
    assert!(new[0] <= 20, "{new:?}");
    assert!(new[1..].iter().all(|count| *count > 20), "{new:?}");
}

fn udp_by_cpu_goes_to_the_slots_of_the_clients_cpu() {
    // The first CPU only: there is no way back to all of them for the start of
    // another daemon. Over loopback a datagram is received by the CPU that
    // sent it; steered by chance, 20 would all fit once in 2^20 runs.
    let cpus = usable_cpu_numbers();
    let slots = slots_of_datagrams("cpu", false, Some(cpus[0]));
    assert!(slots.iter().all(|slot| slot % cpus.len() == 0), "{slots:?}");
}
