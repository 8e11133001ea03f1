//! The memory that the steering program reads: where everything lies.
//!
//! Two kinds. A listener's page, which the supervisor alone writes: how to
//! find a bucket, and the table. And one page of loads for the whole daemon,
//! into which workers write: a line of 64 bytes a slot, so that no two slots
//! share a line of the cache. They are apart so that no worker can touch a
//! table. Times are in `ticks`, which the program gets from nanoseconds by one
//! shift.

use super::table::BUCKET_COUNT;

/// The listener's page: how a bucket is found, a `Pick`.
pub const PICK: usize = 0;
/// The seed of our own hash.
pub const SEED: usize = 4;
/// With `Pick::Cpu`: a row of the table is so many bits wide.
pub const ROW_SHIFT: usize = 8;
/// With `Pick::Cpu`: the part of the hash that falls within a row.
pub const ROW_MASK: usize = 12;
/// The table's first byte.
pub const TABLE: usize = 64;
/// The length of a listener's page.
pub const PAGE_BYTES: usize = TABLE + BUCKET_COUNT;

/// In a slot's line of the loads: its sessions. The program counts what it
/// steers there, the worker puts it right at the end of each turn.
pub const SESSIONS: usize = 0;
/// The most that it says there: beyond that begins what `program` adds for
/// slots that are slow or stuck.
pub const MOST_SESSIONS: usize = (1 << SLOW_SHIFT) - 1;
/// When the turn began that the worker is in, in ticks; 0 between turns.
pub const TURN_SINCE: usize = 4;
/// Until when the slot counts as slow, in ticks; 0 = it is not.
pub const SLOW_UNTIL: usize = 8;
/// How slow it is then: `slowness` shifted by `SLOW_SHIFT`, to be added to the
/// sessions.
pub const SLOW_LEVEL: usize = 12;
/// Above every count of sessions.
pub const SLOW_SHIFT: u32 = 25;
/// The length of a slot's line, as a shift.
pub const LINE_SHIFT: usize = 6;
/// The length of the page of loads.
pub const LOADS_BYTES: usize = super::MAX_SLOTS << LINE_SHIFT;

/// A tick is so many bits of nanoseconds: 1.05 milliseconds.
pub const TICK_SHIFT: u32 = 20;
/// A turn that has lasted so many ticks makes its worker a bad choice: what
/// comes now waits until it ends.
pub const STUCK_TICKS: u32 = 8;

/// Milliseconds of the monotonic clock in ticks; never 0, which means "none".
/// They wrap after 52 days; differences are what counts.
pub fn ticks(now: u64) -> u32 {
    (((u128::from(now) * 1_000_000) >> TICK_SHIFT) as u32).max(1)
}

/// Whether a slot counts as slow.
pub fn is_slow(slow_until: u32, now: u32) -> bool {
    slow_until != 0 && (slow_until.wrapping_sub(now) as i32) > 0
}

/// Whether a worker is stuck in a turn.
pub fn is_stuck(turn_since: u32, now: u32) -> bool {
    let age = now.wrapping_sub(turn_since) as i32;
    turn_since != 0 && age >= STUCK_TICKS as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_what_the_program_computes_of_nanoseconds() {
        for now in [1, 1000, 86_400_000, 5_000_000_000] {
            assert_eq!(ticks(now), ((now * 1_000_000) >> TICK_SHIFT) as u32 | u32::from(now == 1));
        }
    }

    #[test]
    fn slow_and_stuck_hold_over_the_wrap_of_the_clock() {
        let now = 5u32;
        assert!(is_slow(now.wrapping_add(1), now) && !is_slow(now, now) && !is_slow(0, now));
        assert!(is_slow(3, u32::MAX - 3) && !is_slow(u32::MAX - 3, 3));
        assert!(
            is_stuck(u32::MAX - 3, now) && !is_stuck(0, 1 << 30) && !is_stuck(now, now + STUCK_TICKS - 1)
        );
        // The worker's clock may be a little ahead of the one that is compared.
        assert!(!is_stuck(now + 1, now));
    }
}
