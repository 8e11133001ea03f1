//! How connections fell over the slots, in numbers and in a sentence.
//!
//! Pure statistics: counts in, a `Spread` out; `verdict` turns it into words.
//! The daemon's `status` and the load generator judge by the same functions.
//! Nothing here grows beyond the number of slots it was given.

mod gamma;
mod verdict;

use serde::{Deserialize, Serialize};

pub use gamma::upper_tail;
pub use verdict::{Circumstances, FEW_PER_SLOT, P_CHANCE, Verdict};

/// How even the counts of the slots are.
///
/// Where slots should get unequal shares, the measures of evenness are taken
/// of each slot's count over what it should have had, so that 1.0 means "its
/// fair share" everywhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Connections (or flows) of each slot.
    pub per_slot: Vec<u64>,
    /// The largest count over the mean count; 1.0 is even. With unequal
    /// shares: the largest ratio of a count to what its slot should have had.
    pub max_over_mean: f64,
    /// Standard deviation over mean; 0.0 is even.
    pub cv: f64,
    /// Jain's fairness index; 1.0 is even, 1/N is everything on one slot.
    pub jain: f64,
    /// Pearson's chi-square against the shares.
    pub chi_square: f64,
    /// The odds that chance alone spreads at least this unevenly.
    pub p_value: f64,
}

impl Spread {
    /// Judges counts of slots that should get equal shares.
    pub fn equal(per_slot: &[u64]) -> Spread {
        Spread::weighted(per_slot, &vec![1.0; per_slot.len()])
    }

    /// Judges counts against shares, which need not sum to one.
    ///
    /// A slot without a share (absent, zero, not a number) should get nothing:
    /// it takes no part in the measures, but one connection on it makes the
    /// p-value 0. If no slot has a share, all are taken to be equal.
    pub fn weighted(per_slot: &[u64], shares: &[f64]) -> Spread {
        let shares = usable_shares(per_slot.len(), shares);
        let shares_sum: f64 = shares.iter().sum();
        let due: Vec<(u64, f64)> =
            per_slot.iter().copied().zip(shares).filter(|(_, share)| *share > 0.0).collect();
        let total: u64 = due.iter().map(|(count, _)| count).sum();
        let astray = per_slot.iter().sum::<u64>() - total;
        let mut spread = Spread { per_slot: per_slot.to_vec(), ..Spread::even() };
        if total > 0 {
            let ratios = due.iter().map(|(count, share)| {
                let expected = total as f64 * share / shares_sum;
                (*count as f64, expected)
            });
            spread.measure(&ratios.collect::<Vec<_>>());
        }
        if astray > 0 {
            spread.p_value = 0.0;
        }
        spread
    }

    /// All connections together.
    pub fn total(&self) -> u64 {
        self.per_slot.iter().sum()
    }

    /// The part of all connections that a slot got; 0.0 where there were none.
    pub fn share(&self, slot: usize) -> f64 {
        match self.total() {
            0 => 0.0,
            total => self.per_slot[slot] as f64 / total as f64,
        }
    }

    /// Fills in every measure from pairs of count and expected count.
    fn measure(&mut self, pairs: &[(f64, f64)]) {
        let slot_count = pairs.len() as f64;
        let ratios: Vec<f64> = pairs.iter().map(|(count, expected)| count / expected).collect();
        let sum: f64 = ratios.iter().sum();
        let squares: f64 = ratios.iter().map(|ratio| ratio * ratio).sum();
        let mean = sum / slot_count;
        let variance = ratios.iter().map(|ratio| (ratio - mean).powi(2)).sum::<f64>() / slot_count;
        self.max_over_mean = ratios.iter().copied().fold(0.0, f64::max);
        self.cv = variance.sqrt() / mean;
        self.jain = sum * sum / (slot_count * squares);
        self.chi_square = pairs.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
        self.p_value = upper_tail(self.chi_square, pairs.len() as u32 - 1);
    }

    /// What is said of nothing: even, and certain to be so by chance.
    fn even() -> Spread {
        Spread { per_slot: Vec::new(), max_over_mean: 1.0, cv: 0.0, jain: 1.0, chi_square: 0.0, p_value: 1.0 }
    }
}

/// One share a slot, none of them negative, at least one above zero.
fn usable_shares(slot_count: usize, shares: &[f64]) -> Vec<f64> {
    let usable = |share: &f64| if share.is_finite() { share.max(0.0) } else { 0.0 };
    let mut out: Vec<f64> = shares.iter().map(usable).collect();
    out.resize(slot_count, 0.0);
    if out.iter().all(|share| *share == 0.0) {
        out.fill(1.0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * b.abs().max(1.0)
    }

    #[test]
    fn a_textbook_die_gives_the_textbook_numbers() {
        // 60 throws: 5 8 9 8 10 20. Chi-square by hand: (25+4+1+4+0+100)/10.
        let spread = Spread::equal(&[5, 8, 9, 8, 10, 20]);
        assert!(close(spread.chi_square, 13.4), "{spread:?}");
        assert!((spread.p_value - 0.019_905_221).abs() < 1e-8, "{spread:?}");
        assert!(close(spread.max_over_mean, 2.0));
        assert!(close(spread.jain, 3600.0 / (6.0 * 734.0)));
        assert!(close(spread.cv, (134.0_f64 / 6.0).sqrt() / 10.0));
    }

    #[test]
    fn mendels_peas_are_judged_against_nine_three_three_one() {
        let spread = Spread::weighted(&[315, 108, 101, 32], &[9.0, 3.0, 3.0, 1.0]);
        assert!((spread.chi_square - 0.470_024).abs() < 1e-6, "{spread:?}");
        assert!((spread.p_value - 0.925_426).abs() < 1e-6, "{spread:?}");
    }

    #[test]
    fn perfectly_even_counts_are_perfectly_even() {
        let spread = Spread::equal(&[25; 64]);
        assert!(close(spread.max_over_mean, 1.0) && close(spread.jain, 1.0));
        assert!(close(spread.cv, 0.0) && close(spread.chi_square, 0.0) && close(spread.p_value, 1.0));
    }

    #[test]
    fn everything_on_one_of_64_slots_is_as_uneven_as_can_be() {
        let mut counts = [0; 64];
        counts[17] = 6400;
        let spread = Spread::equal(&counts);
        assert!(close(spread.max_over_mean, 64.0) && close(spread.jain, 1.0 / 64.0));
        assert!(spread.p_value >= 0.0 && spread.p_value < 1e-300, "{spread:?}");
    }

    #[test]
    fn nothing_and_one_slot_and_no_slot_are_called_even() {
        for counts in [&[][..], &[0], &[7], &[0, 0, 0]] {
            let spread = Spread::equal(counts);
            assert!(close(spread.max_over_mean, 1.0) && close(spread.p_value, 1.0), "{spread:?}");
            assert!(close(spread.jain, 1.0) && close(spread.cv, 0.0), "{spread:?}");
        }
    }

    #[test]
    fn a_slot_without_a_share_makes_any_connection_on_it_no_chance() {
        assert_eq!(Spread::weighted(&[50, 50, 1], &[1.0, 1.0, 0.0]).p_value, 0.0);
        assert_eq!(Spread::weighted(&[50, 50, 0], &[1.0, 1.0, 0.0]).p_value, 1.0);
        assert_eq!(Spread::weighted(&[0, 0, 5], &[1.0, 1.0]).p_value, 0.0);
    }

    #[test]
    fn every_number_survives_json() {
        let spread = Spread::equal(&[1, u64::from(u32::MAX), 0]);
        let text = serde_json::to_string(&spread).expect("numbers are finite");
        let keys = ["per_slot", "max_over_mean", "cv", "jain", "chi_square", "p_value"];
        assert!(keys.iter().all(|key| text.contains(&format!("\"{key}\":"))), "{text}");
        assert!(!text.contains("null"), "{text}");
        assert_eq!(serde_json::from_str::<Spread>(&text).expect("reads back").per_slot, spread.per_slot);
    }
}
