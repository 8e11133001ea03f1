//! "Chance" or "not chance", and the sentence a person reads.
//!
//! Pure. The thresholds stand here and in docs/BENCH.md; the tests below
//! state how often each is wrong.

use super::Spread;
use crate::units::grouped;

/// A p-value below this is called "not chance": a fair spread is called
/// unfair once in a thousand.
pub const P_CHANCE: f64 = 0.001;

/// With fewer expected connections a slot than this, the chi-square curve
/// only roughly fits: nothing is called chance, and "not chance" is decided by
/// a bound on the fullest slot instead, at the same odds.
pub const FEW_PER_SLOT: f64 = 5.0;

/// Off by less than this from its share, an imbalance is real but slight.
const SLIGHT: f64 = 0.05;

/// What the numbers say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// No connection at all, or fewer than two slots.
    Nothing,
    /// Too few connections a slot to tell.
    TooFew,
    /// As even as fair steering would be.
    Chance,
    /// More uneven than fair steering would be.
    NotChance {
        /// The slot that is furthest from its share.
        slot: usize,
        /// The part that it got.
        share: f64,
        /// The part that it should have had.
        expected: f64,
    },
}

/// What is known besides the counts; makes the sentence name a likely cause.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances<'a> {
    /// What was counted: "connections", "flows".
    pub noun: &'a str,
    /// `steering_active` of the listener, where known.
    pub steering: Option<&'a str>,
    /// How many client addresses there were, where known.
    pub client_addresses: Option<usize>,
}

impl Verdict {
    /// Judges a spread over slots of equal shares.
    pub fn of(spread: &Spread) -> Verdict {
        Verdict::weighted(spread, &vec![1.0; spread.per_slot.len()])
    }

    /// Judges a spread that was measured against these shares.
    pub fn weighted(spread: &Spread, shares: &[f64]) -> Verdict {
        let shares = super::usable_shares(spread.per_slot.len(), shares);
        let sum: f64 = shares.iter().sum();
        let total = spread.total();
        if total == 0 || shares.len() < 2 {
            return Verdict::Nothing;
        }
        let due = shares.iter().filter(|share| **share > 0.0);
        let least = due.fold(f64::INFINITY, |least, share| least.min(share / sum * total as f64));
        let few = least < FEW_PER_SLOT;
        let p_value = if few { few_odds(spread, &shares) } else { spread.p_value };
        if p_value >= P_CHANCE {
            return if few { Verdict::TooFew } else { Verdict::Chance };
        }
        let off = |slot: usize| {
            let expected = total as f64 * shares[slot] / sum;
            // The slot's part of chi-square; any connection where none is due comes first.
            let part = (spread.per_slot[slot] as f64 - expected).powi(2) / expected;
            if part.is_nan() { 0.0 } else { part }
        };
        let worst = (0..shares.len()).max_by(|a, b| off(*a).total_cmp(&off(*b)));
        let slot = worst.expect("there are at least two slots");
        Verdict::NotChance { slot, share: spread.share(slot), expected: shares[slot] / sum }
    }

    /// Whether fair steering is ruled out.
    pub fn is_unfair(&self) -> bool {
        matches!(self, Verdict::NotChance { .. })
    }

    /// One or two sentences for a person, lower case, without a full stop.
    pub fn sentence(&self, spread: &Spread, about: &Circumstances) -> String {
        let (total, noun) = (grouped(spread.total()), about.noun);
        let slot_count = spread.per_slot.len();
        let odds = odds(spread.p_value);
        match *self {
            Verdict::Nothing if spread.total() == 0 => format!("no {noun} to judge"),
            Verdict::Nothing => format!("one slot only, it got all {total} {noun}"),
            Verdict::TooFew => format!(
                "too few to tell: {total} {noun} over {slot_count} slots; at least {} would do",
                grouped((FEW_PER_SLOT as u64) * slot_count as u64 * 4)
            ),
            Verdict::Chance => {
                format!("within chance for {total} {noun} over {slot_count} slots ({odds})")
            }
            Verdict::NotChance { slot, share, expected } => {
                let lead = lead(spread, slot, share, expected, noun);
                format!("{lead}: not chance ({odds}); {}", cause(spread, slot, share, expected, about))
            }
        }
    }
}

/// An upper bound for the odds that any slot is as full as the fullest one:
/// Chernoff's bound on one slot's binomial tail, times the number of slots.
fn few_odds(spread: &Spread, shares: &[f64]) -> f64 {
    let (total, sum) = (spread.total() as f64, shares.iter().sum::<f64>());
    let bound = |(count, share): (&u64, &f64)| {
        let (part, due) = (*count as f64 / total, share / sum);
        if part <= due {
            return 1.0;
        }
        let rest = if part < 1.0 { (1.0 - part) * ((1.0 - part) / (1.0 - due)).ln() } else { 0.0 };
        (-total * (part * (part / due).ln() + rest)).exp()
    };
    let least = spread.per_slot.iter().zip(shares).map(bound).fold(1.0, f64::min);
    (least * shares.len() as f64).min(1.0)
}

/// What the worst slot got.
fn lead(spread: &Spread, slot: usize, share: f64, expected: f64, noun: &str) -> String {
    if spread.per_slot[slot] == 0 {
        return format!("slot {slot} got none of {} {noun}", grouped(spread.total()));
    }
    let digits = if (share - expected).abs() < 0.005 { 2 } else { 1 };
    format!("slot {slot} gets {:.digits$} % instead of {:.digits$} %", share * 100.0, expected * 100.0)
}

/// The likeliest reason, as advice.
fn cause(spread: &Spread, slot: usize, share: f64, expected: f64, about: &Circumstances) -> String {
    let slot_count = spread.per_slot.len();
    match (about.steering, about.client_addresses) {
        (Some("source"), Some(addresses)) => format!(
            "source steering keeps an address on one slot, and {} cannot fill {slot_count} slots evenly: \
             use more --source addresses or steering = \"hash\"",
            counted(addresses, "client address", "client addresses")
        ),
        (Some("source"), None) => "source steering keeps an address on one slot: few clients, or some that \
             open many connections, make it uneven"
            .into(),
        (Some("cpu"), _) => "cpu steering follows the CPU that takes the packet in, on loopback the \
             client's own: spread the interrupts (RSS, RPS) or use steering = \"hash\""
            .into(),
        (Some("load-aware"), _) => {
            "load-aware steering evens out what is open, not what was opened: look at the active counts"
                .into()
        }
        _ if expected == 0.0 => "it should get nothing at all: a socket that left the steering table is \
             still in the group"
            .into(),
        _ if spread.per_slot[slot] == 0 => "its worker is not accepting, or its socket is not in the group: \
             see the workers in `evenkeel status`"
            .into(),
        _ if (share / expected - 1.0).abs() < SLIGHT => {
            "slight, seen only because so many were counted".into()
        }
        _ => "a worker was away for a part of the time, or another program shares the port: see \
             `evenkeel status` and `evenkeel doctor ADDRESS`"
            .into(),
    }
}

/// "p = 0.42", or a bound where digits would mean nothing.
fn odds(p_value: f64) -> String {
    if p_value >= 0.001 {
        format!("p = {p_value:.3}")
    } else if p_value >= 1e-12 {
        format!("p = {p_value:.0e}")
    } else {
        "p < 1e-12".into()
    }
}

fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Circumstances =
        Circumstances { noun: "connections", steering: Some("hash"), client_addresses: Some(1) };

    /// splitmix64: seeded, so that a trial that passes once passes always.
    struct Seeded(u64);

    impl Seeded {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }

        /// So many draws over slots of these shares.
        fn draw(&mut self, draws: u32, shares: &[f64]) -> Vec<u64> {
            let sum: f64 = shares.iter().sum();
            let mut counts = vec![0; shares.len()];
            for _ in 0..draws {
                let mut at = (self.next() >> 11) as f64 / (1u64 << 53) as f64 * sum;
                let hit = shares.iter().position(|share| {
                    at -= share;
                    at < 0.0
                });
                counts[hit.unwrap_or(0)] += 1;
            }
            counts
        }
    }

    /// How many of so many trials are called unfair when drawn by `real`
    /// and judged as equal.
    fn called_unfair(seed: u64, trials: u32, draws: u32, real: &[f64]) -> u32 {
        let mut random = Seeded(seed);
        let unfair = |counts: Vec<u64>| Verdict::of(&Spread::equal(&counts)).is_unfair();
        (0..trials).map(|_| u32::from(unfair(random.draw(draws, real)))).sum()
    }

    #[test]
    fn a_fair_spread_is_called_unfair_less_than_once_in_a_hundred() {
        // At p = 0.001 two of 2,000 are due; 20 would be the promised one in a hundred.
        for (seed, slot_count, draws) in
            [(1, 2, 200), (2, 4, 400), (3, 4, 10_000), (4, 8, 1000), (5, 64, 3200)]
        {
            let trials = if draws > 5000 { 300 } else { 2000 };
            let unfair = called_unfair(seed, trials, draws, &vec![1.0; slot_count]);
            assert!(unfair * 100 <= trials, "{unfair} of {trials}, {slot_count} slots, {draws} draws");
        }
    }

    #[test]
    fn few_connections_are_hardly_ever_wrongly_called_unfair() {
        // The bound promises at most 0.1 %; 0.2 % of 20,000 is the slack given.
        for (seed, slot_count, draws) in [(6, 64, 3), (7, 64, 10), (8, 64, 100), (9, 8, 12), (10, 4, 10)] {
            let unfair = called_unfair(seed, 20_000, draws, &vec![1.0; slot_count]);
            assert!(unfair <= 40, "{unfair} of 20000, {slot_count} slots, {draws} draws");
        }
    }

    #[test]
    fn twelve_connections_on_one_of_four_slots_are_not_chance() {
        assert!(Verdict::of(&Spread::equal(&[0, 12, 0, 0])).is_unfair());
        assert_eq!(Verdict::of(&Spread::equal(&[1, 2, 0, 0])), Verdict::TooFew);
    }

    #[test]
    fn a_dead_slot_and_a_doubled_slot_are_always_seen() {
        assert_eq!(called_unfair(11, 500, 100, &[1.0, 1.0, 1.0, 0.0]), 500);
        assert_eq!(called_unfair(12, 500, 2000, &[2.0, 1.0, 1.0, 1.0]), 500);
        assert_eq!(called_unfair(13, 200, 6400, &[&[3.0][..], &[1.0; 63][..]].concat()), 200);
    }

    #[test]
    fn unequal_shares_judged_as_such_are_fair() {
        let (mut random, shares) = (Seeded(14), [4.0, 2.0, 1.0, 1.0]);
        let unfair = |counts: Vec<u64>| {
            let spread = Spread::weighted(&counts, &shares);
            Verdict::weighted(&spread, &shares).is_unfair()
        };
        let wrong = (0..2000).filter(|_| unfair(random.draw(800, &shares))).count();
        assert!(wrong <= 20, "{wrong} of 2000");
    }

    #[test]
    fn an_even_spread_says_within_chance() {
        let spread = Spread::equal(&[2512, 2488, 2503, 2497]);
        let text = Verdict::of(&spread).sentence(&spread, &PLAIN);
        assert_eq!(text, "within chance for 10,000 connections over 4 slots (p = 0.989)");
    }

    #[test]
    fn an_uneven_spread_names_the_slot_and_its_share() {
        let spread = Spread::equal(&[2300, 2300, 3100, 2300]);
        let text = Verdict::of(&spread).sentence(&spread, &PLAIN);
        assert!(text.starts_with("slot 2 gets 31.0 % instead of 25.0 %: not chance (p < 1e-12); "), "{text}");
    }

    #[test]
    fn the_cause_follows_the_circumstances() {
        let say = |counts: &[u64], about: &Circumstances| {
            let spread = Spread::equal(counts);
            Verdict::of(&spread).sentence(&spread, about)
        };
        let source = Circumstances { steering: Some("source"), ..PLAIN };
        let cpu = Circumstances { steering: Some("cpu"), ..PLAIN };
        let aware = Circumstances { steering: Some("load-aware"), ..PLAIN };
        let skewed = [900, 50, 25, 25];
        assert!(say(&skewed, &source).contains("1 client address cannot fill 4 slots"));
        assert!(say(&skewed, &cpu).contains("cpu steering follows the CPU"));
        assert!(say(&skewed, &aware).contains("look at the active counts"));
        assert!(say(&skewed, &PLAIN).contains("evenkeel doctor"));
        assert!(say(&[500, 500, 0, 500], &PLAIN).starts_with("slot 2 got none of 1,500 connections: not"));
        assert!(say(&[500, 500, 0, 500], &PLAIN).contains("not accepting"));
        assert!(say(&[10_100_000, 10_000_000], &PLAIN).contains("slight"));
        assert!(say(&[2, 1, 0, 0], &PLAIN).starts_with("too few to tell: 3 connections over 4 slots"));
        assert_eq!(say(&[0, 0], &PLAIN), "no connections to judge");
        assert_eq!(say(&[12], &PLAIN), "one slot only, it got all 12 connections");
    }

    #[test]
    fn a_slot_that_should_get_nothing_is_named() {
        let shares = [1.0, 1.0, 0.0];
        let spread = Spread::weighted(&[500, 500, 30], &shares);
        let verdict = Verdict::weighted(&spread, &shares);
        assert!(matches!(verdict, Verdict::NotChance { slot: 2, .. }), "{verdict:?}");
        assert!(verdict.sentence(&spread, &PLAIN).contains("should get nothing"));
    }
}
