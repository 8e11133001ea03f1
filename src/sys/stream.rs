//! A connected byte stream, TCP or Unix, and how one comes to be.
//!
//! Non-blocking and close-on-exec from its first moment. Four bytes: the
//! worker holds two of these a session and nothing else of the system's.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use super::local_end::{self, LocalEnd, Window};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

/// One side of a session.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
}

/// What a connect that cannot wait says.
#[derive(Debug)]
pub enum Connecting {
    /// Connected at once, as loopback and Unix sockets do.
    Done(Stream),
    /// The stream becomes writable when it is decided.
    UnderWay(Stream),
}

/// Options of a TCP connection. Set on a listener they are inherited by every
/// connection that it accepts (net/ipv4/tcp_minisocks.c), for no call at all.
#[derive(Clone, Copy, Debug)]
pub struct TcpOptions {
    /// Idle time before the first keep-alive probe; zero = none.
    pub keepalive: Duration,
    /// TCP_USER_TIMEOUT; zero = the kernel's.
    pub user_timeout: Duration,
}

impl TcpOptions {
    /// Sets the options on a listener.
    pub fn apply(&self, socket: impl AsFd) -> io::Result<()> {
        let fd = socket.as_fd();
        set_inline(&SockRef::from(&fd))?;
        self.settle(fd)
    }

    /// Sets on a connection that was made, not accepted, what it can do
    /// without at first.
    pub fn settle(&self, socket: impl AsFd) -> io::Result<()> {
        let fd = socket.as_fd();
        set_quick(fd)?;
        let socket = SockRef::from(&fd);
        if !self.keepalive.is_zero() {
            let time = self.keepalive.max(Duration::from_secs(1));
            socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(time))?;
        }
        if !self.user_timeout.is_zero() {
            socket.set_tcp_user_timeout(Some(self.user_timeout))?;
        }
        Ok(())
    }
}

/// Small segments are sent at once, and what was held back is: who wrote it
/// may wait for the answer. Without it only a small segment behind one that is
/// not acknowledged waits (Nagle), so the first one never does.
pub fn set_quick(socket: impl AsFd) -> io::Result<()> {
    SockRef::from(&socket.as_fd()).set_tcp_nodelay(true)
}

/// Urgent bytes stay in the stream: kept out of it they would be lost.
fn set_inline(socket: &SockRef) -> io::Result<()> {
    socket.set_out_of_band_inline(true)
}

/// Accepts one connection; would-block when none waits.
pub fn accept(listener: impl AsFd) -> io::Result<(Stream, SocketAddr)> {
    // accept4 through libc: one call, both flags, no further fcntl.
    let fd = listener.as_fd().as_raw_fd();
    // SAFETY: `try_init` gives a buffer of the length that it says; accept4
    // writes at most that much and sets the length; a non-negative result is a
    // new descriptor that nobody else owns.
    let (stream, address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            let new = super::check(libc::accept4(fd, storage.cast(), length, flags))?;
            Ok(Stream { fd: OwnedFd::from_raw_fd(new) })
        })?
    };
    let address = address.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((stream, address))
}

/// Begins a TCP connection; `ports` = the local ones that will do. Of its
/// options it has only the one that cannot wait: the shortest connections need
/// no other (`TcpOptions::settle`).
pub fn connect_tcp(address: SocketAddr, from: LocalEnd, ports: Option<Window>) -> io::Result<Connecting> {
    let socket = Socket::new(Domain::for_address(address), nonblocking_stream(), Some(Protocol::TCP))?;
    set_inline(&SockRef::from(&socket))?;
    if let Some(window) = ports {
        local_end::narrow(&socket, window)?;
    }
    from.bind(&socket)?;
    begin(socket, &SockAddr::from(address))
}

/// Begins a connection to a Unix socket. Would-block here means that the
/// server's queue is full, not that it is under way (unix(7)).
pub fn connect_unix(path: &Path) -> io::Result<Connecting> {
    let socket = Socket::new(Domain::UNIX, nonblocking_stream(), None)?;
    begin(socket, &SockAddr::unix(path)?)
}

fn nonblocking_stream() -> Type {
    Type::STREAM.nonblocking().cloexec()
}

fn begin(socket: Socket, address: &SockAddr) -> io::Result<Connecting> {
    let done = match socket.connect(address) {
        Ok(()) => true,
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => false,
        Err(error) => return Err(error),
    };
    let stream = Stream { fd: socket.into() };
    Ok(if done { Connecting::Done(stream) } else { Connecting::UnderWay(stream) })
}

impl Stream {
    /// Receives into the buffer; 0 = the other side has finished.
    pub fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match nix::sys::socket::recv(self.raw(), into, nix::sys::socket::MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Looks at what `receive` would give, and leaves it there.
    pub fn peek(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match nix::sys::socket::recv(self.raw(), into, nix::sys::socket::MsgFlags::MSG_PEEK) {
                Err(nix::errno::Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Sends what the kernel will take.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match nix::sys::socket::send(self.raw(), bytes, nix::sys::socket::MsgFlags::MSG_NOSIGNAL) {
                Err(nix::errno::Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Tells the other side that nothing more will come.
    pub fn finish(&self) -> io::Result<()> {
        SockRef::from(&self.fd).shutdown(std::net::Shutdown::Write)
    }

    /// How a connect ended.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        SockRef::from(&self.fd).take_error()
    }

    /// Closing will reset the connection instead of finishing it. What is
    /// still in the send queue is thrown away, so look at `unsent` first.
    pub fn reset_on_close(&self) -> io::Result<()> {
        SockRef::from(&self.fd).set_linger(Some(Duration::ZERO))
    }

    /// Bytes that the other side has not acknowledged (SIOCOUTQ, tcp(7));
    /// 0 on a Unix socket means that all was read.
    pub fn unsent(&self) -> io::Result<usize> {
        let mut count: libc::c_int = 0;
        // SAFETY: TIOCOUTQ (= SIOCOUTQ) stores one int, and nothing else.
        super::check(unsafe { libc::ioctl(self.raw(), libc::TIOCOUTQ, &raw mut count) })?;
        Ok(count.max(0) as usize)
    }

    /// The other side's address, as long as it is connected.
    pub fn peer(&self) -> io::Result<Option<SocketAddr>> {
        Ok(SockRef::from(&self.fd).peer_addr()?.as_socket())
    }

    /// Our own address of the connection.
    pub fn local(&self) -> io::Result<Option<SocketAddr>> {
        Ok(SockRef::from(&self.fd).local_addr()?.as_socket())
    }

    fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.raw()
    }
}

impl From<OwnedFd> for Stream {
    fn from(fd: OwnedFd) -> Stream {
        Stream { fd }
    }
}
