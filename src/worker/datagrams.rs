//! The UDP side of a worker: sockets around `flow::Flows`.
//!
//! ```text
//!   clients --> front --(clients)--> flow's own socket --> server
//!   clients <-- front <--(servers)-- flow's own socket <-- server
//! ```
//!
//! A turn reads the fronts, then the flows that have something, each up to a
//! budget, in batches through one arena; nothing is allocated for a datagram
//! and no clock is read. Every flow has a connected socket of its own towards
//! its server, on a port that rests after use; never one on the listening
//! port, which would take it out of the kernel's group. Bounded by descriptors
//! and local ports (`Datagrams::new`); what ends it is the worker's leave,
//! which lets the flows go on until they are idle.

mod census;
mod clients;
mod fronts;
mod moving;
mod outlet;
mod servers;
mod story;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};

use mio::{Registry, Token};
use tracing::{info, warn};

use super::complaints::Complaints;
use super::departures::Departures;
use super::event_loop::SPECIAL;
use super::sessions::Context;
use crate::balance::Balancer;
use crate::config::{Config, Listener, Mode, Multicast, Service, Target};
use crate::control::Place;
use crate::counters::{OfFlows, OfListener, OfServer, Process};
use crate::flow::{DropReason, Flow, Flows, GONE_SERVER, Limits, Quarantine};
use crate::relay::CloseReason;
use crate::slab::Key;
use crate::sources::UNCOUNTED;
use crate::steering::Route;
use crate::sys::clock::Millis;
use crate::sys::datagram::{self, Arena};
use crate::sys::local_end;
use fronts::{Front, Fronts};
pub use moving::{Arrived, Item, Passage};
use outlet::Outlet;
use servers::{Reply, Uplink};

/// Datagrams, or batches that the kernel has joined, in one receive.
const PLACES: usize = 64;
/// No UDP datagram is longer, headers included.
const PLACE_BYTES: usize = 1 << 16;
/// Receives that one front may have in one turn.
const FRONT_BUDGET: usize = 4;
/// How long a flow may be silent, in milliseconds, that could not be handed
/// over, for its client is served by another worker by now: as long as a resolver waits for an answer
/// (resolv.conf(5)). What a server goes on sending is passed on.
const LINGER: Millis = 5_000;
/// How often the kernel's own drops are looked at, in milliseconds.
const LOOK_EVERY: Millis = 250;

/// Tokens: a flow's has the bit below `SPECIAL`, a front's the next one.
const FLOW: usize = 1 << 62;
const FRONT: usize = 1 << 61;

/// Whether an event is one of ours.
pub fn is_token(token: Token) -> bool {
    token.0 & SPECIAL != 0 && token.0 & (FLOW | FRONT) != 0
}

fn front_token(index: usize) -> Token {
    Token(SPECIAL | FRONT | index)
}

fn flow_token(key: Key) -> Token {
    Token(SPECIAL | FLOW | (key.generation as usize) << 32 | key.index as usize)
}

/// All flows of a worker, and the sockets on both sides of them.
#[derive(Debug)]
pub struct Datagrams<'a> {
    context: Context<'a>,
    /// What polls all of its sockets.
    registry: Registry,
    fronts: Fronts,
    /// Its slot's worker died before it.
    recovers: bool,
    flows: Flows,
    /// Sockets towards servers, by the flow's place.
    uplinks: Vec<Option<Uplink>>,
    quarantine: Quarantine<OwnedFd>,
    /// Flows whose server has sent something.
    queue: Vec<Key>,
    spare_queue: Vec<Key>,
    balancers: Vec<Balancer>,
    /// Each upstream's epoch when the board was last looked at for flows.
    seen_epochs: Vec<u64>,
    /// What a listener with `service = "identify"` puts in front.
    identities: Vec<String>,
    arena: Arena,
    outlet: Outlet,
    /// Where each datagram of a batch from clients goes.
    targets: Vec<clients::Target>,
    /// Replies that lie in the arena.
    replies: Vec<Reply>,
    due: Vec<Key>,
    fired: Vec<u32>,
    look_at: Option<Millis>,
    offload_told: bool,
    quarantine_changed: bool,
    /// Where a flow's client is counted among the listener's sources, by the
    /// flow's place.
    source_places: Vec<u32>,
    complaints: Complaints,
    departures: Departures,
    /// Which slot each listener's clients come to, as far as that was said.
    routes: Vec<Route>,
    /// Ways to other slots' workers, while flows move there.
    passages: Vec<Passage>,
}

impl<'a> Datagrams<'a> {
    /// For so many descriptors that are left for flows.
    pub fn new(context: Context<'a>, registry: Registry, descriptors: usize, now: Millis) -> Datagrams<'a> {
        let config = context.config;
        let is_used = config.listeners.iter().any(|listener| listener.mode == Mode::Udp);
        let limit = socket_limit(config, descriptors, context.all.len());
        let limits: Vec<Limits> = config.listeners.iter().map(limits_of).collect();
        if context.slot == 0 {
            tell_clamped(config, limit);
        }
        let places = if is_used { PLACES } else { 0 };
        let seed = (u64::from(std::process::id()) << 32) ^ crate::sys::clock::precise_micros();
        let quarantine = config.listeners.iter().map(|listener| millis(listener.udp.quarantine));
        let departures = Departures::new(config.upstreams.len(), context.slot);
        let balancers = if is_used { context.balancers(now) } else { Vec::new() };
        Datagrams {
            seen_epochs: vec![0; balancers.len()],
            balancers,
            identities: config.listeners.iter().map(|listener| identity(&context, listener)).collect(),
            flows: Flows::new(limits, limit, seed, now),
            quarantine: Quarantine::new(quarantine),
            context,
            registry,
            fronts: Fronts::default(),
            recovers: false,
            uplinks: Vec::new(),
            queue: Vec::new(),
            spare_queue: Vec::new(),
            arena: Arena::new(places, PLACE_BYTES),
            outlet: Outlet::default(),
            targets: Vec::with_capacity(places),
            replies: Vec::with_capacity(places),
            due: Vec::new(),
            fired: Vec::new(),
            look_at: None,
            offload_told: false,
            quarantine_changed: false,
            source_places: Vec::new(),
            complaints: Complaints::default(),
            departures,
            routes: Vec::new(),
            passages: Vec::new(),
        }
    }

    /// Takes up the sockets of a worker that died.
    pub fn begin_recovery(&mut self) {
        self.recovers = true;
    }

    /// The memory of the flows, which outlives this process.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.flows.memory()
    }

    /// Whether a listening socket is to be polled here.
    pub fn takes(&self, place: Place) -> bool {
        self.context.config.listeners.get(place.listener).is_some_and(|l| l.mode == Mode::Udp)
    }

    /// Polls one more socket; `kept` = another process had it before.
    pub fn add(
        &mut self,
        registry: &Registry,
        place: Place,
        socket: OwnedFd,
        lent_by: Option<usize>,
        kept: bool,
    ) -> io::Result<()> {
        let listener = &self.context.config.listeners[place.listener];
        let is_group = listener.bind[place.address].ip().is_multicast();
        let front = Front {
            place,
            socket,
            lent_by,
            // What waited before it was registered may give no edge.
            ready: true,
            // While its flows are being handed over, it is one daemon that goes
            // on, and nothing that waited is stale: unless by a dead worker's
            // keeper, for then nobody has read meanwhile.
            take_up: kept && (self.recovers || !self.fronts.is_held()),
            can_cut: true,
            is_divided: is_group && listener.udp.multicast == Multicast::Partition,
        };
        self.fronts.add(registry, front, front_token)
    }

    /// Polls a neighbour's sockets no more.
    pub fn give_back(&mut self, registry: &Registry, slot: usize) {
        self.fronts.give_back(registry, slot);
    }

    /// An event at a front or at a flow's socket. A flow that is gone is no
    /// error: its events may come late.
    pub fn handle_event(&mut self, token: Token) {
        if token.0 & FLOW == 0 {
            self.fronts.handle_ready(token.0 & !(SPECIAL | FRONT));
        } else {
            let number = token.0 & !(SPECIAL | FLOW);
            self.enqueue(Key { index: number as u32, generation: (number >> 32) as u32 });
        }
    }

    fn enqueue(&mut self, key: Key) {
        if self.flows.get(key).is_some()
            && let Some(Some(uplink)) = self.uplinks.get_mut(key.index as usize)
            && !std::mem::replace(&mut uplink.queued, true)
        {
            self.queue.push(key);
        }
    }

    /// Whether a turn would move anything.
    pub fn has_work(&self) -> bool {
        !self.queue.is_empty() || self.fronts.has_ready()
    }

    /// Moves what has come, each socket up to its budget.
    pub fn turn(&mut self, registry: &Registry, now: Millis) {
        if !self.has_work() {
            return;
        }
        self.look_at.get_or_insert(now + LOOK_EVERY);
        for index in 0..self.fronts.end() {
            self.receive_from_clients(registry, index, now);
        }
        self.receive_from_servers(now);
    }

    /// When `handle_deadlines` is to be called at the latest.
    pub fn next_deadline(&self) -> Option<Millis> {
        [self.flows.next_deadline(), self.quarantine.next_release(), self.look_at].into_iter().flatten().min()
    }

    /// Ends flows that are idle, gives ports back, looks at the kernel's drops.
    pub fn handle_deadlines(&mut self, now: Millis) {
        let (mut due, mut fired) = (std::mem::take(&mut self.due), std::mem::take(&mut self.fired));
        self.flows.expire(now, &mut due, &mut fired);
        for key in due.drain(..) {
            self.end_flow(key, CloseReason::IdleTimeout, now);
        }
        (self.due, self.fired) = (due, fired);
        while self.quarantine.release(now).is_some() {
            self.quarantine_changed = true;
        }
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_at = None;
            self.publish_kernel_drops();
        }
        if std::mem::take(&mut self.quarantine_changed) {
            self.publish_quarantine();
        }
    }

    fn publish_quarantine(&self) {
        for listener in 0..self.context.config.listeners.len() {
            let count = self.quarantine.len_of(listener) as u64;
            self.context.counters.flows(listener, OfFlows::Quarantined).set(count);
        }
    }

    /// The sockets live as long as the slot, and so do the kernel's counts.
    fn publish_kernel_drops(&self) {
        let countable = |front: &&Front| front.lent_by.is_none() && !front.is_divided;
        for listener in 0..self.context.config.listeners.len() {
            let fronts = self.fronts.all().filter(|front| front.place.listener == listener);
            let drops = |front: &Front| u64::from(datagram::kernel_drops(&front.socket).unwrap_or(0));
            let sum: u64 = fronts.filter(countable).map(drops).sum();
            self.context.counters.flows(listener, OfFlows::KernelDrops).set(sum);
        }
    }

    /// Takes nothing new; the flows that there are go on.
    pub fn begin_leave(&mut self) {
        self.flows.begin_leave();
    }

    /// Another worker reads the sockets from now on.
    pub fn stop_receiving(&mut self, registry: &Registry) {
        self.fronts.stop(registry);
        self.begin_leave();
    }

    /// Flows that could not be handed over still bring their replies, until
    /// they are idle.
    pub fn linger(&mut self, now: Millis) {
        self.flows.shorten_idle_timeout(LINGER, now);
    }

    /// Flows that a leave waits for: those with a server. What the worker
    /// answers by itself, it can stop answering.
    pub fn len(&self) -> usize {
        self.flows.socket_count() as usize
    }

    /// Ends every flow that is left.
    pub fn close_all(&mut self, reason: CloseReason, now: Millis) {
        for key in self.flows.keys() {
            self.end_flow(key, reason, now);
        }
    }

    /// Ends a flow; its port rests where a reply may still come.
    fn end_flow(&mut self, key: Key, reason: CloseReason, now: Millis) {
        if let Some((listener, Some(socket))) = self.remove_flow(key, reason) {
            self.rest(listener, socket, now);
        }
    }

    /// Ends a flow and answers its listener, and its socket where a reply may
    /// still come.
    fn remove_flow(&mut self, key: Key, reason: CloseReason) -> Option<(usize, Option<OwnedFd>)> {
        let flow = self.flows.end(key)?;
        let listener = usize::from(flow.key().listener);
        self.count_gone(key, &flow);
        self.log_end(key, &flow, reason);
        self.context.counters.ended(listener, reason).add(1);
        let uplink = self.uplinks.get_mut(key.index as usize).and_then(Option::take);
        let socket = uplink.filter(|_| flow.has_replies_outstanding()).map(|uplink| uplink.socket);
        Some((listener, socket))
    }

    /// It is not here any more.
    fn count_gone(&mut self, key: Key, flow: &Flow) {
        let listener = usize::from(flow.key().listener);
        if let Some(place) = self.source_places.get_mut(key.index as usize) {
            self.context.handle_left(listener, std::mem::replace(place, UNCOUNTED));
        }
        let counters = &self.context.counters;
        counters.process(Process::Active).less_one();
        counters.listener(listener, OfListener::Active).less_one();
        if let Some(number) = self.server_number(listener, flow.server) {
            counters.server(number, OfServer::Active).less_one();
        }
    }

    /// A flow's server among all servers; `None` where it has none, or one
    /// that the configuration has no more.
    fn server_number(&self, listener: usize, server: u32) -> Option<usize> {
        match self.context.config.listeners[listener].target {
            Target::Upstream(upstream) if server < GONE_SERVER => {
                Some(self.context.layout.place(upstream, server as usize))
            }
            Target::Upstream(_) | Target::Service(_) => None,
        }
    }

    fn drop_datagrams(&self, listener: usize, reason: DropReason, count: u64) {
        self.context.counters.dropped(listener, reason).add(count);
    }

    /// Said once a worker; counted each time.
    fn note_offload_failure(&mut self, listener: usize) {
        self.context.counters.flows(listener, OfFlows::OffloadFailures).add(1);
        if !std::mem::replace(&mut self.offload_told, true) {
            let name = &self.context.config.listeners[listener].name;
            warn!(
                "listener {name}: the way cannot cut datagrams by itself (UDP_SEGMENT); they go one by one, \
                 further sockets are counted as offload_failures"
            );
        }
    }
}

/// Every flow takes a descriptor and a local port, and so does one that rests.
/// A tenth of the ports stays for the host's other programs. Each address that
/// all upstreams may leave from has as many ports of its own.
fn socket_limit(config: &Config, descriptors: usize, slots: usize) -> u32 {
    let upstream = |listener: &Listener| match listener.target {
        Target::Upstream(upstream) if listener.mode == Mode::Udp => Some(&config.upstreams[upstream]),
        _ => None,
    };
    let addresses = config.listeners.iter().filter_map(upstream).map(|upstream| {
        let of_family = |v4: bool| upstream.source.iter().filter(|address| address.is_ipv4() == v4).count();
        match upstream.transparent {
            // As many as there are clients: descriptors are the bound then.
            true => usize::MAX / (1 << 20),
            false => of_family(true).max(1).min(of_family(false).max(1)),
        }
    });
    let addresses = addresses.min().unwrap_or(1);
    let range = local_end::local_ports().unwrap_or((32_768, 60_999));
    let ports = usize::from(range.1.saturating_sub(range.0)) + 1;
    descriptors.min(addresses.saturating_mul(ports * 9 / 10) / slots.max(1)).clamp(1, u32::MAX as usize)
        as u32
}

fn tell_clamped(config: &Config, limit: u32) {
    for listener in &config.listeners {
        let has_sockets = matches!(listener.target, Target::Upstream(_));
        if listener.mode == Mode::Udp && has_sockets && listener.udp.max_flows > limit {
            info!(
                "listener {}: max_flows is {limit} a slot, not {}: each flow takes a descriptor and a local port \
                 (net.ipv4.ip_local_port_range), which all slots share",
                listener.name, listener.udp.max_flows
            );
        }
    }
}

fn limits_of(listener: &Listener) -> Limits {
    Limits {
        idle_timeout: millis(listener.udp.idle_timeout),
        replies: listener.udp.replies,
        max_flows: listener.udp.max_flows,
        has_sockets: matches!(listener.target, Target::Upstream(_)),
    }
}

fn identity(context: &Context, listener: &Listener) -> String {
    let Context { slot, generation, .. } = context;
    match listener.target {
        Target::Service(Service::Identify) => {
            let (name, pid) = (&listener.name, std::process::id());
            format!("evenkeel listener={name} slot={slot} pid={pid} generation={generation}\n")
        }
        Target::Service(Service::Echo | Service::Discard) | Target::Upstream(_) => String::new(),
    }
}

/// Whether a socket tells itself where replies leave from.
fn has_own_address(bind: SocketAddr) -> bool {
    !bind.ip().is_unspecified() && !bind.ip().is_multicast()
}

fn unspecified(like: SocketAddr) -> IpAddr {
    match like {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn millis(duration: std::time::Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 4).min(u64::MAX / 4)
}
