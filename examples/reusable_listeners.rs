//! Listeners that several sockets, or several processes, share.
//!
//! Opens two TCP listeners on one port and lets the kernel spread clients
//! over them, does the same for UDP, and joins a multicast group twice:
//!
//! ```sh
//! cargo run --example reusable_listeners
//! ```

use std::error::Error;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use evenkeel::sys::listen::{self, MulticastInterface, Options};

const CLIENTS: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::default();

    // TCP: the first socket picks a port, the second joins it.
    let first = TcpListener::from(listen::tcp("127.0.0.1:0".parse()?, &options)?);
    let address = first.local_addr()?;
    let second = TcpListener::from(listen::tcp(address, &options)?);
    for _ in 0..CLIENTS {
        TcpStream::connect(address)?;
    }
    // The sockets do not block: what has arrived is all there is to accept.
    let spread = [&first, &second].map(|l| std::iter::from_fn(|| l.accept().ok()).count());
    println!("tcp        {address}: {CLIENTS} connections fell {} and {}", spread[0], spread[1]);

    // A third party can ask whether the address is free without taking a
    // single client away.
    match listen::probe_tcp(address, &options) {
        Ok(()) => println!("tcp        {address}: free"),
        Err(error) => println!("tcp        {address}: taken ({error})"),
    }

    // UDP: SO_REUSEPORT only, so no other user can join.
    let first = UdpSocket::from(listen::udp("127.0.0.1:0".parse()?, &options)?);
    let address = first.local_addr()?;
    let second = UdpSocket::from(listen::udp(address, &options)?);
    for _ in 0..CLIENTS {
        UdpSocket::bind("127.0.0.1:0")?.send_to(b"hello", address)?;
    }
    let spread = [received(&first), received(&second)];
    println!("udp        {address}: {CLIENTS} datagrams fell {} and {}", spread[0], spread[1]);

    // Multicast: every socket gets its own copy.
    let group: SocketAddr = "239.255.77.1:0".parse()?;
    let loopback = MulticastInterface::Name("lo".into());
    let first = UdpSocket::from(listen::multicast(group, &loopback, None, &options)?);
    let group = first.local_addr()?;
    let second = UdpSocket::from(listen::multicast(group, &loopback, None, &options)?);
    let sender = socket2::SockRef::from(&first).try_clone()?;
    sender.set_multicast_if_v4(&[127, 0, 0, 1].into())?;
    sender.send_to(b"hello", &group.into())?;
    let copies = [received(&first), received(&second)];
    println!("multicast  {group}: 1 datagram gave {} and {} copies", copies[0], copies[1]);

    // An error names the call that failed and the address.
    if let Err(error) = listen::tcp("192.0.2.1:8080".parse()?, &options) {
        println!("error      {error}");
    }
    Ok(())
}

/// How many datagrams wait at a socket. Loopback delivers within the send
/// call, so only a moment is granted.
fn received(socket: &UdpSocket) -> usize {
    let deadline = Instant::now() + Duration::from_millis(20);
    let mut count = 0;
    let mut buffer = [0; 16];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok(_) => count += 1,
            Err(_) if Instant::now() > deadline => return count,
            Err(_) => std::thread::yield_now(),
        }
    }
}
