//! A leave that is a restart: sessions and flows are parked, not finished.
//!
//! ```text
//!   TERM --restart pending, or on_stop = "park"--> each worker sends all it has into a socket pair
//!        --all have left--> both ends of each pair into systemd's store --> exit
//!   start --a slot's worker is ready--> it gets its pair, and says Done
//! ```
//!
//! What lies in a pair is in flight: nobody's and alive, whole bundles as any
//! hand-over sends them. What does not fit is finished within `drain_timeout`,
//! as at any leave. Bounded by the pair's buffer (some hundred bundles of a
//! hundred sessions) and, without CAP_SYS_RESOURCE, by RLIMIT_NOFILE
//! descriptors in flight for all pairs together.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::Supervisor;
use crate::config::OnStop;
use crate::control::{self, PeerMessage, ToWorker};
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::notify;
use crate::sys::process::Child;
use crate::sys::shared;

/// Bytes that a pair is asked to hold; the kernel grants net.core.wmem_max.
const LOT_BYTES: usize = 4 << 20;
/// How long systemctl may take: the leave waits for it.
const ASK_LIMIT: Duration = Duration::from_millis(1_500);

/// A worker's sessions on their way over a restart.
#[derive(Debug)]
pub struct Lot {
    slot: usize,
    a: Channel,
    b: Channel,
    /// A worker is taking what is in it.
    given: bool,
    refused: usize,
}

impl Lot {
    /// One that came back.
    pub fn returned(slot: usize, a: OwnedFd, b: OwnedFd) -> Lot {
        Lot { slot, a: Channel::from_fd(a), b: Channel::from_fd(b), given: false, refused: 0 }
    }
}

impl Supervisor {
    /// Whether a leave that a signal asked for is to park.
    pub(super) fn is_to_park(&mut self) -> bool {
        let wanted = self.generation.config.daemon.on_stop == OnStop::Park;
        if !self.store.is_there() {
            if wanted {
                warn!("on_stop = \"park\" needs systemd's fd store, and nobody listens: draining");
            }
            return false;
        }
        match self.noted_job.take().or_else(pending_job) {
            Some(job) => {
                info!("systemd's pending job is a {job}");
                // try-restart and its like are restarts by then.
                wanted || job.contains("restart")
            }
            None => wanted,
        }
    }

    /// A slot's worker sends all it has into a pair, and leaves.
    pub(super) fn park(&mut self, slot: usize, limit: Option<Millis>) {
        self.note_steering();
        let pair = Channel::pair().inspect(|(a, _)| a.set_send_buffer(LOT_BYTES));
        match pair {
            Ok((a, b)) => {
                if let Some(worker) = &mut self.slots[slot].current {
                    let message = ToWorker::HandOver {
                        removed: Vec::new(),
                        limit,
                        park: true,
                        shares: false,
                        fault: false,
                    };
                    worker.tell(&message, &[a.as_fd()]);
                }
                self.lots.push(Lot { slot, a, b, given: false, refused: 0 });
            }
            Err(error) => {
                warn!(%error, "no pair to park in: the worker drains");
                self.slots[slot].drain(limit);
            }
        }
    }

    /// Before the first worker leaves: tables change as they go.
    fn note_steering(&mut self) {
        if self.parked_steering.is_none() {
            let json = serde_json::to_vec(&self.steering.states()).expect("tables are plain data");
            self.parked_steering = shared::sealed("evenkeel-steering", &json)
                .inspect_err(|error| warn!(%error, "parked flows will be steered anew"))
                .ok();
        }
    }

    /// Every worker has left: systemd gets what they parked.
    pub(super) fn store_lots(&mut self) {
        let mut kept = 0;
        for lot in std::mem::take(&mut self.lots) {
            if !lot.b.is_readable() {
                continue;
            }
            // Whoever reads it knows by this that it has all.
            let ended = control::send(&lot.a, &PeerMessage::Done { heard: 0 }, &[]);
            if let Err(error) = &ended {
                warn!(slot = lot.slot, %error, "what was parked has no end");
            }
            kept += usize::from(self.store.keep_lot(lot.slot, lot.a.as_fd(), lot.b.as_fd()));
        }
        if let Some(memory) = self.parked_steering.take() {
            self.store.keep_steering(memory.as_fd());
        }
        if !matches!(notify::barrier(), Ok(true)) {
            warn!("systemd did not say that it has what was parked");
        }
        info!("parked: {kept} workers' sessions are with systemd until the next start");
    }

    /// A slot's worker is ready: it takes what was parked for it.
    pub(super) fn unpark(&mut self, slot: usize) {
        let slot_count = self.slots.len();
        for lot in self.lots.iter_mut().filter(|lot| lot.slot % slot_count == slot) {
            if let Some(worker) = &mut self.slots[slot].current {
                lot.given = true;
                worker.tell(&ToWorker::Unpark, &[lot.b.as_fd()]);
            }
        }
    }

    /// A slot's worker says that it has read a lot to its end.
    pub(super) fn handle_unparked(&mut self, slot: usize) {
        let slot_count = self.slots.len();
        let over = |lot: &mut Lot| {
            if !lot.given || lot.slot % slot_count != slot {
                return false;
            }
            let _ = lot.a.set_nonblocking();
            while let Ok(Some((message, _))) = control::receive::<PeerMessage>(&lot.a) {
                match message {
                    PeerMessage::Taken { refused, .. } => lot.refused += refused.len(),
                    PeerMessage::Done { .. } => return true,
                    _ => {}
                }
            }
            false
        };
        let lots: Vec<Lot> = self.lots.extract_if(.., over).collect();
        for lot in lots {
            match lot.refused {
                0 => info!(slot, "what was parked goes on"),
                count => warn!(slot, "{count} parked sessions have no place any more: reset"),
            }
            self.store.remove_lot(lot.slot);
        }
    }
}

/// The type of the job that systemd has for our unit (`stop`, `restart`), as
/// far as it can be learnt: systemctl has to be there, and reach systemd, as
/// root or by a D-Bus that knows this user. The unit has root ask before the
/// daemon has to (`evenkeel note-job`).
pub fn pending_job() -> Option<String> {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let unit = cgroups
        .lines()
        .filter_map(|line| line.rsplit('/').next())
        .find(|name| name.ends_with(".service"))?
        .to_string();
    let out = shared::unsealed("evenkeel-jobs").ok()?;
    let mut command = Command::new("systemctl");
    command.args(["list-jobs", "--plain", "--no-legend", "--no-pager", &unit]);
    command.stdin(Stdio::null()).stdout(out.try_clone().ok()?).stderr(out.try_clone().ok()?);
    // It would speak to systemd in our place.
    command.env_remove("NOTIFY_SOCKET");
    let mut child = Child::start(&mut command).ok()?;
    let deadline = Instant::now() + ASK_LIMIT;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            warn!("systemctl does not answer: whether this is a restart is not known");
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut text = String::new();
    let mut file = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&out))).ok()?;
    file.read_to_string(&mut text).ok()?;
    let job = job_of(&text, &unit);
    if job.is_none() {
        info!("systemctl tells of no job for {unit}: {}", text.trim());
    }
    job
}

/// `123 evenkeel.service restart running`
fn job_of(text: &str, unit: &str) -> Option<String> {
    let rows = text.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.len() >= 3 && row[1] == unit).map(|row| row[2].to_string()).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_of_our_unit_is_found() {
        let text = "  12 other.service     stop    running\n 345 evenkeel.service  restart running\n";
        assert_eq!(job_of(text, "evenkeel.service").as_deref(), Some("restart"));
        assert_eq!(job_of("No jobs running.\n", "evenkeel.service"), None);
    }
}
