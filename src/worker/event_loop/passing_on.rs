//! Sessions and flows on their way to other workers, and from them.
//!
//! `worker::handover` and its protocol say who has what; here they are given
//! what they need of the loop, and the supervisor is told how it went.

use std::io;
use std::os::fd::OwnedFd;

use mio::Token;
use tracing::warn;

use super::{FIRST_PEER, Loop, SPECIAL};
use crate::control::{FromWorker, Place};
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::shared;
use crate::worker::handover::{Cargo, Load as Freight, Passing, Progress, Sender};
use crate::worker::leave::Leave;

/// Sessions on their way out.
pub(super) struct Outgoing {
    pub sender: Sender,
    /// The worker leaves afterwards, and has so long for what cannot move.
    pub then_leave: Option<Option<Millis>>,
}

/// A sender of sessions and flows.
#[derive(Debug)]
pub(super) struct Incoming {
    pub fds: Vec<OwnedFd>,
    pub has_flows: bool,
    /// Nobody is at its other end: it was parked over a restart.
    pub is_parked: bool,
    /// It is the keeper of a dead worker that counted where this one does.
    pub recovers: bool,
}

impl<'a> Loop<'a> {
    /// Its successor gets everything. What waits in queues that nobody will
    /// have any more is accepted first.
    pub(super) fn begin_handover(
        &mut self,
        fds: Vec<OwnedFd>,
        removed: &[Place],
        limit: Option<Millis>,
        park: bool,
        now: Millis,
    ) {
        self.listeners.close_all_but(self.poll.registry(), removed);
        // Of a slot that goes, nobody will read what waits.
        self.datagrams.drain_fronts(self.poll.registry(), now);
        self.datagrams.stop_receiving(self.poll.registry());
        if !self.listeners.is_empty() {
            self.begin_leave(now, limit);
        }
        // What came from now on would be left behind.
        self.receivers.stop(self.poll.registry());
        if let Some(mut outgoing) = self.sender.take() {
            // Its receiver died, and this is the next one.
            outgoing.sender.fail("another receiver", &mut self.cargo(now));
        }
        self.begin_sending(fds, Freight::Everything, Some(limit), now);
        if let Some(outgoing) = self.sender.as_mut().filter(|_| park) {
            outgoing.sender.park();
        }
    }

    fn cargo(&mut self, now: Millis) -> Cargo<'_, 'a> {
        let Self { sessions, datagrams, poll, .. } = self;
        Cargo { sessions, datagrams, registry: poll.registry(), now }
    }

    /// What waits in queues that nobody will have any more comes first.
    pub(super) fn sessions_may_go(&self) -> bool {
        let leaves = self.sender.as_ref().is_some_and(|outgoing| outgoing.then_leave.is_some());
        !leaves || self.listeners.is_empty()
    }

    /// Clients' datagrams come to other slots: their flows go there.
    pub(super) fn begin_passing(&mut self, to: Vec<usize>, fds: Vec<OwnedFd>, now: Millis) {
        let mut fds = fds.into_iter();
        let routes = fds.next().ok_or(io::ErrorKind::InvalidData.into()).and_then(shared::read_sealed);
        let routes = routes.and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
        let routes = routes.unwrap_or_else(|error: io::Error| {
            warn!(%error, "the routes were not understood: flows stay");
            Vec::new()
        });
        let ways: Vec<(usize, Channel, Token)> = to
            .into_iter()
            .zip(fds)
            .map(|(slot, fd)| (slot, Channel::from_fd(fd), self.peer_token()))
            .collect();
        let before = self.passing.take();
        self.passing = Some(Passing::begin(&routes, ways, &mut self.cargo(now), before));
    }

    /// Clients' datagrams are read only while the gate is open.
    pub(super) fn tend_gate(&mut self, now: Millis) {
        if self.datagrams.is_held() && !self.receivers.is_shut(now) {
            self.datagrams.hold(false);
            self.receivers.forget_deadlines(now);
        }
    }

    pub(super) fn begin_sending(
        &mut self,
        fds: Vec<OwnedFd>,
        load: Freight,
        then_leave: Option<Option<Millis>>,
        now: Millis,
    ) {
        let token = self.peer_token();
        let channel = fds.into_iter().next().map(Channel::from_fd);
        let sender =
            channel.map(|channel| Sender::new(channel, self.poll.registry(), token, load, &self.datagrams));
        match (sender, self.sender.is_some()) {
            (Some(Ok(sender)), false) => self.sender = Some(Outgoing { sender, then_leave }),
            _ => {
                warn!("sessions cannot be handed over");
                if let Some(limit) = then_leave {
                    self.datagrams.linger(now);
                    self.begin_leave(now, limit);
                }
            }
        }
    }

    pub(super) fn begin_receiving(&mut self, incoming: Incoming, now: Millis) {
        if let Some(waiting) = &mut self.before_serving {
            return waiting.push(incoming);
        }
        let token = self.peer_token();
        let Some(channel) = incoming.fds.into_iter().next().map(Channel::from_fd) else { return };
        match self.receivers.add(channel, self.poll.registry(), token, incoming.has_flows, now) {
            Ok(()) if incoming.is_parked => self.receivers.mark_parked(),
            Ok(()) if incoming.recovers => self.receivers.mark_recovering(),
            Ok(()) => {}
            Err(error) => warn!(%error, "sessions cannot be taken over"),
        }
        self.datagrams.hold(self.receivers.is_shut(now));
    }

    fn peer_token(&mut self) -> Token {
        self.peer_count += 1;
        Token(SPECIAL | (FIRST_PEER + self.peer_count))
    }

    pub(super) fn handle_peer(&mut self, token: Token, now: Millis) {
        let room = self.session_limit;
        let Self { sessions, datagrams, poll, receivers, .. } = self;
        let mut cargo = Cargo { sessions, datagrams, registry: poll.registry(), now };
        if receivers.step(token, &mut cargo, room) {
            self.tell(&FromWorker::Unparked);
        }
    }

    /// Sends on what may go.
    pub(super) fn drive_handover(&mut self, now: Millis) {
        let sessions_may_go = self.sessions_may_go();
        let Self { sessions, datagrams, poll, sender, passing, .. } = self;
        let mut cargo = Cargo { sessions, datagrams, registry: poll.registry(), now };
        let told = passing.as_mut().and_then(|passing| passing.step(&mut cargo));
        if passing.as_mut().is_some_and(|passing| passing.is_over(&mut cargo)) {
            *passing = None;
        }
        let progress = sender.as_mut().map(|outgoing| outgoing.sender.step(&mut cargo, sessions_may_go));
        if let Some(message) = told {
            self.tell(&message);
        }
        let moved = match progress {
            None | Some(Progress::Waiting) => return,
            Some(Progress::Done { moved } | Progress::Failed { moved }) => moved,
        };
        let outgoing = self.sender.take();
        let gone = outgoing.as_ref().is_some_and(|outgoing| outgoing.sender.is_receiver_gone());
        let then_leave = outgoing.and_then(|outgoing| outgoing.then_leave);
        let left = self.sessions.len() + self.datagrams.len();
        self.tell(&FromWorker::HandedOver { moved, left, gone });
        if let Some(limit) = then_leave {
            self.datagrams.linger(now);
            self.leave = Some(Leave::finishing(now, limit));
        }
    }
}
