//! A bell that any number of processes may hear: an eventfd.
//!
//! Whoever polls it edge-triggered hears each ring and need not read it
//! (eventfd(2), epoll(7): every write is an edge, in every epoll instance);
//! one process may instead wait for the number of rings. Owned by whoever
//! holds a descriptor of it. Bound: rings are counted up to 2^64 and told
//! together.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A bell.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A new bell.
    pub fn new() -> io::Result<Bell> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Bell(OwnedFd::from(EventFd::from_flags(flags)?)))
    }

    /// A bell that another process passed.
    pub fn from_fd(fd: OwnedFd) -> Bell {
        Bell(fd)
    }

    /// Rings. Cannot wait: a bell that was rung so often that it counts no
    /// further is still ringing.
    pub fn ring(&self) {
        let _ = nix::unistd::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Waits until it has been rung since the last call here, by anybody; the
    /// count begins anew.
    pub fn wait(&self) -> io::Result<u64> {
        loop {
            let mut count = [0; 8];
            match nix::unistd::read(&self.0, &mut count) {
                Ok(_) => return Ok(u64::from_ne_bytes(count)),
                Err(nix::errno::Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut fds, PollTimeout::NONE) {
                        Err(nix::errno::Errno::EINTR) => {}
                        result => drop(result?),
                    }
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mio::unix::SourceFd;
    use mio::{Events, Interest, Poll, Token};
    use std::time::Duration;

    #[test]
    fn every_ring_is_heard_by_all_though_nobody_reads() {
        let bell = Bell::new().unwrap();
        let mut polls: Vec<Poll> = (0..3).map(|_| Poll::new().unwrap()).collect();
        for poll in &polls {
            poll.registry().register(&mut SourceFd(&bell.as_raw_fd()), Token(1), Interest::READABLE).unwrap();
        }
        let mut events = Events::with_capacity(4);
        for _ in 0..3 {
            bell.ring();
            for poll in &mut polls {
                poll.poll(&mut events, Some(Duration::from_secs(5))).unwrap();
                assert_eq!(events.iter().count(), 1);
                // Heard once: an idle process sleeps on.
                poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
                assert_eq!(events.iter().count(), 0);
            }
        }
    }

    #[test]
    fn rings_are_counted_until_somebody_waits() {
        let bell = Bell::new().unwrap();
        (0..5).for_each(|_| bell.ring());
        assert_eq!(bell.wait().unwrap(), 5);
        std::thread::scope(|scope| {
            scope.spawn(|| bell.ring());
            assert_eq!(bell.wait().unwrap(), 1);
        });
    }
}
