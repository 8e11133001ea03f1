//! Sessions that wait because every server has all that it may have.
//!
//! ```text
//!   Full --> Waiting, behind those who came before --a place is free--> connect
//!                     \--queue_timeout--> closed
//! ```
//! Each worker has a queue for each upstream, first come first served, and
//! tells the others since when its first one waits. A worker leaves a free
//! place to another one whose first has waited longer by more than `SLACK`, so
//! that no worker's clients starve while another's go round; within that it
//! serves itself, so that no place stays empty for want of a message. Whether
//! another worker has freed a place is looked at every `LOOK_EVERY` while
//! somebody waits, and never else. Bounded by the worker's sessions.

use std::collections::VecDeque;

use mio::Registry;

use super::connect::Attempt;
use super::{Sessions, Stage, millis};
use crate::counters::{Counters, OfUpstream};
use crate::relay::CloseReason;
use crate::slab::Key;
use crate::sys::clock::Millis;

/// How often a worker with waiting sessions looks for places that others have
/// freed, in milliseconds.
const LOOK_EVERY: Millis = 5;
/// How much longer another worker's first may have waited before it goes
/// first, in milliseconds: long enough that places seldom change hands.
const SLACK: Millis = 50;
/// After so much longer than `queue_timeout` another worker's first is no more.
const GRACE: Millis = 1_000;

/// The queues of a worker.
#[derive(Debug)]
pub(super) struct Waiting {
    /// By upstream: since when, and who.
    queues: Vec<VecDeque<(Millis, Key)>>,
    /// When the next look is due; `None` where nobody waits.
    look_at: Option<Millis>,
}

impl Waiting {
    pub(super) fn new(upstream_count: usize) -> Waiting {
        Waiting { queues: vec![VecDeque::new(); upstream_count], look_at: None }
    }

    /// A place may be free: who waits is looked at in this turn.
    pub(super) fn look_soon(&mut self) {
        if let Some(at) = &mut self.look_at {
            *at = 0;
        }
    }

    /// When `serve_waiting` is to be called at the latest.
    pub(super) fn next_look(&self) -> Option<Millis> {
        self.look_at
    }
}

impl Sessions<'_> {
    /// Whether somebody who waits since then may take a place now.
    pub(super) fn may_pass(&self, upstream: usize, since: Option<Millis>, now: Millis) -> bool {
        if self.balancers[upstream].places().iter().all(|place| place.max_connections == 0) {
            return true;
        }
        // Who comes now stands behind everybody of this worker.
        if since.is_none() && !self.waiting.queues[upstream].is_empty() {
            return false;
        }
        let own = since.unwrap_or(now);
        let timeout = millis(self.context.config.upstreams[upstream].queue_timeout);
        let waits_longer = |(slot, counters): (usize, &Counters)| {
            let other = counters.upstream(upstream, OfUpstream::WaitingSince).get();
            let is_alive = other > 0 && now <= other.saturating_add(timeout).saturating_add(GRACE);
            slot != self.context.slot && is_alive && other + SLACK < own
        };
        !self.context.all.iter().enumerate().any(waits_longer)
    }

    /// Counts a session at a place before it is there; false where it is full.
    pub(super) fn reserve(&self, upstream: usize, place: usize) -> bool {
        let most = self.balancers[upstream].places()[place].max_connections;
        self.context.reserve(upstream, place, most)
    }

    /// Puts a session into the queue, at the place that is due to it.
    pub(super) fn wait(&mut self, upstream: usize, key: Key, mut attempt: Box<Attempt>, now: Millis) {
        let timeout = millis(self.context.config.upstreams[upstream].queue_timeout);
        let since = *attempt.waits_since.get_or_insert(now);
        if since.saturating_add(timeout) <= now {
            return self.close(key, CloseReason::QueueTimeout, now);
        }
        let Some(entry) = self.slab.get_mut(key) else { return };
        entry.stage = Stage::Waiting(attempt);
        self.deadlines.set(key.index, since.saturating_add(timeout));
        let queue = &mut self.waiting.queues[upstream];
        // The first that could not get in has not left its place.
        if queue.front() != Some(&(since, key)) {
            let at = queue.partition_point(|(other, _)| *other <= since);
            queue.insert(at, (since, key));
        }
        self.waiting.look_at.get_or_insert(now + LOOK_EVERY);
        self.publish_waiting(upstream);
    }

    /// Lets in who may come in, where a look is due.
    pub(super) fn serve_waiting(&mut self, registry: &Registry, now: Millis) {
        if self.waiting.look_at.is_none_or(|at| at > now) {
            return;
        }
        for upstream in 0..self.waiting.queues.len() {
            self.serve_queue(registry, upstream, now);
        }
        let is_waited = self.waiting.queues.iter().any(|queue| !queue.is_empty());
        self.waiting.look_at = is_waited.then_some(now + LOOK_EVERY);
    }

    fn serve_queue(&mut self, registry: &Registry, upstream: usize, now: Millis) {
        if self.waiting.queues[upstream].is_empty() {
            return;
        }
        let mut queue = std::mem::take(&mut self.waiting.queues[upstream]);
        queue.retain(|(_, key)| self.waits(*key));
        self.waiting.queues[upstream] = queue;
        while let Some(&(_, key)) = self.waiting.queues[upstream].front() {
            let entry = self.slab.get_mut(key).expect("only who waits was kept");
            let Stage::Waiting(mut attempt) = std::mem::replace(&mut entry.stage, Stage::Open) else {
                unreachable!("only who waits was kept");
            };
            attempt.until = now + self.connect_timeout(key);
            self.begin_connect(registry, key, attempt, now);
            if self.waits(key) {
                break;
            }
            self.waiting.queues[upstream].pop_front();
        }
        self.publish_waiting(upstream);
    }

    /// Whether a session waits in a queue.
    fn waits(&self, key: Key) -> bool {
        self.slab.get(key).is_some_and(|entry| {
            !entry.frozen && matches!(&entry.stage, Stage::Waiting(a) if a.waits_since.is_some())
        })
    }

    fn publish_waiting(&self, upstream: usize) {
        let queue = &self.waiting.queues[upstream];
        let counters = &self.context.counters;
        counters.upstream(upstream, OfUpstream::Waiting).set(queue.len() as u64);
        let since = queue.front().map_or(0, |(since, _)| (*since).max(1));
        counters.upstream(upstream, OfUpstream::WaitingSince).set(since);
    }
}
