//! Work in a child process, in a network of its own.
//!
//! Used by `doctor` to try bind rules without touching a port of this host.
//! The child is a fork without exec: it runs one function, writes what it
//! returned to a pipe and ends. The caller waits for it, at most until its
//! deadline, and kills it then; no child outlives the call.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, getegid, geteuid, pipe};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

/// Runs `work` in a forked child and returns the bytes that it returned.
pub fn in_child(limit: Duration, work: impl FnOnce() -> Vec<u8>) -> io::Result<Vec<u8>> {
    let (reader, writer) = pipe()?;
    // SAFETY: needed because namespaces and user ids of a process can only be
    // changed where no other thread runs. The child is a copy of this thread
    // alone. It allocates, which glibc and musl allow after a fork, takes no
    // lock that another thread of ours may have held (it neither logs nor
    // prints), and leaves by _exit, so no destructor or exit handler of the
    // parent runs twice.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(reader);
            let code = match catch_unwind(AssertUnwindSafe(work)) {
                Ok(bytes) if File::from(writer).write_all(&bytes).is_ok() => 0,
                _ => 1,
            };
            // SAFETY: ends this process, and touches no memory.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let result = read_until(File::from(reader), Instant::now() + limit);
            if result.is_err() {
                // It may have ended by itself meanwhile.
                let _ = kill(child, Signal::SIGKILL);
            }
            match (waitpid(child, None)?, result?) {
                (WaitStatus::Exited(_, 0), bytes) => Ok(bytes),
                (status, _) => Err(io::Error::other(format!("the child process failed: {status:?}"))),
            }
        }
    }
}

fn read_until(mut pipe: File, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            // A signal came; the deadline is kept all the same.
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match pipe.read(&mut chunk)? {
            0 => return Ok(bytes),
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

/// Whose network a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// A namespace of its own; the users are those of the host.
    Own,
    /// A namespace of its own inside a user namespace that knows one user.
    OwnOneUser,
    /// That of the host.
    Shared,
}

/// Gives this process a network of its own with `lo` up, as far as it may.
/// Call it in a child: there is no way back.
pub fn leave_network() -> io::Result<Network> {
    if unshare(CloneFlags::CLONE_NEWNET).is_ok() {
        return loopback_up().map(|()| Network::Own);
    }
    let (user, group) = (geteuid(), getegid());
    if unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).is_err() {
        return Ok(Network::Shared);
    }
    // The kernel takes a group map from an ordinary user only after that
    // user gave up setgroups(2). Unmapped, the namespace works all the same.
    let _ = fs::write("/proc/self/setgroups", "deny");
    let _ = fs::write("/proc/self/uid_map", format!("0 {user} 1"));
    let _ = fs::write("/proc/self/gid_map", format!("0 {group} 1"));
    loopback_up().map(|()| Network::OwnOneUser)
}

fn loopback_up() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), None)?;
    // SAFETY: a structure of plain integers and bytes: all zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: needed because no library of ours sets interface flags. The
    // kernel reads one ifreq, which lives through the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_fails_or_hangs_is_an_error_and_no_child_is_left() {
        let long = Duration::from_secs(60);
        assert_eq!(in_child(long, || vec![7; 200_000]).expect("an answer").len(), 200_000);
        let failed = in_child(long, || std::process::exit(3)).expect_err("no answer");
        assert!(failed.to_string().contains("Exited"), "{failed}");
        let started = Instant::now();
        let hung = in_child(Duration::from_millis(20), || {
            loop {
                std::thread::park();
            }
        });
        assert_eq!(hung.expect_err("no answer").kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() < long);
    }
}
