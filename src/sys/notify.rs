//! Telling the service manager: sd_notify(3), without ever waiting for it.
//!
//! A datagram to the socket that `$NOTIFY_SOCKET` names. The manager's queue
//! holds some ten datagrams; where it is full the message is not sent, because
//! a supervisor that waits for its manager supervises nothing.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::time::{ClockId, clock_gettime};

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
