//! Which slot has which bucket.
//!
//! A value of 1024 bytes, owned by the supervisor and copied into the page
//! that the kernel's program reads. Every slot has the floor or the ceiling of
//! what it is due; a change gives away the fewest buckets that this allows.

use super::MAX_SLOTS;

/// How many buckets there are.
pub const BUCKET_COUNT: usize = 1024;

/// A bucket of a table that is nobody's yet.
const NOBODY: u8 = u8::MAX;

/// A slot for each bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    slots: [u8; BUCKET_COUNT],
}

/// A bucket that a change gives to another slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Move {
    pub bucket: usize,
    pub from: usize,
    pub to: usize,
}

impl Table {
    /// A first table: slots get buckets by weight.
    pub fn new(weights: &[u32]) -> Table {
        Table { slots: [NOBODY; BUCKET_COUNT] }.refilled(weights)
    }

    /// A table whose rows are CPUs, `2^row_shift` buckets each. A slot belongs
    /// to the CPU `cpus[slot % cpus.len()]`; the row of a CPU without a slot
    /// that has a weight is shared by all.
    pub fn by_cpu(weights: &[u32], cpus: &[usize], row_shift: u32) -> Table {
        let row_length = 1 << row_shift;
        let row_count = BUCKET_COUNT / row_length;
        let live: Vec<usize> = live(weights).collect();
        if live.is_empty() {
            return Table::new(&vec![1; weights.len()]);
        }
        let mut slots = [0; BUCKET_COUNT];
        for (row, buckets) in slots.chunks_exact_mut(row_length).enumerate() {
            let own: Vec<usize> =
                live.iter().copied().filter(|slot| cpus[slot % cpus.len()] % row_count == row).collect();
            let members = if own.is_empty() { &live } else { &own };
            for (at, bucket) in buckets.iter_mut().enumerate() {
                // By row, so that what is left over does not always fall to the first slots.
                *bucket = members[(at + row) % members.len()] as u8;
            }
        }
        Table { slots }
    }

    /// The table that gives every slot its due by weight and differs from this
    /// one in the fewest buckets. Without any weight: the same table, since
    /// nobody is there to take anything over.
    pub fn refilled(&self, weights: &[u32]) -> Table {
        assert!((1..=MAX_SLOTS).contains(&weights.len()), "1 to 64 slots");
        let have = self.counts(weights.len());
        let Some(due) = due(weights, &have) else {
            return match self.slots.contains(&NOBODY) {
                true => self.refilled(&vec![1; weights.len()]),
                false => self.clone(),
            };
        };
        let mut slots = self.slots;
        let mut surplus: Vec<usize> =
            have.iter().zip(&due).map(|(have, due)| have.saturating_sub(*due)).collect();
        for slot in &mut slots {
            match surplus.get_mut(usize::from(*slot)) {
                Some(0) => {}
                Some(count) => {
                    *count -= 1;
                    *slot = NOBODY;
                }
                // A slot that is no more.
                None => *slot = NOBODY,
            }
        }
        let mut missing: Vec<usize> =
            due.iter().zip(&have).map(|(due, have)| due.saturating_sub(*have)).collect();
        let mut next = 0;
        for slot in slots.iter_mut().filter(|slot| **slot == NOBODY) {
            // Dealt in turn, so that neighbours in the table differ.
            while missing[next] == 0 {
                next = (next + 1) % missing.len();
            }
            missing[next] -= 1;
            *slot = next as u8;
            next = (next + 1) % missing.len();
        }
        Table { slots }
    }

    /// The buckets that change hands from this table to another.
    pub fn moves<'t>(&'t self, to: &'t Table) -> impl Iterator<Item = Move> + 't {
        let pairs = self.slots.iter().zip(&to.slots).enumerate();
        pairs.filter(|(_, (from, to))| from != to).map(|(bucket, (from, to))| Move {
            bucket,
            from: usize::from(*from),
            to: usize::from(*to),
        })
    }

    /// Whose bucket it is.
    pub fn slot(&self, bucket: usize) -> usize {
        usize::from(self.slots[bucket])
    }

    /// How many buckets each slot has.
    pub fn counts(&self, slot_count: usize) -> Vec<usize> {
        let mut counts = vec![0; slot_count];
        for slot in self.slots {
            if let Some(count) = counts.get_mut(usize::from(slot)) {
                *count += 1;
            }
        }
        counts
    }

    /// The part of all buckets that each slot has.
    pub fn shares(&self, slot_count: usize) -> Vec<f64> {
        self.counts(slot_count).into_iter().map(|count| count as f64 / BUCKET_COUNT as f64).collect()
    }

    /// A table that was written out by `bytes`.
    pub fn from_bytes(slots: [u8; BUCKET_COUNT]) -> Table {
        Table { slots }
    }

    /// As the page has it.
    pub fn bytes(&self) -> &[u8; BUCKET_COUNT] {
        &self.slots
    }
}

/// The slots that have a weight.
fn live(weights: &[u32]) -> impl Iterator<Item = usize> + '_ {
    (0..weights.len()).filter(|&slot| weights[slot] > 0)
}

/// How many buckets each slot is to have: the floor of its part, and one more
/// for as many as it takes to give away all. Those come first that have more
/// than the floor already, so that nothing moves for the sake of rounding.
/// `None` where no slot has a weight.
fn due(weights: &[u32], have: &[usize]) -> Option<Vec<usize>> {
    let sum: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    if sum == 0 {
        return None;
    }
    let exact = |slot: usize| u64::from(weights[slot]) * BUCKET_COUNT as u64;
    let mut due: Vec<usize> = (0..weights.len()).map(|slot| (exact(slot) / sum) as usize).collect();
    let left = BUCKET_COUNT - due.iter().sum::<usize>();
    let mut order: Vec<usize> = (0..weights.len()).filter(|&slot| exact(slot) % sum > 0).collect();
    order.sort_by_key(|&slot| (have[slot] <= due[slot], u64::MAX - exact(slot) % sum, slot));
    for slot in order.into_iter().take(left) {
        due[slot] += 1;
    }
    Some(due)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn floor_or_ceiling(table: &Table, weights: &[u32]) {
        let sum: u32 = weights.iter().sum();
        for (slot, count) in table.counts(weights.len()).into_iter().enumerate() {
            let exact = weights[slot] as usize * BUCKET_COUNT;
            let (floor, ceiling) = (exact / sum as usize, exact.div_ceil(sum as usize));
            assert!((floor..=ceiling).contains(&count), "slot {slot}: {count}, due {floor} to {ceiling}");
        }
        assert_eq!(table.counts(weights.len()).iter().sum::<usize>(), BUCKET_COUNT);
    }

    /// The least that any table with floors and ceilings could move: choose
    /// the ceilings for the slots that have the most.
    fn fewest_moves(table: &Table, weights: &[u32]) -> usize {
        let have = table.counts(weights.len());
        let sum: usize = weights.iter().map(|w| *w as usize).sum();
        let floors: Vec<usize> = weights.iter().map(|w| *w as usize * BUCKET_COUNT / sum).collect();
        let mut left = BUCKET_COUNT - floors.iter().sum::<usize>();
        let mut kept = 0;
        for slot in 0..weights.len() {
            let fraction = !(weights[slot] as usize * BUCKET_COUNT).is_multiple_of(sum);
            let mut may_keep = floors[slot];
            if fraction && have[slot] > floors[slot] && left > 0 {
                may_keep += 1;
                left -= 1;
            }
            kept += have[slot].min(may_keep);
        }
        BUCKET_COUNT - kept
    }

    fn some_weights() -> impl Strategy<Value = Vec<u32>> {
        let one = prop_oneof![4 => Just(32u32), 2 => Just(0u32), 1 => Just(1u32), 1 => 1u32..300];
        proptest::collection::vec(one, 64)
    }

    proptest! {
        #[test]
        fn any_history_is_even_and_moves_the_fewest(
            slot_count in 1usize..=64,
            history in proptest::collection::vec(some_weights(), 1..6),
        ) {
            let mut table = Table::new(&vec![1; slot_count]);
            floor_or_ceiling(&table, &vec![1; slot_count]);
            for weights in &history {
                let weights = &weights[..slot_count];
                let next = table.refilled(weights);
                if weights.iter().all(|weight| *weight == 0) {
                    prop_assert_eq!(&next, &table);
                    continue;
                }
                floor_or_ceiling(&next, weights);
                prop_assert_eq!(table.moves(&next).count(), fewest_moves(&table, weights));
                prop_assert_eq!(&next, &table.refilled(weights), "the same twice");
                prop_assert_eq!(&next, &next.refilled(weights), "nothing moves without a reason");
                table = next;
            }
        }

        #[test]
        fn a_leave_moves_the_leavers_buckets_alone_and_a_return_takes_only_what_it_is_due(
            slot_count in 2usize..=64,
            leaver in 0usize..64,
        ) {
            let leaver = leaver % slot_count;
            let full = Table::new(&vec![1; slot_count]);
            let mut weights = vec![1; slot_count];
            weights[leaver] = 0;
            let without = full.refilled(&weights);
            prop_assert!(full.moves(&without).all(|moved| moved.from == leaver));
            prop_assert_eq!(full.moves(&without).count(), full.counts(slot_count)[leaver]);
            let again = without.refilled(&vec![1; slot_count]);
            prop_assert!(without.moves(&again).all(|moved| moved.to == leaver));
            prop_assert!(without.moves(&again).count() <= BUCKET_COUNT.div_ceil(slot_count));
        }
    }

    #[test]
    fn growing_by_a_slot_moves_the_ideal_part() {
        let four = Table::new(&[1, 1, 1, 1, 0]);
        let five = four.refilled(&[1; 5]);
        assert_eq!(four.moves(&five).count(), 204);
        assert!(four.moves(&five).all(|moved| moved.to == 4));
    }

    #[test]
    fn slots_of_one_cpu_share_its_row_and_nobody_elses() {
        // Four slots on CPUs 1 and 3; two rows of... four CPUs' worth.
        let table = Table::by_cpu(&[1, 1, 1, 1], &[1, 3], 8);
        let of_row = |row: usize| {
            let mut slots: Vec<usize> =
                (row * 256..(row + 1) * 256).map(|bucket| table.slot(bucket)).collect();
            slots.sort_unstable();
            let count = |slot| slots.iter().filter(|s| **s == slot).count();
            (0..4).map(count).collect::<Vec<_>>()
        };
        assert_eq!(of_row(1), [128, 0, 128, 0]);
        assert_eq!(of_row(3), [0, 128, 0, 128]);
        assert_eq!(of_row(0), [64; 4], "a CPU without a slot is everybody's");
        let fenced = Table::by_cpu(&[0, 1, 0, 1], &[1, 3], 8);
        assert_eq!(fenced.counts(4)[0] + fenced.counts(4)[2], 0);
    }

    #[test]
    fn no_slot_at_all_leaves_the_table_as_it_is() {
        let table = Table::new(&[1, 1]);
        assert_eq!(table.refilled(&[0, 0]), table);
        assert_eq!(Table::new(&[0, 0]), table);
    }
}
