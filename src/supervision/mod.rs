//! Which worker lives, is started, drained or helped out: the supervisor's
//! decisions, without its processes.
//!
//! ```text
//!             Spawn             Opened, Ready
//!   Waiting ---------> Starting --------------> Ready --Drain--> Draining --clean exit--> Gone
//!      ^                  |                       |                  |
//!      +------ exit ------+-----------------------+----- crash ------+
//! ```
//!
//! Owned by the supervisor, one slot for each worker's place, 1 to 64. Slots
//! are first filled one after the other, each when the one before has opened
//! its sockets: the order of listen(2) is the order in the kernel's group.
//! While a slot that has sockets is empty for more than a second, a neighbour
//! accepts for it as well, so that nobody waits in a queue without a reader.
//! A worker that was found hung (`watch`) is killed; until it is gone its slot
//! counts as empty. It ends with `Finish`, when a leave was asked for and every slot is gone.

mod backoff;
#[cfg(test)]
mod tests;
pub mod watch;

pub use backoff::Backoff;

use serde::{Deserialize, Serialize};

/// How long a slot may be empty before a neighbour helps out, in milliseconds.
pub const LEND_AFTER: u64 = 1_000;

/// How long a killed process may take to end, in milliseconds: freeing the
/// memory and the sockets of a large one takes a while.
const END_PATIENCE: u64 = 10_000;

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The daemon starts.
    Begin,
    /// The slot's worker has its sockets open, and the supervisor holds them.
    Opened(usize),
    /// The slot's worker accepts.
    Ready(usize),
    /// The slot's worker is gone; `clean` = it had finished its work.
    #[allow(missing_docs)]
    Exited { slot: usize, clean: bool },
    /// The slot's worker gives no sign of life.
    Hung(usize),
    /// The daemon is to leave gracefully.
    Leave,
    /// Time passed.
    Tick,
}

/// Something to do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a worker for the slot.
    Spawn(usize),
    /// The slot's sockets are polled by this neighbour as well.
    #[allow(missing_docs)]
    Lend { slot: usize, to: usize },
    /// The neighbour stops doing so.
    #[allow(missing_docs)]
    Recall { slot: usize, from: usize },
    /// The slot's worker is to drain.
    Drain(usize),
    /// The slot's process is to be killed.
    Kill(usize),
    /// Every worker accepts on every listener, for the first time.
    Announce,
    /// No worker is left.
    Finish,
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Its first turn has not come.
    Unborn,
    /// Empty until then.
    #[allow(missing_docs)]
    Waiting { until: u64 },
    /// A process lives and does not accept yet.
    Starting,
    /// A process accepts.
    #[allow(missing_docs)]
    Ready { since: u64 },
    /// A process finishes its work.
    Draining,
    /// A process that gives no sign of life was killed, and is not gone yet.
    #[allow(missing_docs)]
    Hung { since: u64, ready_for: u64 },
    /// Done for good.
    Gone,
}

/// All slots; what is written of it, another image of the supervisor reads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Supervision {
    slots: Vec<Slot>,
    leaving: bool,
    announced: bool,
    finished: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Slot {
    phase: Phase,
    opened: bool,
    empty_since: Option<u64>,
    lent_to: Option<usize>,
    backoff: Backoff,
    restarts: u64,
}

impl Slot {
    fn unborn() -> Slot {
        Slot {
            phase: Phase::Unborn,
            opened: false,
            empty_since: None,
            lent_to: None,
            backoff: Backoff::default(),
            restarts: 0,
        }
    }
}

impl Supervision {
    /// So many slots, all unborn.
    pub fn new(slot_count: usize) -> Supervision {
        let slots = (0..slot_count).map(|_| Slot::unborn()).collect();
        Supervision { slots, leaving: false, announced: false, finished: false }
    }

    /// Takes in what happened and answers what to do.
    pub fn step(&mut self, event: Event, now: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Begin => self.spawn_next_unborn(&mut actions),
            Event::Opened(slot) => {
                self.slots[slot].opened = true;
                if !self.leaving {
                    self.spawn_next_unborn(&mut actions);
                }
            }
            Event::Ready(slot) => self.handle_ready(slot, now, &mut actions),
            Event::Exited { slot, clean } => self.handle_exit(slot, clean, now),
            Event::Hung(slot) => self.handle_hung(slot, now, &mut actions),
            Event::Leave => self.handle_leave(now, &mut actions),
            Event::Tick => {}
        }
        self.spawn_due(now, &mut actions);
        self.lend_due(now, &mut actions);
        if !self.announced && self.is_all_ready() {
            self.announced = true;
            actions.push(Action::Announce);
        }
        if self.leaving && !self.finished && self.slots.iter().all(|slot| slot.phase == Phase::Gone) {
            self.finished = true;
            actions.push(Action::Finish);
        }
        actions
    }

    fn spawn_next_unborn(&mut self, actions: &mut Vec<Action>) {
        if let Some(slot) = self.slots.iter().position(|slot| slot.phase == Phase::Unborn) {
            self.slots[slot].phase = Phase::Starting;
            actions.push(Action::Spawn(slot));
        }
    }

    fn handle_ready(&mut self, slot: usize, now: u64, actions: &mut Vec<Action>) {
        let state = &mut self.slots[slot];
        state.phase = Phase::Ready { since: now };
        state.empty_since = None;
        if let Some(from) = state.lent_to.take() {
            actions.push(Action::Recall { slot, from });
        }
        if self.leaving {
            self.drain(slot, actions);
        }
    }

    /// It is replaced when it is gone. One that cannot even die (a dead disk)
    /// leaves its slot empty, and a neighbour helps out.
    fn handle_hung(&mut self, slot: usize, now: u64, actions: &mut Vec<Action>) {
        let ready_for = match self.slots[slot].phase {
            Phase::Ready { since } => now.saturating_sub(since),
            Phase::Starting | Phase::Draining => 0,
            Phase::Unborn | Phase::Waiting { .. } | Phase::Hung { .. } | Phase::Gone => return,
        };
        self.end_loans_of(slot);
        let state = &mut self.slots[slot];
        state.phase = Phase::Hung { since: now, ready_for };
        state.empty_since = Some(state.empty_since.unwrap_or(now));
        actions.push(Action::Kill(slot));
    }

    /// What this slot's worker accepted for is nobody's again.
    fn end_loans_of(&mut self, slot: usize) {
        for other in &mut self.slots {
            if other.lent_to == Some(slot) {
                other.lent_to = None;
            }
        }
    }

    fn handle_exit(&mut self, slot: usize, clean: bool, now: u64) {
        self.end_loans_of(slot);
        let leaving = self.leaving;
        let state = &mut self.slots[slot];
        let ready_for = match state.phase {
            Phase::Ready { since } => now.saturating_sub(since),
            Phase::Hung { ready_for, .. } => ready_for,
            _ => 0,
        };
        // What it did not open, nobody waits for.
        if leaving && (clean || !state.opened) {
            state.phase = Phase::Gone;
            return;
        }
        state.restarts += 1;
        state.empty_since = Some(state.empty_since.unwrap_or(now));
        state.phase = Phase::Waiting { until: now + state.backoff.handle_death(ready_for) };
    }

    /// Earlier deaths of this slot's workers are no reason to wait.
    pub fn forgive(&mut self, slot: usize) {
        self.slots[slot].backoff = Backoff::default();
    }

    fn handle_leave(&mut self, now: u64, actions: &mut Vec<Action>) {
        if self.leaving {
            return;
        }
        self.leaving = true;
        for slot in 0..self.slots.len() {
            match self.slots[slot].phase {
                Phase::Unborn => self.slots[slot].phase = Phase::Gone,
                // Somebody may wait in its queue: fill it once more, now.
                Phase::Waiting { .. } if self.slots[slot].opened => {
                    self.slots[slot].phase = Phase::Waiting { until: now };
                }
                Phase::Waiting { .. } => self.slots[slot].phase = Phase::Gone,
                Phase::Ready { .. } => self.drain(slot, actions),
                // Drained when it is ready.
                Phase::Starting | Phase::Draining | Phase::Hung { .. } | Phase::Gone => {}
            }
        }
    }

    fn drain(&mut self, slot: usize, actions: &mut Vec<Action>) {
        self.slots[slot].phase = Phase::Draining;
        actions.push(Action::Drain(slot));
    }

    fn spawn_due(&mut self, now: u64, actions: &mut Vec<Action>) {
        for (slot, state) in self.slots.iter_mut().enumerate() {
            if let Phase::Waiting { until } = state.phase
                && until <= now
            {
                state.phase = Phase::Starting;
                actions.push(Action::Spawn(slot));
            }
        }
    }

    fn lend_due(&mut self, now: u64, actions: &mut Vec<Action>) {
        for slot in 0..self.slots.len() {
            let state = &self.slots[slot];
            let due = state.opened
                && state.lent_to.is_none()
                && state.empty_since.is_some_and(|since| since + LEND_AFTER <= now);
            if due && let Some(to) = self.neighbour(slot) {
                self.slots[slot].lent_to = Some(to);
                actions.push(Action::Lend { slot, to });
            }
        }
    }

    /// The next slot in the ring whose worker accepts.
    fn neighbour(&self, slot: usize) -> Option<usize> {
        let count = self.slots.len();
        (1..count)
            .map(|step| (slot + step) % count)
            .find(|&other| matches!(self.slots[other].phase, Phase::Ready { .. }))
    }

    /// The slot's process was replaced by one that was started for it beforehand
    /// and accepts as soon as it can.
    pub fn handle_replaced(&mut self, slot: usize, now: u64) {
        let state = &mut self.slots[slot];
        state.opened = true;
        state.phase = match state.phase {
            Phase::Ready { .. } => Phase::Ready { since: now },
            _ => Phase::Starting,
        };
    }

    /// There are so many slots from now on. New ones wait for
    /// `handle_replaced`; those past the end are forgotten.
    pub fn resize(&mut self, slot_count: usize) {
        self.slots.truncate(slot_count);
        for state in &mut self.slots {
            state.lent_to = state.lent_to.filter(|&to| to < slot_count);
        }
        self.slots.resize_with(slot_count, || Slot { phase: Phase::Starting, ..Slot::unborn() });
    }

    /// Whether every slot's worker accepts.
    pub fn is_all_ready(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot.phase, Phase::Ready { .. }))
    }

    /// When a `Tick` is due at the latest, in milliseconds.
    pub fn next_deadline(&self) -> Option<u64> {
        let deadlines = self.slots.iter().enumerate().flat_map(|(slot, state)| {
            let spawn = match state.phase {
                Phase::Waiting { until } => Some(until),
                _ => None,
            };
            let lendable = state.opened && state.lent_to.is_none() && self.neighbour(slot).is_some();
            let lend = state.empty_since.filter(|_| lendable).map(|since| since + LEND_AFTER);
            [spawn, lend]
        });
        deadlines.flatten().min()
    }

    /// How many slots there are.
    pub fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// What a slot is doing.
    pub fn phase(&self, slot: usize) -> Phase {
        self.slots[slot].phase
    }

    /// Whether somebody sees to the slot: its worker beats (`watch` would have
    /// found it hung), is being replaced, or a neighbour accepts for it. Where
    /// a killed process does not go and nobody can help, only an end of the
    /// whole daemon is left.
    pub fn is_tended(&self, slot: usize, now: u64) -> bool {
        match self.slots[slot].phase {
            Phase::Hung { since, .. } => {
                self.slots[slot].lent_to.is_some() || now.saturating_sub(since) < END_PATIENCE
            }
            Phase::Unborn
            | Phase::Waiting { .. }
            | Phase::Starting
            | Phase::Ready { .. }
            | Phase::Draining
            | Phase::Gone => true,
        }
    }

    /// How often a slot's worker was replaced.
    pub fn restarts(&self, slot: usize) -> u64 {
        self.slots[slot].restarts
    }

    /// The neighbour that accepts for an empty slot.
    pub fn lent_to(&self, slot: usize) -> Option<usize> {
        self.slots[slot].lent_to
    }
}
