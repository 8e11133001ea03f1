//! Leaving: new handshakes are kept out, queues emptied, sessions finished.
//!
//! `worker::leave` says what comes next; here it is done.

use tracing::warn;

use super::Loop;
use crate::control::{FromWorker, Place};
use crate::relay::CloseReason;
use crate::sys::clock::Millis;
use crate::sys::handshakes;
use crate::worker::leave::{Leave, Step};

impl Loop<'_> {
    pub(super) fn begin_leave(&mut self, now: Millis, limit: Option<Millis>) {
        self.orphaned_until = None;
        if self.leave.is_some() {
            return;
        }
        // A filter there would keep the next daemon's clients out.
        self.listeners.let_go(self.poll.registry(), &self.outliving);
        if let Err(error) = self.listeners.keep_out() {
            warn!(%error, "new handshakes cannot be kept out");
        }
        self.datagrams.begin_leave();
        self.leave = Some(Leave::begin(now, limit));
    }

    /// Moves the leave on; true where the worker is done.
    pub(super) fn handle_leave(&mut self, now: Millis) -> bool {
        if self.sender.is_some() && self.listeners.is_empty() {
            return false;
        }
        if self.orphaned_until.is_some_and(|until| until <= now) {
            let limit = self.sessions.context().config.daemon.drain_timeout;
            self.begin_leave(now, Some(limit.as_millis() as u64));
        }
        loop {
            let Some(leave) = &mut self.leave else { return false };
            match leave.step(now, self.sessions.len() + self.datagrams.len()) {
                Step::Wait => return false,
                Step::Look => {
                    if handshakes::half_open(&self.ports()) == Some(false)
                        && let Some(leave) = &mut self.leave
                    {
                        leave.handle_nothing_half_open();
                    }
                }
                Step::Empty => {
                    self.listeners.expect_all();
                    self.accept_all(now);
                    let leave = self.leave.as_mut().expect("looked at above");
                    if self.listeners.pause_end().is_some_and(|end| end > now) && !leave.is_over(now) {
                        // Out of descriptors: the queue is served as sessions end.
                        return false;
                    }
                    leave.handle_closed();
                    self.listeners.close(self.poll.registry());
                    self.tell(&FromWorker::QueuesClosed);
                    self.sessions.turn(now);
                }
                Step::Exit => {
                    self.datagrams.close_all(CloseReason::Drained, now);
                    return true;
                }
                Step::GiveUp => {
                    let count = self.sessions.len();
                    let flows = self.datagrams.len();
                    warn!("drain_timeout is over: {count} sessions are reset, {flows} flows ended");
                    self.sessions.close_all(CloseReason::Drained);
                    self.datagrams.close_all(CloseReason::Drained, now);
                    return true;
                }
            }
        }
    }

    fn accept_all(&mut self, now: Millis) {
        while self.listeners.has_ready(now) {
            self.accept(now);
        }
    }

    fn ports(&self) -> Vec<u16> {
        let listeners = &self.sessions.context().config.listeners;
        let port = |place: Place| listeners[place.listener].bind[place.address].port();
        self.listeners.sockets().map(|(place, _)| port(place)).collect()
    }
}
