//! What a worker tells the steering program: how much it has to do.
//!
//! One line of the daemon's page of loads, written by this worker alone (the
//! program adds to the sessions what it steers here in between). Two stores a
//! turn and no system call. A worker that hangs in a turn, or is killed in it,
//! cannot take back that the turn began: that is what makes it look loaded.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::steering::page;
use crate::steering::slowness::Slowness;
use crate::sys::bpf::Page;
use crate::sys::clock::Millis;

/// This slot's line.
#[derive(Debug)]
pub struct Load {
    page: Page,
    slot: usize,
    slowness: Cell<Slowness>,
}

impl Load {
    /// Maps the page; begins without any load.
    pub fn open(fd: OwnedFd, slot: usize) -> io::Result<Load> {
        let load = Load { page: Page::open(fd, page::LOADS_BYTES)?, slot, slowness: Cell::default() };
        for field in [page::SESSIONS, page::TURN_SINCE, page::SLOW_UNTIL, page::SLOW_LEVEL] {
            load.field(field).store(0, Relaxed);
        }
        Ok(load)
    }

    /// The worker woke up.
    pub fn begin_turn(&self, now: Millis) {
        self.field(page::TURN_SINCE).store(page::ticks(now), Relaxed);
    }

    /// It has done what there was, and has so many sessions.
    pub fn end_turn(&self, began: Millis, now: Millis, sessions: usize) {
        let mut slowness = self.slowness.get();
        if slowness.handle_turn(now.saturating_sub(began), now) {
            self.slowness.set(slowness);
            let (until, level) = slowness.told().map_or((0, 0), |(until, level)| (page::ticks(until), level));
            self.field(page::SLOW_LEVEL).store(level << page::SLOW_SHIFT, Relaxed);
            self.field(page::SLOW_UNTIL).store(until, Relaxed);
        }
        self.field(page::SESSIONS).store(sessions.min(page::MOST_SESSIONS) as u32, Relaxed);
        self.field(page::TURN_SINCE).store(0, Relaxed);
    }

    fn field(&self, field: usize) -> &AtomicU32 {
        self.page.word((self.slot << page::LINE_SHIFT) + field)
    }
}
