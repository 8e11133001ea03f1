//! The operating system: the only place with `unsafe`, and where every
//! socket option is set.
//!
//! Thin: a function here is a system call with an owned type and an
//! `io::Result`, and the reason why it is called this way. Policy lives above.

pub mod accounts;
pub mod activation;
pub mod area;
pub mod bell;
pub mod beside;
pub mod bpf;
pub mod channel;
pub mod clock;
pub mod counts;
pub mod datagram;
pub mod exec;
pub mod filter;
pub mod handshakes;
pub mod holders;
pub mod host;
pub mod isolated;
pub mod level;
pub mod listen;
pub mod local_end;
pub mod notify;
pub mod pipe;
pub mod process;
pub mod queues;
pub mod scheduling;
pub mod shared;
pub mod signals;
pub mod stream;
pub mod table;

use std::io;

/// The last system call's error as a result.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
