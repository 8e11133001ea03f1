//! Sockets of the clients: from which address, and to the target.
//!
//! A target has some 28,000 ports of one client address. `Sources` goes on to
//! the next address when one is used up: those that were given, or for a
//! target in 127.0.0.0/8 the other addresses of the loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mio::net::{TcpStream, UdpSocket};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys::local_end::{self, Window};

/// Loopback addresses that are tried one after the other.
const LOOPBACK_SOURCES: u8 = 250;

/// The client addresses in use.
#[derive(Clone, Debug)]
pub struct Sources {
    given: bool,
    list: Vec<Option<IpAddr>>,
    at: usize,
}

impl Sources {
    /// The given addresses in turn, else what the kernel picks, and more where
    /// that is a loopback.
    pub fn new(given: &[IpAddr], target: IpAddr, offset: usize) -> Sources {
        if !given.is_empty() {
            let list: Vec<_> = given.iter().copied().map(Some).collect();
            return Sources { given: true, at: offset % list.len(), list };
        }
        let mut list = vec![None];
        if let IpAddr::V4(address) = target
            && address.is_loopback()
        {
            list.extend((2..LOOPBACK_SOURCES).map(|last| Some(IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)))));
        }
        Sources { given: false, list, at: 0 }
    }

    /// The address for the next connection. Given addresses take turns; others
    /// are kept until their ports are used up.
    pub fn pick(&mut self) -> Option<IpAddr> {
        let picked = self.list[self.at];
        if self.given {
            self.at = (self.at + 1) % self.list.len();
        }
        picked
    }

    /// The last one picked has no port left: go on. False when all were tried.
    pub fn exhaust(&mut self, tried: usize) -> bool {
        if !self.given {
            self.at = (self.at + 1) % self.list.len();
        }
        tried + 1 < self.list.len()
    }

    /// How many addresses were used so far.
    pub fn used(&self) -> usize {
        if self.given { self.list.len() } else { self.at + 1 }
    }
}

/// Starts a connection; it may stand already.
pub fn dial_tcp(
    target: SocketAddr,
    source: Option<IpAddr>,
    ports: Option<Window>,
    nodelay: bool,
) -> io::Result<TcpStream> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(target), kind, Some(Protocol::TCP))?;
    if let Some(window) = ports {
        local_end::narrow(&socket, window)?;
    }
    if let Some(address) = source {
        // The port is chosen at connect, so that it need be free towards this
        // target only.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(address, 0).into())?;
    }
    if nodelay {
        // A message may be cut in several writes; none is to wait for an ack.
        socket.set_tcp_nodelay(true)?;
    }
    match socket.connect(&target.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    Ok(TcpStream::from_std(socket.into()))
}

/// A connected socket: one flow.
pub fn open_udp(target: SocketAddr, source: Option<IpAddr>) -> io::Result<UdpSocket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(target), kind, Some(Protocol::UDP))?;
    if let Some(address) = source {
        socket.bind(&SocketAddr::new(address, 0).into())?;
    }
    match socket.connect(&target.into()) {
        Ok(()) => Ok(UdpSocket::from_std(socket.into())),
        // connect(2) of a datagram socket says EAGAIN when no port is left.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
            Err(io::ErrorKind::AddrNotAvailable.into())
        }
        Err(error) => Err(error),
    }
}
