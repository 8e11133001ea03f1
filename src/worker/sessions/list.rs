//! Lists and ends sessions for an operator.

use super::{Entry, Sessions, Stage};
use crate::config::Target;
use crate::control::sessions::{Found, Line, MOST_SESSIONS, Query};
use crate::relay::CloseReason;
use crate::slab::Key;
use crate::sys::clock::Millis;

impl Sessions<'_> {
    /// What the query takes, the oldest first; ended where it says so.
    pub fn answer(&mut self, query: &Query, now: Millis) -> Found {
        let mut found: Vec<(Millis, Key)> = Vec::new();
        for key in self.slab.keys() {
            if let Some(entry) = self.slab.get(key).filter(|entry| self.matches(entry, query)) {
                found.push((entry.born, key));
            }
        }
        found.sort_unstable_by_key(|(born, _)| *born);
        let shown = found.iter().take(query.limit.min(MOST_SESSIONS));
        let sessions = shown.filter_map(|(_, key)| Some(self.line(self.slab.get(*key)?, now))).collect();
        let mut ended = 0;
        // One that is on its way elsewhere ends there, if it is asked again.
        for (_, key) in found.iter().filter(|_| query.kill) {
            if self.slab.get(*key).is_some_and(|entry| !entry.frozen) {
                self.abandon(*key);
                ended += 1;
            }
        }
        Found { matched: found.len() as u64, ended, sessions }
    }

    /// Both sides are reset at once, whatever waits for them.
    fn abandon(&mut self, key: Key) {
        if let Some(entry) = self.slab.get(key) {
            for stream in [Some(&entry.client), entry.server.as_ref()].into_iter().flatten() {
                let _ = stream.reset_on_close();
            }
        }
        self.remove(key, CloseReason::Killed);
    }

    fn matches(&self, entry: &Entry, query: &Query) -> bool {
        let filter = &query.filter;
        let listener = &self.context.config.listeners[entry.listener as usize];
        let same =
            |asked: &Option<String>, is: Option<&str>| asked.as_deref().is_none_or(|asked| is == Some(asked));
        // The address costs a system call: last.
        same(&filter.listener, Some(&listener.name))
            && same(&filter.upstream, self.upstream_name(entry))
            && filter.server.as_ref().is_none_or(|asked| self.has_server(entry, asked))
            && (filter.client.is_none() && filter.client_port.is_none()
                || filter.takes_client(client_of(entry)))
    }

    fn upstream_name(&self, entry: &Entry) -> Option<&str> {
        let config = self.context.config;
        match config.listeners[entry.listener as usize].target {
            Target::Upstream(upstream) => Some(&config.upstreams[upstream].name),
            Target::Service(_) => None,
        }
    }

    /// Where its server is; as the file writes it where that is a name, and
    /// the address that it had has changed.
    pub(super) fn server_name(&self, entry: &Entry) -> Option<String> {
        let Target::Upstream(upstream) = self.context.config.listeners[entry.listener as usize].target else {
            return None;
        };
        let place = entry.server_index? as usize;
        let address = self.address_at(upstream, place);
        Some(address.unwrap_or_else(|| self.server_at(upstream, place).clone()).to_string())
    }

    /// Whether its server is so called, in the file or by its address.
    fn has_server(&self, entry: &Entry, asked: &str) -> bool {
        let Target::Upstream(upstream) = self.context.config.listeners[entry.listener as usize].target else {
            return false;
        };
        let in_file = entry.server_index.map(|place| self.server_at(upstream, place as usize).to_string());
        in_file.as_deref() == Some(asked) || self.server_name(entry).as_deref() == Some(asked)
    }

    fn line(&self, entry: &Entry, now: Millis) -> Line {
        let [bytes_in, bytes_out] = entry.session.client_bytes();
        let state = match entry.stage {
            Stage::Accepted { .. } => "accepted",
            Stage::Header { .. } => "header",
            Stage::Connecting(_) => "connecting",
            Stage::Waiting(_) => "waiting",
            Stage::Open => "open",
            Stage::Resetting { .. } => "resetting",
        };
        Line {
            slot: self.context.slot,
            pid: std::process::id(),
            listener: self.context.config.listeners[entry.listener as usize].name.clone(),
            client: client_of(entry),
            upstream: self.upstream_name(entry).map(str::to_string),
            server: self.server_name(entry),
            state: state.to_string(),
            age_ms: now.saturating_sub(entry.born),
            idle_ms: now.saturating_sub(entry.moved),
            bytes_in,
            bytes_out,
        }
    }
}

fn client_of(entry: &Entry) -> Option<std::net::SocketAddr> {
    let told = entry.origin.as_ref().map(|ends| ends.source);
    told.or_else(|| entry.client.peer().ok().flatten())
}
