//! A change of where clients' datagrams come, with their flows going along.
//!
//! ```text
//!   Holding: the slots that are to get flows read no datagram any more
//!      |     (all have said so, or are dead, or were waited for long enough)
//!      v
//!   the kernel's table is written
//!      |
//!      v
//!   Passing: each slot that is to give reads what came until then, and passes
//!      |     the flows; a getter reads again when all its givers are through
//!      v
//!   done
//! ```
//!
//! TCP needs none of this: a connection is steered once. One change at a time,
//! for all listeners that are due. Bounded by deadlines: a worker that does not
//! answer costs its own flows, and nobody else's.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tracing::{info, warn};

use super::Supervisor;
use super::slot::Slot;
use crate::control::ToWorker;
use crate::sys::channel::Channel;
use crate::sys::clock::{self, Millis};
use crate::sys::shared;

/// How long workers may take to say that they hold, in milliseconds.
const HOLD_LIMIT: Millis = 1_000;
/// How long they may take to pass their flows.
const PASS_LIMIT: Millis = 15_000;

/// A change under way.
#[derive(Debug)]
pub struct Shift {
    stage: Stage,
    /// From which slot to which.
    pairs: Vec<(usize, usize)>,
    /// Slots and processes whose word is awaited.
    awaited: Vec<(usize, u32)>,
    deadline: Millis,
    moved: usize,
    left: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Holding,
    Passing,
}

impl Shift {
    /// When it goes on by itself.
    pub fn deadline(&self) -> Millis {
        self.deadline
    }

    /// Whether this slot gets flows by it.
    fn gives_to(&self, slot: usize) -> bool {
        self.pairs.iter().any(|(_, to)| *to == slot)
    }
}

impl Supervisor {
    /// Begins what the steering has planned, or what a neighbour that helped
    /// out has to give back.
    pub(super) fn begin_shift(&mut self) {
        // Who is still getting the flows of the worker before cannot pass them
        // on yet.
        let is_taking_over = |slot: &Slot| !slot.has_handed_over();
        let is_over = self.leave.is_some() || self.departure.is_some();
        if self.shift.is_some() || is_over || self.slots.iter().any(is_taking_over) {
            return;
        }
        let mut pairs = self.steering.planned_pairs();
        let lives = |slot: usize| self.slots.get(slot).is_some_and(|slot| slot.current.is_some());
        if !self.reload_holds_flows() {
            // Who is to get something may just be being replaced.
            let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.to_give_back)
                .into_iter()
                .filter(|(from, _)| lives(*from))
                .partition(|(_, to)| lives(*to));
            pairs.extend(now);
            self.to_give_back = later;
        }
        pairs.sort_unstable();
        pairs.dedup();
        pairs.retain(|(from, to)| from != to && lives(*from) && lives(*to));
        if pairs.is_empty() {
            return self.steering.commit_planned(&self.slots);
        }
        let mut getters: Vec<usize> = pairs.iter().map(|(_, to)| *to).collect();
        getters.sort_unstable();
        getters.dedup();
        getters.iter().for_each(|&slot| self.slots[slot].tell(&ToWorker::Hold));
        let awaited = getters.iter().map(|&slot| (slot, self.slots[slot].pid())).collect();
        let deadline = clock::coarse() + HOLD_LIMIT;
        self.shift = Some(Shift { stage: Stage::Holding, pairs, awaited, deadline, moved: 0, left: 0 });
    }

    /// A worker holds.
    pub(super) fn handle_held(&mut self, slot: usize) {
        let pid = self.slots[slot].pid();
        self.handle_word(Stage::Holding, slot, pid);
    }

    /// A worker has passed its flows.
    pub(super) fn handle_flows_passed(&mut self, slot: usize, moved: usize, left: usize) {
        let pid = self.slots[slot].pid();
        if let Some(shift) = &mut self.shift {
            shift.moved += moved;
            shift.left += left;
        }
        self.handle_word(Stage::Passing, slot, pid);
    }

    fn handle_word(&mut self, stage: Stage, slot: usize, pid: u32) {
        let Some(shift) = self.shift.as_mut().filter(|shift| shift.stage == stage) else { return };
        shift.awaited.retain(|awaited| *awaited != (slot, pid));
        self.advance_shift();
    }

    /// A worker that is gone says nothing any more.
    pub(super) fn note_shift_end_of(&mut self, slot: usize) {
        let Some(shift) = &mut self.shift else { return };
        shift.awaited.retain(|(awaited, _)| *awaited != slot);
        // What it was to get is with the givers still, and waits for the next.
        self.to_give_back.extend(shift.pairs.iter().filter(|(_, to)| *to == slot));
        self.advance_shift();
    }

    /// Whether the next worker of a slot is to get flows before it reads any
    /// datagram.
    pub(super) fn owes_flows_to(&self, slot: usize) -> bool {
        let in_shift = self.shift.as_ref().is_some_and(|shift| shift.gives_to(slot));
        in_shift || self.to_give_back.iter().any(|(_, to)| *to == slot)
    }

    fn advance_shift(&mut self) {
        match &self.shift {
            Some(Shift { stage: Stage::Holding, awaited, .. }) if awaited.is_empty() => self.pass_flows(),
            Some(Shift { stage: Stage::Passing, awaited, .. }) if awaited.is_empty() => self.end_shift(),
            _ => {}
        }
    }

    /// Writes the table, and has the flows follow.
    fn pass_flows(&mut self) {
        self.steering.commit_planned(&self.slots);
        let routes = serde_json::to_vec(&self.steering.routes()).expect("routes are plain data");
        let routes = shared::sealed("evenkeel-routes", &routes);
        let Some(shift) = &mut self.shift else { return };
        shift.stage = Stage::Passing;
        shift.deadline = clock::coarse() + PASS_LIMIT;
        let pairs = shift.pairs.clone();
        let mut givers: Vec<usize> = pairs.iter().map(|(from, _)| *from).collect();
        givers.dedup();
        let mut awaited = Vec::new();
        for &from in &givers {
            let getters = pairs.iter().filter(|(giver, _)| *giver == from).map(|(_, to)| *to);
            match (&routes, self.join(getters)) {
                (Ok(routes), (to, channels)) if self.slots[from].current.is_some() => {
                    let fds: Vec<BorrowedFd> =
                        std::iter::once(routes.as_fd()).chain(channels.iter().map(AsFd::as_fd)).collect();
                    if let Some(process) = &mut self.slots[from].current {
                        process.tell(&ToWorker::PassFlows { to }, &fds);
                        awaited.push((from, process.pid()));
                    }
                }
                (Err(error), _) => warn!(%error, "flows cannot be passed: they begin anew"),
                _ => {}
            }
        }
        for slot in 0..self.slots.len() {
            if pairs.iter().any(|(_, to)| *to == slot) {
                self.slots[slot].tell(&ToWorker::Release);
            }
        }
        if let Some(shift) = &mut self.shift {
            shift.awaited = awaited;
        }
        self.advance_shift();
    }

    /// Tells the getters of a giver; the giver's ends of the channels.
    fn join(&mut self, getters: impl Iterator<Item = usize>) -> (Vec<usize>, Vec<OwnedFd>) {
        let (mut slots, mut channels) = (Vec::new(), Vec::new());
        for to in getters {
            let Ok((ours, theirs)) = Channel::pair() else { continue };
            let Some(process) = &mut self.slots[to].current else { continue };
            process.tell(&ToWorker::TakeOver { flows: true, recovers: false }, &[theirs.as_fd()]);
            slots.push(to);
            channels.push(ours.into_fd());
        }
        (slots, channels)
    }

    fn end_shift(&mut self) {
        let Some(shift) = self.shift.take() else { return };
        let (moved, left) = (shift.moved, shift.left);
        if left > 0 {
            warn!("{moved} flows went where their datagrams come, {left} could not");
        } else if moved > 0 {
            info!("{moved} flows went where their datagrams come");
        }
    }

    /// Goes on without those that do not answer.
    pub(super) fn handle_shift_deadline(&mut self) {
        let Some(shift) = self.shift.as_mut().filter(|shift| shift.deadline <= clock::coarse()) else {
            return;
        };
        warn!(slots = ?shift.awaited, "workers are slow to hand flows over: going on without them");
        shift.awaited.clear();
        self.advance_shift();
    }
}
