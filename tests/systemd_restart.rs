//! Sockets and sessions over a restart of the service, by systemd's fd store,
//! under a real systemd that is booted for the test.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::clients::{traffic_goes_on, under_traffic};
use support::daemon::signal;
use support::machine::Machine;
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::{datagrams, eventually, pattern, within};

fn main() {
    support::run(tests![
        a_restart_refuses_nobody_and_cuts_nobody needs ["a machine"],
        udp_flows_keep_their_ports_over_restarts needs ["a machine"],
        a_stop_drains needs ["a machine"],
        on_stop_parks_where_systemd_cannot_be_asked needs ["a machine"],
        waiting_connections_outlive_a_killed_supervisor needs ["a machine"],
        what_the_file_wants_no_more_is_closed_and_said needs ["a machine"],
    ])
}

fn config(more: &str, server: &str) -> String {
    format!(
        "[daemon]\nworkers = 2\ndrain_timeout = \"5s\"\n{more}\
         [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"back\"\n\
         [[listener]]\nname = \"datagrams\"\nmode = \"udp\"\nbind = \"127.0.0.1:8081\"\nservice = \"echo\"\n\
         [[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n"
    )
}

/// The server of all tests: known before the machine is booted.
const SERVER: &str = "127.0.0.1:9000";

fn boot(more: &str) -> Machine {
    let machine = Machine::boot(&[("/etc/evenkeel/evenkeel.toml", &config(more, SERVER))]);
    tcp_server(SERVER, echo);
    machine
}

/// Sessions with a count of bytes each, so that a lost or doubled one shows.
struct Long {
    sessions: Vec<(TcpStream, usize)>,
}

impl Long {
    fn open(count: usize) -> Long {
        let mut long = Long { sessions: (0..count).map(|_| (connect(local(8080)), 0)).collect() };
        long.exchange();
        long
    }

    fn send(&mut self) {
        for (session, at) in &mut self.sessions {
            session.write_all(&pattern(*at, 1_000)).expect("a session that was parked takes bytes");
        }
    }

    fn receive(&mut self) {
        for (index, (session, at)) in self.sessions.iter_mut().enumerate() {
            let mut answer = [0; 1_000];
            session.read_exact(&mut answer).unwrap_or_else(|error| panic!("session {index}: {error}"));
            assert!(answer[..] == pattern(*at, 1_000), "session {index}: wrong bytes");
            *at += 1_000;
        }
    }

    fn exchange(&mut self) {
        self.send();
        self.receive();
    }
}

fn a_restart_refuses_nobody_and_cuts_nobody() {
    let machine = boot("");
    machine.systemctl(&["start", "evenkeel"]);
    let mut long = Long::open(500);
    let mut pids = vec![machine.supervisor()];
    let (served, errors) = under_traffic(|served| {
        for _ in 0..3 {
            traffic_goes_on(served);
            // Bytes that are under way while nobody is there.
            long.send();
            machine.systemctl(&["restart", "evenkeel"]);
            pids.push(machine.supervisor());
            long.receive();
            long.exchange();
        }
        traffic_goes_on(served);
    });
    println!("500 sessions and {served} short ones over 3 restarts, {} errors", errors.len());
    assert!(errors.is_empty(), "{} of {served}: {:?}\n{}", errors.len(), errors.first(), machine.log());
    pids.dedup();
    assert_eq!(pids.len(), 4, "it was restarted each time: {pids:?}");
    assert_eq!(machine.property("NRestarts"), "0");
    // Nothing is left in the store but the listening sockets.
    eventually("the lots are taken out", || machine.property("NFileDescriptorStore") == "4");
    assert_eq!(machine.status()["listeners"][0]["active"], 500);
    let client = datagrams::client("127.0.0.1:0");
    assert_eq!(datagrams::ask(&client, local(8081), b"hello"), b"hello");
    println!("steering: {}", machine.status()["listeners"][0]["steering_active"]);
}

/// The server answers each datagram by the port that it came from.
fn udp_flows_keep_their_ports_over_restarts() {
    let machine = Machine::boot(&[(
        "/etc/evenkeel/evenkeel.toml",
        "[daemon]\nworkers = 3\n\
         [[listener]]\nname = \"flows\"\nmode = \"udp\"\nbind = \"127.0.0.1:8081\"\nupstream = \"ports\"\n\
         [[upstream]]\nname = \"ports\"\n[[upstream.server]]\naddress = \"127.0.0.1:9001\"\n",
    )]);
    let server = UdpSocket::bind("127.0.0.1:9001").expect("a server");
    std::thread::spawn(move || {
        let mut bytes = [0; 64];
        while let Ok((_, from)) = server.recv_from(&mut bytes) {
            let _ = server.send_to(&from.port().to_be_bytes(), from);
        }
    });
    machine.systemctl(&["start", "evenkeel"]);
    let clients: Vec<UdpSocket> = (0..200).map(|_| datagrams::client("127.0.0.1:0")).collect();
    let ports = || -> Vec<Vec<u8>> {
        clients.iter().map(|client| datagrams::ask(client, local(8081), b"from where?").to_vec()).collect()
    };
    let before = ports();
    for _ in 0..2 {
        machine.systemctl(&["restart", "evenkeel"]);
        eventually("what was parked is there again", || machine.status()["listeners"][0]["active"] == 200);
        let after = ports();
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert_eq!(moved, 0, "of 200 flows {moved} have another port\n{}", machine.log());
    }
    println!("steering: {}", machine.status()["listeners"][0]["steering_active"]);
}

fn a_stop_drains() {
    let machine = boot("");
    machine.systemctl(&["start", "evenkeel"]);
    let mut long = Long::open(20);
    machine.systemctl(&["stop", "--no-block", "evenkeel"]);
    eventually("it leaves", || machine.log().contains("leaving: nothing new"));
    eventually("nobody listens", || {
        TcpStream::connect(local(8080)).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    long.exchange();
    drop(long);
    machine.wait_for(Duration::from_secs(10), "ActiveState", "inactive");
    assert_eq!(machine.property("Result"), "success");
    assert_eq!(machine.property("NFileDescriptorStore"), "0");
    assert!(!machine.log().contains("parked"), "{}", machine.log());
}

fn on_stop_parks_where_systemd_cannot_be_asked() {
    let machine = boot("on_stop = \"park\"\n");
    machine.systemctl(&["start", "evenkeel"]);
    let mut long = Long::open(60);
    for _ in 0..2 {
        machine.systemctl(&["restart", "evenkeel"]);
        long.exchange();
    }
    assert!(machine.log().contains("what was parked goes on"), "{}", machine.log());
}

fn waiting_connections_outlive_a_killed_supervisor() {
    let machine = boot("");
    machine.systemctl(&["start", "evenkeel"]);
    eventually("systemd has the sockets", || machine.property("NFileDescriptorStore") == "4");
    let before = machine.supervisor();
    let (served, errors) = under_traffic(|served| {
        traffic_goes_on(served);
        signal(before, Signal::SIGKILL);
        within(Duration::from_secs(15), "a new supervisor", || {
            let now = machine.supervisor();
            now != 0 && now != before && machine.property("ActiveState") == "active"
        });
        traffic_goes_on(served);
    });
    println!("{served} sessions, {} broken: {errors:?}", errors.len());
    let refused = errors.iter().filter(|error| {
        matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::TimedOut | ErrorKind::WouldBlock)
    });
    assert_eq!(refused.count(), 0, "{errors:?}");
    // Each of the four clients has one session open when all are killed.
    assert!(errors.len() <= 4, "{errors:?}");
    assert_eq!(machine.property("NFileDescriptorStore"), "4");
}

fn what_the_file_wants_no_more_is_closed_and_said() {
    let machine = boot("on_stop = \"park\"\n");
    machine.systemctl(&["start", "evenkeel"]);
    let mut long = Long::open(10);
    let file = machine.path("/etc/evenkeel/evenkeel.toml");
    let text = fs::read_to_string(&file).expect("the file");
    let text = text.replace("name = \"front\"", "name = \"other\"").replace(":8080", ":8090");
    fs::write(&file, text).expect("written");
    machine.systemctl(&["restart", "evenkeel"]);
    eventually("it is said", || machine.log().contains("parked sessions have no place any more: reset"));
    let log = machine.log();
    assert!(log.contains("from the store is closed, with who waits there: no listener wants it"), "{log}");
    for (session, _) in &mut long.sessions {
        let error = session.read(&mut [0; 10]).expect_err("a reset, not an end");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    assert!(TcpStream::connect(local(8080)).is_err());
    exchange(&mut connect(local(8090)), b"hello").expect("served");
    eventually("only what is wanted is stored", || machine.property("NFileDescriptorStore") == "4");
}
