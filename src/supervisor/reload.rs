//! Bringing another configuration, or another number of workers, into force.
//!
//! ```text
//!   Proving: a worker of the new generation is started for each slot and opens
//!      |     what is new; the old ones serve on. Any failure: all new ones end.
//!      v
//!   Swapping: slot by slot the new worker serves and the old one hands over
//!      |
//!      v
//!   Shifting: with more or fewer slots, flows go where their datagrams come (`shift`)
//!      |
//!      v
//!   Retiring: slots that are too many hand over to those that stay --> done
//! ```
//!
//! Until the first swap nothing that serves is touched. Afterwards nothing can
//! refuse: a worker that dies is replaced as always, by one of the new
//! generation, and an old one that cannot hand over drains.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use mio::Token;
use tracing::{info, warn};

use super::admin::Admin;
use super::generation::Generation;
use super::slot::Slot;
use super::steering::FlowSlots;
use super::upgrade::Upgrade;
use super::{Refusal, Supervisor, access_log, activation, keep, plan, prepare};
use crate::config::{Config, Mode, Workers};
use crate::control::{Place, ToWorker};
use crate::counters::OfListener;
use crate::sys::channel::Channel;
use crate::sys::clock::{self, Millis};

/// How long a new worker may take to open its sockets, in milliseconds.
const PROVING_LIMIT: Millis = 30_000;
/// How long an old worker may take until the next slot's turn comes anyway, in
/// milliseconds: the grace for removed listeners and the sessions' move.
const SWAP_LIMIT: Millis = 20_000;

/// A reload under way.
#[derive(Debug)]
pub struct Reload {
    /// Who is to be told the end.
    requester: Option<u64>,
    generation: Rc<Generation>,
    old_slot_count: usize,
    stage: Stage,
    deadline: Millis,
    /// The admin address where it changes, bound already.
    admin: Option<Option<Admin>>,
    access_log: Option<std::fs::File>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// This slot's new worker is starting.
    Proving(usize),
    /// This slot's old worker hands over.
    Swapping(usize),
    /// Datagrams are steered over the new slots, and their flows move along.
    Shifting,
    Retiring,
}

/// Sessions to be moved from slot to slot.
#[derive(Debug, Default)]
pub struct Transfers {
    waiting: VecDeque<(usize, usize, usize)>,
    pub under_way: Option<usize>,
    requester: Option<u64>,
    planned: usize,
}

impl Reload {
    /// When it moves on by itself.
    pub fn deadline(&self) -> Millis {
        self.deadline
    }
}

impl Supervisor {
    /// How many slots have a part in the flows at present: until the swap is
    /// over, those that had one before.
    pub(super) fn flow_slots(&self) -> FlowSlots {
        let before = self.reload.as_ref().filter(|_| self.reload_holds_flows());
        FlowSlots {
            count: before.map_or(self.generation.slot_count(), |reload| reload.old_slot_count),
            may_move: self.announced && self.shift.is_none() && before.is_none(),
            is_free: !self.announced || self.leave.is_some(),
        }
    }

    /// Whether flows are just going from old workers to new ones.
    pub(super) fn reload_holds_flows(&self) -> bool {
        let stage = self.reload.as_ref().map(|reload| reload.stage);
        matches!(stage, Some(Stage::Proving(_) | Stage::Swapping(_)))
    }

    /// Goes on once the flows are where they belong.
    pub(super) fn check_shifted(&mut self) {
        let shifts = self.reload.as_ref().is_some_and(|reload| reload.stage == Stage::Shifting);
        if shifts && self.shift.is_none() && self.to_give_back.is_empty() && !self.steering.has_planned() {
            self.retire();
        }
    }

    /// Reads the file again; an error leaves everything as it is.
    pub(super) fn reload_file(
        &mut self,
        requester: Option<u64>,
        dry_run: bool,
    ) -> Result<Option<String>, Refusal> {
        let mut config = (self.start.file.read_again)().map_err(|text| Refusal::new(78, text, ""))?;
        plan::check(&self.generation.config, &config)?;
        // `scale` stands until the file's own number changes.
        match self.scaled {
            Some((count, from_file)) if from_file == config.daemon.workers => {
                config.daemon.workers = Workers::Count(count);
            }
            _ => self.scaled = None,
        }
        let slot_count = prepare::slot_count(config.daemon.workers);
        if dry_run {
            let mut lines = plan::changes(&self.generation.config, &config);
            if lines.is_empty() {
                lines.push("nothing changes".into());
            }
            lines.push(format!(
                "cost: {slot_count} workers are replaced one by one; every session is handed over"
            ));
            return Ok(Some(lines.join("\n")));
        }
        self.begin_reload(config, slot_count, requester).map(|()| None)
    }

    /// Changes the number of workers.
    pub(super) fn scale(&mut self, count: usize, requester: u64) -> Result<(), Refusal> {
        let mut config = self.generation.config.clone();
        let from_file = self.scaled.map_or(config.daemon.workers, |(_, from_file)| from_file);
        config.daemon.workers = Workers::Count(count);
        self.begin_reload(config, count, Some(requester))?;
        self.scaled = Some((count, from_file));
        Ok(())
    }

    fn begin_reload(
        &mut self,
        mut config: Config,
        slot_count: usize,
        requester: Option<u64>,
    ) -> Result<(), Refusal> {
        if !self.upgrade.as_ref().is_some_and(Upgrade::is_proving) {
            self.check_no_change()?;
        }
        if let Some(slot) = self.slots.iter().skip(slot_count).find(|slot| slot.current.is_none()) {
            let text = format!("slot {} is to go, and its worker is just being replaced", slot.number);
            return Err(Refusal::new(1, text, "try again in a moment"));
        }
        activation::check_change(&self.slots, &config, slot_count)?;
        prepare::check_descriptors(&config, slot_count)?;
        let held = |address| self.generation.places().iter().any(|(_, id)| id.address == address);
        let probed = if config.daemon.share_ports { &[][..] } else { &config.listeners[..] };
        for listener in probed {
            prepare::probe(listener, |address| !held(address))?;
        }
        let admin = self.bind_admin(&config)?;
        let access_log = access_log::open(&config)?;
        plan::carry_over(&self.generation.config, &mut config, |name| self.has_sessions(name));
        let mut generation = Generation::new(self.generation.number + 1, config, slot_count)?;
        generation.before = Rc::downgrade(&self.generation);
        generation.fill_board(&self.overrides, Some(&self.generation));
        let generation = Rc::new(generation);
        let old_slot_count = self.slots.len();
        for number in old_slot_count..slot_count {
            self.slots.push(Slot::new(number));
        }
        self.resize(self.slots.len());
        info!("generation {} is being proved", generation.number);
        let deadline = clock::coarse() + PROVING_LIMIT;
        self.reload = Some(Reload {
            requester,
            generation,
            old_slot_count,
            stage: Stage::Proving(0),
            deadline,
            admin,
            access_log,
        });
        self.prove(0);
        Ok(())
    }

    /// One change of the whole at a time, and none while the daemon leaves.
    pub(super) fn check_no_change(&self) -> Result<(), Refusal> {
        if self.leave.is_some() {
            return Err(Refusal::new(1, "the daemon is leaving", ""));
        }
        let is_under_way = self.reload.is_some()
            || self.shift.is_some()
            || self.upgrade.is_some()
            || self.departure.is_some()
            || !self.lots.is_empty();
        if is_under_way || !self.retiring.is_empty() || !self.announced {
            return Err(Refusal::new(1, "another change is under way", "try again in a moment"));
        }
        Ok(())
    }

    fn resize(&mut self, slot_count: usize) {
        self.supervision.resize(slot_count);
        self.watch.resize(slot_count, self.generation.config.daemon.hang_timeout.as_millis() as u64);
    }

    fn has_sessions(&self, listener: &str) -> bool {
        let generations = self
            .slots
            .iter()
            .chain(&self.retiring)
            .flat_map(|slot| slot.ledgers.iter().map(move |generation| (slot.number, generation)));
        generations.into_iter().any(|(slot, generation)| {
            let index = generation.config.listeners.iter().position(|l| l.name == listener);
            index.is_some_and(|index| generation.counters(slot).listener(index, OfListener::Active).get() > 0)
        })
    }

    /// Starts the new worker of a slot, or begins to swap after the last.
    fn prove(&mut self, slot: usize) {
        let Some(reload) = &mut self.reload else { return };
        if slot == reload.generation.slot_count() {
            return self.commit();
        }
        reload.stage = Stage::Proving(slot);
        let generation = Rc::clone(&reload.generation);
        let token = self.new_token();
        match self.slots[slot].spawn(&self.prepared, &generation, self.poll.registry(), token) {
            Ok(process) => self.slots[slot].next = Some(process),
            Err(error) => self.abort_reload(&format!("worker {slot} could not be started: {error}")),
        }
    }

    /// The new worker of a slot has its sockets.
    pub(super) fn handle_proved(&mut self, slot: usize) {
        if self.reload.as_ref().is_some_and(|reload| reload.stage == Stage::Proving(slot)) {
            self.prove(slot + 1);
        }
    }

    /// Nothing was touched: the new workers end, the old ones never knew.
    pub(super) fn abort_reload(&mut self, why: &str) {
        let Some(reload) = self.reload.take_if(|reload| matches!(reload.stage, Stage::Proving(_))) else {
            return;
        };
        warn!("generation {} was refused: {why}", reload.generation.number);
        for slot in &mut self.slots {
            if let Some(mut process) = slot.next.take() {
                process.end();
                // Reaped as an old one that has nothing to hand over.
                slot.old.push(process);
            }
            // Sockets that only the new generation knew.
            slot.release_all_but(&self.generation);
        }
        let added = self.slots.split_off(reload.old_slot_count);
        self.retiring.extend(added.into_iter().filter(|slot| !slot.old.is_empty()));
        self.resize(reload.old_slot_count);
        self.seen.note_reload(false, why);
        if self.turn_back(why) {
            return;
        }
        self.answer(reload.requester, Err(why.to_string()));
        self.finish_reload_notice();
    }

    fn commit(&mut self) {
        let Some(reload) = &mut self.reload else { return };
        self.generation = Rc::clone(&reload.generation);
        let counters = self.generation.readable.iter().map(AsFd::as_fd);
        let fds: Vec<BorrowedFd> = std::iter::once(self.generation.sealed.as_fd()).chain(counters).collect();
        for slot in &mut self.slots {
            if let Some(process) = &mut slot.current {
                process.tell(&ToWorker::Successors, &fds);
            }
        }
        if let Some(admin) = reload.admin.take() {
            self.prepared.admin = admin;
            self.seen.forget_admin();
        }
        self.prepared.access_log.set_file(reload.access_log.take());
        self.tell_of_access_log();
        for server in self.overrides.keep_those_of(&self.generation.config) {
            warn!("server {server} is gone from the file, and with it what was changed about it");
        }
        self.overrides_changed = true;
        self.commit_upgrade();
        self.swap(0);
    }

    /// The new worker of a slot serves; the old one hands over to it.
    fn swap(&mut self, slot: usize) {
        let Some(reload) = &mut self.reload else { return };
        // Slots that are to go keep their old worker; its flows go next.
        if slot == reload.generation.slot_count() {
            reload.stage = Stage::Shifting;
            reload.deadline = clock::coarse() + SWAP_LIMIT;
            return;
        }
        reload.stage = Stage::Swapping(slot);
        reload.deadline = clock::coarse() + SWAP_LIMIT;
        let generation = Rc::clone(&reload.generation);
        let place = &mut self.slots[slot];
        if place.next.is_none() && place.ledgers.iter().any(|ledger| ledger.number == generation.number) {
            // Its old worker died meanwhile, and the new one took its place.
            return self.swap(slot + 1);
        }
        place.ledgers.push(Rc::clone(&generation));
        let new = place.next.take();
        let old = std::mem::replace(&mut place.current, new);
        self.supervision.handle_replaced(slot, clock::coarse());
        self.watch.begin(slot, clock::coarse());
        self.tables_changed = true;
        if self.slots[slot].current.is_none() {
            // It died after it was proved: replaced as any worker.
            let _ = self.step(crate::supervision::Event::Exited { slot, clean: false });
        }
        // The hand-over first: the new one reads no client's datagram before
        // its flows are there.
        let waits = old.is_some_and(|old| {
            let removed = self.slots[slot].removed_places(&old.generation, &generation);
            self.slots[slot].old.push(old);
            self.hand_over(slot, false, slot, removed)
        });
        self.pair_keepers(slot);
        self.slots[slot].tell(&ToWorker::Serve);
        self.lend_again(slot);
        if self.slots[slot].old.is_empty() {
            self.slots[slot].release_all_but(&generation);
        }
        if !waits {
            self.swap(slot + 1);
        }
    }

    /// The worker that took over has died: what the old ones still have goes to
    /// the next one, before that reads any datagram.
    pub(super) fn hand_over_again(&mut self, slot: usize) {
        self.slots[slot].set_handed_over(false);
        let Slot { current: Some(new), old, .. } = &mut self.slots[slot] else { return };
        old.iter_mut().for_each(|old| keep::pair(old, new, true));
    }

    /// Where a slot loses its worker while others are being swapped, the new one
    /// that was proved for it takes its place at once.
    pub(super) fn take_proved(&mut self, slot: usize) -> bool {
        let swaps = self.reload.as_ref().is_some_and(|reload| matches!(reload.stage, Stage::Swapping(_)));
        let Some(new) = self.slots[slot].next.take_if(|_| swaps) else { return false };
        let place = &mut self.slots[slot];
        place.ledgers.push(Rc::clone(&new.generation));
        place.current = Some(new);
        self.pair_keepers(slot);
        self.slots[slot].tell(&ToWorker::Serve);
        self.watch.begin(slot, clock::coarse());
        self.tables_changed = true;
        let generation = Rc::clone(&self.generation);
        self.slots[slot].release_all_but(&generation);
        true
    }

    /// What an empty neighbour lent to the old worker goes to the new one.
    fn lend_again(&mut self, to: usize) {
        for slot in 0..self.slots.len() {
            if slot != to
                && slot < self.supervision.slot_count()
                && self.supervision.lent_to(slot) == Some(to)
            {
                self.lend(slot, to);
            }
        }
    }

    /// When the first old worker is past its bound.
    pub(super) fn old_deadline(&self) -> Option<Millis> {
        let slots = self.slots.iter().chain(&self.retiring);
        slots.flat_map(|slot| &slot.old).filter_map(|process| process.kill_at).min()
    }

    /// Ends old workers that have not ended by themselves.
    pub(super) fn end_stuck_old(&mut self) {
        let now = clock::coarse();
        for slot in self.slots.iter_mut().chain(&mut self.retiring) {
            for process in &mut slot.old {
                if process.kill_at.take_if(|at| *at <= now).is_some() {
                    warn!(slot = slot.number, pid = process.pid(), "an old worker does not end: killed");
                    process.end();
                }
            }
        }
    }

    /// Joins the last old process of a slot with the current one of another;
    /// false where nobody will tell the end.
    fn hand_over(&mut self, from: usize, retiring: bool, to: usize, removed: Vec<Place>) -> bool {
        let longest = self.generation.config.daemon.drain_timeout.as_millis() as u64;
        let limit = Some(longest);
        let pair = Channel::pair();
        let source = if retiring { &mut self.retiring[from] } else { &mut self.slots[from] };
        let Some(old) = source.old.last_mut() else { return false };
        old.set_bound(longest);
        match pair {
            Ok((ours, theirs)) => {
                let message = ToWorker::HandOver { removed, limit, park: false, shares: false, fault: false };
                old.tell(&message, &[ours.as_fd()]);
                if let Some(new) = &mut self.slots[to].current {
                    new.tell(&ToWorker::TakeOver { flows: true, recovers: false }, &[theirs.as_fd()]);
                }
                true
            }
            Err(error) => {
                warn!(%error, "no channel for a hand-over: the old worker drains");
                old.tell(&ToWorker::Drain { limit }, &[]);
                false
            }
        }
    }

    /// Slots that are too many close their queues and hand over.
    fn retire(&mut self) {
        let Some(reload) = &mut self.reload else { return };
        reload.stage = Stage::Retiring;
        reload.deadline = clock::coarse() + SWAP_LIMIT;
        let slot_count = reload.generation.slot_count();
        let leaving = self.slots.split_off(slot_count);
        self.resize(slot_count);
        // First nothing more comes there, then it is emptied.
        self.update_steering();
        for mut slot in leaving {
            let Some(old) = slot.current.take() else { continue };
            let removed = old.generation.places().into_iter().map(|(place, _)| place).collect();
            let number = slot.number;
            slot.old.push(old);
            self.retiring.push(slot);
            self.hand_over(self.retiring.len() - 1, true, number % slot_count, removed);
        }
        self.check_reload_done();
    }

    /// An old worker has handed over, or is gone.
    pub(super) fn handle_handed_over(&mut self, slot: usize, retiring: bool) {
        let Some(reload) = &self.reload else { return };
        match reload.stage {
            Stage::Swapping(swapping) if swapping == slot && !retiring => {
                if self.slots[slot].has_handed_over() {
                    self.swap(slot + 1);
                }
            }
            Stage::Retiring => self.check_reload_done(),
            Stage::Proving(_) | Stage::Swapping(_) | Stage::Shifting => {}
        }
    }

    fn check_reload_done(&mut self) {
        let retired = self.retiring.iter().all(|slot| slot.has_handed_over());
        let done = |reload: &mut Reload| reload.stage == Stage::Retiring && retired;
        let Some(reload) = self.reload.take_if(done) else { return };
        info!("generation {} serves with {} workers", reload.generation.number, self.slots.len());
        self.strangers.expect();
        self.look_for_strangers();
        let text = format!("generation {} serves", reload.generation.number);
        if !self.finish_upgrade(&text) {
            self.answer(reload.requester, Ok(text.clone()));
        }
        self.seen.note_reload(true, &text);
        self.finish_reload_notice();
    }

    /// Moves a reload on that waits for somebody too long.
    pub(super) fn handle_reload_deadline(&mut self) {
        let Some(reload) = self.reload.as_ref().filter(|reload| reload.deadline <= clock::coarse()) else {
            return;
        };
        match reload.stage {
            Stage::Proving(slot) => self.abort_reload(&format!("worker {slot} did not open its sockets")),
            Stage::Swapping(slot) => {
                warn!(slot, "the old worker takes long to hand over: it is left to drain");
                self.slots[slot].set_handed_over(true);
                self.swap(slot + 1);
            }
            Stage::Shifting => {
                warn!("flows take long to move: those of slots that go follow their slot's successor");
                self.to_give_back.clear();
                self.slots.iter_mut().for_each(|slot| slot.set_handed_over(true));
                self.retire();
            }
            Stage::Retiring => {
                warn!("retired workers take long to hand over: they are left to drain");
                for slot in &mut self.retiring {
                    slot.set_handed_over(true);
                }
                self.check_reload_done();
            }
        }
    }

    /// Moves sessions until every slot has as many, to within one.
    pub(super) fn rebalance(&mut self, requester: u64) -> Result<(), Refusal> {
        if self.reload.is_some()
            || self.upgrade.is_some()
            || self.transfers.under_way.is_some()
            || self.leave.is_some()
        {
            return Err(Refusal::new(1, "another change is under way", "try again in a moment"));
        }
        let active = |slot: &Slot| -> u64 {
            let counters = self.generation.counters(slot.number);
            // Flows are where their datagrams come, and stay there.
            let listeners = self.generation.config.listeners.iter().enumerate();
            let tcp = listeners.filter(|(_, listener)| listener.mode == Mode::Tcp);
            tcp.map(|(index, _)| counters.listener(index, OfListener::Active).get()).sum()
        };
        let counts: Vec<usize> = self.slots.iter().map(|slot| active(slot) as usize).collect();
        let waiting = even_out(&counts);
        let planned = waiting.iter().map(|(_, _, count)| count).sum();
        let waiting = waiting.into();
        self.transfers = Transfers { waiting, under_way: None, requester: Some(requester), planned };
        self.next_transfer();
        Ok(())
    }

    /// Begins the next transfer, or tells that all are done.
    pub(super) fn next_transfer(&mut self) {
        while let Some((from, to, count)) = self.transfers.waiting.pop_front() {
            let Ok((ours, theirs)) = Channel::pair() else { continue };
            if from >= self.slots.len() || to >= self.slots.len() {
                continue;
            }
            if let Some(process) = &mut self.slots[to].current {
                process.tell(&ToWorker::TakeOver { flows: false, recovers: false }, &[theirs.as_fd()]);
            }
            if let Some(process) = &mut self.slots[from].current {
                process.tell(&ToWorker::Share { count }, &[ours.as_fd()]);
                self.transfers.under_way = Some(from);
                return;
            }
        }
        self.transfers.under_way = None;
        if let Some(requester) = self.transfers.requester.take() {
            let text = format!("{} sessions moved", self.transfers.planned);
            self.answer(Some(requester), Ok(text));
        }
    }

    /// A worker that serves has shared, or is gone.
    pub(super) fn handle_shared(&mut self, slot: usize) {
        if self.transfers.under_way == Some(slot) {
            self.next_transfer();
        }
    }

    /// A token that no process has.
    pub(super) fn new_token(&mut self) -> Token {
        self.last_token += 1;
        Token(self.last_token)
    }
}

/// Which slot gives how many to which, so that all have as many to within one.
fn even_out(counts: &[usize]) -> Vec<(usize, usize, usize)> {
    let (sum, slots) = (counts.iter().sum::<usize>(), counts.len());
    // The fullest keep the odd ones: that moves the fewest.
    let mut order: Vec<usize> = (0..slots).collect();
    order.sort_by_key(|&slot| std::cmp::Reverse(counts[slot]));
    let mut target = vec![sum / slots; slots];
    for &slot in order.iter().take(sum % slots) {
        target[slot] += 1;
    }
    let mut need: VecDeque<(usize, usize)> =
        (0..slots).filter(|&s| counts[s] < target[s]).map(|s| (s, target[s] - counts[s])).collect();
    let mut transfers = Vec::new();
    for from in 0..slots {
        let mut left = counts[from].saturating_sub(target[from]);
        while left > 0 {
            let Some((to, wanted)) = need.front_mut() else { break };
            let count = left.min(*wanted);
            transfers.push((from, *to, count));
            left -= count;
            *wanted -= count;
            if *wanted == 0 {
                need.pop_front();
            }
        }
    }
    transfers
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everybody_ends_with_as_many_and_the_fewest_move(counts in prop::collection::vec(0usize..1000, 1..65)) {
            let transfers = even_out(&counts);
            let mut after = counts.clone();
            for (from, to, count) in &transfers {
                after[*from] -= count;
                after[*to] += count;
            }
            let (least, most) = (after.iter().min().unwrap(), after.iter().max().unwrap());
            prop_assert!(most - least <= 1);
            let moved: usize = transfers.iter().map(|(_, _, count)| count).sum();
            let floor = counts.iter().sum::<usize>() / counts.len();
            let needed: usize = counts.iter().map(|&count| floor.saturating_sub(count)).sum();
            let over: usize = counts.iter().map(|&count| count.saturating_sub(floor + 1)).sum();
            prop_assert!(moved <= needed.max(over) + counts.len());
        }
    }
}
