//! Sockets that systemd opened and passed: the protocol of sd_listen_fds(3).
//!
//! Called once, before this process opens anything of its own: the numbers
//! are only worth what the environment says. Children inherit neither the
//! descriptors nor the variables (`process::Image`).

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{getsockopt, sockopt};
use socket2::{SockRef, Type};

/// The first descriptor, SD_LISTEN_FDS_START of sd-daemon.h.
const FIRST: RawFd = 3;
/// No unit passes more; RLIMIT_NOFILE is the real bound.
const MOST: usize = 65_536;

/// One descriptor as it came.
#[derive(Debug)]
pub struct Passed {
    /// The descriptor, now close-on-exec.
    pub fd: OwnedFd,
    /// FileDescriptorName= of its unit; "unknown" where there is none.
    pub name: String,
    /// What it is, as far as a listener can use it.
    pub kind: Kind,
}

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TCP socket that listens.
    Tcp(Bound),
    /// A UDP socket.
    Udp(Bound),
    /// Anything else.
    Other,
}

/// What is known of a bound socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Its address.
    pub address: SocketAddr,
    /// The user who opened it: only sockets of the same one may join it.
    pub uid: u32,
    /// Others may join it: SO_REUSEPORT.
    pub shared: bool,
    /// An IPv6 socket that takes IPv4 as well.
    pub dual: bool,
}

/// Takes what was passed to this process; nothing where nothing was.
pub fn take() -> io::Result<Vec<Passed>> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    // Meant for another process, which passed its environment on.
    if variable("LISTEN_PID").parse() != Ok(std::process::id()) {
        return Ok(Vec::new());
    }
    let count = variable("LISTEN_FDS").parse::<usize>().unwrap_or(0);
    if count > MOST {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("LISTEN_FDS={count}")));
    }
    let names = variable("LISTEN_FDNAMES");
    let mut names = names.split(':').filter(|name| !name.is_empty());
    (FIRST..FIRST + count as RawFd)
        .map(|number| {
            let name = names.next().unwrap_or("unknown").to_string();
            let fd = own(number)?;
            let kind = kind_of(&fd);
            Ok(Passed { fd, name, kind })
        })
        .collect()
}

fn own(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the manager passed this number to this very process (LISTEN_PID)
    // and nothing here was opened by ourselves yet, so nobody else owns it; it
    // is open, or the next call says otherwise and it is never closed by us.
    let fd = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    fcntl(&*fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|errno| io::Error::other(format!("descriptor {number} of LISTEN_FDS: {errno}")))?;
    Ok(std::mem::ManuallyDrop::into_inner(fd))
}

fn kind_of(fd: &OwnedFd) -> Kind {
    let socket = SockRef::from(fd);
    let Some(address) = socket.local_addr().ok().and_then(|address| address.as_socket()) else {
        return Kind::Other;
    };
    let bound = Bound {
        address,
        uid: owner(fd),
        shared: socket.reuse_port().unwrap_or(false),
        dual: address.is_ipv6() && !socket.only_v6().unwrap_or(true),
    };
    match socket.r#type() {
        Ok(Type::STREAM) if getsockopt(fd, sockopt::AcceptConn) == Ok(true) => Kind::Tcp(bound),
        Ok(Type::DGRAM) => Kind::Udp(bound),
        _ => Kind::Other,
    }
}

/// The uid that the kernel compares when another socket wants to join
/// (include/net/sock.h, sk_uid: the inode's owner).
fn owner(fd: &OwnedFd) -> u32 {
    let file = std::fs::File::from(match fd.try_clone() {
        Ok(copy) => copy,
        Err(_) => return u32::MAX,
    });
    file.metadata().map_or(u32::MAX, |metadata| metadata.uid())
}

/// The number of a descriptor, for messages.
pub fn number(passed: &Passed) -> RawFd {
    passed.fd.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn an_adopted_datagram_socket_can_no_longer_be_stolen() {
        // As systemd opens one: SO_REUSEADDR set.
        let socket = socket2::Socket::new(socket2::Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let fd = OwnedFd::from(socket);
        let Kind::Udp(bound) = kind_of(&fd) else { panic!("not UDP") };
        crate::sys::listen::adopt_udp(&fd, bound.address, &crate::sys::listen::Options::default()).unwrap();
        let socket = SockRef::from(&fd);
        assert!(!socket.reuse_address().unwrap() && socket.reuse_port().unwrap());
        assert!(socket.nonblocking().unwrap());
        assert_eq!(fcntl(&fd, FcntlArg::F_GETFD).unwrap(), FdFlag::FD_CLOEXEC.bits());
    }

    #[test]
    fn an_adopted_listener_takes_handshakes_whatever_was_left_on_it() {
        use std::net::TcpStream;
        use std::time::Duration;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        crate::sys::filter::refuse_new_handshakes(&listener).unwrap();
        assert!(TcpStream::connect_timeout(&address, Duration::from_millis(50)).is_err());
        let fd = OwnedFd::from(listener);
        crate::sys::listen::adopt_tcp(&fd, address, &crate::sys::listen::Options::default()).unwrap();
        assert!(TcpStream::connect_timeout(&address, Duration::from_secs(10)).is_ok());
    }

    #[test]
    fn a_listener_a_datagram_socket_and_a_file_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let Kind::Tcp(bound) = kind_of(&listener.into()) else { panic!("not TCP") };
        assert_eq!((bound.address, bound.shared, bound.dual), (address, false, false));
        assert_eq!(bound.uid, nix::unistd::geteuid().as_raw());
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(matches!(kind_of(&udp.into()), Kind::Udp(_)));
        assert_eq!(kind_of(&tempfile::tempfile().unwrap().into()), Kind::Other);
        let unconnected = socket2::Socket::new(socket2::Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(kind_of(&unconnected.into()), Kind::Other);
    }
}
