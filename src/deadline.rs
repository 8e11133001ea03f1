//! One deadline for each of many entries: set, moved and cancelled in
//! constant time, without allocating.
//!
//! A hierarchical timing wheel (Varghese and Lauck, 1987) whose lists run
//! through arrays indexed by the entry's place in a slab. Owned by a worker.
//! A deadline fires at its tick or up to one tick late, never early. Idle
//! timeouts are kept lazily: the owner leaves the old deadline standing while
//! bytes flow and, when it fires, asks for the rest.

/// Milliseconds of one tick of the first level.
pub const TICK: u64 = 16;

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
/// 64^5 ticks of 16 ms are 198 days; what lies beyond waits in the last slot
/// and is looked at again.
const LEVELS: usize = 5;
const NONE: u32 = u32::MAX;

/// Deadlines by entry index.
#[derive(Debug)]
pub struct Deadlines {
    /// The tick up to which everything has fired.
    tick: u64,
    heads: Vec<u32>,
    /// A bit a slot, a word a level: which lists have anything.
    filled: [u64; LEVELS],
    links: Vec<Link>,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    next: u32,
    previous: u32,
    /// In ticks; `u64::MAX` = not set.
    when: u64,
}

const UNSET: Link = Link { next: NONE, previous: NONE, when: u64::MAX };

impl Deadlines {
    /// None set; time begins at `now`, in milliseconds.
    pub fn new(now: u64) -> Deadlines {
        Deadlines {
            tick: now / TICK,
            heads: vec![NONE; SLOTS * LEVELS],
            filled: [0; LEVELS],
            links: Vec::new(),
        }
    }

    /// Sets or moves the deadline of an entry, in milliseconds.
    pub fn set(&mut self, index: u32, when: u64) {
        self.clear(index);
        if index as usize >= self.links.len() {
            self.links.resize(index as usize + 1, UNSET);
        }
        // The next whole tick, and one that is still to come.
        let tick = when.div_ceil(TICK).max(self.tick + 1);
        self.links[index as usize].when = tick;
        self.link(index, tick);
    }

    /// Forgets the deadline of an entry, if it has one.
    pub fn clear(&mut self, index: u32) {
        let Some(&link) = self.links.get(index as usize) else {
            return;
        };
        if link.when == u64::MAX {
            return;
        }
        let slot = self.slot_of(index);
        self.unlink(index, slot);
        self.links[index as usize] = UNSET;
    }

    /// Moves time on; the entries whose deadlines have passed are put into
    /// `fired` and have none any more.
    pub fn advance(&mut self, now: u64, fired: &mut Vec<u32>) {
        let target = now / TICK;
        while self.tick < target {
            // Nothing below this level: jump to where its next slot begins.
            match self.next_tick() {
                None => {
                    self.tick = target;
                    return;
                }
                Some(next) if next > target => {
                    self.tick = target;
                    self.cascade_all();
                    return;
                }
                Some(next) => {
                    self.tick = next;
                    self.cascade_all();
                    self.fire(fired);
                }
            }
        }
    }

    /// When `advance` is to be called next at the latest, in milliseconds.
    pub fn next(&self) -> Option<u64> {
        self.next_tick().map(|tick| tick * TICK)
    }

    /// The next tick at which a list has to be looked at.
    fn next_tick(&self) -> Option<u64> {
        let mut earliest = None;
        for level in 0..LEVELS {
            if self.filled[level] == 0 {
                continue;
            }
            let shift = BITS * level as u32;
            let position = self.tick >> shift;
            let at = (position % SLOTS as u64) as u32;
            // Rotate so that the slot behind the present one is bit 0.
            let ahead = self.filled[level].rotate_right((at + 1) % SLOTS as u32).trailing_zeros();
            let tick = (position + 1 + u64::from(ahead)) << shift;
            earliest = Some(earliest.map_or(tick, |e: u64| e.min(tick)));
        }
        earliest
    }

    /// Moves what has come near from upper levels to lower ones.
    fn cascade_all(&mut self) {
        for level in (1..LEVELS).rev() {
            let at = ((self.tick >> (BITS * level as u32)) % SLOTS as u64) as usize;
            let slot = level * SLOTS + at;
            if self.filled[level] & (1 << at) == 0 {
                continue;
            }
            let mut index = std::mem::replace(&mut self.heads[slot], NONE);
            self.filled[level] &= !(1 << at);
            while index != NONE {
                let link = self.links[index as usize];
                self.link(index, link.when);
                index = link.next;
            }
        }
    }

    fn fire(&mut self, fired: &mut Vec<u32>) {
        let at = (self.tick % SLOTS as u64) as usize;
        if self.filled[0] & (1 << at) == 0 {
            return;
        }
        let mut index = std::mem::replace(&mut self.heads[at], NONE);
        self.filled[0] &= !(1 << at);
        while index != NONE {
            let link = std::mem::replace(&mut self.links[index as usize], UNSET);
            debug_assert!(link.when <= self.tick, "a deadline fired early");
            fired.push(index);
            index = link.next;
        }
    }

    fn link(&mut self, index: u32, when: u64) {
        let slot = self.place(when);
        let head = self.heads[slot];
        let link = &mut self.links[index as usize];
        link.next = head;
        link.previous = NONE;
        if head != NONE {
            self.links[head as usize].previous = index;
        }
        self.heads[slot] = index;
        self.filled[slot / SLOTS] |= 1 << (slot % SLOTS);
    }

    fn unlink(&mut self, index: u32, slot: usize) {
        let Link { next, previous, .. } = self.links[index as usize];
        if next != NONE {
            self.links[next as usize].previous = previous;
        }
        if previous != NONE {
            self.links[previous as usize].next = next;
        } else {
            self.heads[slot] = next;
            if next == NONE {
                self.filled[slot / SLOTS] &= !(1 << (slot % SLOTS));
            }
        }
    }

    /// The list for a tick, seen from the present one. A tick that is now
    /// belongs to level 0 too: `advance` fires it right after a cascade.
    fn place(&self, when: u64) -> usize {
        let when = when.max(self.tick);
        for level in 0..LEVELS {
            let shift = BITS * level as u32;
            if (when >> shift) - (self.tick >> shift) < SLOTS as u64 {
                return level * SLOTS + ((when >> shift) % SLOTS as u64) as usize;
            }
        }
        let shift = BITS * (LEVELS as u32 - 1);
        let last = (self.tick >> shift) + SLOTS as u64 - 1;
        (LEVELS - 1) * SLOTS + (last % SLOTS as u64) as usize
    }

    /// The list that an entry is in. Time has moved since it was linked, so
    /// the list is found as it was then: by its head where it is first, else
    /// any list will do, since only a first entry touches its list.
    fn slot_of(&self, index: u32) -> usize {
        if self.links[index as usize].previous != NONE {
            return 0;
        }
        let when = self.links[index as usize].when;
        for level in 0..LEVELS {
            let slot = level * SLOTS + ((when >> (BITS * level as u32)) % SLOTS as u64) as usize;
            if self.heads[slot] == index {
                return slot;
            }
        }
        self.heads.iter().position(|&head| head == index).expect("a first entry heads a list")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_deadline_fires_once_not_early_and_at_most_a_tick_late() {
        for when in [1, 15, 16, 17, 1000, 1024, 1039, 65_536, 3_600_000, 86_400_000, 40_000_000_000] {
            let mut deadlines = Deadlines::new(5_000);
            let due = 5_000 + when;
            deadlines.set(3, due);
            let mut fired = Vec::new();
            deadlines.advance(due - 1 - (due - 1) % TICK, &mut fired);
            assert!(fired.is_empty(), "{when} fired early");
            deadlines.advance(due + TICK, &mut fired);
            assert_eq!(fired, [3], "{when}");
            assert_eq!(deadlines.next(), None);
        }
    }

    #[test]
    fn nothing_set_needs_no_wake_up() {
        let mut deadlines = Deadlines::new(0);
        assert_eq!(deadlines.next(), None);
        deadlines.set(0, 100);
        deadlines.clear(0);
        assert_eq!(deadlines.next(), None);
    }

    proptest! {
        /// Against a plain map, over random sets, clears and leaps of time.
        #[test]
        fn agrees_with_a_plain_map(
            start in 0u64..1 << 40,
            steps in prop::collection::vec((0u32..20, 0u64..3, 0u32..34), 1..200)
        ) {
            let mut now = start;
            let mut deadlines = Deadlines::new(now);
            let mut model = std::collections::BTreeMap::new();
            for (index, action, scale) in steps {
                let span = (1u64 << scale) * 3 / 2;
                match action {
                    0 => {
                        deadlines.set(index, now + span);
                        model.insert(index, now + span);
                    }
                    1 => {
                        deadlines.clear(index);
                        model.remove(&index);
                    }
                    _ => {
                        now += span;
                        let mut fired = Vec::new();
                        deadlines.advance(now, &mut fired);
                        for index in fired {
                            let due = model.remove(&index).expect("fired without being set");
                            prop_assert!(due <= now);
                        }
                        for due in model.values() {
                            prop_assert!(now / TICK <= due.div_ceil(TICK), "missed by more than a tick");
                        }
                    }
                }
                if let Some(first) = model.values().min() {
                    prop_assert!(deadlines.next().unwrap() <= first.div_ceil(TICK).max(now / TICK + 1) * TICK);
                } else {
                    prop_assert_eq!(deadlines.next(), None);
                }
            }
        }
    }
}
