//! Which address the daemon leaves from: one of its own in turn, or the
//! client's, over a real router's way in namespaces of their own.

mod support;

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};
use support::daemon::Daemon;
use support::datagrams::{ask, client, udp_server};
use support::servers::{connect, exchange, local, tcp_server};
use support::{eventually, within};

fn main() {
    support::run(tests![
        connections_leave_from_each_source_in_turn,
        flows_leave_from_each_source_in_turn,
        where_the_ports_of_a_source_run_out_the_next_is_tried_and_it_is_told,
        servers_see_the_clients_own_address_over_a_real_route needs ["ip", "nft", "root"],
        what_transparent_needs_is_said_when_it_is_missing needs ["setpriv", "root"],
    ])
}

fn config(mode: &str, upstream: &str, server: SocketAddr) -> String {
    format!(
        "[daemon]\nworkers = 2\n[[listener]]\nname = \"front\"\nmode = \"{mode}\"\nbind = \"127.0.0.1:8080\"\n\
         upstream = \"back\"\n[[upstream]]\nname = \"back\"\n{upstream}\n[[upstream.server]]\naddress = \"{server}\"\n"
    )
}

/// A server that answers each connection with the address that it sees.
fn naming(address: &str) -> SocketAddr {
    tcp_server(address, |mut stream| {
        let peer = stream.peer_addr()?;
        writeln!(stream, "{peer}")?;
        stream.read_to_end(&mut Vec::new()).map(drop)
    })
    .0
}

/// What the server sees, where the session is let through.
fn seen(stream: &mut TcpStream) -> Option<SocketAddr> {
    let mut text = String::new();
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() {
        if byte[0] == b'\n' {
            return text.parse().ok();
        }
        text.push(byte[0].into());
    }
    None
}

fn connections_leave_from_each_source_in_turn() {
    let server = naming("127.0.0.1:0");
    let sources = "source = [\"127.0.0.2\", \"127.0.0.3\", \"::1\"]";
    let _daemon = Daemon::ready(&config("tcp", sources, server));
    let mut sessions: Vec<TcpStream> = (0..20).map(|_| connect(local(8080))).collect();
    let addresses: Vec<IpAddr> = sessions.iter_mut().map(|s| seen(s).expect("an answer").ip()).collect();
    // Each worker takes them by turns.
    let count = |text: &str| addresses.iter().filter(|a| a.to_string() == text).count();
    assert_eq!(count("127.0.0.2") + count("127.0.0.3"), 20);
    assert!(count("127.0.0.2").abs_diff(10) <= 1, "{addresses:?}");
}

fn flows_leave_from_each_source_in_turn() {
    let (server, saw) = udp_server("127.0.0.1:0", |bytes| Some(bytes.to_vec()));
    let sources = "source = [\"127.0.0.2\", \"127.0.0.3\"]";
    let _daemon = Daemon::ready(&config("udp", sources, server));
    for _ in 0..20 {
        assert_eq!(ask(&client("127.0.0.1:0"), local(8080), b"x"), b"x");
    }
    let saw = saw.lock().unwrap();
    let from = |text: &str| saw.iter().filter(|(from, _)| from.ip().to_string() == text).count();
    assert_eq!((from("127.0.0.2") + from("127.0.0.3"), saw.len()), (20, 20));
    assert!(from("127.0.0.2").abs_diff(10) <= 1);
}

fn where_the_ports_of_a_source_run_out_the_next_is_tried_and_it_is_told() {
    const PORTS: usize = 6;
    let server = naming("127.0.0.1:20000");
    // 127.0.0.2 has room for six; 192.0.2.1 is no address of this host.
    let sources = "source = [\"127.0.0.2\", \"192.0.2.1\", \"127.0.0.3\"]\nretries = 0";
    let daemon = Daemon::ready(&config("tcp", sources, server));
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40005").unwrap();
    let mut port = 30_000;
    let mut enter = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        port += 1;
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into()).unwrap();
        socket.connect(&local(8080).into()).unwrap();
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let address = seen(&mut stream)?;
        Some((stream, address))
    };
    let inside: Vec<_> = (0..2 * PORTS).map(|_| enter().expect("a port is left")).collect();
    let ends: HashSet<SocketAddr> = inside.iter().map(|(_, address)| *address).collect();
    assert_eq!(ends.len(), 2 * PORTS, "{ends:?}");
    assert!(enter().is_none());
    let listener = daemon.listener("front");
    assert_eq!(listener.ended.get("no_ports"), Some(&1), "{listener:?}");
    let shortages: u64 = daemon.status().workers.iter().map(|worker| worker.port_shortages).sum();
    assert!(shortages >= 3, "{shortages}");
    eventually("it is told", || {
        let log = daemon.log();
        log.contains("can leave from 192.0.2.1") && log.contains("no other is left")
    });
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains("can leave from")).count();
    assert!(lines <= 8, "one for each address and one for all, a worker in ten seconds: {log}");
    // None of it is held against the server.
    assert_eq!(daemon.status().upstreams[0].servers[0].failures, 0);
    drop(inside);
    eventually("a port is free again", || enter().is_some());
}

/// A network namespace beside the test's own, which ends with it.
struct Beside(Child);

impl Beside {
    fn new() -> Beside {
        let child =
            Command::new("unshare").args(["--net", "sleep", "600"]).stdin(Stdio::null()).spawn().unwrap();
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        within(Duration::from_secs(20), "it has a network", || {
            let path = format!("/proc/{}/ns/net", child.id());
            // Its name changes when it is in the namespace.
            fs::read_link(path).is_ok_and(|other| other != own)
        });
        Beside(child)
    }

    /// Runs a command in it.
    fn run(&self, command: &str) {
        let target = self.0.id().to_string();
        run(&format!("nsenter --net --target {target} {command}"));
    }

    /// Runs a function in a thread that is in it.
    fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.0.id())).unwrap();
        std::thread::spawn(move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn run(command: &str) {
    let mut words = command.split_whitespace();
    let done = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
}

/// The addresses that connections and datagrams come from, for ever.
fn servers(beside: &Beside) -> (Receiver<SocketAddr>, Receiver<SocketAddr>) {
    let (tcp, tcp_seen) = channel();
    let (udp, udp_seen) = channel();
    let (ready, is_ready) = channel();
    for address in ["10.2.0.2:80", "[fd02::2]:80"] {
        let (tcp, udp, ready) = (tcp.clone(), udp.clone(), ready.clone());
        let _serving = beside.thread(move || {
            let listener = TcpListener::bind(address).unwrap();
            let socket = UdpSocket::bind(address).unwrap();
            ready.send(()).unwrap();
            std::thread::spawn(move || {
                let mut bytes = [0; 100];
                while let Ok((count, from)) = socket.recv_from(&mut bytes) {
                    udp.send(from).unwrap();
                    socket.send_to(&bytes[..count], from).unwrap();
                }
            });
            for mut stream in listener.incoming().flatten() {
                tcp.send(stream.peer_addr().unwrap()).unwrap();
                std::thread::spawn(move || {
                    let mut bytes = [0; 100];
                    while let Ok(count @ 1..) = stream.read(&mut bytes) {
                        stream.write_all(&bytes[..count]).unwrap();
                    }
                });
            }
        });
        is_ready.recv_timeout(Duration::from_secs(20)).unwrap();
    }
    (tcp_seen, udp_seen)
}

/// docs/TRANSPARENT.md has the same lines.
const RULES: &str = "
table inet evenkeel {
    chain divert {
        type filter hook prerouting priority mangle; policy accept;
        iifname \"to-server\" meta l4proto { tcp, udp } socket transparent 1 meta mark set 1
    }
}
";

fn servers_see_the_clients_own_address_over_a_real_route() {
    let (clients, behind) = (Beside::new(), Beside::new());
    for (beside, name, net) in [(&clients, "to-client", 1), (&behind, "to-server", 2)] {
        let pid = beside.0.id();
        run(&format!("ip link add {name} type veth peer name way netns {pid}"));
        run(&format!("ip address add 10.{net}.0.1/24 dev {name}"));
        run(&format!("ip -6 address add fd0{net}::1/64 dev {name} nodad"));
        run(&format!("ip link set {name} up"));
        beside.run(&format!("ip address add 10.{net}.0.2/24 dev way"));
        beside.run(&format!("ip -6 address add fd0{net}::2/64 dev way nodad"));
        beside.run("ip link set way up");
        beside.run("ip link set lo up");
        // The servers' way back to the clients leads over this host.
        beside.run(&format!("ip route add default via 10.{net}.0.1"));
        beside.run(&format!("ip -6 route add default via fd0{net}::1"));
    }
    for family in ["-4", "-6"] {
        run(&format!("ip {family} rule add fwmark 1 lookup 100"));
        run(&format!("ip {family} route add local default dev lo table 100"));
    }
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules");
    fs::write(&rules, RULES).unwrap();
    run(&format!("nft -f {}", rules.display()));

    let (tcp_seen, udp_seen) = servers(&behind);
    let mut text = String::from("[daemon]\nworkers = 2\nuser = \"nobody\"\n");
    for (name, mode, bind, server) in [
        ("t4", "tcp", "10.1.0.1:8080", "10.2.0.2:80"),
        ("t6", "tcp", "[fd01::1]:8080", "[fd02::2]:80"),
        ("u4", "udp", "10.1.0.1:8080", "10.2.0.2:80"),
        ("u6", "udp", "[fd01::1]:8080", "[fd02::2]:80"),
    ] {
        text += &format!(
            "[[listener]]\nname = \"{name}\"\nmode = \"{mode}\"\nbind = \"{bind}\"\nupstream = \"{name}\"\n\
             [[upstream]]\nname = \"{name}\"\ntransparent = true\n[upstream.health]\ncheck = \"none\"\n\
             [[upstream.server]]\naddress = \"{server}\"\n"
        );
    }
    let daemon = Daemon::ready(&text);
    for round in 0..2 {
        let exchanged = clients.thread(move || {
            for address in ["10.1.0.1:8080", "[fd01::1]:8080"] {
                let address: SocketAddr = address.parse().unwrap();
                let mut stream = connect(address);
                assert_eq!(exchange(&mut stream, b"question").unwrap(), b"question");
                let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                assert_eq!(ask(&client(any), address, b"question"), b"question");
            }
        });
        exchanged.join().expect("every exchange is answered");
        for seen in [&tcp_seen, &udp_seen] {
            for expected in ["10.1.0.2", "fd01::2"] {
                let from = seen.recv_timeout(Duration::from_secs(10)).unwrap();
                assert_eq!(from.ip().to_string(), expected, "round {round}");
            }
        }
        daemon.ask("reload").expect("a reload");
    }
    // The workers kept this one right, and no other.
    let pid = daemon.worker(0).pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_string();
    assert_eq!((line("CapEff:"), line("CapPrm:")), ("0000000000002000".into(), "0000000000002000".into()));
    assert_ne!(line("Uid:").split_whitespace().next(), Some("0"));
}

fn what_transparent_needs_is_said_when_it_is_missing() {
    let text = config("tcp", "transparent = true", local(9));
    let without = ["setpriv", "--bounding-set", "-net_raw,-net_admin", "--inh-caps", "-all"];
    let mut daemon = Daemon::start_under(&text, &without, |_| {});
    let status = daemon.wait(Duration::from_secs(60));
    let log = daemon.log();
    assert_eq!(status.code(), Some(77), "{log}");
    assert!(log.contains("upstream \"back\" has transparent = true") && log.contains("CAP_NET_RAW"), "{log}");
}
