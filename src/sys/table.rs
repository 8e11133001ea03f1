//! This process's table of descriptors, by number.
//!
//! For whoever inherits a table and knows its entries by what was written down
//! about them. Numbers are nobody's here: `take` makes an owner.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use socket2::{Domain, SockRef, Type};

/// What a descriptor is, as far as it matters to a heir.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TCP socket that does not listen.
    Connection,
    /// A socket of packets between processes.
    Packets,
    /// Anything else.
    Other,
}

/// All numbers that are open.
pub fn list() -> io::Result<Vec<RawFd>> {
    let numbers = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect::<Vec<RawFd>>();
    // The folder's own is closed by now.
    Ok(numbers.into_iter().filter(|number| is_open(*number)).collect())
}

fn is_open(number: RawFd) -> bool {
    // SAFETY: a number and a command without an argument.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// Does something with what is behind a number.
pub fn with<T>(number: RawFd, act: impl FnOnce(BorrowedFd) -> io::Result<T>) -> io::Result<T> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: borrowed for these calls alone, by a process with one thread; a
    // number that is not open is answered by EBADF.
    act(unsafe { BorrowedFd::borrow_raw(number) })
}

/// What is behind a number.
pub fn kind(number: RawFd) -> Kind {
    with(number, |fd| Ok(kind_of(fd))).unwrap_or(Kind::Other)
}

fn kind_of(fd: BorrowedFd) -> Kind {
    let socket = SockRef::from(&fd);
    let (Ok(domain), Ok(kind)) = (socket.domain(), socket.r#type()) else { return Kind::Other };
    match (domain, kind) {
        (Domain::UNIX, Type::SEQPACKET) => Kind::Packets,
        (Domain::IPV4 | Domain::IPV6, Type::STREAM) if !socket.is_listener().unwrap_or(true) => {
            Kind::Connection
        }
        _ => Kind::Other,
    }
}

/// Makes an owner of what is behind a number. For a process that has its table
/// alone, and once for each number.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 || !is_open(number) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open, and the caller says that nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn a_table_is_listed_and_its_entries_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (packets, _other) = super::super::channel::Channel::pair().unwrap();
        let packets = packets.into_fd();
        let numbers = list().unwrap();
        for (number, is) in [
            (listener.as_raw_fd(), Kind::Other),
            (stream.as_raw_fd(), Kind::Connection),
            (packets.as_raw_fd(), Kind::Packets),
            (0, Kind::Other),
        ] {
            assert!(numbers.contains(&number) && kind(number) == is, "{number}");
        }
        assert!(kind(-1) == Kind::Other && take(-1).is_err());
        let owned = take(stream.into_raw_fd()).unwrap();
        drop(owned);
    }
}
