//! Control-C ends the run, not the program: what was measured is still shown.
//!
//! SIGINT is blocked before the first thread starts, so in all of them, and
//! read by a thread of its own. A second one kills as usual. The thread is
//! never waited for; it ends with the process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use super::message::Shared;

/// Watches for SIGINT from now on. Where that cannot be, it kills as usual.
pub fn watch(shared: &Arc<Shared>) {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    if set.thread_block().is_err() {
        return;
    }
    let shared = Arc::clone(shared);
    let watcher = move || {
        if set.wait().is_ok() {
            shared.interrupted.store(true, Ordering::Relaxed);
        }
        // From here on the signal has its usual effect, in this thread.
        let _ = set.thread_unblock();
        loop {
            thread::park();
        }
    };
    if thread::Builder::new().name("bench-interrupt".into()).spawn(watcher).is_err() {
        let _ = set.thread_unblock();
    }
}
