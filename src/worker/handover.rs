//! Live flows and sessions from one worker to another, over a channel of their
//! own.
//!
//! ```text
//!   sender:    pack, freeze --Flows--> wait --Taken--> forget, next bundle ... FlowsDone
//!              pack, freeze --Sessions--> wait --Taken--> forget, next bundle ... Done
//!                                           \--gone, or silent--> thaw all, keep them
//!   receiver:  decode, take --Taken--> activate
//! ```
//!
//! The sender keeps what it sends until the receiver has said that it has it;
//! the receiver moves no byte before it has said so. So a death on either side
//! at any moment leaves each session with at most one of them, whole. One
//! bundle is under way at a time. Flows go first: their clients' datagrams
//! wait unread at the receiver until then.

mod passing;
mod receiver;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::rc::Rc;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::warn;

use super::datagrams::{Datagrams, Item};
use super::sessions::{Parcel, Sessions};
use crate::control::{self, PeerMessage};
use crate::handover::{self, MAX_SESSIONS, flows};
use crate::slab::Key;
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::shared;

pub use passing::Passing;
pub use receiver::Receivers;

/// How long the receiver may take for one bundle, in milliseconds.
const PATIENCE: Millis = 5_000;
/// When a bundle is tried again for which the kernel had too many descriptors
/// under way (ETOOMANYREFS, unix(7)), in milliseconds.
const TRY_AGAIN: Millis = 5;

/// What a sender passes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// All there is.
    Everything,
    /// So many sessions.
    Sessions(usize),
    /// The flows whose datagrams come to this slot.
    FlowsOf(usize),
}

/// How a sender stands after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A bundle is under way, or may not go yet.
    Waiting,
    /// Everything that could travel has.
    #[allow(missing_docs)]
    Done { moved: usize },
    /// The receiver is gone or refuses; what it did not take is kept.
    #[allow(missing_docs)]
    Failed { moved: usize },
}

/// The bundle under way.
#[derive(Debug)]
enum Bundle {
    None,
    Flows(Vec<Item>),
    Sessions(Vec<Key>),
}

/// The sending side.
#[derive(Debug)]
pub struct Sender {
    channel: Rc<Channel>,
    load: Load,
    /// Flows that are still to go; `None` once all have.
    flows: Option<Vec<Key>>,
    bundle: Bundle,
    since: Millis,
    try_at: Option<Millis>,
    left: usize,
    moved: usize,
    refused: bool,
    flows_refused: usize,
}

/// What a sender takes from.
pub struct Cargo<'c, 's> {
    pub sessions: &'c mut Sessions<'s>,
    pub datagrams: &'c mut Datagrams<'s>,
    pub registry: &'c Registry,
    pub now: Millis,
}

impl Sender {
    /// Sends this; the flows are those that live now.
    pub fn new(
        channel: Channel,
        registry: &Registry,
        token: Token,
        load: Load,
        datagrams: &Datagrams,
    ) -> io::Result<Sender> {
        channel.set_nonblocking()?;
        registry.register(&mut SourceFd(&channel.as_fd().as_raw_fd()), token, Interest::READABLE)?;
        let (flows, left) = match load {
            Load::Everything => (Some(datagrams.leaving_for(None)), usize::MAX),
            Load::Sessions(count) => (None, count),
            Load::FlowsOf(slot) => (Some(datagrams.leaving_for(Some(slot))), 0),
        };
        Ok(Sender {
            channel: Rc::new(channel),
            load,
            flows,
            bundle: Bundle::None,
            since: 0,
            try_at: None,
            left,
            moved: 0,
            refused: false,
            flows_refused: 0,
        })
    }

    /// The way to the receiver.
    pub fn channel(&self) -> &Rc<Channel> {
        &self.channel
    }

    /// Flows that the receiver would not take, or that were not sent.
    pub fn flows_left(&self) -> usize {
        self.flows_refused + self.flows.as_ref().map_or(0, Vec::len)
    }

    /// Takes in what the receiver said, and sends on; sessions only where they
    /// may go.
    pub fn step(&mut self, cargo: &mut Cargo, sessions_may_go: bool) -> Progress {
        loop {
            if matches!(self.bundle, Bundle::None) {
                match self.next_bundle(cargo, sessions_may_go) {
                    Ok(true) => {}
                    Ok(false) => return Progress::Waiting,
                    Err(progress) => return progress,
                }
            }
            match control::receive::<PeerMessage>(&self.channel) {
                Ok(Some((PeerMessage::Taken { refused }, _))) => self.handle_taken(&refused, cargo),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if cargo.now.saturating_sub(self.since) > PATIENCE {
                        return self.fail("no answer", cargo);
                    }
                    return Progress::Waiting;
                }
                Ok(Some(_)) => return self.fail("an answer out of turn", cargo),
                Ok(None) => return self.fail("the receiver is gone", cargo),
                Err(error) => return self.fail(&error.to_string(), cargo),
            }
        }
    }

    /// Puts a bundle under way; false where none may go now, and an error
    /// where that was all.
    fn next_bundle(&mut self, cargo: &mut Cargo, sessions_may_go: bool) -> Result<bool, Progress> {
        if self.try_at.is_some_and(|at| at > cargo.now) {
            return Ok(false);
        }
        self.try_at = None;
        if self.flows.is_some() {
            if self.send_flows(cargo)? {
                return Ok(true);
            }
            if self.try_at.is_some() {
                return Ok(false);
            }
            self.flows = None;
            if let Err(error) = control::send(&self.channel, &PeerMessage::FlowsDone, &[]) {
                return Err(self.fail(&error.to_string(), cargo));
            }
        }
        if !sessions_may_go && self.left > 0 {
            return Ok(false);
        }
        self.send_sessions(cargo)
    }

    /// Sends the next flows; false where there are none, or where it is to be
    /// tried again.
    fn send_flows(&mut self, cargo: &mut Cargo) -> Result<bool, Progress> {
        let (mut items, mut records) = (Vec::new(), Vec::new());
        let waiting = self.flows.as_mut().expect("the caller looked");
        while items.len() < flows::MAX_RECORDS {
            let Some(key) = waiting.pop() else { break };
            if let Some(record) = cargo.datagrams.pack(cargo.registry, key) {
                items.push(Item::Flow(key));
                records.push(record);
            }
        }
        while items.len() < flows::MAX_RECORDS && self.load == Load::Everything {
            let Some((item, record)) = cargo.datagrams.pack_resting() else { break };
            items.push(item);
            records.push(record);
        }
        if items.is_empty() {
            return Ok(false);
        }
        let sent = shared::sealed("evenkeel-flows", &flows::encode(&records)).and_then(|bundle| {
            let sockets = items.iter().filter_map(|item| cargo.datagrams.socket(item));
            let fds: Vec<BorrowedFd> = std::iter::once(bundle.as_fd()).chain(sockets).collect();
            control::send(&self.channel, &PeerMessage::Flows { count: items.len() }, &fds)
        });
        self.since = cargo.now;
        match sent {
            Ok(()) => {
                self.bundle = Bundle::Flows(items);
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                self.try_at = Some(cargo.now + TRY_AGAIN);
                self.keep_flows(items, cargo);
                Ok(false)
            }
            Err(error) => {
                self.bundle = Bundle::Flows(items);
                Err(self.fail(&error.to_string(), cargo))
            }
        }
    }

    /// They stay here for now, and go with a later bundle.
    fn keep_flows(&mut self, items: Vec<Item>, cargo: &mut Cargo) {
        for item in items {
            if let (Item::Flow(key), Some(waiting)) = (&item, &mut self.flows) {
                waiting.push(*key);
            }
            cargo.datagrams.thaw(cargo.registry, item, cargo.now);
        }
    }

    fn send_sessions(&mut self, cargo: &mut Cargo) -> Result<bool, Progress> {
        let parcels = match self.left.min(MAX_SESSIONS) {
            0 => Vec::new(),
            count => cargo.sessions.pack(cargo.registry, count, cargo.now),
        };
        let keys: Vec<Key> = parcels.iter().map(|parcel| parcel.key).collect();
        if keys.is_empty() || self.refused {
            keys.into_iter().for_each(|key| cargo.sessions.thaw(cargo.registry, key, cargo.now));
            return Err(self.end(cargo.registry));
        }
        self.since = cargo.now;
        self.bundle = Bundle::Sessions(keys);
        match self.send(cargo.sessions, parcels) {
            Ok(()) => Ok(true),
            Err(error) => Err(self.fail(&error.to_string(), cargo)),
        }
    }

    /// When `step` is to be called at the latest; `None` where an event or the
    /// caller's leave to send sessions will come.
    pub fn next_deadline(&self, now: Millis, sessions_may_go: bool) -> Option<Millis> {
        match self.bundle {
            Bundle::None if self.try_at.is_some() => self.try_at,
            Bundle::None if self.flows.is_none() && self.left > 0 && !sessions_may_go => None,
            Bundle::None => Some(now),
            Bundle::Flows(_) | Bundle::Sessions(_) => Some(self.since + PATIENCE + 1),
        }
    }

    fn send(&self, sessions: &Sessions, parcels: Vec<Parcel>) -> io::Result<()> {
        let keys: Vec<Key> = parcels.iter().map(|parcel| parcel.key).collect();
        let records: Vec<_> = parcels.into_iter().map(|parcel| (parcel.record, parcel.kept)).collect();
        let bundle = shared::sealed("evenkeel-bundle", &handover::encode(&records))?;
        let sockets = keys.iter().flat_map(|&key| sessions.sockets(key));
        let fds: Vec<BorrowedFd> = std::iter::once(bundle.as_fd()).chain(sockets).collect();
        control::send(&self.channel, &PeerMessage::Sessions { count: keys.len() }, &fds)
    }

    fn handle_taken(&mut self, refused: &[usize], cargo: &mut Cargo) {
        match std::mem::replace(&mut self.bundle, Bundle::None) {
            Bundle::None => {}
            Bundle::Sessions(keys) => {
                for (index, key) in keys.into_iter().enumerate() {
                    if refused.contains(&index) {
                        self.refused = true;
                        cargo.sessions.thaw(cargo.registry, key, cargo.now);
                    } else {
                        cargo.sessions.forget(key);
                        self.moved += 1;
                        self.left -= 1;
                    }
                }
            }
            Bundle::Flows(items) => {
                for (index, item) in items.into_iter().enumerate() {
                    if refused.contains(&index) {
                        self.flows_refused += 1;
                        cargo.datagrams.thaw(cargo.registry, item, cargo.now);
                    } else {
                        self.moved += usize::from(matches!(item, Item::Flow(_)));
                        cargo.datagrams.forget(item);
                    }
                }
            }
        }
    }

    /// Gives the hand-over up; what was not acknowledged goes on here.
    pub fn fail(&mut self, why: &str, cargo: &mut Cargo) -> Progress {
        warn!("a hand-over stopped after {} sessions and flows: {why}", self.moved);
        match std::mem::replace(&mut self.bundle, Bundle::None) {
            Bundle::None => {}
            Bundle::Sessions(keys) => {
                keys.into_iter().for_each(|key| cargo.sessions.thaw(cargo.registry, key, cargo.now));
            }
            Bundle::Flows(items) => {
                self.flows_refused += items.len();
                items.into_iter().for_each(|item| cargo.datagrams.thaw(cargo.registry, item, cargo.now));
            }
        }
        self.unregister(cargo.registry);
        Progress::Failed { moved: self.moved }
    }

    fn end(&mut self, registry: &Registry) -> Progress {
        if self.refused {
            self.unregister(registry);
            return Progress::Failed { moved: self.moved };
        }
        if !matches!(self.load, Load::FlowsOf(_)) {
            self.unregister(registry);
            let _ = control::send(&self.channel, &PeerMessage::Done, &[]);
        }
        Progress::Done { moved: self.moved }
    }

    /// Listens no more.
    pub fn unregister(&self, registry: &Registry) {
        let _ = registry.deregister(&mut SourceFd(&self.channel.as_fd().as_raw_fd()));
    }
}
