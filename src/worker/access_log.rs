//! The worker's end of the access log: lines are gathered while the loop turns
//! and sent to the steward once a turn, which writes them.
//!
//! Never waits: what the steward does not take (its disk is slow or full) is
//! dropped and counted. Bounded by `FULL` and the socket's buffer.

use std::os::fd::OwnedFd;
use std::time::SystemTime;

use crate::access_log::Record;
use crate::config::Format;
use crate::counters::{Counters, Process};
use crate::sys::channel::{Channel, MAX_BYTES};

/// A batch is sent before it outgrows a message; no line is longer than the
/// rest.
const FULL: usize = MAX_BYTES - 4096;

/// Lines on their way.
#[derive(Debug)]
pub struct AccessLog {
    channel: Channel,
    format: Format,
    batch: Vec<u8>,
    lines: u64,
}

impl AccessLog {
    pub fn new(channel: OwnedFd, format: Format) -> AccessLog {
        AccessLog { channel: Channel::from_fd(channel), format, batch: Vec::new(), lines: 0 }
    }

    /// Adds a line.
    pub fn add(&mut self, record: &Record, counters: &Counters) {
        record.write(self.format, &mut self.batch);
        self.lines += 1;
        if self.batch.len() > FULL {
            self.flush(counters);
        }
    }

    /// Sends what was gathered.
    pub fn flush(&mut self, counters: &Counters) {
        if self.batch.is_empty() {
            return;
        }
        if self.channel.send(&self.batch, &[]).is_err() {
            counters.process(Process::AccessDropped).add(self.lines);
        }
        self.batch.clear();
        self.lines = 0;
    }
}

/// The wall clock, for a line.
pub fn now() -> SystemTime {
    SystemTime::now()
}
