//! The result of a run: what `--json` prints, and what the table and the page
//! show.
//!
//! Plain data, made once from what was collected. The field names are a
//! promise; docs/bench.schema.json describes them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::spread::{Circumstances, Spread, Verdict};

use super::args::{Args, Transport};
use super::collector::{Collected, Piece};
use super::daemon::Snapshot;
use super::machine::Machine;
use super::message::Ending;
use super::plan::Plan;
use super::sampler::WorstActive;
use super::tally::Nanos;

/// From this part of a CPU on, a thread was the bottleneck.
const BUSY: f64 = 0.95;
/// A shorter run says nothing of what holds up a long one.
const TELLING: f64 = 0.5;

/// An open loop whose starts are later than this is no longer the clock that
/// it claims to be.
const LATE: Duration = Duration::from_millis(2);

/// A run's result.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct Outcome {
    pub mode: &'static str,
    pub pattern: &'static str,
    pub target: String,
    pub threads: usize,
    pub concurrency: u64,
    /// The measured time.
    pub seconds: f64,
    pub connections: u64,
    pub requests: u64,
    /// Sent and received.
    pub bytes: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub errors: BTreeMap<&'static str, u64>,
    pub first_error: Option<FirstError>,
    pub rate: Rate,
    pub open_loop: Option<OpenLoop>,
    pub latency_us: Option<Latency>,
    pub connect_us: Option<Latency>,
    pub spread: Option<SpreadFound>,
    pub active: Option<Active>,
    /// CPU of the busiest thread, 1.0 = all of a CPU.
    pub busiest_thread: f64,
    /// Why the load generator itself may have been the limit.
    pub bottleneck: Option<String>,
    pub passed: bool,
    /// Limits that were not kept.
    pub failures: Vec<String>,
    pub notes: Vec<String>,
    pub command: Vec<String>,
    pub machine: Machine,
    /// For the plots.
    #[serde(skip)]
    pub course: Vec<Piece>,
    /// For the plots: (part of the exchanges above, latency in ns).
    #[serde(skip)]
    pub curve: Vec<(f64, u64)>,
    /// For the plots: the part of the course that is measured.
    #[serde(skip)]
    pub measured: (f64, f64),
}

/// The first thing that went wrong.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct FirstError {
    pub kind: &'static str,
    /// Seconds since the start of the run.
    pub at_s: f64,
    pub text: String,
}

/// Per second of the measured time.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct Rate {
    pub connections_per_s: f64,
    pub requests_per_s: f64,
    pub bytes_per_s: f64,
}

/// How an open loop went.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct OpenLoop {
    pub wanted_per_s: f64,
    /// Due within the measured time, never started.
    pub not_started: u64,
    /// Started late because no connection was free.
    pub waited: u64,
    /// How late the load generator was by itself.
    pub late_us: Option<Latency>,
}

/// A distribution, in microseconds.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct Latency {
    pub min: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p999: u64,
    pub max: u64,
    pub mean: f64,
}

/// How connections fell over the slots.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct SpreadFound {
    /// "control" or "identify".
    pub source: &'static str,
    pub listener: String,
    pub steering: Option<String>,
    #[serde(flatten)]
    pub spread: Spread,
    /// "chance", "not chance", "too few" or "nothing".
    pub verdict: &'static str,
    pub sentence: String,
    /// Flows that were answered by another slot than before.
    pub slot_changes: u64,
    /// What each slot should get, where that is not the same for all.
    #[serde(skip)]
    pub shares: Option<Vec<f64>>,
}

impl SpreadFound {
    /// The part of all connections that a slot should get.
    pub fn due(&self, slot: usize) -> f64 {
        match &self.shares {
            Some(shares) => shares.get(slot).copied().unwrap_or(0.0) / shares.iter().sum::<f64>(),
            None => 1.0 / self.spread.per_slot.len() as f64,
        }
    }
}

/// The most uneven moment of the open sessions.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct Active {
    pub samples: u64,
    pub worst_max_over_mean: f64,
    pub worst_per_slot: Vec<u64>,
    pub worst_at_s: f64,
}

/// What was seen of the daemon around the run.
#[derive(Debug, Default)]
pub struct Looks {
    /// Before.
    pub before: Option<Snapshot>,
    /// After.
    pub after: Option<Snapshot>,
    /// The most uneven moment in between.
    pub worst_active: Option<WorstActive>,
    /// What a person should know about the looking.
    pub notes: Vec<String>,
}

impl Latency {
    fn of(nanos: &Nanos) -> Option<Latency> {
        let micros = |nanos: u64| (nanos + 500) / 1000;
        (!nanos.is_empty()).then(|| Latency {
            min: micros(nanos.min()),
            p50: micros(nanos.value_at_quantile(0.5)),
            p90: micros(nanos.value_at_quantile(0.9)),
            p99: micros(nanos.value_at_quantile(0.99)),
            p999: micros(nanos.value_at_quantile(0.999)),
            max: micros(nanos.max()),
            mean: (nanos.mean() / 100.0).round() / 10.0,
        })
    }
}

impl Outcome {
    /// Sums up a run.
    pub fn new(args: &Args, plan: &Plan, collected: Collected, looks: Looks, began: Instant) -> Outcome {
        let Collected { total, endings, course, .. } = &collected;
        let measured = measured(plan, endings, began);
        let seconds = (measured.1 - measured.0).max(1e-6);
        let spread = find_spread(args, plan, &collected, &looks);
        let bytes = total.bytes_sent + total.bytes_received;
        let per_second = |count: u64, after: u64| (count.saturating_sub(after)) as f64 / seconds;
        let active = looks.worst_active.as_ref().map(|worst| Active {
            samples: worst.samples,
            worst_max_over_mean: worst.max_over_mean,
            worst_per_slot: worst.per_slot.clone(),
            worst_at_s: worst.at.saturating_duration_since(began).as_secs_f64(),
        });
        let mut outcome = Outcome {
            mode: plan.transport.name(),
            pattern: plan.pattern.name(),
            target: plan.target_text.clone(),
            threads: plan.threads,
            concurrency: plan.concurrency,
            seconds,
            connections: total.connections,
            requests: total.requests,
            bytes,
            bytes_sent: total.bytes_sent,
            bytes_received: total.bytes_received,
            errors: total.errors.iter().map(|(trouble, count)| (trouble.name(), *count)).collect(),
            first_error: total.first_error.as_ref().map(|(at, mishap)| FirstError {
                kind: mishap.trouble.name(),
                at_s: at.saturating_duration_since(began).as_secs_f64(),
                text: mishap.text.clone(),
            }),
            rate: Rate {
                connections_per_s: per_second(total.connections_measured, collected.connections_after),
                requests_per_s: per_second(total.requests, collected.requests_after),
                bytes_per_s: per_second(bytes, collected.bytes_after),
            },
            open_loop: plan.rate.map(|wanted_per_s| OpenLoop {
                wanted_per_s,
                not_started: endings.iter().map(|ending| ending.not_started).sum(),
                waited: endings.iter().map(|ending| ending.waited).sum(),
                late_us: Latency::of(&total.late),
            }),
            latency_us: Latency::of(&total.latency),
            connect_us: Latency::of(&total.connect),
            spread,
            active,
            busiest_thread: endings.iter().map(|ending| ending.busy).fold(0.0, f64::max),
            bottleneck: None,
            passed: true,
            failures: Vec::new(),
            notes: looks.notes,
            command: std::env::args().collect(),
            machine: Machine::read(),
            course: course.clone(),
            curve: curve(&total.latency),
            measured,
        };
        outcome.bottleneck = outcome.find_bottleneck();
        outcome.add_notes(plan, endings);
        outcome.judge(args);
        outcome
    }

    /// All troubles together.
    pub fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }

    fn find_bottleneck(&self) -> Option<String> {
        let late = self.open_loop.as_ref().and_then(|open_loop| open_loop.late_us.as_ref());
        if self.busiest_thread >= BUSY && self.seconds >= TELLING {
            return Some(format!(
                "a thread of the load generator used {:.0} % of a CPU: the target may be faster; add --threads, or CPUs",
                self.busiest_thread * 100.0
            ));
        }
        let late = late.filter(|late| u128::from(late.p99) > LATE.as_micros())?;
        Some(format!(
            "the load generator made 1 % of its starts more than {} ms late: latencies include its own delay; \
             use a lower --rate, more --threads, or another machine",
            late.p99 / 1000
        ))
    }

    fn add_notes(&mut self, plan: &Plan, endings: &[Ending]) {
        if endings.iter().any(|ending| ending.gave_up) {
            self.notes.push(format!(
                "gave up: nothing was answered within {:.1} s",
                (plan.timeout + Duration::from_secs(1)).as_secs_f64()
            ));
        }
        if endings.iter().any(|ending| ending.interrupted) {
            self.notes.push("interrupted before its time".into());
        }
        if endings.len() < plan.threads {
            self.notes.push(format!(
                "{} of {} threads ended early",
                plan.threads - endings.len(),
                plan.threads
            ));
        }
        let unmade = self.open_loop.as_ref().map_or(0, |open_loop| open_loop.not_started);
        if unmade > 0 {
            self.notes.push(format!(
                "{unmade} starts were due and never made: no connection was free; the target is too slow for this \
                 rate, or --concurrency too low. The latencies leave these out"
            ));
        }
        let addresses = endings.iter().map(|ending| ending.addresses).max().unwrap_or(1);
        if plan.sources.is_empty() && addresses > 1 {
            self.notes
                .push(format!("the ports of one client address ran out: {addresses} addresses were used"));
        }
        if self.errors.contains_key("no_port") {
            self.notes.push("local ports ran out: add client addresses with --source".into());
        }
        if let Some(found) = self.spread.as_ref().filter(|found| found.slot_changes > 0) {
            self.notes.push(format!(
                "{} times a flow was answered by another slot than before",
                found.slot_changes
            ));
        }
    }

    fn judge(&mut self, args: &Args) {
        if self.requests == 0 {
            let first = self.first_error.as_ref().map_or(String::new(), |first| format!(": {}", first.text));
            let refused =
                if self.errors.contains_key("refused") { ": does anything listen there?" } else { "" };
            self.failures.push(format!("nothing was answered{first}{refused}"));
        }
        let errors = self.error_count();
        if let Some(most) = args.max_errors.filter(|most| errors > *most) {
            self.failures.push(format!("{errors} errors, --max-errors {most}"));
        }
        match (args.max_spread, &self.spread) {
            (Some(most), Some(found)) if found.spread.max_over_mean > most => {
                self.failures
                    .push(format!("max/mean {:.3}, --max-spread {most}", found.spread.max_over_mean));
            }
            (Some(_), None) => {
                self.failures.push("--max-spread: the spread is not known, neither from a control socket nor from identify lines".into());
            }
            _ => {}
        }
        match (args.max_p99, &self.latency_us) {
            (Some(most), Some(latency)) if u128::from(latency.p99) > most.as_micros() => {
                self.failures.push(format!("p99 {} us, --max-p99 {} us", latency.p99, most.as_micros()));
            }
            (Some(_), None) if self.requests > 0 => {
                self.failures.push("--max-p99: this pattern measures no latency".into());
            }
            _ => {}
        }
        self.passed = self.failures.is_empty();
    }
}

/// The measured time, in seconds since the start: to the intended end, or to
/// the last answer where the run ended before.
fn measured(plan: &Plan, endings: &[Ending], began: Instant) -> (f64, f64) {
    let from = plan.warmup.as_secs_f64();
    let last = endings.iter().filter_map(|ending| ending.last_answer).max();
    let last = last.map_or(began.elapsed(), |last| last.saturating_duration_since(began)).as_secs_f64();
    let early = endings.iter().any(|ending| ending.interrupted || ending.gave_up);
    let by_work = plan.requests.is_some() || plan.connections.is_some() || early;
    match plan.duration {
        Some(duration) if by_work => (from, last.clamp(from, from + duration.as_secs_f64())),
        Some(duration) => (from, from + duration.as_secs_f64()),
        None => (from, last.max(from)),
    }
}

/// From the daemon's counters, else from identify lines.
fn find_spread(args: &Args, plan: &Plan, collected: &Collected, looks: &Looks) -> Option<SpreadFound> {
    let total = &collected.total;
    let addresses = match plan.sources.len() {
        0 => collected.endings.iter().map(|ending| ending.addresses).max(),
        given => Some(given),
    };
    let mut found = match (&looks.before, &looks.after) {
        (Some(before), Some(after)) => {
            let shares = due_between(before, after);
            SpreadFound {
                source: "control",
                listener: after.listener.clone(),
                steering: after.steering.clone(),
                spread: spread_of(&difference(&before.per_slot, &after.per_slot), shares.as_deref()),
                verdict: "",
                sentence: String::new(),
                slot_changes: total.slot_changes,
                shares,
            }
        }
        _ if total.slots.is_empty() => return None,
        _ => {
            let mut per_slot = total.slots.clone();
            per_slot.resize(per_slot.len().max(args.slots.unwrap_or(0) as usize), 0);
            SpreadFound {
                source: "identify",
                listener: total.listener.clone().unwrap_or_default(),
                steering: None,
                spread: Spread::equal(&per_slot),
                verdict: "",
                sentence: String::new(),
                slot_changes: total.slot_changes,
                shares: None,
            }
        }
    };
    let verdict = match &found.shares {
        Some(shares) => Verdict::weighted(&found.spread, shares),
        None => Verdict::of(&found.spread),
    };
    let noun = if plan.transport == Transport::Tcp { "connections" } else { "flows" };
    let about = Circumstances { noun, steering: found.steering.as_deref(), client_addresses: addresses };
    found.sentence = verdict.sentence(&found.spread, &about);
    found.verdict = match verdict {
        Verdict::Nothing => "nothing",
        Verdict::TooFew => "too few",
        Verdict::Chance => "chance",
        Verdict::NotChance { .. } => "not chance",
    };
    Some(found)
}

/// What each slot should have got during the run, by the tables that were in
/// force then; `None` where the daemon does not tell, or nothing was due.
fn due_between(before: &Snapshot, after: &Snapshot) -> Option<Vec<f64>> {
    let after = after.expected.as_ref()?;
    let before = before.expected.as_deref().unwrap_or_default();
    let due = |(slot, due): (usize, &f64)| (due - before.get(slot).copied().unwrap_or(0.0)).max(0.0);
    let due: Vec<f64> = after.iter().enumerate().map(due).collect();
    (due.iter().sum::<f64>() > 0.0).then_some(due)
}

fn spread_of(per_slot: &[u64], shares: Option<&[f64]>) -> Spread {
    match shares {
        Some(shares) => Spread::weighted(per_slot, shares),
        None => Spread::equal(per_slot),
    }
}

/// Slots that came or went during the run count as zero where they are missing.
pub fn difference(before: &[u64], after: &[u64]) -> Vec<u64> {
    let at = |counts: &[u64], slot: usize| counts.get(slot).copied().unwrap_or(0);
    (0..before.len().max(after.len())).map(|slot| at(after, slot).saturating_sub(at(before, slot))).collect()
}

/// Latency over the part of the exchanges that took longer, from all to the
/// slowest one, evenly on a logarithmic scale.
fn curve(latency: &Nanos) -> Vec<(f64, u64)> {
    if latency.is_empty() {
        return Vec::new();
    }
    let steps = (latency.len() as f64).log10().max(0.1) * 24.0;
    let mut points: Vec<(f64, u64)> = (0..=steps.ceil() as u32)
        .map(|step| 10f64.powf(-f64::from(step) / 24.0))
        .map(|above| (above, latency.value_at_quantile(1.0 - above)))
        .collect();
    points.push((1.0 / latency.len() as f64, latency.max()));
    points.sort_by(|a, b| b.0.total_cmp(&a.0));
    points
}
