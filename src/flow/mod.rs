//! The UDP flows of a worker: who is known, who may come, who has to go.
//!
//! ```text
//!             +--> Drop (full of answered flows, leaving)
//!   datagram -+--> Open --> unanswered --reply--> answered --idle, replies--> over
//!             |                 |  ^                  |
//!             |                 |  +-- server fails --+   (Move at the next datagram)
//!             +--> Known        +--evicted, idle--> over
//! ```
//!
//! A flow is one client at one address of one listener, named by the client's
//! address and the local address that it asked. Owned by a worker; holds no
//! socket, reads no clock. Bounded for each listener and in all: past the
//! bound the flow that has waited longest for its first answer makes room for
//! the new one, and where all were answered the new one is dropped, which
//! allocates nothing. So a flood of made-up sources pushes out only itself.

mod index;
mod moving;
mod name;
mod quarantine;
mod table;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use crate::deadline::Deadlines;
use crate::slab::Key;
use index::Index;
use name::Name;
use table::Table;

pub use moving::Snapshot;
pub use quarantine::Quarantine;
pub use table::{Heir, Remains};

/// Whose datagrams a flow takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Where the client sends from.
    pub client: SocketAddr,
    /// The address of ours that it asked; replies leave from there.
    pub local: IpAddr,
    /// The listener's number.
    pub listener: u16,
    /// The number of the address in its `bind`.
    pub address: u16,
}

/// The server of a flow that a worker answers by itself.
pub const NO_SERVER: u32 = u32::MAX;
/// The server of a flow that came from another configuration, which this one
/// does not have: what it still sends is passed on, and the client's next
/// datagram goes to another.
pub const GONE_SERVER: u32 = u32::MAX - 1;
const NONE: u32 = u32::MAX;

/// One flow: plain data.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    name: Name,
    /// The server's number in its upstream, or `NO_SERVER`, or `GONE_SERVER`.
    pub server: u32,
    /// Its socket's number, for whoever finds this when the worker is dead.
    socket: Option<i32>,
    can_cut: bool,
    /// The server failed; the next datagram goes to another.
    failed: bool,
    /// It is on its way to another process, and nothing of it moves here.
    frozen: bool,
    /// It came from another process, which has it still.
    arriving: bool,
    /// The access log will say something of it.
    has_story: bool,
    answered: bool,
    /// A client's datagram came after the last reply.
    awaits: bool,
    requests: u32,
    replies: u32,
    last: u64,
    /// Neighbours in the list of the unanswered.
    older: u32,
    newer: u32,
}

/// What the access log says of a flow beside its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Story {
    /// When it began, in milliseconds of the monotonic clock.
    pub born: u64,
    /// Bytes from the client that went to its server.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
}

/// What a listener allows its flows, times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Silence that ends a flow.
    pub idle_timeout: u64,
    /// Replies that end a flow which has no more questions than replies; 0 =
    /// any number.
    pub replies: u32,
    /// Flows at once.
    pub max_flows: u32,
    /// Its flows go to an upstream, and count towards the bound in all.
    pub has_sockets: bool,
}

/// What to do with a client's datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It belongs to this flow.
    Known(Key),
    /// It belongs to this flow, whose server has failed.
    Move(Key),
    /// It belongs to a flow that is on its way to another process.
    Frozen(Key),
    /// It begins a flow; first end that one, where one is named.
    #[allow(missing_docs)]
    Open { evict: Option<Key> },
    /// Nothing.
    Drop(DropReason),
}

/// What to do after a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Pass it on.
    Pass,
    /// Pass it on, and end the flow.
    Last,
    /// The flow is over: nobody is to get it.
    Drop,
}

/// Why a datagram was dropped: the list that counters and documents share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// The table, the local ports or the descriptors are full of flows that
    /// were answered.
    Shed,
    /// It would begin a flow while the worker leaves.
    Leaving,
    /// No server may be tried, or each refused.
    NoServer,
    /// It waited too long for a process to take up its socket.
    Stale,
    /// It was longer than the buffer.
    Truncated,
    /// It is too long for the way, with what is put in front of it.
    TooLong,
    /// The server's side would not take it.
    ToServer,
    /// The client's side would not take it.
    ToClient,
    /// A reply to a flow that had ended by then.
    Late,
    /// Its sender is not allowed, or denied, by the listener's `access`.
    Denied,
    /// It would begin a flow, and its sender has as many as it may.
    PerSource,
    /// It would begin a flow, and its sender began as many within a second as it may.
    RatePerSource,
    /// It would begin a flow, and the listener has as many as it may.
    MaxConnections,
    /// It would begin a flow, and no local port is left to connect from.
    NoPorts,
}

impl DropReason {
    /// All of them, in the order of the counters.
    pub const ALL: [DropReason; 14] = [
        DropReason::Shed,
        DropReason::Leaving,
        DropReason::NoServer,
        DropReason::Stale,
        DropReason::Truncated,
        DropReason::TooLong,
        DropReason::ToServer,
        DropReason::ToClient,
        DropReason::Late,
        DropReason::Denied,
        DropReason::PerSource,
        DropReason::RatePerSource,
        DropReason::MaxConnections,
        DropReason::NoPorts,
    ];

    /// Its name in `status` and metrics.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::Shed => "shed",
            DropReason::Leaving => "leaving",
            DropReason::NoServer => "no_server",
            DropReason::Stale => "stale",
            DropReason::Truncated => "truncated",
            DropReason::TooLong => "too_long",
            DropReason::ToServer => "to_server",
            DropReason::ToClient => "to_client",
            DropReason::Late => "late",
            DropReason::Denied => "denied",
            DropReason::PerSource => "per_source",
            DropReason::RatePerSource => "rate_per_source",
            DropReason::MaxConnections => "max_connections",
            DropReason::NoPorts => "no_ports",
        }
    }
}

/// All flows of a worker.
#[derive(Debug)]
pub struct Flows {
    table: Table,
    index: Index,
    deadlines: Deadlines,
    books: Vec<Book>,
    /// Flows with a socket, over all listeners, and their bound.
    socket_count: u32,
    socket_limit: u32,
    leaving: bool,
}

/// One listener's flows.
#[derive(Debug)]
struct Book {
    limits: Limits,
    count: u32,
    /// The ends of the list of the unanswered.
    oldest: u32,
    newest: u32,
}

impl Flows {
    /// No flows. `seed` keeps outsiders from choosing what meets in the
    /// index; `socket_limit` bounds the flows with sockets over all listeners.
    pub fn new(limits: Vec<Limits>, socket_limit: u32, seed: u64, now: u64) -> Flows {
        let book = |limits| Book { limits, count: 0, oldest: NONE, newest: NONE };
        let most =
            limits.iter().fold(socket_limit, |sum, limits: &Limits| sum.saturating_add(limits.max_flows));
        let most = if limits.is_empty() { 1 } else { most };
        Flows {
            table: Table::create(most).expect("a process may have the addresses of its flows"),
            index: Index::new(seed),
            deadlines: Deadlines::new(now),
            books: limits.into_iter().map(book).collect(),
            socket_count: 0,
            socket_limit,
            leaving: false,
        }
    }

    /// A datagram from a client.
    pub fn handle_client(&mut self, name: &FlowKey, now: u64) -> Arrival {
        if let Some(key) = self.find(name) {
            let arrival = self.table.change(key, |flow| {
                if flow.frozen {
                    return Arrival::Frozen(key);
                }
                flow.last = now;
                flow.requests = flow.requests.saturating_add(1);
                flow.awaits = true;
                if flow.failed { Arrival::Move(key) } else { Arrival::Known(key) }
            });
            return arrival.expect("the index names living flows");
        }
        if self.leaving {
            return Arrival::Drop(DropReason::Leaving);
        }
        let book = &self.books[usize::from(name.listener)];
        if book.count >= book.limits.max_flows {
            return self.make_room(book.oldest);
        }
        if book.limits.has_sockets && self.socket_count >= self.socket_limit {
            return self.make_room(self.oldest_unanswered_with_socket());
        }
        // Those that came from other processes count for no listener's bound.
        if self.table.is_full() {
            return Arrival::Drop(DropReason::Shed);
        }
        Arrival::Open { evict: None }
    }

    fn make_room(&self, oldest: u32) -> Arrival {
        match self.table.key_at(oldest) {
            Some(key) => Arrival::Open { evict: Some(key) },
            None => Arrival::Drop(DropReason::Shed),
        }
    }

    fn oldest_unanswered_with_socket(&self) -> u32 {
        let oldest = self.books.iter().filter(|book| book.limits.has_sockets && book.oldest != NONE);
        let since =
            |book: &&Book| self.table.key_at(book.oldest).and_then(|key| self.get(key)).map(|flow| flow.last);
        oldest.min_by_key(since).map_or(NONE, |book| book.oldest)
    }

    /// The flow to end where the system has no port or descriptor for a new
    /// one.
    pub fn evictable(&self) -> Option<Key> {
        self.table.key_at(self.oldest_unanswered_with_socket())
    }

    /// Opens the flow that `handle_client` spoke of; its first datagram counts.
    pub fn open(&mut self, name: FlowKey, server: u32, now: u64) -> Key {
        debug_assert!(self.find(&name).is_none(), "a flow is opened once");
        let key = self.table.insert(&Flow::begin(&name, server, now));
        let kept = Name::from(&name);
        self.index.insert(&kept, key.index, |index| self.table.name_at(index));
        let book = &mut self.books[usize::from(name.listener)];
        book.count += 1;
        self.socket_count += u32::from(book.limits.has_sockets);
        self.deadlines.set(key.index, now.saturating_add(book.limits.idle_timeout));
        self.link(key.index);
        key
    }

    /// A datagram from a flow's server.
    pub fn handle_reply(&mut self, key: Key, now: u64) -> Reply {
        let counted = self.table.change(key, |flow| {
            if flow.frozen {
                return None;
            }
            let before = *flow;
            flow.last = now;
            flow.awaits = false;
            flow.replies = flow.replies.saturating_add(1);
            flow.answered = true;
            Some((before, *flow))
        });
        let Some((before, flow)) = counted.flatten() else { return Reply::Drop };
        let enough = self.books[flow.name.listener()].limits.replies;
        // Not while a question is unanswered: a client may have asked several
        // before the first answer came.
        let last = enough > 0 && flow.replies >= enough.max(flow.requests);
        if !before.answered {
            self.unlink(key.index);
        }
        if last { Reply::Last } else { Reply::Pass }
    }

    /// A flow's server has failed: its next datagram is to go to another.
    /// False where that is known already.
    pub fn handle_failure(&mut self, key: Key) -> bool {
        self.table.change(key, |flow| !std::mem::replace(&mut flow.failed, true)).unwrap_or(false)
    }

    /// A flow has another server.
    pub fn handle_moved(&mut self, key: Key, server: u32) {
        self.table.change(key, |flow| {
            flow.server = server;
            flow.failed = false;
        });
    }

    /// Ends a flow and tells what it was.
    pub fn end(&mut self, key: Key) -> Option<Flow> {
        let flow = self.table.get(key)?;
        if !flow.answered && !flow.frozen {
            self.unlink(key.index);
        }
        let name = flow.name;
        self.index.remove(&name, key.index, |index| self.table.name_at(index));
        self.deadlines.clear(key.index);
        let book = &mut self.books[name.listener()];
        book.count -= 1;
        self.socket_count -= u32::from(book.limits.has_sockets);
        self.table.remove(key)
    }

    /// The flows that have been silent for too long; they still live.
    pub fn expire(&mut self, now: u64, due: &mut Vec<Key>, fired: &mut Vec<u32>) {
        self.deadlines.advance(now, fired);
        for index in fired.drain(..) {
            let Some(key) = self.table.key_at(index) else { continue };
            let flow = self.table.get(key).expect("the key is fresh");
            let end = flow.last.saturating_add(self.books[flow.name.listener()].limits.idle_timeout);
            // The deadline stood still while datagrams passed.
            if end <= now {
                due.push(key);
            } else {
                self.deadlines.set(index, end);
            }
        }
    }

    /// When `expire` is to be called at the latest.
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadlines.next()
    }

    /// Silence ends a flow after so many milliseconds at the latest, also the
    /// flows that there are.
    pub fn shorten_idle_timeout(&mut self, at_most: u64, now: u64) {
        for book in &mut self.books {
            book.limits.idle_timeout = book.limits.idle_timeout.min(at_most);
        }
        for key in self.table.keys() {
            let flow = self.table.get(key).expect("the key is fresh");
            if flow.frozen {
                continue;
            }
            let idle_timeout = self.books[flow.name.listener()].limits.idle_timeout;
            self.deadlines.set(key.index, flow.last.saturating_add(idle_timeout).max(now));
        }
    }

    /// No new flows from now on.
    pub fn begin_leave(&mut self) {
        self.leaving = true;
    }

    /// A living flow.
    pub fn get(&self, key: Key) -> Option<Flow> {
        self.table.get(key)
    }

    /// All living flows.
    pub fn keys(&self) -> Vec<Key> {
        self.table.keys()
    }

    /// How many live.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether none lives.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// How many with a socket live.
    pub fn socket_count(&self) -> u32 {
        self.socket_count
    }

    /// The bound of those.
    pub fn socket_limit(&self) -> u32 {
        self.socket_limit
    }

    fn find(&self, name: &FlowKey) -> Option<Key> {
        let name = Name::from(name);
        let index = self.index.find(&name, |index| self.table.name_at(index) == name)?;
        self.table.key_at(index)
    }

    /// Puts a flow at the young end of its listener's unanswered.
    fn link(&mut self, index: u32) {
        let key = self.table.key_at(index).expect("just inserted");
        let listener = self.table.name_at(index).listener();
        let older = std::mem::replace(&mut self.books[listener].newest, index);
        self.table.change(key, |flow| flow.older = older);
        match self.table.key_at(older) {
            Some(older) => drop(self.table.change(older, |flow| flow.newer = index)),
            None => self.books[listener].oldest = index,
        }
    }

    fn unlink(&mut self, index: u32) {
        let key = self.table.key_at(index).expect("the caller holds it");
        let unlinked = self.table.change(key, |flow| {
            let neighbours = (flow.older, flow.newer);
            (flow.older, flow.newer) = (NONE, NONE);
            neighbours
        });
        let (older, newer) = unlinked.expect("the key is fresh");
        let listener = self.table.name_at(index).listener();
        match self.table.key_at(older) {
            Some(older) => drop(self.table.change(older, |flow| flow.newer = newer)),
            None => self.books[listener].oldest = newer,
        }
        match self.table.key_at(newer) {
            Some(newer) => drop(self.table.change(newer, |flow| flow.older = older)),
            None => self.books[listener].newest = older,
        }
    }

    /// Notes a flow's socket, or before it is closed, that it has none.
    pub fn set_socket(&mut self, key: Key, socket: Option<i32>, can_cut: bool) {
        self.table.set_socket(key, socket, can_cut);
    }

    /// From here on a flow has a story.
    pub fn tell(&mut self, key: Key, story: Story) {
        self.table.tell(key, story);
    }

    /// More bytes of a flow, which count where it has a story.
    pub fn note_bytes(&mut self, key: Key, bytes_in: u64, bytes_out: u64) {
        self.table.note_bytes(key, bytes_in, bytes_out);
    }

    /// The story of a flow that lives, or that ended just now.
    pub fn story(&self, key: Key, flow: &Flow) -> Option<Story> {
        self.table.story_at(key.index, flow)
    }

    /// The other process knows that a flow is here.
    pub fn own(&mut self, key: Key) {
        self.table.change(key, |flow| flow.arriving = false);
    }

    /// The memory that outlives this process.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.table.memory()
    }
}

impl Flow {
    fn begin(name: &FlowKey, server: u32, now: u64) -> Flow {
        Flow {
            name: Name::from(name),
            server,
            socket: None,
            can_cut: true,
            failed: false,
            frozen: false,
            arriving: false,
            has_story: false,
            answered: false,
            awaits: true,
            requests: 1,
            replies: 0,
            last: now,
            older: NONE,
            newer: NONE,
        }
    }

    /// Its name.
    pub fn key(&self) -> FlowKey {
        self.name.into()
    }

    /// Whether a client's datagram came after the last reply.
    pub fn awaits_reply(&self) -> bool {
        self.awaits
    }

    /// Whether it is on its way to another process.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Whether its server may still send something that was asked for.
    pub fn has_replies_outstanding(&self) -> bool {
        self.server != NO_SERVER && (self.awaits || self.requests > self.replies)
    }
}
