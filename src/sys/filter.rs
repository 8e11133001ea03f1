//! A listener that takes no new handshakes but finishes those under way.
//!
//! A classic BPF socket filter, which needs no privilege, drops a segment that
//! has SYN and not ACK. The handshakes that the kernel has already answered
//! still complete, and what waits in the accept queue stays.

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

/// Takes a filter away that an earlier process left on the socket; one without
/// is left as it is.
pub fn remove(listener: impl AsFd) -> io::Result<()> {
    let unused: libc::c_int = 0;
    // SAFETY: the kernel reads an int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const unused).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    match super::check(result) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ => Ok(()),
    }
}

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
