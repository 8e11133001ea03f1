//! A socket that is polled for a state, not for a change.
//!
//! mio registers everything edge-triggered. A listening socket is cheaper the
//! other way: nobody has to accept once more only to hear that nothing waits.
//! The registration is mio's to show and to end.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Adds a socket to an epoll instance: each wait tells as long as it is
/// readable.
pub fn watch(epoll: &impl AsRawFd, socket: impl AsFd, token: usize) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token as u64 };
    let (epoll, socket) = (epoll.as_raw_fd(), socket.as_fd().as_raw_fd());
    // SAFETY: needed because nix has epoll_ctl only for an instance that it
    // owns. Both descriptors are open, the second one as long as it is
    // borrowed; the event outlives the call.
    super::check(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, socket, &raw mut event) })?;
    Ok(())
}
