//! Who may come in: what a listener's `access`, `limits` and `trusted` say of
//! a client.
//!
//! One gate a listener, made once a worker. Limits count over all slots, by
//! what every slot's counters say; nothing is locked, so slots that admit at
//! the same moment may pass a limit by one each.

use std::net::IpAddr;

use super::sessions::Context;
use crate::access::{Access, Addresses};
use crate::config::Listener;
use crate::counters::{Counters, OfListener, Process};
use crate::flow::DropReason;
use crate::relay::CloseReason;
use crate::sources::{self, Full, Source, UNCOUNTED};
use crate::sys::clock::Millis;

/// One listener's gate.
#[derive(Clone, Debug)]
pub struct Gate {
    access: Access,
    trusted: Addresses,
    limits: sources::Limits,
    max_connections: u64,
}

/// Why a client may not come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Denied,
    PerSource,
    RatePerSource,
}

impl Gate {
    pub fn of(listener: &Listener) -> Gate {
        Gate {
            access: Access::new(&listener.access.allow, &listener.access.deny),
            trusted: Addresses::of(&listener.tcp.trusted),
            limits: sources::Limits {
                live: u64::from(listener.limits.per_source),
                per_second: u64::from(listener.limits.rate_per_source),
            },
            max_connections: listener.limits.max_connections,
        }
    }

    /// Whether a PROXY header is believed from there.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        self.trusted.contains(peer)
    }

    /// Whether the access lists let this client in.
    pub fn permits(&self, client: IpAddr) -> bool {
        self.access.permits(client)
    }
}

impl Refused {
    /// How a session that is refused ends.
    pub fn close_reason(self) -> CloseReason {
        match self {
            Refused::Denied => CloseReason::Denied,
            Refused::PerSource => CloseReason::PerSource,
            Refused::RatePerSource => CloseReason::RatePerSource,
        }
    }

    /// Why a datagram that would begin a flow is dropped.
    pub fn drop_reason(self) -> DropReason {
        match self {
            Refused::Denied => DropReason::Denied,
            Refused::PerSource => DropReason::PerSource,
            Refused::RatePerSource => DropReason::RatePerSource,
        }
    }
}

impl Context<'_> {
    /// Whether a client may come in at a listener; nothing is counted yet.
    pub fn may_enter(&self, listener: usize, client: IpAddr, now: Millis) -> Result<(), Refused> {
        let gate = &self.gates[listener];
        if !gate.permits(client) {
            return Err(Refused::Denied);
        }
        if self.counters.sources(self.layout, listener).is_none() {
            return Ok(());
        }
        let tables = self.all.iter().filter_map(|slot| slot.sources(self.layout, listener));
        sources::check(tables, self.source_of(client), gate.limits, now).map_err(|full| match full {
            Full::Live => Refused::PerSource,
            Full::Rate => Refused::RatePerSource,
        })
    }

    /// Counts a client that has come in; what it answers goes to `handle_left`.
    pub fn handle_entered(&self, listener: usize, client: IpAddr, now: Millis) -> u32 {
        let table = self.counters.sources(self.layout, listener);
        table.map_or(UNCOUNTED, |table| table.add_new(self.source_of(client), now))
    }

    /// Counts a client that another process has let in.
    pub fn handle_taken(&self, listener: usize, client: IpAddr, now: Millis) -> u32 {
        let table = self.counters.sources(self.layout, listener);
        table.map_or(UNCOUNTED, |table| table.add(self.source_of(client), now))
    }

    /// Whether what each client has at this listener is counted.
    pub fn counts_sources(&self, listener: usize) -> bool {
        self.counters.sources(self.layout, listener).is_some()
    }

    /// A client's session or flow is over, or in another process.
    pub fn handle_left(&self, listener: usize, place: u32) {
        if let Some(table) = self.counters.sources(self.layout, listener) {
            table.less_one(place);
        }
    }

    /// Whether a listener has all the sessions or flows that it may.
    pub fn is_listener_full(&self, listener: usize) -> bool {
        let limit = self.gates[listener].max_connections;
        let active = |slot: &Counters| slot.listener(listener, OfListener::Active).get();
        limit > 0 && self.all.iter().map(active).sum::<u64>() >= limit
    }

    fn source_of(&self, client: IpAddr) -> Source {
        Source::of(client, self.counters.process(Process::SourceSeed).get())
    }
}
