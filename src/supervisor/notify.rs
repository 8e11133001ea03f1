//! What systemd is told: ready, stopping, how it goes, that we live.
//!
//! Owned by the supervisor, which calls `tick` when it is due. Without
//! `$NOTIFY_SOCKET` nothing is sent and nothing is woken for. What is sent is
//! bounded by time: a status every five seconds where its text changed, an
//! extension every five seconds of a leave, and a sign of life at half of
//! `$WATCHDOG_USEC`. It ends with the daemon.

use tracing::warn;

use crate::spread::Spread;
use crate::sys::clock::Millis;
use crate::sys::notify;

/// Between two statuses and between two extensions, in milliseconds.
const EVERY: Millis = 5_000;
/// A leave asks for so much more time, again and again, in microseconds: a
/// supervisor that hangs in it is still killed when this is over.
const EXTENSION: u32 = 15_000_000;

/// How the daemon is, for a status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Workers that accept.
    pub ready_count: usize,
    /// Sessions that live.
    pub active: u64,
    /// Connections that each slot accepted.
    pub accepted: Vec<u64>,
    /// The daemon is on its way out.
    pub leaving: bool,
    /// Every slot beats or is being replaced.
    pub tended: bool,
}

/// The daemon's side of sd_notify(3).
#[derive(Debug)]
pub struct Notify {
    /// Somebody listens.
    heard: bool,
    /// The time between two signs of life.
    watchdog: Option<Millis>,
    alive_at: Millis,
    status_at: Millis,
    status: String,
    /// The last status's time, and all connections accepted until then.
    before: (Millis, u64),
    extend_at: Option<Millis>,
}

impl Notify {
    /// As the environment has it.
    pub fn of_environment(now: Millis) -> Notify {
        let heard = std::env::var_os("NOTIFY_SOCKET").is_some();
        // Half of it, as sd_watchdog_enabled(3) recommends.
        let watchdog = notify::watchdog().map(|limit| (limit / 2).max(1));
        Notify {
            heard,
            watchdog: watchdog.filter(|_| heard),
            alive_at: now,
            status_at: now + EVERY,
            status: String::new(),
            before: (now, 0),
            extend_at: None,
        }
    }

    /// Every worker accepts on every listener.
    pub fn announce(&mut self, now: Millis, facts: &Facts) {
        self.status = self.text(now, facts);
        self.send(&format!("READY=1\nSTATUS={}", self.status));
    }

    /// Another configuration is brought into force; ends with `end_reload`.
    pub fn begin_reload(&self) {
        self.send(&notify::reloading());
    }

    /// It serves, or was refused: either way the daemon is ready.
    pub fn end_reload(&self) {
        self.send("READY=1");
    }

    /// The daemon begins to leave.
    pub fn begin_leave(&mut self, now: Millis) {
        self.send("STOPPING=1");
        self.extend_at = Some(now);
        self.status_at = now;
    }

    /// Whether anything is to be sent.
    pub fn is_due(&self, now: Millis) -> bool {
        self.next_deadline().is_some_and(|at| at <= now)
    }

    /// Sends what is due.
    pub fn tick(&mut self, now: Millis, facts: &Facts) {
        if let Some(interval) = self.watchdog
            && self.alive_at <= now
        {
            self.alive_at = now + interval;
            // What is not said here ends the daemon: see `Supervision::is_tended`.
            if facts.tended {
                self.send("WATCHDOG=1");
            }
        }
        if self.extend_at.is_some_and(|at| at <= now) {
            self.extend_at = Some(now + EVERY);
            self.send(&format!("EXTEND_TIMEOUT_USEC={EXTENSION}"));
        }
        if self.status_at <= now {
            self.status_at = now + EVERY;
            let text = self.text(now, facts);
            self.before = (now, facts.accepted.iter().sum());
            if text != self.status {
                self.status = text;
                self.send(&format!("STATUS={}", self.status));
            }
        }
    }

    /// When `tick` is due at the latest.
    pub fn next_deadline(&self) -> Option<Millis> {
        let alive = self.watchdog.map(|_| self.alive_at);
        let status = Some(self.status_at).filter(|_| self.heard);
        [alive, status, self.extend_at.filter(|_| self.heard)].into_iter().flatten().min()
    }

    fn text(&self, now: Millis, facts: &Facts) -> String {
        let total: u64 = facts.accepted.iter().sum();
        let (ready, all) = (facts.ready_count, facts.accepted.len());
        if facts.leaving {
            return format!("leaving: {} connections left", facts.active);
        }
        let span = now.saturating_sub(self.before.0).max(1);
        let rate = total.saturating_sub(self.before.1) * 1_000 / span;
        let workers =
            if ready == all { format!("{all} workers") } else { format!("{ready} of {all} workers") };
        let mut text = format!("{workers}, {} connections, {rate} new/s", facts.active);
        if total > 0 {
            text += &format!(", spread {:.2}", Spread::equal(&facts.accepted).max_over_mean);
        }
        text
    }

    fn send(&self, state: &str) {
        if self.heard
            && let Err(error) = notify::send(state)
        {
            warn!(%error, "systemd could not be told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_says_workers_connections_rate_and_spread() {
        let mut notify = Notify::of_environment(0);
        let facts = Facts { ready_count: 2, active: 3, accepted: vec![0, 0], ..Facts::default() };
        assert_eq!(notify.text(5_000, &facts), "2 workers, 3 connections, 0 new/s");
        notify.before = (5_000, 100);
        let facts = Facts { ready_count: 1, active: 3, accepted: vec![250, 350], ..Facts::default() };
        assert_eq!(notify.text(10_000, &facts), "1 of 2 workers, 3 connections, 100 new/s, spread 1.17");
        let facts = Facts { leaving: true, ..facts };
        assert_eq!(notify.text(10_000, &facts), "leaving: 3 connections left");
    }

    #[test]
    fn without_anybody_who_listens_nothing_wakes_the_supervisor() {
        let mut notify = Notify { heard: false, watchdog: None, ..Notify::of_environment(0) };
        assert_eq!(notify.next_deadline(), None);
        notify.begin_leave(7);
        assert_eq!(notify.next_deadline(), None);
    }
}
