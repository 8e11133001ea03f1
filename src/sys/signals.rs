//! Signals as readable events: blocked, and read from a signalfd.
//!
//! No handler ever runs, so nothing can be interrupted half-way.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that a process reads as events.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks these signals and opens a non-blocking descriptor for them.
    pub fn block(signals: &[Signal]) -> io::Result<Signals> {
        let set: SigSet = signals.iter().copied().collect();
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None)?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Signals { fd })
    }

    /// The next signal that waits, if one does.
    pub fn next(&self) -> Option<Signal> {
        let info = self.fd.read_signal().ok()??;
        Signal::try_from(info.ssi_signo as i32).ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Ignores these signals: for a child whose parent decides its end.
pub fn ignore(signals: &[Signal]) -> io::Result<()> {
    for &signal in signals {
        // SAFETY: SIG_IGN runs no code in this process.
        unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigIgn)? };
    }
    Ok(())
}

/// Unblocks every signal: a mask survives exec, and a child wants none.
pub fn unblock_all() -> io::Result<()> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    Ok(())
}
