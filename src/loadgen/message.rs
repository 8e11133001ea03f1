//! What the threads of a run share, and what they tell the collector.
//!
//! Plain data. `Shared` is set up before the first thread and outlives the
//! last; messages go one way, over a channel.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::pattern::Noise;
use super::plan::Plan;
use super::tally::Tally;

/// How often a thread tells the collector what it has counted.
pub const REPORT_EVERY: Duration = Duration::from_millis(200);

/// What all threads share.
pub struct Shared {
    /// The run.
    pub plan: Plan,
    /// The payload.
    pub noise: Noise,
    /// Whether any thread was ever answered.
    pub answered: AtomicBool,
    /// Whether a person wants the run to end now.
    pub interrupted: AtomicBool,
    /// When the run began; schedules count from here.
    pub began: Instant,
}

/// Where a thread is in its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not measured.
    Warmup,
    /// Measured.
    Measure,
    /// Nothing new is started; what is under way may end.
    After,
}

/// What a thread tells the collector.
#[derive(Debug)]
pub enum Message {
    /// Counts since its last message.
    Interval(Interval),
    /// It has ended.
    Done(Ending),
}

/// What one thread counted between two moments.
#[derive(Debug)]
pub struct Interval {
    /// Where it was in its run.
    pub phase: Phase,
    /// Since when.
    pub from: Instant,
    /// Until when.
    pub to: Instant,
    /// The counts.
    pub tally: Box<Tally>,
}

/// How a thread ended.
#[derive(Clone, Debug)]
pub struct Ending {
    /// CPU time over wall time.
    pub busy: f64,
    /// The last answer, or where there was none, the end.
    pub last_answer: Option<Instant>,
    /// Starts of the open loop that were due and never made.
    pub not_started: u64,
    /// Starts that had to wait for a free connection.
    pub waited: u64,
    /// Client addresses used.
    pub addresses: usize,
    /// Nothing was ever answered, so it gave up before its time.
    pub gave_up: bool,
    /// A person ended it before its time.
    pub interrupted: bool,
}
