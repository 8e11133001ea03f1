//! When the exchanges of an open loop are meant to start.
//!
//! Pure: seeded, in time since the start of the run. The schedule never waits
//! for the target: a start that could not be made in time stays due, and its
//! latency counts from here.

use std::time::Duration;

use super::args::Spacing;

/// So many starts are counted one by one.
const COUNTED: f64 = 1e6;

/// splitmix64: small, seeded, good enough for payloads and arrivals.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Above 0, at most 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

/// One thread's part of the schedule.
#[derive(Clone, Debug)]
pub struct Arrivals {
    spacing: Spacing,
    mean_gap: f64,
    next: f64,
    random: Random,
}

impl Arrivals {
    /// The part of thread `index` of `thread_count` of `rate` starts a second.
    /// Fixed starts of the threads interleave; Poisson ones need not.
    pub fn new(spacing: Spacing, rate: f64, index: usize, thread_count: usize, seed: u64) -> Arrivals {
        let mut random = Random::new(seed ^ (index as u64 + 1).wrapping_mul(0xA24B_AED4_963E_E407));
        let mean_gap = thread_count as f64 / rate;
        let next = match spacing {
            Spacing::Fixed => index as f64 / rate,
            Spacing::Poisson => -random.unit().ln() * mean_gap,
        };
        Arrivals { spacing, mean_gap, next, random }
    }

    /// When the next start is due.
    pub fn due(&self) -> Duration {
        Duration::from_secs_f64(self.next)
    }

    /// Goes on to the one after it.
    pub fn advance(&mut self) {
        self.next += match self.spacing {
            Spacing::Fixed => self.mean_gap,
            Spacing::Poisson => -self.random.unit().ln() * self.mean_gap,
        };
    }

    /// How many more are due before `end`; of very many, how many on average.
    pub fn count_before(mut self, end: Duration) -> u64 {
        let expected = (end.as_secs_f64() - self.next) / self.mean_gap;
        if expected > COUNTED {
            return expected.ceil() as u64;
        }
        let mut count = 0;
        while self.due() < end {
            self.advance();
            count += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_starts_of_three_threads_interleave_evenly() {
        let mut due = Vec::new();
        for index in 0..3 {
            let mut part = Arrivals::new(Spacing::Fixed, 300.0, index, 3, 1);
            for _ in 0..100 {
                due.push(part.due().as_micros());
                part.advance();
            }
        }
        due.sort_unstable();
        let gaps: Vec<u128> = due.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| (3332..=3334).contains(gap)), "{gaps:?}");
    }

    #[test]
    fn poisson_starts_have_the_rate_and_the_scatter_of_a_poisson_process() {
        let mut part = Arrivals::new(Spacing::Poisson, 1000.0, 0, 1, 42);
        let mut gaps = Vec::new();
        for _ in 0..20_000 {
            let before = part.due();
            part.advance();
            gaps.push((part.due() - before).as_secs_f64() * 1000.0);
        }
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 1.0).abs() < 0.03 && (variance - 1.0).abs() < 0.08, "{mean} {variance}");
    }

    #[test]
    fn the_same_seed_gives_the_same_schedule() {
        let count =
            |seed| Arrivals::new(Spacing::Poisson, 5000.0, 0, 1, seed).count_before(Duration::from_secs(1));
        assert_eq!(count(7), count(7));
        assert!((4700..5300).contains(&count(7)), "{}", count(7));
    }
}
