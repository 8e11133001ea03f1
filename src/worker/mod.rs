//! A worker: one process, one thread, one event loop.
//!
//! ```text
//!   birth: sockets, privileges --> event loop --Drain, or orphaned--> leave: queues, sessions --> exit 0
//! ```
//!
//! Started by the supervisor, with one configuration for life. It owns its
//! slot's listening sockets together with the supervisor, its sessions alone.
//! Bounded by its descriptors: at the limit it accepts no more and keeps what
//! it has. It ends when its supervisor says so, or some time after the
//! supervisor's death, and never by bytes from the network.

mod access_log;
mod birth;
mod census;
mod complaints;
mod datagrams;
mod departures;
mod elsewhere;
mod event_loop;
mod gate;
mod handover;
#[cfg(debug_assertions)]
mod hang;
mod keeper;
mod leave;
mod listeners;
mod load;
mod pace;
mod places;
mod sessions;
mod test_hook;

use std::process::ExitCode;

use nix::sys::signal::Signal;
use tracing::error;

use crate::control::{self, FromWorker};
use crate::sys::{process, signals};
use birth::Born;

/// Something that keeps a worker from working, for the operator.
#[derive(Debug)]
pub struct Failure {
    text: String,
    advice: String,
    exit_code: u8,
}

impl Failure {
    fn new(text: impl Into<String>) -> Failure {
        Failure { text: text.into(), advice: String::new(), exit_code: 1 }
    }
}

/// The worker process, from its first instruction to its exit code.
pub fn main() -> ExitCode {
    let channel = match process::inherited_channel() {
        Ok(channel) => channel,
        Err(error) => {
            eprintln!("evenkeel: a worker is started by `evenkeel run` alone: {error}");
            return ExitCode::from(2);
        }
    };
    // The supervisor decides when a worker ends; a terminal's Ctrl-C reaches
    // the whole group of processes.
    let from_outside =
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
    let _ = signals::ignore(&from_outside);
    let _ = signals::unblock_all();
    match Born::be(&channel) {
        Ok(Some(born)) => event_loop::run(born, channel),
        // The supervisor ended before it had told us anything.
        Ok(None) => ExitCode::from(1),
        Err(failure) => {
            error!("{}", failure.text);
            let Failure { text, advice, exit_code } = failure;
            let _ = control::send(&channel, &FromWorker::Failed { text, advice, exit_code }, &[]);
            ExitCode::from(exit_code)
        }
    }
}
