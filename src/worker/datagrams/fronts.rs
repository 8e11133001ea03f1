//! The UDP sockets that clients send to: the own slot's, and those of empty
//! neighbours.
//!
//! Edge-triggered: readiness is remembered until a receive comes back short.
//! A kept socket is taken up by reading it to its end once; until then what
//! waited in it too long is stale. Replies always leave by the own slot's
//! socket of the same address, so a flow does not end with a loan.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use crate::control::Place;
use crate::sys::datagram;

/// One of them.
#[derive(Debug)]
pub struct Front {
    pub place: Place,
    pub socket: OwnedFd,
    /// The slot that it belongs to, where that is not the worker's own.
    pub lent_by: Option<usize>,
    pub ready: bool,
    /// Another process had it, and it was not read to its end since.
    pub take_up: bool,
    /// UDP_SEGMENT has not failed here.
    pub can_cut: bool,
    /// A filter gives it a share of a group: the kernel counts as dropped
    /// what others take.
    pub is_divided: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Fronts {
    entries: Vec<Option<Front>>,
    joins: bool,
    stopped: bool,
    /// None is read until the flows of their clients are here.
    held: bool,
}

impl Fronts {
    /// Polls one more socket.
    pub fn add(&mut self, registry: &Registry, front: Front, token: fn(usize) -> Token) -> io::Result<()> {
        self.joins = datagram::prepare_listener(&front.socket)?;
        let index = self.entries.iter().position(Option::is_none).unwrap_or(self.entries.len());
        registry.register(&mut SourceFd(&front.socket.as_raw_fd()), token(index), Interest::READABLE)?;
        if index == self.entries.len() {
            self.entries.push(Some(front));
        } else {
            self.entries[index] = Some(front);
        }
        Ok(())
    }

    /// Polls a neighbour's sockets no more.
    pub fn give_back(&mut self, registry: &Registry, slot: usize) {
        for entry in &mut self.entries {
            if let Some(lent) = entry.take_if(|front| front.lent_by == Some(slot)) {
                // The supervisor's duplicate keeps a registration alive.
                let _ = registry.deregister(&mut SourceFd(&lent.socket.as_raw_fd()));
            }
        }
    }

    /// Reads none of them any more; they are still there to send by.
    pub fn stop(&mut self, registry: &Registry) {
        self.stopped = true;
        for front in self.entries.iter_mut().flatten() {
            let _ = registry.deregister(&mut SourceFd(&front.socket.as_raw_fd()));
            front.ready = false;
        }
    }

    /// Whether the kernel joins datagrams here, and so on flows' sockets.
    pub fn joins(&self) -> bool {
        self.joins
    }

    /// Remembers an event.
    pub fn handle_ready(&mut self, index: usize) {
        // An event of the same batch as the stop may still come.
        if let Some(Some(front)) = self.entries.get_mut(index)
            && !self.stopped
        {
            front.ready = true;
        }
    }

    /// Whether any is to be read now.
    pub fn has_ready(&self) -> bool {
        !self.held && self.entries.iter().flatten().any(|front| front.ready)
    }

    /// Reads none for a while, or all again. Events are remembered meanwhile.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    pub fn is_held(&self) -> bool {
        self.held
    }

    /// Looks at every one, whatever the edges said.
    pub fn expect_all(&mut self) {
        let stopped = self.stopped;
        self.entries.iter_mut().flatten().for_each(|front| front.ready = !stopped);
    }

    /// How many numbers there are; some may name nothing.
    pub fn end(&self) -> usize {
        self.entries.len()
    }

    pub fn get(&self, index: usize) -> Option<&Front> {
        self.entries.get(index)?.as_ref()
    }

    pub fn get_mut(&mut self, index: usize) -> Option<&mut Front> {
        self.entries.get_mut(index)?.as_mut()
    }

    /// The own slot's socket at a place.
    pub fn own(&self, place: Place) -> Option<usize> {
        let is_it = |front: &Front| front.place == place && front.lent_by.is_none();
        self.entries.iter().position(|entry| entry.as_ref().is_some_and(is_it))
    }

    pub fn all(&self) -> impl Iterator<Item = &Front> {
        self.entries.iter().flatten()
    }
}
