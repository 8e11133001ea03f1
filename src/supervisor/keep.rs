//! The workers' keepers: who they are, and what becomes of a dead worker's
//! sessions.
//!
//! ```text
//!   worker dies --no keeper--> lost, counted
//!        \------keeper-------> it stands in the dead one's place, as an old worker that hands over
//!                              to the next one of the slot; with it goes what the dead one had
//! ```
//!
//! A keeper is a child of ours that its worker began, over the worker's table
//! of descriptors and its channel to us. While the worker lives it says
//! nothing. Once the worker is dead it is a sender like any other: whoever
//! fills the slot gets `TakeOver`, it gets `HandOver`, and where the receiver
//! dies, what it had not taken goes to the next one.

use std::process::ExitStatus;

use mio::Token;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::slot::{Process, Slot};
use super::{Supervisor, seen};
use crate::control::status::Keeper;
use crate::control::{Kept, ToWorker};
use crate::supervision::Phase;
use crate::sys::channel::Channel;
use crate::sys::process::{self, Child};

/// What the keepers of all slots did, and those that are to be reaped.
#[derive(Debug, Default)]
pub struct Keepers {
    tallies: Vec<Tally>,
    /// Killed, or replaced by another one.
    ended: Vec<Child>,
    /// What was said of why there is none.
    complained: bool,
}

/// What the keepers of one slot did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    takeovers: u64,
    found: Kept,
    /// Why there is no keeper.
    why: String,
}

impl Keepers {
    /// For the next image of the supervisor.
    pub fn pack(&self) -> (Vec<Tally>, Vec<u32>) {
        (self.tallies.clone(), self.ended.iter().map(Child::id).collect())
    }

    /// As the image before left it.
    pub fn unpack(tallies: Vec<Tally>, ended: Vec<u32>) -> Keepers {
        let ended = ended.into_iter().map(Child::of_number).collect();
        Keepers { tallies, ended, complained: false }
    }

    fn tally(&mut self, slot: usize) -> &mut Tally {
        if self.tallies.len() <= slot {
            self.tallies.resize_with(slot + 1, Tally::default);
        }
        &mut self.tallies[slot]
    }

    /// Ends one that is needed no more.
    pub fn end(&mut self, keeper: Option<Child>) {
        if let Some(mut keeper) = keeper {
            let _ = keeper.kill();
            self.ended.push(keeper);
        }
    }

    fn reap(&mut self) {
        self.ended.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }
}

impl Supervisor {
    /// A worker says who keeps its sessions, or why nobody does.
    pub(super) fn handle_keeper(&mut self, token: Token, pid: Option<u32>, why: String) {
        let Some((index, retiring, _)) = self.locate(token) else { return };
        // A number that a worker says: nobody but a child of ours is killed.
        let keeper = pid.filter(|pid| process::is_child(*pid)).map(Child::of_number);
        let Some((_, worker)) = self.slot_mut(index, retiring).find(token) else { return };
        if worker.is_keeper {
            return;
        }
        let before = std::mem::replace(&mut worker.keeper, keeper);
        self.keepers.end(before);
        if !why.is_empty() && !std::mem::replace(&mut self.keepers.complained, true) {
            warn!("sessions do not survive the death of their worker: {why}");
        }
        self.keepers.tally(index).why = why;
    }

    /// A process has ended: its keeper takes its place, if it has one that
    /// lives and is of use. Called before anything else is made of that end.
    pub(super) fn bequeath(&mut self, token: Token, status: ExitStatus) -> bool {
        let Some((index, retiring, role)) = self.locate(token) else { return false };
        let fault = role == super::slot::Role::Current && !retiring && self.is_fault(index, status);
        let slot = if retiring { &mut self.retiring[index] } else { &mut self.slots[index] };
        let Some((_, process)) = slot.find(token) else { return false };
        let keeper = process.keeper.take();
        if status.success() || role == super::slot::Role::Next || self.end.is_some() {
            self.keepers.end(keeper);
            return false;
        }
        let Some(mut keeper) = keeper else { return false };
        if !matches!(keeper.try_wait(), Ok(None)) {
            return false;
        }
        process.become_keeper(keeper, fault || seen::is_own_fault(status));
        let number = slot.number;
        let limit = self.generation.config.daemon.drain_timeout.as_millis() as u64;
        if let Some((_, process)) = self.slot_mut(index, retiring).find(token) {
            process.set_bound(limit);
        }
        self.keepers.tally(number).takeovers += 1;
        true
    }

    /// Whether a slot's present worker brought its end upon itself.
    fn is_fault(&self, slot: usize, status: ExitStatus) -> bool {
        let known = slot < self.supervision.slot_count();
        let hung = known && matches!(self.supervision.phase(slot), Phase::Hung { .. });
        hung || seen::is_own_fault(status)
    }

    /// The keeper of an old worker hands over to whoever fills the slot.
    pub(super) fn pair_old_keeper(&mut self, index: usize, retiring: bool, token: Token) {
        let to = if retiring { self.retiring[index].number % self.slots.len() } else { index };
        let from = if retiring { &mut self.retiring[index] } else { &mut self.slots[index] };
        let Some(at) = from.old.iter().position(|process| process.token == token) else { return };
        let mut old = from.old.remove(at);
        match &mut self.slots[to].current {
            Some(new) => pair(&mut old, new, !retiring),
            // Of a slot that stays the next worker gets it.
            None if !retiring => {}
            None => {
                warn!(slot = to, "nobody is there to take over what an old worker had");
                old.end();
            }
        }
        self.slot_mut(index, retiring).old.insert(at, old);
    }

    /// The slot has another worker: what the keepers of its dead ones have goes
    /// there.
    pub(super) fn pair_keepers(&mut self, slot: usize) {
        let Slot { current: Some(new), old, .. } = &mut self.slots[slot] else { return };
        for old in old.iter_mut().filter(|old| old.is_keeper) {
            old.handed_over = false;
            pair(old, new, true);
        }
    }

    /// A keeper has looked at what its worker left.
    pub(super) fn handle_recovered(&mut self, slot: usize, kept: &Kept) {
        info!(
            slot,
            "the dead worker's sessions: {} go on, {} flows, {} bytes of them kept, {} just accepted, {} lost",
            kept.sessions,
            kept.flows,
            kept.bytes,
            kept.adopted,
            kept.lost + kept.self_check_resets
        );
        if kept.self_check_resets > 0 {
            warn!(slot, "{} sessions failed the self-check and were reset", kept.self_check_resets);
        }
        kept.complaints.iter().for_each(|complaint| warn!(slot, "{complaint}"));
        let found = &mut self.keepers.tally(slot).found;
        found.sessions += kept.sessions;
        found.flows += kept.flows;
        found.bytes += kept.bytes;
        found.adopted += kept.adopted;
        found.self_check_resets += kept.self_check_resets;
        found.lost += kept.lost;
    }

    /// Looks which keepers have ended.
    pub(super) fn reap_keepers(&mut self) {
        for process in self.slots.iter_mut().chain(&mut self.retiring).flat_map(Slot::processes) {
            process.keeper.take_if(|keeper| !matches!(keeper.try_wait(), Ok(None)));
        }
        self.keepers.reap();
    }

    /// A slot's keeper as `status` shows it.
    pub(super) fn keeper_state(&self, slot: usize) -> Option<Keeper> {
        let worker = self.slots[slot].current.as_ref();
        if !worker.map_or(&self.generation, |worker| &worker.generation).config.daemon.crash_proof {
            return None;
        }
        let Tally { takeovers, found, why } = self.keepers.tallies.get(slot).cloned().unwrap_or_default();
        Some(Keeper {
            pid: worker.and_then(|worker| worker.keeper.as_ref()).map_or(0, Child::id),
            takeovers,
            sessions: found.sessions,
            flows: found.flows,
            bytes: found.bytes,
            self_check_resets: found.self_check_resets,
            lost: found.lost,
            unavailable: Some(why).filter(|why| !why.is_empty()),
        })
    }
}

/// Joins one that hands over with the one that is to have it; `same_slot` where
/// they are of one.
pub fn pair(old: &mut Process, new: &mut Process, same_slot: bool) {
    let limit = old.generation.config.daemon.drain_timeout.as_millis() as u64;
    let Ok((ours, theirs)) = Channel::pair() else { return };
    let shares = same_slot && old.is_keeper && old.generation.number == new.generation.number;
    let fault = old.is_fault;
    old.set_bound(limit);
    let message = ToWorker::HandOver { removed: Vec::new(), limit: Some(limit), park: false, shares, fault };
    use std::os::fd::AsFd;
    old.tell(&message, &[ours.as_fd()]);
    new.tell(&ToWorker::TakeOver { flows: true, recovers: shares }, &[theirs.as_fd()]);
}
