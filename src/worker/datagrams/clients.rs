//! From clients: which flow each datagram belongs to, and on to its server.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mio::Registry;
use tracing::warn;

use super::outlet::Sent;
use super::{Datagrams, FRONT_BUDGET, PLACES, has_own_address, unspecified};
use crate::config::{SendProxy, Service, Target as Goes};
use crate::counters::{Counters, OfFlows, OfListener, Process};
use crate::flow::{Arrival, DropReason, FlowKey, NO_SERVER, Reply};
use crate::proxy_protocol::{Ends, Header, Transport};
use crate::relay::CloseReason;
use crate::slab::Key;
use crate::sources::UNCOUNTED;
use crate::sys::clock::Millis;
use crate::sys::datagram::{self, Outgoing};

/// Where a datagram of a batch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Nowhere,
    /// The worker answers it.
    Service,
    Flow(Key),
    /// The worker of another slot has its flow by now.
    Elsewhere(FlowKey),
}

/// How one datagram fared on the short way.
enum Single {
    Done,
    ServerFailed,
    NeedsMore,
}

impl Datagrams<'_> {
    /// Reads one front up to its budget.
    pub(super) fn receive_from_clients(&mut self, registry: &Registry, index: usize, now: Millis) {
        if self.fronts.is_held() {
            return;
        }
        for _ in 0..FRONT_BUDGET {
            let Some(front) = self.fronts.get(index).filter(|front| front.ready) else { return };
            let received = self.arena.receive(&front.socket, 0, PLACES);
            let count = match received {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                // Out of memory, perhaps: the next datagram brings an edge.
                Err(_) => 0,
            };
            if count > 0 {
                self.handle_batch(registry, index, count, now);
            }
            if count < PLACES
                && let Some(front) = self.fronts.get_mut(index)
            {
                front.ready = false;
                front.take_up = false;
            }
        }
    }

    fn handle_batch(&mut self, registry: &Registry, index: usize, count: usize, now: Millis) {
        let front = self.fronts.get(index).expect("the caller read it");
        let (place, take_up) = (front.place, front.take_up);
        // Wall time, for that is what the kernel has stamped them with; and
        // only now, so that a step of the clock cannot cost live traffic.
        let arrived_after = take_up.then(|| {
            let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
            wall.saturating_sub(self.context.config.listeners[place.listener].udp.stale_after)
        });
        let mut targets = std::mem::take(&mut self.targets);
        targets.clear();
        for at in 0..count {
            let target = self.target_of(registry, place.listener, place.address, at, arrived_after, now);
            targets.push(target.unwrap_or_else(|reason| {
                self.drop_datagrams(place.listener, reason, self.arena.get(at).count());
                Target::Nowhere
            }));
        }
        let mut first = 0;
        while first < count {
            let target = targets[first];
            let run = targets[first..].iter().take_while(|other| **other == target).count();
            match target {
                Target::Nowhere => {}
                Target::Service => self.answer(index, first, first + run),
                Target::Flow(key) => {
                    self.note_run(key, first, first + run);
                    self.forward(registry, place.listener, key, first, first + run, now);
                }
                Target::Elsewhere(name) => self.pass_on(&name, first, first + run),
            }
            first += run;
        }
        self.targets = targets;
    }

    fn target_of(
        &mut self,
        registry: &Registry,
        listener: usize,
        address: usize,
        at: usize,
        arrived_after: Option<Duration>,
        now: Millis,
    ) -> Result<Target, DropReason> {
        let received = self.arena.get(at);
        let counters = &self.context.counters;
        counters.flows(listener, OfFlows::DatagramsIn).add(received.count());
        counters.listener(listener, OfListener::BytesIn).add(received.bytes.len() as u64);
        if arrived_after.zip(received.stamp).is_some_and(|(after, stamp)| stamp < after) {
            return Err(DropReason::Stale);
        }
        if received.truncated {
            return Err(DropReason::Truncated);
        }
        let config = &self.context.config.listeners[listener];
        let bind = config.bind[address];
        // Port 0 cannot be answered, and no honest client has it.
        let client = received.from.filter(|from| from.port() != 0).ok_or(DropReason::ToClient)?;
        let local = match received.local {
            _ if has_own_address(bind) => bind.ip(),
            Some(local) if !local.is_multicast() => local,
            _ => unspecified(bind),
        };
        let name = FlowKey { client, local, listener: listener as u16, address: address as u16 };
        match config.target {
            Goes::Upstream(_) => match self.flow_of(registry, name, now)? {
                Some(key) => Ok(Target::Flow(key)),
                None => Ok(Target::Elsewhere(name)),
            },
            Goes::Service(_) => self.note_service(name, at, now).map(|()| Target::Service),
        }
    }

    /// `None` where its flow is another slot's by now.
    pub(super) fn flow_of(
        &mut self,
        registry: &Registry,
        name: FlowKey,
        now: Millis,
    ) -> Result<Option<Key>, DropReason> {
        match self.flows.handle_client(&name, now) {
            Arrival::Known(key) => Ok(Some(key)),
            Arrival::Move(key) => self.move_flow(registry, key, now).map(|()| Some(key)),
            Arrival::Frozen(_) => Ok(None),
            Arrival::Open { .. } if self.is_elsewhere(&name) => Ok(None),
            Arrival::Open { evict } => {
                if self.is_daemon_full() {
                    return Err(DropReason::Shed);
                }
                self.may_open(&name, now)?;
                if let Some(key) = evict {
                    self.end_flow(key, CloseReason::Evicted, now);
                }
                self.open_flow(registry, name, now).map(Some)
            }
            Arrival::Drop(reason) => Err(reason),
        }
    }

    /// Whether the listener lets a client begin a flow.
    fn may_open(&mut self, name: &FlowKey, now: Millis) -> Result<(), DropReason> {
        let (listener, client) = (usize::from(name.listener), name.client.ip());
        let refused = match self.context.may_enter(listener, client, now) {
            Err(refused) => refused.drop_reason(),
            Ok(()) if self.context.is_listener_full(listener) => DropReason::MaxConnections,
            Ok(()) => return Ok(()),
        };
        if let Some(untold) = self.complaints.note(listener, refused.name(), now) {
            let name = &self.context.config.listeners[listener].name;
            warn!(
                "listener {name}: datagrams of {client} are dropped ({}), and {untold} more since the last such line",
                refused.name()
            );
        }
        Err(refused)
    }

    /// Counts a flow that was opened for its client.
    pub(super) fn count_source(&mut self, key: Key, name: &FlowKey, now: Millis) {
        let listener = usize::from(name.listener);
        let place = self.context.handle_entered(listener, name.client.ip(), now);
        self.note_source(key, place);
    }

    /// Remembers where a flow's client is counted, if it is.
    pub(super) fn note_source(&mut self, key: Key, place: u32) {
        let index = key.index as usize;
        if index >= self.source_places.len() {
            if place == UNCOUNTED {
                return;
            }
            self.source_places.resize(index + 1, UNCOUNTED);
        }
        self.source_places[index] = place;
    }

    /// Flows of a service are only counted: what finds no room is answered
    /// all the same.
    fn note_service(&mut self, name: FlowKey, at: usize, now: Millis) -> Result<(), DropReason> {
        let key = match self.flows.handle_client(&name, now) {
            Arrival::Known(key) | Arrival::Move(key) | Arrival::Frozen(key) => key,
            Arrival::Open { evict } => {
                self.may_open(&name, now)?;
                if let Some(key) = evict {
                    self.end_flow(key, CloseReason::Evicted, now);
                }
                self.count_opened(usize::from(name.listener));
                let key = self.flows.open(name, NO_SERVER, now);
                self.begin_story(key, None, now);
                self.count_source(key, &name, now);
                key
            }
            Arrival::Drop(DropReason::Leaving) => return Err(DropReason::Leaving),
            Arrival::Drop(_) => return self.may_open(&name, now),
        };
        let answers = self.context.config.listeners[usize::from(name.listener)].target;
        self.note_answered(key, at, answers == Goes::Service(Service::Discard));
        if answers != Goes::Service(Service::Discard) && self.flows.handle_reply(key, now) == Reply::Last {
            self.end_flow(key, CloseReason::Finished, now);
        }
        Ok(())
    }

    /// Answers a run of datagrams itself.
    fn answer(&mut self, index: usize, first: usize, end: usize) {
        let Self { arena, fronts, outlet, identities, context, .. } = self;
        let Some(front) = fronts.get_mut(index) else { return };
        let listener = front.place.listener;
        let config = &context.config.listeners[listener];
        if config.target == Goes::Service(Service::Discard) {
            return;
        }
        let (head, own) =
            (identities[listener].as_bytes(), has_own_address(config.bind[front.place.address]));
        let items = (first..end).map(|at| {
            let received = arena.get(at);
            let from = received.local.filter(|local| !own && !local.is_multicast());
            Outgoing { head, bytes: received.bytes, to: received.from, from, segment: received.segment }
        });
        let sent = outlet.send(&front.socket, &mut front.can_cut, items);
        self.count_sent_to_client(listener, &sent);
    }

    /// Sends a run of datagrams of one flow to its server.
    fn forward(
        &mut self,
        registry: &Registry,
        listener: usize,
        key: Key,
        first: usize,
        end: usize,
        now: Millis,
    ) {
        if self.flows.get(key).is_none() {
            // It had to make room for another of the same batch.
            return self.drop_datagrams(listener, DropReason::Shed, self.count_of(first, end));
        }
        if end == first + 1 {
            match self.send_single(key, listener, first) {
                Single::Done => return,
                Single::NeedsMore => {}
                // What was refused is an earlier one; this one was not sent,
                // and goes to the next server.
                Single::ServerFailed => {
                    if self.move_flow(registry, key, now).is_err() {
                        return self.drop_datagrams(listener, DropReason::NoServer, 1);
                    }
                }
            }
        }
        if end > first + 1 || self.arena.get(first).segment.is_some() {
            // Several at once are answered by several.
            self.begin_batches(key);
        }
        let mut sent = self.send_run(key, listener, first, end);
        let failed = sent.error.as_ref().is_some_and(|error| self.note_server_error(key, error));
        if failed && sent.refused > 0 && self.move_flow(registry, key, now).is_ok() {
            // Likewise: told at the first datagram of the run.
            sent.refused -= 1;
            let again = self.send_run(key, listener, first, first + 1);
            sent.refused += again.refused;
            sent.too_long += again.too_long;
        }
        self.drop_datagrams(listener, DropReason::TooLong, sent.too_long);
        self.drop_datagrams(listener, DropReason::ToServer, sent.refused);
        if sent.offload_failed {
            self.note_offload_failure(listener);
        }
    }

    /// The common case, one datagram and nothing in front of it, by the
    /// cheapest call.
    fn send_single(&mut self, key: Key, listener: usize, at: usize) -> Single {
        let received = self.arena.get(at);
        if received.segment.is_some() || self.sends_proxy_header(listener) {
            return Single::NeedsMore;
        }
        let Some(Some(uplink)) = self.uplinks.get(key.index as usize) else { return Single::Done };
        match datagram::send(&uplink.socket, received.bytes) {
            Ok(()) => Single::Done,
            Err(error) if self.note_server_error(key, &error) => Single::ServerFailed,
            Err(error) => {
                let too_long = error.raw_os_error() == Some(libc::EMSGSIZE);
                let reason = if too_long { DropReason::TooLong } else { DropReason::ToServer };
                self.drop_datagrams(listener, reason, 1);
                Single::Done
            }
        }
    }

    /// Any number of datagrams, whatever they are.
    fn send_run(&mut self, key: Key, listener: usize, first: usize, end: usize) -> Sent {
        let Some(name) = self.flows.get(key).map(|flow| flow.key()) else { return Sent::default() };
        let port = self.context.config.listeners[listener].bind[usize::from(name.address)].port();
        let ends = Ends { source: name.client, destination: (name.local, port).into() };
        // In front of every datagram, not only of a flow's first: most receivers
        // of datagrams keep no state and look at each.
        let header = self.sends_proxy_header(listener).then(|| Header::version_2(&ends, Transport::Datagram));
        let head = header.as_ref().map_or(&[][..], Header::as_bytes);
        let Self { arena, uplinks, outlet, .. } = self;
        let Some(Some(uplink)) = uplinks.get_mut(key.index as usize) else { return Sent::default() };
        let items = (first..end).map(|at| {
            let received = arena.get(at);
            Outgoing { head, bytes: received.bytes, to: None, from: None, segment: received.segment }
        });
        outlet.send(&uplink.socket, &mut uplink.can_cut, items)
    }

    pub(super) fn sends_proxy_header(&self, listener: usize) -> bool {
        match self.context.config.listeners[listener].target {
            Goes::Upstream(upstream) => self.context.config.upstreams[upstream].send_proxy == SendProxy::V2,
            Goes::Service(_) => false,
        }
    }

    /// Whether the daemon has all the connections that it may.
    fn is_daemon_full(&self) -> bool {
        let limit = self.context.config.daemon.max_connections;
        let active = |counters: &Counters| counters.process(Process::Active).get();
        limit > 0 && self.context.all.iter().map(active).sum::<u64>() >= limit
    }

    fn count_of(&self, first: usize, end: usize) -> u64 {
        (first..end).map(|at| self.arena.get(at).count()).sum()
    }

    pub(super) fn count_opened(&self, listener: usize) {
        let counters = &self.context.counters;
        counters.process(Process::Accepted).add(1);
        counters.process(Process::Active).add(1);
        counters.listener(listener, OfListener::Connections).add(1);
        counters.listener(listener, OfListener::Active).add(1);
    }
}
