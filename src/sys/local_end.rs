//! Where a connection or a flow to a server leaves from.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use socket2::{Domain, SockAddr, Socket, Type};

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
    let on: libc::c_int = 1;
    // SAFETY: needed because no library of ours sets this option. The kernel
    // reads one int, which lives through the call. It is an option of both
    // families (net/ipv6/ipv6_sockglue.c passes SOL_IP on).
    super::check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Whether this process may leave from addresses that are not its host's.
pub fn may_be_foreign() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), None)?;
    socket.set_ip_transparent_v4(true)
}
