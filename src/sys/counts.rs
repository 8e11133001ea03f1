//! What the kernel has counted of a TCP connection, and what a pipe holds.
//!
//! A process that is killed between a system call and the store of its result
//! leaves no trace of the call; the kernel's counts do. They begin at zero with
//! the connection, so no beginning has to be remembered: what was ever taken
//! out of a socket and put into it follows from one look. A few system calls a
//! look, and the socket's reader never notices. Verified for Linux 4.19 and
//! later (tcpi_bytes_sent); holds for connections without TCP Fast Open.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How often a look is repeated that something overtook.
const TRIES: usize = 1_000;

/// Where a connection stands (include/net/tcp_states.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum TcpState {
    Established,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
}

impl TcpState {
    fn of_number(number: u8) -> Option<TcpState> {
        Some(match number {
            1 => TcpState::Established,
            2 => TcpState::SynSent,
            3 => TcpState::SynReceived,
            4 => TcpState::FinWait1,
            5 => TcpState::FinWait2,
            6 => TcpState::TimeWait,
            7 => TcpState::Close,
            8 => TcpState::CloseWait,
            9 => TcpState::LastAck,
            10 => TcpState::Listen,
            11 => TcpState::Closing,
            _ => return None,
        })
    }

    /// Whether the peer's FIN has come. A connection that was reset is in Close
    /// without one.
    pub fn has_peers_fin(self) -> bool {
        match self {
            TcpState::CloseWait
            | TcpState::LastAck
            | TcpState::Closing
            | TcpState::TimeWait
            | TcpState::Close => true,
            TcpState::Established
            | TcpState::SynSent
            | TcpState::SynReceived
            | TcpState::FinWait1
            | TcpState::FinWait2
            | TcpState::Listen => false,
        }
    }

    /// Whether our FIN stands behind what was written, sent or not.
    pub fn has_our_fin(self) -> bool {
        match self {
            TcpState::FinWait1
            | TcpState::FinWait2
            | TcpState::Closing
            | TcpState::LastAck
            | TcpState::TimeWait
            | TcpState::Close => true,
            TcpState::Established
            | TcpState::SynSent
            | TcpState::SynReceived
            | TcpState::CloseWait
            | TcpState::Listen => false,
        }
    }
}

/// One look at a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpCounts {
    /// Where it stands.
    pub state: TcpState,
    /// An error waits to be read. It is left there: who takes it away makes a
    /// reset look like an end.
    pub has_error: bool,
    /// tcpi_bytes_received: all that came in order, the peer's FIN as one.
    pub received: u64,
    /// tcpi_bytes_acked: all that the peer has, our FIN as one, and the SYN of
    /// the side that connected.
    pub acked: u64,
    /// SIOCINQ: what was not read; a FIN is not counted.
    pub unread: u64,
    /// SIOCOUTQ: what the peer has not acknowledged, our FIN as one.
    pub unacked: u64,
    /// tcpi_bytes_sent, less tcpi_bytes_retrans, and tcpi_notsent_bytes: the
    /// same as what was written, by another way.
    pub handed_over: u64,
}

impl TcpCounts {
    /// Bytes that were ever read from it.
    pub fn consumed(&self) -> u64 {
        let fin = u64::from(self.state.has_peers_fin());
        self.received.saturating_sub(self.unread).saturating_sub(fin)
    }

    /// Bytes that were ever written to it; `connected` = by the side that did
    /// connect(2).
    pub fn written(&self, connected: bool) -> u64 {
        let syn = u64::from(connected && self.state != TcpState::SynSent);
        let fin = u64::from(self.state.has_our_fin());
        (self.acked + self.unacked).saturating_sub(syn).saturating_sub(fin)
    }
}

/// Looks until nothing has moved meanwhile. An error where the socket is no
/// connection, or never rests.
pub fn of_tcp(socket: impl AsFd) -> io::Result<TcpCounts> {
    let socket = socket.as_fd();
    let mut before = info(socket)?;
    for _ in 0..TRIES {
        let unread = count(socket, libc::FIONREAD)?;
        let unacked = count(socket, libc::TIOCOUTQ)?;
        let after = info(socket)?;
        let rests = before.tcpi_bytes_received == after.tcpi_bytes_received
            && before.tcpi_bytes_acked == after.tcpi_bytes_acked
            && before.tcpi_state == after.tcpi_state;
        if rests {
            let state = TcpState::of_number(after.tcpi_state).ok_or(io::ErrorKind::Unsupported)?;
            let handed_over = after.tcpi_bytes_sent.wrapping_sub(after.tcpi_bytes_retrans);
            return Ok(TcpCounts {
                state,
                has_error: has_error(socket)?,
                received: after.tcpi_bytes_received,
                acked: after.tcpi_bytes_acked,
                unread,
                unacked,
                handed_over: handed_over.wrapping_add(after.tcpi_notsent_bytes.into()),
            });
        }
        before = after;
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// How many bytes lie in a pipe.
pub fn of_pipe(reader: impl AsFd) -> io::Result<usize> {
    Ok(count(reader.as_fd(), libc::FIONREAD)? as usize)
}

fn has_error(socket: BorrowedFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)))
}

fn info(socket: BorrowedFd) -> io::Result<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: needed because no library of ours reads TCP_INFO. The kernel
    // writes at most `length` bytes, the size of what the pointer leads to.
    super::check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    })?;
    // SAFETY: all its fields are integers, for which zeroes are a value.
    Ok(unsafe { info.assume_init() })
}

fn count(fd: BorrowedFd, request: libc::Ioctl) -> io::Result<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD and TIOCOUTQ store one int, and nothing else.
    super::check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut count) })?;
    Ok(count.max(0) as u64)
}
