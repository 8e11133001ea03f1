//! What the steward and systemd are told of the daemon, and the steward's life.

use tracing::{error, info};

use super::notify::Facts;
use super::{STEWARD, Supervisor};
use crate::control::{FromSteward, ToSteward, WorkerState};
use crate::counters::Process;
use crate::supervision::Phase;
use crate::sys::clock;

impl Supervisor {
    pub(super) fn start_steward(&mut self) {
        let now = clock::coarse();
        if self.leave.is_some() && self.end.is_some() {
            return;
        }
        let started = self.steward.start(
            &self.prepared,
            &self.generation,
            &self.start.config_path,
            self.poll.registry(),
            STEWARD,
        );
        if let Err(error) = started {
            error!(%error, "the steward could not be started");
            self.steward.handle_failure(now);
        }
        self.told.clear();
        self.seen.forget_told();
        self.steering.forget_told();
        self.strangers.forget_told();
        self.tables_changed = true;
        self.tell_of_access_log();
        self.overrides_changed = true;
        self.tell_steward();
    }

    pub(super) fn read_steward(&mut self) {
        while let Some(message) = self.steward.receive(self.poll.registry()) {
            match message {
                FromSteward::Ready => info!("steward ready"),
                FromSteward::Figures => self.tell_figures(),
                FromSteward::Request { id, request } => self.handle_request(id, request),
            }
        }
    }

    /// Tells the steward what changed since it was last told.
    pub(super) fn tell_steward(&mut self) {
        // Before the tables: a new owner writes no board without it.
        if self.overrides_changed {
            let message = ToSteward::Overrides(self.overrides.list());
            self.overrides_changed = !self.steward.send(&message, &[]);
        }
        if self.tables_changed && self.send_tables() {
            self.tables_changed = false;
        }
        let known = self.supervision.slot_count().min(self.slots.len());
        let states: Vec<WorkerState> = (0..known).map(|slot| self.state(slot)).collect();
        if states != self.told && self.steward.send(&ToSteward::Workers(states.clone()), &[]) {
            self.told = states;
        }
        self.tell_seen();
        let steward = &mut self.steward;
        self.steering.tell(|message| steward.send(message, &[]));
        self.strangers.tell(|message| steward.send(message, &[]));
    }

    /// How the daemon is, for systemd.
    pub(super) fn facts(&self) -> Facts {
        let (slots, now) = (0..self.slots.len(), clock::coarse());
        let is_ready = |slot: &usize| matches!(self.supervision.phase(*slot), Phase::Ready { .. });
        Facts {
            ready_count: slots.clone().filter(is_ready).count(),
            active: self.slots.iter().map(|slot| slot.count(Process::Active)).sum(),
            accepted: self.slots.iter().map(|slot| slot.count(Process::Accepted)).collect(),
            leaving: self.leave.is_some(),
            tended: slots.clone().all(|slot| self.supervision.is_tended(slot, now)),
        }
    }

    pub(super) fn state(&self, slot: usize) -> WorkerState {
        let state = match self.supervision.phase(slot) {
            Phase::Unborn | Phase::Starting => "starting",
            Phase::Waiting { .. } => "backoff",
            Phase::Ready { .. } => "ready",
            Phase::Hung { .. } => "hung",
            Phase::Draining | Phase::Gone => "draining",
        };
        let restart_reasons = self.restart_reasons(slot);
        WorkerState {
            slot,
            pid: self.slots[slot].pid(),
            generation: self.slots[slot]
                .current
                .as_ref()
                .map_or(self.generation.number, |p| p.generation.number),
            state: state.into(),
            restarts: restart_reasons.values().sum(),
            restart_reasons,
            helped_by: self.supervision.lent_to(slot),
            keeper: self.keeper_state(slot),
        }
    }
}
