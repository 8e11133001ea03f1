//! All checks that run, one task each, and what each server's health is.
//!
//! `set` is told what is wanted and starts, changes and ends tasks; results
//! go to the server's `Health`, and what follows from them to the board and to
//! the log. One thread, so nothing is locked but what `status` reads. Bounded:
//! one task a place, `MAX_PROBES` and `MAX_COMMANDS` of them at work at once.
//! Ends with its thread.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{info, warn};

use super::probe::{Answer, Kind, Probe};
use crate::board;
use crate::config::{Check, Word};
use crate::control::status;
use crate::health::{Gap, Health, News, Outcome, Pace, Rules};
use crate::steward::servers::{PlaceId, Servers, Traffic};
use crate::sys::clock::{self, Millis};

/// Connections of checks at once: each has a descriptor.
const MAX_PROBES: usize = 256;
/// Programs at once: each has a process and memory.
const MAX_COMMANDS: usize = 16;

/// A place that is to be watched.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Which it is.
    pub id: PlaceId,
    /// The check's word.
    pub check: Check,
    /// What to run; `None` = its traffic alone speaks.
    pub probe: Option<Probe>,
    /// How often.
    pub interval: Duration,
    /// What decides.
    pub rules: Rules,
}

/// What is known of a place that was not watched before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// Nothing: it counts as up, and the first check decides.
    Unheard,
    /// An earlier steward judged it.
    Judged {
        /// How.
        up: bool,
    },
}

/// Everything that is watched.
pub struct Watch {
    servers: Arc<Servers>,
    entries: RefCell<HashMap<PlaceId, Rc<Entry>>>,
    probes: Semaphore,
    commands: Semaphore,
    gap: Cell<Gap>,
    /// Counts pauses of the machine: what began before one means nothing.
    pauses: Cell<u64>,
    seed: Cell<u64>,
}

struct Entry {
    wanted: Wanted,
    health: RefCell<Health>,
    task: RefCell<Option<JoinHandle<()>>>,
    shown: RefCell<Shown>,
    /// Successes and failures of its traffic at the last look.
    traffic: Cell<Option<(u64, u64)>>,
}

fn in_a_row(failures: u64) -> String {
    let noun = if failures == 1 { "failure" } else { "failures" };
    format!("{failures} {noun} of its traffic in a row")
}

/// What `status` shows besides the health.
#[derive(Clone, Debug, Default)]
struct Shown {
    last: Last,
    reason: Option<String>,
    latency: Option<Duration>,
    good: u64,
    bad: u64,
    /// Seconds since 1970.
    since: u64,
}

/// What the last word on a server was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Last {
    #[default]
    None,
    Good,
    Bad,
    Unknown,
    Traffic,
}

impl Watch {
    /// Watches nothing yet.
    pub fn new(servers: Arc<Servers>, seed: u64) -> Rc<Watch> {
        Rc::new(Watch {
            servers,
            entries: RefCell::default(),
            probes: Semaphore::new(MAX_PROBES),
            commands: Semaphore::new(MAX_COMMANDS),
            gap: Cell::new(Gap::new(clock::coarse(), clock::with_sleep())),
            pauses: Cell::new(0),
            seed: Cell::new(seed),
        })
    }

    /// Watches these places from now on, and no others.
    pub fn set(self: &Rc<Self>, wanted: Vec<(Wanted, Before)>) {
        let now = clock::coarse();
        let mut old = std::mem::take(&mut *self.entries.borrow_mut());
        let mut begun = Vec::new();
        let entries = wanted.into_iter().map(|(wanted, before)| {
            let entry = match old.remove(&wanted.id) {
                Some(entry) if entry.wanted == wanted => return entry,
                Some(entry) => entry.changed(wanted),
                None => Entry::new(wanted, before, now),
            };
            let entry = Rc::new(entry);
            begun.push(Rc::clone(&entry));
            entry
        });
        let entries = entries.map(|entry| (entry.wanted.id.clone(), entry)).collect();
        self.entries.replace(entries);
        old.values().for_each(|entry| entry.end());
        let count = begun.len();
        for entry in begun {
            self.publish(&entry);
            if entry.wanted.probe.is_some() {
                let pace = Pace::new(self.next_seed());
                let task = tokio::task::spawn_local(check(Rc::clone(self), Rc::clone(&entry), pace, count));
                entry.task.replace(Some(task));
            }
        }
    }

    /// Time has passed, or traffic has failed somewhere.
    pub fn look(&self) {
        self.look_for_gap();
        let now = clock::coarse();
        let entries = self.entries.borrow();
        for met in self.servers.traffic() {
            if let Some(entry) = entries.get(&met.id) {
                self.handle_traffic(entry, &met, now);
            }
        }
    }

    fn handle_traffic(&self, entry: &Entry, met: &Traffic, now: Millis) {
        let met = (met.connections, met.failures);
        // The first look, or a new generation counts anew.
        let before = entry.traffic.replace(Some(met)).unwrap_or(met);
        let (successes, failures) = (met.0.saturating_sub(before.0), met.1.saturating_sub(before.1));
        let mut health = entry.health.borrow_mut();
        // Before the verdict, which begins to count anew.
        let (was_up, earlier) = (health.is_up(), u64::from(health.traffic_failures()));
        let outcome = health.handle_traffic(successes, failures, now);
        drop(health);
        // Why a server is down stays said while its traffic goes on to fail.
        if failures > 0 && successes == 0 && was_up && entry.wanted.rules.passive {
            let mut shown = entry.shown.borrow_mut();
            (shown.last, shown.reason) = (Last::Traffic, Some(in_a_row(earlier + failures)));
        }
        if successes > 0 && entry.shown.borrow().last == Last::Traffic {
            let mut shown = entry.shown.borrow_mut();
            (shown.last, shown.reason) = (Last::Good, None);
        }
        self.handle_outcome(entry, outcome);
        if successes + failures > 0 || outcome != Outcome::default() {
            self.publish(entry);
        }
    }

    fn next_seed(&self) -> u64 {
        self.seed.set(self.seed.get().wrapping_add(1));
        self.seed.get()
    }

    /// Whether this process did not run for a while; then every server gets a
    /// fresh round.
    fn look_for_gap(&self) {
        let mut gap = self.gap.get();
        let paused = gap.look(clock::coarse(), clock::with_sleep());
        self.gap.set(gap);
        if !paused {
            return;
        }
        self.pauses.set(self.pauses.get() + 1);
        info!("this machine or the steward was asleep: health checks begin a fresh round");
        let now = clock::coarse();
        self.entries.borrow().values().for_each(|entry| entry.health.borrow_mut().handle_gap(now));
    }

    fn handle_answer(&self, entry: &Entry, answer: Answer) {
        let now = clock::coarse();
        let mut shown = entry.shown.borrow_mut();
        let outcome = match answer {
            Answer::Good(latency) => {
                shown.good += 1;
                (shown.last, shown.reason, shown.latency) = (Last::Good, None, Some(latency));
                entry.health.borrow_mut().handle_check(true, now)
            }
            Answer::Bad(reason) => {
                shown.bad += 1;
                (shown.last, shown.reason, shown.latency) = (Last::Bad, Some(reason), None);
                entry.health.borrow_mut().handle_check(false, now)
            }
            Answer::Unknown(reason) => {
                if shown.last != Last::Unknown {
                    let PlaceId { upstream, address, .. } = &entry.wanted.id;
                    warn!("upstream {upstream}: server {address} cannot be checked: {reason}");
                }
                (shown.last, shown.reason, shown.latency) = (Last::Unknown, Some(reason), None);
                Outcome::default()
            }
        };
        drop(shown);
        self.handle_outcome(entry, outcome);
        self.publish(entry);
    }

    fn handle_outcome(&self, entry: &Entry, outcome: Outcome) {
        let id = &entry.wanted.id;
        if let Some(up) = outcome.verdict {
            entry.shown.borrow_mut().since = clock::wall_seconds();
            let health = if up { board::Health::Up } else { board::Health::Down };
            self.servers.handle_verdict(id, health, clock::coarse());
        }
        if let Some(news) = outcome.news {
            tell(entry, news);
        }
    }

    /// Lets `status` see it.
    fn publish(&self, entry: &Entry) {
        let check = serde_json::to_value(entry.status()).expect("plain data");
        self.servers.set_check(&entry.wanted.id, check);
    }
}

/// Checks one place for ever.
async fn check(watch: Rc<Watch>, entry: Rc<Entry>, mut pace: Pace, count: usize) {
    let Wanted { probe: Some(probe), interval, .. } = &entry.wanted else { return };
    tokio::time::sleep(pace.first(count, *interval)).await;
    loop {
        let begin = Instant::now();
        let queue = match probe.kind {
            Kind::Command { .. } => &watch.commands,
            _ => &watch.probes,
        };
        let permit = queue.acquire().await.expect("never closed");
        let pauses = watch.pauses.get();
        let answer = probe.run().await;
        drop(permit);
        watch.look_for_gap();
        if watch.pauses.get() == pauses {
            watch.handle_answer(&entry, answer);
        }
        tokio::time::sleep_until(begin + pace.next(*interval)).await;
    }
}

fn tell(entry: &Entry, news: News) {
    let PlaceId { upstream, server, address } = &entry.wanted.id;
    let place = if address == server { server.clone() } else { format!("{server} ({address})") };
    let shown = entry.shown.borrow();
    let reason = shown.reason.as_deref().unwrap_or("no reason known");
    let check = entry.wanted.check.word();
    match news {
        News::Down => warn!("upstream {upstream}: server {place} is down: {reason} check={check}"),
        News::Up => info!("upstream {upstream}: server {place} is up check={check}"),
        News::Flapping { falls } => warn!(
            "upstream {upstream}: server {place} goes up and down, {falls} times by now; \
             it has to stand longer to be up, and is told of when it is steady: {reason} check={check}"
        ),
        News::Steady { up: true } => {
            info!("upstream {upstream}: server {place} is steady again, and up check={check}");
        }
        News::Steady { up: false } => {
            warn!("upstream {upstream}: server {place} stays down: {reason} check={check}");
        }
    }
}

impl Entry {
    fn new(wanted: Wanted, before: Before, now: Millis) -> Entry {
        let health = match before {
            Before::Unheard => Health::new(wanted.rules, now),
            Before::Judged { up } => Health::resume(wanted.rules, up, now),
        };
        Entry {
            wanted,
            health: RefCell::new(health),
            task: RefCell::default(),
            shown: RefCell::new(Shown { since: clock::wall_seconds(), ..Shown::default() }),
            traffic: Cell::default(),
        }
    }

    /// The same place, watched in another way.
    fn changed(&self, wanted: Wanted) -> Entry {
        self.end();
        let mut health = self.health.borrow().clone();
        health.handle_rules(wanted.rules);
        Entry {
            wanted,
            health: RefCell::new(health),
            task: RefCell::default(),
            shown: self.shown.clone(),
            traffic: self.traffic.clone(),
        }
    }

    fn end(&self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    fn status(&self) -> status::Check {
        let health = self.health.borrow();
        let shown = self.shown.borrow();
        let last = match shown.last {
            Last::None => "none",
            Last::Good => "good",
            Last::Bad => "bad",
            Last::Unknown => "unknown",
            Last::Traffic => "traffic",
        };
        let ((rise, rise_needed), (fall, fall_needed)) = (health.rising(), health.falling());
        status::Check {
            kind: self.wanted.check.word().into(),
            last: last.into(),
            reason: shown.reason.clone(),
            latency_us: shown.latency.map(|latency| latency.as_micros() as u64),
            since: shown.since,
            good: shown.good,
            bad: shown.bad,
            rise,
            rise_needed,
            fall,
            fall_needed,
            flapping: health.is_flapping(),
            on_trial: health.is_on_trial(),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.end();
    }
}
