//! What the access log will say of each flow, gathered while it lives, and
//! only where there is such a log: without one nothing here takes memory.

use super::Datagrams;
use crate::access_log::Record;
use crate::config::Target;
use crate::flow::{Flow, GONE_SERVER, Story};
use crate::relay::CloseReason;
use crate::slab::Key;
use crate::sys::clock::{self, Millis};
use crate::worker::access_log;

impl Datagrams<'_> {
    /// A flow begins, or goes on here.
    pub(super) fn begin_story(&mut self, key: Key, story: Option<Story>, now: Millis) {
        if self.context.access_log.is_some() {
            self.flows.tell(key, story.unwrap_or(Story { born: now, bytes_in: 0, bytes_out: 0 }));
        }
    }

    /// Bytes came from its client, and went to it.
    pub(super) fn note_bytes(&mut self, key: Key, bytes_in: u64, bytes_out: u64) {
        if self.context.access_log.is_some() {
            self.flows.note_bytes(key, bytes_in, bytes_out);
        }
    }

    /// A run of datagrams in the arena is of this flow.
    pub(super) fn note_run(&mut self, key: Key, first: usize, end: usize) {
        if self.context.access_log.is_some() {
            let bytes = (first..end).map(|at| self.arena.get(at).bytes.len() as u64).sum();
            self.flows.note_bytes(key, bytes, 0);
        }
    }

    /// A datagram in the arena is answered by this worker, or only dropped.
    pub(super) fn note_answered(&mut self, key: Key, at: usize, is_dropped: bool) {
        if self.context.access_log.is_some() {
            let bytes = self.arena.get(at).bytes.len() as u64;
            self.flows.note_bytes(key, bytes, if is_dropped { 0 } else { bytes });
        }
    }

    /// Its line.
    pub(super) fn log_end(&mut self, key: Key, flow: &Flow, reason: CloseReason) {
        let Some(log) = self.context.access_log else { return };
        let Some(story) = self.flows.story(key, flow) else { return };
        let listener = &self.context.config.listeners[usize::from(flow.key().listener)];
        let (upstream, server) = match listener.target {
            Target::Upstream(upstream) if flow.server < GONE_SERVER => {
                let address =
                    self.context.address_at(&self.balancers[upstream], upstream, flow.server as usize);
                (Some(upstream), address.map(|address| address.to_string()))
            }
            Target::Upstream(upstream) => (Some(upstream), None),
            Target::Service(_) => (None, None),
        };
        let record = Record {
            ended_at: access_log::now(),
            listener: &listener.name,
            slot: self.context.slot,
            client: Some(flow.key().client),
            upstream: upstream.map(|upstream| self.context.config.upstreams[upstream].name.as_str()),
            server: server.as_deref(),
            wait_ms: None,
            connect_ms: None,
            total_ms: clock::coarse().saturating_sub(story.born),
            bytes_in: story.bytes_in,
            bytes_out: story.bytes_out,
            retries: 0,
            end: reason.name(),
        };
        log.borrow_mut().add(&record, &self.context.counters);
    }
}
