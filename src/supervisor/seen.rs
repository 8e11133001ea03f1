//! What the steward is told so that the daemon can be seen from outside: the
//! daemon's state, the admin socket, why workers ended, the sockets' queues.
//!
//! Owned by the supervisor. Each is told when it changes, and all of them to a
//! new steward; figures only when they are asked for. Bounded by the slots.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::admin::Admin;
use super::figures::Figures;
use super::{Refusal, Supervisor};
use crate::config::Config;
use crate::control::status::Reload;
use crate::control::{DaemonState, ToSteward};
use crate::supervision::Phase;
use crate::sys::shared;

/// What a Rust program ends with that panicked.
const PANICKED: i32 = 101;

/// What is remembered to be told.
#[derive(Debug, Default)]
pub struct Seen {
    figures: Figures,
    reload: Option<Reload>,
    /// For each slot, why its workers ended and how often.
    ends: Vec<BTreeMap<String, u64>>,
    told: Option<DaemonState>,
    admin_told: bool,
}

/// What the next image of the supervisor finds of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct SeenState {
    reload: Option<Reload>,
    ends: Vec<BTreeMap<String, u64>>,
    /// What sockets had dropped that are gone: listener, slot, count.
    gone: Vec<(String, usize, u64)>,
}

impl Seen {
    /// For the next image.
    pub fn pack(&self) -> SeenState {
        SeenState { reload: self.reload.clone(), ends: self.ends.clone(), gone: self.figures.gone() }
    }

    /// As the image before this one left it.
    pub fn unpack(state: SeenState) -> Seen {
        let SeenState { reload, ends, gone } = state;
        Seen { figures: Figures::with_gone(gone), reload, ends, ..Seen::default() }
    }

    /// A new steward knows nothing.
    pub fn forget_told(&mut self) {
        self.told = None;
        self.admin_told = false;
    }

    /// The admin socket is another one.
    pub fn forget_admin(&mut self) {
        self.admin_told = false;
    }

    /// A reload ended so.
    pub fn note_reload(&mut self, success: bool, text: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        self.reload = Some(Reload { success, at: now, text: text.trim_end().to_string() });
    }
}

impl Supervisor {
    /// Tells what changed of the daemon as a whole.
    pub(super) fn tell_seen(&mut self) {
        let state = DaemonState {
            announced: self.announced,
            leaving: self.leave.is_some(),
            reload: self.seen.reload.clone(),
        };
        if self.seen.told.as_ref() != Some(&state)
            && self.steward.send(&ToSteward::Daemon(state.clone()), &[])
        {
            self.seen.told = Some(state);
        }
        if !self.seen.admin_told {
            let admin = self.prepared.admin.as_ref();
            let message = ToSteward::Admin { address: admin.map(|admin| admin.address) };
            let fds: Vec<_> = admin.iter().map(|admin| admin.listener.as_fd()).collect();
            self.seen.admin_told = self.steward.send(&message, &fds);
        }
    }

    /// Tells what waits at the sockets.
    pub(super) fn tell_figures(&mut self) {
        let slots = self.slots.iter().chain(&self.retiring).map(|slot| (slot.number, slot.held()));
        let figures = self.seen.figures.look(slots, &self.generation);
        let json = serde_json::to_vec(&figures).expect("figures are plain data");
        match shared::sealed("evenkeel-figures", &json) {
            Ok(memory) => {
                self.steward.send(&ToSteward::Figures, &[memory.as_fd()]);
            }
            Err(error) => warn!(%error, "the steward gets no figures"),
        }
    }

    /// A slot's worker ended though it was not to.
    pub(super) fn count_end(&mut self, slot: usize, status: ExitStatus) {
        let reason = match self.supervision.phase(slot) {
            Phase::Hung { .. } => "hang",
            Phase::Unborn
            | Phase::Waiting { .. }
            | Phase::Starting
            | Phase::Ready { .. }
            | Phase::Draining
            | Phase::Gone => reason_of(status),
        };
        if self.seen.ends.len() <= slot {
            self.seen.ends.resize_with(slot + 1, BTreeMap::new);
        }
        *self.seen.ends[slot].entry(reason.to_string()).or_default() += 1;
    }

    /// Why a slot's worker was replaced, with how often; what is known of no
    /// process is `other`.
    pub(super) fn restart_reasons(&self, slot: usize) -> BTreeMap<String, u64> {
        let ends = self.seen.ends.get(slot).into_iter().flatten();
        let mut reasons: BTreeMap<String, u64> =
            ends.map(|(reason, count)| (reason.clone(), *count)).collect();
        let known = reasons.values().sum();
        let other = self.supervision.restarts(slot).saturating_sub(known);
        if other > 0 {
            reasons.insert("other".into(), other);
        }
        reasons
    }

    /// Binds the admin address of a configuration that is to come, where it is
    /// another one.
    pub(super) fn bind_admin(&self, config: &Config) -> Result<Option<Option<Admin>>, Refusal> {
        let address = config.daemon.admin;
        let ours = self.prepared.admin.as_ref();
        if ours.map(|admin| admin.address) == address {
            return Ok(None);
        }
        Admin::bind(address, ours).map(Some)
    }
}

/// Whether a process brought its end upon itself, rather than somebody else.
pub fn is_own_fault(status: ExitStatus) -> bool {
    reason_of(status) != "killed"
}

fn reason_of(status: ExitStatus) -> &'static str {
    let signal = status.signal().and_then(|number| Signal::try_from(number).ok());
    match signal {
        // What a program brings upon itself.
        Some(
            Signal::SIGSEGV
            | Signal::SIGBUS
            | Signal::SIGILL
            | Signal::SIGFPE
            | Signal::SIGABRT
            | Signal::SIGTRAP
            | Signal::SIGSYS,
        ) => "crash",
        Some(_) => "killed",
        None if status.code() == Some(PANICKED) => "crash",
        None => "exit",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_a_crash_a_kill_or_an_exit() {
        let reasons = [11, 6, 9, 101 << 8, 1 << 8].map(|raw| reason_of(ExitStatus::from_raw(raw)));
        assert_eq!(reasons, ["crash", "crash", "killed", "crash", "exit"]);
    }
}
