//! Opens listening sockets that other processes can stand beside.
//!
//! The one place that says which reuse option a socket gets, and when. Used
//! by every worker at the first birth of its slot, and open to other
//! programs: `examples/reusable_listeners.rs`. Each call opens one socket
//! and either returns it or closes it again; the caller owns what is
//! returned, and it ends when its last duplicate is closed.
//!
//! | socket        | SO_REUSEADDR | SO_REUSEPORT | why                                                              |
//! |---------------|--------------|--------------|------------------------------------------------------------------|
//! | TCP           | yes          | yes          | passes over TIME_WAIT and old connections; one group of listeners |
//! | UDP unicast   | **no**       | yes          | with SO_REUSEADDR any user may take the port's datagrams          |
//! | UDP multicast | yes          | yes          | the two mean the same there; every socket gets its copy           |
//!
//! Sockets of one group must carry one uid, the effective one of the process
//! that calls socket(2): open them before privileges are given up.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, InterfaceIndexOrAddress, SockAddr, SockRef, Socket, Type};

use crate::sys::filter;
use crate::sys::holders::{Protocol, only_connections_remain};

/// Seconds that TCP_DEFER_ACCEPT waits for the client's first bytes. The
/// kernel counts in retransmissions of the SYN-ACK, the first after a second.
const DEFER_ACCEPT_SECONDS: i32 = 1;

/// How many connections may wait that sent data with their SYN. They are not
/// proven to own their address yet, so the queue is kept short.
const FAST_OPEN_QUEUE: i32 = 256;

/// SO_RCVBUF of UDP sockets where nothing else is asked for: some 5,000 short
/// datagrams, each of which the kernel charges with 768 bytes or more.
const DATAGRAM_BUFFER_BYTES: u64 = 4 << 20;

/// What a listener's sockets are given besides their address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Length of the accept queue; the kernel cuts it at net.core.somaxconn.
    pub backlog: u32,
    /// SO_RCVBUF in bytes; `None` = the kernel's own tuning, and for UDP, which
    /// it does not tune, 4 MiB.
    pub receive_buffer: Option<u64>,
    /// SO_SNDBUF in bytes; `None` = the kernel's own tuning.
    pub send_buffer: Option<u64>,
    /// SO_BINDTODEVICE: only what arrives through this interface.
    pub interface: Option<String>,
    /// IP_TRANSPARENT: accept for addresses that are not this host's.
    pub transparent: bool,
    /// IP_FREEBIND: bind although the address is not there yet.
    pub freebind: bool,
    /// TCP_FASTOPEN: take data that comes with the SYN.
    pub fast_open: bool,
    /// TCP_DEFER_ACCEPT: wake the worker when the first bytes are there.
    pub defer_accept: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            backlog: 4096,
            receive_buffer: None,
            send_buffer: None,
            interface: None,
            transparent: false,
            freebind: false,
            fast_open: false,
            defer_accept: false,
        }
    }
}

/// Where a multicast group is joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MulticastInterface {
    /// Where the kernel's routes point.
    #[default]
    Any,
    /// The interface of this name.
    Name(String),
    /// The interface that has this address; IPv4 only.
    Address(Ipv4Addr),
}

/// Which part of a group's datagrams a socket takes: `index` of `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Share {
    pub index: u32,
    pub count: u32,
}

/// Which call failed while a socket was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// socket(2)
    Socket,
    /// setsockopt(2) of this option.
    Option(&'static str),
    /// bind(2)
    Bind,
    /// listen(2)
    Listen,
    /// Joining the multicast group.
    Join,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Step::Socket => f.write_str("socket"),
            Step::Option(name) => f.write_str(name),
            Step::Bind => f.write_str("bind"),
            Step::Listen => f.write_str("listen"),
            Step::Join => f.write_str("join"),
        }
    }
}

/// A socket that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {step}: {source}")]
pub struct OpenError {
    /// The call that failed.
    pub step: Step,
    /// The address that was asked for.
    pub address: SocketAddr,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// Opens a listening TCP socket that others of the same uid can join:
/// non-blocking, close-on-exec, both reuse options set before bind(2).
pub fn tcp(address: SocketAddr, options: &Options) -> Result<OwnedFd, OpenError> {
    let at = At(address);
    let socket = at.socket(Type::STREAM, socket2::Protocol::TCP)?;
    // Passes over what an earlier listener left: connections still open and
    // those in TIME_WAIT. Between two listening sockets it has no say.
    at.option("SO_REUSEADDR", socket.set_reuse_address(true))?;
    // Lets every worker have an accept queue of its own on one port. Asked
    // for before bind(2), because bind(2) is where the group is joined.
    at.option("SO_REUSEPORT", socket.set_reuse_port(true))?;
    at.before_bind(&socket, options)?;
    if options.fast_open {
        at.option("TCP_FASTOPEN", set_tcp(&socket, libc::TCP_FASTOPEN, FAST_OPEN_QUEUE))?;
    }
    if options.defer_accept {
        at.option("TCP_DEFER_ACCEPT", set_tcp(&socket, libc::TCP_DEFER_ACCEPT, DEFER_ACCEPT_SECONDS))?;
    }
    at.bind(&socket)?;
    // At once: a socket that is bound and does not listen yet can be joined
    // by any uid that sets SO_REUSEADDR, and whoever listens first wins.
    let backlog = i32::try_from(options.backlog).unwrap_or(i32::MAX);
    socket.listen(backlog).map_err(|e| at.failed(Step::Listen, e))?;
    Ok(socket.into())
}

/// Opens a unicast UDP socket that others of the same uid can join:
/// non-blocking, close-on-exec, SO_REUSEPORT only; on a wildcard address the
/// destination is told with each datagram (IP_PKTINFO).
pub fn udp(address: SocketAddr, options: &Options) -> Result<OwnedFd, OpenError> {
    let at = At(address);
    let socket = at.socket(Type::DGRAM, socket2::Protocol::UDP)?;
    // Never SO_REUSEADDR here: with it a socket of any other user may bind
    // the same port later, and the kernel gives it all the datagrams.
    at.option("SO_REUSEPORT", socket.set_reuse_port(true))?;
    at.before_bind(&socket, options)?;
    at.datagram_buffer(&socket, options);
    if address.ip().is_unspecified() {
        at.packet_info(&socket)?;
    }
    at.only_joined_groups(&socket)?;
    at.bind(&socket)?;
    Ok(socket.into())
}

/// Opens a UDP socket that is bound to a multicast group's address and has
/// joined the group. Each socket of a group gets its own copy of every
/// datagram, or those of its `share`.
pub fn multicast(
    group: SocketAddr,
    interface: &MulticastInterface,
    share: Option<Share>,
    options: &Options,
) -> Result<OwnedFd, OpenError> {
    // A link-local IPv6 group is bound on one interface, and bind(2) wants
    // its number even though the join names it again.
    let index = interface_index(interface).map_err(|e| At(group).failed(Step::Join, e))?;
    let at = At(with_scope(group, index));
    let socket = at.socket(Type::DGRAM, socket2::Protocol::UDP)?;
    // The two options mean the same for a group, so both: the port can then
    // be shared with programs that set either. Nobody can steal here, for
    // every socket gets its copy.
    at.option("SO_REUSEADDR", socket.set_reuse_address(true))?;
    at.option("SO_REUSEPORT", socket.set_reuse_port(true))?;
    at.before_bind(&socket, options)?;
    at.datagram_buffer(&socket, options);
    at.packet_info(&socket)?;
    at.only_joined_groups(&socket)?;
    if let Some(Share { index, count }) = share {
        // Before bind(2), or it would take everybody's share for a moment.
        at.option("SO_ATTACH_FILTER", filter::take_share(&socket, group.is_ipv6(), index, count))?;
    }
    // To the group's address and not the wildcard: unicast datagrams and
    // other groups on this port then never reach the socket.
    at.bind(&socket)?;
    join(&socket, at.0, interface, index).map_err(|e| at.failed(Step::Join, e))?;
    Ok(socket.into())
}

/// Takes up a listening TCP socket that another process opened, as systemd
/// does for a .socket unit: sets what may still be set after bind(2), and takes
/// away what an earlier process left on it. Reuse options, the device and
/// transparency are decided before bind(2), so they are the other's to set.
pub fn adopt_tcp(socket: &OwnedFd, address: SocketAddr, options: &Options) -> Result<(), OpenError> {
    let at = At(address);
    at.option("SO_DETACH_FILTER", super::filter::remove(socket))?;
    let socket = SockRef::from(socket);
    at.common_of_adopted(&socket, options)?;
    if options.fast_open {
        at.option("TCP_FASTOPEN", set_tcp(&socket, libc::TCP_FASTOPEN, FAST_OPEN_QUEUE))?;
    }
    let seconds = if options.defer_accept { DEFER_ACCEPT_SECONDS } else { 0 };
    at.option("TCP_DEFER_ACCEPT", set_tcp(&socket, libc::TCP_DEFER_ACCEPT, seconds))?;
    // On a socket that listens already it sets the queue's length anew.
    let backlog = i32::try_from(options.backlog).unwrap_or(i32::MAX);
    socket.listen(backlog).map_err(|e| at.failed(Step::Listen, e))
}

/// The same for a unicast UDP socket.
pub fn adopt_udp(socket: &OwnedFd, address: SocketAddr, options: &Options) -> Result<(), OpenError> {
    let at = At(address);
    at.option("SO_DETACH_FILTER", super::filter::remove(socket))?;
    let socket = SockRef::from(socket);
    // systemd sets it on every socket that it passes; see the table above.
    at.option("SO_REUSEADDR", socket.set_reuse_address(false))?;
    at.common_of_adopted(&socket, options)?;
    at.packet_info(&socket)
}

/// Is this an address that `multicast` should open rather than `udp`?
pub fn is_group(address: SocketAddr) -> bool {
    address.ip().is_multicast()
}

/// Would a TCP listener of ours stand beside nobody else's socket?
///
/// Binds with SO_REUSEADDR alone and closes again; nothing listens, so no
/// client is taken from anybody. That fails where anyone listens, even our
/// own uid with SO_REUSEPORT.
pub fn probe_tcp(address: SocketAddr, options: &Options) -> io::Result<()> {
    match bind_only(address, options, false) {
        // SO_REUSEADDR passes over the connections that a listener with the
        // same option left. Those of one with SO_REUSEPORT alone fail it, and
        // are no obstacle to `tcp`, which sets both.
        Err(e)
            if e.kind() == io::ErrorKind::AddrInUse
                && only_connections_remain(address, Protocol::Tcp, options) =>
        {
            bind_only(address, options, true)
        }
        result => result,
    }
}

fn bind_only(address: SocketAddr, options: &Options, reuse_port: bool) -> io::Result<()> {
    let at = At(address);
    let socket = at.socket(Type::STREAM, socket2::Protocol::TCP).map_err(|e| e.source)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(reuse_port)?;
    at.before_bind(&socket, options).map_err(|e| e.source)?;
    socket.bind(&SockAddr::from(address))
}

/// The same for a unicast UDP address: binds without any reuse option, so any
/// other socket on it makes this fail. While it is bound, for some
/// microseconds, a datagram that arrives is lost with it.
pub fn probe_udp(address: SocketAddr, options: &Options) -> io::Result<()> {
    let at = At(address);
    let socket = at.socket(Type::DGRAM, socket2::Protocol::UDP).map_err(|e| e.source)?;
    at.before_bind(&socket, options).map_err(|e| e.source)?;
    socket.bind(&SockAddr::from(address))
}

/// The address of the socket at work, which every error names.
#[derive(Clone, Copy)]
struct At(SocketAddr);

impl At {
    fn failed(self, step: Step, source: io::Error) -> OpenError {
        OpenError { step, address: self.0, source }
    }

    fn option<T>(self, name: &'static str, result: Result<T, impl Into<io::Error>>) -> Result<T, OpenError> {
        result.map_err(|e| self.failed(Step::Option(name), e.into()))
    }

    fn socket(self, kind: Type, protocol: socket2::Protocol) -> Result<Socket, OpenError> {
        // Close-on-exec from birth: a listener that leaks into another
        // program takes its share of the clients and never answers them.
        let kind = kind.nonblocking().cloexec();
        Socket::new(Domain::for_address(self.0), kind, Some(protocol))
            .map_err(|e| self.failed(Step::Socket, e))
    }

    /// What both kinds set, all of it before bind(2).
    fn before_bind(self, socket: &Socket, options: &Options) -> Result<(), OpenError> {
        let v6 = self.0.is_ipv6();
        if v6 {
            // An IPv6 address means IPv6 only, whatever net.ipv6.bindv6only
            // says: a dual socket and one on 0.0.0.0 share no group.
            self.option("IPV6_V6ONLY", socket.set_only_v6(true))?;
        }
        if let Some(interface) = &options.interface {
            // Before bind(2): the device takes part in the search for
            // conflicts, and a group is of one device.
            self.option("SO_BINDTODEVICE", socket.bind_device(Some(interface.as_bytes())))?;
        }
        if options.transparent {
            // Before bind(2): allows addresses that are not this host's.
            let (name, result) = match v6 {
                true => ("IPV6_TRANSPARENT", socket.set_ip_transparent_v6(true)),
                false => ("IP_TRANSPARENT", socket.set_ip_transparent_v4(true)),
            };
            self.option(name, result)?;
        }
        if options.freebind {
            // Before bind(2): for an address that comes later, as a
            // fail-over address does.
            let (name, result) = match v6 {
                true => ("IPV6_FREEBIND", socket.set_freebind_v6(true)),
                false => ("IP_FREEBIND", socket.set_freebind_v4(true)),
            };
            self.option(name, result)?;
        }
        // Before listen(2): the receive buffer decides the window scale that
        // a SYN-ACK offers, and accepted sockets inherit both.
        if let Some(bytes) = options.receive_buffer {
            self.option("SO_RCVBUF", socket.set_recv_buffer_size(whole(bytes)))?;
        }
        if let Some(bytes) = options.send_buffer {
            self.option("SO_SNDBUF", socket.set_send_buffer_size(whole(bytes)))?;
        }
        Ok(())
    }

    /// What both kinds are given after bind(2).
    fn common_of_adopted(self, socket: &Socket, options: &Options) -> Result<(), OpenError> {
        self.option("FD_CLOEXEC", socket.set_cloexec(true))?;
        self.option("O_NONBLOCK", socket.set_nonblocking(true))?;
        if let Some(bytes) = options.receive_buffer {
            self.option("SO_RCVBUF", socket.set_recv_buffer_size(whole(bytes)))?;
        }
        if let Some(bytes) = options.send_buffer {
            self.option("SO_SNDBUF", socket.set_send_buffer_size(whole(bytes)))?;
        }
        Ok(())
    }

    /// Room for bursts. The kernel tunes the buffers of TCP, not of UDP: its
    /// fixed 208 KiB hold some 270 short datagrams, and what comes behind
    /// them while a worker is busy is lost. Beyond net.core.rmem_max where we
    /// are privileged enough, else up to it; never a reason to fail.
    fn datagram_buffer(self, socket: &Socket, options: &Options) {
        let bytes = whole(options.receive_buffer.unwrap_or(DATAGRAM_BUFFER_BYTES));
        if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() && options.receive_buffer.is_none() {
            let _ = socket.set_recv_buffer_size(bytes);
        }
    }

    /// Each datagram tells which address the client asked, so that the reply
    /// can leave from there; a wildcard listener would otherwise answer from
    /// whatever address the route prefers.
    fn packet_info(self, socket: &Socket) -> Result<(), OpenError> {
        match self.0 {
            SocketAddr::V4(_) => {
                self.option("IP_PKTINFO", setsockopt(socket, sockopt::Ipv4PacketInfo, &true))
            }
            SocketAddr::V6(_) => {
                self.option("IPV6_RECVPKTINFO", setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true))
            }
        }
    }

    /// Only what this socket joined: the default hands a socket the datagrams
    /// of groups and interfaces that any other process joined, and on the
    /// wildcard address every worker would get a copy of each.
    fn only_joined_groups(self, socket: &Socket) -> Result<(), OpenError> {
        match self.0 {
            SocketAddr::V4(_) => self.option("IP_MULTICAST_ALL", socket.set_multicast_all_v4(false)),
            SocketAddr::V6(_) => self.option("IPV6_MULTICAST_ALL", socket.set_multicast_all_v6(false)),
        }
    }

    fn bind(self, socket: &Socket) -> Result<(), OpenError> {
        socket.bind(&SockAddr::from(self.0)).map_err(|e| self.failed(Step::Bind, e))
    }
}

/// The kernel takes an int and cuts it at its own limit.
fn whole(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX).min(i32::MAX as usize)
}

fn interface_index(interface: &MulticastInterface) -> io::Result<u32> {
    match interface {
        MulticastInterface::Name(name) => Ok(if_nametoindex(name.as_str())?),
        MulticastInterface::Any | MulticastInterface::Address(_) => Ok(0),
    }
}

fn with_scope(group: SocketAddr, index: u32) -> SocketAddr {
    match group {
        SocketAddr::V6(mut v6) if v6.scope_id() == 0 => {
            v6.set_scope_id(index);
            SocketAddr::V6(v6)
        }
        other => other,
    }
}

fn join(socket: &Socket, group: SocketAddr, interface: &MulticastInterface, index: u32) -> io::Result<()> {
    match (group, interface) {
        (SocketAddr::V4(v4), MulticastInterface::Address(address)) => {
            socket.join_multicast_v4(v4.ip(), address)
        }
        (SocketAddr::V4(v4), _) => {
            socket.join_multicast_v4_n(v4.ip(), &InterfaceIndexOrAddress::Index(index))
        }
        // IPv6 names interfaces by number alone.
        (SocketAddr::V6(_), MulticastInterface::Address(_)) => Err(io::ErrorKind::InvalidInput.into()),
        (SocketAddr::V6(v6), _) => socket.join_multicast_v6(v6.ip(), v6.scope_id()),
    }
}

/// A TCP option that no library of ours knows.
fn set_tcp(socket: &Socket, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: needed because neither socket2 nor nix sets these on listeners.
    // The descriptor is borrowed and open for the call, `value` lives on the
    // stack through it, and the length given is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            name,
            std::ptr::from_ref(&value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
