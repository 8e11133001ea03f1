//! From an accepted connection to a session that may have a server: the
//! PROXY header where one is required, then the listener's gate.
//!
//! ```text
//!   accept --trusted?--> Header --whole--> gate --> server or service
//!     \------------no header required-------^
//! ```
//!
//! The header is looked at where it lies, in the socket's receive queue, and
//! taken out of it once it is whole: nothing of it is kept here, what follows
//! it stays in the stream, and another process goes on where this one stopped.
//! Bounded by `HEADER_TIMEOUT` and `proxy_protocol::V2_BYTES`.

use std::io;
use std::net::SocketAddr;

use mio::Registry;
use tracing::warn;

use super::{Sessions, Stage};
use crate::config::{AcceptProxy, Service, Target};
use crate::counters::{OfListener, Process};
use crate::keep::State;
use crate::proxy_protocol::{Decoded, Ends, V2_BYTES, decode};
use crate::relay::{CloseReason, Readiness, Side};
use crate::slab::Key;
use crate::sources::UNCOUNTED;
use crate::sys::clock::Millis;
use crate::sys::stream::Stream;

/// How long a PROXY header may take, in milliseconds: "at least 3 seconds" to
/// cover a retransmit, says section 2 of the specification.
const HEADER_TIMEOUT: Millis = 3_000;

impl Sessions<'_> {
    /// Takes over a connection that was accepted.
    pub fn open(
        &mut self,
        registry: &Registry,
        listener: usize,
        client: Stream,
        peer: SocketAddr,
        now: Millis,
    ) {
        let proxied = self.context.config.listeners[listener].tcp.accept_proxy == AcceptProxy::On;
        let place = if proxied {
            let trusted = self.context.gates[listener].trusts(peer.ip());
            trusted.then_some(UNCOUNTED).ok_or(CloseReason::ProxyUntrusted)
        } else {
            let entered = self.context.may_enter(listener, peer.ip(), now);
            entered
                .map(|()| self.context.handle_entered(listener, peer.ip(), now))
                .map_err(|refused| refused.close_reason())
        };
        let place = match place {
            Ok(place) => place,
            Err(reason) => {
                // Nothing was promised: a reset costs least, here and there.
                let _ = client.reset_on_close();
                self.count_accepted(listener);
                self.context.counters.ended(listener, reason).add(1);
                return self.complain(listener, reason, Some(peer), now);
            }
        };
        let Some(key) = self.insert(registry, listener, (client, peer), place, now) else { return };
        if !proxied {
            return self.join(registry, key, peer, now);
        }
        self.await_header(registry, key, now);
    }

    fn await_header(&mut self, registry: &Registry, key: Key, now: Millis) {
        let until = now + HEADER_TIMEOUT;
        self.slab.get_mut(key).expect("the caller found it").stage = Stage::Header { until };
        self.keep.stand(key.index, State::Header, until);
        self.deadlines.set(key.index, until);
        self.read_header(registry, key, false, now);
    }

    /// Goes on with a client that another process accepted, and had no time
    /// for more.
    pub(super) fn enter(&mut self, registry: &Registry, key: Key, header_read: bool, now: Millis) {
        let entry = self.slab.get(key).expect("the caller found it");
        let listener = entry.listener as usize;
        let told = entry.origin.as_ref().map(|ends| ends.source);
        let Some(client) = told.or_else(|| entry.client.peer().ok().flatten()) else {
            return self.close(key, CloseReason::ClientLost, now);
        };
        let proxied = self.context.config.listeners[listener].tcp.accept_proxy == AcceptProxy::On;
        if proxied && !header_read {
            return match self.context.gates[listener].trusts(client.ip()) {
                true => self.await_header(registry, key, now),
                false => self.refuse(key, CloseReason::ProxyUntrusted, now),
            };
        }
        self.let_in(registry, key, client, now);
    }

    /// Counted next to what becomes of it: a worker that is killed in between
    /// has lost one that nobody finds again.
    pub(super) fn count_accepted(&self, listener: usize) {
        let counters = &self.context.counters;
        counters.process(Process::Accepted).add(1);
        counters.listener(listener, OfListener::Connections).add(1);
    }

    /// Looks whether the PROXY header is whole; `ended` where nothing more
    /// will come.
    pub(super) fn read_header(&mut self, registry: &Registry, key: Key, ended: bool, now: Millis) {
        let entry = self.slab.get(key).expect("the caller found it");
        let begun = match entry.client.peek(&mut self.keep.scratch()[..V2_BYTES]) {
            // A look whether anybody listens, as load balancers take it.
            Ok(0) => return self.close(key, CloseReason::Finished, now),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => return self.close(key, CloseReason::of_error(Side::Client, &error), now),
        };
        match decode(&self.keep.scratch()[..begun]) {
            Ok(Decoded::Header { length, ends }) => {
                self.keep.header(key.index, length, ends.as_ref());
                // It lies there: this takes out just as much.
                if entry.client.receive(&mut self.keep.scratch()[..length]).ok() != Some(length) {
                    return self.close(key, CloseReason::ProxyMalformed, now);
                }
                self.handle_header(registry, key, ends, now);
            }
            Ok(Decoded::Incomplete) if ended => self.refuse(key, CloseReason::ProxyMalformed, now),
            Ok(Decoded::Incomplete) => {}
            Err(_) => self.refuse(key, CloseReason::ProxyMalformed, now),
        }
    }

    fn handle_header(&mut self, registry: &Registry, key: Key, ends: Option<Ends>, now: Millis) {
        let entry = self.slab.get_mut(key).expect("the caller found it");
        entry.origin = ends.map(Box::new);
        if let (Some(story), Some(ends)) = (&mut entry.story, ends) {
            story.client = ends.source;
        }
        // What follows the header may have come with it: no new edge tells.
        let readable = Readiness { readable: true, ..Readiness::default() };
        entry.session.handle_ready(Side::Client, readable);
        entry.moved = now;
        let client = match ends {
            Some(ends) => ends.source,
            None => match entry.client.peer() {
                Ok(Some(peer)) => peer,
                _ => return self.close(key, CloseReason::ClientLost, now),
            },
        };
        self.let_in(registry, key, client, now);
    }

    /// Asks whether a client with a session may come in, and leads it on.
    fn let_in(&mut self, registry: &Registry, key: Key, client: SocketAddr, now: Millis) {
        let listener = self.slab.get(key).expect("the caller found it").listener as usize;
        if let Err(refused) = self.context.may_enter(listener, client.ip(), now) {
            return self.refuse(key, refused.close_reason(), now);
        }
        let place = self.context.handle_entered(listener, client.ip(), now);
        self.slab.get_mut(key).expect("still there").source = place;
        self.join(registry, key, client, now);
    }

    /// Leads a client that has come in to a server, or to the service.
    fn join(&mut self, registry: &Registry, key: Key, client: SocketAddr, now: Millis) {
        let listener = self.slab.get(key).expect("the caller found it").listener as usize;
        match self.context.config.listeners[listener].target {
            Target::Upstream(_) => {
                let attempt = self.first_attempt(key, client, now);
                self.begin_connect(registry, key, attempt, now);
            }
            Target::Service(service) => {
                let greeting = match service {
                    Service::Identify => self.identity(listener),
                    Service::Echo | Service::Discard => String::new(),
                };
                let entry = self.slab.get_mut(key).expect("still there");
                entry.session.greet(greeting.as_bytes(), &mut self.keep, key.index);
                entry.stage = Stage::Open;
                self.keep.stand(key.index, State::Open, now);
                self.set_deadline(key, now);
                self.enqueue(key);
            }
        }
    }

    /// Turns a client away that has a session already.
    pub(super) fn refuse(&mut self, key: Key, reason: CloseReason, now: Millis) {
        let entry = self.slab.get(key).expect("the caller found it");
        let listener = entry.listener as usize;
        let ends = entry.origin.as_ref().map(|ends| ends.source);
        let peer = ends.or_else(|| entry.client.peer().ok().flatten());
        self.complain(listener, reason, peer, now);
        self.close(key, reason, now);
    }

    fn complain(&mut self, listener: usize, reason: CloseReason, peer: Option<SocketAddr>, now: Millis) {
        let Some(untold) = self.complaints.note(listener, reason.name(), now) else { return };
        let name = &self.context.config.listeners[listener].name;
        let from = peer.map_or("a client".to_string(), |peer| peer.ip().to_string());
        let what = match reason {
            CloseReason::ProxyUntrusted => "sends no PROXY header that is trusted (listener.tcp.trusted)",
            CloseReason::ProxyMalformed => "sent no PROXY header that can be taken",
            CloseReason::ProxyTimeout => "sent no whole PROXY header in 3 s",
            CloseReason::Denied => "is not let in (listener.access)",
            CloseReason::PerSource => "has as many sessions as it may (listener.limits.per_source)",
            _ => "begins more sessions a second than it may (listener.limits.rate_per_source)",
        };
        warn!(
            "listener {name}: {from} {what}; counted as {}, {untold} more since the last such line",
            reason.name()
        );
    }
}
