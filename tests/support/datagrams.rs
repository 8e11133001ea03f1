//! UDP clients and servers, as threads of the test, and a daemon between them.

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::daemon::Daemon;
use super::servers::local;

/// What a server saw: who sent what, in order.
pub type Seen = Arc<Mutex<Vec<(SocketAddr, Vec<u8>)>>>;

/// A socket with room for bursts, and a time-out so that a test cannot hang.
#[track_caller]
pub fn client(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).expect("a free address");
    let _ = SockRef::from(&socket).set_recv_buffer_size(4 << 20);
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a time-out");
    socket
}

/// A server that answers each datagram by what the function says, if it says
/// anything; its address and what it saw.
pub fn udp_server(
    address: &str,
    answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static,
) -> (SocketAddr, Seen) {
    let socket = client(address);
    socket.set_read_timeout(None).expect("no time-out");
    let address = socket.local_addr().expect("bound");
    let seen = Seen::default();
    let noted = Arc::clone(&seen);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 70_000];
        while let Ok((count, from)) = socket.recv_from(&mut buffer) {
            noted.lock().expect("no thread panics with it").push((from, buffer[..count].to_vec()));
            if let Some(reply) = answer(&buffer[..count]) {
                let _ = socket.send_to(&reply, from);
            }
        }
    });
    (address, seen)
}

/// A server that sends back what it gets, with its name in front.
pub fn named_server(address: &str, name: &'static str) -> (SocketAddr, Seen) {
    udp_server(address, move |bytes| Some([name.as_bytes(), bytes].concat()))
}

/// Sends one datagram and waits for one.
#[track_caller]
pub fn ask(socket: &UdpSocket, server: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    try_ask(socket, server, bytes).expect("an answer within five seconds")
}

/// The same, where there may be none.
pub fn try_ask(socket: &UdpSocket, server: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    socket.send_to(bytes, server).expect("sent");
    receive(socket).map(|(bytes, from)| {
        assert_eq!(from, server, "the answer comes from the address that was asked");
        bytes
    })
}

/// The next datagram.
pub fn receive(socket: &UdpSocket) -> Option<(Vec<u8>, SocketAddr)> {
    let mut buffer = vec![0; 70_000];
    let (count, from) = socket.recv_from(&mut buffer).ok()?;
    buffer.truncate(count);
    Some((buffer, from))
}

/// Everything that has come, without waiting.
pub fn receive_waiting(socket: &UdpSocket) -> Vec<Vec<u8>> {
    socket.set_nonblocking(true).expect("non-blocking");
    let all = std::iter::from_fn(|| receive(socket).map(|(bytes, _)| bytes)).collect();
    socket.set_nonblocking(false).expect("blocking");
    all
}

/// Lets time pass: for what is about age, where no condition can be waited
/// for.
pub fn let_pass(time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::park_timeout(left);
    }
}

/// The beginning of the UDP listener that all of these tests have.
pub const UDP_FRONT: &str = "[[listener]]\nname = \"front\"\nmode = \"udp\"\nupstream = \"back\"\n";

/// The text of a daemon on 127.0.0.1:5300 in front of these servers.
pub fn config(workers: usize, udp: &str, balance: &str, servers: &[SocketAddr]) -> String {
    let mut text = format!(
        "[daemon]\nworkers = {workers}\n{UDP_FRONT}bind = \"127.0.0.1:5300\"\n[listener.udp]\n{udp}\n\
         [[upstream]]\nname = \"back\"\nbalance = \"{balance}\"\n"
    );
    for server in servers {
        text += &format!("[[upstream.server]]\naddress = \"{server}\"\n");
    }
    text
}

/// That daemon, ready, with its clients shared out in turn.
pub fn forward(workers: usize, udp: &str, servers: &[SocketAddr]) -> Daemon {
    Daemon::ready(&config(workers, udp, "round-robin", servers))
}

/// Where it listens.
pub fn front() -> SocketAddr {
    local(5300)
}

/// Sends it the same datagram so many times.
pub fn send(socket: &UdpSocket, bytes: &[u8], count: usize) {
    for _ in 0..count {
        socket.send_to(bytes, front()).unwrap();
    }
}
