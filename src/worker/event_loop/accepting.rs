//! Accepting: up to a budget a socket and turn, up to the limits of sessions.
//!
//! At a limit nothing is turned away: what waits stays in the kernel's queue,
//! and accepting begins again when a session ends or a pause is over.

use std::io;

use tracing::warn;

use super::Loop;
use crate::counters::Process;
use crate::sys::clock::Millis;
use crate::worker::listeners::{Accepted, PAUSE};

/// Connections that one socket may bring in one turn.
const ACCEPT_BUDGET: usize = 64;

impl Loop<'_> {
    pub(super) fn accept(&mut self, now: Millis) {
        if self.listeners.pause_end().is_some_and(|end| end <= now) {
            self.listeners.end_pause(self.poll.registry(), now);
        }
        for index in self.listeners.begin_turn(now) {
            for _ in 0..ACCEPT_BUDGET {
                if !self.listeners.is_ready(index) {
                    break;
                }
                if self.is_full() {
                    return self.pause(now, None);
                }
                if self.is_listener_full(index) {
                    self.hold(index, now);
                    break;
                }
                match self.listeners.accept(index) {
                    Accepted::Connection(listener, stream, peer) => {
                        self.sessions.open(self.poll.registry(), listener, stream, peer, now);
                    }
                    Accepted::Empty => break,
                    Accepted::Gone => {}
                    Accepted::Exhausted(error) => return self.pause(now, Some(error)),
                }
            }
        }
    }

    /// Whether this worker or the whole daemon has all the sessions it may.
    fn is_full(&self) -> bool {
        let limit = self.sessions.context().config.daemon.max_connections;
        self.sessions.len() >= self.session_limit || (limit > 0 && self.sessions.len_of_daemon() >= limit)
    }

    fn is_listener_full(&self, index: usize) -> bool {
        let listener = self.listeners.listener_of(index);
        listener.is_some_and(|listener| self.sessions.context().is_listener_full(listener))
    }

    /// The same for one socket, whose listener has all the sessions it may.
    fn hold(&mut self, index: usize, now: Millis) {
        self.listeners.hold(self.poll.registry(), index, now + PAUSE);
        let context = self.sessions.context();
        context.counters.process(Process::AcceptPauses).add(1);
        let Some(listener) = self.listeners.listener_of(index) else { return };
        if let Some(untold) = self.complaints.note(listener, "max_connections", now) {
            let config = &context.config.listeners[listener];
            warn!(
                "listener {} has all of its max_connections = {}: new clients wait in the queue; counted as \
                 accept_pauses, {untold} more since the last such line",
                config.name, config.limits.max_connections
            );
        }
    }

    /// What waits in the queues stays there, and is accepted later.
    fn pause(&mut self, now: Millis, error: Option<io::Error>) {
        self.listeners.pause(self.poll.registry(), now + PAUSE);
        if let Some(error) = error {
            self.sessions.context().counters.process(Process::AcceptPauses).add(1);
            if !std::mem::replace(&mut self.paused_before, true) {
                warn!(%error, "accepting pauses; further pauses are counted as accept_pauses");
            }
        } else {
            self.sessions.context().counters.process(Process::AcceptPauses).add(1);
        }
    }
}
