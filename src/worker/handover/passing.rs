//! Flows to the slots that their clients' datagrams come to, after a change of
//! the steering.
//!
//! A sender a slot, all at once. When each has passed what it could, the ways
//! stay open for a moment: a datagram that was on its way through the kernel
//! during the change is passed on by them.

use mio::Token;
use tracing::warn;

use super::{Cargo, Load, Progress, Sender};
use crate::control::{FromWorker, Routes};
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::worker::datagrams::Passage;

/// How long a way stays open, in milliseconds: what is later than that did not
/// wait in the kernel, but at a processor that stood still.
const OPEN_FOR: Millis = 2_000;

/// All of it.
#[derive(Debug)]
pub struct Passing {
    ways: Vec<Way>,
    /// The supervisor was told the end; the ways are closed then.
    close_at: Option<Millis>,
}

#[derive(Debug)]
struct Way {
    slot: usize,
    sender: Sender,
    moved: Option<usize>,
}

impl Passing {
    /// Begins: what has come so far is read, then every flow goes to its slot.
    pub fn begin(
        routes: &Routes,
        channels: Vec<(usize, Channel, Token)>,
        cargo: &mut Cargo,
        mut before: Option<Passing>,
    ) -> Passing {
        if let Some(old) = &mut before {
            old.close(cargo);
        }
        // First the route, then the flows that it leads away.
        cargo.datagrams.change_routes(cargo.registry, routes, cargo.now);
        let mut ways = Vec::new();
        for (slot, channel, token) in channels {
            match Sender::new(channel, cargo.registry, token, Load::FlowsOf(slot), cargo.datagrams) {
                Ok(sender) => ways.push(Way { slot, sender, moved: None }),
                Err(error) => warn!(%error, "flows cannot be passed to slot {slot}"),
            }
        }
        let passages =
            ways.iter().map(|way| Passage { slot: way.slot, channel: way.sender.channel().clone() });
        cargo.datagrams.open_passages(passages.collect());
        Passing { ways, close_at: None }
    }

    /// Goes on; what to tell the supervisor, once.
    pub fn step(&mut self, cargo: &mut Cargo) -> Option<FromWorker> {
        for way in self.ways.iter_mut().filter(|way| way.moved.is_none()) {
            match way.sender.step(cargo, true) {
                Progress::Waiting => {}
                Progress::Done { moved } => way.moved = Some(moved),
                Progress::Failed { moved } => {
                    way.moved = Some(moved);
                    cargo.datagrams.close_passage(way.slot);
                }
            }
        }
        if self.close_at.is_some() || self.ways.iter().any(|way| way.moved.is_none()) {
            return None;
        }
        self.close_at = Some(cargo.now + OPEN_FOR);
        let moved = self.ways.iter().filter_map(|way| way.moved).sum();
        let left = self.ways.iter().map(|way| way.sender.flows_left()).sum();
        Some(FromWorker::FlowsPassed { moved, left })
    }

    /// When `step` is to be called at the latest.
    pub fn next_deadline(&self, now: Millis) -> Option<Millis> {
        let open = self.ways.iter().filter(|way| way.moved.is_none());
        open.filter_map(|way| way.sender.next_deadline(now, true)).min().or(self.close_at)
    }

    /// Closes the ways when their time has come; true where that is all.
    pub fn is_over(&mut self, cargo: &mut Cargo) -> bool {
        let over = self.close_at.is_some_and(|at| at <= cargo.now);
        if over {
            self.close(cargo);
        }
        over
    }

    fn close(&mut self, cargo: &mut Cargo) {
        for mut way in self.ways.drain(..) {
            if way.moved.is_none() {
                way.sender.fail("the steering changes again", cargo);
            }
            way.sender.unregister(cargo.registry);
            cargo.datagrams.close_passage(way.slot);
        }
    }
}
