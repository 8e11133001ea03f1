//! Classic BPF for a group of SO_REUSEPORT sockets: what any user may attach.
//!
//! A program's answer is an index into the group, in the order of listen(2)
//! or, for UDP, bind(2); an index that nobody has means the kernel's hash. The
//! group keeps a copy. Attached through any member it replaces what the whole
//! group had.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// One instruction (linux/filter.h, `struct sock_filter`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How many instructions to skip where a comparison holds.
    pub jump_true: u8,
    /// How many where it does not.
    pub jump_false: u8,
    /// The number in it.
    pub k: u32,
}

/// Steers the socket's group by a program.
pub fn attach(socket: impl AsFd, program: &[Instruction]) -> io::Result<()> {
    let filter: Vec<libc::sock_filter> = program
        .iter()
        .map(|i| libc::sock_filter { code: i.code, jt: i.jump_true, jf: i.jump_false, k: i.k })
        .collect();
    let length = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let header = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions behind `filter` during the
    // call and keeps a copy; both outlive it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const header).cast(),
            size_of::<libc::sock_fprog>() as u32,
        )
    };
    super::super::check(result).map(drop)
}

/// Gives the socket's group back to the kernel's hash, whatever kind of
/// program it had. No error where it had none.
pub fn detach(socket: impl AsFd) -> io::Result<()> {
    const SO_DETACH_REUSEPORT_BPF: libc::c_int = 68;
    let nothing: libc::c_int = 0;
    // SAFETY: the kernel reads one int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_DETACH_REUSEPORT_BPF,
            (&raw const nothing).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    match super::super::check(result) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map(drop),
    }
}
