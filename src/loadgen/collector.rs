//! Brings together what the threads tell.
//!
//! Owned by the main thread: receives until every thread has ended, keeps the
//! sum and the course over time. Bounded by a few small records a second and
//! thread.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::message::{Ending, Interval, Message, Phase};
use super::progress::Progress;
use super::tally::Tally;

/// What one thread did in one interval, for the plots.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Seconds since the start.
    pub from: f64,
    /// Seconds since the start.
    pub to: f64,
    /// Exchanges completed.
    pub requests: u64,
    /// Troubles.
    pub errors: u64,
    /// Latency in nanoseconds that 99 % stayed below; 0 without an exchange.
    pub p99: u64,
    /// Latency in nanoseconds that half stayed below.
    pub p50: u64,
}

/// All that was told.
#[derive(Debug, Default)]
pub struct Collected {
    /// Warm-up (without measures), measured part and end together.
    pub total: Tally,
    /// Of it, completed after the end of the measured time.
    pub requests_after: u64,
    /// Of it, connections made after the end of the measured time.
    pub connections_after: u64,
    /// Of it, bytes moved after the end of the measured time.
    pub bytes_after: u64,
    /// How the threads ended.
    pub endings: Vec<Ending>,
    /// The course over time.
    pub course: Vec<Piece>,
}

/// Receives until all threads have ended. A thread that dies without a word
/// closes its end of the channel, so this ends then, too.
pub fn collect(
    receiver: &Receiver<Message>,
    thread_count: usize,
    began: Instant,
    progress: &mut Progress,
) -> Collected {
    let mut collected = Collected::default();
    while collected.endings.len() < thread_count {
        match receiver.recv_timeout(Duration::from_millis(250)) {
            Ok(Message::Interval(interval)) => {
                collected.take_interval(interval, began);
                progress.show(&collected.total);
            }
            Ok(Message::Done(ending)) => collected.endings.push(ending),
            Err(RecvTimeoutError::Timeout) => progress.show(&collected.total),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    progress.finish();
    collected
}

impl Collected {
    fn take_interval(&mut self, interval: Interval, began: Instant) {
        let Interval { phase, from, to, mut tally } = interval;
        if phase == Phase::After {
            self.requests_after += tally.requests;
            self.connections_after += tally.connections_measured;
            self.bytes_after += tally.bytes_sent + tally.bytes_received;
        }
        let seconds = |at: Instant| at.saturating_duration_since(began).as_secs_f64();
        let quantile = |q: f64| {
            if tally.latency.is_empty() { 0 } else { tally.latency.value_at_quantile(q) }
        };
        self.course.push(Piece {
            from: seconds(from),
            to: seconds(to),
            requests: tally.requests,
            errors: tally.error_count(),
            p99: quantile(0.99),
            p50: quantile(0.5),
        });
        if phase == Phase::Warmup {
            tally.forget_measures();
        }
        self.total.merge(*tally);
    }
}
