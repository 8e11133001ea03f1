//! The workers' heartbeats: read, judged by `supervision::watch`, acted on.

use tracing::warn;

use super::slot::Slot;
use super::{Refusal, Supervisor};
use crate::control::ToWorker;
use crate::counters::Process;
use crate::supervision::watch::{Sign, Verdict};
use crate::supervision::{Event, Phase};
use crate::sys::clock;

impl Supervisor {
    /// Looks whether every worker's loop turns, and has those replaced that
    /// are stuck. Costs a few words of shared memory, and where some sleep
    /// while others work a look at their queues.
    pub(super) fn watch_workers(&mut self) -> Result<(), Refusal> {
        self.doubt_sleepers();
        let signs: Vec<Sign> =
            (0..self.supervision.slot_count().min(self.slots.len())).map(|slot| self.sign(slot)).collect();
        for verdict in self.watch.look(clock::coarse(), &signs) {
            match verdict {
                Verdict::Ask(slot) => self.slots[slot].tell(&ToWorker::Ask),
                Verdict::Hung { slot, silence } => {
                    warn!(
                        slot,
                        pid = self.slots[slot].pid(),
                        "worker hung: no sign of life for {silence} ms: killed"
                    );
                    self.step(Event::Hung(slot))?;
                }
            }
        }
        Ok(())
    }

    /// A worker that sleeps while somebody waits at its sockets may be frozen in
    /// a way that nobody is told of: it has to show that it turns.
    fn doubt_sleepers(&mut self) {
        let now = clock::coarse();
        let slots = &self.slots;
        let is_waited_for = |slot: &usize| slots.get(*slot).is_some_and(Slot::is_waited_for);
        let doubtful: Vec<usize> = self.watch.sleepers(now).filter(is_waited_for).collect();
        for slot in doubtful {
            self.watch.doubt(slot, now);
        }
    }

    fn sign(&self, slot: usize) -> Sign {
        // A slot that a reload adds has no worker of its own yet.
        if self.slots[slot].current.is_none() {
            return Sign::Absent;
        }
        match self.supervision.phase(slot) {
            Phase::Starting => Sign::Starting,
            Phase::Ready { .. } | Phase::Draining => Sign::of_beat(self.slots[slot].count(Process::Beat)),
            Phase::Unborn | Phase::Waiting { .. } | Phase::Hung { .. } | Phase::Gone => Sign::Absent,
        }
    }
}
