//! How a worker waits for a CPU.
//!
//! With little to do it runs as soon as something comes, in place of what has
//! the CPU, as every program does. With much to do that is bad for all: a
//! client's or a server's every single message would push the sender aside for
//! one more turn of this loop. A busy worker waits until the other's turn is
//! over (SCHED_BATCH), and then finds many messages at once. Where a CPU is free
//! there is no difference, and a policy that somebody chose is left alone.
//! Measured: docs/decisions/0018-a-busy-worker-does-not-preempt.md.

use tracing::debug;

use crate::sys::clock::{self, Millis};
use crate::sys::scheduling::{self, Policy};

/// How often the worker looks how busy it is, in milliseconds, while it turns.
const LOOK_EVERY: Millis = 200;

/// A worker that uses this much of a CPU, in thousandths, is busy, and is so
/// until it uses half as much.
const BUSY: u64 = 250;

/// What a worker knows of its own pace.
#[derive(Debug)]
pub struct Pace {
    /// `None` = not ours to choose.
    policy: Option<Policy>,
    looked: Millis,
    /// CPU time that was used until then, in microseconds.
    used: u64,
}

impl Pace {
    /// Of the calling thread, which begins at an ordinary pace unless somebody
    /// chose another.
    pub fn begin(now: Millis) -> Pace {
        let policy = scheduling::policy().ok().flatten().filter(|policy| *policy == Policy::Normal);
        Pace { policy, looked: now, used: clock::thread_micros() }
    }

    /// Looks, now and then, whether the pace still fits.
    pub fn handle_turn(&mut self, now: Millis) {
        let Some(policy) = self.policy else { return };
        let passed = now.saturating_sub(self.looked);
        if passed < LOOK_EVERY {
            return;
        }
        let used = clock::thread_micros();
        let wanted = fitting(policy, used.saturating_sub(self.used), passed);
        (self.looked, self.used) = (now, used);
        if wanted != policy {
            self.change(policy, wanted);
        }
    }

    fn change(&mut self, from: Policy, to: Policy) {
        // By now somebody may have chosen, with chrt(1) say; or a filter of
        // system calls forbids it.
        let is_ours = scheduling::policy().is_ok_and(|now| now == Some(from));
        self.policy = (is_ours && scheduling::set_policy(to).is_ok()).then_some(to);
        debug!(policy = ?self.policy, "another pace");
    }
}

/// The policy for who had one until now and used so many microseconds of CPU in
/// so many milliseconds.
fn fitting(before: Policy, used: u64, passed: Millis) -> Policy {
    let share = used / passed.max(1);
    match before {
        Policy::Normal if share >= BUSY => Policy::Batch,
        Policy::Batch if share < BUSY / 2 => Policy::Normal,
        same => same,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_at_a_quarter_and_calm_at_an_eighth() {
        for (before, used, after) in [
            (Policy::Normal, 0, Policy::Normal),
            (Policy::Normal, 49_999, Policy::Normal),
            (Policy::Normal, 50_000, Policy::Batch),
            (Policy::Batch, 50_000, Policy::Batch),
            (Policy::Batch, 25_000, Policy::Batch),
            (Policy::Batch, 24_999, Policy::Normal),
            (Policy::Batch, 0, Policy::Normal),
        ] {
            assert_eq!(fitting(before, used, 200), after, "{before:?} {used}");
        }
        assert_eq!(fitting(Policy::Batch, 60_000, 10_000), Policy::Normal, "a long sleep is no work");
    }
}
