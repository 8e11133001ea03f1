//! The daemon's own leave: how long it may take, and what it ends with.

use std::process::ExitCode;

use tracing::{error, info, warn};

use super::slot::Slot;
use super::{Refusal, Supervisor};
use crate::supervision::Event;
use crate::sys::clock::{self, Millis};

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

impl Supervisor {
    /// The first call begins to leave, the second ends at once.
    pub(super) fn handle_leave(&mut self, limit: Option<Millis>, may_park: bool) -> Result<(), Refusal> {
        if let Some(leave) = &mut self.leave {
            warn!("a second signal: leaving at once");
            leave.fail();
            self.end = Some(leave.exit_code());
            self.kill_all();
            return Ok(());
        }
        let park = may_park && self.is_to_park();
        self.forget_upgrade("the daemon leaves");
        self.abort_reload("the daemon leaves");
        info!("leaving: nothing new is taken, what is here is finished");
        self.notify.begin_leave(clock::coarse());
        self.leave = Some(Leave::begin(clock::coarse(), limit));
        if park {
            info!("sessions are parked for the next start");
            self.is_parking = true;
        } else {
            self.store.clear(clock::coarse());
        }
        self.step(Event::Leave)
    }

    /// Workers end by themselves at the deadline; one that does not is stuck.
    pub(super) fn handle_leave_deadline(&mut self) {
        if let Some(leave) = &mut self.leave
            && leave.kill_at().is_some_and(|at| at <= clock::coarse())
            && self.end.is_none()
        {
            error!("workers are stuck past drain_timeout: killed");
            leave.fail();
            self.end = Some(leave.exit_code());
            self.kill_all();
        }
    }

    pub(super) fn kill_all(&mut self) {
        self.slots.iter_mut().chain(&mut self.retiring).for_each(Slot::kill);
        self.steward.end();
    }
}
