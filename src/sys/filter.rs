//! Socket filters: what a socket does not even queue.
//!
//! `refuse_new_handshakes` is for a TCP listener that leaves: it drops a segment
//! that has SYN and not ACK; the handshakes that the kernel has already answered
//! still complete, and what waits in the accept queue stays. `take_share` divides
//! a multicast group among sockets that each get all of it. `take_all` is for
//! one that gets copies again, `take_nothing` for a socket that only holds its
//! port. A filter belongs to the socket, so every
//! holder of it is affected, and it outlives the process that set it.
//!
//! Some kernels want CAP_NET_ADMIN for a filter on a TCP socket (6.18.44 does,
//! measured; on a UDP socket it does not), which a worker has given up. Then
//! the listener asks for more hops left than a packet has: IP_MINTTL at 255 is
//! looked at for segments to the listener itself, not for those that complete
//! a handshake (net/ipv4/tcp_ipv4.c, tcp_v4_rcv: TCP_NEW_SYN_RECV comes
//! first). What such a listener brings forth inherits the demand, so whoever
//! accepts from it calls `welcome`; what the client sent before that is sent
//! again by its kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// No packet that crossed a router has more hops left, and few begin with it.
const MOST_HOPS: libc::c_int = 255;

/// Drops new handshakes at a TCP listener from now on, for every holder of the
/// socket.
pub fn refuse_new_handshakes(listener: impl AsFd) -> io::Result<()> {
    // A TCP socket's filter sees the segment from its TCP header on
    // (net/ipv4/tcp_ipv4.c, tcp_filter): byte 13 holds the flags.
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    let program = [
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, FLAGS),
        op(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, SYN | ACK),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, SYN),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    match attach(&listener, &program) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => demand_hops(listener, MOST_HOPS),
        done => done,
    }
}

/// Whether what this listener brings forth needs a `welcome`.
pub fn is_closed(listener: impl AsFd) -> bool {
    let (level, name) = hops_option(&listener);
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `value` and the
    // length to `length`; both live through the call.
    let result = unsafe {
        let fd = listener.as_fd().as_raw_fd();
        libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut length)
    };
    result == 0 && value == MOST_HOPS
}

/// Lets a connection hear its client, though its listener is closed to new
/// ones.
pub fn welcome(connection: impl AsFd) -> io::Result<()> {
    demand_hops(connection, 0)
}

fn demand_hops(socket: impl AsFd, hops: libc::c_int) -> io::Result<()> {
    let (level, name) = hops_option(&socket);
    set(socket, level, name, hops)
}

fn hops_option(socket: impl AsFd) -> (libc::c_int, libc::c_int) {
    let fd = socket.as_fd();
    match socket2::SockRef::from(&fd).domain() {
        Ok(socket2::Domain::IPV6) => (libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT),
        _ => (libc::IPPROTO_IP, libc::IP_MINTTL),
    }
}

/// Takes away what keeps new handshakes out, whoever set it; a socket without
/// is left as it is.
pub fn remove(listener: impl AsFd) -> io::Result<()> {
    demand_hops(&listener, 0)?;
    match set(listener, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ => Ok(()),
    }
}

fn set(socket: impl AsFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads one int, which lives through the call, and the
    // length given is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    super::check(result).map(drop)
}

/// From now on the socket takes the share `index` of `count` of the datagrams
/// that reach it, by address and port of their source. Sockets with the shares
/// 0 to `count - 1` of one group take each datagram exactly once.
pub fn take_share(socket: impl AsFd, v6: bool, index: u32, count: u32) -> io::Result<()> {
    // Offsets from SKF_NET_OFF are into the IP header; offset 0 of a UDP
    // socket's filter is the UDP header, which begins with the source port.
    let network = libc::SKF_NET_OFF as u32;
    let words: &[u32] = if v6 { &[8, 12, 16, 20] } else { &[12] };
    let load = |size: u32, at: u32| op(libc::BPF_LD | size | libc::BPF_ABS, 0, 0, at);
    let calculate = |what: u32, k: u32| op(libc::BPF_ALU | what, 0, 0, k);
    let to_x = op(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0);
    let mut program = vec![load(libc::BPF_H, 0)];
    for word in words {
        program.extend([
            to_x,
            load(libc::BPF_W, network.wrapping_add(*word)),
            calculate(BPF_XOR | libc::BPF_X, 0),
        ]);
    }
    // The high half of a product: every bit of the source has its say.
    program.extend([
        calculate(libc::BPF_MUL | libc::BPF_K, 0x9e37_79b1),
        calculate(libc::BPF_RSH | libc::BPF_K, 16),
        calculate(BPF_MOD | libc::BPF_K, count.max(1)),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, index),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ]);
    attach(socket, &program)
}

/// The socket has no filter any more.
pub fn take_all(socket: impl AsFd) -> io::Result<()> {
    let nothing: libc::c_int = 0;
    // SAFETY: needed because no library of ours detaches filters. The kernel
    // reads one int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const nothing).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    match super::check(result) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result.map(drop),
    }
}

/// The socket queues nothing any more.
pub fn take_nothing(socket: impl AsFd) -> io::Result<()> {
    attach(socket, &[op(libc::BPF_RET | libc::BPF_K, 0, 0, 0)])
}

/// include/uapi/linux/filter.h; libc has them for some targets alone.
const BPF_MOD: u32 = 0x90;
const BPF_XOR: u32 = 0xa0;

fn op(code: u32, jump_true: u8, jump_false: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: jump_true, jf: jump_false, k }
}

fn attach(socket: impl AsFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let header = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions behind `filter` during the
    // call and keeps a copy; both outlive it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const header).cast(),
            size_of::<libc::sock_fprog>() as u32,
        )
    };
    super::check(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::Duration;

    /// What a worker without CAP_NET_ADMIN does, tried as any user.
    fn closed_by_hops(address: &str) {
        let Ok(listener) = TcpListener::bind(address) else {
            println!("SKIPPED: no {address} here");
            return;
        };
        let address: SocketAddr = listener.local_addr().unwrap();
        let mut early = TcpStream::connect(address).unwrap();
        assert!(!is_closed(&listener));
        demand_hops(&listener, MOST_HOPS).unwrap();
        assert!(is_closed(&listener));
        assert!(TcpStream::connect_timeout(&address, Duration::from_millis(100)).is_err());
        // What waited in the queue is served.
        let (mut accepted, _) = listener.accept().unwrap();
        welcome(&accepted).unwrap();
        early.write_all(b"early").unwrap();
        accepted.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut bytes = [0; 5];
        accepted.read_exact(&mut bytes).unwrap();
        remove(&listener).unwrap();
        assert!(!is_closed(&listener));
        // A SYN that was dropped comes again after a second.
        TcpStream::connect_timeout(&address, Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn a_demand_for_hops_keeps_handshakes_out_and_what_waits_in() {
        closed_by_hops("127.0.0.1:0");
        closed_by_hops("[::1]:0");
    }

    #[test]
    fn a_handshake_under_way_completes_in_spite_of_the_demand() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Holds the handshake half open until the client's first bytes.
        set(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 5).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        demand_hops(&listener, MOST_HOPS).unwrap();
        client.write_all(b"completes").unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        welcome(&accepted).unwrap();
        accepted.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut bytes = [0; 9];
        accepted.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"completes");
    }

    #[test]
    fn a_connection_that_inherited_the_demand_hears_its_client_once_welcome() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        // As if the handshake had been completed after the demand.
        demand_hops(&accepted, MOST_HOPS).unwrap();
        client.write_all(b"again").unwrap();
        accepted.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(accepted.read(&mut [0; 5]).is_err(), "it is deaf");
        welcome(&accepted).unwrap();
        accepted.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut bytes = [0; 5];
        accepted.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"again");
    }
}
