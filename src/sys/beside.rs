//! A second process over the same table of descriptors.
//!
//! CLONE_FILES without CLONE_VM: what one of the two opens or closes is open or
//! closed for the other, by the same numbers, and nothing is closed while one
//! of them lives. The memory is a copy, but for what is mapped shared.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long threads that were told to end may take.
const PATIENCE: Duration = Duration::from_millis(1_000);

/// Begins a process beside this one, as a child of the same parent, which it
/// tells of its end by SIGCHLD. Its number, and `None` in the new process.
///
/// Of several threads the new process would have the calling one alone, and
/// locks that nobody ever opens: an error, unless the others are about to end.
pub fn begin() -> io::Result<Option<u32>> {
    let deadline = Instant::now() + PATIENCE;
    while thread_count()? > 1 {
        if Instant::now() > deadline {
            return Err(io::Error::other("a thread does not end"));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    // glibc keeps the thread's number in memory; as at a fork the kernel writes
    // the new one there (prctl(2), PR_GET_TID_ADDRESS).
    let mut number: *mut libc::c_int = std::ptr::null_mut();
    // SAFETY: the kernel writes one pointer into `number`; a kernel that does
    // not know the call leaves it as it is.
    unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut number) };
    let settid = if number.is_null() { 0 } else { libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID };
    let flags = libc::CLONE_FILES | libc::CLONE_PARENT | settid | libc::SIGCHLD;
    // SAFETY: needed because nothing in the libraries passes these flags. Like
    // fork(2): without CLONE_VM and with no stack of its own the new process
    // goes on here, on a copy of this stack. There is one thread, so no lock of
    // the allocator is held. The two last arguments are the thread's number
    // and the thread's area, in an order that depends on the architecture; the
    // area is read by the kernel only with CLONE_SETTLS.
    let result = unsafe {
        libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, number, number) as libc::c_int
    };
    match super::check(result)? {
        0 => Ok(None),
        pid => Ok(Some(pid as u32)),
    }
}

fn thread_count() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// A descriptor that becomes readable when that process has ended, whoever its
/// parent is.
pub fn watch(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: needed because nix has no pidfd_open(2). It takes two numbers.
    let fd = super::check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) as libc::c_int })?;
    // SAFETY: the kernel made it for this call just now, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the process of such a descriptor has ended.
pub fn has_ended(watched: &OwnedFd) -> bool {
    let mut one = libc::pollfd { fd: watched.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which lives for the call.
    unsafe { libc::poll(&raw mut one, 1, 0) == 1 }
}

/// Ends this process at once: nothing is dropped, nothing is flushed.
pub fn end(code: i32) -> ! {
    // SAFETY: ends the process and touches no memory.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_seen_without_being_the_parent() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().expect("sleep");
        let watched = watch(child.id()).unwrap();
        assert!(!has_ended(&watched));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&watched));
    }
}
