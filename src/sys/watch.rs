//! Waiting for a socket by its state.
//!
//! mio registers for changes alone (EPOLLET): whoever reads then has to ask
//! once more, until nothing is there, or what is left is never told of. A
//! socket that has one datagram at a time is cheaper by its state: one call
//! takes the datagram, and epoll itself looks whether another waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Tells `poll` of a socket under `token` for as long as it is readable or has
/// an error, each time anew. `Registry::deregister` ends it as any other.
pub fn register_readable(poll: &impl AsRawFd, socket: &impl AsFd, token: mio::Token) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token.0 as u64 };
    // SAFETY: needed because mio has no such registration and nix wants to own
    // the epoll descriptor. The kernel reads one event, which lives through
    // the call; both descriptors are open, for they are borrowed.
    super::check(unsafe {
        libc::epoll_ctl(poll.as_raw_fd(), libc::EPOLL_CTL_ADD, socket.as_fd().as_raw_fd(), &raw mut event)
    })?;
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
        register_readable(poll.registry(), &to, mio::Token(7)).unwrap();
        let mut events = mio::Events::with_capacity(4);
        for _ in 0..2 {
            from.send_to(b"!", to.local_addr().unwrap()).unwrap();
        }
        for left in [true, true, false] {
            poll.poll(&mut events, Some(Duration::from_millis(if left { 5_000 } else { 0 }))).unwrap();
            let told: Vec<_> = events.iter().map(|event| (event.token(), event.is_readable())).collect();
            assert_eq!(told, if left { vec![(mio::Token(7), true)] } else { vec![] });
            if left {
                to.recv(&mut [0; 4]).unwrap();
            }
        }
    }
}
