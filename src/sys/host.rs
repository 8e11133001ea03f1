//! What this process may have of its host, as far as it takes system calls
//! to find out. Reads only; each call opens at most one socket and closes it.

use std::io;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

/// RLIMIT_NOFILE: soft, then hard.
pub fn open_file_limits() -> io::Result<(u64, u64)> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?)
}

/// Does the kernel cut one big datagram into many on the way out
/// (UDP_SEGMENT), and join many into one on the way in (UDP_GRO)?
pub fn udp_offloads() -> io::Result<(bool, bool)> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), None)?;
    let out = setsockopt(&socket, sockopt::UdpGsoSegment, &1200).is_ok();
    let into = setsockopt(&socket, sockopt::UdpGroSegment, &true).is_ok();
    Ok((out, into))
}
