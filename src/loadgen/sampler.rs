//! Watches the open sessions of the slots while the load runs.
//!
//! A thread that looks at the daemon a few times a second and keeps the most
//! uneven moment. It ends when it is asked for what it saw.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::daemon::{self, Snapshot};
use super::message::Shared;

/// How often it looks.
const EVERY: Duration = Duration::from_millis(250);

/// Fewer open sessions a slot than this say nothing about evenness.
const ACTIVE_PER_SLOT: u64 = 5;

/// The most uneven moment of the sessions that were open.
#[derive(Clone, Debug)]
pub struct WorstActive {
    /// Looks that had enough sessions to judge.
    pub samples: u64,
    /// The largest ratio of a slot's open sessions to the mean.
    pub max_over_mean: f64,
    /// The open sessions of that moment.
    pub per_slot: Vec<u64>,
    /// When.
    pub at: Instant,
}

/// The thread.
pub struct Sampler {
    /// Dropped to make the thread end.
    stop: Sender<()>,
    thread: JoinHandle<Option<WorstActive>>,
}

impl Sampler {
    /// Starts looking at the daemon behind this socket.
    pub fn start(socket: PathBuf, shared: Arc<Shared>) -> Sampler {
        let (stop, stopped) = crossbeam_channel::bounded(0);
        Sampler { stop, thread: thread::spawn(move || watch(&socket, &shared, &stopped)) }
    }

    /// Ends it; what it saw.
    pub fn finish(self) -> Option<WorstActive> {
        drop(self.stop);
        self.thread.join().expect("the sampler does not panic")
    }
}

fn watch(socket: &Path, shared: &Shared, stopped: &Receiver<()>) -> Option<WorstActive> {
    let mut worst = None;
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(EVERY) {
        // A look that fails is made up for by the next one.
        if let Ok(snapshot) = daemon::look(socket, shared.plan.transport.name(), shared.plan.target) {
            take(&mut worst, Instant::now(), &snapshot);
        }
    }
    worst
}

fn take(worst: &mut Option<WorstActive>, at: Instant, snapshot: &Snapshot) {
    let (sum, slot_count) = (snapshot.active.iter().sum::<u64>(), snapshot.active.len() as u64);
    if slot_count < 2 || sum < ACTIVE_PER_SLOT * slot_count {
        return;
    }
    let most = snapshot.active.iter().copied().max().unwrap_or(0);
    let max_over_mean = most as f64 * slot_count as f64 / sum as f64;
    let samples = worst.as_ref().map_or(0, |worst| worst.samples) + 1;
    match worst {
        Some(worst) if worst.max_over_mean >= max_over_mean => worst.samples = samples,
        _ => *worst = Some(WorstActive { samples, max_over_mean, per_slot: snapshot.active.clone(), at }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_uneven_moment_is_kept_and_few_sessions_are_no_moment() {
        let (mut worst, start) = (None, Instant::now());
        let looks: [&[u64]; 5] = [&[10, 10], &[3, 1], &[30, 10], &[10, 11], &[9]];
        for (second, active) in looks.into_iter().enumerate() {
            let snapshot = Snapshot {
                listener: String::new(),
                steering: None,
                per_slot: Vec::new(),
                expected: None,
                active: active.to_vec(),
            };
            take(&mut worst, start + Duration::from_secs(second as u64), &snapshot);
        }
        let worst = worst.expect("three looks had enough sessions");
        assert_eq!((worst.samples, worst.per_slot), (3, vec![30, 10]));
        assert_eq!((worst.max_over_mean, worst.at), (1.5, start + Duration::from_secs(2)));
    }
}
