//! One slot: its sockets, its counters, and the process that fills it now.
//!
//! Sockets and counters belong to the slot, not to the process: they are here
//! from the slot's first worker until the daemon leaves.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::warn;

use super::prepare::{FIRST_GENERATION, Prepared};
use crate::control::{self, FromWorker, Place, ToWorker};
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::process;
use crate::sys::shared::Region;

/// A worker's place.
#[derive(Debug)]
pub struct Slot {
    number: usize,
    counters: Region,
    held: Vec<(Place, OwnedFd)>,
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    channel: Option<Channel>,
}

impl Slot {
    pub fn new(number: usize, counters: Region) -> Slot {
        Slot { number, counters, held: Vec::new(), process: None }
    }

    /// Read-only descriptors of its counters.
    pub fn counters_to_read(&self) -> io::Result<OwnedFd> {
        self.counters.read_only_fd()
    }

    /// Its counters, to read.
    pub fn counters(&self) -> &Region {
        &self.counters
    }

    /// Its number.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The sockets that are held for it.
    pub fn sockets(&self) -> impl Iterator<Item = (Place, BorrowedFd<'_>)> {
        self.held.iter().map(|(place, socket)| (*place, socket.as_fd()))
    }

    /// Its process, 0 where it is empty.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |process| process.child.id())
    }

    /// Starts a worker for it, with the sockets that the slot has.
    pub fn spawn(&mut self, prepared: &Prepared, registry: &Registry, token: Token) -> io::Result<()> {
        let (ours, theirs) = Channel::pair()?;
        ours.set_nonblocking()?;
        let arguments = ["worker".to_string(), self.number.to_string()];
        let child = prepared.image.spawn(&arguments, theirs)?;
        let fd = ours.as_fd().as_raw_fd();
        self.process = Some(Process { child, channel: Some(ours) });
        registry.register(&mut SourceFd(&fd), token, Interest::READABLE)?;
        self.tell_birth(prepared)
    }

    fn tell_birth(&self, prepared: &Prepared) -> io::Result<()> {
        let channel = self.channel().ok_or(io::ErrorKind::NotConnected)?;
        let birth = ToWorker::Birth {
            slot: self.number,
            slot_count: prepared.slot_count,
            generation: FIRST_GENERATION,
            account: prepared.account,
            tells_load: prepared.loads.is_some(),
        };
        let readable = prepared.counters_to_read.iter().map(AsFd::as_fd);
        let loads = prepared.loads.iter().map(AsFd::as_fd);
        let own = [prepared.config.as_fd(), self.counters.as_fd()].into_iter().chain(loads);
        let fds: Vec<BorrowedFd> = own.chain(readable).collect();
        control::send(channel, &birth, &fds)?;
        let held: Vec<(Place, BorrowedFd)> =
            self.held.iter().map(|(place, fd)| (*place, fd.as_fd())).collect();
        control::send_sockets(channel, &held, ToWorker::Sockets)?;
        control::send(channel, &ToWorker::Begin, &[])?;
        control::send(channel, &ToWorker::Serve, &[])
    }

    fn channel(&self) -> Option<&Channel> {
        self.process.as_ref()?.channel.as_ref()
    }

    /// Sends something. A worker that takes no messages is stuck: its end
    /// brings a new one.
    fn tell(&mut self, message: &ToWorker, fds: &[BorrowedFd]) {
        let Some(channel) = self.channel() else { return };
        if let Err(error) = control::send(channel, message, fds) {
            warn!(slot = self.number, %error, "the worker takes no messages: killed");
            self.kill();
        }
    }

    /// What its worker says next, if it says anything.
    pub fn receive(&mut self, registry: &Registry) -> Option<(FromWorker, Vec<OwnedFd>)> {
        let channel = self.channel()?;
        match control::receive(channel) {
            Ok(Some(message)) => return Some(message),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Ok(None) => {}
            Err(error) => {
                warn!(slot = self.number, %error, "the worker's message was not understood: killed");
                self.kill();
            }
        }
        self.close_channel(registry);
        None
    }

    fn close_channel(&mut self, registry: &Registry) {
        if let Some(process) = &mut self.process
            && let Some(channel) = process.channel.take()
        {
            let _ = registry.deregister(&mut SourceFd(&channel.as_fd().as_raw_fd()));
        }
    }

    /// Keeps what its worker opened.
    pub fn hold(&mut self, places: Vec<Place>, fds: Vec<OwnedFd>) {
        match control::pair_up(places, fds) {
            Ok(sockets) => self.held.extend(sockets),
            Err(error) => {
                warn!(slot = self.number, %error, "the worker's sockets were refused: killed");
                self.kill();
            }
        }
    }

    /// The daemon leaves and the queues are served: nobody needs them more.
    pub fn release_sockets(&mut self) {
        self.held.clear();
    }

    /// Further descriptors of its sockets.
    pub fn duplicates(&self) -> Vec<(Place, OwnedFd)> {
        self.held.iter().filter_map(|(place, fd)| Some((*place, fd.try_clone().ok()?))).collect()
    }

    /// Its worker polls another slot's sockets as well.
    pub fn lend(&mut self, slot: usize, sockets: &[(Place, OwnedFd)]) {
        let Some(channel) = self.channel() else { return };
        let sockets: Vec<(Place, BorrowedFd)> =
            sockets.iter().map(|(place, fd)| (*place, fd.as_fd())).collect();
        if let Err(error) = control::send_sockets(channel, &sockets, |places| ToWorker::Lend { slot, places })
        {
            warn!(slot = self.number, %error, "the worker takes no loan: killed");
            self.kill();
        }
    }

    /// It does so no more.
    pub fn recall(&mut self, slot: usize) {
        self.tell(&ToWorker::Recall { slot }, &[]);
    }

    /// Its worker is to leave within so many milliseconds.
    pub fn drain(&mut self, limit: Option<Millis>) {
        self.tell(&ToWorker::Drain { limit }, &[]);
    }

    /// Ends its process at once.
    pub fn kill(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.child.kill();
        }
    }

    /// Whether its process was stopped (SIGSTOP) or went on since the last
    /// call.
    pub fn try_stop(&mut self) -> Option<bool> {
        let pid = self.process.as_ref()?.child.id();
        process::try_stop(pid)
    }

    /// How its process ended, if it has.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.process.as_mut()?.child.try_wait().ok().flatten()
    }

    /// The process is gone; the slot is empty.
    pub fn forget_process(&mut self, registry: &Registry) {
        self.close_channel(registry);
        self.process = None;
    }
}
