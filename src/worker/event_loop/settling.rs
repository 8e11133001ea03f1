//! What comes from a dead worker's keeper, and this worker's own keeper.
//!
//! While sessions of its predecessor are on their way here, the gauges say
//! what that had; who is taken in then is counted already. When the last
//! keeper is through, the gauges are set to what is really here, and what is
//! missing counts as lost.

use super::{KEEPER, Loop};
use crate::counters::{OfListener, OfServer, Process};
use crate::relay::CloseReason;
use crate::sys::clock::Millis;

impl Loop<'_> {
    /// Sets the gauges right, once.
    pub(super) fn settle_gauges(&mut self) {
        if !self.recovers || self.before_serving.is_some() || self.receivers.recovers() {
            return;
        }
        self.recovers = false;
        let here = self.sessions.census().plus(self.datagrams.census());
        let counters = &self.sessions.context().counters;
        for listener in 0..self.born.config.listeners.len() {
            let is = here.of_listener(listener);
            let gauge = counters.listener(listener, OfListener::Active);
            counters.ended(listener, CloseReason::WorkerLost).add(gauge.get().saturating_sub(is));
            gauge.set(is);
        }
        for place in 0..self.born.layout.numbering().place_count() {
            counters.server(place, OfServer::Active).set(here.of_place(place));
        }
        counters.process(Process::Active).set(here.total());
    }

    pub(super) fn handle_keeper_ended(&mut self, now: Millis) {
        if let Some(guard) = &mut self.guard {
            guard.handle_ended(now);
        }
    }

    /// Begins another keeper where one is wanted; an orphan needs none.
    pub(super) fn tend_keeper(&mut self, now: Millis) {
        if self.is_orphan {
            self.guard = None;
        }
        let Self { guard, born, channel, poll, .. } = self;
        if let Some(guard) = guard {
            guard.tend(born, channel, poll.registry(), KEEPER, now);
        }
    }
}
