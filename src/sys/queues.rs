//! What waits at a listening socket, and what the kernel dropped there.
//!
//! Two getsockopt(2) calls a socket, no right needed, and the socket's reader
//! never notices.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

/// A socket's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// TCP: connections that nobody has accepted. UDP: bytes that nobody has
    /// read, as the kernel charges them.
    pub waiting: u64,
    /// How much may wait.
    pub limit: u64,
    /// What was dropped since the socket was opened. TCP: handshakes that
    /// found the queue full (or no memory, or a filter); UDP: datagrams that
    /// found it full, or that a filter refused.
    pub dropped: u64,
}

/// The accept queue of a listening TCP socket.
pub fn of_tcp(socket: impl AsFd) -> io::Result<Queue> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: needed because no library of ours reads TCP_INFO. The kernel
    // writes at most `length` bytes, the size of what the pointer leads to.
    super::check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    })?;
    // SAFETY: all its fields are integers, for which zeroes are a value.
    let info = unsafe { info.assume_init() };
    // What they mean at a socket that listens: net/ipv4/tcp.c, tcp_get_info.
    let (waiting, limit) = (info.tcpi_unacked, info.tcpi_sacked);
    let [.., dropped] = memory(socket)?;
    Ok(Queue { waiting: waiting.into(), limit: limit.into(), dropped: dropped.into() })
}

/// The receive queue of a UDP socket.
pub fn of_udp(socket: impl AsFd) -> io::Result<Queue> {
    let [waiting, limit, .., dropped] = memory(socket)?;
    Ok(Queue { waiting: waiting.into(), limit: limit.into(), dropped: dropped.into() })
}

/// SO_MEMINFO: the nine SK_MEMINFO_ variables of include/uapi/linux/sock_diag.h.
pub fn memory(socket: impl AsFd) -> io::Result<[u32; 9]> {
    let mut memory = [0u32; 9];
    let mut length = size_of_val(&memory) as libc::socklen_t;
    // SAFETY: needed because no library of ours knows SO_MEMINFO. The kernel
    // writes at most `length` bytes, the size of the array behind the pointer.
    super::check(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            memory.as_mut_ptr().cast(),
            &raw mut length,
        )
    })?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    #[test]
    fn who_waits_to_be_accepted_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(7).unwrap()).unwrap();
        assert_eq!(of_tcp(&listener).unwrap(), Queue { waiting: 0, limit: 7, dropped: 0 });
        let address = listener.local_addr().unwrap();
        let _clients: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        assert_eq!(of_tcp(&listener).unwrap(), Queue { waiting: 3, limit: 7, dropped: 0 });
    }

    #[test]
    fn datagrams_that_found_no_room_are_counted() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket2::SockRef::from(&socket).set_recv_buffer_size(4096).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..100 {
            client.send_to(&[0; 512], socket.local_addr().unwrap()).unwrap();
        }
        let queue = of_udp(&socket).unwrap();
        assert!(queue.waiting > 0 && queue.limit > 0, "{queue:?}");
        assert!((1..100).contains(&queue.dropped), "{queue:?}");
    }
}
