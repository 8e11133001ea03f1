//! UDP through the daemon: servers, addresses, sizes, bursts, and what other
//! programs make of it.

mod support;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use evenkeel::sys::datagram::{Outgoing, Sender};
use nix::sys::signal::Signal;
use support::daemon::{Daemon, signal};
use support::datagrams::{
    UDP_FRONT, ask, client, config, forward, front, named_server, receive, receive_waiting, send, try_ask,
    udp_server,
};
use support::servers::local;
use support::{eventually, pattern, within};

fn main() {
    support::run(tests![
        four_workers_serve_four_thousand_clients_each_by_one_server,
        replies_leave_from_the_very_address_that_was_asked,
        every_ipv6_address_answers_for_itself needs ["ip"],
        another_user_cannot_bind_our_port,
        every_size_passes_whole,
        bursts_pass_whole_and_in_order,
        many_answers_to_one_question_arrive_apart_and_in_order,
        a_way_that_cannot_cut_gets_datagrams_one_by_one needs ["ip"],
        services_answer_by_themselves,
        servers_are_told_the_client_in_front_of_every_datagram,
        a_full_receive_buffer_is_counted,
        balancing_is_by_flow_and_weight,
        tcp_clients_keep_their_server_by_source_hash,
        a_name_server_loses_no_answer needs ["dnsperf", "nsd"],
        iperf_loses_nothing_but_at_full_buffers needs ["iperf3"],
    ])
}

/// A chi-square test at p = 0.0001: it fails by chance once in ten thousand
/// runs, where the kernel's hash is fair.
fn four_workers_serve_four_thousand_clients_each_by_one_server() {
    evenkeel::sys::process::raise_file_limit().unwrap();
    let servers = ["a ", "b ", "c "].map(|name| named_server("127.0.0.1:0", name));
    let daemon = forward(4, "", &servers.each_ref().map(|(address, _)| *address));
    let clients: Vec<UdpSocket> = (0..4000).map(|_| client("127.0.0.1:0")).collect();
    let chosen = Mutex::new(HashMap::<u8, usize>::new());
    std::thread::scope(|scope| {
        for part in clients.chunks(1000) {
            let chosen = &chosen;
            scope.spawn(move || {
                for socket in part {
                    let name = ask(socket, front(), b"which?")[0];
                    for round in 0..4u8 {
                        let question = [&[round][..], &pattern(usize::from(round), 200)].concat();
                        let answer = ask(socket, front(), &question);
                        assert_eq!((answer[0], &answer[2..]), (name, &question[..]));
                    }
                    *chosen.lock().unwrap().entry(name).or_default() += 1;
                }
            });
        }
    });
    // The last answers are counted a moment after they were sent.
    let out = || daemon.listener("front").flows.expect("a udp listener has flows").datagrams_out;
    eventually("every answer is counted", || out() == 20_000);
    let listener = daemon.listener("front");
    let flows = listener.flows.clone().expect("a udp listener has flows");
    assert_eq!((listener.connections, listener.active, flows.opened), (4000, 4000, 4000));
    assert_eq!((flows.datagrams_in, flows.datagrams_out, flows.moved), (20_000, 20_000, 0));
    assert_eq!(listener.bytes_out, listener.bytes_in + 2 * 20_000);
    assert!(listener.dropped.is_empty(), "{:?}", listener.dropped);
    assert!(listener.spread.p_value > 0.0001, "{:?}", listener.spread);
    // Round robin, begun at different places by four workers.
    for count in chosen.lock().unwrap().values() {
        assert!(count.abs_diff(4000 / 3) <= 8, "{:?}", chosen.lock());
    }
    // Every flow has a port of its own towards its server.
    let ports: HashSet<SocketAddr> = servers
        .iter()
        .flat_map(|(_, seen)| seen.lock().unwrap().iter().map(|s| s.0).collect::<Vec<_>>())
        .collect();
    assert_eq!(ports.len(), 4000);
}

fn replies_leave_from_the_very_address_that_was_asked() {
    let (server, seen) = named_server("127.0.0.1:0", "");
    let text = config(2, "", "round-robin", &[server]).replace("127.0.0.1:5300", "0.0.0.0:5300");
    let daemon = Daemon::ready(&text);
    let socket = client("127.0.0.1:0");
    for _ in 0..3 {
        for host in ["127.0.0.1", "127.0.0.2", "127.0.0.3"] {
            // `ask` claims that the answer comes from there.
            ask(&socket, format!("{host}:5300").parse().unwrap(), host.as_bytes());
        }
    }
    assert_eq!(daemon.listener("front").connections, 3, "one client at three addresses is three flows");
    let ports: HashSet<SocketAddr> = seen.lock().unwrap().iter().map(|(from, _)| *from).collect();
    assert_eq!(ports.len(), 3);
}

fn every_ipv6_address_answers_for_itself() {
    for address in ["fd00::1", "fd00::2"] {
        run("ip", &["-6", "address", "add", &format!("{address}/128"), "dev", "lo", "nodad"]);
    }
    let (server, _) = named_server("[::1]:0", "six ");
    let text = config(2, "", "round-robin", &[server]).replace("127.0.0.1:5300", "[::]:5300");
    let daemon = Daemon::ready(&text);
    let socket = client("[::1]:0");
    for host in ["::1", "fd00::1", "fd00::2", "fd00::1"] {
        let server = format!("[{host}]:5300").parse().unwrap();
        assert_eq!(ask(&socket, server, b"?"), b"six ?");
    }
    assert_eq!(daemon.listener("front").connections, 3);
}

fn another_user_cannot_bind_our_port() {
    let uids = fs::read_to_string("/proc/self/uid_map").unwrap();
    if uids.split_whitespace().nth(2) == Some("1") {
        support::skip("this namespace knows one user");
    }
    let (server, _) = named_server("127.0.0.1:0", "");
    let _daemon = forward(2, "", &[server]);
    let results = evenkeel::sys::isolated::in_child(Duration::from_secs(5), || {
        nix::unistd::setgid(65534.into()).unwrap();
        nix::unistd::setuid(65534.into()).unwrap();
        let try_bind = |reuse_address: bool, reuse_port: bool, address: &str| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
            socket.set_reuse_address(reuse_address).unwrap();
            socket.set_reuse_port(reuse_port).unwrap();
            let address: SocketAddr = address.parse().unwrap();
            socket.bind(&address.into()).map_or_else(|e| e.raw_os_error().unwrap_or(0) as u8, |()| 0)
        };
        let options = [(true, false), (false, true), (true, true)];
        let addresses = ["127.0.0.1:5300", "0.0.0.0:5300"];
        addresses.iter().flat_map(|a| options.map(|(ra, rp)| try_bind(ra, rp, a))).collect()
    });
    assert_eq!(results.unwrap(), [libc_eaddrinuse(); 6]);
    let socket = client("127.0.0.1:0");
    (0..50).for_each(|_| drop(ask(&socket, front(), b"still ours")));
}

fn libc_eaddrinuse() -> u8 {
    nix::errno::Errno::EADDRINUSE as i32 as u8
}

fn every_size_passes_whole() {
    let (server, seen) = named_server("127.0.0.1:0", "");
    let daemon = forward(1, "", &[server]);
    let socket = client("127.0.0.1:0");
    let sizes =
        [0, 1, 2, 3, 63, 64, 65, 511, 512, 1199, 1200, 1471, 1472, 1473, 9000, 32_768, 65_506, 65_507];
    let steps = (0..65_507).step_by(997);
    for size in sizes.into_iter().chain(steps) {
        let bytes = pattern(size, size);
        assert!(ask(&socket, front(), &bytes) == bytes, "{size} bytes came back changed");
    }
    assert!(seen.lock().unwrap().iter().any(|(_, bytes)| bytes.is_empty()));
    assert!(daemon.listener("front").dropped.is_empty());
}

/// Sixteen datagrams of 1,200 bytes and a shorter one, in one call.
fn burst(socket: &UdpSocket, to: SocketAddr) -> Vec<u8> {
    let bytes = pattern(0, 16 * 1200 + 100);
    let item = Outgoing { head: &[], bytes: &bytes, to: Some(to), from: None, segment: Some(1200) };
    Sender::default().send(socket, [item], |_, result| result.expect("the kernel cuts datagrams"));
    bytes
}

fn has_no_offloads() -> bool {
    let missing = !evenkeel::sys::host::udp_offloads().is_ok_and(|can| can == (true, true));
    if missing {
        println!("SKIPPED: this kernel has no UDP offloads");
    }
    missing
}

fn bursts_pass_whole_and_in_order() {
    if has_no_offloads() {
        return;
    }
    let (server, seen) = named_server("127.0.0.1:0", "");
    let daemon = forward(1, "", &[server]);
    let socket = client("127.0.0.1:0");
    for _ in 0..20 {
        let bytes = burst(&socket, front());
        let got: Vec<Vec<u8>> = (0..17).map(|_| receive(&socket).expect("each comes back").0).collect();
        assert!(got.concat() == bytes && got.iter().take(16).all(|datagram| datagram.len() == 1200));
    }
    assert!(seen.lock().unwrap().iter().all(|(_, bytes)| bytes.len() == 1200 || bytes.len() == 100));
    eventually("every datagram is counted", || {
        let flows = daemon.listener("front").flows.unwrap();
        (flows.datagrams_in, flows.datagrams_out, flows.offload_failures) == (340, 340, 0)
    });
}

/// The first answer is read alone, what comes unasked in batches that the
/// kernel may have joined, and a worker that takes over goes on with that.
fn many_answers_to_one_question_arrive_apart_and_in_order() {
    if has_no_offloads() {
        return;
    }
    let server = client("127.0.0.1:0");
    let daemon = forward(1, "", &[server.local_addr().unwrap()]);
    let socket = client("127.0.0.1:0");
    for round in 0..4u8 {
        socket.send_to(b"?", front()).unwrap();
        let flow = receive(&server).expect("the server is asked").1;
        let singles: Vec<Vec<u8>> = (0..20).map(|at| vec![round ^ at; usize::from(at)]).collect();
        for bytes in &singles {
            server.send_to(bytes, flow).unwrap();
        }
        let bytes = burst(&server, flow);
        let got: Vec<Vec<u8>> = (0..37).map(|_| receive(&socket).expect("each comes").0).collect();
        assert!(got[..20] == singles && got[20..].concat() == bytes);
        assert!(got[20..36].iter().all(|datagram| datagram.len() == 1200));
        if round == 1 {
            let out = support::daemon::evenkeel(&["reload", "--socket", daemon.socket().to_str().unwrap()]);
            assert!(out.status.success(), "{out:?}");
        }
    }
    let listener = daemon.listener("front");
    assert!(listener.dropped.is_empty(), "{:?}", listener.dropped);
    assert_eq!(listener.flows.unwrap().opened, 1);
}

fn a_way_that_cannot_cut_gets_datagrams_one_by_one() {
    if has_no_offloads() {
        return;
    }
    // A route that is too narrow for the parts makes UDP_SEGMENT fail.
    run(
        "ip",
        &["route", "replace", "local", "127.9.9.9", "dev", "lo", "table", "local", "mtu", "lock", "1000"],
    );
    let (server, seen) = udp_server("127.9.9.9:0", |_| None);
    let daemon = forward(1, "", &[server]);
    let socket = client("127.0.0.1:0");
    for round in 1..=3 {
        let bytes = burst(&socket, front());
        eventually("all arrive", || seen.lock().unwrap().len() == 17 * round);
        let got: Vec<Vec<u8>> =
            seen.lock().unwrap()[17 * (round - 1)..].iter().map(|s| s.1.clone()).collect();
        assert!(got.concat() == bytes);
    }
    let listener = daemon.listener("front");
    assert_eq!(listener.flows.unwrap().offload_failures, 1, "it is tried once a socket");
    assert!(listener.dropped.is_empty());
    assert_eq!(daemon.log().matches("UDP_SEGMENT").count(), 1);
}

fn services_answer_by_themselves() {
    let listener = |name: &str, port: u16, service: &str| {
        format!(
            "[[listener]]\nname = \"{name}\"\nmode = \"udp\"\nbind = \"0.0.0.0:{port}\"\nservice = \"{service}\"\n"
        )
    };
    let text = format!(
        "[daemon]\nworkers = 1\n{}{}{}",
        listener("e", 5301, "echo"),
        listener("i", 5302, "identify"),
        listener("d", 5303, "discard")
    );
    let daemon = Daemon::ready(&text);
    let socket = client("127.0.0.1:0");
    assert_eq!(ask(&socket, "127.0.0.2:5301".parse().unwrap(), b"hello"), b"hello");
    assert_eq!(ask(&socket, local(5301), b""), b"");
    let line = format!("evenkeel listener=i slot=0 pid={} generation=1\n", daemon.worker(0).pid);
    for _ in 0..2 {
        let answer = String::from_utf8(ask(&socket, local(5302), b"hello")).unwrap();
        assert_eq!(answer, format!("{line}hello"));
    }
    socket.send_to(b"hello", local(5303)).unwrap();
    eventually("it was read", || daemon.listener("d").flows.unwrap().datagrams_in == 1);
    assert!(receive_waiting(&socket).is_empty());
    let counts = ["e", "i", "d"].map(|name| daemon.listener(name).connections);
    assert_eq!(counts, [2, 1, 1]);
    // What does not fit with the line in front is dropped and counted.
    socket.send_to(&vec![0; 65_507], local(5302)).unwrap();
    eventually("it is counted", || daemon.listener("i").dropped.get("too_long") == Some(&1));
}

fn servers_are_told_the_client_in_front_of_every_datagram() {
    let (server, seen) = udp_server("127.0.0.1:0", |bytes| Some(bytes[28..].to_vec()));
    let text = config(1, "", "round-robin", &[server]).replace("balance", "send_proxy = \"v2\"\nbalance");
    let daemon = Daemon::ready(&text);
    let socket = client("127.0.0.1:0");
    let port = socket.local_addr().unwrap().port().to_be_bytes();
    let header =
        [&b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\x7f\0\0\x01\x7f\0\0\x01"[..], &port, &5300u16.to_be_bytes()]
            .concat();
    for question in [&b"one"[..], b"two", b""] {
        assert_eq!(ask(&socket, front(), question), question);
    }
    if !has_no_offloads() {
        let bytes = burst(&socket, front());
        let got: Vec<Vec<u8>> = (0..17).map(|_| receive(&socket).expect("each comes back").0).collect();
        assert!(got.concat() == bytes);
    }
    assert!(seen.lock().unwrap().iter().all(|(_, bytes)| bytes.starts_with(&header)));
    socket.send_to(&vec![0; 65_500], front()).unwrap();
    eventually("no room for the header", || daemon.listener("front").dropped.get("too_long") == Some(&1));
}

fn a_full_receive_buffer_is_counted() {
    let (server, _) = named_server("127.0.0.1:0", "");
    let text = config(1, "", "round-robin", &[server])
        .replace("[listener.udp]", "receive_buffer = \"8KiB\"\n[listener.udp]");
    let daemon = Daemon::ready(&text);
    let socket = client("127.0.0.1:0");
    let pid = daemon.worker(0).pid;
    signal(pid, Signal::SIGSTOP);
    send(&socket, &[0; 1000], 100);
    signal(pid, Signal::SIGCONT);
    eventually("every datagram is accounted for", || {
        let listener = daemon.listener("front");
        let dropped = listener.dropped.get("receive_buffer").copied().unwrap_or(0);
        dropped > 0 && listener.flows.unwrap().datagrams_in + dropped == 100
    });
}

fn balancing_is_by_flow_and_weight() {
    let servers = ["a", "b"].map(|name| named_server("127.0.0.1:0", name).0);
    for balance in ["round-robin", "least-connections", "two-choices"] {
        let text = config(2, "", balance, &servers);
        let text = text.replace(
            &format!("address = \"{}\"", servers[1]),
            &format!("address = \"{}\"\nweight = 3", servers[1]),
        );
        let daemon = Daemon::ready(&text);
        let clients: Vec<UdpSocket> = (0..80).map(|_| client("127.0.0.1:0")).collect();
        let to_b = clients.iter().filter(|socket| ask(socket, front(), b"?")[0] == b'b').count();
        let slack = if balance == "two-choices" { 8 } else { 2 };
        assert!(to_b.abs_diff(60) <= slack, "{balance}: {to_b} of 80");
        let active: Vec<u64> =
            daemon.status().upstreams[0].servers.iter().map(|server| server.active).collect();
        assert_eq!(active, [80 - to_b as u64, to_b as u64]);
    }
}

fn tcp_clients_keep_their_server_by_source_hash() {
    use std::io::Read;
    let serve = |name: &'static [u8]| {
        support::servers::tcp_server("127.0.0.1:0", move |mut stream| {
            std::io::Write::write_all(&mut stream, name)
        })
        .0
    };
    let servers = [serve(b"a"), serve(b"b"), serve(b"c")];
    let text =
        config(4, "", "source-hash", &servers).replace("\"udp\"", "\"tcp\"").replace("[listener.udp]", "");
    let _daemon = Daemon::ready(&text);
    let mut names = HashSet::new();
    for last in 1..=40 {
        let chosen: HashSet<u8> = (0..4)
            .map(|_| {
                let socket =
                    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.bind(&SocketAddr::from(([127, 0, 3, last], 0)).into()).unwrap();
                socket.connect(&front().into()).unwrap();
                let mut byte = [0];
                std::net::TcpStream::from(socket).read_exact(&mut byte).unwrap();
                byte[0]
            })
            .collect();
        assert_eq!(chosen.len(), 1, "one client has one server");
        names.extend(chosen);
    }
    assert_eq!(names.len(), 3);
}

fn a_name_server_loses_no_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let zone =
        "$ORIGIN test.\n@ 60 SOA ns a. 1 60 60 60 60\n@ 60 NS ns\nns 60 A 127.0.0.1\n* 60 A 192.0.2.1\n";
    fs::write(path("zone"), zone).unwrap();
    let text = format!(
        "server:\n ip-address: 127.0.0.1@5353\n username: \"\"\n zonesdir: \"\"\n database: \"\"\n pidfile: \"\"\n \
         rrl-ratelimit: 0\n xfrdfile: \"{}\"\n zonelistfile: \"{}\"\nremote-control:\n control-enable: no\n\
         zone:\n name: test.\n zonefile: \"{}\"\n",
        path("xfrd"),
        path("list"),
        path("zone")
    );
    fs::write(path("nsd.conf"), text).unwrap();
    let queries: String = (0..500).map(|i| format!("host{i}.test. A\n")).collect();
    fs::write(path("queries"), queries).unwrap();
    let mut nsd =
        Command::new("nsd").args(["-d", "-c", &path("nsd.conf")]).stderr(Stdio::null()).spawn().unwrap();
    let daemon = forward(4, "replies = 1", &["127.0.0.1:5353".parse().unwrap()]);
    let probe = client("127.0.0.1:0");
    probe.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02ns\x04test\x00\x00\x01\x00\x01";
    within(Duration::from_secs(20), "the name server answers", || {
        try_ask(&probe, front(), question).is_some()
    });
    let out = Command::new("dnsperf")
        .args(["-s", "127.0.0.1", "-p", "5300", "-d", &path("queries"), "-l", "5", "-c", "50", "-q", "50"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let _ = nsd.kill();
    let _ = nsd.wait();
    assert!(text.contains("Queries lost:         0 "), "{text}");
    println!("{text}");
    assert!(daemon.listener("front").flows.unwrap().finished > 1000);
}

/// Datagrams that the kernel dropped at full receive buffers, in this network.
fn full_buffers() -> u64 {
    let text = fs::read_to_string("/proc/net/snmp").unwrap();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("Udp:"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    let column = rows[0].iter().position(|name| *name == "RcvbufErrors").unwrap();
    rows[1][column].parse().unwrap()
}

fn iperf_loses_nothing_but_at_full_buffers() {
    let mut server =
        Command::new("iperf3").args(["-s", "-1", "-p", "5201"]).stdout(Stdio::null()).spawn().unwrap();
    let text = format!(
        "[daemon]\nworkers = 2\n{UDP_FRONT}bind = \"127.0.0.1:5300\"\nreceive_buffer = \"8MiB\"\n\
         [[listener]]\nname = \"control\"\nmode = \"tcp\"\nupstream = \"back\"\nbind = \"127.0.0.1:5300\"\n\
         [[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"127.0.0.1:5201\"\n"
    );
    let daemon = Daemon::ready(&text);
    // It serves one client only, so a connection cannot tell.
    let listens = |table: &str| {
        let rows = fs::read_to_string(table).unwrap_or_default();
        rows.lines().any(|row| row.contains(":1451 ") && row.contains(" 0A "))
    };
    eventually("iperf3 listens", || listens("/proc/net/tcp") || listens("/proc/net/tcp6"));
    let out = Command::new("iperf3")
        .args(["-c", "127.0.0.1", "-p", "5300", "-u", "-b", "50M", "-l", "1200", "-t", "3", "-J"])
        .output()
        .unwrap();
    let _ = server.kill();
    let _ = server.wait();
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let sum = &report["end"]["sum"];
    assert!(sum["packets"].as_u64().is_some_and(|packets| packets > 10_000), "{report}");
    // Receivers that get no CPU lose some, at a full buffer; nobody else may.
    let lost = sum["lost_packets"].as_u64().expect("a number");
    assert!(lost <= full_buffers(), "{} at full buffers, {sum}", full_buffers());
    assert_eq!(daemon.listener("front").dropped.get("to_server"), None);
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}
