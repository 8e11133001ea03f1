//! Multicast through the daemon: who gets a group's datagrams, and how often.

mod support;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use evenkeel::sys::listen::{self, MulticastInterface, Options};
use nix::sys::signal::Signal;
use socket2::SockRef;
use support::daemon::{Daemon, signal};
use support::datagrams::{Seen, let_pass, receive, udp_server};
use support::eventually;

fn main() {
    support::run(tests![
        partition_gives_each_datagram_to_exactly_one_worker,
        partition_works_for_ipv6_groups needs ["ip"],
        copy_gives_each_datagram_to_every_worker,
        a_killed_worker_costs_no_datagram_and_doubles_none,
        another_number_of_workers_divides_the_group_anew,
        several_programs_of_one_host_get_the_same_group,
        a_reply_to_a_group_comes_from_an_address_of_the_host,
        a_wildcard_listener_takes_no_group_that_others_joined,
        refused_copies_are_not_counted_as_drops,
    ])
}

const GROUP: &str = "239.1.1.1:5000";
const SOURCES: usize = 40;

fn config(workers: usize, udp: &str, server: SocketAddr) -> String {
    format!(
        "[daemon]\nworkers = {workers}\n[[listener]]\nname = \"group\"\nmode = \"udp\"\nbind = \"{GROUP}\"\n\
         upstream = \"back\"\n[listener.udp]\nmulticast_interface = \"127.0.0.1\"\n{udp}\n\
         [[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n"
    )
}

/// A socket that sends to groups over loopback.
fn source() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    SockRef::from(&socket).set_multicast_if_v4(&Ipv4Addr::LOCALHOST).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

fn sources() -> Vec<UdpSocket> {
    (0..SOURCES).map(|_| source()).collect()
}

/// Every source sends so many datagrams, each different from all others.
fn send_all(sources: &[UdpSocket], to: &str, what: &str, count: usize) {
    for i in 0..count {
        for (number, socket) in sources.iter().enumerate() {
            socket.send_to(format!("{what} {number} {i}").as_bytes(), to).unwrap();
        }
    }
}

/// The same, each round once the one before has come so often: one socket's
/// buffer has to hold what every source sends in a round.
fn send_rounds(seen: &Seen, sources: &[UdpSocket], to: &str, rounds: usize, often: usize) {
    for round in 1..=rounds {
        send_all(sources, to, &format!("round {round}"), 1);
        let come = || times(seen, "round").values().sum::<usize>();
        eventually("the round has come", || come() >= round * SOURCES * often);
    }
    each_came(seen, "round", rounds * SOURCES, often);
}

/// How often each datagram that begins so was seen by the server.
fn times(seen: &Seen, what: &str) -> HashMap<Vec<u8>, usize> {
    let mut times = HashMap::new();
    for (_, bytes) in seen.lock().unwrap().iter().filter(|(_, bytes)| bytes.starts_with(what.as_bytes())) {
        *times.entry(bytes.clone()).or_default() += 1;
    }
    times
}

/// All have come, and, after some time for more, each exactly so often.
#[track_caller]
fn each_came(seen: &Seen, what: &str, datagrams: usize, often: usize) {
    eventually("all have come", || times(seen, what).values().sum::<usize>() >= datagrams * often);
    let_pass(Duration::from_millis(200));
    let times = times(seen, what);
    assert_eq!(times.len(), datagrams);
    let wrong = times.iter().find(|(_, count)| **count != often);
    assert!(wrong.is_none(), "one came otherwise: {wrong:?}");
}

/// That one of four slots gets none of forty sources happens once in 25,000
/// runs.
fn partition_gives_each_datagram_to_exactly_one_worker() {
    let (server, seen) = udp_server("127.0.0.1:0", |_| None);
    let daemon = Daemon::ready(&config(4, "", server));
    let sources = sources();
    send_rounds(&seen, &sources, GROUP, 25, 1);
    let listener = daemon.listener("group");
    assert_eq!(listener.connections, SOURCES as u64, "every source has one flow, in one slot");
    assert!(listener.spread.per_slot.iter().all(|count| *count > 0), "{:?}", listener.spread);
}

fn partition_works_for_ipv6_groups() {
    for arguments in
        ["tuntap add mode tap name tap0", "link set tap0 up", "-6 address add fd00::1/64 dev tap0 nodad"]
    {
        let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
        if !status.success() {
            support::skip("this host makes no tap interfaces");
        }
    }
    let (server, seen) = udp_server("127.0.0.1:0", |_| None);
    let group = "[ff15::1]:5000";
    let text = config(3, "", server).replace(GROUP, group).replace("\"127.0.0.1\"", "\"tap0\"");
    let daemon = Daemon::ready(&text);
    let index = nix::net::if_::if_nametoindex("tap0").unwrap();
    let source = |_| {
        let socket = UdpSocket::bind("[fd00::1]:0").unwrap();
        SockRef::from(&socket).set_multicast_if_v6(index).unwrap();
        socket
    };
    let sources: Vec<UdpSocket> = (0..SOURCES).map(source).collect();
    send_rounds(&seen, &sources, group, 10, 1);
    assert_eq!(daemon.listener("group").connections, SOURCES as u64);
}

fn copy_gives_each_datagram_to_every_worker() {
    let (server, seen) = udp_server("127.0.0.1:0", |_| None);
    let daemon = Daemon::ready(&config(3, "multicast = \"copy\"", server));
    send_rounds(&seen, &sources(), GROUP, 10, 3);
    assert_eq!(daemon.listener("group").spread.per_slot, [SOURCES as u64; 3]);
}

fn a_killed_worker_costs_no_datagram_and_doubles_none() {
    let (server, seen) = udp_server("127.0.0.1:0", |_| None);
    let daemon = Daemon::ready(&config(4, "", server));
    let sources = sources();
    send_all(&sources, GROUP, "before", 2);
    each_came(&seen, "before", 2 * SOURCES, 1);
    let slots = daemon.listener("group").active_per_slot;
    // A stopped worker reads nothing more: what comes until its death and
    // until its successor is there waits in the slot's own queue.
    let pid = daemon.worker(2).pid;
    signal(pid, Signal::SIGSTOP);
    send_all(&sources, GROUP, "stopped", 2);
    signal(pid, Signal::SIGKILL);
    send_all(&sources, GROUP, "dead", 2);
    eventually("the slot is filled again", || {
        let worker = daemon.worker(2);
        worker.pid != pid && worker.state == "ready"
    });
    send_all(&sources, GROUP, "after", 2);
    for what in ["stopped", "dead", "after"] {
        each_came(&seen, what, 2 * SOURCES, 1);
    }
    assert_eq!(daemon.listener("group").active_per_slot, slots, "the shares are as they were");
}

fn another_number_of_workers_divides_the_group_anew() {
    let (server, seen) = udp_server("127.0.0.1:0", |_| None);
    let daemon = Daemon::ready(&config(2, "", server));
    let sources = sources();
    for (round, count) in ["4", "3", "1", "2"].into_iter().enumerate() {
        daemon.change(&["scale", count]);
        let what = format!("scaled {round}");
        send_all(&sources, GROUP, &what, 2);
        each_came(&seen, &what, 2 * SOURCES, 1);
    }
    // To copies and back, by the file.
    let path = daemon.folder().join("evenkeel.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    for (what, multicast, often) in [("copies", "copy", 2), ("shares", "partition", 1)] {
        let text = text.replace("[listener.udp]", &format!("[listener.udp]\nmulticast = \"{multicast}\""));
        std::fs::write(&path, text).unwrap();
        daemon.change(&["reload"]);
        send_all(&sources, GROUP, what, 2);
        each_came(&seen, what, 2 * SOURCES, often);
    }
}

fn several_programs_of_one_host_get_the_same_group() {
    let (one, seen_by_one) = udp_server("127.0.0.1:0", |_| None);
    let (two, seen_by_two) = udp_server("127.0.0.1:0", |_| None);
    let _first = Daemon::ready(&config(2, "", one));
    let _second = Daemon::ready(&config(3, "", two));
    let interface = MulticastInterface::Address(Ipv4Addr::LOCALHOST);
    let other = listen::multicast(GROUP.parse().unwrap(), &interface, None, &Options::default()).unwrap();
    let other = UdpSocket::from(other);
    SockRef::from(&other).set_recv_buffer_size(4 << 20).unwrap();
    send_all(&sources(), GROUP, "all", 3);
    each_came(&seen_by_one, "all", 3 * SOURCES, 1);
    each_came(&seen_by_two, "all", 3 * SOURCES, 1);
    let mut buffer = [0; 100];
    let count = std::iter::from_fn(|| other.recv(&mut buffer).ok()).count();
    assert_eq!(count, 3 * SOURCES);
}

fn a_reply_to_a_group_comes_from_an_address_of_the_host() {
    let (server, _) = udp_server("127.0.0.1:0", |bytes| Some([b"re ", bytes].concat()));
    let _daemon = Daemon::ready(&config(2, "", server));
    let socket = source();
    socket.send_to(b"who?", GROUP).unwrap();
    let (bytes, from) = receive(&socket).expect("an answer");
    assert_eq!((&bytes[..], from), (&b"re who?"[..], "127.0.0.1:5000".parse().unwrap()));
}

fn a_wildcard_listener_takes_no_group_that_others_joined() {
    let (server, seen) = udp_server("127.0.0.1:0", |_| None);
    let text = config(2, "", server).replace(GROUP, "0.0.0.0:5000");
    let daemon = Daemon::ready(&text.replace("multicast_interface = \"127.0.0.1\"", ""));
    let interface = MulticastInterface::Address(Ipv4Addr::LOCALHOST);
    let _other = listen::multicast(GROUP.parse().unwrap(), &interface, None, &Options::default()).unwrap();
    send_all(&sources(), GROUP, "not ours", 2);
    send_all(&sources(), "127.0.0.1:5000", "ours", 2);
    each_came(&seen, "ours", 2 * SOURCES, 1);
    assert_eq!(daemon.listener("group").flows.unwrap().datagrams_in, 2 * SOURCES as u64);
}

fn refused_copies_are_not_counted_as_drops() {
    let (server, seen) = udp_server("127.0.0.1:0", |_| None);
    let daemon = Daemon::ready(&config(4, "", server));
    send_all(&sources(), GROUP, "x", 5);
    each_came(&seen, "x", 5 * SOURCES, 1);
    // The kernel's own counts are looked at every 250 ms.
    let_pass(Duration::from_millis(400));
    assert!(daemon.listener("group").dropped.is_empty(), "{:?}", daemon.listener("group").dropped);
}
