//! The lives of UDP flows in the daemon: what bounds and ends them, and what
//! becomes of them when servers and workers die or leave.

mod support;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::daemon::{Daemon, signal};
use support::datagrams::{
    ask, client, config, forward, front, let_pass, named_server, receive, receive_waiting, send, udp_server,
};
use support::{eventually, within};

fn main() {
    support::run(tests![
        a_flow_whose_server_dies_moves_at_its_next_datagram,
        a_flood_of_new_clients_harms_no_established_flow,
        a_table_full_of_answered_flows_sheds_new_ones,
        the_daemons_limit_holds_for_flows,
        what_waited_too_long_is_dropped_when_a_new_worker_takes_up_the_socket,
        what_waits_for_a_living_worker_is_never_stale,
        a_late_reply_never_reaches_another_client,
        source_hash_survives_a_killed_worker_and_other_slots_notice_nothing,
        an_empty_slot_is_served_by_its_neighbour_and_given_back,
        flows_go_on_while_the_daemon_leaves,
        a_daemon_without_flows_leaves_at_once,
        reloads_lose_no_answer,
        a_second_signal_leaves_nobody_behind,
        a_flow_ends_after_its_replies,
    ])
}

fn a_flow_whose_server_dies_moves_at_its_next_datagram() {
    let dying = client("127.0.0.1:0");
    let (other, _) = named_server("127.0.0.1:0", "other ");
    let daemon = forward(1, "", &[dying.local_addr().unwrap(), other]);
    let socket = client("127.0.0.1:0");
    socket.send_to(b"1", front()).unwrap();
    let (bytes, flow) = receive(&dying).expect("the first server has the first flow");
    dying.send_to(&[b"dying ", &bytes[..]].concat(), flow).unwrap();
    assert_eq!(receive(&socket).unwrap().0, b"dying 1");
    drop(dying);
    // This one is lost with its server, as UDP may; its refusal is counted.
    socket.send_to(b"2", front()).unwrap();
    eventually("the failure is counted", || daemon.status().upstreams[0].servers[0].failures == 1);
    assert_eq!(receive_waiting(&socket), [[0u8; 0]; 0], "nothing is invented");
    assert_eq!(ask(&socket, front(), b"3"), b"other 3");
    assert_eq!(ask(&socket, front(), b"4"), b"other 4");
    let flows = daemon.listener("front").flows.unwrap();
    assert_eq!((flows.moved, flows.opened, flows.active), (1, 1, 1));
    assert_eq!(daemon.worker(0).restarts, 0);
    let active: Vec<u64> = daemon.status().upstreams[0].servers.iter().map(|server| server.active).collect();
    assert_eq!(active, [0, 1]);
}

/// Sends one datagram each from many addresses that were never seen, not
/// faster than they are read: it is the table that is to be full, not the
/// kernel's buffer.
fn flood(daemon: &Daemon, count: usize) {
    let read = || daemon.listener("front").flows.unwrap().datagrams_in;
    let before = read();
    for i in 0..count {
        if i % 100 == 0 {
            eventually("what was sent is read", || read() == before + i as u64);
        }
        let source =
            UdpSocket::bind(format!("127.{}.{}.{}:0", 1 + i / 40_000, i / 200 % 200, 1 + i % 200)).unwrap();
        source.send_to(b"made up", front()).unwrap();
    }
}

fn a_flood_of_new_clients_harms_no_established_flow() {
    let (server, seen) = udp_server("127.0.0.1:0", |bytes| (bytes != b"made up").then(|| bytes.to_vec()));
    let daemon = forward(2, "max_flows = 1000", &[server]);
    let clients: Vec<UdpSocket> = (0..200).map(|_| client("127.0.0.1:0")).collect();
    clients.iter().for_each(|socket| drop(ask(socket, front(), b"before")));
    flood(&daemon, 20_000);
    for socket in &clients {
        assert_eq!(ask(socket, front(), b"after"), b"after");
    }
    // A client that comes in the middle of it is served too.
    let late = client("127.0.0.1:0");
    assert_eq!(ask(&late, front(), b"late"), b"late");
    let listener = daemon.listener("front");
    let flows = listener.flows.unwrap();
    assert!(flows.active <= 2000 && flows.evicted >= 17_000, "{flows:?}");
    assert_eq!(flows.opened, flows.active + flows.evicted);
    // The flows that were there kept their ports: nobody was pushed out.
    let seen = seen.lock().unwrap();
    let ports = |what: &[u8]| {
        seen.iter().filter(|(_, bytes)| bytes == what).map(|(from, _)| *from).collect::<HashSet<_>>()
    };
    assert_eq!(ports(b"before"), ports(b"after"));
    let lost: Vec<_> = daemon.status().workers.iter().filter(|worker| worker.restarts > 0).cloned().collect();
    assert!(lost.is_empty(), "{lost:?}");
}

fn a_table_full_of_answered_flows_sheds_new_ones() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let daemon = forward(1, "max_flows = 10", &[server]);
    let clients: Vec<UdpSocket> = (0..10).map(|_| client("127.0.0.1:0")).collect();
    clients.iter().for_each(|socket| drop(ask(socket, front(), b"x")));
    let more = client("127.0.0.1:0");
    send(&more, b"x", 5);
    eventually("they are counted", || daemon.listener("front").dropped.get("shed") == Some(&5));
    clients.iter().for_each(|socket| drop(ask(socket, front(), b"x")));
    assert_eq!(daemon.listener("front").flows.unwrap().shed, 5);
    assert!(receive_waiting(&more).is_empty());
}

fn the_daemons_limit_holds_for_flows() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let text = config(1, "", "round-robin", &[server]).replace("[daemon]", "[daemon]\nmax_connections = 5");
    let daemon = Daemon::ready(&text);
    let clients: Vec<UdpSocket> = (0..8).map(|_| client("127.0.0.1:0")).collect();
    clients.iter().take(5).for_each(|socket| drop(ask(socket, front(), b"x")));
    clients.iter().skip(5).for_each(|socket| send(socket, b"x", 1));
    eventually("they are counted", || daemon.listener("front").dropped.get("shed") == Some(&3));
    clients.iter().take(5).for_each(|socket| drop(ask(socket, front(), b"y")));
}

fn what_waited_too_long_is_dropped_when_a_new_worker_takes_up_the_socket() {
    let (server, _) = named_server("127.0.0.1:0", "");
    // As long as a new worker may take to come, on however busy a host; and
    // one that is stopped so long is not to be replaced before.
    let text = config(1, "stale_after = \"3s\"", "round-robin", &[server]);
    let daemon = Daemon::ready(&text.replace("[daemon]\n", "[daemon]\nhang_timeout = \"60s\"\n"));
    let (old, fresh) = (client("127.0.0.1:0"), client("127.0.0.1:0"));
    let pid = daemon.worker(0).pid;
    signal(pid, Signal::SIGSTOP);
    send(&old, b"old", 3);
    let_pass(Duration::from_millis(3_100));
    fresh.send_to(b"fresh", front()).unwrap();
    signal(pid, Signal::SIGKILL);
    assert_eq!(receive(&fresh).expect("what is fresh is answered").0, b"fresh");
    assert_eq!(daemon.listener("front").dropped.get("stale"), Some(&3));
    assert!(receive_waiting(&old).is_empty());
    assert_eq!(ask(&old, front(), b"again"), b"again");
}

fn what_waits_for_a_living_worker_is_never_stale() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let daemon = forward(1, "stale_after = \"100ms\"", &[server]);
    let socket = client("127.0.0.1:0");
    let pid = daemon.worker(0).pid;
    for _ in 0..2 {
        signal(pid, Signal::SIGSTOP);
        socket.send_to(b"patience", front()).unwrap();
        let_pass(Duration::from_millis(300));
        signal(pid, Signal::SIGCONT);
        assert_eq!(receive(&socket).expect("an answer").0, b"patience");
    }
    assert!(daemon.listener("front").dropped.is_empty());
}

/// 45 local ports, of which flows may have 40; ten flows that end unanswered,
/// thirty new ones. Without the quarantine none of the thirty would get one of
/// the ten ports once in a million runs.
fn a_late_reply_never_reaches_another_client() {
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40044").unwrap();
    let server = client("127.0.0.1:6000");
    let daemon =
        forward(1, "idle_timeout = \"300ms\"\nquarantine = \"60s\"", &["127.0.0.1:6000".parse().unwrap()]);
    let clients: Vec<UdpSocket> = (0..41).map(|i| client(&format!("127.0.0.1:{}", 7000 + i))).collect();
    let (early, later) = clients.split_at(10);
    let next = |from: &UdpSocket| {
        from.send_to(b"?", front()).unwrap();
        receive(&server).expect("the server is asked").1
    };
    let old: Vec<SocketAddr> = early.iter().map(next).collect();
    eventually("the first flows are over", || daemon.listener("front").active == 0);
    let new: Vec<SocketAddr> = later[..30].iter().map(next).collect();
    for flow in &old {
        server.send_to(b"late", *flow).unwrap();
    }
    for flow in &new {
        server.send_to(b"right", *flow).unwrap();
    }
    for socket in &later[..30] {
        assert_eq!(receive(socket).expect("its own answer").0, b"right");
    }
    assert!(new.iter().all(|port| !old.contains(port)));
    let flows = daemon.listener("front").flows.unwrap();
    assert_eq!((flows.quarantined, flows.quarantine_cut), (10, 0));
    // The ports are used up: rather an old one early than nobody served.
    next(&later[30]);
    assert_eq!(daemon.listener("front").flows.unwrap().quarantine_cut, 1);
}

fn source_hash_survives_a_killed_worker_and_other_slots_notice_nothing() {
    let servers = ["a", "b", "c"].map(|name| named_server("127.0.0.1:0", name));
    let daemon =
        Daemon::ready(&config(4, "", "source-hash", &servers.each_ref().map(|(address, _)| *address)));
    let clients: Vec<UdpSocket> = (1..=120).map(|i| client(&format!("127.0.1.{i}:0"))).collect();
    let ask_all = || -> Vec<u8> {
        (0u8..).zip(&clients).map(|(number, socket)| ask(socket, front(), &[number])[0]).collect()
    };
    // The ports that each client had towards the servers, by its number.
    let ports = || {
        let mut ports = HashMap::<u8, HashSet<SocketAddr>>::new();
        for (_, seen) in &servers {
            for (from, bytes) in seen.lock().unwrap().iter() {
                ports.entry(bytes[0]).or_default().insert(*from);
            }
        }
        ports
    };
    let before = ask_all();
    assert_eq!(before.iter().collect::<HashSet<_>>().len(), 3, "all servers have clients");
    let slots = daemon.listener("front").active_per_slot;
    daemon.kill_worker(1);
    // What is asked before the new worker is there waits in the kept socket.
    assert_eq!(ask_all(), before);
    let listener = daemon.listener("front");
    assert_eq!(listener.active_per_slot, slots, "flows stay with their slots");
    assert_eq!(listener.ended.get("worker_lost"), None);
    let moved = ports().values().filter(|ports| ports.len() > 1).count() as u64;
    assert_eq!(moved, 0, "clients have another port, and slot 1 had {}", slots[1]);
}

fn an_empty_slot_is_served_by_its_neighbour_and_given_back() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let daemon = forward(2, "", &[server]);
    let clients: Vec<UdpSocket> = (0..60).map(|_| client("127.0.0.1:0")).collect();
    clients.iter().for_each(|socket| drop(ask(socket, front(), b"before")));
    // A worker that dies again and again is started later and later.
    within(Duration::from_secs(60), "the neighbour helps out", || {
        let worker = daemon.worker(1);
        if worker.pid != 0 && worker.state == "ready" {
            // It may be gone already.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker.pid as i32), Signal::SIGKILL);
        }
        worker.helped_by == Some(0)
    });
    clients.iter().for_each(|socket| assert_eq!(ask(socket, front(), b"during"), b"during"));
    within(Duration::from_secs(60), "the slot is filled again", || {
        let worker = daemon.worker(1);
        worker.state == "ready" && worker.helped_by.is_none()
    });
    clients.iter().for_each(|socket| assert_eq!(ask(socket, front(), b"after"), b"after"));
    assert!(daemon.listener("front").dropped.is_empty());
}

/// Most of sixteen workers have none of six flows and are gone at once; were
/// their sockets gone too, the kernel would steer the flows elsewhere.
fn flows_go_on_while_the_daemon_leaves() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let mut daemon = forward(16, "idle_timeout = \"1500ms\"", &[server]);
    let clients: Vec<UdpSocket> = (0..6).map(|_| client("127.0.0.1:0")).collect();
    clients.iter().for_each(|socket| drop(ask(socket, front(), b"before")));
    daemon.signal(Signal::SIGTERM);
    eventually("nothing new is taken, and idle workers are gone", || {
        clients.iter().for_each(|socket| assert_eq!(ask(socket, front(), b"during"), b"during"));
        send(&client("127.0.0.1:0"), b"?", 1);
        let leaving = daemon.listener("front").dropped.get("leaving").is_some_and(|count| *count > 0);
        // With the steward.
        leaving && daemon.children().len() <= 7
    });
    for _ in 0..10 {
        clients.iter().for_each(|socket| assert_eq!(ask(socket, front(), b"still"), b"still"));
    }
    let status = daemon.wait(Duration::from_secs(10));
    assert!(status.success(), "{status}");
    // None that went by itself was taken for a broken one, and replaced.
    assert!(!daemon.log().contains("killed"), "{}", daemon.log());
    assert_eq!(daemon.log().matches("worker ready").count(), 16, "{}", daemon.log());
}

fn a_daemon_without_flows_leaves_at_once() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let mut daemon = forward(2, "", &[server]);
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait(Duration::from_secs(5)).success());
}

/// One worker takes up the very sockets of another: what waits there is
/// answered, and answers that are under way still arrive.
fn reloads_lose_no_answer() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let daemon = forward(3, "", &[server]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let asked = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (stop, asked, daemon) = (&stop, &asked, &daemon);
        for _ in 0..4 {
            scope.spawn(move || {
                let clients: Vec<UdpSocket> = (0..10).map(|_| client("127.0.0.1:0")).collect();
                let mut count = 0u32;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for socket in &clients {
                        count += 1;
                        send(socket, &count.to_be_bytes(), 1);
                        let Some((answer, _)) = support::datagrams::receive(socket) else {
                            panic!("no answer; {:?}", daemon.listener("front"));
                        };
                        assert_eq!(answer, count.to_be_bytes());
                    }
                }
                asked.fetch_add(u64::from(count), std::sync::atomic::Ordering::Relaxed);
            });
        }
        for _ in 0..5 {
            let socket = daemon.socket();
            let out = support::daemon::evenkeel(&["reload", "--socket", socket.to_str().unwrap()]);
            assert!(out.status.success(), "{out:?}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // Nothing that was counted is forgotten with the worker that counted it;
    // the last answers are counted a moment after they were sent.
    let asked = asked.into_inner();
    eventually("every datagram is counted", || {
        let flows = daemon.listener("front").flows.unwrap();
        (flows.datagrams_in, flows.datagrams_out) == (asked, asked)
    });
    let listener = daemon.listener("front");
    assert!(listener.dropped.is_empty(), "{:?}", listener.dropped);
    assert!(listener.connections >= 40);
    // And slot by slot.
    let (total, slots) = (listener.flows.unwrap(), listener.flows_per_slot);
    assert_eq!(slots.len(), 3);
    assert_eq!(slots.iter().map(|slot| slot.flows.datagrams_in).sum::<u64>(), total.datagrams_in);
    assert_eq!(slots.iter().map(|slot| slot.flows.opened).sum::<u64>(), total.opened);
    assert_eq!(slots.iter().map(|slot| slot.bytes_out).sum::<u64>(), listener.bytes_out);
}

fn a_second_signal_leaves_nobody_behind() {
    let (server, _) = named_server("127.0.0.1:0", "");
    for _ in 0..5 {
        let mut daemon = forward(2, "", &[server]);
        let clients: Vec<UdpSocket> = (0..20).map(|_| client("127.0.0.1:0")).collect();
        clients.iter().for_each(|socket| drop(ask(socket, front(), b"x")));
        daemon.signal(Signal::SIGTERM);
        eventually("it leaves", || daemon.log().contains("leaving"));
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(Duration::from_secs(5)).code(), Some(1));
        // The port is free only when every process of the daemon is gone.
        eventually("the port is free", || UdpSocket::bind(front()).is_ok());
    }
}

fn a_flow_ends_after_its_replies() {
    let (server, seen) = named_server("127.0.0.1:0", "");
    let daemon = forward(1, "replies = 2", &[server]);
    let socket = client("127.0.0.1:0");
    for _ in 0..6 {
        ask(&socket, front(), b"?");
    }
    let flows = daemon.listener("front").flows.unwrap();
    assert_eq!((flows.opened, flows.finished, flows.active, flows.quarantined), (3, 3, 0, 0));
    let ports: HashSet<SocketAddr> = seen.lock().unwrap().iter().map(|(from, _)| *from).collect();
    assert!(ports.len() <= 3);
}
