//! Places that datagrams are received into, many by one call.
//!
//! Owned by a worker and shared by all its sockets: what was received stays
//! until its place is given to the next call. The memory is touched only as
//! far as datagrams are long.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::Received;
use super::address::Name;
use super::messages::{CONTROL_BYTES, Control};

/// Places a power of two apart would all meet in the same few lines of the
/// processor's caches. So each begins some lines further on than the last.
const STAGGER: usize = 5 * 64;

/// Places for received datagrams.
pub struct Arena {
    bytes: Box<[u8]>,
    place_bytes: usize,
    /// From one place to the next.
    stride: usize,
    names: Box<[Name]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena({} places of {} bytes)", self.headers.len(), self.place_bytes)
    }
}

impl Arena {
    /// So many places, each for so many bytes.
    pub fn new(places: usize, place_bytes: usize) -> Arena {
        let stride = place_bytes + STAGGER;
        let bytes = vec![0; places * stride].into_boxed_slice();
        let vector = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: a structure of integers and pointers: all zero is a value.
        let header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        Arena {
            bytes,
            place_bytes,
            stride,
            names: vec![Name::default(); places].into(),
            controls: vec![Control::default(); places].into(),
            vectors: vec![vector; places].into(),
            headers: vec![header; places].into(),
        }
    }

    /// How many places there are.
    pub fn places(&self) -> usize {
        self.headers.len()
    }

    /// Receives into the places from `first` on, at most `count`; answers how
    /// many were filled. Fewer than asked for: nothing more waits.
    pub fn receive(&mut self, socket: &impl AsFd, first: usize, count: usize) -> io::Result<usize> {
        self.receive_with(socket, first, count, true)
    }

    /// The same on a connected socket, which is not asked who sent them: it
    /// hears one peer alone.
    pub fn receive_connected(&mut self, socket: &impl AsFd, first: usize, count: usize) -> io::Result<usize> {
        self.receive_with(socket, first, count, false)
    }

    /// One datagram into a place, from a connected socket on which the kernel
    /// joins nothing: the cheapest call there is.
    pub fn receive_one(&mut self, socket: &impl AsFd, place: usize) -> io::Result<()> {
        let part = &mut self.bytes[place * self.stride..][..self.place_bytes];
        // With MSG_TRUNC the whole length is told, also where it did not fit.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let length = loop {
            match recv(socket.as_fd().as_raw_fd(), part, flags) {
                Err(Errno::EINTR) => {}
                result => break result?,
            }
        };
        let header = &mut self.headers[place];
        (header.msg_hdr.msg_namelen, header.msg_hdr.msg_controllen) = (0, 0);
        header.msg_hdr.msg_flags = if length > part.len() { libc::MSG_TRUNC } else { 0 };
        header.msg_len = length as libc::c_uint;
        Ok(())
    }

    fn receive_with(
        &mut self,
        socket: &impl AsFd,
        first: usize,
        count: usize,
        asks_names: bool,
    ) -> io::Result<usize> {
        for place in first..first + count {
            let part = &mut self.bytes[place * self.stride..][..self.place_bytes];
            self.vectors[place] =
                libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: self.place_bytes };
            let header = &mut self.headers[place].msg_hdr;
            if asks_names {
                header.msg_name = self.names[place].0.as_mut_ptr().cast();
                header.msg_namelen = size_of::<Name>() as libc::socklen_t;
            } else {
                (header.msg_name, header.msg_namelen) = (std::ptr::null_mut(), 0);
            }
            header.msg_iov = &raw mut self.vectors[place];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[place].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL_BYTES as _;
            header.msg_flags = 0;
        }
        let headers = &mut self.headers[first..first + count];
        loop {
            // SAFETY: needed because the batched call of nix allocates. Each
            // of the `count` headers points to parts of boxes that this value
            // owns, set just above with their true lengths; the kernel writes
            // within those during the call alone. No time-out is passed.
            let received = unsafe {
                libc::recvmmsg(
                    socket.as_fd().as_raw_fd(),
                    headers.as_mut_ptr(),
                    headers.len() as libc::c_uint,
                    libc::MSG_DONTWAIT as _,
                    std::ptr::null_mut(),
                )
            };
            match super::super::check(received) {
                Ok(received) => return Ok(received as usize),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The first bytes of what lies at a place.
    pub fn bytes(&self, place: usize, length: usize) -> &[u8] {
        &self.bytes[place * self.stride..][..length]
    }

    /// What the last call put at a place that it filled.
    pub fn get(&self, place: usize) -> Received<'_> {
        let mmsghdr = &self.headers[place];
        let header = &mmsghdr.msg_hdr;
        let length = (mmsghdr.msg_len as usize).min(self.place_bytes);
        // Of another width in musl's headers.
        #[allow(clippy::unnecessary_cast)]
        let told = self.controls[place].read(header.msg_controllen as usize);
        Received {
            bytes: self.bytes(place, length),
            from: self.names[place].read(header.msg_namelen as usize),
            local: told.local,
            // A single datagram that is shorter than the others would be is
            // no batch.
            segment: told.segment.filter(|segment| *segment < length),
            stamp: told.stamp,
            truncated: header.msg_flags & libc::MSG_TRUNC != 0,
        }
    }
}
