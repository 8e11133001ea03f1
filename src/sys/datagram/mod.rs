//! Datagrams in batches: many a system call, and big ones that the kernel
//! joins and cuts.
//!
//! `Arena` receives (recvmmsg, UDP_GRO), `Sender` sends (sendmmsg,
//! UDP_SEGMENT). Each worker has one of both, made once; nothing here
//! allocates for a datagram. What comes from the network is read from plain
//! byte arrays by `address` and `messages`, bounds checked.

mod address;
mod arena;
mod messages;
mod sender;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, getsockopt, setsockopt, sockopt};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::local_end::LocalEnd;
pub use arena::Arena;
pub use sender::{MAX_SEGMENTS, Sender};

/// The longest datagram of IPv4; IPv6 allows 20 bytes more, Ethernet none of
/// either without fragments.
pub const MAX_BYTES: usize = 65_507;

/// What was received at one place of an arena: one datagram, or several of
/// one length, but for the last, that the kernel has joined.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// What it carries.
    pub bytes: &'a [u8],
    /// Where it came from; `None` where that was not asked.
    pub from: Option<SocketAddr>,
    /// Our address that it was sent to, where the socket tells.
    pub local: Option<IpAddr>,
    /// The length of the joined datagrams; `None` = it is a single one.
    pub segment: Option<usize>,
    /// When the kernel got it, since 1970.
    pub stamp: Option<Duration>,
    /// It was longer than the arena's places.
    pub truncated: bool,
}

impl Received<'_> {
    /// How many datagrams these are.
    pub fn count(&self) -> u64 {
        self.segment.map_or(1, |segment| self.bytes.len().div_ceil(segment).max(1) as u64)
    }
}

/// Something to send.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// Goes in front of the bytes.
    pub head: &'a [u8],
    /// What it carries.
    pub bytes: &'a [u8],
    /// Where it goes; `None` on a connected socket.
    pub to: Option<SocketAddr>,
    /// Our address that it is to leave from; `None` = the socket's, or the
    /// kernel's choice.
    pub from: Option<IpAddr>,
    /// Cut into datagrams of this length; at most `MAX_SEGMENTS` of them, and
    /// no head.
    pub segment: Option<usize>,
}

/// What a listener's socket is given besides `sys::listen`: the time of
/// arrival with each datagram, always, for only so does what waits in the
/// queue of a dead worker have one; and joined datagrams where the kernel can.
/// Answers whether it can.
pub fn prepare_listener(socket: &impl AsFd) -> io::Result<bool> {
    setsockopt(socket, sockopt::ReceiveTimestampns, &true)?;
    Ok(join_received(socket))
}

/// Lets the kernel join what comes in, where it can; whether it can.
pub fn join_received(socket: &impl AsFd) -> bool {
    setsockopt(socket, sockopt::UdpGroSegment, &true).is_ok()
}

/// Whether the kernel joins what comes in.
pub fn joins_received(socket: &impl AsFd) -> bool {
    getsockopt(socket, sockopt::UdpGroSegment).unwrap_or(false)
}

/// Opens a flow's own socket to its server, on a port of the kernel's choice.
pub fn connect(server: SocketAddr, from: LocalEnd) -> io::Result<OwnedFd> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(server), kind, Some(socket2::Protocol::UDP))?;
    from.bind(&socket)?;
    // In one call: the port is bound and the server is the only one heard.
    socket.connect(&SockAddr::from(server))?;
    Ok(socket.into())
}

/// Sends one datagram on a connected socket.
pub fn send(socket: &impl AsFd, bytes: &[u8]) -> io::Result<()> {
    nix::sys::socket::send(socket.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

/// The error that the network has reported for a connected socket, which is
/// forgotten by that.
pub fn take_error(socket: &impl AsFd) -> Option<io::Error> {
    SockRef::from(socket).take_error().ok().flatten()
}

/// How many datagrams the kernel dropped at this socket, since it was opened:
/// the receive buffer was full, or a filter refused them.
pub fn kernel_drops(socket: &impl AsFd) -> io::Result<u32> {
    let [.., drops] = super::queues::memory(socket)?;
    Ok(drops)
}
