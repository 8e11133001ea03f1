//! What each slot should have got, when the table has changed meanwhile.
//!
//! A plain sum: what came while a table stood, times that table's shares. The
//! steward keeps it, one a listener; a new steward takes what was counted
//! before it for what should have been.

/// What came before the shares that stand now, and these.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    due: Vec<f64>,
    total: u64,
    shares: Vec<f64>,
}

impl Expected {
    /// Nothing has come yet.
    pub fn new(shares: Vec<f64>) -> Expected {
        Expected { due: vec![0.0; shares.len()], total: 0, shares }
    }

    /// So much has come already; how it should have fallen is not known.
    pub fn resume(counts: &[u64], shares: Vec<f64>) -> Expected {
        Expected {
            due: counts.iter().map(|count| *count as f64).collect(),
            total: counts.iter().sum(),
            shares,
        }
    }

    /// From now on, with so many counted, other shares hold.
    pub fn handle_change(&mut self, total: u64, shares: Vec<f64>) {
        self.due = self.at(total);
        // What a slot should have got that was given up counts for the last
        // one, as what it did get.
        let given_up: f64 = self.due.iter().skip(shares.len()).sum();
        self.due.resize(shares.len(), 0.0);
        if let Some(last) = self.due.last_mut() {
            *last += given_up;
        }
        self.total = total;
        self.shares = shares;
    }

    /// The part of what comes now that each slot should get.
    pub fn shares(&self) -> &[f64] {
        &self.shares
    }

    /// What each slot should have of so many.
    pub fn at(&self, total: u64) -> Vec<f64> {
        let since = total.saturating_sub(self.total) as f64;
        self.due.iter().zip(&self.shares).map(|(due, share)| due + since * share).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spread::Spread;

    #[test]
    fn a_time_without_a_slot_is_not_held_against_the_spread() {
        let mut expected = Expected::new(vec![0.5, 0.5]);
        expected.handle_change(1000, vec![1.0, 0.0]);
        expected.handle_change(3000, vec![0.5, 0.5]);
        assert_eq!(expected.at(4000), [3000.0, 1000.0]);
        assert!(Spread::weighted(&[3010, 990], &expected.at(4000)).p_value > 0.5);
        assert!(Spread::equal(&[3010, 990]).p_value < 1e-6);
    }
}
