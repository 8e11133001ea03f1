//! Where a connection or a flow to a server leaves from.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use socket2::{Domain, SockAddr, Socket, Type};

/// include/uapi/linux/in.h; musl's headers have no name for it.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

/// The address to leave from; the port is always the kernel's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalEnd {
    /// The route's own.
    Any,
    /// An address of this host.
    Own(IpAddr),
    /// An address of somebody else's (IP_TRANSPARENT); the answers have to
    /// be routed here.
    Foreign(IpAddr),
}

impl LocalEnd {
    /// Binds a socket that is not connected yet, of the address's family.
    pub(super) fn bind(self, socket: &Socket) -> io::Result<()> {
        let address = match self {
            LocalEnd::Any => return Ok(()),
            LocalEnd::Own(address) => address,
            LocalEnd::Foreign(address) => {
                set_foreign(socket, address)?;
                address
            }
        };
        // The port is chosen by connect(2), which knows the server: then a port
        // serves once for every server, not once for all (ip(7)).
        set_no_port(socket)?;
        socket.bind(&SockAddr::from(SocketAddr::from((address, 0))))
    }
}

fn set_foreign(socket: &Socket, address: IpAddr) -> io::Result<()> {
    match address {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true),
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true),
    }
}

fn set_no_port(socket: &Socket) -> io::Result<()> {
    set_ip(socket, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Both families take these (net/ipv6/ipv6_sockglue.c passes SOL_IP on).
fn set_ip(socket: &impl AsRawFd, option: libc::c_int, value: u32) -> io::Result<()> {
    // SAFETY: needed because no library of ours sets these options. The kernel
    // reads four bytes, which live through the call.
    super::check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Part of the local ports, first and last.
pub type Window = (u16, u16);

/// The ports that the kernel binds by itself, first and last.
pub fn local_ports() -> io::Result<(u16, u16)> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut words = text.split_ascii_whitespace().map(str::parse::<u16>);
    match (words.next(), words.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok((first, last)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Has connect(2) take the port from this part alone (IP_LOCAL_PORT_RANGE, Linux
/// 6.3; an option of both families).
pub fn narrow(socket: &impl AsRawFd, (first, last): Window) -> io::Result<()> {
    set_ip(socket, IP_LOCAL_PORT_RANGE, u32::from(first) | u32::from(last) << 16)
}

/// Whether a part of the ports can be chosen.
pub fn can_narrow() -> bool {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), None);
    socket.is_ok_and(|socket| narrow(&socket, (40_000, 40_000)).is_ok())
}

/// Whether this process may leave from addresses that are not its host's.
pub fn may_be_foreign() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), None)?;
    socket.set_ip_transparent_v4(true)
}
