//! Writes the access log: takes the workers' batches from their socket and
//! appends them to the file that the supervisor opened.
//!
//! One thread. A file that cannot be written (the disk is full) costs lines,
//! which are counted, and one complaint until it can be again; while it blocks,
//! the workers' socket fills and they drop theirs. Nothing grows here.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tracing::{info, warn};

use crate::sys::channel::Channel;

/// Where lines go, and what became of them.
#[derive(Debug, Default)]
pub struct AccessLog {
    /// `None`: to standard error.
    file: Mutex<Option<File>>,
    /// Lines that could not be written.
    lost: AtomicU64,
    writing: AtomicBool,
    source: Mutex<Option<Arc<Channel>>>,
}

impl AccessLog {
    /// Lines that could not be written.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Begins to write, or goes on elsewhere.
    pub fn aim(self: &Arc<Self>, source: OwnedFd, file: Option<OwnedFd>) {
        *self.file.lock().expect("no thread panics with it") = file.map(File::from);
        let mut known = self.source.lock().expect("no thread panics with it");
        // The socket is the same for the daemon's life.
        if known.is_none() {
            let channel = Arc::new(Channel::from_fd(source));
            *known = Some(Arc::clone(&channel));
            let log = Arc::clone(self);
            std::thread::spawn(move || log.write(&channel));
        }
    }

    /// Whether everything that came has been written.
    pub fn is_idle(&self) -> bool {
        let source = self.source.lock().expect("no thread panics with it");
        // In this order: what is taken out of the socket is written next.
        let empty = source.as_ref().is_none_or(|channel| !channel.is_readable());
        empty && !self.writing.load(Ordering::Acquire)
    }

    fn write(&self, channel: &Channel) {
        let mut failing = false;
        loop {
            channel.wait_readable();
            self.writing.store(true, Ordering::Release);
            let batch = match channel.receive() {
                Ok(Some(packet)) => packet.bytes,
                Ok(None) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    warn!(%error, "the access log ends");
                    self.writing.store(false, Ordering::Release);
                    return;
                }
            };
            let written = match self.file.lock().expect("no thread panics with it").as_mut() {
                Some(file) => file.write_all(&batch),
                None => io::stderr().write_all(&batch),
            };
            self.writing.store(false, Ordering::Release);
            match written {
                Ok(()) if failing => {
                    info!(lost = self.lost(), "the access log is written again");
                    failing = false;
                }
                Ok(()) => {}
                Err(error) => {
                    self.lost
                        .fetch_add(batch.iter().filter(|&&b| b == b'\n').count() as u64, Ordering::Relaxed);
                    if !std::mem::replace(&mut failing, true) {
                        warn!(%error, "the access log cannot be written: its lines are lost and counted");
                    }
                }
            }
        }
    }
}
