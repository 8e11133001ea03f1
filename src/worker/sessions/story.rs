//! What the access log will say of a session, gathered while it lives, and
//! only where there is such a log.

use std::net::SocketAddr;

use super::{Entry, Sessions};
use crate::access_log::Record;
use crate::config::Target;
use crate::handover::Story;
use crate::relay::CloseReason;
use crate::slab::Key;
use crate::sys::clock::{self, Millis};
use crate::worker::access_log;

impl Sessions<'_> {
    /// The beginning of a session's story.
    pub(super) fn begin_story(&self, client: SocketAddr) -> Option<Box<Story>> {
        self.context.access_log?;
        Some(Box::new(Story { client, connect_began: None, established: None, retries: 0 }))
    }

    /// Tells it to whoever goes on where this process is killed.
    pub(super) fn tell(&self, key: Key) {
        if let Some(story) = self.slab.get(key).and_then(|entry| entry.story.as_ref()) {
            self.keep.tell(key.index, story);
        }
    }

    /// Its line.
    pub(super) fn log_end(&self, entry: &Entry, reason: CloseReason) {
        let (Some(log), Some(story)) = (self.context.access_log, &entry.story) else { return };
        let config = self.context.config;
        let listener = &config.listeners[entry.listener as usize];
        let upstream = match listener.target {
            Target::Upstream(upstream) => Some(&config.upstreams[upstream]),
            Target::Service(_) => None,
        };
        let server = self.server_name(entry);
        let [bytes_in, bytes_out] = entry.session.client_bytes();
        let since = |from: Millis, to: Millis| to.saturating_sub(from);
        let record = Record {
            ended_at: access_log::now(),
            listener: &listener.name,
            slot: self.context.slot,
            client: Some(story.client),
            upstream: upstream.map(|upstream| upstream.name.as_str()),
            server: server.as_deref(),
            wait_ms: story.connect_began.map(|began| since(entry.born, began)),
            connect_ms: story.connect_began.zip(story.established).map(|(began, done)| since(began, done)),
            total_ms: since(entry.born, clock::coarse()),
            bytes_in,
            bytes_out,
            retries: story.retries,
            end: reason.name(),
        };
        log.borrow_mut().add(&record, &self.context.counters);
    }

    /// Sends what this turn has written.
    pub fn flush_log(&self) {
        if let Some(log) = self.context.access_log {
            log.borrow_mut().flush(&self.context.counters);
        }
    }
}
