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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sys::filter;

    /// A connection: who connected, and who accepted.
    fn pair() -> [TcpStream; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [connected, listener.accept().unwrap().0]
    }

    fn state_of(socket: &TcpStream) -> TcpState {
        of_tcp(socket).unwrap().state
    }

    fn eventually(what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::yield_now();
        }
    }

    /// Both sides of a connection count what the test has counted.
    #[track_caller]
    fn agree(sockets: &[TcpStream; 2], read: [u64; 2], written: [u64; 2]) {
        for side in 0..2 {
            let counts = of_tcp(&sockets[side]).unwrap();
            let found = (counts.consumed(), counts.written(side == 0));
            assert_eq!(found, (read[side], written[side]), "side {side}: {counts:?}");
            let has_fin_under_way = counts.state.has_our_fin();
            if !has_fin_under_way {
                assert_eq!(counts.handed_over, written[side], "by the other way: {counts:?}");
            }
        }
    }

    #[test]
    fn what_was_read_and_written_is_known_in_every_state() {
        // Who finishes first, and what was left unread then.
        for (first, unread) in [(0, 0), (0, 700), (1, 0), (1, 700)] {
            let sockets = pair();
            let other = 1 - first;
            agree(&sockets, [0, 0], [0, 0]);
            let (mut read, mut written) = ([0, 0], [0, 0]);
            let mut buffer = [0; 4096];
            let mut exchange =
                |from: usize, count: usize, take: usize, read: &mut [u64; 2], written: &mut [u64; 2]| {
                    (&sockets[from]).write_all(&vec![7; count]).unwrap();
                    written[from] += count as u64;
                    (&sockets[1 - from]).read_exact(&mut buffer[..take]).unwrap();
                    read[1 - from] += take as u64;
                };
            exchange(0, 1000, 1000, &mut read, &mut written);
            exchange(1, 2000, 1500, &mut read, &mut written);
            exchange(first, 1000 + unread, 1000 - 500 * first, &mut read, &mut written);
            agree(&sockets, read, written);
            sockets[first].shutdown(Shutdown::Write).unwrap();
            eventually("the end arrives", || state_of(&sockets[other]) == TcpState::CloseWait);
            eventually("it is acknowledged", || state_of(&sockets[first]) == TcpState::FinWait2);
            agree(&sockets, read, written);
            // Half-closed, the other way still works.
            exchange(other, 300, 300, &mut read, &mut written);
            agree(&sockets, read, written);
            let mut rest = Vec::new();
            (&sockets[other]).read_to_end(&mut rest).unwrap();
            read[other] += rest.len() as u64;
            agree(&sockets, read, written);
            assert_eq!((&sockets[other]).read(&mut buffer).unwrap(), 0, "an end is read again");
            sockets[other].shutdown(Shutdown::Write).unwrap();
            eventually("both are closed", || {
                sockets.iter().all(|socket| state_of(socket) == TcpState::Close)
            });
            agree(&sockets, read, written);
            assert!(!of_tcp(&sockets[first]).unwrap().has_error);
            rest.clear();
            (&sockets[first]).read_to_end(&mut rest).unwrap();
            read[first] += rest.len() as u64;
            agree(&sockets, read, written);
            assert_eq!(read, [written[1], written[0]]);
        }
    }

    #[test]
    fn what_nobody_takes_is_counted_as_written() {
        let sockets = pair();
        sockets[0].set_nonblocking(true).unwrap();
        let mut written = 0;
        while let Ok(count) = (&sockets[0]).write(&[1; 100_000]) {
            written += count as u64;
        }
        assert!(written > 100_000);
        agree(&sockets, [0, 0], [written, 0]);
        // Our end stands behind what was not even sent.
        sockets[0].shutdown(Shutdown::Write).unwrap();
        assert_eq!(state_of(&sockets[0]), TcpState::FinWait1);
        agree(&sockets, [0, 0], [written, 0]);
        let mut read = vec![0; 50_000];
        (&sockets[1]).read_exact(&mut read).unwrap();
        agree(&sockets, [0, 50_000], [written, 0]);
    }

    #[test]
    fn what_had_to_be_sent_again_counts_once() {
        let sockets = pair();
        filter::take_nothing(&sockets[1]).unwrap();
        (&sockets[0]).write_all(&[1; 5_000]).unwrap();
        let retransmitted = || info(sockets[0].as_fd()).unwrap().tcpi_bytes_retrans > 0;
        eventually("it is sent again", retransmitted);
        agree(&sockets, [0, 0], [5_000, 0]);
        socket2::SockRef::from(&sockets[1]).detach_filter().unwrap();
        let mut read = [0; 5_000];
        (&sockets[1]).read_exact(&mut read).unwrap();
        agree(&sockets, [0, 5_000], [5_000, 0]);
    }

    #[test]
    fn a_reset_is_no_orderly_end_and_its_error_is_left_to_be_read() {
        let [client, server] = pair();
        (&client).write_all(b"unread").unwrap();
        socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
        drop(server);
        eventually("it is reset", || state_of(&client) == TcpState::Close);
        for _ in 0..2 {
            assert!(of_tcp(&client).unwrap().has_error);
        }
        assert!((&client).read(&mut [0; 10]).is_err());
        assert!(!of_tcp(&client).unwrap().has_error);
        assert_eq!((&client).read(&mut [0; 10]).unwrap(), 0, "from here on it looks like an end");
    }

    #[test]
    fn a_unix_socket_has_no_counts_and_a_pipe_says_what_it_holds() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(of_tcp(&socket).is_err());
        let (reader, writer) = nix::unistd::pipe().unwrap();
        assert_eq!(of_pipe(&reader).unwrap(), 0);
        nix::unistd::write(&writer, &[0; 300]).unwrap();
        assert_eq!(of_pipe(&reader).unwrap(), 300);
    }
}
