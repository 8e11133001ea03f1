//! How long to wait before a process that died is started again.
//!
//! At once the first time; then 100 ms, doubled for each further death up to
//! 30 s; all is forgiven after 30 s of health.

use serde::{Deserialize, Serialize};

/// The wait after the second death in a row, in milliseconds.
pub const FIRST_DELAY: u64 = 100;
/// The longest wait, in milliseconds.
pub const LONGEST_DELAY: u64 = 30_000;
/// A process that was ready for so long has proved itself, in milliseconds.
pub const HEALTHY_AFTER: u64 = 30_000;

/// The deaths of one place in a row.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Backoff {
    deaths: u32,
}

impl Backoff {
    /// A process died that had been ready for so long (0 = never was);
    /// answers the wait before its successor, in milliseconds.
    pub fn handle_death(&mut self, ready_for: u64) -> u64 {
        if ready_for >= HEALTHY_AFTER {
            self.deaths = 0;
        }
        self.deaths = self.deaths.saturating_add(1);
        match self.deaths {
            0 | 1 => 0,
            deaths => (FIRST_DELAY << (deaths - 2).min(20)).min(LONGEST_DELAY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_from_100_ms_to_30_s_and_begins_anew_after_health() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..12).map(|_| backoff.handle_death(0)).collect();
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]);
        assert_eq!(backoff.handle_death(HEALTHY_AFTER), 0);
        assert_eq!(backoff.handle_death(HEALTHY_AFTER - 1), 100);
    }
}
