//! A worker on its way out, losing nothing.
//!
//! ```text
//!   Grace --no handshake half open, or 3 s--> Emptying --queues empty--> Finishing --no session, or deadline--> gone
//! ```
//!
//! Grace: a socket filter keeps new handshakes out; those under way still
//! complete and are accepted. Emptying: accept until every queue would block,
//! then close the listeners. Finishing: the sessions end by themselves; what
//! is left at the deadline is reset. Measured: closing without the grace loses
//! rate x round trip x share of the connections; with it, none.

use crate::sys::clock::Millis;

/// The longest grace, in milliseconds: a handshake whose SYN-ACK was lost is
/// answered again after one second, and once more after three.
const GRACE: Millis = 3_000;
/// How often the grace looks for half-open handshakes, in milliseconds.
const LOOK_EVERY: Millis = 50;

/// What a leaving worker does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing yet.
    Wait,
    /// Look whether handshakes are still half open.
    Look,
    /// Accept until every queue would block, then close the listeners.
    Empty,
    /// All is done.
    Exit,
    /// The deadline passed: reset what is left and go.
    GiveUp,
}

/// Where a leaving worker stands.
#[derive(Debug)]
pub struct Leave {
    stage: Stage,
    deadline: Option<Millis>,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Grace { until: Millis, look_at: Millis },
    Emptying,
    Finishing,
}

impl Leave {
    /// The leave begins; after `limit` milliseconds it is over.
    pub fn begin(now: Millis, limit: Option<Millis>) -> Leave {
        let deadline = limit.map(|limit| now.saturating_add(limit));
        let until = deadline.map_or(now + GRACE, |deadline| deadline.min(now + GRACE));
        // Look a moment later: a handshake may be between two queues.
        Leave { stage: Stage::Grace { until, look_at: now + LOOK_EVERY }, deadline }
    }

    /// The leave of a worker whose listeners are closed already.
    pub fn finishing(now: Millis, limit: Option<Millis>) -> Leave {
        Leave { stage: Stage::Finishing, deadline: limit.map(|limit| now.saturating_add(limit)) }
    }

    /// What to do now.
    pub fn step(&mut self, now: Millis, sessions: usize) -> Step {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            return match self.stage {
                Stage::Finishing if sessions == 0 => Step::Exit,
                Stage::Finishing => Step::GiveUp,
                Stage::Grace { .. } | Stage::Emptying => {
                    self.stage = Stage::Emptying;
                    Step::Empty
                }
            };
        }
        match self.stage {
            Stage::Grace { until, .. } if until <= now => {
                self.stage = Stage::Emptying;
                Step::Empty
            }
            Stage::Grace { until, look_at } if look_at <= now => {
                self.stage = Stage::Grace { until, look_at: now + LOOK_EVERY };
                Step::Look
            }
            Stage::Grace { .. } => Step::Wait,
            Stage::Emptying => Step::Empty,
            Stage::Finishing if sessions == 0 => Step::Exit,
            Stage::Finishing => Step::Wait,
        }
    }

    /// A look found no handshake half open.
    pub fn handle_nothing_half_open(&mut self) {
        if let Stage::Grace { .. } = self.stage {
            self.stage = Stage::Emptying;
        }
    }

    /// The queues are empty and the listeners closed.
    pub fn handle_closed(&mut self) {
        self.stage = Stage::Finishing;
    }

    /// Whether the deadline has passed.
    pub fn is_over(&self, now: Millis) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// When `step` is to be asked again at the latest.
    pub fn next_deadline(&self) -> Option<Millis> {
        match self.stage {
            Stage::Grace { until, look_at } => Some(until.min(look_at)),
            Stage::Emptying | Stage::Finishing => self.deadline,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grace_ends_when_nothing_is_half_open() {
        let mut leave = Leave::begin(0, Some(30_000));
        assert_eq!(leave.step(0, 1), Step::Wait);
        assert_eq!(leave.step(50, 1), Step::Look);
        leave.handle_nothing_half_open();
        assert_eq!(leave.step(51, 1), Step::Empty);
        leave.handle_closed();
        assert_eq!(leave.step(52, 1), Step::Wait);
        assert_eq!(leave.step(53, 0), Step::Exit);
    }

    #[test]
    fn the_grace_ends_after_three_seconds_whatever_is_seen() {
        let mut leave = Leave::begin(0, None);
        for now in (50..3_000).step_by(50) {
            assert_eq!(leave.step(now, 0), Step::Look);
        }
        assert_eq!(leave.step(3_000, 0), Step::Empty);
    }

    #[test]
    fn the_deadline_empties_the_queues_first_and_then_gives_up() {
        let mut leave = Leave::begin(0, Some(10));
        assert_eq!(leave.step(10, 5), Step::Empty);
        leave.handle_closed();
        assert_eq!(leave.step(10, 5), Step::GiveUp);
    }
}
