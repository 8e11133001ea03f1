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

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use super::generation::Generation;
use super::slot::Slot;
use super::upgrade::{Packer, Unpacker};
use crate::config::{Config, Listener, Mode, Steering as Asked, Word};
use crate::control::{Routes, SocketId, ToSteward};
use crate::steering::policy::{self, SlotView, Traffic};
use crate::steering::{BUCKET_COUNT, MAX_SLOTS, Pick, Route, Table, page, slowness};
use crate::supervision::{Phase, Supervision};
use crate::sys::bpf::Page;
use crate::sys::clock::Millis;
use crate::sys::process;
use groups::Group;

/// How often slots are looked at that may be slow, in milliseconds.
const LOOK_EVERY: Millis = 100;
/// A test hook: no eBPF, as if it were not permitted.
const NO_EBPF: &str = "EVENKEEL_NO_EBPF";

/// All listeners' steering.
#[derive(Debug)]
pub struct Steering {
    /// Of which generation the listeners are.
    generation: u64,
    listeners: Vec<Steered>,
    /// By socket and not by listener: a socket stays in its array for life,
    /// whatever a reload makes of its listener.
    groups: HashMap<SocketId, Group>,
    /// Where workers tell their loads; `None` without eBPF.
    loads: Option<Page>,
    away_since: Vec<Option<Millis>>,
    stopped: Vec<bool>,
}

/// One listener's.
#[derive(Debug)]
struct Steered {
    name: String,
    ids: Vec<SocketId>,
    plan: Plan,
    weights: Vec<u32>,
    table: Table,
    active: &'static str,
    /// The weights are not in force yet.
    is_due: bool,
    /// Some table is in force, and flows are where it leads.
    is_applied: bool,
    /// That one was of another kind.
    is_another: bool,
    /// To be brought into force by a shift.
    planned: Option<Planned>,
    /// The steward knows all this.
    is_told: bool,
}

/// What the next image of the supervisor finds of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    listeners: Vec<SteeredState>,
    groups: Vec<(SocketId, groups::State)>,
    loads: Option<RawFd>,
}

/// How one listener is steered.
#[derive(Debug, Serialize, Deserialize)]
pub struct SteeredState {
    name: String,
    /// The number of its `Pick`.
    pick: u32,
    seed: u32,
    weights: Vec<u32>,
    table: Vec<u8>,
    /// All this is in force.
    is_applied: bool,
}

/// A change for which flows have to move.
#[derive(Debug)]
struct Planned {
    weights: Vec<u32>,
    table: Table,
    pairs: Vec<(usize, usize)>,
}

/// Which slots have a part in the flows, and whether they may change now.
#[derive(Clone, Copy, Debug)]
pub struct FlowSlots {
    /// The slots from 0 on that get some.
    pub count: usize,
    /// Flows can be moved now; else what would move them waits.
    pub may_move: bool,
    /// The workers do not serve yet, or leave: nothing has to be moved.
    pub is_free: bool,
}

/// What it takes to make a table or a program.
#[derive(Clone, Debug)]
pub struct Plan {
    pick: Pick,
    traffic: Traffic,
    /// Slow slots are due little.
    by_load: bool,
    seed: u32,
    /// The CPU of slot i is `cpus[i % cpus.len()]`.
    cpus: Vec<usize>,
}

impl Steering {
    /// Finds out what this process may, and says what is missing.
    pub fn prepare(generation: &Generation) -> Steering {
        let loads = groups::try_all(std::env::var_os(NO_EBPF).is_some().then_some(NO_EBPF));
        if let Err(error) = &loads {
            say_what_is_missing(&generation.config, error);
        }
        let mut steering = Steering {
            generation: generation.number,
            listeners: Vec::new(),
            groups: HashMap::new(),
            loads: loads.ok(),
            away_since: Vec::new(),
            stopped: Vec::new(),
        };
        steering.adopt(generation);
        steering
    }

    /// The listeners of a generation. Those that were there before and are
    /// steered as before keep their table and seed.
    fn adopt(&mut self, generation: &Generation) {
        self.generation = generation.number;
        let cpus = process::usable_cpu_numbers();
        let mut before = std::mem::take(&mut self.listeners);
        let places = generation.places();
        for (number, listener) in generation.config.listeners.iter().enumerate() {
            let own = places.iter().filter(|(place, id)| place.listener == number && !is_group(id));
            let ids: Vec<SocketId> = own.map(|(_, id)| id.clone()).collect();
            let plan = Plan {
                pick: pick(listener),
                traffic: traffic(listener),
                by_load: listener.steering == Asked::LoadAware,
                seed: random_seed(),
                cpus: cpus.clone(),
            };
            let same = |old: &Plan| (old.pick, old.by_load) == (plan.pick, plan.by_load);
            let kept = before.iter().position(|old| old.name == listener.name && same(&old.plan));
            self.listeners.push(match kept {
                Some(at) => Steered { ids, is_due: true, ..before.swap_remove(at) },
                None => {
                    let mut new = Steered::new(listener, ids, plan, generation.slot_count());
                    // Steered in another way from now on: its flows are where
                    // the old one led.
                    new.is_applied = before.iter().any(|old| old.name == new.name && old.is_applied);
                    new.is_another = new.is_applied;
                    new
                }
            });
        }
        let known: Vec<&SocketId> = self.listeners.iter().flat_map(|steered| &steered.ids).collect();
        self.groups.retain(|id, _| known.contains(&id));
    }

    /// As the next image of the supervisor is to find it.
    pub fn pack<'a>(&'a self, packer: &mut Packer<'a>) -> State {
        State {
            listeners: self.states(),
            groups: self.groups.iter().map(|(id, group)| (id.clone(), group.pack(packer))).collect(),
            loads: self.loads.as_ref().map(|loads| packer.keep(loads)),
        }
    }

    /// How each listener is steered, for the next image or the next start.
    pub fn states(&self) -> Vec<SteeredState> {
        let listeners = self.listeners.iter().map(|steered| SteeredState {
            name: steered.name.clone(),
            pick: steered.plan.pick as u32,
            seed: steered.plan.seed,
            weights: steered.weights.clone(),
            table: steered.table.bytes().to_vec(),
            is_applied: steered.is_applied,
        });
        listeners.collect()
    }

    /// Goes on with the tables and seeds of a daemon that has ended, so that
    /// flows which were parked are where their datagrams come. Nothing of it
    /// is in force yet.
    pub fn resume(&mut self, left: &[SteeredState]) {
        for steered in &mut self.listeners {
            if let Some(left) = left.iter().find(|left| left.name == steered.name) {
                steered.take_up(left);
            }
        }
    }

    /// As the image before this one left it: the programs go on, and tables
    /// and seeds stay, so that no flow moves.
    pub fn unpack(
        state: Option<State>,
        unpacker: &mut Unpacker,
        generation: &Generation,
        slots: &[Slot],
    ) -> Result<Steering, String> {
        let Some(state) = state else { return Ok(Steering::prepare(generation)) };
        let loads = state.loads.map(|number| groups::open_page(unpacker, number, page::LOADS_BYTES));
        let mut steering = Steering {
            generation: generation.number,
            listeners: Vec::new(),
            groups: HashMap::new(),
            loads: loads.transpose()?,
            away_since: Vec::new(),
            stopped: Vec::new(),
        };
        steering.adopt(generation);
        for steered in &mut steering.listeners {
            let Some(left) = state.listeners.iter().find(|left| left.name == steered.name) else { continue };
            if steered.take_up(left) {
                steered.is_applied = left.is_applied;
                steered.is_due = !left.is_applied;
            }
        }
        for (id, group) in state.groups {
            let group = Group::unpack(group, unpacker, &id, slots)?;
            for steered in steering.listeners.iter_mut().filter(|steered| steered.ids.contains(&id)) {
                steered.active = group.active();
            }
            steering.groups.insert(id, group);
        }
        Ok(steering)
    }

    /// The page into which workers write their loads, where that can be.
    pub fn loads(&self) -> Option<io::Result<OwnedFd>> {
        self.loads.as_ref().map(|loads| loads.as_fd().try_clone_to_owned())
    }

    /// A slot's process was stopped or goes on.
    pub fn handle_stop(&mut self, slot: usize, is_stopped: bool) {
        if let Some(stopped) = self.stopped.get_mut(slot) {
            *stopped = is_stopped;
        }
    }

    /// Takes in what became of sockets and slots since the last call, and
    /// writes what changed.
    pub fn update(
        &mut self,
        now: Millis,
        supervision: &Supervision,
        slots: &[Slot],
        generation: &Generation,
        flow_slots: FlowSlots,
    ) {
        if self.generation != generation.number {
            self.adopt(generation);
        }
        let slots = &slots[..slots.len().min(supervision.slot_count())];
        self.away_since.resize(slots.len(), None);
        self.stopped.resize(slots.len(), false);
        let views: Vec<SlotView> = (0..slots.len()).map(|slot| self.view(slot, now, supervision)).collect();
        for steered in &mut self.listeners {
            for id in &steered.ids {
                let group = self.groups.entry(id.clone()).or_insert_with(|| Group::new(self.loads.as_ref()));
                steered.is_due |= group.take_in(id, slots);
            }
            let mut weights = policy::weights(steered.plan.traffic, &views);
            if !steered.plan.by_load {
                // Slowness is nothing that the others go by.
                weights.iter_mut().filter(|weight| **weight > 0).for_each(|weight| *weight = policy::FULL);
            }
            if steered.plan.traffic == Traffic::Flows && !flow_slots.is_free {
                // Those that come are not there yet, those that go still are.
                weights.resize(flow_slots.count.min(weights.len()).max(1), 0);
                if (weights != steered.weights || steered.is_due) && steered.planned.is_none() {
                    steered.plan_or_apply(weights, &mut self.groups, slots, flow_slots.may_move);
                }
            } else if !weights.is_empty() && (weights != steered.weights || steered.is_due) {
                steered.planned = None;
                steered.apply(weights, &mut self.groups, slots);
            }
        }
    }

    /// From which slot to which flows have to move for what is planned.
    pub fn planned_pairs(&self) -> Vec<(usize, usize)> {
        let planned = self.listeners.iter().filter_map(|steered| steered.planned.as_ref());
        planned.flat_map(|planned| planned.pairs.iter().copied()).collect()
    }

    /// Whether anything is planned.
    pub fn has_planned(&self) -> bool {
        self.listeners.iter().any(|steered| steered.planned.is_some())
    }

    /// Brings what is planned into force.
    pub fn commit_planned(&mut self, slots: &[Slot]) {
        for steered in &mut self.listeners {
            if let Some(planned) = steered.planned.take() {
                steered.apply_table(planned.table, planned.weights, &mut self.groups, slots);
            }
        }
    }

    /// Where the datagrams of each UDP listener's clients come now.
    pub fn routes(&self) -> Routes {
        let flows = self.listeners.iter().filter(|steered| steered.plan.traffic == Traffic::Flows);
        flows.map(|steered| (steered.name.clone(), steered.route())).collect()
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
        let by_load = |steered: &Steered| steered.plan.by_load;
        let look = (self.loads.is_some() && self.listeners.iter().any(by_load)).then_some(now + LOOK_EVERY);
        fences.chain(look).min()
    }

    /// A new steward knows nothing.
    pub fn forget_told(&mut self) {
        self.listeners.iter_mut().for_each(|steered| steered.is_told = false);
    }

    /// Tells the steward what it does not know; `send` answers whether it
    /// heard.
    pub fn tell(&mut self, mut send: impl FnMut(&ToSteward) -> bool) {
        for steered in self.listeners.iter_mut().filter(|steered| !steered.is_told && !steered.is_due) {
            steered.is_told = send(&ToSteward::Steering {
                listener: steered.name.clone(),
                active: steered.active.to_string(),
                shares: steered.table.shares(steered.weights.len()),
            });
        }
    }
}

impl Steered {
    fn new(listener: &Listener, ids: Vec<SocketId>, plan: Plan, slot_count: usize) -> Steered {
        let weights = vec![policy::FULL; slot_count];
        let table = plan.first_table(&weights);
        let name = listener.name.clone();
        Steered {
            name,
            ids,
            plan,
            weights,
            table,
            active: "hash",
            is_due: true,
            is_applied: false,
            is_another: false,
            planned: None,
            is_told: false,
        }
    }

    /// Takes over seed and table, where they are of the same kind.
    fn take_up(&mut self, left: &SteeredState) -> bool {
        let table = <[u8; BUCKET_COUNT]>::try_from(left.table.as_slice()).ok();
        let Some(table) = table.filter(|_| left.pick == self.plan.pick as u32) else { return false };
        self.plan.seed = left.seed;
        self.weights.clone_from(&left.weights);
        self.table = Table::from_bytes(table);
        true
    }

    /// Brings the weights into force where no flow has to move for them; else
    /// plans it, where that may be done now.
    fn plan_or_apply(
        &mut self,
        weights: Vec<u32>,
        groups: &mut HashMap<SocketId, Group>,
        slots: &[Slot],
        may_move: bool,
    ) {
        let table = self.plan.next_table(&self.table, &weights);
        let by_table = self.ids.iter().all(|id| matches!(groups.get(id), Some(Group::Table(_))));
        let pairs = match () {
            () if !self.is_applied || self.ids.is_empty() => Vec::new(),
            () if self.is_another || (!by_table && live(&weights) != live(&self.weights)) => {
                let count = slots.len().max(self.weights.len());
                (0..count).flat_map(|from| (0..count).map(move |to| (from, to))).collect()
            }
            () if by_table => self.table.moves(&table).map(|moved| (moved.from, moved.to)).collect(),
            () => Vec::new(),
        };
        if pairs.is_empty() {
            self.apply_table(table, weights, groups, slots);
        } else if may_move {
            self.planned = Some(Planned { weights, table, pairs });
        }
    }

    /// Where a client's datagrams come.
    fn route(&self) -> Route {
        let with_port = match self.plan.pick {
            Pick::Flow => true,
            Pick::Source => false,
            Pick::Connection | Pick::TwoChoices | Pick::Random | Pick::Cpu => return Route::Unknown,
        };
        match self.active {
            "ebpf-table" => Route::of_table(self.plan.seed, with_port, &self.table),
            "cbpf" => Route::Classic { seed: self.plan.seed, with_port, live: live(&self.weights) },
            _ => Route::Unknown,
        }
    }

    fn apply(&mut self, weights: Vec<u32>, groups: &mut HashMap<SocketId, Group>, slots: &[Slot]) {
        let table = self.plan.next_table(&self.table, &weights);
        self.apply_table(table, weights, groups, slots);
    }

    fn apply_table(
        &mut self,
        table: Table,
        weights: Vec<u32>,
        groups: &mut HashMap<SocketId, Group>,
        slots: &[Slot],
    ) {
        debug!(listener = self.name, ?weights, "steering changes");
        self.table = table;
        self.weights = weights;
        self.active = "hash";
        for id in &self.ids {
            let Some(group) = groups.get_mut(id) else { continue };
            if let Err(error) = group.write(id, &self.plan, &self.table, &self.weights, slots) {
                warn!(listener = self.name, %error, "no program could be attached: the kernel's hash steers");
            }
            self.active = group.active();
        }
        self.is_due = false;
        self.is_applied = true;
        self.is_another = false;
        self.is_told = false;
    }
}

fn live(weights: &[u32]) -> Vec<bool> {
    weights.iter().map(|weight| *weight > 0).collect()
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
    match (listener.steering, listener.mode) {
        (Asked::Hash, Mode::Tcp) => Pick::Connection,
        (Asked::LoadAware, Mode::Tcp) => Pick::TwoChoices,
        // Chosen anew for every datagram: by the table alone, or a flow would
        // be torn apart. By load it is the table that changes, seldom.
        (Asked::Hash | Asked::LoadAware, Mode::Udp) => Pick::Flow,
        (Asked::Source, _) => Pick::Source,
        (Asked::Random, _) => Pick::Random,
        (Asked::Cpu, _) => Pick::Cpu,
    }
}

fn traffic(listener: &Listener) -> Traffic {
    match (listener.mode, listener.steering) {
        // At random there are no flows that a slot could keep.
        (Mode::Tcp, _) | (Mode::Udp, Asked::Random) => Traffic::Connections,
        (Mode::Udp, _) => Traffic::Flows,
    }
}

/// A multicast group's sockets get every datagram; a filter divides them.
fn is_group(id: &SocketId) -> bool {
    id.address.ip().is_multicast()
}

/// From the system's randomness, by way of the standard library's hash keys.
fn random_seed() -> u32 {
    RandomState::new().build_hasher().finish() as u32
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
