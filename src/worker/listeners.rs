//! A worker's listening sockets: its own slot's, and those of empty
//! neighbours.
//!
//! Polled for their state, so that a connection that comes alone costs no
//! second accept: a turn takes as many as lately came at once, and twice as
//! many where that was not all. Accepting pauses, with a deadline, when the
//! worker or the host is out of descriptors or memory; nothing is polled
//! meanwhile, and what waits in the queue stays there.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Registry, Token};

use super::event_loop::listener_token;
use crate::control::Place;
use crate::sys::clock::Millis;
use crate::sys::filter;
use crate::sys::level;
use crate::sys::stream::{self, Stream};

/// How long accepting pauses, in milliseconds: long enough to cost nothing,
/// short enough that nobody waits long for the first free descriptor.
pub const PAUSE: Millis = 100;

/// No turn accepts as many at one socket.
const LARGEST_BATCH: u32 = 64;

/// All listening sockets that this worker polls.
#[derive(Debug, Default)]
pub struct Listeners {
    entries: Vec<Option<Entry>>,
    paused_until: Option<Millis>,
}

#[derive(Debug)]
struct Entry {
    place: Place,
    socket: OwnedFd,
    /// The slot that it belongs to, where that is not the worker's own.
    lent_by: Option<usize>,
    ready: bool,
    /// In epoll; not during a pause.
    watched: bool,
    /// After so many the poll is left to say whether there are more.
    batch: u32,
    /// How many of the batch came.
    taken: u32,
    /// The last turn took a whole batch.
    filled: bool,
    /// No new handshakes: what is accepted has to be made welcome.
    closed: bool,
    /// Its listener has all the sessions that it may: accepting waits.
    held_until: Option<Millis>,
}

/// What one try to accept brought.
#[derive(Debug)]
pub enum Accepted {
    /// A connection, at the listener with this number.
    Connection(usize, Stream, SocketAddr),
    /// Nothing waits at this socket any more.
    Empty,
    /// One connection was gone before it was accepted; there may be more.
    Gone,
    /// The worker or the host is out of descriptors or memory.
    Exhausted(io::Error),
}

impl Listeners {
    /// Polls one more socket.
    pub fn add(
        &mut self,
        registry: &Registry,
        place: Place,
        socket: OwnedFd,
        lent_by: Option<usize>,
    ) -> io::Result<()> {
        let index = self.entries.iter().position(Option::is_none).unwrap_or(self.entries.len());
        level::watch(registry, &socket, listener_token(index).0)?;
        // A predecessor may have died while it left.
        let closed = filter::is_closed(&socket);
        let entry = Some(Entry {
            place,
            socket,
            lent_by,
            ready: true,
            watched: true,
            batch: 1,
            taken: 0,
            filled: false,
            closed,
            held_until: None,
        });
        if index == self.entries.len() {
            self.entries.push(entry);
        } else {
            self.entries[index] = entry;
        }
        Ok(())
    }

    /// Polls a neighbour's sockets no more.
    pub fn give_back(&mut self, registry: &Registry, slot: usize) {
        for entry in &mut self.entries {
            if let Some(lent) = entry.take_if(|entry| entry.lent_by == Some(slot)) {
                // The supervisor's duplicate keeps a registration alive, so
                // closing alone would not end it.
                let _ = registry.deregister(&mut SourceFd(&lent.socket.as_raw_fd()));
            }
        }
    }

    /// Leaves sockets at these places, with their queues, to whoever holds them
    /// as well.
    pub fn let_go(&mut self, registry: &Registry, places: &[Place]) {
        for entry in &mut self.entries {
            if let Some(kept) = entry.take_if(|entry| places.contains(&entry.place)) {
                let _ = registry.deregister(&mut SourceFd(&kept.socket.as_raw_fd()));
            }
        }
    }

    /// Takes no new handshakes at any socket; the first error.
    pub fn keep_out(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for entry in self.entries.iter_mut().flatten() {
            entry.closed = true;
            result = result.and(filter::refuse_new_handshakes(&entry.socket));
        }
        result
    }

    /// Remembers an event.
    pub fn handle_ready(&mut self, index: usize) {
        if let Some(Some(entry)) = self.entries.get_mut(index) {
            entry.ready = true;
        }
    }

    /// The numbers of the sockets at which something may wait (`is_ready`);
    /// none during a pause.
    pub fn begin_turn(&mut self, now: Millis) -> Range<usize> {
        self.entries.iter_mut().flatten().for_each(Entry::begin_turn);
        if self.paused_until.is_some_and(|until| now < until) { 0..0 } else { 0..self.entries.len() }
    }

    /// Whether there is anything to accept right now.
    pub fn has_ready(&self, now: Millis) -> bool {
        self.paused_until.is_none_or(|until| now >= until)
            && self.entries.iter().flatten().any(|entry| entry.ready)
    }

    /// The listener of a socket.
    pub fn listener_of(&self, index: usize) -> Option<usize> {
        self.entries.get(index)?.as_ref().map(|entry| entry.place.listener)
    }

    /// Accepts nothing at one socket until then, as `pause` does at all.
    pub fn hold(&mut self, registry: &Registry, index: usize, until: Millis) {
        if let Some(Some(entry)) = self.entries.get_mut(index) {
            entry.held_until = Some(until);
            entry.ready = false;
            if std::mem::take(&mut entry.watched) {
                let _ = registry.deregister(&mut SourceFd(&entry.socket.as_raw_fd()));
            }
        }
    }

    /// Whether there is more to accept at one socket in this turn.
    pub fn is_ready(&self, index: usize) -> bool {
        self.entries.get(index).is_some_and(|entry| entry.as_ref().is_some_and(|entry| entry.ready))
    }

    /// Tries to accept at one socket.
    pub fn accept(&mut self, index: usize) -> Accepted {
        let Some(Some(entry)) = self.entries.get_mut(index) else { return Accepted::Empty };
        match stream::accept(&entry.socket) {
            Ok((stream, peer)) => {
                entry.handle_accepted();
                if entry.closed {
                    // It lives already; at worst it hears nothing.
                    let _ = filter::welcome(&stream);
                }
                Accepted::Connection(entry.place.listener, stream, peer)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                entry.handle_empty();
                Accepted::Empty
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    Accepted::Exhausted(error)
                }
                // accept(2): errors of the new connection are passed on and
                // mean: try again.
                _ => Accepted::Gone,
            },
        }
    }

    /// Accepts nothing until then. What waits would wake the worker all the
    /// time, so it is not polled either.
    pub fn pause(&mut self, registry: &Registry, until: Millis) {
        self.paused_until = Some(until);
        for entry in self.entries.iter_mut().flatten().filter(|entry| entry.watched) {
            let _ = registry.deregister(&mut SourceFd(&entry.socket.as_raw_fd()));
            entry.watched = false;
        }
    }

    /// A descriptor or a place became free, or the pause is over.
    pub fn end_pause(&mut self, registry: &Registry, now: Millis) {
        self.paused_until = None;
        for (index, entry) in self.entries.iter_mut().enumerate() {
            let Some(entry) = entry.as_mut().filter(|entry| !entry.watched) else { continue };
            entry.held_until = None;
            match level::watch(registry, &entry.socket, listener_token(index).0) {
                Ok(()) => (entry.watched, entry.ready) = (true, true),
                // Out of memory: not polled, it would never be served again.
                Err(_) => self.paused_until = Some(now + PAUSE),
            }
        }
    }

    /// When the pause ends, of all or of one.
    pub fn pause_end(&self) -> Option<Millis> {
        let of_all = self.paused_until.filter(|_| !self.is_empty());
        self.entries.iter().flatten().filter_map(|entry| entry.held_until).chain(of_all).min()
    }

    /// Every socket, with the listener's number.
    pub fn sockets(&self) -> impl Iterator<Item = (Place, impl AsFd + '_)> {
        self.entries.iter().flatten().map(|entry| (entry.place, entry.socket.as_fd()))
    }

    /// Looks at every queue again, from here on to its end each time: nobody
    /// may be left in one that is to be closed.
    pub fn expect_all(&mut self) {
        for entry in self.entries.iter_mut().flatten() {
            entry.ready = true;
            (entry.batch, entry.filled) = (u32::MAX, false);
        }
    }

    /// Whether none is polled.
    pub fn is_empty(&self) -> bool {
        self.entries.iter().all(Option::is_none)
    }

    /// Closes all of them.
    pub fn close(&mut self, registry: &Registry) {
        self.close_all_but(registry, &[]);
    }

    /// Closes all of them but the worker's own at these places.
    pub fn close_all_but(&mut self, registry: &Registry, places: &[Place]) {
        for entry in &mut self.entries {
            let keeps = |entry: &Entry| entry.lent_by.is_none() && places.contains(&entry.place);
            if let Some(closed) = entry.take_if(|entry| !keeps(entry)) {
                let _ = registry.deregister(&mut SourceFd(&closed.socket.as_raw_fd()));
            }
        }
    }
}

impl Entry {
    fn handle_accepted(&mut self) {
        self.taken += 1;
        if self.taken == self.batch {
            (self.ready, self.filled) = (false, true);
            self.taken = 0;
        }
    }

    /// Ready again right after a whole batch: that was not all.
    fn begin_turn(&mut self) {
        if std::mem::take(&mut self.filled) && self.ready {
            self.batch = self.batch.saturating_mul(2).min(LARGEST_BATCH);
        }
    }

    fn handle_empty(&mut self) {
        self.ready = false;
        if self.batch != u32::MAX {
            self.batch = self.taken.clamp(1, LARGEST_BATCH);
        }
        self.taken = 0;
    }
}

/// What a listener's token says in `event_loop`.
pub fn index_of(token: Token) -> usize {
    super::event_loop::special_number(token) - 1
}
