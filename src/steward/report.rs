//! The status document, from the counters and what the supervisor said.

mod connects;

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::Value;

use super::{Knowledge, View};
use crate::board::{self, Admin, PlaceId, Standing, State};
use crate::config::{Config, Mode, ServerAddress, Word};
use crate::control::status::{
    Difference, Flows, Listener, Place, Queue, Server, SlotFlows, Status, Upstream, Worker,
};
use crate::control::{DaemonState, ListenerFigures, SlotFigures, WorkerState};
use crate::counters::{Counters, Layout, OfFlows, OfListener, OfServer, OfUpstream, Process};
use crate::flow::DropReason;
use crate::relay::CloseReason;
use crate::spread::{Circumstances, Spread, Verdict};
use crate::steering::Expected;
use crate::sys::clock;

/// The reason of datagrams for which the socket's buffer had no room.
const FULL_BUFFER: &str = "receive_buffer";

/// One table's counters with the configuration that they are of.
struct Source<'a> {
    slot: usize,
    config: &'a Config,
    layout: &'a Layout,
    counters: Counters<'a>,
}

/// What runs now.
pub fn status(knowledge: &Knowledge) -> Status {
    let view = knowledge.view();
    let sources = sources(&view);
    let workers = knowledge.workers.lock().expect("no thread panics with it").clone();
    let config = &view.configs[0].0;
    let (standing, checks) = knowledge.servers.shown();
    let slot_count = workers.len();
    let daemon = knowledge.daemon.lock().expect("no thread panics with it").clone();
    let figures = knowledge.figures();
    let unhealthy = unfit(&daemon, &workers);
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: knowledge.birth.supervisor_pid,
        generation: view.generation,
        started_at: knowledge.birth.started_at,
        uptime_ms: clock::coarse().saturating_sub(knowledge.birth.started),
        config_path: knowledge.birth.config_path.clone(),
        healthy: unhealthy.is_none(),
        unhealthy,
        reload: daemon.reload,
        workers: workers.iter().map(|state| worker(state, &sources)).collect(),
        listeners: config
            .listeners
            .iter()
            .map(|l| judged(with_queues(listener(knowledge, l, slot_count, &sources), &figures)))
            .collect(),
        upstreams: config.upstreams.iter().map(|u| upstream(u, &standing, &checks, &sources)).collect(),
        access_log_lost: knowledge.access_log.lost(),
    }
}

/// Why whoever asks for health should send nobody here; `None` = do.
pub fn unhealthy(knowledge: &Knowledge) -> Option<String> {
    let daemon = knowledge.daemon.lock().expect("no thread panics with it");
    unfit(&daemon, &knowledge.workers.lock().expect("no thread panics with it"))
}

fn unfit(daemon: &DaemonState, workers: &[WorkerState]) -> Option<String> {
    if daemon.leaving {
        return Some("draining: the daemon is leaving".into());
    }
    // A slot that a reload adds is nobody's yet: the others serve.
    let is_coming = |worker: &&WorkerState| daemon.announced && worker.pid == 0 && worker.state == "starting";
    let idle = workers.iter().filter(|worker| worker.state != "ready" && !is_coming(worker));
    let idle: Vec<String> =
        idle.map(|worker| format!("slot {} does not serve: {}", worker.slot, worker.state)).collect();
    (!idle.is_empty()).then(|| idle.join("; "))
}

/// Says whether the spread is one that chance would make.
fn judged(mut listener: Listener) -> Listener {
    let about = Circumstances {
        noun: if listener.flows.is_some() { "flows" } else { "connections" },
        steering: Some(listener.steering_in_force()),
        client_addresses: None,
    };
    let verdict = Verdict::weighted(&listener.spread, &listener.expected_per_slot);
    let text = verdict.sentence(&listener.spread, &about);
    // Of millions of connections any difference is not chance; one that costs
    // nobody anything is no trouble.
    let is_felt = listener.spread.max_over_mean > 1.05;
    listener.uneven = is_felt && matches!(verdict, Verdict::NotChance { .. });
    listener.verdict = text;
    listener
}

/// Fills in what the supervisor saw at the listener's sockets.
fn with_queues(mut listener: Listener, figures: &[ListenerFigures]) -> Listener {
    let slot_count = listener.active_per_slot.len();
    let Some(seen) = figures.iter().find(|seen| seen.listener == listener.name) else {
        listener.queues = vec![Queue::default(); slot_count];
        return listener;
    };
    let queue = |slot| seen.slots.get(slot).copied().unwrap_or_default();
    let queues = (0..slot_count).map(queue);
    listener.queues =
        queues.map(|SlotFigures { waiting, limit, dropped }| Queue { waiting, limit, dropped }).collect();
    let dropped: u64 = listener.queues.iter().map(|queue| queue.dropped).sum();
    if listener.flows.is_none() {
        listener.accept_queue = listener.queues.iter().map(|queue| queue.waiting).sum();
        listener.accept_overflows = dropped;
        return listener;
    }
    // The socket's own count: it goes on while no worker looks.
    let set = |map: &mut BTreeMap<String, u64>, count| match count {
        0 => drop(map.remove(FULL_BUFFER)),
        count => drop(map.insert(FULL_BUFFER.into(), count)),
    };
    set(&mut listener.dropped, dropped);
    for (flows, queue) in listener.flows_per_slot.iter_mut().zip(&listener.queues) {
        set(&mut flows.dropped, queue.dropped);
    }
    listener
}

fn sources(view: &View) -> Vec<Source<'_>> {
    let tables = view.tables.iter().filter_map(|(table, region)| {
        let (config, layout) = view.configs.get(table.config)?;
        let counters = Counters::over(region.words(), layout)?;
        Some(Source { slot: table.slot, config, layout, counters })
    });
    tables.collect()
}

fn worker(state: &WorkerState, sources: &[Source]) -> Worker {
    let own = || sources.iter().filter(|source| source.slot == state.slot);
    let sum = |which| own().map(|source| source.counters.process(which).get()).sum();
    let lag = own().map(|source| source.counters.process(Process::LoopLag).get()).max();
    Worker {
        slot: state.slot,
        pid: state.pid,
        generation: state.generation,
        state: state.state.clone(),
        restarts: state.restarts,
        restart_reasons: state.restart_reasons.clone(),
        accepted: sum(Process::Accepted),
        active: sum(Process::Active),
        loop_lag_us: lag.unwrap_or(0),
        accept_pauses: sum(Process::AcceptPauses),
        port_shortages: sum(Process::PortShortages),
        access_log_dropped: sum(Process::AccessDropped),
        keeper: state.keeper.clone(),
        helped_by: state.helped_by,
    }
}

/// What each slot has counted for a listener.
pub fn connections(view: &View, listener: &str, slot_count: usize) -> Vec<u64> {
    let cell = |counters: &Counters, index| counters.listener(index, OfListener::Connections).get();
    sums(listener, slot_count, &sources(view), &cell)
}

/// A slot's sum over its tables; a listener has another number in each.
fn sums(
    listener: &str,
    slot_count: usize,
    sources: &[Source],
    cell: &dyn Fn(&Counters, usize) -> u64,
) -> Vec<u64> {
    let mut sums = vec![0; slot_count.max(1)];
    let last = sums.len() - 1;
    for source in sources {
        if let Some(index) = source.config.listeners.iter().position(|l| l.name == listener) {
            // What a slot counted that was given up stays in the sum.
            sums[source.slot.min(last)] += cell(&source.counters, index);
        }
    }
    sums
}

fn listener(
    knowledge: &Knowledge,
    config: &crate::config::Listener,
    slot_count: usize,
    sources: &[Source],
) -> Listener {
    let per_slot = |cell: &dyn Fn(&Counters, usize) -> u64| sums(&config.name, slot_count, sources, cell);
    let of = |which| per_slot(&move |counters, index| counters.listener(index, which).get());
    let sum = |which| of(which).iter().sum::<u64>();
    let ended = CloseReason::ALL
        .into_iter()
        .map(|reason| {
            let counts = per_slot(&move |counters, index| counters.ended(index, reason).get());
            (reason.name().to_string(), counts.iter().sum())
        })
        .filter(|(_, count)| *count > 0)
        .collect::<BTreeMap<String, u64>>();
    let connections = of(OfListener::Connections);
    let steering = knowledge.steering.lock().expect("no thread panics with it").get(&config.name).cloned();
    // Where nothing was told yet, as the kernel's hash would.
    let even = || Expected::new(vec![1.0 / connections.len() as f64; connections.len()]);
    let (active, expected) = steering.unwrap_or_else(|| ("hash".to_string(), even()));
    let strangers = knowledge.strangers.lock().expect("no thread panics with it");
    let strangers = strangers.get(&config.name).cloned().unwrap_or_default();
    let expected_per_slot = expected.at(connections.iter().sum());
    let is_udp = config.mode == Mode::Udp;
    let total = |cell: &dyn Fn(&Counters, usize) -> u64| per_slot(cell).iter().sum::<u64>();
    let slot_flows = |slot: usize| {
        let own = |cell: &dyn Fn(&Counters, usize) -> u64| per_slot(cell)[slot];
        let bytes = |which| own(&move |counters: &Counters, index| counters.listener(index, which).get());
        SlotFlows {
            bytes_in: bytes(OfListener::BytesIn),
            bytes_out: bytes(OfListener::BytesOut),
            flows: flows(&own),
            dropped: dropped(&own),
        }
    };
    let udp_slots = if is_udp { connections.len() } else { 0 };
    Listener {
        name: config.name.clone(),
        mode: config.mode.word().into(),
        bind: config.bind.iter().map(ToString::to_string).collect(),
        steering: config.steering.word().into(),
        steering_active: active,
        strangers,
        connections: sum(OfListener::Connections),
        active: sum(OfListener::Active),
        bytes_in: sum(OfListener::BytesIn),
        bytes_out: sum(OfListener::BytesOut),
        accept_queue: 0,
        accept_overflows: 0,
        queues: Vec::new(),
        flows: is_udp.then(|| flows(&total)),
        dropped: if is_udp { dropped(&total) } else { refused(&ended) },
        flows_per_slot: (0..udp_slots).map(slot_flows).collect(),
        ended,
        active_per_slot: of(OfListener::Active),
        spread: Spread::weighted(&connections, &expected_per_slot),
        shares: expected.shares().to_vec(),
        expected_per_slot,
        verdict: String::new(),
        uneven: false,
    }
}

/// The sum of a cell over everything that counted for a listener.
type Sum<'a> = dyn Fn(&dyn Fn(&Counters, usize) -> u64) -> u64 + 'a;

fn flows(sum: &Sum) -> Flows {
    let of_all = |which| sum(&move |counters, listener| counters.listener(listener, which).get());
    let of_flows = |which| sum(&move |counters, listener| counters.flows(listener, which).get());
    let ended = |reason| sum(&move |counters, listener| counters.ended(listener, reason).get());
    Flows {
        active: of_all(OfListener::Active),
        opened: of_all(OfListener::Connections),
        expired: ended(CloseReason::IdleTimeout),
        finished: ended(CloseReason::Finished),
        evicted: ended(CloseReason::Evicted),
        shed: sum(&|counters, listener| counters.dropped(listener, DropReason::Shed).get()),
        moved: of_flows(OfFlows::Moved),
        quarantined: of_flows(OfFlows::Quarantined),
        quarantine_cut: of_flows(OfFlows::QuarantineCut),
        datagrams_in: of_flows(OfFlows::DatagramsIn),
        datagrams_out: of_flows(OfFlows::DatagramsOut),
        offload_failures: of_flows(OfFlows::OffloadFailures),
        handed_over: of_flows(OfFlows::TakenOver),
        unsteered: of_flows(OfFlows::Unsteered),
        passed_on: of_flows(OfFlows::PassedOn),
    }
}

/// Connections that were turned away, by reason.
fn refused(ended: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let refusals = CloseReason::ALL.into_iter().filter(|reason| reason.is_refusal());
    let counts = refusals.filter_map(|reason| ended.get_key_value(reason.name()));
    counts.map(|(name, count)| (name.clone(), *count)).collect()
}

/// By reason, with the kernel's own.
fn dropped(sum: &Sum) -> BTreeMap<String, u64> {
    let own = DropReason::ALL.into_iter().map(|reason| {
        let count = sum(&move |counters, listener| counters.dropped(listener, reason).get());
        (reason.name().to_string(), count)
    });
    let kernel = sum(&|counters, listener| counters.flows(listener, OfFlows::KernelDrops).get());
    let kernel = [(FULL_BUFFER.to_string(), kernel)];
    own.chain(kernel).filter(|(_, count)| *count > 0).collect()
}

/// An upstream with its servers, as they stand.
fn upstream(
    config: &crate::config::Upstream,
    standing: &Standing,
    checks: &BTreeMap<PlaceId, Value>,
    sources: &[Source],
) -> Upstream {
    let waiting = sources.iter().filter_map(|source| {
        let index = source.config.upstreams.iter().position(|u| u.name == config.name)?;
        Some(source.counters.upstream(index, OfUpstream::Waiting).get())
    });
    let own = standing.upstreams().iter().find(|upstream| upstream.name == config.name);
    let servers = config.servers.iter().map(|file| {
        let address = file.address.to_string();
        let stands = own.and_then(|u| Some((u, u.servers.iter().find(|s| s.name == address)?)));
        let sum = |which| sources.iter().map(|source| sum_of(source, &config.name, &address, which)).sum();
        let places = stands.map(|(u, s)| places(u, s, checks, sources)).unwrap_or_default();
        let is_name = matches!(file.address, ServerAddress::Name { .. } | ServerAddress::Srv(_));
        Server {
            state: stands.map_or(State::Up, |(upstream, server)| server.state(upstream)).name().into(),
            weight: stands.map_or(file.weight, |(_, server)| server.weight()),
            backup: file.backup,
            max_connections: u64::from(file.max_connections),
            active: sum(OfServer::Active),
            connections: sum(OfServer::Connections),
            failures: sum(OfServer::Failures),
            connect: connects::of(sources, &config.name, &address),
            check: if is_name {
                Value::Null
            } else {
                places.first().map_or(Value::Null, |p| p.check.clone())
            },
            differs_from_file: stands.and_then(|(_, server)| difference(server)),
            resolve_error: stands.and_then(|(_, server)| server.resolve_error.clone()),
            places: if is_name { places } else { Vec::new() },
            address,
        }
    });
    Upstream {
        name: config.name.clone(),
        balance: config.balance.word().into(),
        waiting: waiting.sum(),
        servers: servers.collect(),
    }
}

fn difference(server: &board::Server) -> Option<Difference> {
    let state = match server.own.admin() {
        Admin::Ready => None,
        Admin::Draining => Some(State::Draining.name().to_string()),
        Admin::Disabled => Some(State::Disabled.name().to_string()),
    };
    let file_weight = (server.weight() != server.file_weight).then_some(server.file_weight);
    server.differs().then_some(Difference { state, file_weight })
}

/// The addresses that a server has now.
fn places(
    upstream: &board::Upstream,
    server: &board::Server,
    checks: &BTreeMap<PlaceId, Value>,
    sources: &[Source],
) -> Vec<Place> {
    let places = server.places.clone().filter_map(|number| {
        let place = &upstream.places[number];
        let address = server.shown(place.address?);
        let id = PlaceId {
            upstream: upstream.name.clone(),
            server: server.name.clone(),
            address: address.clone(),
        };
        // Earlier generations had other numbers.
        let own = sources.iter().filter_map(|source| {
            let index = source.config.upstreams.iter().position(|u| u.name == upstream.name)?;
            let within = number - server.places.start;
            let place = places_in(source, index, &server.name)?.nth(within)?;
            Some(source.counters.server(source.layout.place(index, place), OfServer::Active).get())
        });
        // Nobody asks a disabled one: what was found before is no answer.
        let is_checked = place.state() != State::Disabled;
        Some(Place {
            address,
            state: place.state().name().into(),
            weight: place.weight,
            priority: place.priority,
            active: own.sum(),
            check: checks.get(&id).filter(|_| is_checked).cloned().unwrap_or(Value::Null),
        })
    });
    places.collect()
}

/// The sum of a server's cells in a table, where that generation had it.
fn sum_of(source: &Source, upstream: &str, address: &str, which: OfServer) -> u64 {
    let Some(index) = source.config.upstreams.iter().position(|u| u.name == upstream) else { return 0 };
    let Some(places) = places_in(source, index, address) else { return 0 };
    places.map(|place| source.counters.server(source.layout.place(index, place), which).get()).sum()
}

/// A server's places in the numbering of a table.
fn places_in(source: &Source, upstream: usize, address: &str) -> Option<Range<usize>> {
    let servers = &source.config.upstreams[upstream].servers;
    let server = servers.iter().position(|server| server.address.to_string() == address)?;
    Some(source.layout.numbering().places_of(upstream, server))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(slot: usize, pid: u32, state: &str) -> WorkerState {
        let restart_reasons = BTreeMap::new();
        WorkerState {
            slot,
            pid,
            generation: 1,
            state: state.into(),
            restarts: 0,
            restart_reasons,
            keeper: None,
            helped_by: None,
        }
    }

    #[test]
    fn a_slot_without_a_worker_is_unhealthy_and_one_that_is_to_come_is_not() {
        let up = DaemonState { announced: true, ..DaemonState::default() };
        let at = |daemon: &DaemonState, workers: &[WorkerState]| unfit(daemon, workers);
        assert_eq!(at(&up, &[worker(0, 7, "ready"), worker(1, 0, "starting")]), None);
        let text = at(&up, &[worker(0, 7, "ready"), worker(1, 0, "backoff")]).expect("a reason");
        assert_eq!(text, "slot 1 does not serve: backoff");
        assert!(at(&up, &[worker(0, 7, "starting")]).is_some());
        assert!(at(&DaemonState::default(), &[worker(0, 7, "ready"), worker(1, 0, "starting")]).is_some());
        let leaving = DaemonState { leaving: true, ..up };
        assert!(at(&leaving, &[worker(0, 7, "ready")]).expect("a reason").starts_with("draining"));
    }
}
