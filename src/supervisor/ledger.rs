//! Counters that outlive their process: what the steward is told to add up.
//!
//! A slot's counters lie in its present generation's region and, while old
//! processes still count, in those of earlier ones. When nobody counts in one
//! any more it is added to the past, and its memory is gone: a thousand
//! reloads leave as much behind as one.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use tracing::error;

use super::Supervisor;
use super::generation::Generation;
use super::slot::Slot;
use crate::control::{Table, ToSteward};

impl Supervisor {
    /// Adds to the past what nobody counts in any more.
    pub(super) fn fold_ledgers(&mut self) {
        let mut finished: Vec<(usize, Rc<Generation>)> = Vec::new();
        let current = &self.generation;
        for slot in self.slots.iter_mut().chain(&mut self.retiring) {
            let counting: Vec<u64> = slot.processes().map(|process| process.generation.number).collect();
            // A slot that stays counts on in the present generation, though its
            // process may just be dead.
            let is_present = |number| number == current.number && slot.number < current.slot_count();
            let (keep, fold) =
                std::mem::take(&mut slot.ledgers).into_iter().partition::<Vec<_>, _>(|ledger| {
                    counting.contains(&ledger.number) || is_present(ledger.number)
                });
            slot.ledgers = keep;
            finished.extend(fold.into_iter().map(|ledger| (slot.number, ledger)));
        }
        if finished.is_empty() {
            return;
        }
        if let Err(error) = self.add_to_past(&finished) {
            error!("counters of earlier workers are lost: {}", error.text);
        }
        self.tables_changed = true;
        self.tell_steward();
    }

    fn add_to_past(&mut self, finished: &[(usize, Rc<Generation>)]) -> Result<(), super::Refusal> {
        let old_count = self.past.as_ref().map_or(0, Generation::slot_count);
        let slot_count = finished.iter().map(|(slot, _)| slot + 1).max().unwrap_or(0).max(old_count);
        let (number, config) = (self.generation.number, self.generation.config.clone());
        let past = Generation::new(number, config, slot_count)?;
        if let Some(old) = &self.past {
            for slot in 0..old.slot_count() {
                past.counters(slot).add_all(&past.config, &old.counters(slot), &old.config);
            }
        }
        for (slot, ledger) in finished {
            past.counters(*slot).add_all(&past.config, &ledger.counters(*slot), &ledger.config);
        }
        self.past = Some(past);
        Ok(())
    }

    /// Tells the steward where all counters are, in one message, so that no
    /// sum goes back in between.
    pub(super) fn send_tables(&mut self) -> bool {
        let ledgers = self
            .slots
            .iter()
            .chain(&self.retiring)
            .flat_map(|slot: &Slot| slot.ledgers.iter().map(|ledger| (slot.number, ledger.as_ref())));
        let past = self.past.iter().flat_map(|past| (0..past.slot_count()).map(move |slot| (slot, past)));
        let mut configs: Vec<&Generation> = vec![&self.generation];
        let mut known: HashMap<*const Generation, usize> = HashMap::from([(Rc::as_ptr(&self.generation), 0)]);
        let (mut tables, mut regions) = (Vec::new(), Vec::new());
        for (slot, generation) in ledgers.chain(past) {
            let config = *known.entry(std::ptr::from_ref(generation)).or_insert_with(|| {
                configs.push(generation);
                configs.len() - 1
            });
            tables.push(Table { slot, config });
            regions.push(generation.readable[slot].as_fd());
        }
        // The past has no workers, and nobody reads a board of its.
        let is_past =
            |generation: &Generation| self.past.as_ref().is_some_and(|past| std::ptr::eq(past, generation));
        let boards: Vec<usize> = (0..configs.len()).filter(|&config| !is_past(configs[config])).collect();
        let sealed = configs.iter().map(|generation| generation.sealed.as_fd());
        let written = boards.iter().map(|&config| configs[config].board.as_fd());
        let fds: Vec<BorrowedFd> = sealed.chain(written).chain(regions).collect();
        let (generation, config_count) = (self.generation.number, configs.len());
        let message = ToSteward::Tables { generation, config_count, boards, tables };
        self.steward.send(&message, &fds)
    }
}
