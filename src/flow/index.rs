//! Finds a flow's place by its name, without holding the name twice.
//!
//! Open addressing with linear probing over places of a slab: four bytes a
//! cell, filled to at most three quarters, closed up behind what is removed.
//! The names stay in the slab and are lent to each call. Grows by doubling
//! and keeps that size; the number of flows is bounded by the caller. The hash
//! is keyed by a seed, so that nobody outside can make names meet.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::FlowKey;

const FREE: u32 = u32::MAX;
const LEAST_CELLS: usize = 64;

/// Places by name.
#[derive(Debug)]
pub(super) struct Index {
    cells: Vec<u32>,
    count: usize,
    seed: u64,
}

impl Index {
    pub(super) fn new(seed: u64) -> Index {
        Index { cells: vec![FREE; LEAST_CELLS], count: 0, seed }
    }

    /// The place of this name.
    pub(super) fn find(&self, name: &FlowKey, name_at: impl Fn(u32) -> FlowKey) -> Option<u32> {
        let mut cell = self.home(name);
        while self.cells[cell] != FREE {
            if name_at(self.cells[cell]) == *name {
                return Some(self.cells[cell]);
            }
            cell = self.next(cell);
        }
        None
    }

    /// Notes a name that is not there yet.
    pub(super) fn insert(&mut self, name: &FlowKey, place: u32, name_at: impl Fn(u32) -> FlowKey) {
        if (self.count + 1) * 4 > self.cells.len() * 3 {
            let old = std::mem::take(&mut self.cells);
            self.cells = vec![FREE; old.len() * 2];
            for place in old.into_iter().filter(|place| *place != FREE) {
                self.put(&name_at(place), place);
            }
        }
        self.put(name, place);
        self.count += 1;
    }

    fn put(&mut self, name: &FlowKey, place: u32) {
        let mut cell = self.home(name);
        while self.cells[cell] != FREE {
            cell = self.next(cell);
        }
        self.cells[cell] = place;
    }

    /// Forgets a name; the slab must still have it.
    pub(super) fn remove(&mut self, name: &FlowKey, place: u32, name_at: impl Fn(u32) -> FlowKey) {
        let mut hole = self.home(name);
        while self.cells[hole] != place {
            debug_assert_ne!(self.cells[hole], FREE, "a living flow is in the index");
            hole = self.next(hole);
        }
        self.count -= 1;
        let mut cell = hole;
        loop {
            self.cells[hole] = FREE;
            // What comes behind moves up, unless its home lies behind the hole.
            loop {
                cell = self.next(cell);
                if self.cells[cell] == FREE {
                    return;
                }
                let home = self.home(&name_at(self.cells[cell]));
                if self.distance(home, cell) >= self.distance(hole, cell) {
                    break;
                }
            }
            self.cells[hole] = self.cells[cell];
            hole = cell;
        }
    }

    fn home(&self, name: &FlowKey) -> usize {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.seed);
        name.hash(&mut hasher);
        hasher.finish() as usize & (self.cells.len() - 1)
    }

    fn next(&self, cell: usize) -> usize {
        (cell + 1) & (self.cells.len() - 1)
    }

    fn distance(&self, from: usize, to: usize) -> usize {
        to.wrapping_sub(from) & (self.cells.len() - 1)
    }
}
