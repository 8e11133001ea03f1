//! Names of servers: asked again when their TTL is over, one task each.
//!
//! ```text
//!   ask --answer------> told to the board, wait for its TTL ----+
//!    ^ \---no answer--> the last answer stays, wait 1 s to 30 s |
//!    +----------------------------------------------------------+
//! ```
//! A name that never resolved leaves its server without a place, and brings it
//! when it does. All of them are asked at once when /etc/hosts or
//! /etc/resolv.conf changes. Bounded: a task a name, `lookup::PATIENCE` a
//! question. Ends with its thread.

mod lookup;
mod once;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use self::lookup::{Answer, Lookups};
use super::servers::{Named, Servers};
use crate::board::Resolved;
use crate::sys::clock;

pub use self::once::unresolved;

/// No answer is believed for a shorter time, or a TTL of 0 would mean one
/// question after the other.
const SHORTEST: Duration = Duration::from_secs(1);
/// Nor for a longer one.
const LONGEST: Duration = Duration::from_secs(3600);
/// The longest wait after a failure.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How often it is looked whether the host's files changed.
pub const FILES_PERIOD: Duration = Duration::from_secs(2);
/// So many addresses of a name are written to the log.
const MAX_TOLD: usize = 8;

/// All names that are resolved.
pub struct Names {
    servers: Arc<Servers>,
    lookups: Rc<Lookups>,
    tasks: RefCell<HashMap<(String, String), Task>>,
}

/// One name's task; it ends with this value.
struct Task {
    handle: JoinHandle<()>,
    at_once: Rc<Notify>,
}

/// What is known of one name.
#[derive(Debug, Default)]
struct Memory {
    /// What was told of it last; `None` = nothing yet.
    known: Option<Vec<Resolved>>,
    /// Failures in a row.
    failures: u32,
}

impl Names {
    /// Resolves nothing yet.
    pub fn new(servers: Arc<Servers>) -> Result<Names, String> {
        Ok(Names { servers, lookups: Rc::new(Lookups::new()?), tasks: RefCell::default() })
    }

    /// Resolves these names from now on, and no others.
    pub fn set(&self, names: Vec<Named>) {
        let mut tasks = self.tasks.borrow_mut();
        let key = |named: &Named| (named.upstream.clone(), named.server.clone());
        tasks.retain(|known, _| names.iter().any(|named| key(named) == *known));
        for named in names {
            tasks.entry(key(&named)).or_insert_with(|| {
                let at_once = Rc::new(Notify::new());
                let (servers, lookups) = (Arc::clone(&self.servers), Rc::clone(&self.lookups));
                let handle = tokio::task::spawn_local(resolve(servers, lookups, named, Rc::clone(&at_once)));
                Task { handle, at_once }
            });
        }
    }

    /// Asks for all of them where the host's files changed.
    pub fn look_at_files(&self) {
        let tasks = self.tasks.borrow();
        if !tasks.is_empty() && self.lookups.refresh() {
            info!("/etc/hosts or /etc/resolv.conf changed: names are resolved again");
            tasks.values().for_each(|task| task.at_once.notify_one());
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

/// Resolves one name for ever.
async fn resolve(servers: Arc<Servers>, lookups: Rc<Lookups>, named: Named, at_once: Rc<Notify>) {
    let mut memory = Memory::default();
    loop {
        let answer = lookups.resolve(&named.address).await;
        let wait = memory.take(&servers, &named, answer);
        // Either way it is asked again.
        let _ = tokio::time::timeout(wait, at_once.notified()).await;
    }
}

impl Memory {
    /// Takes in an answer, passes it on, and says when to ask again.
    fn take(&mut self, servers: &Servers, named: &Named, answer: Result<Answer, String>) -> Duration {
        let Named { upstream, server, .. } = named;
        let tell = |answer| servers.handle_resolution(upstream, server, answer, clock::coarse());
        match answer {
            Ok(answer) => {
                let resolved: Vec<Resolved> = answer.found.iter().map(resolved).collect();
                if self.known.as_ref() != Some(&resolved) {
                    info!("upstream {upstream}: {server} is {}", listed(&resolved));
                    self.known = Some(resolved.clone());
                }
                tell(Ok(resolved));
                match answer.stale {
                    None if self.failures > 0 => {
                        info!("upstream {upstream}: {server} resolves again");
                        self.failures = 0;
                    }
                    None => {}
                    Some(reason) => {
                        self.note_failure(
                            named,
                            "resolves in part",
                            &reason,
                            "what is not known stays as it was",
                        );
                        tell(Err(reason));
                    }
                }
                if self.failures == 0 { answer.ttl.clamp(SHORTEST, LONGEST) } else { self.retry() }
            }
            Err(reason) => {
                let then = match self.known {
                    Some(_) => "the last answer stays",
                    None => "its server is not used until it does",
                };
                self.note_failure(named, "does not resolve", &reason, then);
                tell(Err(reason));
                self.retry()
            }
        }
    }

    /// Said once, not at each try.
    fn note_failure(&mut self, named: &Named, what: &str, reason: &str, then: &str) {
        let Named { upstream, server, .. } = named;
        if self.failures == 0 {
            warn!("upstream {upstream}: {server} {what}: {reason}: {then}");
        }
        self.failures = self.failures.saturating_add(1);
    }

    /// One second, two, four, up to half a minute.
    fn retry(&self) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(10);
        (SHORTEST * (1 << doublings)).min(LONGEST_RETRY)
    }
}

fn resolved(found: &lookup::Found) -> Resolved {
    Resolved { address: found.address, weight: found.weight.map_or(1, u32::from), priority: found.priority }
}

fn listed(resolved: &[Resolved]) -> String {
    let shown: Vec<String> = resolved.iter().take(MAX_TOLD).map(|one| one.address.to_string()).collect();
    match resolved.len().saturating_sub(MAX_TOLD) {
        0 => shown.join(" "),
        more => format!("{} and {more} more", shown.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_retried_after_one_second_up_to_half_a_minute() {
        let waits = (1..=7).map(|failures| Memory { known: None, failures }.retry().as_secs());
        assert_eq!(waits.collect::<Vec<_>>(), [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(Memory { known: None, failures: u32::MAX }.retry(), LONGEST_RETRY);
    }
}
