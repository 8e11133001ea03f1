//! Telling the service manager: sd_notify(3), without ever waiting for it.
//!
//! A datagram to the socket that `$NOTIFY_SOCKET` names. The manager's queue
//! holds some ten datagrams; where it is full the message is not sent, because
//! a supervisor that waits for its manager supervises nothing.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use nix::time::{ClockId, clock_gettime};

/// How long a manager may be busy for what has to be told.
const PATIENCE: Duration = Duration::from_secs(3);

/// Sends `KEY=value` lines; nothing to do where no manager asked for them.
pub fn send(state: &str) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match path.as_bytes() {
        // An abstract name: no file.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// Whether anybody listens.
pub fn is_heard() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// The same with descriptors, for the manager's store; EAGAIN where its queue
/// is full.
pub fn send_with(state: &str, fds: &[BorrowedFd]) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => UnixAddr::new_abstract(name)?,
        path => UnixAddr::new(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage] = if raw.is_empty() { &[] } else { &rights };
    let text = [IoSlice::new(state.as_bytes())];
    sendmsg(socket.as_raw_fd(), &text, control, MsgFlags::MSG_NOSIGNAL, Some(&address))?;
    Ok(())
}

/// The same, tried again for a while.
pub fn send_patiently(state: &str, fds: &[BorrowedFd]) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match send_with(state, fds) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            decided => return decided,
        }
    }
}

/// Waits until the manager has dealt with all that was sent:
/// sd_notify_barrier(3). False where it did not in time.
pub fn barrier() -> io::Result<bool> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    send_patiently("BARRIER=1", &[theirs.as_fd()])?;
    drop(theirs);
    let mut fds = [PollFd::new(ours.as_fd(), PollFlags::empty())];
    let limit = PollTimeout::try_from(PATIENCE).expect("a few seconds");
    Ok(poll(&mut fds, limit)? > 0)
}

/// What must come with `RELOADING=1`: the reload began now, by the clock that
/// systemd compares (CLOCK_MONOTONIC, in microseconds).
pub fn reloading() -> String {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the monotonic clock always works");
    format!("RELOADING=1\nMONOTONIC_USEC={}", now.tv_sec() * 1_000_000 + now.tv_nsec() / 1_000)
}

/// The longest time between two `WATCHDOG=1` that this process owes, in
/// milliseconds: sd_watchdog_enabled(3).
pub fn watchdog() -> Option<u64> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    number("WATCHDOG_USEC").filter(|_| ours).map(|micros| micros / 1_000)
}
