//! Flows on their way to another process, and those that arrive.
//!
//! As with sessions: a flow that is sent is frozen, out of epoll and without a
//! deadline, until the receiver has acknowledged it or has not. Its socket
//! goes along, so the server sees the same port before and after, and what it
//! sends meanwhile waits there. One that arrives lies still until the
//! acknowledgement is out. A client's datagram that finds its flow frozen or
//! gone to another slot is passed on to there; that is one in a million, which
//! was on its way through the kernel while the steering changed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use mio::Registry;
use mio::unix::SourceFd;

use super::Datagrams;
use super::servers::Uplink;
use crate::config::{Mode, Target};
use crate::control::{self, PeerMessage, Routes, Straggler};
use crate::counters::{OfFlows, OfListener, OfServer, Process};
use crate::flow::{DropReason, FlowKey, GONE_SERVER, NO_SERVER};
use crate::handover::flows::{Flow, Record};
use crate::proxy_protocol::{Ends, Header, Transport};
use crate::relay::CloseReason;
use crate::slab::Key;
use crate::steering::Route;
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::{datagram, shared};

/// Receives of a front that is read to its end before its flows move: far
/// more than its buffer holds of anything but the shortest datagrams.
const DRAIN_BUDGET: usize = 256;

/// A way to another slot's worker.
#[derive(Debug)]
pub struct Passage {
    pub slot: usize,
    pub channel: Rc<Channel>,
}

/// Something that is being sent.
#[derive(Debug)]
pub enum Item {
    /// A frozen flow, which keeps its socket.
    Flow(Key),
    /// A port that rests.
    #[allow(missing_docs)]
    Resting { listener: usize, since: Millis, socket: OwnedFd },
}

/// Something that was taken in.
#[derive(Clone, Copy, Debug)]
pub enum Arrived {
    /// A flow, which lies still.
    Flow(Key),
    /// A port that rests, or of which nobody knows the listener any more.
    Resting,
}

impl Arrived {
    /// The flow, where it is one.
    pub fn flow(&self) -> Option<Key> {
        match self {
            Arrived::Flow(key) => Some(*key),
            Arrived::Resting => None,
        }
    }
}

impl Datagrams<'_> {
    /// What is to go to the worker of a slot, or to any successor.
    pub fn leaving_for(&self, slot: Option<usize>) -> Vec<Key> {
        let all = self.flows.keys().into_iter();
        match slot {
            None => all.collect(),
            Some(slot) => all.filter(|key| self.slot_of(*key) == Some(slot)).collect(),
        }
    }

    /// The slot that a flow's datagrams come to.
    fn slot_of(&self, key: Key) -> Option<usize> {
        self.flows.get(key).and_then(|flow| self.slot_of_name(&flow.key()))
    }

    fn slot_of_name(&self, name: &FlowKey) -> Option<usize> {
        let listener = usize::from(name.listener);
        let bind = self.context.config.listeners[listener].bind.get(usize::from(name.address))?;
        // A group is divided by a filter and not steered.
        if bind.ip().is_multicast() { None } else { self.routes.get(listener)?.slot(name.client) }
    }

    /// Whether a client's new flow is to be opened by another slot's worker,
    /// as far as there is a way to tell it.
    pub(super) fn is_elsewhere(&self, name: &FlowKey) -> bool {
        !self.passages.is_empty() && self.passage_of(name).is_some()
    }

    fn passage_of(&self, name: &FlowKey) -> Option<&Passage> {
        let slot = self.slot_of_name(name)?;
        self.passages.iter().find(|passage| passage.slot == slot)
    }

    /// Clients' datagrams come to other slots from now on. Reads what came
    /// until now, and counts the flows of which nobody knows where theirs come.
    pub fn change_routes(&mut self, registry: &Registry, routes: &Routes, now: Millis) {
        let listeners = &self.context.config.listeners;
        let find =
            |name: &str| routes.iter().find(|(known, _)| known == name).map(|(_, route)| route.clone());
        // What is read now still belongs to the flows that are here.
        (self.routes, self.passages) = (Vec::new(), Vec::new());
        let routes: Vec<Route> =
            listeners.iter().map(|listener| find(&listener.name).unwrap_or(Route::Unknown)).collect();
        self.drain_fronts(registry, now);
        for (listener, route) in routes.iter().enumerate() {
            if *route == Route::Unknown && self.context.config.listeners[listener].mode == Mode::Udp {
                let active = self.context.counters.listener(listener, OfListener::Active).get();
                self.context.counters.flows(listener, OfFlows::Unsteered).add(active);
            }
        }
        self.routes = routes;
    }

    /// Reads every front to its end, or as far as is reasonable.
    pub fn drain_fronts(&mut self, registry: &Registry, now: Millis) {
        self.fronts.expect_all();
        for _ in 0..DRAIN_BUDGET {
            if !self.fronts.has_ready() {
                break;
            }
            (0..self.fronts.end()).for_each(|index| self.receive_from_clients(registry, index, now));
        }
    }

    /// What comes here for those slots is passed on.
    pub fn open_passages(&mut self, passages: Vec<Passage>) {
        self.passages = passages;
    }

    /// Nothing is passed on there any more.
    pub fn close_passage(&mut self, slot: usize) {
        self.passages.retain(|passage| passage.slot != slot);
    }

    /// Freezes a flow; `None` where it is gone, or on its way already.
    pub fn pack(&mut self, registry: &Registry, key: Key) -> Option<Record> {
        let state = self.flows.freeze(key)?;
        let flow = self.flows.get(key)?;
        let listener = &self.context.config.listeners[usize::from(flow.key().listener)];
        let server = match (listener.target, flow.server) {
            (Target::Upstream(_), NO_SERVER) | (Target::Service(_), _) => None,
            (Target::Upstream(_), GONE_SERVER) => Some(String::new()),
            (Target::Upstream(upstream), server) => {
                Some(self.context.place_name(&self.balancers[upstream], upstream, server as usize))
            }
        };
        let mut can_cut = true;
        if let Some(Some(uplink)) = self.uplinks.get_mut(key.index as usize) {
            // Closing alone would not end it: a duplicate will live on.
            let _ = registry.deregister(&mut SourceFd(&uplink.socket.as_raw_fd()));
            uplink.queued = false;
            can_cut = uplink.can_cut;
        }
        Some(Record::Flow(Flow {
            listener: listener.name.clone(),
            bind: *listener.bind.get(usize::from(flow.key().address))?,
            client: flow.key().client,
            local: flow.key().local,
            server,
            can_cut,
            state,
            story: self.flows.story(key, &flow),
        }))
    }

    /// The next port that rests, out of its rest.
    pub fn pack_resting(&mut self) -> Option<(Item, Record)> {
        let (listener, since, socket) = self.quarantine.take_any()?;
        self.quarantine_changed = true;
        let name = self.context.config.listeners[listener].name.clone();
        Some((Item::Resting { listener, since, socket }, Record::Resting { listener: name, since }))
    }

    /// The socket of something that is being sent.
    pub fn socket<'i>(&'i self, item: &'i Item) -> Option<BorrowedFd<'i>> {
        match item {
            Item::Flow(key) => {
                self.uplinks.get(key.index as usize)?.as_ref().map(|uplink| uplink.socket.as_fd())
            }
            Item::Resting { socket, .. } => Some(socket.as_fd()),
        }
    }

    /// The receiver has it: nothing of it is left here.
    pub fn forget(&mut self, item: Item) {
        let Item::Flow(key) = item else { return };
        if let Some(flow) = self.flows.end(key) {
            self.count_gone(key, &flow);
            if let Some(uplink) = self.uplinks.get_mut(key.index as usize) {
                *uplink = None;
            }
        }
    }

    /// The receiver has not: it goes on here.
    pub fn thaw(&mut self, registry: &Registry, item: Item, now: Millis) {
        match item {
            Item::Flow(key) => {
                self.flows.thaw(key, now);
                self.poll_flow(registry, key, now);
            }
            Item::Resting { listener, since, socket } => {
                drop(self.quarantine.adopt(listener, socket, since));
            }
        }
    }

    /// Takes something in; a flow lies still until `activate`. `None` where it
    /// has no place here.
    pub fn take(&mut self, record: Record, socket: Option<OwnedFd>, now: Millis) -> Option<Arrived> {
        match (record, socket) {
            (Record::Flow(flow), socket) => self.take_flow(&flow, socket, now).map(Arrived::Flow),
            (Record::Resting { listener, since }, Some(socket)) => {
                let known = &self.context.config.listeners;
                if let Some(at) = known.iter().position(|l| l.name == listener && l.mode == Mode::Udp) {
                    self.quarantine_changed = true;
                    drop(self.quarantine.adopt(at, socket, since.min(now)));
                }
                Some(Arrived::Resting)
            }
            (Record::Resting { .. }, None) => None,
        }
    }

    fn take_flow(&mut self, flow: &Flow, socket: Option<OwnedFd>, now: Millis) -> Option<Key> {
        let config = self.context.config;
        let is_it = |l: &crate::config::Listener| l.name == flow.listener && l.mode == Mode::Udp;
        let listener = config.listeners.iter().position(is_it)?;
        let address = config.listeners[listener].bind.iter().position(|bind| *bind == flow.bind)?;
        let server = match (config.listeners[listener].target, &flow.server) {
            (Target::Upstream(upstream), Some(name)) => {
                // A place may have got its address just now.
                self.balancers[upstream].refresh(&self.context.board, upstream);
                let at = self.context.place_named(&self.balancers[upstream], upstream, name);
                at.map_or(GONE_SERVER, |at| at as u32)
            }
            (Target::Service(_), None) => NO_SERVER,
            // What it leads to is of another kind now.
            (Target::Upstream(_), None) | (Target::Service(_), Some(_)) => return None,
        };
        let name = FlowKey {
            client: flow.client,
            local: flow.local,
            listener: listener as u16,
            address: address as u16,
        };
        let key = self.flows.adopt(name, server, &flow.state, now)?;
        self.begin_story(key, flow.story, now);
        let place = self.context.handle_taken(listener, flow.client.ip(), now);
        self.note_source(key, place);
        if let Some(socket) = socket {
            self.put_uplink(key, Uplink::taken_over(socket, flow.can_cut));
        }
        Some(key)
    }

    /// What was taken in is about to be acknowledged.
    pub fn count_taken(&self, key: Key) {
        let Some(flow) = self.flows.get(key) else { return };
        let (listener, server) = (usize::from(flow.key().listener), flow.server);
        let counters = &self.context.counters;
        counters.process(Process::Active).add(1);
        counters.listener(listener, OfListener::Active).add(1);
        counters.flows(listener, OfFlows::TakenOver).add(1);
        if let Some(number) = self.server_number(listener, server) {
            counters.server(number, OfServer::Active).add(1);
        }
    }

    /// Its sender knows that it is here.
    pub fn own(&mut self, key: Key) {
        self.flows.own(key);
    }

    /// Takes back what was taken in, for its sender will go on with it.
    pub fn untake(&mut self, key: Key) {
        if let Some(flow) = self.flows.get(key) {
            let listener = usize::from(flow.key().listener);
            let cell = self.context.counters.flows(listener, OfFlows::TakenOver);
            cell.set(cell.get().saturating_sub(1));
        }
        self.forget(Item::Flow(key));
    }

    /// Lets a flow that lay still go on. What waits in its socket brings an
    /// event by being registered.
    pub fn activate(&mut self, registry: &Registry, key: Key, now: Millis) {
        self.poll_flow(registry, key, now);
    }

    fn poll_flow(&mut self, registry: &Registry, key: Key, now: Millis) {
        if self.flows.get(key).is_none() {
            return;
        }
        if let Err(error) = self.poll_uplink(registry, key) {
            tracing::warn!(%error, "a flow that was handed over cannot be polled");
            self.end_flow(key, CloseReason::NoResources, now);
        }
    }

    /// Passes datagrams in the arena on to the worker that has their flow.
    pub(super) fn pass_on(&mut self, name: &FlowKey, first: usize, end: usize) {
        let listener = usize::from(name.listener);
        for at in first..end {
            let count = self.arena.get(at).count();
            match self.send_straggler(name, at) {
                Ok(()) => self.context.counters.flows(listener, OfFlows::PassedOn).add(count),
                Err(_) => self.drop_datagrams(listener, DropReason::Shed, count),
            }
        }
    }

    fn send_straggler(&self, name: &FlowKey, at: usize) -> io::Result<()> {
        let passage = self.passage_of(name).ok_or(io::ErrorKind::NotConnected)?;
        let listener = &self.context.config.listeners[usize::from(name.listener)];
        let received = self.arena.get(at);
        let bytes = shared::sealed("evenkeel-datagram", received.bytes)?;
        let straggler = Straggler {
            listener: listener.name.clone(),
            bind: listener.bind[usize::from(name.address)],
            client: name.client,
            local: name.local,
            segment: received.segment,
        };
        control::send(&passage.channel, &PeerMessage::Straggler(straggler), &[bytes.as_fd()])
    }

    /// A datagram that another worker got: the same as if it had come here.
    pub fn take_straggler(&mut self, registry: &Registry, straggler: &Straggler, bytes: &[u8], now: Millis) {
        let listeners = &self.context.config.listeners;
        let is_it = |l: &crate::config::Listener| l.name == straggler.listener && l.mode == Mode::Udp;
        let Some(listener) = listeners.iter().position(is_it) else { return };
        let Some(address) = listeners[listener].bind.iter().position(|bind| *bind == straggler.bind) else {
            return;
        };
        let port = straggler.bind.port();
        let name = FlowKey {
            client: straggler.client,
            local: straggler.local,
            listener: listener as u16,
            address: address as u16,
        };
        let step = straggler.segment.unwrap_or(bytes.len()).max(1);
        let pieces: Vec<&[u8]> = if bytes.is_empty() { vec![bytes] } else { bytes.chunks(step).collect() };
        for piece in pieces {
            let key = match self.flow_of(registry, name, now) {
                Ok(Some(key)) => key,
                Ok(None) => return self.drop_datagrams(listener, DropReason::Shed, 1),
                Err(reason) => return self.drop_datagrams(listener, reason, 1),
            };
            let Some(Some(uplink)) = self.uplinks.get(key.index as usize) else { return };
            let ends = Ends { source: name.client, destination: (name.local, port).into() };
            let header =
                self.sends_proxy_header(listener).then(|| Header::version_2(&ends, Transport::Datagram));
            let head = header.as_ref().map_or(&[][..], Header::as_bytes);
            if datagram::send(&uplink.socket, &[head, piece].concat()).is_err() {
                self.drop_datagrams(listener, DropReason::ToServer, 1);
            }
        }
    }

    /// Reads clients' datagrams no more, or again.
    pub fn hold(&mut self, held: bool) {
        self.fronts.hold(held);
    }

    /// Whether they are left unread.
    pub fn is_held(&self) -> bool {
        self.fronts.is_held()
    }
}
