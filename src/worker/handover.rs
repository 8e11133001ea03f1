//! Live sessions from one worker to another, over a channel of their own.
//!
//! ```text
//!   sender:    pack, freeze --Sessions--> wait --Taken--> forget, next bundle ... Done
//!                                           \--gone, or silent--> thaw all, keep them
//!   receiver:  decode, take --Taken--> activate
//! ```
//!
//! The sender keeps a session until the receiver has said that it has it; the
//! receiver moves no byte before it has said so. So a death on either side at
//! any moment leaves each session with at most one of them, whole. One bundle
//! is under way at a time.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::warn;

use super::sessions::{Parcel, Sessions};
use crate::control::{self, PeerMessage};
use crate::handover::{self, MAX_BYTES, MAX_SESSIONS};
use crate::slab::Key;
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::shared;

/// How long the receiver may take for one bundle, in milliseconds.
const PATIENCE: Millis = 5_000;

/// How a sender stands after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A bundle is under way.
    Waiting,
    /// Everything that could travel has.
    #[allow(missing_docs)]
    Done { moved: usize },
    /// The receiver is gone or refuses; what it did not take is kept.
    #[allow(missing_docs)]
    Failed { moved: usize },
}

/// The sending side.
#[derive(Debug)]
pub struct Sender {
    channel: Channel,
    /// The bundle under way, and since when.
    under_way: Vec<Key>,
    since: Millis,
    left: usize,
    moved: usize,
    refused: bool,
}

impl Sender {
    /// Sends at most `count` sessions.
    pub fn new(channel: Channel, registry: &Registry, token: Token, count: usize) -> std::io::Result<Sender> {
        channel.set_nonblocking()?;
        registry.register(&mut SourceFd(&channel.as_fd().as_raw_fd()), token, Interest::READABLE)?;
        Ok(Sender { channel, under_way: Vec::new(), since: 0, left: count, moved: 0, refused: false })
    }

    /// Takes in what the receiver said, and sends on.
    pub fn step(&mut self, sessions: &mut Sessions, registry: &Registry, now: Millis) -> Progress {
        loop {
            if self.under_way.is_empty() {
                let parcels = match self.left.min(MAX_SESSIONS) {
                    0 => Vec::new(),
                    count => sessions.pack(registry, count, now),
                };
                if parcels.is_empty() || self.refused {
                    self.keep(parcels.iter().map(|parcel| parcel.key).collect(), sessions, registry, now);
                    return self.end(registry);
                }
                self.since = now;
                self.under_way = parcels.iter().map(|parcel| parcel.key).collect();
                if let Err(error) = self.send(sessions, parcels) {
                    return self.fail(&error.to_string(), sessions, registry, now);
                }
            }
            match control::receive::<PeerMessage>(&self.channel) {
                Ok(Some((PeerMessage::Taken { refused }, _))) => {
                    self.handle_taken(&refused, sessions, registry, now);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if now.saturating_sub(self.since) > PATIENCE {
                        return self.fail("no answer", sessions, registry, now);
                    }
                    return Progress::Waiting;
                }
                Ok(Some(_)) => return self.fail("an answer out of turn", sessions, registry, now),
                Ok(None) => return self.fail("the receiver is gone", sessions, registry, now),
                Err(error) => return self.fail(&error.to_string(), sessions, registry, now),
            }
        }
    }

    /// When `step` is to be called at the latest.
    pub fn next_deadline(&self, now: Millis) -> Millis {
        if self.under_way.is_empty() { now } else { self.since + PATIENCE + 1 }
    }

    fn send(&self, sessions: &Sessions, parcels: Vec<Parcel>) -> std::io::Result<()> {
        let keys: Vec<Key> = parcels.iter().map(|parcel| parcel.key).collect();
        let records: Vec<_> = parcels.into_iter().map(|parcel| (parcel.record, parcel.kept)).collect();
        let bundle = shared::sealed("evenkeel-bundle", &handover::encode(&records))?;
        let sockets = keys.iter().flat_map(|&key| sessions.sockets(key));
        let fds: Vec<BorrowedFd> = std::iter::once(bundle.as_fd()).chain(sockets).collect();
        control::send(&self.channel, &PeerMessage::Sessions { count: keys.len() }, &fds)
    }

    fn handle_taken(&mut self, refused: &[usize], sessions: &mut Sessions, registry: &Registry, now: Millis) {
        for (index, key) in std::mem::take(&mut self.under_way).into_iter().enumerate() {
            if refused.contains(&index) {
                self.refused = true;
                sessions.thaw(registry, key, now);
            } else {
                sessions.forget(key);
                self.moved += 1;
                self.left -= 1;
            }
        }
    }

    fn keep(&mut self, keys: Vec<Key>, sessions: &mut Sessions, registry: &Registry, now: Millis) {
        for key in keys {
            sessions.thaw(registry, key, now);
        }
    }

    fn fail(&mut self, why: &str, sessions: &mut Sessions, registry: &Registry, now: Millis) -> Progress {
        let keys = std::mem::take(&mut self.under_way);
        warn!("a hand-over stopped after {} sessions: {why}", self.moved);
        self.keep(keys, sessions, registry, now);
        self.unregister(registry);
        Progress::Failed { moved: self.moved }
    }

    fn end(&mut self, registry: &Registry) -> Progress {
        self.unregister(registry);
        if self.refused {
            return Progress::Failed { moved: self.moved };
        }
        let _ = control::send(&self.channel, &PeerMessage::Done, &[]);
        Progress::Done { moved: self.moved }
    }

    fn unregister(&self, registry: &Registry) {
        let _ = registry.deregister(&mut SourceFd(&self.channel.as_fd().as_raw_fd()));
    }
}

/// The receiving side.
#[derive(Debug)]
pub struct Receiver {
    channel: Channel,
}

impl Receiver {
    /// Listens to a sender.
    pub fn new(channel: Channel, registry: &Registry, token: Token) -> std::io::Result<Receiver> {
        channel.set_nonblocking()?;
        registry.register(&mut SourceFd(&channel.as_fd().as_raw_fd()), token, Interest::READABLE)?;
        Ok(Receiver { channel })
    }

    /// Takes what has arrived; false where the sender is done or gone.
    pub fn step(&mut self, sessions: &mut Sessions, registry: &Registry, room: usize, now: Millis) -> bool {
        loop {
            match control::receive::<PeerMessage>(&self.channel) {
                Ok(Some((PeerMessage::Sessions { count }, fds))) => {
                    let refused = self.take(count, fds, sessions, registry, room, now);
                    if let Err(why) = refused {
                        warn!("a hand-over was refused: {why}");
                        break;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return true,
                Ok(Some((PeerMessage::Done, _)) | None) => break,
                Ok(Some((PeerMessage::Taken { .. }, _))) => break,
                Err(error) => {
                    warn!(%error, "a hand-over was not understood");
                    break;
                }
            }
        }
        let _ = registry.deregister(&mut SourceFd(&self.channel.as_fd().as_raw_fd()));
        false
    }

    /// One bundle. An error ends the hand-over; the sender keeps what was in
    /// it, because it hears of no `Taken`.
    fn take(
        &mut self,
        count: usize,
        fds: Vec<std::os::fd::OwnedFd>,
        sessions: &mut Sessions,
        registry: &Registry,
        room: usize,
        now: Millis,
    ) -> Result<(), String> {
        let mut fds = fds.into_iter();
        let bundle = fds.next().ok_or("a bundle without its memory")?;
        let bytes = shared::read_sealed_up_to(bundle, MAX_BYTES).map_err(|error| error.to_string())?;
        let arrivals = handover::decode(&bytes, fds.len()).map_err(|error| error.to_string())?;
        if arrivals.len() != count {
            return Err("it holds another number of sessions than it says".into());
        }
        let (mut taken, mut refused) = (Vec::new(), Vec::new());
        for (index, arrival) in arrivals.into_iter().enumerate() {
            let sockets: Vec<_> = fds.by_ref().take(arrival.record.socket_count()).collect();
            let has_room = sessions.len() < room;
            match has_room.then(|| sessions.take(arrival, sockets)).flatten() {
                Some(key) => taken.push(key),
                None => refused.push(index),
            }
        }
        if let Err(error) = control::send(&self.channel, &PeerMessage::Taken { refused }, &[]) {
            // The sender will go on with them: here they never were.
            taken.into_iter().for_each(|key| sessions.forget(key));
            return Err(error.to_string());
        }
        for key in taken {
            sessions.activate(registry, key, now);
        }
        Ok(())
    }
}
