//! The daemon's own leave: how long it may take, and what it ends with.

use std::process::ExitCode;

use crate::sys::clock::Millis;

/// Workers end by themselves at the deadline. After so many milliseconds more
/// they are stuck and killed.
const PATIENCE: Millis = 5_000;

/// A leave that has begun.
#[derive(Debug)]
pub struct Leave {
    deadline: Option<Millis>,
    failed: bool,
}

impl Leave {
    /// Begins now; `None` = without a limit.
    pub fn begin(now: Millis, limit: Option<Millis>) -> Leave {
        Leave { deadline: limit.map(|limit| now.saturating_add(limit)), failed: false }
    }

    /// What is left of the limit.
    pub fn left(&self, now: Millis) -> Option<Millis> {
        self.deadline.map(|deadline| deadline.saturating_sub(now))
    }

    /// When workers that still live are killed.
    pub fn kill_at(&self) -> Option<Millis> {
        self.deadline.map(|deadline| deadline.saturating_add(PATIENCE))
    }

    /// It did not end by itself.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// 0, or 1 where workers had to be killed.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(u8::from(self.failed))
    }
}
