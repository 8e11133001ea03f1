//! A worker's keeper: a process over the same table of descriptors, which
//! passes on what the worker had when it has died.
//!
//! ```text
//!   Watching --the worker ended--> Heir --HandOver--> Sending --Done--> ends
//!      |                            ^                    |
//!      | the supervisor is gone     +--receiver gone-----+
//!      v
//!     ends
//! ```
//!
//! The worker begins it at its birth, when it has given up its privileges and
//! its memory is still small, and again should it die. While the worker lives
//! it sleeps, owns nothing and closes nothing: every descriptor is the
//! worker's. When that is dead, all of them are its own. It takes nothing over
//! by itself: the supervisor, which has reaped the worker, says who gets it
//! (`ToWorker::HandOver`), and it sends what any worker sends in a hand-over.
//! A receiver that dies leaves it with what was not acknowledged, for the next
//! one. It ends when all is passed on, or with the supervisor; then the kernel
//! closes what is left. Bounded by what its worker had.

mod doubts;
mod estate;
mod guard;
mod sending;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::birth::Born;
use crate::control::{self, FromWorker, ToWorker};
use crate::sys::beside;
use crate::sys::channel::Channel;
use crate::sys::clock::{self, Millis};
use crate::sys::{process, shared};
use estate::Estate;
pub use guard::Guard;
use sending::{Progress, Sending};

/// How often a receiver may be silent or refuse before what is left is given
/// up.
const MOST_FAILURES: u32 = 3;

/// Everything that a keeper knows when its worker is dead.
struct Heir<'a> {
    channel: &'a Channel,
    estate: Estate<'a>,
    sending: Option<Sending>,
    failures: u32,
    is_told: bool,
}

/// The keeper, from its first instruction to its end.
fn live(born: &Born, channel: &Channel, worker: &OwnedFd, memory: &OwnedFd) -> ! {
    process::set_name(&format!("ek-keeper-{}", born.slot));
    if !outlives(channel, worker) {
        beside::end(0);
    }
    // A fault here is to end nothing by an orderly end that is none.
    let kept = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let estate = Estate::gather(born, channel, memory, clock::coarse());
        Heir { channel, estate, sending: None, failures: 0, is_told: false }.serve()
    }));
    if kept.is_err() {
        estate::reset_all();
    }
    beside::end(i32::from(kept.is_err()));
}

/// Sleeps until the worker has ended; false where the supervisor did first.
fn outlives(channel: &Channel, worker: &OwnedFd) -> bool {
    loop {
        // What is to be read there is the worker's to read.
        let mut fds = [
            PollFd::new(worker.as_fd(), PollFlags::POLLIN),
            PollFd::new(channel.as_fd(), PollFlags::empty()),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        let is = |at: usize| fds[at].revents().is_some_and(|events| !events.is_empty());
        if is(1) {
            return false;
        }
        if is(0) {
            return true;
        }
    }
}

impl Heir<'_> {
    /// Until everything is passed on.
    fn serve(mut self) {
        loop {
            let now = clock::coarse();
            let sending = self.sending.as_ref().map(|sending| sending.next_deadline(now));
            let deadline = sending.into_iter().chain(self.estate.next_deadline()).min();
            if !self.wait(deadline, now) {
                return;
            }
            if !self.listen() {
                return self.estate.give_up();
            }
            let now = clock::coarse();
            self.estate.end_what_is_over(now);
            self.send(now);
            if self.estate.is_empty() && self.is_told && self.sending.is_none() {
                return;
            }
        }
    }

    /// Sleeps until somebody says something; false where that failed.
    fn wait(&self, deadline: Option<Millis>, now: Millis) -> bool {
        let timeout = deadline.map(|at| at.saturating_sub(now).clamp(1, 60_000) as u16);
        let timeout = timeout.map_or(PollTimeout::NONE, PollTimeout::from);
        let peer = self.sending.as_ref().map(Sending::channel);
        let ways: Vec<BorrowedFd> =
            std::iter::once(self.channel.as_fd()).chain(peer.map(AsFd::as_fd)).collect();
        let mut fds: Vec<PollFd> = ways.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        !matches!(poll(&mut fds, timeout), Err(error) if error != nix::errno::Errno::EINTR)
    }

    /// What the supervisor says; false where it is gone, or wants no more.
    fn listen(&mut self) -> bool {
        loop {
            match control::receive::<ToWorker>(self.channel) {
                Ok(Some((ToWorker::HandOver { shares, fault, .. }, fds))) => {
                    let Some(channel) = fds.into_iter().next().map(Channel::from_fd) else { continue };
                    self.begin(channel, shares, fault);
                }
                Ok(Some((ToWorker::Sessions { id, .. }, _))) => self.answer_nothing(id),
                // What else there is was meant for the worker.
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.raw_os_error().is_some() => return false,
                Err(_) => {}
            }
        }
    }

    /// Who is to have it, this time.
    fn begin(&mut self, channel: Channel, shares: bool, fault: bool) {
        if let Some(mut before) = self.sending.take() {
            before.cut(&mut self.estate);
        }
        let kept = self.estate.begin_passing(shares, fault);
        if !std::mem::replace(&mut self.is_told, true) {
            self.tell(&FromWorker::Recovered(kept));
        }
        if channel.set_nonblocking().is_ok() {
            self.sending = Some(Sending::new(channel));
        }
    }

    fn send(&mut self, now: Millis) {
        let Some(sending) = &mut self.sending else { return };
        let (moved, gone) = match sending.step(&mut self.estate, now) {
            Progress::Waiting => return,
            Progress::Done { moved } => (moved, false),
            Progress::Failed { moved, gone } => {
                self.failures += u32::from(!gone);
                if self.failures >= MOST_FAILURES {
                    self.estate.give_up();
                }
                (moved, gone)
            }
        };
        self.sending = None;
        self.tell(&FromWorker::HandedOver { moved, left: self.estate.left(), gone });
    }

    /// Whoever asks for sessions asks again when they are with somebody.
    fn answer_nothing(&self, id: u64) {
        let nothing = serde_json::to_vec(&control::sessions::Found::default()).map_err(io::Error::from);
        if let Ok(memory) = nothing.and_then(|text| shared::sealed("evenkeel-sessions", &text)) {
            let _ = control::send(self.channel, &FromWorker::Found { id }, &[memory.as_fd()]);
        }
    }

    fn tell(&self, message: &FromWorker) {
        let _ = control::send(self.channel, message, &[]);
    }
}
