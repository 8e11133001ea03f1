//! Sockets and pipes that count as the kernel does, and a worker's steps, at each
//! of which it may be killed: what the tests of this folder run on.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::panic::resume_unwind;
use std::rc::Rc;

use super::*;
use crate::config::Service;
use crate::relay::{self, End, Pipes};
use crate::sys::counts::{TcpCounts, TcpState};

thread_local! {
    /// Steps until the kill.
    pub static FUSE: Cell<Option<u32>> = const { Cell::new(None) };
}

/// The worker was killed.
pub struct Kill;

/// A step of the worker's.
pub fn step() {
    match FUSE.get() {
        None => {}
        Some(0) => {
            FUSE.set(None);
            resume_unwind(Box::new(Kill));
        }
        Some(left) => FUSE.set(Some(left - 1)),
    }
}

pub const CLIENT: RawFd = 10;
pub const SERVER: RawFd = 11;
pub const PIPE: RawFd = 20;
pub const SESSION: u32 = 3;
pub const HEADER: &[u8] = b"a PROXY header";
pub const PREFACE: &[u8] = b"another one";

#[derive(Debug, Default)]
pub struct Socket {
    pub unread: VecDeque<u8>,
    pub consumed: u64,
    pub has_peers_fin: bool,
    /// A reset came; the error waits to be read.
    pub is_reset: bool,
    pub has_error: bool,
    pub room: usize,
    pub taken: Vec<u8>,
    pub has_our_fin: bool,
    pub is_closed: bool,
    pub is_unix: bool,
    pub connected_by_us: bool,
}

impl Socket {
    pub fn counts(&self) -> Option<TcpCounts> {
        if self.is_unix || self.is_closed {
            return None;
        }
        let state = match (self.is_reset, self.has_peers_fin, self.has_our_fin) {
            (true, _, _) | (_, true, true) => TcpState::Close,
            (_, false, false) => TcpState::Established,
            (_, true, false) => TcpState::CloseWait,
            (_, false, true) => TcpState::FinWait2,
        };
        let unread = self.unread.len() as u64;
        let syn = u64::from(self.connected_by_us);
        // A reset has thrown away what was not acknowledged.
        let lost = if self.is_reset { 1 } else { 0 };
        Some(TcpCounts {
            state,
            has_error: self.has_error,
            received: self.consumed + unread + u64::from(self.has_peers_fin),
            acked: (self.taken.len() as u64 + syn + u64::from(self.has_our_fin)) - lost.min(syn),
            unread,
            unacked: 0,
            handed_over: 0,
        })
    }

    pub fn error(&mut self) -> Option<io::Error> {
        std::mem::take(&mut self.has_error).then(|| io::ErrorKind::ConnectionReset.into())
    }
}

pub fn take_front(from: &mut VecDeque<u8>, into: &mut [u8]) {
    let count = into.len();
    into.copy_from_slice(&from.make_contiguous()[..count]);
    from.drain(..count);
}

pub type Shared<T> = Rc<RefCell<T>>;

/// A descriptor of the worker's.
pub struct Fake(pub Shared<Socket>);

pub struct FakePipe(pub Shared<VecDeque<u8>>);

impl relay::Pipe for FakePipe {
    fn take(&self, into: &mut [u8]) -> io::Result<usize> {
        step();
        let mut bytes = self.0.borrow_mut();
        // In pieces, as a pipe of pages may.
        let count = into.len().min(bytes.len()).min(40_000);
        take_front(&mut bytes, &mut into[..count]);
        drop(bytes);
        step();
        Ok(count)
    }
    fn number(&self) -> i32 {
        PIPE
    }
}

thread_local! {
    pub static PIPE_BYTES: RefCell<Shared<VecDeque<u8>>> = RefCell::default();
}

pub fn pipes() -> Pipes<FakePipe> {
    Pipes::new(1, || Some(FakePipe(PIPE_BYTES.with_borrow(Rc::clone))))
}

impl End for Fake {
    type Pipe = FakePipe;

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        step();
        let mut socket = self.0.borrow_mut();
        let count = into.len().min(socket.unread.len());
        take_front(&mut socket.unread, &mut into[..count]);
        socket.consumed += count as u64;
        let result = match count {
            0 => match socket.error() {
                Some(error) => Err(error),
                None if socket.has_peers_fin || socket.is_reset => Ok(0),
                None => Err(io::ErrorKind::WouldBlock.into()),
            },
            count => Ok(count),
        };
        drop(socket);
        step();
        result
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        step();
        let mut socket = self.0.borrow_mut();
        assert!(!socket.is_closed && !socket.has_our_fin, "nothing is sent behind an end");
        if let Some(error) = socket.error() {
            return Err(error);
        }
        if socket.is_reset {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = bytes.len().min(socket.room);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        socket.room -= count;
        socket.taken.extend(&bytes[..count]);
        drop(socket);
        step();
        Ok(count)
    }

    fn finish(&self) -> io::Result<()> {
        step();
        self.0.borrow_mut().has_our_fin = true;
        step();
        Ok(())
    }

    fn fill(&self, pipe: &FakePipe, most: usize) -> io::Result<usize> {
        assert!(pipe.0.borrow().is_empty());
        let mut buffer = vec![0; most.min(self.0.borrow().unread.len().max(1)).min(300_000)];
        let count = {
            // Receives as one with putting it into the pipe.
            let fuse = FUSE.take();
            let result = self.receive(&mut buffer);
            FUSE.set(fuse);
            result?
        };
        pipe.0.borrow_mut().extend(&buffer[..count]);
        step();
        Ok(count)
    }

    fn drain(&self, pipe: &FakePipe, most: usize) -> io::Result<usize> {
        step();
        let mut bytes = pipe.0.borrow_mut();
        assert_eq!(bytes.len(), most);
        let fuse = FUSE.take();
        let result = self.send(bytes.make_contiguous());
        FUSE.set(fuse);
        let count = result?;
        bytes.drain(..count);
        drop(bytes);
        step();
        Ok(count)
    }
}

/// What the recovery asks.
pub struct Model<'a>(pub &'a [Shared<Socket>; 2]);

impl Kernel for Model<'_> {
    fn counts(&self, socket: RawFd) -> io::Result<TcpCounts> {
        let socket = self.0.get(socket.wrapping_sub(CLIENT) as usize).map(|socket| socket.borrow());
        socket.and_then(|socket| socket.counts()).ok_or(io::ErrorKind::Unsupported.into())
    }
    fn piped(&self, pipe: RawFd) -> io::Result<usize> {
        if pipe != PIPE {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(PIPE_BYTES.with_borrow(|bytes| bytes.borrow().len()))
    }
    fn take(&self, _: RawFd, into: &mut [u8]) -> io::Result<usize> {
        relay::Pipe::take(&FakePipe(PIPE_BYTES.with_borrow(Rc::clone)), into)
    }
    fn peer(&self, _: RawFd) -> Option<std::net::SocketAddr> {
        None
    }
}

impl Names for Model<'_> {
    fn listener(&self, _: u16) -> Option<Listener<'_>> {
        Some(Listener { name: "front", service: SERVICE.get() })
    }
    fn server(&self, _: u16, _: u32) -> String {
        "back".into()
    }
}

thread_local! {
    pub static SERVICE: Cell<Option<Service>> = const { Cell::new(None) };
}
