//! Replacing this process's image by another, with its descriptors.
//!
//! Everything of ours is close-on-exec. For the one call the descriptors that
//! are to stay lose that flag, and get it back where the call fails. Blocked
//! signals stay blocked and those that wait go on waiting (execve(2)), which is
//! why `std::process` is not used: it would empty the signal mask first.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::process::Image;

/// Tells the new image the number of its state's descriptor, after the number
/// of the process, and what is to be told the operator.
pub const VARIABLE: &str = "EVENKEEL_TAKE_UP";

/// Characters that are passed on: the kernel takes 128 KiB a variable.
const MOST_WORDS: usize = 8 * 1024;

/// Runs another image in place of this one, with the same arguments; what it
/// finds is `inherited`. Returns only where that fails, and then nothing has
/// changed.
pub fn replace(image: &Image, state: BorrowedFd, keep: &[BorrowedFd], words: &str) -> io::Error {
    match try_replace(image, state, keep, words) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_replace(
    image: &Image,
    state: BorrowedFd,
    keep: &[BorrowedFd],
    words: &str,
) -> io::Result<std::convert::Infallible> {
    let text = |bytes: &[u8]| {
        let bytes: Vec<u8> = bytes.iter().copied().filter(|byte| *byte != 0).collect();
        CString::new(bytes).expect("no zero byte is left")
    };
    let path = text(image.path().as_bytes());
    let arguments: Vec<CString> = std::env::args_os().map(|argument| text(argument.as_bytes())).collect();
    let mut environment: Vec<CString> = std::env::vars_os()
        .filter(|(name, _)| name != VARIABLE)
        .map(|(name, value)| text(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect();
    let words: String = words.chars().take(MOST_WORDS).collect();
    let told = format!("{VARIABLE}={}:{}:{words}", std::process::id(), state.as_raw_fd());
    environment.push(text(told.as_bytes()));
    let all = || keep.iter().chain(std::iter::once(&state));
    let flagged = all().try_for_each(|fd| flag(*fd, FdFlag::empty()));
    let result = flagged.and_then(|()| Ok(nix::unistd::execve(&path, &arguments, &environment)?));
    for fd in all() {
        let _ = flag(*fd, FdFlag::FD_CLOEXEC);
    }
    result
}

fn flag(fd: BorrowedFd, flags: FdFlag) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(flags))?;
    Ok(())
}

/// What the image before this one left: its state's descriptor and words for
/// the operator. `None` in a process that was started anew.
pub fn inherited() -> Option<(RawFd, String)> {
    let told = std::env::var(VARIABLE).ok()?;
    let mut parts = told.splitn(3, ':');
    // Of another process, which passed its environment on?
    if parts.next()?.parse() != Ok(std::process::id()) {
        return None;
    }
    Some((parts.next()?.parse().ok()?, parts.next()?.to_string()))
}

/// A further descriptor, close-on-exec, of the one with this number.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: borrowed for this one call, by a process with one thread; a
    // number that is not open is answered by EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned()
}

/// Closes a descriptor by its number: one that nothing here owns.
pub fn close(number: RawFd) {
    let _ = nix::unistd::close(number);
}
