//! A pipe that carries bytes from socket to socket, and splice(2) into and
//! out of it.
//!
//! Its size is what matters: with the default of 64 KiB splicing costs as much
//! as copying through a large buffer (measured). Users without CAP_SYS_RESOURCE
//! may have pipes of 64 MiB in all (pipe-user-pages-soft, pipe(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Both ends of a pipe.
#[derive(Debug)]
pub struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Pipe {
    /// A pipe that holds so many bytes in pages. An error where the system
    /// gives only a smaller one.
    pub fn open(bytes: usize) -> io::Result<Pipe> {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let size = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        if fcntl(&writer, FcntlArg::F_SETPIPE_SZ(size))? < size {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        Ok(Pipe { reader, writer })
    }

    /// Moves at most so many bytes from a socket into this pipe, which has to
    /// be empty: a full one would block just as an empty socket does. 0 at an
    /// end of file, and at an end behind urgent data that splice cannot take up.
    pub fn fill(&self, from: impl AsFd, most: usize) -> io::Result<usize> {
        splice(from, &self.writer, most)
    }

    /// Moves at most so many bytes out of this pipe into a socket. A broken one
    /// would raise SIGPIPE here, which Rust's runtime ignores from the start.
    pub fn drain(&self, to: impl AsFd, most: usize) -> io::Result<usize> {
        splice(&self.reader, to, most)
    }

    /// The descriptor of its reading end.
    pub fn number(&self) -> i32 {
        self.reader.as_raw_fd()
    }

    /// Takes bytes out of it.
    pub fn take(&self, into: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(&self.reader, into)?)
    }
}

fn splice(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    let flags = libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE;
    loop {
        // SAFETY: needed because nix has splice only behind a feature that
        // nothing else here needs. Both descriptors are open for as long as
        // they are borrowed; the offsets are null, as they must be for pipes
        // and sockets; no memory of ours is touched.
        let count =
            unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), most, flags) };
        match usize::try_from(count) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
