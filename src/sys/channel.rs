//! Messages with descriptors between the daemon's own processes.
//!
//! A `SOCK_SEQPACKET` pair: a message arrives whole or not at all, and the
//! other side's death is an end-of-file. Bound: `MAX_BYTES` and `MAX_FDS` a
//! message; larger things travel as a memfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use std::io::{IoSlice, IoSliceMut};

/// The longest message. A sequenced packet of 256 KiB is refused by the
/// kernel's default send buffer (208 KiB, measured), so stay well below.
pub const MAX_BYTES: usize = 64 * 1024;
/// The most descriptors of one message: SCM_MAX_FD of the kernel's
/// include/net/scm.h.
pub const MAX_FDS: usize = 253;

/// One end of a pair.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// What arrived.
#[derive(Debug)]
pub struct Packet {
    /// The message's bytes.
    pub bytes: Vec<u8>,
    /// Its descriptors, close-on-exec, owned by the receiver.
    pub fds: Vec<OwnedFd>,
}

impl Channel {
    /// Two connected ends, close-on-exec and blocking.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Channel { socket: a }, Channel { socket: b }))
    }

    /// Takes up an end that was inherited.
    pub fn from_fd(socket: OwnedFd) -> Channel {
        Channel { socket }
    }

    /// The end as a descriptor, to be given to a child.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// From now on `send` and `receive` answer would-block instead of waiting.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        socket2::SockRef::from(&self.socket).set_nonblocking(true)
    }

    /// The other end can send nothing from now on. What it has sent before can
    /// still be received, and this end can still send.
    pub fn hush(&self) {
        let _ = socket2::SockRef::from(&self.socket).shutdown(std::net::Shutdown::Read);
    }

    /// Sends one message. The descriptors stay the caller's.
    ///
    /// Errors: would-block when the receiver does not read and the end is
    /// non-blocking; EPIPE when it is gone; invalid input over the bounds.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd]) -> io::Result<()> {
        if bytes.is_empty() || bytes.len() > MAX_BYTES || fds.len() > MAX_FDS {
            let text = format!("a message of {} bytes and {} descriptors", bytes.len(), fds.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage] = if raw.is_empty() { &[] } else { &rights };
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
        Ok(())
    }

    /// Asks the kernel to keep so many bytes that were not received yet; it
    /// may grant less.
    pub fn set_send_buffer(&self, bytes: usize) {
        let _ = socket2::SockRef::from(&self.socket).set_send_buffer_size(bytes);
    }

    /// Whether there is something to receive, an end of file included.
    pub fn is_readable(&self) -> bool {
        self.poll(PollTimeout::ZERO)
    }

    /// Waits until there is.
    pub fn wait_readable(&self) {
        while !self.poll(PollTimeout::NONE) {}
    }

    fn poll(&self, timeout: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, timeout), Ok(1..))
    }

    /// Receives one message; `None` = the other end is gone.
    ///
    /// A message that was cut, in bytes or in descriptors, is an error: what
    /// is left of it would be misread.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        match self.receive_next() {
            // The other end closed before it had read all that we sent. The
            // kernel says so once, in front of what it had sent itself.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.receive_next(),
            result => result,
        }
    }

    /// The bytes of the next message, which stays to be received with what
    /// belongs to it; `None` = the other end is gone.
    pub fn peek(&self) -> io::Result<Option<Vec<u8>>> {
        match self.peek_next() {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.peek_next(),
            result => result,
        }
    }

    fn peek_next(&self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0u8; MAX_BYTES];
        let length = nix::sys::socket::recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)?;
        bytes.truncate(length);
        Ok(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }

    fn receive_next(&self) -> io::Result<Option<Packet>> {
        let mut bytes = vec![0u8; MAX_BYTES];
        let mut space = cmsg_space!([RawFd; MAX_FDS]);
        let (length, flags, raw) = {
            let mut into = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut into, Some(&mut space), flags)?;
            let mut raw = Vec::new();
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    raw.extend(fds);
                }
            }
            (message.bytes, message.flags, raw)
        };
        // SAFETY: the kernel made these descriptors for this call just now
        // (SCM_RIGHTS), so nobody else owns them.
        let fds = raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message between processes was cut"));
        }
        if length == 0 {
            return Ok(None);
        }
        bytes.truncate(length);
        Ok(Some(Packet { bytes, fds }))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"inside").unwrap();
        file.rewind().unwrap();
        a.send(b"hello", &[file.as_fd(), file.as_fd()]).unwrap();
        let packet = b.receive().unwrap().unwrap();
        assert_eq!(packet.bytes, b"hello");
        assert_eq!(packet.fds.len(), 2);
        let mut text = String::new();
        File::from(packet.fds.into_iter().next().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
    }

    #[test]
    fn what_is_looked_at_stays_to_be_received() {
        let (a, b) = Channel::pair().unwrap();
        a.send(b"first", &[b.as_fd()]).unwrap();
        assert_eq!(b.peek().unwrap().unwrap(), b"first");
        assert_eq!(b.peek().unwrap().unwrap(), b"first");
        let packet = b.receive().unwrap().unwrap();
        assert_eq!((packet.bytes.as_slice(), packet.fds.len()), (&b"first"[..], 1));
        drop(a);
        assert!(b.peek().unwrap().is_none());
    }

    #[test]
    fn the_other_ends_death_is_an_end_of_file() {
        let (a, b) = Channel::pair().unwrap();
        a.send(b"last words", &[]).unwrap();
        drop(a);
        assert_eq!(b.receive().unwrap().unwrap().bytes, b"last words");
        assert!(b.receive().unwrap().is_none());
    }

    #[test]
    fn an_end_that_leaves_something_unread_is_an_end_all_the_same() {
        let (a, b) = Channel::pair().unwrap();
        b.send(b"never read", &[]).unwrap();
        a.send(b"last words", &[]).unwrap();
        drop(a);
        assert_eq!(b.receive().unwrap().unwrap().bytes, b"last words");
        assert!(b.receive().unwrap().is_none());
    }

    #[test]
    fn what_was_sent_before_the_end_arrives_and_nothing_later() {
        let (a, b) = Channel::pair().unwrap();
        b.send(b"in time", &[]).unwrap();
        a.hush();
        assert!(b.send(b"too late", &[]).is_err());
        assert_eq!(a.receive().unwrap().unwrap().bytes, b"in time");
        assert!(a.receive().unwrap().is_none());
        a.send(b"heard", &[]).unwrap();
        drop(a);
        assert_eq!(b.receive().unwrap().unwrap().bytes, b"heard");
    }

    #[test]
    fn a_message_over_the_bounds_is_refused_before_it_is_sent() {
        let (a, _b) = Channel::pair().unwrap();
        assert!(a.send(&vec![0; MAX_BYTES + 1], &[]).is_err());
        assert!(a.send(&[], &[]).is_err());
        a.send(&vec![0; MAX_BYTES], &[]).unwrap();
    }
}
