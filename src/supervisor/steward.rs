//! The steward's process: started, told, and replaced when it dies.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::warn;

use super::generation::Generation;
use super::prepare::Prepared;
use super::upgrade::{ChildState, Packer, Unpacker};
use crate::control::{self, FromSteward, StewardBirth, ToSteward};
use crate::supervision::Backoff;
use crate::sys::channel::Channel;
use crate::sys::clock::{self, Millis};
use crate::sys::process::Child;

/// How long an ending steward may take, in milliseconds.
const PATIENCE: Millis = 1_000;

/// The steward's place.
#[derive(Debug, Default)]
pub struct Steward {
    process: Option<Process>,
    /// There was one before.
    had_one: bool,
    /// Those that say their last words.
    leaving: Vec<Child>,
    backoff: Backoff,
    due_at: Option<Millis>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    channel: Channel,
    since: Millis,
}

impl Steward {
    /// Starts one.
    pub fn start(
        &mut self,
        prepared: &Prepared,
        generation: &Generation,
        config_path: &str,
        registry: &Registry,
        token: Token,
    ) -> io::Result<()> {
        self.due_at = None;
        for child in &mut self.leaving {
            let _ = child.kill();
        }
        let (ours, theirs) = Channel::pair()?;
        ours.set_nonblocking()?;
        let child = prepared.image.spawn(&["steward".to_string()], theirs)?;
        registry.register(&mut SourceFd(&ours.as_fd().as_raw_fd()), token, Interest::READABLE)?;
        let process = self.process.insert(Process { child, channel: ours, since: clock::coarse() });
        let birth = StewardBirth {
            account: prepared.account,
            supervisor_pid: std::process::id(),
            config_path: config_path.to_string(),
            started_at: prepared.started_at,
            started: prepared.started,
            is_first: !std::mem::replace(&mut self.had_one, true),
        };
        let bells = [prepared.board_bell.as_fd(), prepared.failure_bell.as_fd()];
        let fds = [generation.sealed.as_fd(), prepared.control.as_fd(), bells[0], bells[1]];
        control::send(&process.channel, &ToSteward::Birth(birth), &fds)
    }

    /// As the next image of the supervisor is to find it.
    pub fn pack<'a>(&'a self, packer: &mut Packer<'a>) -> Option<ChildState> {
        let process = self.process.as_ref()?;
        let channel = Some(packer.keep(&process.channel));
        let pid = process.child.id();
        Some(ChildState { pid, channel, generation: 0, keeper: None, is_keeper: false, is_fault: false })
    }

    /// As the image before this one left it.
    pub fn unpack(
        state: &ChildState,
        unpacker: &mut Unpacker,
        registry: &Registry,
        token: Token,
    ) -> Result<Steward, String> {
        let number = state.channel.ok_or("the steward has no channel")?;
        let channel = Channel::from_fd(unpacker.take(number)?);
        registry
            .register(&mut SourceFd(&channel.as_fd().as_raw_fd()), token, Interest::READABLE)
            .map_err(|error| format!("the steward's channel: {error}"))?;
        let process = Process { child: Child::of_number(state.pid), channel, since: clock::coarse() };
        Ok(Steward { process: Some(process), had_one: true, ..Steward::default() })
    }

    /// It hears no more, says its last words and ends; when it is gone another
    /// one is to be started: boards have one writer.
    pub fn retire(&mut self, registry: &Registry, now: Millis) {
        let Some(process) = self.process.take() else { return };
        let _ = registry.deregister(&mut SourceFd(&process.channel.as_fd().as_raw_fd()));
        self.leaving.push(process.child);
        self.due_at = Some(now + PATIENCE);
    }

    /// Tells it something; false where it is not there to hear it.
    pub fn send(&mut self, message: &ToSteward, fds: &[BorrowedFd]) -> bool {
        let Some(process) = &mut self.process else { return false };
        match control::send(&process.channel, message, fds) {
            Ok(()) => true,
            Err(error) => {
                warn!(%error, "the steward takes no messages: killed");
                let _ = process.child.kill();
                false
            }
        }
    }

    /// What it says next, if it says anything.
    pub fn receive(&mut self, registry: &Registry) -> Option<FromSteward> {
        let process = self.process.as_mut()?;
        match control::receive(&process.channel) {
            Ok(Some((message, _))) => Some(message),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Ok(None) | Err(_) => {
                let _ = process.child.kill();
                let _ = registry.deregister(&mut SourceFd(&process.channel.as_fd().as_raw_fd()));
                None
            }
        }
    }

    /// Looks whether it has ended; true where a new one is to be started now.
    pub fn reap(&mut self, registry: &Registry, now: Millis) -> bool {
        if !self.leaving.is_empty() {
            self.leaving.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
            if self.leaving.is_empty() && self.process.is_none() {
                return true;
            }
        }
        let Some(process) = &mut self.process else { return false };
        let Ok(Some(status)) = process.child.try_wait() else { return false };
        warn!("steward ended: {status}");
        let _ = registry.deregister(&mut SourceFd(&process.channel.as_fd().as_raw_fd()));
        let lived = now.saturating_sub(process.since);
        self.process = None;
        self.due_at = Some(now + self.backoff.handle_death(lived));
        self.is_due(now)
    }

    /// It could not be started: later again.
    pub fn handle_failure(&mut self, now: Millis) {
        self.end();
        self.due_at = Some(now + self.backoff.handle_death(0).max(100));
    }

    /// Whether a new one is to be started.
    pub fn is_due(&self, now: Millis) -> bool {
        self.due_at.is_some_and(|due| due <= now)
    }

    /// When a new one is to be started.
    pub fn due_at(&self) -> Option<Millis> {
        self.due_at
    }

    /// Ends it: it may finish the answers that it owes.
    pub fn end(&mut self) {
        let Some(Process { mut child, channel, .. }) = self.process.take() else { return };
        drop(channel);
        let deadline = clock::coarse() + PATIENCE;
        while matches!(child.try_wait(), Ok(None)) && clock::coarse() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}
