//! How many sessions or flows a client address has, and how many it began
//! lately, over all slots.
//!
//! ```text
//!   a slot's table:  [ in use | 4096 buckets of 8 places ]
//!   a place:         [ fingerprint 32 | live 32 ][ second 24 | before 20 | in it 20 ]
//! ```
//!
//! Every slot has a table of its own for each listener that limits its
//! sources, in the shared memory of its counters: written by that slot's
//! worker alone, read by all. What a source has is the sum over the tables,
//! one bucket of two cache lines in each. A worker's death leaks nothing: the
//! next one in the slot clears what the last one held (`begin_life`).
//!
//! Bounded: 32,768 sources a slot. A place is free again once its source has
//! nothing live and began nothing for two seconds; where all eight places of a
//! bucket are taken a source is not counted in that slot, and so may have more
//! than its limit, never less. Two sources share a count where 43 bits of a
//! keyed hash agree, and outsiders do not know the key. Slots that admit at the
//! same moment may pass a limit by one each.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const BUCKETS: usize = 4096;
const WAYS: usize = 8;
/// Keeps the buckets on cache lines of their own.
const HEAD_WORDS: usize = 8;

/// The words of one table.
pub const TABLE_WORDS: usize = HEAD_WORDS + BUCKETS * WAYS * 2;
/// The place of what is not counted.
pub const UNCOUNTED: u32 = u32::MAX;

/// What a client address counts as: an IPv4 address is one source, and so are
/// all addresses of an IPv6 network of 64 bits, which is what one subscriber
/// has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source(u64);

impl Source {
    /// The source that an address belongs to. `seed` is secret and the same
    /// in all slots.
    pub fn of(client: IpAddr, seed: u64) -> Source {
        let (bits, family) = match client.to_canonical() {
            IpAddr::V4(v4) => (u64::from(v4.to_bits()), 4),
            IpAddr::V6(v6) => ((v6.to_bits() >> 64) as u64, 6),
        };
        Source(mix(mix(bits ^ seed) ^ seed.rotate_left(32) ^ family))
    }

    fn bucket(self) -> usize {
        self.0 as usize % BUCKETS
    }

    /// Never 0, which marks a free place.
    fn fingerprint(self) -> u64 {
        (self.0 >> 32) | 1 << 31
    }
}

/// The finalizer of splitmix64.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// How much a source may have; 0 = any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Live sessions or flows, over all slots.
    pub live: u64,
    /// New ones a second, over all slots.
    pub per_second: u64,
}

/// Which limit a source is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// It has as many as it may.
    Live,
    /// It began as many within the last second as it may.
    Rate,
}

/// One slot's table.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a>(&'a [AtomicU64]);

impl<'a> Table<'a> {
    /// A table over its words; `None` where they are too few.
    pub fn over(words: &'a [AtomicU64]) -> Option<Table<'a>> {
        words.get(..TABLE_WORDS).map(Table)
    }

    /// Forgets what the slot's last worker held. What was begun lately stays.
    pub fn begin_life(self) {
        // Reading it all would bring all its pages into being.
        if self.0[0].load(Relaxed) == 0 {
            return;
        }
        for place in 0..BUCKETS * WAYS {
            let word = self.holder(place);
            word.store(word.load(Relaxed) & !LIVE_MASK, Relaxed);
        }
    }

    /// One more of a source. Owner only. Answers its place, for `less_one`.
    pub fn add(self, source: Source, now: u64) -> u32 {
        let Some(place) = self.find(source).or_else(|| self.claim(source, now)) else { return UNCOUNTED };
        let holder = self.holder(place);
        holder.store(holder.load(Relaxed) + 1, Relaxed);
        place as u32
    }

    /// One that is new besides: it counts for the rate.
    pub fn add_new(self, source: Source, now: u64) -> u32 {
        let place = self.add(source, now);
        if place != UNCOUNTED {
            let word = &self.0[HEAD_WORDS + 2 * place as usize + 1];
            word.store(Window::at(word.load(Relaxed), now).with_one().pack(), Relaxed);
        }
        place
    }

    /// One less at a place. Owner only.
    pub fn less_one(self, place: u32) {
        if place == UNCOUNTED {
            return;
        }
        let holder = self.holder(place as usize);
        let value = holder.load(Relaxed);
        debug_assert!(value & LIVE_MASK > 0, "a source has less than nothing");
        if value & LIVE_MASK > 0 {
            holder.store(value - 1, Relaxed);
        }
    }

    fn live(self, source: Source) -> u64 {
        self.find(source).map_or(0, |place| self.holder(place).load(Relaxed) & LIVE_MASK)
    }

    /// What it began in the second before now, in thousandths.
    fn recent_millis(self, source: Source, now: u64) -> u64 {
        self.find(source).map_or(0, |place| self.window(place, now).recent_millis(now))
    }

    fn find(self, source: Source) -> Option<usize> {
        let first = source.bucket() * WAYS;
        (first..first + WAYS).find(|&place| self.holder(place).load(Relaxed) >> 32 == source.fingerprint())
    }

    /// A place that nobody needs.
    fn claim(self, source: Source, now: u64) -> Option<usize> {
        let first = source.bucket() * WAYS;
        let is_free = |&place: &usize| {
            self.holder(place).load(Relaxed) & LIVE_MASK == 0 && self.window(place, now).is_over()
        };
        let place = (first..first + WAYS).find(is_free)?;
        self.0[0].store(1, Relaxed);
        self.0[HEAD_WORDS + 2 * place + 1].store(0, Relaxed);
        self.holder(place).store(source.fingerprint() << 32, Relaxed);
        Some(place)
    }

    fn holder(self, place: usize) -> &'a AtomicU64 {
        &self.0[HEAD_WORDS + 2 * place]
    }

    fn window(self, place: usize, now: u64) -> Window {
        Window::at(self.0[HEAD_WORDS + 2 * place + 1].load(Relaxed), now)
    }
}

const LIVE_MASK: u64 = u32::MAX as u64;

/// What began in this second and in the one before.
#[derive(Clone, Copy)]
struct Window {
    second: u64,
    before: u64,
    within: u64,
}

impl Window {
    const SECOND_MASK: u64 = (1 << 24) - 1;
    const COUNT_MASK: u64 = (1 << 20) - 1;

    /// What a word says, as of now.
    fn at(word: u64, now: u64) -> Window {
        let second = (now / 1_000) & Self::SECOND_MASK;
        let (before, within) = ((word >> 20) & Self::COUNT_MASK, word & Self::COUNT_MASK);
        let (before, within) = match second.wrapping_sub(word >> 40) & Self::SECOND_MASK {
            0 => (before, within),
            1 => (within, 0),
            // Another slot's clock may be a moment ahead.
            Self::SECOND_MASK => (before, within),
            _ => (0, 0),
        };
        Window { second, before, within }
    }

    fn with_one(mut self) -> Window {
        self.within = (self.within + 1).min(Self::COUNT_MASK);
        self
    }

    fn pack(self) -> u64 {
        self.second << 40 | self.before << 20 | self.within
    }

    /// The part of the second before that is less than a second ago is taken
    /// as evenly filled.
    fn recent_millis(self, now: u64) -> u64 {
        self.within * 1_000 + self.before * (1_000 - now % 1_000)
    }

    fn is_over(self) -> bool {
        self.before == 0 && self.within == 0
    }
}

/// Whether a source may have one more, going by the tables of all slots.
pub fn check<'a>(
    tables: impl Iterator<Item = Table<'a>> + Clone,
    source: Source,
    limits: Limits,
    now: u64,
) -> Result<(), Full> {
    if limits.live > 0 && tables.clone().map(|table| table.live(source)).sum::<u64>() >= limits.live {
        return Err(Full::Live);
    }
    let recent = || tables.map(|table| table.recent_millis(source, now)).sum::<u64>();
    if limits.per_second > 0 && recent() / 1_000 >= limits.per_second {
        return Err(Full::Rate);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use proptest::prelude::*;

    fn words() -> Vec<AtomicU64> {
        (0..TABLE_WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    fn source(number: u32) -> Source {
        Source::of(IpAddr::from(number.to_be_bytes()), 0x5eed)
    }

    #[test]
    fn an_ipv6_network_of_64_bits_is_one_source() {
        let of = |text: &str| Source::of(text.parse().unwrap(), 1);
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1:2:3"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn live_ones_are_counted_over_all_slots() {
        let (a, b) = (words(), words());
        let tables = [Table::over(&a).unwrap(), Table::over(&b).unwrap()];
        let limits = Limits { live: 3, per_second: 0 };
        let check = |now| check(tables.into_iter(), source(1), limits, now);
        let places = [tables[0].add_new(source(1), 0), tables[1].add_new(source(1), 0)];
        assert_eq!(check(0), Ok(()));
        tables[1].add(source(1), 0);
        assert_eq!(check(0), Err(Full::Live));
        tables[0].less_one(places[0]);
        assert_eq!(check(0), Ok(()));
        tables[0].add(source(1), 0);
        // The worker of slot 1 died.
        tables[1].begin_life();
        assert_eq!(check(0), Ok(()));
        assert_eq!(tables.map(|table| table.live(source(1))), [1, 0]);
    }

    #[test]
    fn new_ones_are_counted_over_the_last_second() {
        let (a, b) = (words(), words());
        let tables = [Table::over(&a).unwrap(), Table::over(&b).unwrap()];
        let limits = Limits { live: 0, per_second: 10 };
        let mut admitted = Vec::new();
        // A hundred tries a second for ten seconds, by turns at two slots.
        for step in 0..1_000u64 {
            let now = step * 10;
            if check(tables.into_iter(), source(9), limits, now).is_ok() {
                let table = tables[(step % 2) as usize];
                table.less_one(table.add_new(source(9), now));
                admitted.push(now);
            }
        }
        assert!((90..=110).contains(&admitted.len()), "{}", admitted.len());
        // Ten at once, and in no second much more than twice as many.
        assert!(admitted[9] < 100);
        for &from in &admitted {
            let within = admitted.iter().filter(|&&at| (from..from + 1_000).contains(&at)).count();
            assert!(within <= 20, "{within} from {from}");
        }
        assert_eq!(check(tables.into_iter(), source(8), limits, 9_990), Ok(()));
    }

    #[test]
    fn a_rate_of_one_admits_one_a_second() {
        let words = words();
        let table = Table::over(&words).unwrap();
        let limits = Limits { live: 0, per_second: 1 };
        let mut admitted = 0;
        for now in (500..10_500).step_by(7) {
            if check([table].into_iter(), source(3), limits, now).is_ok() {
                table.less_one(table.add_new(source(3), now));
                admitted += 1;
            }
        }
        assert!((9..=11).contains(&admitted), "{admitted}");
    }

    #[test]
    fn a_full_bucket_counts_no_more_and_frees_itself() {
        let words = words();
        let table = Table::over(&words).unwrap();
        let same: Vec<Source> =
            (0..).map(source).filter(|other| other.bucket() == source(0).bucket()).take(WAYS + 1).collect();
        let places: Vec<u32> = same.iter().map(|&source| table.add_new(source, 5_000)).collect();
        assert!(places[..WAYS].iter().all(|&place| place != UNCOUNTED));
        assert_eq!(places[WAYS], UNCOUNTED);
        table.less_one(places[WAYS]);
        table.less_one(places[0]);
        // What it began lately is still to be known.
        assert_eq!(table.add_new(same[WAYS], 5_900), UNCOUNTED);
        assert_eq!(table.add_new(same[WAYS], 7_100), places[0]);
        assert_eq!(table.live(same[WAYS]), 1);
    }

    proptest! {
        #[test]
        fn the_table_counts_as_a_map_does(steps in prop::collection::vec((0u32..40, any::<bool>()), 0..400)) {
            let words = words();
            let table = Table::over(&words).unwrap();
            let mut held: HashMap<u32, Vec<u32>> = HashMap::new();
            for (at, (number, opens)) in steps.into_iter().enumerate() {
                let places = held.entry(number).or_default();
                if opens {
                    places.push(table.add_new(source(number), at as u64 * 50));
                } else if let Some(place) = places.pop() {
                    table.less_one(place);
                }
            }
            for (number, places) in held {
                prop_assert_eq!(table.live(source(number)), places.len() as u64);
            }
        }
    }
}
