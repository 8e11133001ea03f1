//! UDP flows of a killed worker: the server sees the same port before and
//! after, because its keeper hands them on.

mod support;

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};

use support::crashes::start;
use support::datagrams::{Seen, ask, client, front, named_server, receive};
use support::eventually;

fn main() {
    support::run(tests![
        flows_keep_their_servers_and_ports_over_many_kills,
        what_a_server_sends_while_its_worker_is_dead_arrives,
        the_access_log_tells_of_what_was_before_the_death_too,
    ])
}

fn config(workers: usize, servers: &[SocketAddr]) -> String {
    let servers: String =
        servers.iter().map(|server| format!("[[upstream.server]]\naddress = \"{server}\"\n")).collect();
    format!(
        "[daemon]\nworkers = {workers}\n[[listener]]\nname = \"front\"\nmode = \"udp\"\nupstream = \"back\"\n\
         bind = \"{}\"\n[[upstream]]\nname = \"back\"\n{servers}",
        front()
    )
}

/// The ports of ours that the servers saw, by the client's number, which is
/// the first byte of its datagrams; forgets what they saw.
fn ports(seen: &[&Seen]) -> BTreeMap<u8, Vec<(usize, SocketAddr)>> {
    let mut ports = BTreeMap::<u8, Vec<(usize, SocketAddr)>>::new();
    for (server, seen) in seen.iter().enumerate() {
        for (from, bytes) in seen.lock().unwrap().drain(..) {
            let own = ports.entry(bytes[0]).or_default();
            if !own.contains(&(server, from)) {
                own.push((server, from));
            }
        }
    }
    ports
}

fn ask_all(clients: &[UdpSocket]) {
    for (number, client) in clients.iter().enumerate() {
        let answer = ask(client, front(), &[number as u8, 1, 2, 3]);
        assert!(!answer.is_empty());
    }
}

fn flows_keep_their_servers_and_ports_over_many_kills() {
    let (first, seen_first) = named_server("127.0.0.1:0", "first");
    let (second, seen_second) = named_server("127.0.0.1:0", "second");
    let daemon = start(&config(2, &[first, second]));
    let clients: Vec<UdpSocket> = (0..60).map(|_| client("127.0.0.1:0")).collect();
    ask_all(&clients);
    let seen = [&seen_first, &seen_second];
    let before = ports(&seen);
    assert!(before.len() == 60 && before.values().all(|ports| ports.len() == 1), "{before:?}");
    for kill in 0..10 {
        let slot = kill % 2;
        let old = daemon.kill_worker(slot);
        eventually("the slot is filled again", || {
            ![0, old].contains(&daemon.worker(slot).pid) && daemon.listener("front").active == 60
        });
        ask_all(&clients);
        assert_eq!(ports(&seen), before, "after kill {kill}");
    }
}

fn what_a_server_sends_while_its_worker_is_dead_arrives() {
    let server = client("127.0.0.1:0");
    let daemon = start(&config(1, &[server.local_addr().unwrap()]));
    let client = client("127.0.0.1:0");
    client.send_to(b"question", front()).unwrap();
    let (_, from) = receive(&server).expect("the question");
    server.send_to(b"answer", from).unwrap();
    assert_eq!(receive(&client).expect("an answer").0, b"answer");
    let old = daemon.kill_worker(0);
    // It waits in the flow's socket, which nobody reads.
    server.send_to(b"late answer", from).unwrap();
    eventually("the slot is filled again", || ![0, old].contains(&daemon.worker(0).pid));
    assert_eq!(receive(&client).expect("an answer").0, b"late answer");
}

fn the_access_log_tells_of_what_was_before_the_death_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let (server, _) = named_server("127.0.0.1:0", "server");
    let config = config(1, &[server]).replacen(
        "workers = 1\n",
        &format!("workers = 1\n[log]\naccess = {:?}\n", path.display().to_string()),
        1,
    );
    let ends = "[listener.udp]\nidle_timeout = \"2s\"\n[[upstream]]";
    let config = config.replacen("[[upstream]]", ends, 1);
    let daemon = start(&config);
    let client = client("127.0.0.1:0");
    let answer = ask(&client, front(), b"question");
    for _ in 0..2 {
        let old = daemon.kill_worker(0);
        eventually("the slot is filled again", || ![0, old].contains(&daemon.worker(0).pid));
        ask(&client, front(), b"question");
    }
    eventually("the flow ends", || std::fs::read_to_string(&path).is_ok_and(|text| !text.is_empty()));
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    let told = format!("in={} out={} ", 3 * b"question".len(), 3 * answer.len());
    assert!(text.contains(&told), "{told} is not in {text}");
}
