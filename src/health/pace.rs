//! When a server is checked next: an interval with jitter.
//!
//! Hundreds of servers of one interval would otherwise be checked in one
//! burst, and a daemon on each of ten machines would burst at the same moment.
//! Owned by a server's check; randomness comes in as a seed.

use std::time::Duration;

/// An interval differs from the one asked for by up to so many hundredths.
const JITTER_PERCENT: u64 = 10;
/// The first checks of a start are spread over so much a server, and over one
/// interval at most.
const FIRST_EACH: Duration = Duration::from_millis(5);

/// The times between the checks of one server.
#[derive(Clone, Debug)]
pub struct Pace {
    random: u64,
}

impl Pace {
    /// The pace of the server with this seed.
    pub fn new(seed: u64) -> Pace {
        Pace { random: seed }
    }

    /// How long the first check waits, where so many begin together.
    pub fn first(&mut self, count: usize, interval: Duration) -> Duration {
        let span = FIRST_EACH.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX)).min(interval);
        Duration::from_micros(self.below(span.as_micros() as u64))
    }

    /// How long the next check waits after the last one began.
    pub fn next(&mut self, interval: Duration) -> Duration {
        let micros = interval.as_micros() as u64;
        let most = micros / 100 * JITTER_PERCENT;
        Duration::from_micros(micros - most + self.below(2 * most + 1))
    }

    /// A number below this one, all alike likely; 0 where it is 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // SplitMix64's finalizer: neighbouring seeds give unrelated numbers.
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        ((u128::from(mixed) * u128::from(limit)) >> 64) as u64
    }
}
