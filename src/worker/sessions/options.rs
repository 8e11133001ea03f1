//! When a server's socket gets its options.
//!
//! A client's socket inherits all of them from its listener, for no call. A
//! server's gets them once they can make a difference, since the shortest
//! connections end before that: TCP_NODELAY after the second request or one
//! that may be longer than a segment (until then Nagle holds nothing back),
//! keep-alive and TCP_USER_TIMEOUT when the session is a second old.

use super::{Entry, Sessions};
use crate::config::Tcp;
use crate::slab::Key;
use crate::sys::clock::Millis;
use crate::sys::stream::{self, TcpOptions};

/// The age at which a session is one that stays, in milliseconds.
const SETTLES_AT: Millis = 1_000;
/// What fits into one segment, whatever the path (RFC 1122, 4.2.2.6).
const SMALLEST_SEGMENT: u64 = 536;

/// Which options a server's socket still lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lacks {
    /// TCP_NODELAY and what the configuration asks for.
    All,
    /// What the configuration asks for.
    Configured,
    Nothing,
}

impl Entry {
    /// Called after a turn, with the client's bytes before and after it.
    /// Setting the option late is as good: it sends what was held back.
    pub(super) fn quicken(&mut self, before: u64, after: u64) {
        let is_first = before == 0 && after <= SMALLEST_SEGMENT;
        if self.lacks != Lacks::All || after == before || is_first {
            return;
        }
        self.lacks = Lacks::Configured;
        if let Some(server) = &self.server {
            let _ = stream::set_quick(server);
        }
    }

    /// When the rest is due.
    pub(super) fn settles_at(&self) -> Option<Millis> {
        (self.lacks != Lacks::Nothing).then_some(self.born + SETTLES_AT)
    }
}

impl Sessions<'_> {
    /// Sets the options of a session that has come to its age.
    pub(super) fn settle(&mut self, key: Key, now: Millis) {
        let Some(entry) = self.slab.get_mut(key) else { return };
        if entry.settles_at().is_none_or(|at| at > now) {
            return;
        }
        entry.lacks = Lacks::Nothing;
        let options = options(&self.context.config.listeners[entry.listener as usize].tcp);
        if let Some(server) = &entry.server {
            // A socket that refuses them is about to tell its error anyway.
            let _ = options.settle(server);
        }
    }
}

fn options(tcp: &Tcp) -> TcpOptions {
    TcpOptions { keepalive: tcp.keepalive, user_timeout: tcp.user_timeout }
}
