//! Workers that are killed, again and again.

use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::daemon::{Daemon, children_of, name_of, runs};
use super::within;

/// A daemon whose dead workers are replaced at once, however often they die.
pub fn start(text: &str) -> Daemon {
    let mut daemon = Daemon::start_with(text, |command| {
        command.env("EVENKEEL_TEST_HASTE", "1");
    });
    daemon.wait_ready();
    daemon
}

/// The process of this name, as `ek-worker-0`.
pub fn process(daemon: &Daemon, name: &str) -> Option<u32> {
    let is_it = |pid: &u32| runs(*pid) && name_of(*pid) == name;
    children_of(daemon.pid()).into_iter().find(is_it)
}

/// The same, as soon as there is one.
#[track_caller]
pub fn wait_for(daemon: &Daemon, name: &str) -> u32 {
    let mut found = None;
    within(Duration::from_secs(60), name, || {
        found = process(daemon, name);
        found.is_some()
    });
    found.expect("waited for")
}

/// Kills a slot's worker, unless it is being replaced just then. Who that is
/// the daemon knows: a keeper that has just begun is called as its worker.
pub fn kill(daemon: &Daemon, slot: usize) -> bool {
    let Ok(answer) = daemon.ask("status") else { return false };
    let worker = answer["status"]["workers"][slot]["pid"].as_u64().filter(|pid| *pid != 0);
    worker.is_some_and(|pid| nix::sys::signal::kill(Pid::from_raw(pid as i32), Signal::SIGKILL).is_ok())
}

/// Sessions that were reset because their numbers did not agree.
pub fn self_check_resets(daemon: &Daemon) -> u64 {
    let workers = daemon.status().workers;
    workers.iter().filter_map(|worker| Some(worker.keeper.as_ref()?.self_check_resets)).sum()
}

/// Numbers that look like chance, the same in every run.
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}
