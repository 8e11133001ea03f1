//! Socket filters: what a socket does not even queue.
//!
//! Classic BPF, which needs no privilege. `refuse_new_handshakes` is for a TCP
//! listener that leaves: it drops a segment that has SYN and not ACK; the
//! handshakes that the kernel has already answered still complete, and what
//! waits in the accept queue stays. `take_share` divides a multicast group
//! among sockets that each get all of it. `take_all` is for one that gets copies
//! again. `take_nothing` is for a socket that
//! only holds its port. A filter belongs to the socket, so every holder of it
//! is affected, and it outlives the process that set it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

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
    attach(listener, &program)
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
