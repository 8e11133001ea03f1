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

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::time::Duration;

    #[test]
    fn what_was_left_unread_is_told_of_again() {
        let (from, to) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let mut poll = mio::Poll::new().unwrap();
        watch(poll.registry(), &to, 7).unwrap();
        let mut events = mio::Events::with_capacity(4);
        for _ in 0..2 {
            from.send_to(b"!", to.local_addr().unwrap()).unwrap();
        }
        for is_left in [true, true, false] {
            let limit = Duration::from_secs(if is_left { 10 } else { 0 });
            poll.poll(&mut events, Some(limit)).unwrap();
            let told: Vec<_> = events.iter().map(|event| (event.token().0, event.is_readable())).collect();
            assert_eq!(told, if is_left { vec![(7, true)] } else { vec![] });
            if is_left {
                to.recv(&mut [0; 4]).unwrap();
            }
        }
    }
}
