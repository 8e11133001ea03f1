//! Trouble that strangers can cause at will, logged at a bounded rate.
//!
//! For each listener and each kind of trouble one line in ten seconds, which
//! says how many there were since the last; the counters have all of them.

use crate::sys::clock::Millis;

const EVERY: Millis = 10_000;

/// What was complained of, and when.
#[derive(Debug, Default)]
pub struct Complaints(Vec<Complaint>);

#[derive(Debug)]
struct Complaint {
    about: usize,
    kind: &'static str,
    told: Millis,
    untold: u64,
}

impl Complaints {
    /// Notes trouble; where a line is due, how many there were without one.
    /// `about` is the number of a listener or an upstream, as `kind` says.
    pub fn note(&mut self, about: usize, kind: &'static str, now: Millis) -> Option<u64> {
        let is_it = |old: &&mut Complaint| old.about == about && old.kind == kind;
        match self.0.iter_mut().find(is_it) {
            None => {
                self.0.push(Complaint { about, kind, told: now, untold: 0 });
                Some(0)
            }
            Some(old) if now.saturating_sub(old.told) < EVERY => {
                old.untold += 1;
                None
            }
            Some(old) => {
                old.told = now;
                Some(std::mem::take(&mut old.untold))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_in_ten_seconds_for_each_kind() {
        let mut complaints = Complaints::default();
        let mut lines = Vec::new();
        for now in 0..25_000 {
            lines.extend(complaints.note(1, "malformed", now));
        }
        assert_eq!(lines, [0, 9_999, 9_999]);
        assert_eq!(complaints.note(2, "malformed", 25_000), Some(0));
        assert_eq!(complaints.note(1, "slow", 25_000), Some(0));
    }
}
