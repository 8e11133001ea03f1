//! Steering: the supervisor's programs, tables and arrays, one table a
//! listener.
//!
//! ```text
//!   eBPF permitted ------------------> a table in the kernel, rewritten at each change
//!   not, and `hash` or `load-aware` -> the kernel's hash; while a slot is away, classic BPF
//!   not, and anything else ----------> classic BPF, attached anew at each change
//! ```
//!
//! Each slot's held socket stands in its place of the array, over every crash
//! of its worker. A slot that takes nothing is written out of the table and
//! back again, as `steering::policy` says. The programs live as long as the
//! sockets do: workers without a supervisor are steered as it left them.

mod groups;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use tracing::{debug, info, warn};

use super::slot::Slot;
use crate::config::{Config, Listener, Mode, Steering as Asked, Word};
use crate::control::ToSteward;
use crate::counters::{Counters, Layout, OfListener};
use crate::steering::policy::{self, SlotView, Traffic};
use crate::steering::{Expected, MAX_SLOTS, Pick, Table, page, slowness};
use crate::supervision::{Phase, Supervision};
use crate::sys::bpf::Page;
use crate::sys::clock::Millis;
use crate::sys::process;
use groups::Groups;

/// How often slots are looked at that may be slow, in milliseconds.
const LOOK_EVERY: Millis = 100;
/// A test hook: no eBPF, as if it were not permitted.
const NO_EBPF: &str = "EVENKEEL_NO_EBPF";

/// All listeners' steering.
#[derive(Debug)]
pub struct Steering {
    layout: Layout,
    listeners: Vec<Steered>,
    /// Where workers tell their loads; only where a table goes by them.
    loads: Option<Page>,
    away_since: Vec<Option<Millis>>,
    stopped: Vec<bool>,
}

/// One listener's.
#[derive(Debug)]
struct Steered {
    place: usize,
    name: String,
    groups: Groups,
    plan: Plan,
    weights: Vec<u32>,
    table: Table,
    expected: Expected,
    /// The weights are not in force yet.
    is_due: bool,
    /// The steward knows all this.
    is_told: bool,
}

/// What it takes to make a table or a program.
#[derive(Clone, Debug)]
pub struct Plan {
    pick: Pick,
    traffic: Traffic,
    seed: u32,
    /// The CPU of slot i is `cpus[i % cpus.len()]`.
    cpus: Vec<usize>,
}

impl Steering {
    /// Maps and programs for every address, as far as this process may.
    pub fn prepare(config: &Config, slot_count: usize) -> Steering {
        let cpus = process::usable_cpu_numbers();
        let plan = |listener: &Listener| Plan {
            pick: pick(listener),
            // At random there are no flows that a slot could keep.
            traffic: match listener.steering {
                Asked::Random => Traffic::Connections,
                _ => traffic(listener.mode),
            },
            seed: random_seed(),
            cpus: cpus.clone(),
        };
        let plans: Vec<Plan> = config.listeners.iter().map(plan).collect();
        let tables = groups_with_tables(config, &plans);
        if let Err(error) = &tables {
            say_what_is_missing(config, error);
        }
        let (loads, groups) = match tables {
            Ok((loads, groups)) => (Some(loads), groups),
            Err(_) => (None, config.listeners.iter().map(|_| Groups::classic()).collect()),
        };
        let loads = loads.filter(|_| plans.iter().any(|plan| plan.pick == Pick::TwoChoices));
        let listeners = config.listeners.iter().zip(groups).zip(plans).enumerate();
        let listeners = listeners.map(|(place, ((listener, groups), plan))| {
            let weights = vec![policy::FULL; slot_count];
            let table = plan.first_table(&weights);
            let expected = Expected::new(table.shares(slot_count));
            Steered {
                place,
                name: listener.name.clone(),
                groups,
                plan,
                weights,
                table,
                expected,
                is_due: true,
                is_told: false,
            }
        });
        Steering {
            layout: Layout::of(config),
            listeners: listeners.collect(),
            loads,
            away_since: vec![None; slot_count],
            stopped: vec![false; slot_count],
        }
    }

    /// The page into which workers write their loads, if any table asks.
    pub fn loads(&self) -> Option<io::Result<OwnedFd>> {
        self.loads.as_ref().map(|loads| loads.as_fd().try_clone_to_owned())
    }

    /// A slot has sockets that it had not.
    pub fn handle_sockets(&mut self, slot: &Slot) {
        for (place, socket) in slot.sockets() {
            let Some(steered) = self.listeners.get_mut(place.listener) else { continue };
            if let Err(error) = steered.groups.put(place.address, slot.number(), socket) {
                warn!(listener = steered.name, %error, "the table cannot be used: steering without it");
                steered.groups = Groups::classic();
            }
            steered.is_due = true;
        }
    }

    /// A slot's process was stopped or goes on.
    pub fn handle_stop(&mut self, slot: usize, is_stopped: bool) {
        self.stopped[slot] = is_stopped;
    }

    /// Writes what changed since the last call.
    pub fn update(&mut self, now: Millis, supervision: &Supervision, slots: &[Slot]) {
        let views: Vec<SlotView> = (0..slots.len()).map(|slot| self.view(slot, now, supervision)).collect();
        for steered in &mut self.listeners {
            let mut weights = policy::weights(steered.plan.traffic, &views);
            if steered.plan.pick != Pick::TwoChoices {
                // Slowness is nothing that the others go by.
                weights.iter_mut().filter(|weight| **weight > 0).for_each(|weight| *weight = policy::FULL);
            }
            if weights == steered.weights && !steered.is_due {
                continue;
            }
            let total = total(steered.place, slots, &self.layout);
            steered.apply(weights, total, slots);
        }
    }

    /// What is known of a slot.
    fn view(&mut self, slot: usize, now: Millis, supervision: &Supervision) -> SlotView {
        let phase = supervision.phase(slot);
        let is_away = matches!(phase, Phase::Unborn | Phase::Starting | Phase::Waiting { .. });
        let since = &mut self.away_since[slot];
        *since = is_away.then(|| since.unwrap_or(now));
        if is_away {
            self.stopped[slot] = false;
        }
        SlotView {
            away_for: self.away_since[slot].map(|since| now.saturating_sub(since)),
            is_stopped: self.stopped[slot],
            is_leaving: matches!(phase, Phase::Draining | Phase::Gone),
            slow_level: self.slow_level(slot, now),
        }
    }

    /// What its worker said of itself; the highest where it has been in one
    /// turn for too long to say anything.
    fn slow_level(&self, slot: usize, now: Millis) -> u32 {
        let Some(loads) = &self.loads else { return 0 };
        let field = |field| loads.word((slot << page::LINE_SHIFT) + field).load(Relaxed);
        let now_ticks = page::ticks(now);
        let turn_since = field(page::TURN_SINCE);
        let is_stuck = page::is_stuck(turn_since, now_ticks)
            && u64::from(now_ticks.wrapping_sub(turn_since)) >= slowness::SLOW_TURN;
        match page::is_slow(field(page::SLOW_UNTIL), now_ticks) {
            _ if is_stuck => slowness::MOST,
            true => field(page::SLOW_LEVEL) >> page::SLOW_SHIFT,
            false => 0,
        }
    }

    /// When `update` is to be called again at the latest.
    pub fn next_deadline(&self, now: Millis) -> Option<Millis> {
        let patience = self.listeners.iter().map(|steered| policy::patience(steered.plan.traffic));
        let fences = patience.flat_map(|patience| {
            self.away_since.iter().flatten().map(move |since| since + patience).filter(|at| *at > now)
        });
        let look = self.loads.is_some().then_some(now + LOOK_EVERY);
        fences.chain(look).min()
    }

    /// A new steward knows nothing.
    pub fn forget_told(&mut self) {
        self.listeners.iter_mut().for_each(|steered| steered.is_told = false);
    }

    /// Tells the steward what it does not know; `send` answers whether it
    /// heard.
    pub fn tell(&mut self, mut send: impl FnMut(&ToSteward) -> bool) {
        for steered in self.listeners.iter_mut().filter(|steered| !steered.is_told) {
            let active = steered.groups.active().to_string();
            let expected = steered.expected.clone();
            steered.is_told = send(&ToSteward::Steering { listener: steered.place, active, expected });
        }
    }
}

impl Steered {
    fn apply(&mut self, weights: Vec<u32>, total: u64, slots: &[Slot]) {
        debug!(listener = self.name, ?weights, "steering changes");
        self.table = self.plan.next_table(&self.table, &weights);
        self.weights = weights;
        if let Err(error) = self.groups.write(self.place, &self.plan, &self.table, &self.weights, slots) {
            warn!(listener = self.name, %error, "classic BPF could not be attached: the kernel's hash steers");
        }
        // Without the table a slot that is away may get something, and a
        // hash over all gives equal parts.
        self.expected.handle_change(total, self.table.shares(self.weights.len()));
        self.is_due = false;
        self.is_told = false;
    }
}

impl Plan {
    fn first_table(&self, weights: &[u32]) -> Table {
        match self.pick {
            Pick::Cpu => Table::by_cpu(weights, &self.cpus, self.row_shift()),
            _ => Table::new(weights),
        }
    }

    fn next_table(&self, table: &Table, weights: &[u32]) -> Table {
        match self.pick {
            Pick::Cpu if weights.iter().any(|weight| *weight > 0) => self.first_table(weights),
            _ => table.refilled(weights),
        }
    }

    /// A row for every CPU number up to the highest that is used; from 64 on
    /// they share rows, since there are no more slots than that.
    fn row_shift(&self) -> u32 {
        let highest = self.cpus.iter().max().copied().unwrap_or(0);
        let rows = (highest + 1).next_power_of_two().min(MAX_SLOTS);
        (crate::steering::BUCKET_COUNT / rows).trailing_zeros()
    }
}

fn pick(listener: &Listener) -> Pick {
    match (listener.steering, traffic(listener.mode)) {
        (Asked::Hash, Traffic::Connections) => Pick::Connection,
        (Asked::LoadAware, Traffic::Connections) => Pick::TwoChoices,
        // Chosen anew for every datagram: by the table alone, or a flow would
        // be torn apart.
        (Asked::Hash | Asked::LoadAware, Traffic::Flows) => Pick::Flow,
        (Asked::Source, _) => Pick::Source,
        (Asked::Random, _) => Pick::Random,
        (Asked::Cpu, _) => Pick::Cpu,
    }
}

fn traffic(mode: Mode) -> Traffic {
    match mode {
        Mode::Tcp => Traffic::Connections,
    }
}

/// From the system's randomness, by way of the standard library's hash keys.
fn random_seed() -> u32 {
    RandomState::new().build_hasher().finish() as u32
}

fn groups_with_tables(config: &Config, plans: &[Plan]) -> io::Result<(Page, Vec<Groups>)> {
    if std::env::var_os(NO_EBPF).is_some() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{NO_EBPF} is set")));
    }
    let loads = Page::create(page::LOADS_BYTES)?;
    let groups = config.listeners.iter().zip(plans);
    let groups = groups.map(|(listener, plan)| Groups::with_table(listener.bind.len(), plan, &loads));
    let groups = groups.collect::<io::Result<Vec<_>>>()?;
    Ok((loads, groups))
}

/// Once, with what would help.
fn say_what_is_missing(config: &Config, error: &io::Error) {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled");
    let disabled = disabled.map_or("?".to_string(), |text| text.trim().to_string());
    let help = match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "it takes root or CAP_BPF: AmbientCapabilities=CAP_BPF in the unit \
             (kernel.unprivileged_bpf_disabled is {disabled})"
        ),
        _ => "it takes Linux 5.10 or newer with CONFIG_BPF_SYSCALL".to_string(),
    };
    let wanting = |listener: &&Listener| listener.steering != Asked::Hash;
    let asked: Vec<String> = config
        .listeners
        .iter()
        .filter(wanting)
        .map(|listener| format!("{} by {}", listener.name, listener.steering.word()))
        .collect();
    if asked.is_empty() {
        info!("steering without eBPF ({error}): by the kernel's hash; {help}");
    } else {
        let asked = asked.join(", ");
        warn!("steering without eBPF ({error}): {asked} by classic BPF or the kernel's hash; {help}");
    }
}

/// What a listener has counted over all slots.
fn total(listener: usize, slots: &[Slot], layout: &Layout) -> u64 {
    let counters = slots.iter().filter_map(|slot| Counters::over(slot.counters().words(), layout));
    counters.map(|counters| counters.listener(listener, OfListener::Connections).get()).sum()
}
