//! Whether a worker keeps its clients waiting: judged by itself, turn by turn.
//!
//! ```text
//!   Fast --a slow turn--> Slow for a hundred such turns --over--> watched as long again --> Fast
//!                           ^ twice as long each time             |
//!                           +------------- a slow turn -----------+
//! ```
//! A turn of the event loop is what a new client waits for at the least. One
//! long turn is chance and soon forgotten; who is found slow whenever it is
//! tried again is tried ever more seldom, so that finding out costs few
//! clients. Owned by the worker, which tells the outcome in its line of loads.

/// A turn of so many milliseconds is slow.
pub const SLOW_TURN: u64 = 20;
/// The first time lasts so many times as long as the turn.
const TURNS: u64 = 100;
/// But not longer than this, in milliseconds.
const LONGEST_FIRST: u64 = 10_000;
/// The longest time at all.
const LONGEST: u64 = 60_000;
/// The highest level.
pub const MOST: u32 = 15;

/// How slow a worker is, and until when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slowness {
    until: u64,
    hold: u64,
    level: u32,
}

impl Slowness {
    /// Takes in a turn that ended now; whether anything changed.
    pub fn handle_turn(&mut self, turn: u64, now: u64) -> bool {
        let before = *self;
        if turn < SLOW_TURN {
            if self.until <= now {
                self.level = 0;
            }
            return *self != before;
        }
        let first = (turn * TURNS).min(LONGEST_FIRST);
        if now < self.until {
            self.until = self.until.max(now + first);
            self.level = self.level.max(level(turn));
            return *self != before;
        }
        let is_soon = now < self.until + self.hold;
        self.hold = if is_soon { (self.hold * 2).clamp(first, LONGEST) } else { first };
        self.until = now + self.hold;
        self.level = level(turn);
        true
    }

    /// Until when, and how slow; `None` where it is not.
    pub fn told(&self) -> Option<(u64, u32)> {
        (self.level > 0).then_some((self.until, self.level))
    }
}

/// One more for each doubling, so that what hardly differs counts as the same.
fn level(turn: u64) -> u32 {
    ((turn / (SLOW_TURN / 2)).ilog2()).min(MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_turn_is_forgotten_after_a_hundred_such() {
        let mut slowness = Slowness::default();
        assert!(!slowness.handle_turn(19, 1000));
        assert!(slowness.handle_turn(25, 1000));
        assert_eq!(slowness.told(), Some((3500, 1)));
        assert!(!slowness.handle_turn(0, 3499) && slowness.told().is_some());
        assert!(slowness.handle_turn(0, 3500) && slowness.told().is_none());
    }

    #[test]
    fn who_is_slow_whenever_it_is_tried_is_tried_ever_more_seldom() {
        let (mut slowness, mut now, mut holds) = (Slowness::default(), 0, Vec::new());
        for _ in 0..6 {
            slowness.handle_turn(50, now);
            let (until, _) = slowness.told().unwrap();
            holds.push(until - now);
            now = until + 100;
            slowness.handle_turn(0, now);
        }
        assert_eq!(holds, [5_000, 10_000, 20_000, 40_000, 60_000, 60_000]);
        // Well for as long again: it begins anew.
        now += 60_000;
        slowness.handle_turn(50, now);
        assert_eq!(slowness.told().unwrap().0 - now, 5_000);
    }

    #[test]
    fn slow_turns_in_one_time_lengthen_it_and_do_not_double_it() {
        let mut slowness = Slowness::default();
        slowness.handle_turn(50, 0);
        slowness.handle_turn(200, 100);
        slowness.handle_turn(50, 200);
        assert_eq!(slowness.told(), Some((10_100, 4)));
    }

    #[test]
    fn levels_double() {
        assert_eq!([20, 39, 40, 80, 160, 1_000_000].map(level), [1, 1, 2, 3, 4, MOST]);
    }
}
