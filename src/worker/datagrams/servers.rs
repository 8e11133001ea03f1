//! Towards servers: a flow's own socket, from its opening to its rest, and
//! the replies that come back on it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use mio::Registry;
use mio::unix::SourceFd;

use super::outlet::Sent;
use super::{Datagrams, PLACES, flow_token, has_own_address};
use crate::balance::{Ask, Pick};
use crate::board::{Address, Health};
use crate::config::Target;
use crate::control::Place;
use crate::counters::{OfFlows, OfListener, OfServer, Process};
use crate::flow::{self, DropReason, FlowKey};
use crate::relay::CloseReason;
use crate::slab::Key;
use crate::sys::clock::Millis;
use crate::sys::datagram::{self, Outgoing};
use crate::sys::{filter, level};

/// Replies that one flow may bring in one receive. Where the arena has fewer
/// places left, what is in it goes out first.
const FLOW_BATCH: usize = 16;

/// A flow's own socket.
#[derive(Debug)]
pub(super) struct Uplink {
    pub(super) socket: OwnedFd,
    pub(super) can_cut: bool,
    pub(super) queued: bool,
    /// Read in batches, and what comes may be joined by the kernel; else one
    /// datagram a call, which is cheaper where there is but one.
    pub(super) in_batches: bool,
}

/// A reply that lies in the arena, and where it goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    at: usize,
    /// So much of it: a flow may end within a batch.
    length: usize,
    segment: Option<usize>,
    front: usize,
    listener: usize,
    client: SocketAddr,
    from: Option<IpAddr>,
}

impl Uplink {
    /// Around a new socket.
    pub(super) fn new(socket: OwnedFd) -> Uplink {
        Uplink { socket, can_cut: true, queued: false, in_batches: false }
    }

    /// Around one that came from another process.
    pub(super) fn taken_over(socket: OwnedFd, can_cut: bool) -> Uplink {
        let in_batches = datagram::joins_received(&socket);
        Uplink { socket, can_cut, queued: false, in_batches }
    }
}

/// Whether an error of a flow's socket says that its server does not answer
/// there; others are this host's own.
pub(super) fn is_servers_fault(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EHOSTDOWN | libc::ENETDOWN)
    )
}

/// Whether the host has no port, descriptor or memory for a socket.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        // Without a free port connect(2) says EAGAIN (net/ipv4/af_inet.c,
        // inet_autobind).
        Some(
            libc::EMFILE
                | libc::ENFILE
                | libc::ENOBUFS
                | libc::ENOMEM
                | libc::EAGAIN
                | libc::EADDRNOTAVAIL
                | libc::EADDRINUSE
        )
    )
}

/// Whether no local port was left, or none at the address to leave from.
fn is_out_of_ports(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EADDRNOTAVAIL | libc::EADDRINUSE))
}

impl Datagrams<'_> {
    /// Opens a flow to the next server that takes it.
    pub(super) fn open_flow(
        &mut self,
        registry: &Registry,
        name: FlowKey,
        now: Millis,
    ) -> Result<Key, DropReason> {
        let listener = usize::from(name.listener);
        let (server, socket) = self.connect_to_one(listener, name.client.ip(), None, now)?;
        let key = self.flows.open(name, server as u32, now);
        self.begin_story(key, None, now);
        self.count_opened(listener);
        self.count_source(key, &name, now);
        self.count_server(listener, server, OfServer::Connections);
        self.put_uplink(key, Uplink::new(socket));
        if self.poll_uplink(registry, key).is_err() {
            self.end_flow(key, CloseReason::NoResources, now);
            return Err(DropReason::Shed);
        }
        Ok(key)
    }

    /// Gives a flow whose server has failed to another, or, where there is no
    /// other, to the same again.
    pub(super) fn move_flow(&mut self, registry: &Registry, key: Key, now: Millis) -> Result<(), DropReason> {
        let Some(flow) = self.flows.get(key) else { return Err(DropReason::Shed) };
        let (name, old, outstanding) = (flow.key(), flow.server, flow.has_replies_outstanding());
        let listener = usize::from(name.listener);
        let Ok((server, socket)) = self.connect_to_one(listener, name.client.ip(), Some(old), now) else {
            self.flows.handle_moved(key, old);
            return Ok(());
        };
        // Ports may have run so short that this very flow had to go.
        if self.flows.get(key).is_none() {
            self.unreserve(listener, server);
            return Err(DropReason::Shed);
        }
        if let Some(number) = self.server_number(listener, old) {
            self.context.counters.server(number, OfServer::Active).less_one();
        }
        self.count_server(listener, server, OfServer::Connections);
        self.context.counters.flows(listener, OfFlows::Moved).add(1);
        self.flows.handle_moved(key, server as u32);
        if let Some(left) = self.put_uplink(key, Uplink::new(socket))
            && outstanding
        {
            self.rest(listener, left.socket, now);
        }
        if self.poll_uplink(registry, key).is_err() {
            self.end_flow(key, CloseReason::NoResources, now);
            return Err(DropReason::Shed);
        }
        Ok(())
    }

    /// The board may have changed: flows of servers that went down go to
    /// another with their next datagram.
    pub fn handle_board(&mut self) {
        for upstream in 0..self.seen_epochs.len() {
            let epoch = self.context.board.epoch(upstream);
            if self.seen_epochs[upstream] != epoch {
                self.seen_epochs[upstream] = epoch;
                self.balancers[upstream].refresh(&self.context.board, upstream);
                self.leave_down(upstream);
            }
        }
    }

    fn leave_down(&mut self, upstream: usize) {
        let places = self.balancers[upstream].places();
        let is_down = |place: u32| places.get(place as usize).is_some_and(|p| p.health == Health::Down);
        if !(0..places.len()).any(|place| is_down(place as u32)) {
            return;
        }
        for key in self.flows.keys() {
            let Some(flow) = self.flows.get(key) else { continue };
            let target = self.context.config.listeners[usize::from(flow.key().listener)].target;
            if target == Target::Upstream(upstream) && is_down(flow.server) {
                self.flows.handle_failure(key);
            }
        }
    }

    pub(super) fn put_uplink(&mut self, key: Key, uplink: Uplink) -> Option<Uplink> {
        let place = key.index as usize;
        if place >= self.uplinks.len() {
            self.uplinks.resize_with(place + 1, || None);
        }
        self.flows.set_socket(key, Some(uplink.socket.as_raw_fd()), uplink.can_cut);
        self.uplinks[place].replace(uplink)
    }

    /// Polls a flow's socket by its state: one call takes the answer that most
    /// questions have, and epoll itself looks whether another waits.
    pub(super) fn poll_uplink(&self, registry: &Registry, key: Key) -> io::Result<()> {
        let Some(Some(uplink)) = self.uplinks.get(key.index as usize) else { return Ok(()) };
        level::watch(registry, &uplink.socket, flow_token(key).0)
    }

    /// More than one datagram at a time has come, and more will: from here on
    /// they are read in batches.
    pub(super) fn begin_batches(&mut self, key: Key) {
        let joins = self.fronts.joins();
        if let Some(Some(uplink)) = self.uplinks.get_mut(key.index as usize)
            && !std::mem::replace(&mut uplink.in_batches, true)
            && joins
        {
            datagram::join_received(&uplink.socket);
        }
    }

    pub(super) fn count_server(&self, listener: usize, server: usize, which: OfServer) {
        if let Target::Upstream(upstream) = self.context.config.listeners[listener].target {
            let number = self.context.layout.place(upstream, server);
            match which {
                OfServer::Failures => self.context.count_failure(number),
                OfServer::Connections | OfServer::Active | OfServer::ConnectTime | OfServer::Connects => {
                    self.context.counters.server(number, which).add(1);
                }
            }
        }
    }

    /// A place that was reserved is not used.
    fn unreserve(&self, listener: usize, server: usize) {
        if let Some(number) = self.server_number(listener, server as u32) {
            self.context.counters.server(number, OfServer::Active).less_one();
        }
    }

    /// A socket to a server that is not the one that failed, and a place
    /// there; others are tried while the host finds no way to them.
    fn connect_to_one(
        &mut self,
        listener: usize,
        client: IpAddr,
        failed: Option<u32>,
        now: Millis,
    ) -> Result<(usize, OwnedFd), DropReason> {
        let Target::Upstream(upstream) = self.context.config.listeners[listener].target else {
            return Err(DropReason::NoServer);
        };
        // Allocates nothing while it is empty.
        let mut tried: Vec<usize> = failed.into_iter().map(|server| server as usize).collect();
        let most = tried.len() + self.context.config.upstreams[upstream].retries as usize;
        while tried.len() <= most {
            let context = &self.context;
            let balancer = &mut self.balancers[upstream];
            balancer.refresh(&context.board, upstream);
            let picked = balancer.pick(&Ask {
                client,
                now,
                table: context.board.table(upstream),
                active: &|place| context.active_at(upstream, place),
                tried: &|place| tried.contains(&place),
            });
            let Pick::Place(server) = picked else { break };
            let most = self.balancers[upstream].places()[server].max_connections;
            if !self.context.reserve(upstream, server, most) {
                break;
            }
            let connected = self.connect_to(listener, upstream, server, client, now);
            if connected.is_err() {
                self.unreserve(listener, server);
            }
            match connected {
                Ok(socket) => return Ok((server, socket)),
                Err(error) if is_out_of_ports(&error) => return Err(DropReason::NoPorts),
                Err(error) if is_shortage(&error) => return Err(DropReason::Shed),
                Err(_) => {
                    self.count_server(listener, server, OfServer::Failures);
                    tried.push(server);
                }
            }
        }
        Err(DropReason::NoServer)
    }

    /// A socket to this server. Where the host has none left, one that rests
    /// is given up early, and then a flow that was never answered.
    fn connect_to(
        &mut self,
        listener: usize,
        upstream: usize,
        server: usize,
        client: IpAddr,
        now: Millis,
    ) -> io::Result<OwnedFd> {
        let Some(Address::Ip(address)) = self.balancers[upstream].places()[server].address else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        while self.quarantine.len() + self.len() >= self.flows.socket_limit() as usize {
            if !self.cut_quarantine(listener) {
                break;
            }
        }
        loop {
            let config = &self.context.config.upstreams[upstream];
            let connect = |from| datagram::connect(address, from);
            let (shortages, result) =
                self.departures.connect((upstream, config), client, address, now, connect);
            self.context.counters.process(Process::PortShortages).add(shortages);
            match result {
                Err(error) if is_shortage(&error) => {
                    if self.cut_quarantine(listener) {
                        continue;
                    }
                    let Some(key) = self.flows.evictable() else { return Err(error) };
                    // Its port is the one that is needed: it cannot rest.
                    self.remove_flow(key, CloseReason::Evicted);
                    self.context.counters.flows(listener, OfFlows::QuarantineCut).add(1);
                }
                result => return result,
            }
        }
    }

    /// Gives up the port that has rested the longest; false where none rests.
    fn cut_quarantine(&mut self, listener: usize) -> bool {
        let taken = self.quarantine.take_oldest().is_some();
        if taken {
            self.quarantine_changed = true;
            self.context.counters.flows(listener, OfFlows::QuarantineCut).add(1);
        }
        taken
    }

    /// Keeps a port from use for a while, deaf to what still comes.
    pub(super) fn rest(&mut self, listener: usize, socket: OwnedFd, now: Millis) {
        self.quarantine_changed = true;
        // An error that nobody takes would be told of without end.
        let _ = self.registry.deregister(&mut SourceFd(&socket.as_raw_fd()));
        // Without the filter it would fill its receive buffer for nothing.
        let _ = filter::take_nothing(&socket);
        let back = self.quarantine.put(listener, socket, now);
        drop(back);
        while self.quarantine.len() + self.len() > self.flows.socket_limit() as usize {
            if !self.cut_quarantine(listener) {
                break;
            }
        }
    }

    /// Takes in what the network said of a flow's server; whether it was that.
    pub(super) fn note_server_error(&mut self, key: Key, error: &io::Error) -> bool {
        if !is_servers_fault(error) {
            return false;
        }
        let Some(flow) = self.flows.get(key) else { return true };
        let (listener, server) = (usize::from(flow.key().listener), flow.server);
        if self.flows.handle_failure(key)
            && let Some(number) = self.server_number(listener, server)
        {
            self.context.counters.server(number, OfServer::Failures).add(1);
        }
        true
    }

    /// Reads every flow that has something once, and sends on what came.
    pub(super) fn receive_from_servers(&mut self, now: Millis) {
        let mut queue = std::mem::replace(&mut self.queue, std::mem::take(&mut self.spare_queue));
        let mut used = 0;
        for key in queue.drain(..) {
            if PLACES - used < FLOW_BATCH {
                self.send_replies();
                used = 0;
            }
            let Some(flow) = self.flows.get(key) else { continue };
            let Some(Some(uplink)) = self.uplinks.get_mut(key.index as usize) else { continue };
            // Also of one that is skipped: it may go on here after all.
            uplink.queued = false;
            // What waits for a frozen one is its next worker's.
            if flow.is_frozen() {
                continue;
            }
            let received = if uplink.in_batches {
                self.arena.receive_connected(&uplink.socket, used, FLOW_BATCH)
            } else {
                self.arena.receive_one(&uplink.socket, used).map(|()| 1)
            };
            match received {
                Ok(count) => {
                    (used..used + count).for_each(|at| self.handle_reply(key, at, now));
                    used += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Taken by that; what else there is, the next poll tells.
                Err(error) => {
                    self.note_server_error(key, &error);
                }
            }
        }
        self.send_replies();
        self.spare_queue = queue;
    }

    fn handle_reply(&mut self, key: Key, at: usize, now: Millis) {
        let received = self.arena.get(at);
        let (count, total, segment) = (received.count(), received.bytes.len(), received.segment);
        let is_truncated = received.truncated;
        let Some((name, is_awaited)) = self.flows.get(key).map(|flow| (flow.key(), flow.awaits_reply()))
        else {
            // The last reply of the flow was in this very batch.
            let front = self.replies.last().map_or(0, |reply| reply.listener);
            return self.drop_datagrams(front, DropReason::Late, count);
        };
        let listener = usize::from(name.listener);
        if is_truncated {
            return self.drop_datagrams(listener, DropReason::Truncated, 1);
        }
        if !is_awaited {
            self.begin_batches(key);
        }
        let mut passed = 0;
        let mut is_last = false;
        while passed < count && !is_last {
            is_last = self.flows.handle_reply(key, now) == flow::Reply::Last;
            passed += 1;
        }
        let place = Place { listener, address: usize::from(name.address) };
        let own_address = has_own_address(self.context.config.listeners[listener].bind[place.address]);
        if let Some(front) = self.fronts.own(place) {
            let from = Some(name.local).filter(|local| !own_address && !local.is_unspecified());
            let length = total.min(segment.unwrap_or(total).saturating_mul(passed as usize));
            self.replies.push(Reply { at, length, segment, front, listener, client: name.client, from });
            self.note_bytes(key, 0, length as u64);
        } else {
            self.drop_datagrams(listener, DropReason::ToClient, passed);
        }
        self.drop_datagrams(listener, DropReason::Late, count - passed);
        if is_last {
            self.end_flow(key, CloseReason::Finished, now);
        }
    }

    /// Sends all replies that lie in the arena, front by front.
    fn send_replies(&mut self) {
        let replies = std::mem::take(&mut self.replies);
        let mut first = 0;
        while first < replies.len() {
            let Reply { front: index, listener, .. } = replies[first];
            let run = replies[first..].iter().take_while(|reply| reply.front == index).count();
            let Self { arena, fronts, outlet, .. } = self;
            if let Some(front) = fronts.get_mut(index) {
                let items = replies[first..first + run].iter().map(|reply| Outgoing {
                    head: &[],
                    bytes: arena.bytes(reply.at, reply.length),
                    to: Some(reply.client),
                    from: reply.from,
                    segment: reply.segment,
                });
                let sent = outlet.send(&front.socket, &mut front.can_cut, items);
                self.count_sent_to_client(listener, &sent);
            }
            first += run;
        }
        self.replies = replies;
        self.replies.clear();
    }

    pub(super) fn count_sent_to_client(&mut self, listener: usize, sent: &Sent) {
        let counters = &self.context.counters;
        counters.flows(listener, OfFlows::DatagramsOut).add(sent.datagrams);
        counters.listener(listener, OfListener::BytesOut).add(sent.bytes);
        self.drop_datagrams(listener, DropReason::TooLong, sent.too_long);
        self.drop_datagrams(listener, DropReason::ToClient, sent.refused);
        if sent.offload_failed {
            self.note_offload_failure(listener);
        }
    }
}
