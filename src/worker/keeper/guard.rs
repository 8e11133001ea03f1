//! The worker's side: its keeper is begun, watched, and begun anew.
//!
//! The worker alone begins keepers, so there is one at most. Without one, and
//! where none can be, it serves all the same.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use super::live;
use crate::control::{self, FromWorker};
use crate::sys::beside;
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::worker::birth::Born;

/// After so many milliseconds another one is begun where the last one could
/// not be, or has died.
const AGAIN_AFTER: Millis = 100;

/// Who keeps what this worker has.
#[derive(Debug)]
pub struct Guard {
    /// This process, as its keeper watches it.
    own: OwnedFd,
    /// The memory that they share.
    memory: OwnedFd,
    keeper: Option<OwnedFd>,
    begun_at: Millis,
    again_at: Option<Millis>,
}

impl Guard {
    /// Begins the first keeper; the supervisor is told who it is, or why there
    /// is none.
    pub fn begin(born: &Born, channel: &Channel, memory: BorrowedFd, now: Millis) -> Option<Guard> {
        let owned = beside::watch(std::process::id()).and_then(|own| Ok((own, memory.try_clone_to_owned()?)));
        match owned {
            Ok((own, memory)) => {
                let mut guard = Guard { own, memory, keeper: None, begun_at: now, again_at: None };
                guard.renew(born, channel, now);
                Some(guard)
            }
            Err(error) => {
                tell(channel, None, format!("the kernel gives no pidfd: {error}"));
                None
            }
        }
    }

    fn renew(&mut self, born: &Born, channel: &Channel, now: Millis) {
        (self.begun_at, self.again_at) = (now, None);
        let begun = born.log.borrow_mut().without_thread(|| match beside::begin() {
            Ok(None) => live(born, channel, &self.own, &self.memory),
            Ok(Some(pid)) => Ok(pid),
            Err(error) => Err(error),
        });
        match begun {
            Ok(pid) => {
                tell(channel, Some(pid), String::new());
                self.keeper = beside::watch(pid).ok();
                if self.keeper.is_none() {
                    self.again_at = Some(now + AGAIN_AFTER);
                }
            }
            Err(error) => {
                tell(channel, None, format!("no process can share the descriptors (CLONE_FILES): {error}"));
                self.again_at = Some(now + 20 * AGAIN_AFTER);
            }
        }
    }

    /// Hears of the keeper's end.
    pub fn register(&self, registry: &Registry, token: Token) {
        if let Some(keeper) = &self.keeper {
            let _ = registry.register(&mut SourceFd(&keeper.as_raw_fd()), token, Interest::READABLE);
        }
    }

    /// The keeper may have ended: another one, at once or a while after the
    /// last one began.
    pub fn handle_ended(&mut self, now: Millis) {
        if self.keeper.as_ref().is_some_and(beside::has_ended) {
            // Closing it ends its registration: nobody has a duplicate.
            self.keeper = None;
            self.again_at = Some(now.max(self.begun_at + AGAIN_AFTER));
        }
    }

    /// Begins another one where that is due.
    pub fn tend(&mut self, born: &Born, channel: &Channel, registry: &Registry, token: Token, now: Millis) {
        if self.again_at.is_some_and(|at| at <= now) {
            self.renew(born, channel, now);
            self.register(registry, token);
        }
    }

    /// When `tend` is to be called.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.again_at
    }
}

fn tell(channel: &Channel, pid: Option<u32>, why: String) {
    let _ = control::send(channel, &FromWorker::Keeper { pid, why }, &[]);
}

impl AsFd for Guard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}
