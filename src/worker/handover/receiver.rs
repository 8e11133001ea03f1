//! The receiving side, and the gate that keeps clients' datagrams waiting
//! until their flows are here.
//!
//! The gate is shut from `Hold` to `Release`, and while a sender that was
//! announced with flows has not said `FlowsDone`. Whoever says nothing for
//! `PATIENCE` shuts it no longer: a stuck neighbour costs that much, no more.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::warn;

use super::{Cargo, death};
use crate::control::{self, PeerMessage};
use crate::handover::protocol::{Awaited, Outcome, PATIENCE, Taking};
use crate::handover::{self, MAX_BYTES, flows};
use crate::slab::Key;
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::datagram;
use crate::sys::shared;
use crate::worker::datagrams::Arrived;

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
    /// It keeps the gate shut meanwhile.
    awaited: Awaited,
    /// Nobody keeps what is not taken: it was parked over a restart.
    is_parked: bool,
    /// A dead worker's keeper: what comes is counted already.
    recovers: bool,
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
        let awaited = Awaited::begin(flows, now);
        self.all.push(Receiver { token, channel, awaited, is_parked: false, recovers: false });
        Ok(())
    }

    /// The one that was added last has no sender: it was parked.
    pub fn mark_parked(&mut self) {
        if let Some(receiver) = self.all.last_mut() {
            receiver.is_parked = true;
        }
    }

    /// The one that was added last is a keeper whose worker counted where this
    /// one does.
    pub fn mark_recovering(&mut self) {
        if let Some(receiver) = self.all.last_mut() {
            receiver.recovers = true;
        }
    }

    /// Whether there is such a one still.
    pub fn recovers(&self) -> bool {
        self.all.iter().any(|receiver| receiver.recovers)
    }

    /// Takes nothing more: whoever has something for this worker keeps it, and
    /// passes it to the next. What was parked nobody else would have.
    pub fn stop(&mut self, registry: &Registry) {
        for gone in self.all.extract_if(.., |receiver| !receiver.is_parked) {
            let _ = registry.deregister(&mut SourceFd(&gone.channel.as_fd().as_raw_fd()));
        }
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
            || self.all.iter().any(|receiver| receiver.awaited.holds(now))
    }

    /// When the gate opens by itself, at the latest.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.hold_until
            .into_iter()
            .chain(self.all.iter().filter_map(|receiver| receiver.awaited.deadline()))
            .max()
    }

    /// The gate stood open at the deadline.
    pub fn forget_deadlines(&mut self, now: Millis) {
        self.hold_until.take_if(|until| *until <= now);
        for receiver in &mut self.all {
            if receiver.awaited.expire(now) {
                warn!("a worker is slow to hand its flows over: their clients wait no longer");
            }
        }
    }

    /// Takes what has arrived from one sender; forgets it where it is done or
    /// gone. Whether that was a parked one.
    pub fn step(&mut self, token: Token, cargo: &mut Cargo, room: usize) -> bool {
        let Some(index) = self.all.iter().position(|receiver| receiver.token == token) else { return false };
        if !self.all[index].step(cargo, room) {
            let gone = self.all.swap_remove(index);
            let _ = cargo.registry.deregister(&mut SourceFd(&gone.channel.as_fd().as_raw_fd()));
            if gone.is_parked {
                // For whoever counts what was refused.
                let _ = control::send(&gone.channel, &PeerMessage::Done { heard: 0 }, &[]);
            }
            return gone.is_parked;
        }
        false
    }
}

impl Receiver {
    fn step(&mut self, cargo: &mut Cargo, room: usize) -> bool {
        let goes_on = self.take_all(cargo, room);
        cargo.sessions.keep().receiving(false);
        goes_on
    }

    fn take_all(&mut self, cargo: &mut Cargo, room: usize) -> bool {
        loop {
            // A socket that no slot names is the sender's still.
            cargo.sessions.keep().receiving(true);
            let taken = match control::receive::<PeerMessage>(&self.channel) {
                Ok(Some((PeerMessage::Sessions { count, number }, fds))) => {
                    self.take((count, number), fds, cargo, room)
                }
                Ok(Some((PeerMessage::Flows { count, number }, fds))) => {
                    self.take_flows((count, number), fds, cargo)
                }
                Ok(Some((PeerMessage::FlowsDone, _))) => {
                    self.awaited.handle_flows_done();
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
                Ok(Some((PeerMessage::Done { .. }, _)) | None) => return false,
                Ok(Some((PeerMessage::Taken { .. } | PeerMessage::Refused, _))) => return false,
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = taken {
                warn!("a hand-over was refused: {why}");
                let _ = control::send(&self.channel, &PeerMessage::Refused, &[]);
                return false;
            }
            self.awaited.handle_word(cargo.now);
        }
    }

    /// One bundle. An error ends the hand-over; the sender keeps what was in
    /// it, because it hears of no `Taken`.
    fn take(
        &self,
        count_and_number: (usize, u64),
        fds: Vec<OwnedFd>,
        cargo: &mut Cargo,
        room: usize,
    ) -> Result<(), String> {
        // What nobody takes ends by a reset, like all that is given up.
        let parked: Vec<OwnedFd> = match self.is_parked {
            true => {
                fds.iter().map(|fd| fd.try_clone()).collect::<Result<_, _>>().map_err(|e| e.to_string())?
            }
            false => Vec::new(),
        };
        let result = self.take_bundle(count_and_number, fds, cargo, room);
        match &result {
            Ok(refused) => refused.iter().flat_map(|range| parked.get(range.clone())).for_each(reset_all),
            Err(_) => reset_all(&parked),
        }
        result.map(drop)
    }

    /// The same; where the sockets are in the message that were not taken.
    fn take_bundle(
        &self,
        (count, number): (usize, u64),
        fds: Vec<OwnedFd>,
        cargo: &mut Cargo,
        room: usize,
    ) -> Result<Vec<Range<usize>>, String> {
        let mut at = 1;
        let mut left = Vec::new();
        let mut fds = fds.into_iter();
        let bundle = fds.next().ok_or("a bundle without its memory")?;
        let arrivals = handover::decode(&read(bundle, MAX_BYTES)?, fds.len()).map_err(|e| e.to_string())?;
        if arrivals.len() != count {
            return Err("it holds another number of sessions than it says".into());
        }
        let mut taking = Taking::begin();
        for arrival in arrivals {
            let sockets: Vec<_> = fds.by_ref().take(arrival.record.socket_count()).collect();
            let own = at..at + sockets.len();
            at = own.end;
            let has_room = cargo.sessions.len() < room;
            let key = has_room.then(|| cargo.sessions.take(arrival, sockets, cargo.now)).flatten();
            if key.is_none() {
                left.push(own);
            }
            taking.note(key);
        }
        death::die_if_told(death::RECEIVED);
        // Counted as late as can be: who dies before counts none of them lost.
        if !self.recovers {
            taking.taken().iter().for_each(|&key| cargo.sessions.count_taken(key));
        }
        cargo.sessions.keep().begin_receipt(self.channel.as_fd().as_raw_fd(), number, bits(taking.refused()));
        let said = self.say_taken(taking.refused(), number);
        if said.is_ok() {
            taking.taken().iter().for_each(|&key| cargo.sessions.own(key));
        }
        cargo.sessions.keep().end_receipt();
        match taking.handle_said(said.is_ok()) {
            Outcome::Activate(keys) => {
                death::die_if_told(death::TAKEN);
                keys.into_iter().for_each(|key| cargo.sessions.activate(cargo.registry, key, cargo.now));
            }
            Outcome::Undo(keys) => keys.into_iter().for_each(|key| cargo.sessions.forget(key)),
        }
        said.map(|()| left)
    }

    fn say_taken(&self, refused: &[usize], number: u64) -> Result<(), String> {
        let message = PeerMessage::Taken { refused: refused.to_vec(), number };
        control::send(&self.channel, &message, &[]).map_err(|error| error.to_string())
    }

    /// The same for flows.
    fn take_flows(
        &self,
        (count, number): (usize, u64),
        fds: Vec<OwnedFd>,
        cargo: &mut Cargo,
    ) -> Result<(), String> {
        let mut fds = fds.into_iter();
        let bundle = fds.next().ok_or("a bundle without its memory")?;
        let records =
            flows::decode(&read(bundle, flows::MAX_BYTES)?, fds.len()).map_err(|e| e.to_string())?;
        if records.len() != count {
            return Err("it holds another number of flows than it says".into());
        }
        let mut taking = Taking::begin();
        for record in records {
            let socket = if record.socket_count() == 1 { fds.next() } else { None };
            taking.note(cargo.datagrams.take(record, socket, cargo.now));
        }
        death::die_if_told(death::RECEIVED);
        let keys = |arrived: &[Arrived]| arrived.iter().filter_map(Arrived::flow).collect::<Vec<Key>>();
        if !self.recovers {
            keys(taking.taken()).into_iter().for_each(|key| cargo.datagrams.count_taken(key));
        }
        cargo.sessions.keep().begin_receipt(self.channel.as_fd().as_raw_fd(), number, bits(taking.refused()));
        let said = self.say_taken(taking.refused(), number);
        if said.is_ok() {
            keys(taking.taken()).into_iter().for_each(|key| cargo.datagrams.own(key));
        }
        cargo.sessions.keep().end_receipt();
        match taking.handle_said(said.is_ok()) {
            Outcome::Activate(arrived) => {
                death::die_if_told(death::TAKEN);
                let keys = keys(&arrived).into_iter();
                keys.for_each(|key| cargo.datagrams.activate(cargo.registry, key, cargo.now));
            }
            Outcome::Undo(arrived) => {
                keys(&arrived).into_iter().for_each(|key| cargo.datagrams.untake(key));
            }
        }
        said
    }
}

/// Places of a bundle as a bit each.
fn bits(places: &[usize]) -> [u64; 4] {
    let mut bits = [0; 4];
    for place in places.iter().filter(|place| **place < 256) {
        bits[place / 64] |= 1 << (place % 64);
    }
    bits
}

fn read(fd: OwnedFd, most: usize) -> Result<Vec<u8>, String> {
    shared::read_sealed_up_to(fd, most).map_err(|error| error.to_string())
}

/// They end by a reset when the last descriptor is closed, which is soon.
fn reset_all(sockets: &[OwnedFd]) {
    for socket in sockets {
        let _ = socket2::SockRef::from(socket).set_linger(Some(std::time::Duration::ZERO));
    }
}
