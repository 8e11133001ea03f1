//! What a dead worker left, as parcels for a hand-over.
//!
//! First what is in doubt is decided: an acknowledgement that it was about to
//! give is given (again), and a bundle that was on its way is cut off, so that
//! each session is with one process. Then every session is computed
//! (`crate::keep`), and what else is in the table is closed. A connection that
//! no slot names was accepted a moment ago: it is as new to the next worker as
//! to this one.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use super::Born;
use super::doubts::{self, Doubts};
use crate::balance::Balancer;
use crate::config::{Mode, Target};
use crate::control::Kept;
use crate::counters::{OfListener, OfServer, Process};
use crate::flow::{self, GONE_SERVER, NO_SERVER};
use crate::handover::flows::{self, Record as FlowRecord};
use crate::handover::{ENOUGH_BYTES, Record};
use crate::keep::{self, Fate, Heir, Kernel, Names, Remains};
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::counts::{self, TcpCounts};
use crate::sys::exec;
use crate::sys::stream::Stream;
use crate::sys::table::{self, Kind};
use crate::worker::sessions::Context;

/// How long what was sent to a side that is about to be reset may take to be
/// acknowledged, in milliseconds.
const LINGER: Millis = 1_000;
/// How often that is looked at.
const LOOK_EVERY: Millis = 20;
/// Deaths at which the same session was being worked on.
const MOST_CRASHES: u8 = 2;

/// A parcel, for as long as it is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    Session(usize),
    Flow(usize),
}

/// Everything that was left.
pub struct Estate<'a> {
    context: Option<Context<'a>>,
    remains: Option<Remains>,
    sessions: Vec<Option<Parcel>>,
    flows: Vec<Option<FlowParcel>>,
    ending: Vec<Ending>,
    found: Kept,
    /// What another worker had taken already, and this one still counted: its
    /// listener, and its server's place among all.
    elsewhere: Vec<(usize, Option<usize>)>,
    /// The receiver settles the gauges.
    shares: bool,
    is_begun: bool,
}

struct Parcel {
    record: Record,
    kept: Vec<u8>,
    sockets: Vec<OwnedFd>,
    /// Its slot, which names it until it is somebody else's.
    session: Option<u32>,
    listener: usize,
    /// Its server's place among all.
    server: Option<usize>,
    is_in_use: bool,
}

struct FlowParcel {
    record: FlowRecord,
    socket: Option<OwnedFd>,
    listener: usize,
    server: Option<usize>,
}

/// Sockets that are reset when they have what was sent to them.
struct Ending {
    sockets: Vec<OwnedFd>,
    until: Millis,
}

impl<'a> Estate<'a> {
    /// Looks at everything. The worker is dead, and its table this process's
    /// alone.
    pub fn gather(born: &'a Born, channel: &Channel, memory: &OwnedFd, now: Millis) -> Estate<'a> {
        let context = born.context();
        let mut estate = Estate {
            context,
            remains: None,
            sessions: Vec::new(),
            flows: Vec::new(),
            ending: Vec::new(),
            found: Kept::default(),
            elsewhere: Vec::new(),
            shares: false,
            is_begun: false,
        };
        // Before anything is opened here.
        let numbers = table::list().unwrap_or_default();
        let own = HashSet::from([0, 1, 2, channel.as_fd().as_raw_fd(), memory.as_raw_fd()]);
        estate.remains = memory.try_clone().and_then(Remains::open).ok();
        let moved = estate.remains.as_ref().map(doubts::settle).unwrap_or_default();
        // Whoever waits at the other end of a channel hears now that nobody is
        // at this one.
        let is_way = |number: &RawFd| !own.contains(number) && table::kind(*number) == Kind::Packets;
        numbers.iter().filter(|number| is_way(number)).for_each(|number| exec::close(*number));
        let open = numbers.iter().copied().collect();
        estate.inherit(&open, &moved, now);
        estate.inherit_flows(&open, &moved, now);
        estate.adopt(&numbers, &own, now);
        estate
    }

    /// Every session that has a slot. A slot may name what its worker had just
    /// closed: a number that is none of these is nothing of its.
    fn inherit(&mut self, open: &HashSet<RawFd>, moved: &Doubts, now: Millis) {
        let take = |numbers: Vec<RawFd>| -> Vec<OwnedFd> {
            let open = numbers.into_iter().filter(|number| open.contains(number));
            open.filter_map(|number| table::take(number).ok()).collect()
        };
        let (Some(remains), Some(context)) = (self.remains.take(), self.context.take()) else { return };
        let balancers = context.balancers(now);
        let names = Known { context: &context, balancers: &balancers };
        let in_use = remains.in_use();
        let heirs: Vec<Heir> = remains.inherit(&Table, &names).collect();
        for heir in heirs {
            let slot = remains.slot(heir.session);
            if moved.is_elsewhere(&heir) {
                // A duplicate lives on there, so this ends nothing.
                drop(take(slot.iter().flat_map(|slot| [slot.client, slot.server]).flatten().collect()));
                if let Some(slot) = slot.filter(|_| !heir.is_arriving) {
                    let listener = usize::from(slot.listener);
                    let server = slot.place.and_then(|place| number_of(&context, listener, place));
                    self.elsewhere.push((listener, server));
                }
                remains.forget(heir.session);
                continue;
            }
            match heir.fate {
                Fate::Send { record, kept, sockets, useless } => {
                    drop(take(useless.into_iter().collect()));
                    let sockets = take(sockets);
                    let listener = slot.as_ref().map_or(0, |slot| usize::from(slot.listener));
                    let place = slot.as_ref().and_then(|slot| slot.place);
                    let server = record.server.as_ref().and(place);
                    let server = server.and_then(|place| number_of(&context, listener, place));
                    self.found.sessions += 1;
                    self.found.bytes += kept.len() as u64;
                    self.sessions.push(Some(Parcel {
                        record: *record,
                        kept,
                        sockets,
                        session: Some(heir.session),
                        listener,
                        server,
                        is_in_use: in_use.contains(&heir.session),
                    }));
                }
                Fate::Close { sockets, reset, owed, is_disagreement, .. } => {
                    let owned = take(sockets);
                    self.found.self_check_resets += u64::from(is_disagreement);
                    self.found.lost += u64::from(reset && !is_disagreement);
                    if let Some((to, bytes)) = owed {
                        send_to(&owned, to, &bytes);
                    }
                    self.end(owned, reset, now);
                    remains.forget(heir.session);
                }
            }
        }
        (self.remains, self.context) = (Some(remains), Some(context));
    }

    /// Every flow that has a place.
    fn inherit_flows(&mut self, open: &HashSet<RawFd>, moved: &Doubts, now: Millis) {
        let Estate {
            remains: Some(remains), context: Some(context), flows: parcels, found, elsewhere, ..
        } = self
        else {
            return;
        };
        let memory = remains.flows().filter(|number| open.contains(number));
        let memory = memory.and_then(|number| table::with(number, |fd| fd.try_clone_to_owned()).ok());
        let Some(flows) = memory.and_then(|memory| flow::Remains::open(memory).ok()) else { return };
        let balancers = context.balancers(now);
        let names = Known { context, balancers: &balancers };
        for heir in flows.flows() {
            let socket = heir.socket.filter(|number| open.contains(number));
            let socket = socket.and_then(|number| table::take(number).ok());
            let listener = usize::from(heir.key.listener);
            let server = (heir.server < GONE_SERVER).then_some(heir.server);
            let server = server.and_then(|place| number_of(context, listener, place));
            if moved.moved.contains(&keep::Item::Flow(heir.index)) {
                elsewhere.push((listener, server));
                continue;
            }
            if heir.is_arriving && moved.arrivals_are_theirs {
                continue;
            }
            let record = names.flow(&heir);
            // One whose socket was not there yet begins anew with its client's
            // next datagram.
            let record = record.filter(|record| (record.server.is_some()) == socket.is_some());
            if let Some(record) = record {
                found.flows += 1;
                let record = FlowRecord::Flow(record);
                parcels.push(Some(FlowParcel { record, socket, listener, server }));
            }
        }
    }

    /// What no slot names.
    fn adopt(&mut self, numbers: &[RawFd], own: &HashSet<RawFd>, now: Millis) {
        let sessions = self.sessions.iter().flatten().flat_map(|parcel| &parcel.sockets);
        let flows = self.flows.iter().flatten().filter_map(|flow| flow.socket.as_ref());
        let named: HashSet<RawFd> = sessions.chain(flows).map(AsRawFd::as_raw_fd).collect();
        let ending: HashSet<RawFd> =
            self.ending.iter().flat_map(|ending| &ending.sockets).map(AsRawFd::as_raw_fd).collect();
        let is_receiving = self.remains.as_ref().is_none_or(Remains::is_receiving);
        for number in numbers {
            if own.contains(number) || named.contains(number) || ending.contains(number) {
                continue;
            }
            let Ok(socket) = table::take(*number) else { continue };
            // Of what was just received the sender has it still.
            if table::kind(*number) != Kind::Connection || is_receiving {
                continue;
            }
            match self.listener_of(&socket) {
                Some(listener) if is_untouched(&socket) => self.adopt_one(listener, socket, now),
                // One of a client that was on its way out, in the worst case.
                Some(_) => {
                    self.found.lost += 1;
                    reset([&socket]);
                }
                // Towards a server, and not yet anybody's.
                None => reset([&socket]),
            }
        }
    }

    fn adopt_one(&mut self, listener: usize, socket: OwnedFd, now: Millis) {
        let Some(context) = &self.context else { return };
        let known = Known { context, balancers: &[] };
        let Some(listener_known) = known.listener(listener as u16) else { return };
        self.found.adopted += 1;
        let record = keep::adopt(&listener_known, now);
        let sockets = vec![socket];
        let parcel = Parcel {
            record,
            kept: Vec::new(),
            sockets,
            session: None,
            listener,
            server: None,
            is_in_use: false,
        };
        self.sessions.push(Some(parcel));
    }

    /// Where a client's connection came in.
    fn listener_of(&self, socket: &OwnedFd) -> Option<usize> {
        let local: SocketAddr = socket2::SockRef::from(socket).local_addr().ok()?.as_socket()?;
        let is_its = |bind: &SocketAddr| {
            let any = bind.ip().is_unspecified() && bind.is_ipv4() == local.is_ipv4();
            bind.port() == local.port() && (any || bind.ip() == local.ip())
        };
        let listeners = self.context.as_ref()?.config.listeners.iter();
        listeners.enumerate().find_map(|(index, listener)| {
            (listener.mode == Mode::Tcp && listener.bind.iter().any(is_its)).then_some(index)
        })
    }

    fn end(&mut self, sockets: Vec<OwnedFd>, by_reset: bool, now: Millis) {
        if by_reset {
            reset(&sockets);
            if has_unsent(&sockets) {
                self.ending.push(Ending { sockets, until: now + LINGER });
            }
        }
    }

    /// When `end_what_is_over` is to be called.
    pub fn next_deadline(&self) -> Option<Millis> {
        let until = self.ending.iter().map(|ending| ending.until).max()?;
        Some(until.saturating_sub(LINGER) + LOOK_EVERY).map(|at| at.min(until))
    }

    /// Resets what has what was sent to it.
    pub fn end_what_is_over(&mut self, now: Millis) {
        self.ending.retain(|ending| ending.until > now && has_unsent(&ending.sockets));
    }

    /// Somebody is to have it all; what was found.
    pub fn begin_passing(&mut self, shares: bool, fault: bool) -> Kept {
        self.shares = shares;
        for (listener, server) in std::mem::take(&mut self.elsewhere) {
            self.take_from_gauges(listener, server);
        }
        if fault && !self.is_begun {
            for at in 0..self.sessions.len() {
                self.note_crash(at);
            }
        }
        self.is_begun = true;
        self.found.clone()
    }

    /// A session that was being worked on when its worker died by its own
    /// doing: once that may be chance.
    fn note_crash(&mut self, at: usize) {
        let Some(parcel) = self.sessions[at].as_mut().filter(|parcel| parcel.is_in_use) else { return };
        parcel.record.crashes = parcel.record.crashes.saturating_add(1);
        if parcel.record.crashes < MOST_CRASHES {
            return;
        }
        let told = parcel.record.origin.map(|ends| ends.source);
        let client = parcel
            .sockets
            .first()
            .and_then(|socket| socket2::SockRef::from(socket).peer_addr().ok()?.as_socket());
        let client = told.or(client).map_or("a client".to_string(), |client| client.to_string());
        self.found.sessions -= 1;
        self.found.complaints.push(format!(
            "listener {}: the session of {client} was being worked on at two crashes: reset",
            parcel.record.listener
        ));
        self.refuse(Number::Session(at));
    }

    /// The next sessions with what is kept of them, in a bundle's order.
    pub fn next_sessions(&self, most: usize) -> (Vec<Number>, Vec<(Record, Vec<u8>)>) {
        let (mut numbers, mut parcels, mut kept) = (Vec::new(), Vec::new(), 0);
        for (at, parcel) in self.sessions.iter().enumerate() {
            let Some(parcel) = parcel else { continue };
            if numbers.len() == most || kept >= ENOUGH_BYTES {
                break;
            }
            kept += parcel.kept.len();
            numbers.push(Number::Session(at));
            parcels.push((parcel.record.clone(), parcel.kept.clone()));
        }
        (numbers, parcels)
    }

    /// The same of flows.
    pub fn next_flows(&self, most: usize) -> (Vec<Number>, Vec<FlowRecord>) {
        let flows = self.flows.iter().enumerate();
        let flows = flows.filter_map(|(at, flow)| Some((Number::Flow(at), flow.as_ref()?.record.clone())));
        flows.take(most).unzip()
    }

    /// The sockets of a parcel, in the bundle's order.
    pub fn sockets(&self, number: Number) -> Vec<BorrowedFd<'_>> {
        match number {
            Number::Session(at) => {
                self.sessions[at].iter().flat_map(|parcel| &parcel.sockets).map(AsFd::as_fd).collect()
            }
            Number::Flow(at) => {
                self.flows[at].iter().filter_map(|flow| flow.socket.as_ref()).map(AsFd::as_fd).collect()
            }
        }
    }

    /// The receiver has it; whether it was still here.
    pub fn forget(&mut self, number: Number) -> bool {
        match number {
            Number::Session(at) => {
                let Some(parcel) = self.sessions[at].take() else { return false };
                self.count_gone(&parcel);
                true
            }
            Number::Flow(at) => {
                let Some(parcel) = self.flows[at].take() else { return false };
                self.take_from_gauges(parcel.listener, parcel.server);
                true
            }
        }
    }

    /// The receiver has no place for it, and nobody else has.
    pub fn refuse(&mut self, number: Number) {
        match number {
            Number::Session(at) => {
                let Some(parcel) = self.sessions[at].take() else { return };
                reset(&parcel.sockets);
                self.found.lost += 1;
                if let (Some(remains), Some(session)) = (&self.remains, parcel.session) {
                    remains.forget(session);
                }
            }
            Number::Flow(at) => self.flows[at] = None,
        }
    }

    /// In counters that no living worker writes.
    fn count_gone(&self, parcel: &Parcel) {
        if let (Some(remains), Some(session)) = (&self.remains, parcel.session) {
            remains.forget(session);
        }
        // One that was only adopted was never counted.
        if parcel.session.is_some() {
            self.take_from_gauges(parcel.listener, parcel.server);
        }
    }

    fn take_from_gauges(&self, listener: usize, server: Option<usize>) {
        let Some(context) = self.context.as_ref().filter(|_| !self.shares) else { return };
        let counters = &context.counters;
        counters.process(Process::Active).take_one();
        counters.listener(listener, OfListener::Active).take_one();
        if let Some(server) = server {
            counters.server(server, OfServer::Active).take_one();
        }
    }

    /// How many could still go.
    pub fn left(&self) -> usize {
        self.sessions.iter().flatten().count() + self.flows.iter().flatten().count()
    }

    /// Whether nothing is left at all.
    pub fn is_empty(&self) -> bool {
        self.left() == 0 && self.ending.is_empty()
    }

    /// Nobody takes it: it ends by a reset.
    pub fn give_up(&mut self) {
        (0..self.sessions.len()).for_each(|at| self.refuse(Number::Session(at)));
        self.flows.clear();
    }
}

/// The kernel, asked by numbers of a table that is this process's alone.
struct Table;

impl Kernel for Table {
    fn counts(&self, socket: RawFd) -> io::Result<TcpCounts> {
        table::with(socket, |socket| counts::of_tcp(socket))
    }
    fn piped(&self, pipe: RawFd) -> io::Result<usize> {
        table::with(pipe, |pipe| counts::of_pipe(pipe))
    }
    fn take(&self, pipe: RawFd, into: &mut [u8]) -> io::Result<usize> {
        table::with(pipe, |pipe| Ok(nix::unistd::read(pipe, into)?))
    }
    fn peer(&self, socket: RawFd) -> Option<SocketAddr> {
        table::with(socket, |socket| socket2::SockRef::from(&socket).peer_addr()).ok()?.as_socket()
    }
}

/// The names of things, by the configuration of the worker.
struct Known<'c, 'a> {
    context: &'c Context<'a>,
    balancers: &'c [Balancer],
}

impl Known<'_, '_> {
    /// A flow as a living worker packs it.
    fn flow(&self, heir: &flow::Heir) -> Option<flows::Flow> {
        let listener = self.context.config.listeners.get(usize::from(heir.key.listener))?;
        let server = match (listener.target, heir.server) {
            (Target::Upstream(_), NO_SERVER) | (Target::Service(_), _) => None,
            (Target::Upstream(_), GONE_SERVER) => Some(String::new()),
            (Target::Upstream(_), place) => Some(self.server(heir.key.listener, place)),
        };
        Some(flows::Flow {
            listener: listener.name.clone(),
            bind: *listener.bind.get(usize::from(heir.key.address))?,
            client: heir.key.client,
            local: heir.key.local,
            server,
            can_cut: heir.can_cut,
            state: heir.state,
            story: heir.story,
        })
    }
}

impl Names for Known<'_, '_> {
    fn listener(&self, number: u16) -> Option<keep::Listener<'_>> {
        let listener = self.context.config.listeners.get(usize::from(number))?;
        let service = match listener.target {
            Target::Upstream(_) => None,
            Target::Service(service) => Some(service),
        };
        Some(keep::Listener { name: &listener.name, service })
    }

    fn server(&self, listener: u16, place: u32) -> String {
        match self.context.config.listeners[usize::from(listener)].target {
            Target::Upstream(upstream) => match self.balancers.get(upstream) {
                Some(balancer) => self.context.place_name(balancer, upstream, place as usize),
                None => String::new(),
            },
            Target::Service(_) => String::new(),
        }
    }
}

fn number_of(context: &Context, listener: usize, place: u32) -> Option<usize> {
    match context.config.listeners.get(listener)?.target {
        Target::Upstream(upstream) => Some(context.layout.place(upstream, place as usize)),
        Target::Service(_) => None,
    }
}

/// Whether nothing was read from a connection or written to it.
fn is_untouched(socket: &OwnedFd) -> bool {
    counts::of_tcp(socket).is_ok_and(|counts| counts.consumed() == 0 && counts.written(false) == 0)
}

/// What is owed, as far as it goes at once; the rest ends with the session.
fn send_to(sockets: &[OwnedFd], to: RawFd, bytes: &[u8]) {
    let Some(socket) = sockets.iter().find(|socket| socket.as_raw_fd() == to) else { return };
    let Ok(stream) = socket.try_clone().map(Stream::from) else { return };
    let mut rest = bytes;
    while !rest.is_empty() {
        match stream.send(rest) {
            Ok(count) => rest = &rest[count..],
            Err(_) => return,
        }
    }
}

fn has_unsent(sockets: &[OwnedFd]) -> bool {
    let unacked = |socket: &OwnedFd| counts::of_tcp(socket).is_ok_and(|counts| counts.unacked > 0);
    sockets.iter().any(unacked)
}

/// They end by a reset when they are closed.
fn reset<'s>(sockets: impl IntoIterator<Item = &'s OwnedFd>) {
    for socket in sockets {
        let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
    }
}

/// The same for every connection in the table.
pub fn reset_all() {
    for number in table::list().unwrap_or_default() {
        if table::kind(number) == Kind::Connection
            && let Ok(socket) = table::take(number)
        {
            reset([&socket]);
        }
    }
}
