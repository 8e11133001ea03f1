//! What the supervisor says, and what it is told.
//!
//! Orders come over the channel that is the worker's standard input. Its end
//! means that the supervisor is gone: the worker serves on without it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use tracing::{error, info, warn};

use super::Loop;
use super::passing_on::Incoming;
use crate::control::sessions::Query;
use crate::control::{self, FromWorker, Place, ToWorker};
use crate::sys::clock::Millis;
use crate::sys::shared;
use crate::worker::elsewhere::Elsewhere;
use crate::worker::handover::Load as Freight;

impl Loop<'_> {
    /// The supervisor lets it accept. Who hands over to it is heard from now
    /// on: a flow needs the listening socket by which it answers its client.
    fn begin_serving(&mut self, now: Millis) {
        for arrival in self.before_serving.take().into_iter().flatten() {
            if arrival.recovers {
                self.datagrams.begin_recovery();
            }
            self.begin_receiving(arrival, now);
        }
        self.datagrams.hold(self.receivers.is_shut(now));
        for (place, socket) in std::mem::take(&mut self.unserved) {
            let kept = self.kept.contains(&place);
            if let Err(error) = self.add(place, socket, None, kept) {
                error!(%error, "a listener cannot be polled");
                std::process::exit(1);
            }
        }
        self.tell(&FromWorker::Ready);
    }

    fn add(&mut self, place: Place, socket: OwnedFd, lent_by: Option<usize>, kept: bool) -> io::Result<()> {
        if self.datagrams.takes(place) {
            self.datagrams.add(self.poll.registry(), place, socket, lent_by, kept)
        } else {
            self.listeners.add(self.poll.registry(), place, socket, lent_by)
        }
    }

    pub(super) fn tell(&self, message: &FromWorker) {
        if let Err(error) = control::send(&self.channel, message, &[])
            && !self.is_orphan
        {
            warn!(%error, "the supervisor did not take a message");
        }
    }

    pub(super) fn handle_channel(&mut self, now: Millis) {
        loop {
            match control::receive::<ToWorker>(&self.channel) {
                Ok(Some((message, fds))) => self.handle_message(message, fds, now),
                Ok(None) => return self.handle_orphaned(now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.raw_os_error().is_some() => return self.handle_orphaned(now),
                Err(error) => warn!(%error, "a message of the supervisor was not understood"),
            }
        }
    }

    fn handle_message(&mut self, message: ToWorker, fds: Vec<OwnedFd>, now: Millis) {
        match message {
            ToWorker::Lend { slot, places } => match control::pair_up(places, fds) {
                Ok(sockets) => self.handle_loan(slot, sockets),
                Err(error) => warn!(%error, "a loan was refused"),
            },
            // Having been woken is the answer.
            ToWorker::Ask => {}
            ToWorker::Sessions { id, query } => self.answer(id, &query, now),
            ToWorker::Recall { slot } => {
                self.listeners.give_back(self.poll.registry(), slot);
                self.datagrams.give_back(self.poll.registry(), slot);
            }
            ToWorker::Successors => {
                let context = self.sessions.context();
                match Elsewhere::open(context.config, fds) {
                    Ok(later) => drop(context.later.set(later)),
                    Err(error) => warn!(%error, "the next generation's counters"),
                }
            }
            ToWorker::Drain { limit } => self.begin_leave(now, limit),
            ToWorker::Serve => self.begin_serving(now),
            ToWorker::HandOver { removed, limit, park, .. } => {
                // The slot's line is its successor's from here on.
                self.load = None;
                self.begin_handover(fds, &removed, limit, park, now);
            }
            ToWorker::Share { count } => self.begin_sending(fds, Freight::Sessions(count), None, now),
            ToWorker::TakeOver { flows, recovers } => {
                self.begin_receiving(Incoming { fds, has_flows: flows, is_parked: false, recovers }, now);
            }
            ToWorker::Unpark => {
                self.begin_receiving(
                    Incoming { fds, has_flows: true, is_parked: true, recovers: false },
                    now,
                );
            }
            ToWorker::Hold => {
                // What came so far is of flows that are here.
                self.datagrams.drain_fronts(self.poll.registry(), now);
                self.receivers.hold(now);
                self.datagrams.hold(true);
                self.tell(&FromWorker::Held);
            }
            ToWorker::Release => self.receivers.release(),
            ToWorker::PassFlows { to } => self.begin_passing(to, fds, now),
            ToWorker::Birth { .. } | ToWorker::Sockets(_) | ToWorker::Begin => {
                warn!("a message of the birth came late");
            }
        }
    }

    /// A list of many thousands takes milliseconds, as often as it is asked.
    fn answer(&mut self, id: u64, query: &Query, now: Millis) {
        let found = self.sessions.answer(query, now);
        let sealed = serde_json::to_vec(&found)
            .map_err(io::Error::from)
            .and_then(|text| shared::sealed("evenkeel-sessions", &text));
        match sealed {
            Ok(memory) => {
                if let Err(error) = control::send(&self.channel, &FromWorker::Found { id }, &[memory.as_fd()])
                {
                    warn!(%error, "the supervisor did not take the list of sessions");
                }
            }
            Err(error) => warn!(%error, "the sessions could not be listed"),
        }
    }

    fn handle_loan(&mut self, slot: usize, sockets: Vec<(Place, OwnedFd)>) {
        info!("accepting for the empty slot {slot} as well");
        for (place, socket) in sockets {
            if place.listener >= self.sessions.context().config.listeners.len() {
                continue;
            }
            if let Err(error) = self.add(place, socket, Some(slot), true) {
                warn!(%error, "a lent socket could not be polled");
            }
        }
    }

    fn handle_orphaned(&mut self, now: Millis) {
        if std::mem::replace(&mut self.is_orphan, true) {
            return;
        }
        let channel = self.channel.as_fd().as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&channel));
        let timeout = self.sessions.context().config.daemon.orphan_timeout;
        warn!("the supervisor is gone; serving on, accepting for {} s", timeout.as_secs_f32());
        self.orphaned_until = Some(now + timeout.as_millis() as u64);
    }
}
