//! Finds out that this process did not run for a while: the machine slept, or
//! the process was stopped.
//!
//! Time-outs that ran off meanwhile say nothing about servers. Two signs:
//! the clock that counts sleep ran ahead of the one that does not, or a look
//! came much later than looks do. Owned by the steward, who looks twice a
//! second and before it believes a check.

/// Milliseconds of a clock.
type Millis = u64;

/// How far the clock that counts sleep may run ahead between two looks.
const SLEEP: Millis = 1_000;
/// How late a look may be; a loaded machine is late by less.
const LATE: Millis = 5_000;

/// What the last look saw.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    monotonic: Millis,
    with_sleep: Millis,
}

impl Gap {
    /// From now on. `with_sleep` is the clock that counts sleep.
    pub fn new(monotonic: Millis, with_sleep: Millis) -> Gap {
        Gap { monotonic, with_sleep }
    }

    /// Whether there was a gap since the last look, which is to come at least
    /// once in `LATE`.
    pub fn look(&mut self, monotonic: Millis, with_sleep: Millis) -> bool {
        let ran = monotonic.saturating_sub(self.monotonic);
        let passed = with_sleep.saturating_sub(self.with_sleep);
        *self = Gap { monotonic, with_sleep };
        ran > LATE || passed > ran + SLEEP
    }
}
