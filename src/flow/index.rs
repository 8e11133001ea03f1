//! Finds a flow's place by its name, without holding the name twice.
//!
//! Open addressing with linear probing over places of a slab: four bytes a
//! cell and one of the name's hash, so that a look at another flow, which is
//! seldom in the processor's caches, is made for one in 256 of those that are
//! passed by. Filled to at most three quarters, closed up behind what is
//! removed. The names stay in the slab and are lent to each call. Grows by
//! doubling and keeps that size; the number of flows is bounded by the caller.
//! The hash is keyed by a seed.

use super::name::Name;

const FREE: u32 = u32::MAX;
const LEAST_CELLS: usize = 64;

/// Places by name.
#[derive(Debug)]
pub(super) struct Index {
    cells: Vec<u32>,
    /// The upper byte of the hash of each cell's name.
    tags: Vec<u8>,
    count: usize,
    seed: u64,
}

impl Index {
    pub(super) fn new(seed: u64) -> Index {
        Index { cells: vec![FREE; LEAST_CELLS], tags: vec![0; LEAST_CELLS], count: 0, seed }
    }

    /// The place of this name.
    pub(super) fn find(&self, name: &Name, is_at: impl Fn(u32) -> bool) -> Option<u32> {
        let (mut cell, tag) = self.home(name);
        while self.cells[cell] != FREE {
            if self.tags[cell] == tag && is_at(self.cells[cell]) {
                return Some(self.cells[cell]);
            }
            cell = self.next(cell);
        }
        None
    }

    /// Notes a name that is not there yet.
    pub(super) fn insert(&mut self, name: &Name, place: u32, name_at: impl Fn(u32) -> Name) {
        if (self.count + 1) * 4 > self.cells.len() * 3 {
            let doubled = self.cells.len() * 2;
            let old = std::mem::replace(&mut self.cells, vec![FREE; doubled]);
            self.tags = vec![0; doubled];
            for place in old.into_iter().filter(|place| *place != FREE) {
                self.put(&name_at(place), place);
            }
        }
        self.put(name, place);
        self.count += 1;
    }

    fn put(&mut self, name: &Name, place: u32) {
        let (mut cell, tag) = self.home(name);
        while self.cells[cell] != FREE {
            cell = self.next(cell);
        }
        (self.cells[cell], self.tags[cell]) = (place, tag);
    }

    /// Forgets a name; the slab must still have it.
    pub(super) fn remove(&mut self, name: &Name, place: u32, name_at: impl Fn(u32) -> Name) {
        let (mut hole, _) = self.home(name);
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
                let (home, _) = self.home(&name_at(self.cells[cell]));
                if self.distance(home, cell) >= self.distance(hole, cell) {
                    break;
                }
            }
            (self.cells[hole], self.tags[hole]) = (self.cells[cell], self.tags[cell]);
            hole = cell;
        }
    }

    /// Where a name belongs, and its tag.
    fn home(&self, name: &Name) -> (usize, u8) {
        let hash = name.hash(self.seed);
        (hash as usize & (self.cells.len() - 1), (hash >> 56) as u8)
    }

    fn next(&self, cell: usize) -> usize {
        (cell + 1) & (self.cells.len() - 1)
    }

    fn distance(&self, from: usize, to: usize) -> usize {
        to.wrapping_sub(from) & (self.cells.len() - 1)
    }
}
