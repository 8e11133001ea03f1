//! A worker's listening sockets: its own slot's, and those of empty
//! neighbours.
//!
//! Edge-triggered: readiness is remembered until accept would block. Accepting
//! pauses, with a deadline, when the worker or the host is out of descriptors
//! or memory; it never spins, and what waits in the queue stays there.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use super::event_loop::listener_token;
use crate::control::Place;
use crate::sys::clock::Millis;
use crate::sys::filter;
use crate::sys::stream::{self, Stream};

/// How long accepting pauses, in milliseconds: long enough to cost nothing,
/// short enough that nobody waits long for the first free descriptor.
pub const PAUSE: Millis = 100;

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
        registry.register(&mut SourceFd(&socket.as_raw_fd()), listener_token(index), Interest::READABLE)?;
        // What waited before it was registered may give no edge.
        // A predecessor may have died while it left.
        let closed = filter::is_closed(&socket);
        let entry = Some(Entry { place, socket, lent_by, ready: true, closed, held_until: None });
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

    /// The sockets at which something may wait; none during a pause.
    pub fn ready(&self, now: Millis) -> Vec<usize> {
        if self.paused_until.is_some_and(|until| now < until) {
            return Vec::new();
        }
        let may = |entry: &Entry| entry.ready && !entry.is_held(now);
        (0..self.entries.len()).filter(|&i| self.entries[i].as_ref().is_some_and(may)).collect()
    }

    /// Whether there is anything to accept right now.
    pub fn has_ready(&self, now: Millis) -> bool {
        self.paused_until.is_none_or(|until| now >= until)
            && self.entries.iter().flatten().any(|entry| entry.ready && !entry.is_held(now))
    }

    /// The listener of a socket.
    pub fn listener_of(&self, index: usize) -> Option<usize> {
        self.entries.get(index)?.as_ref().map(|entry| entry.place.listener)
    }

    /// Accepts nothing at one socket until then.
    pub fn hold(&mut self, index: usize, until: Millis) {
        if let Some(Some(entry)) = self.entries.get_mut(index) {
            entry.held_until = Some(until);
        }
    }

    /// Tries to accept at one socket.
    pub fn accept(&mut self, index: usize) -> Accepted {
        let Some(Some(entry)) = self.entries.get_mut(index) else { return Accepted::Empty };
        match stream::accept(&entry.socket) {
            Ok((stream, peer)) => {
                if entry.closed {
                    // It lives already; at worst it hears nothing.
                    let _ = filter::welcome(&stream);
                }
                Accepted::Connection(entry.place.listener, stream, peer)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                entry.ready = false;
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

    /// Accepts nothing until then.
    pub fn pause(&mut self, until: Millis) {
        self.paused_until = Some(until);
    }

    /// A descriptor or a place became free.
    pub fn end_pause(&mut self) {
        self.paused_until = None;
        for entry in self.entries.iter_mut().flatten() {
            entry.held_until = None;
        }
    }

    /// When the pause ends, of all or of one, while there is anything to accept
    /// after it.
    pub fn pause_end(&self) -> Option<Millis> {
        let ready = || self.entries.iter().flatten().filter(|entry| entry.ready);
        let of_all = self.paused_until.filter(|_| ready().next().is_some());
        ready().filter_map(|entry| entry.held_until).chain(of_all).min()
    }

    /// Every socket, with the listener's number.
    pub fn sockets(&self) -> impl Iterator<Item = (Place, impl AsFd + '_)> {
        self.entries.iter().flatten().map(|entry| (entry.place, entry.socket.as_fd()))
    }

    /// Looks at every queue again, whatever the edges said.
    pub fn expect_all(&mut self) {
        for entry in self.entries.iter_mut().flatten() {
            entry.ready = true;
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
    fn is_held(&self, now: Millis) -> bool {
        self.held_until.is_some_and(|until| now < until)
    }
}

/// What a listener's token says in `event_loop`.
pub fn index_of(token: Token) -> usize {
    super::event_loop::special_number(token) - 1
}
