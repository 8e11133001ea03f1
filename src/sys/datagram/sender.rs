//! Sends many datagrams by one call.
//!
//! Owned by a worker. Holds room for the headers of one call and no bytes:
//! those are lent for the call. Each datagram's fate is told, in order.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};

use super::Outgoing;
use super::address::Name;
use super::messages::Control;

/// Datagrams that the kernel cuts from one: 64 until Linux 6.9, 128 since
/// (UDP_MAX_SEGMENTS in include/linux/udp.h).
pub const MAX_SEGMENTS: usize = 64;

/// Datagrams in one call.
const CALL: usize = 64;

/// Room for the headers of one call.
pub struct Sender {
    names: Box<[Name; CALL]>,
    controls: Box<[Control; CALL]>,
    vectors: Box<[[libc::iovec; 2]; CALL]>,
    headers: Box<[libc::mmsghdr; CALL]>,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sender")
    }
}

impl Default for Sender {
    fn default() -> Sender {
        let vector = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: a structure of integers and pointers: all zero is a value.
        let header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        Sender {
            names: Box::new([Name::default(); CALL]),
            controls: Box::new([Control::default(); CALL]),
            vectors: Box::new([[vector; 2]; CALL]),
            headers: Box::new([header; CALL]),
        }
    }
}

impl Sender {
    /// Sends all of them; `outcome` is told of each by its number. Would-block
    /// is told of the first that it hit and of all behind it.
    pub fn send<'a>(
        &mut self,
        socket: &impl AsFd,
        datagrams: impl IntoIterator<Item = Outgoing<'a>>,
        mut outcome: impl FnMut(usize, io::Result<()>),
    ) {
        let mut datagrams = datagrams.into_iter();
        let (mut told, mut blocked) = (0, false);
        loop {
            let mut filled = 0;
            while filled < CALL {
                let Some(datagram) = datagrams.next() else { break };
                self.fill(filled, &datagram);
                filled += 1;
            }
            if filled == 0 {
                return;
            }
            let mut sent = 0;
            while sent < filled {
                let result = if blocked {
                    Err(io::ErrorKind::WouldBlock.into())
                } else {
                    // The bytes that the headers point to are lent for 'a,
                    // which outlives this call.
                    self.call(socket, sent, filled)
                };
                match result {
                    Ok(count) => {
                        (told..told + count).for_each(|number| outcome(number, Ok(())));
                        (told, sent) = (told + count, sent + count);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        blocked |= error.kind() == io::ErrorKind::WouldBlock;
                        outcome(told, Err(error));
                        (told, sent) = (told + 1, sent + 1);
                    }
                }
            }
        }
    }

    fn fill(&mut self, at: usize, datagram: &Outgoing) {
        let part =
            |bytes: &[u8]| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        self.vectors[at] = [part(datagram.head), part(datagram.bytes)];
        let interface = match datagram.to {
            Some(SocketAddr::V6(v6)) => v6.scope_id(),
            _ => 0,
        };
        let control = self.controls[at].write(datagram.from, interface, datagram.segment);
        let header = &mut self.headers[at].msg_hdr;
        match datagram.to {
            Some(to) => {
                header.msg_namelen = self.names[at].write(to) as libc::socklen_t;
                header.msg_name = self.names[at].0.as_mut_ptr().cast();
            }
            None => (header.msg_name, header.msg_namelen) = (std::ptr::null_mut(), 0),
        }
        // Without a head the first part is left out: it saves the kernel one.
        let skip = usize::from(datagram.head.is_empty());
        header.msg_iov = self.vectors[at][skip..].as_mut_ptr();
        header.msg_iovlen = (2 - skip) as _;
        header.msg_control = match control {
            0 => std::ptr::null_mut(),
            _ => self.controls[at].0.as_mut_ptr().cast(),
        };
        header.msg_controllen = control as _;
        header.msg_flags = 0;
    }

    fn call(&mut self, socket: &impl AsFd, from: usize, to: usize) -> io::Result<usize> {
        let headers = &mut self.headers[from..to];
        // SAFETY: needed because the batched call of nix allocates. `fill` has
        // pointed each header to boxes of this value and to bytes lent to
        // `send`, which calls this before it returns, all with their true
        // lengths; the kernel only reads them.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                headers.len() as libc::c_uint,
                (libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) as _,
            )
        };
        super::super::check(sent).map(|sent| sent as usize)
    }
}
