//! Who may come in and how much of it: access lists and limits, over all slots.

mod support;

use std::fmt::Write as _;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use support::daemon::Daemon;
use support::datagrams::{client, named_server, try_ask};
use support::servers::local;
use support::{eventually, within};

fn main() {
    support::run(tests![
        a_source_has_so_many_sessions_over_four_workers,
        a_dead_workers_sessions_count_no_more,
        limits_hold_over_reloads_and_scaling,
        a_source_begins_so_many_sessions_a_second_over_four_workers,
        addresses_of_an_ipv6_network_are_one_source needs ["ip"],
        a_full_listener_lets_clients_wait_and_another_listener_serves,
        five_thousand_prefixes_are_obeyed,
        a_reload_changes_who_may_come,
        flows_are_limited_and_denied_too,
    ])
}

/// A daemon that says who it is on 127.0.0.1:8080 (and, for IPv6, on [::]:8080).
fn config(workers: usize, tables: &str) -> String {
    format!(
        "[daemon]\nworkers = {workers}\ncrash_proof = false\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\n\
         bind = [\"127.0.0.1:8080\", \"[::]:8080\"]\nservice = \"identify\"\n{tables}\n"
    )
}

/// A session from this address, or `None` where it is turned away.
#[track_caller]
fn enter(source: &str) -> Option<TcpStream> {
    // Where the reset is very quick, the connect is told of it.
    let mut stream = try_begin(source, local(8080))?;
    let_in(&mut stream).then_some(stream)
}

#[track_caller]
fn begin(source: &str, to: SocketAddr) -> TcpStream {
    try_begin(source, to).expect("no reset yet")
}

#[track_caller]
fn try_begin(source: &str, to: SocketAddr) -> Option<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.bind(&format!("{source}:0").parse::<SocketAddr>().unwrap().into()).unwrap();
    match socket.connect(&to.into()) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
        result => result.expect("a connection"),
    }
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    Some(stream)
}

#[track_caller]
fn let_in(stream: &mut TcpStream) -> bool {
    match stream.read_exact(&mut [0; 9]) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
        Err(error) => panic!("{error}"),
    }
}

/// Enters so many times; how many are let in.
#[track_caller]
fn enter_many(source: &str, count: usize) -> Vec<TcpStream> {
    (0..count).filter_map(|_| enter(source)).collect()
}

#[track_caller]
fn wait_for_active(daemon: &Daemon, count: u64) {
    eventually(&format!("{count} sessions live"), || daemon.listener("front").active == count);
}

fn a_source_has_so_many_sessions_over_four_workers() {
    let daemon = Daemon::ready(&config(4, "[listener.limits]\nper_source = 12"));
    let mut first = enter_many("127.0.0.1", 40);
    assert_eq!(first.len(), 12);
    // Everybody else is let in.
    assert_eq!(enter_many("127.0.0.2", 12).len(), 12);
    let listener = daemon.listener("front");
    assert_eq!(listener.dropped.get("per_source"), Some(&28));
    assert_eq!(listener.connections, 52);
    assert!(listener.spread.per_slot.iter().filter(|&&count| count > 0).count() > 1, "{:?}", listener.spread);
    // The second source's sessions are gone by now, or going.
    wait_for_active(&daemon, 12);
    first.truncate(7);
    wait_for_active(&daemon, 7);
    assert_eq!(enter_many("127.0.0.1", 9).len(), 5);
}

fn a_dead_workers_sessions_count_no_more() {
    let daemon = Daemon::ready(&config(2, "[listener.limits]\nper_source = 6"));
    for round in 1..=3 {
        let sessions = enter_many("127.0.0.1", 8);
        assert_eq!(sessions.len(), 6, "round {round}");
        for slot in 0..2 {
            daemon.kill_worker(slot);
            eventually("the slot is filled", || {
                let worker = daemon.worker(slot);
                worker.restarts == round && worker.state == "ready"
            });
        }
        wait_for_active(&daemon, 0);
        drop(sessions);
    }
}

fn limits_hold_over_reloads_and_scaling() {
    let daemon = Daemon::ready(&config(2, "[listener.limits]\nper_source = 6\nmax_connections = 8"));
    let mut sessions = enter_many("127.0.0.1", 8);
    assert_eq!(sessions.len(), 6);
    for round in 0..3 {
        daemon.ask("reload").expect("a reload");
        assert!(enter("127.0.0.1").is_none(), "round {round}");
        // Those that were handed over are let go where they are now.
        drop(sessions.pop());
        wait_for_active(&daemon, 5);
        sessions.push(enter("127.0.0.1").expect("there is room for one"));
    }
    let text = daemon.succeed(&["scale", "4"]);
    assert!(enter("127.0.0.1").is_none(), "{text}");
    let text = daemon.succeed(&["scale", "1"]);
    assert!(enter("127.0.0.1").is_none(), "{text}");
    drop(sessions);
    wait_for_active(&daemon, 0);
    assert_eq!(enter_many("127.0.0.1", 8).len(), 6);
}

fn a_source_begins_so_many_sessions_a_second_over_four_workers() {
    const RATE: usize = 50;
    let daemon = Daemon::ready(&config(4, &format!("[listener.limits]\nrate_per_source = {RATE}")));
    let begun = Instant::now();
    let mut tried = 0;
    let mut admitted = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        tried += 1;
        admitted += usize::from(enter("127.0.0.1").is_some());
    }
    // So many at once and then so many a second; each slot may see the others a
    // moment late.
    let most = RATE * (begun.elapsed().as_secs() as usize + 2) + 4;
    assert!((RATE..=most).contains(&admitted), "{admitted} of {tried}, at most {most}");
    assert!(tried > most, "the machine is too slow to tell: {tried} tries");
    assert!(enter("127.0.0.2").is_some());
    let refused = daemon.listener("front").dropped.get("rate_per_source").copied();
    assert_eq!(refused, Some((tried - admitted) as u64));
    within(Duration::from_secs(20), "its time has come again", || enter("127.0.0.1").is_some());
}

fn addresses_of_an_ipv6_network_are_one_source() {
    for address in ["2001:db8:0:1::1/64", "2001:db8:0:1::2/64", "2001:db8:0:2::1/64"] {
        let done = Command::new("ip").args(["-6", "address", "add", address, "dev", "lo", "nodad"]).status();
        assert!(done.unwrap().success());
    }
    let _daemon = Daemon::ready(&config(4, "[listener.limits]\nper_source = 2"));
    let to: SocketAddr = "[2001:db8:0:1::1]:8080".parse().unwrap();
    let enter = |source: &str| {
        let mut stream = begin(source, to);
        let_in(&mut stream).then_some(stream)
    };
    let _one = enter("[2001:db8:0:1::1]").expect("the first");
    let _two = enter("[2001:db8:0:1::2]").expect("the second");
    assert!(enter("[2001:db8:0:1::2]").is_none());
    assert!(enter("[2001:db8:0:2::1]").is_some());
}

fn a_full_listener_lets_clients_wait_and_another_listener_serves() {
    let other =
        "[[listener]]\nname = \"other\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8081\"\nservice = \"identify\"\n";
    let text = config(4, &format!("[listener.limits]\nmax_connections = 10\n{other}"));
    let daemon = Daemon::ready(&text);
    let mut inside = enter_many("127.0.0.1", 10);
    assert_eq!(inside.len(), 10);
    let mut waiting: Vec<TcpStream> = (0..5).map(|_| begin("127.0.0.1", local(8080))).collect();
    // Time for a worker to look at its queue again.
    eventually("accepting has paused", || {
        daemon.status().workers.iter().map(|worker| worker.accept_pauses).sum::<u64>() > 4
    });
    for stream in &waiting {
        stream.set_nonblocking(true).unwrap();
        assert_eq!(stream.peek(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        stream.set_nonblocking(false).unwrap();
    }
    let mut elsewhere = begin("127.0.0.1", local(8081));
    assert!(let_in(&mut elsewhere));
    assert_eq!(daemon.listener("front").active, 10);
    // Each that leaves makes room for one that waits.
    inside.clear();
    assert!(waiting.iter_mut().all(let_in));
    let listener = daemon.listener("front");
    assert!(listener.dropped.is_empty() && listener.connections == 15, "{listener:?}");
    daemon.says("listener front has all of its max_connections = 10");
}

fn five_thousand_prefixes_are_obeyed() {
    let mut prefixes = String::new();
    for i in 0..5_000u32 {
        let [a, b, c, _] = (0x0a00_0000 + (i << 10)).to_be_bytes();
        write!(prefixes, "\"{a}.{b}.{c}.0/24\",").unwrap();
    }
    let access = format!(
        "[listener.access]\nallow = [\"127.0.0.0/8\", \"::1\"]\ndeny = [{prefixes} \"127.0.3.0/24\", \"127.0.5.7\"]"
    );
    let daemon = Daemon::ready(&config(4, &access));
    for source in ["127.0.0.1", "127.0.2.255", "127.0.4.0", "127.0.5.6", "127.0.5.8"] {
        assert!(enter(source).is_some(), "{source}");
    }
    for source in ["127.0.3.0", "127.0.3.255", "127.0.5.7"] {
        assert!(enter(source).is_none(), "{source}");
    }
    let mut v6 = begin("[::1]", "[::1]:8080".parse().unwrap());
    assert!(let_in(&mut v6));
    assert_eq!(daemon.listener("front").dropped.get("denied"), Some(&3));
}

fn a_reload_changes_who_may_come() {
    let daemon = Daemon::ready(&config(2, "[listener.access]\ndeny = [\"127.0.0.2\"]"));
    let _stays = enter("127.0.0.1").expect("not denied");
    assert!(enter("127.0.0.2").is_none());
    daemon.rewrite(&config(2, "[listener.access]\nallow = [\"127.0.0.2\"]"));
    daemon.ask("reload").expect("a reload");
    assert!(enter("127.0.0.1").is_none());
    assert!(enter("127.0.0.2").is_some());
    let listener = daemon.listener("front");
    assert_eq!(listener.dropped.get("denied"), Some(&2));
    // Who was in already stays.
    eventually("one session lives", || daemon.listener("front").active == 1);
}

fn flows_are_limited_and_denied_too() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let listener = |name: &str, port: u16, tables: &str| {
        format!(
            "[[listener]]\nname = \"{name}\"\nmode = \"udp\"\nbind = \"127.0.0.1:{port}\"\nupstream = \"back\"\n{tables}\n"
        )
    };
    let text = format!(
        "[daemon]\nworkers = 4\n{}{}{}[[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n",
        listener(
            "some",
            5301,
            "[listener.limits]\nper_source = 3\n[listener.access]\ndeny = [\"127.0.0.9\"]"
        ),
        listener("slow", 5302, "[listener.limits]\nrate_per_source = 2"),
        listener(
            "full",
            5303,
            "[listener.limits]\nmax_connections = 2\n[listener.udp]\nidle_timeout = \"4s\""
        ),
    );
    let daemon = Daemon::ready(&text);
    let counts = |name: &str, reason: &str| {
        let listener = daemon.listener(name);
        (listener.connections, listener.dropped.get(reason).copied().unwrap_or(0))
    };
    let sockets: Vec<_> = (0..6).map(|_| client("127.0.0.1:0")).collect();
    // One after the other: workers that admit at once may pass a limit.
    let one_by_one = |name: &str, port: u16, reason: &str| {
        for (socket, sent) in sockets.iter().zip(1..) {
            assert_eq!(socket.send_to(b"x", local(port)).unwrap(), 1);
            eventually("it is let in or not", || {
                let (opened, dropped) = counts(name, reason);
                opened + dropped == sent
            });
        }
    };
    one_by_one("some", 5301, "per_source");
    assert_eq!(counts("some", "per_source"), (3, 3));
    assert!(try_ask(&client("127.0.0.2:0"), local(5301), b"x").is_some());
    // A flow that there is goes on.
    sockets.iter().for_each(|socket| assert_eq!(socket.send_to(b"y", local(5301)).unwrap(), 1));
    eventually("three go on", || counts("some", "per_source") == (4, 6));
    eventually("two answers each", || {
        daemon.listener("some").flows.is_some_and(|flows| flows.datagrams_out == 3 * 2 + 1)
    });
    client("127.0.0.9:0").send_to(b"x", local(5301)).unwrap();
    eventually("it is denied", || counts("some", "denied") == (4, 1));

    let begun = Instant::now();
    let many: Vec<_> = (0..60).map(|_| client("127.0.0.1:0")).collect();
    many.iter().for_each(|socket| assert_eq!(socket.send_to(b"x", local(5302)).unwrap(), 1));
    eventually("sixty are let in or not", || {
        let (opened, dropped) = counts("slow", "rate_per_source");
        opened + dropped == 60
    });
    let most = 2 * (begun.elapsed().as_secs() + 2) + 3;
    assert!((2..=most).contains(&counts("slow", "rate_per_source").0));

    one_by_one("full", 5303, "max_connections");
    assert_eq!(counts("full", "max_connections"), (2, 4));
    eventually("a flow is over, and another may come", || {
        let socket = client("127.0.0.1:0");
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        try_ask(&socket, local(5303), b"x").is_some()
    });
}
