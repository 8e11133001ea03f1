//! The receiving side, and the gate that keeps clients' datagrams waiting
//! until their flows are here.
//!
//! The gate is shut from `Hold` to `Release`, and while a sender that was
//! announced with flows has not said `FlowsDone`. Whoever says nothing for
//! `PATIENCE` shuts it no longer: a stuck neighbour costs that much, no more.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::warn;

use super::{Cargo, PATIENCE};
use crate::control::{self, PeerMessage};
use crate::handover::{self, MAX_BYTES, flows};
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::datagram;
use crate::sys::shared;

/// All senders that this worker listens to.
#[derive(Debug, Default)]
pub struct Receivers {
    all: Vec<Receiver>,
    /// The supervisor is about to steer anew, at most until then.
    hold_until: Option<Millis>,
}

#[derive(Debug)]
struct Receiver {
    token: Token,
    channel: Channel,
    /// It keeps the gate shut until then; `None` = no longer.
    awaited_until: Option<Millis>,
}

impl Receivers {
    /// Listens to a sender.
    pub fn add(
        &mut self,
        channel: Channel,
        registry: &Registry,
        token: Token,
        flows: bool,
        now: Millis,
    ) -> std::io::Result<()> {
        channel.set_nonblocking()?;
        registry.register(&mut SourceFd(&channel.as_fd().as_raw_fd()), token, Interest::READABLE)?;
        let awaited_until = flows.then_some(now + PATIENCE);
        self.all.push(Receiver { token, channel, awaited_until });
        Ok(())
    }

    /// Shuts the gate until `release`.
    pub fn hold(&mut self, now: Millis) {
        self.hold_until = Some(now + PATIENCE);
    }

    /// Every sender is known.
    pub fn release(&mut self) {
        self.hold_until = None;
    }

    /// Whether clients' datagrams are to wait.
    pub fn is_shut(&self, now: Millis) -> bool {
        self.hold_until.is_some_and(|until| now < until)
            || self.all.iter().any(|receiver| receiver.awaited_until.is_some_and(|until| now < until))
    }

    /// When the gate opens by itself, at the latest.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.hold_until.into_iter().chain(self.all.iter().filter_map(|receiver| receiver.awaited_until)).max()
    }

    /// The gate stood open at the deadline.
    pub fn forget_deadlines(&mut self, now: Millis) {
        self.hold_until.take_if(|until| *until <= now);
        for receiver in &mut self.all {
            if receiver.awaited_until.take_if(|until| *until <= now).is_some() {
                warn!("a worker is slow to hand its flows over: their clients wait no longer");
            }
        }
    }

    /// Takes what has arrived from one sender; forgets it where it is done or
    /// gone.
    pub fn step(&mut self, token: Token, cargo: &mut Cargo, room: usize) {
        let Some(index) = self.all.iter().position(|receiver| receiver.token == token) else { return };
        if !self.all[index].step(cargo, room) {
            let gone = self.all.swap_remove(index);
            let _ = cargo.registry.deregister(&mut SourceFd(&gone.channel.as_fd().as_raw_fd()));
        }
    }
}

impl Receiver {
    fn step(&mut self, cargo: &mut Cargo, room: usize) -> bool {
        loop {
            let taken = match control::receive::<PeerMessage>(&self.channel) {
                Ok(Some((PeerMessage::Sessions { count }, fds))) => self.take(count, fds, cargo, room),
                Ok(Some((PeerMessage::Flows { count }, fds))) => self.take_flows(count, fds, cargo),
                Ok(Some((PeerMessage::FlowsDone, _))) => {
                    self.awaited_until = None;
                    Ok(())
                }
                Ok(Some((PeerMessage::Straggler(straggler), fds))) => {
                    let bytes = fds.into_iter().next().ok_or_else(|| "a datagram without bytes".to_string());
                    let bytes = bytes.and_then(|fd| read(fd, datagram::MAX_BYTES));
                    bytes.map(|bytes| {
                        cargo.datagrams.take_straggler(cargo.registry, &straggler, &bytes, cargo.now);
                    })
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return true,
                Ok(Some((PeerMessage::Done, _)) | None) => return false,
                Ok(Some((PeerMessage::Taken { .. }, _))) => return false,
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = taken {
                warn!("a hand-over was refused: {why}");
                return false;
            }
            if self.awaited_until.is_some() {
                self.awaited_until = Some(cargo.now + PATIENCE);
            }
        }
    }

    /// One bundle. An error ends the hand-over; the sender keeps what was in
    /// it, because it hears of no `Taken`.
    fn take(&self, count: usize, fds: Vec<OwnedFd>, cargo: &mut Cargo, room: usize) -> Result<(), String> {
        let mut fds = fds.into_iter();
        let bundle = fds.next().ok_or("a bundle without its memory")?;
        let arrivals = handover::decode(&read(bundle, MAX_BYTES)?, fds.len()).map_err(|e| e.to_string())?;
        if arrivals.len() != count {
            return Err("it holds another number of sessions than it says".into());
        }
        let (mut taken, mut refused) = (Vec::new(), Vec::new());
        for (index, arrival) in arrivals.into_iter().enumerate() {
            let sockets: Vec<_> = fds.by_ref().take(arrival.record.socket_count()).collect();
            let has_room = cargo.sessions.len() < room;
            match has_room.then(|| cargo.sessions.take(arrival, sockets, cargo.now)).flatten() {
                Some(key) => taken.push(key),
                None => refused.push(index),
            }
        }
        if let Err(error) = control::send(&self.channel, &PeerMessage::Taken { refused }, &[]) {
            // The sender will go on with them: here they never were.
            taken.into_iter().for_each(|key| cargo.sessions.forget(key));
            return Err(error.to_string());
        }
        for key in taken {
            cargo.sessions.activate(cargo.registry, key, cargo.now);
        }
        Ok(())
    }

    /// The same for flows.
    fn take_flows(&self, count: usize, fds: Vec<OwnedFd>, cargo: &mut Cargo) -> Result<(), String> {
        let mut fds = fds.into_iter();
        let bundle = fds.next().ok_or("a bundle without its memory")?;
        let records =
            flows::decode(&read(bundle, flows::MAX_BYTES)?, fds.len()).map_err(|e| e.to_string())?;
        if records.len() != count {
            return Err("it holds another number of flows than it says".into());
        }
        let (mut taken, mut refused) = (Vec::new(), Vec::new());
        for (index, record) in records.into_iter().enumerate() {
            let socket = if record.socket_count() == 1 { fds.next() } else { None };
            if !cargo.datagrams.take(record, socket, &mut taken, cargo.now) {
                refused.push(index);
            }
        }
        if let Err(error) = control::send(&self.channel, &PeerMessage::Taken { refused }, &[]) {
            taken.into_iter().for_each(|key| cargo.datagrams.untake(key));
            return Err(error.to_string());
        }
        taken.into_iter().for_each(|key| cargo.datagrams.activate(cargo.registry, key, cargo.now));
        Ok(())
    }
}

fn read(fd: OwnedFd, most: usize) -> Result<Vec<u8>, String> {
    shared::read_sealed_up_to(fd, most).map_err(|error| error.to_string())
}
