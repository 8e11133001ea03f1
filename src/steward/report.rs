//! The status document, from the counters and what the supervisor said.

use std::collections::BTreeMap;

use super::Knowledge;
use crate::config::{Mode, Word};
use crate::control::WorkerState;
use crate::control::status::{Flows, Listener, Server, Status, Upstream, Worker};
use crate::counters::{Counters, OfFlows, OfListener, OfServer, Process};
use crate::flow::DropReason;
use crate::relay::CloseReason;
use crate::spread::Spread;

/// What runs now.
pub fn status(knowledge: &Knowledge) -> Status {
    let slots: Vec<Counters> = knowledge
        .regions
        .iter()
        .filter_map(|region| Counters::over(region.words(), &knowledge.layout))
        .collect();
    let workers = knowledge.workers.lock().expect("no thread panics with it").clone();
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: knowledge.birth.supervisor_pid,
        generation: knowledge.birth.generation,
        started_at: knowledge.birth.started_at,
        config_path: knowledge.birth.config_path.clone(),
        workers: workers.iter().map(|state| worker(state, &slots)).collect(),
        listeners: (0..knowledge.config.listeners.len()).map(|i| listener(knowledge, i, &slots)).collect(),
        upstreams: (0..knowledge.config.upstreams.len()).map(|i| upstream(knowledge, i, &slots)).collect(),
    }
}

fn worker(state: &WorkerState, slots: &[Counters]) -> Worker {
    let count = |which| slots.get(state.slot).map_or(0, |slot| slot.process(which).get());
    Worker {
        slot: state.slot,
        pid: state.pid,
        generation: state.generation,
        state: state.state.clone(),
        restarts: state.restarts,
        accepted: count(Process::Accepted),
        active: count(Process::Active),
        loop_lag_us: count(Process::LoopLag),
        accept_pauses: count(Process::AcceptPauses),
        helped_by: state.helped_by,
    }
}

fn listener(knowledge: &Knowledge, index: usize, slots: &[Counters]) -> Listener {
    let config = &knowledge.config.listeners[index];
    let per_slot = |which| slots.iter().map(|slot| slot.listener(index, which).get()).collect::<Vec<u64>>();
    let sum = |which| per_slot(which).iter().sum();
    let ended = CloseReason::ALL
        .into_iter()
        .map(|reason| (reason.name().to_string(), slots.iter().map(|s| s.ended(index, reason).get()).sum()))
        .filter(|(_, count)| *count > 0)
        .collect::<BTreeMap<String, u64>>();
    let is_udp = config.mode == Mode::Udp;
    Listener {
        name: config.name.clone(),
        mode: config.mode.word().into(),
        bind: config.bind.iter().map(ToString::to_string).collect(),
        steering: "hash".into(),
        steering_active: "hash".into(),
        connections: sum(OfListener::Connections),
        active: sum(OfListener::Active),
        bytes_in: sum(OfListener::BytesIn),
        bytes_out: sum(OfListener::BytesOut),
        flows: is_udp.then(|| flows(index, slots)),
        dropped: if is_udp { dropped(index, slots) } else { BTreeMap::new() },
        ended,
        active_per_slot: per_slot(OfListener::Active),
        spread: Spread::equal(&per_slot(OfListener::Connections)),
    }
}

fn flows(listener: usize, slots: &[Counters]) -> Flows {
    let of_all = |which| slots.iter().map(|slot| slot.listener(listener, which).get()).sum();
    let of_flows = |which| slots.iter().map(|slot| slot.flows(listener, which).get()).sum();
    let ended = |reason| slots.iter().map(|slot| slot.ended(listener, reason).get()).sum();
    Flows {
        active: of_all(OfListener::Active),
        opened: of_all(OfListener::Connections),
        expired: ended(CloseReason::IdleTimeout),
        finished: ended(CloseReason::Finished),
        evicted: ended(CloseReason::Evicted),
        shed: slots.iter().map(|slot| slot.dropped(listener, DropReason::Shed).get()).sum(),
        moved: of_flows(OfFlows::Moved),
        quarantined: of_flows(OfFlows::Quarantined),
        quarantine_cut: of_flows(OfFlows::QuarantineCut),
        datagrams_in: of_flows(OfFlows::DatagramsIn),
        datagrams_out: of_flows(OfFlows::DatagramsOut),
        offload_failures: of_flows(OfFlows::OffloadFailures),
    }
}

/// By reason, with the kernel's own.
fn dropped(listener: usize, slots: &[Counters]) -> BTreeMap<String, u64> {
    let own = DropReason::ALL.into_iter().map(|reason| {
        let count = slots.iter().map(|slot| slot.dropped(listener, reason).get()).sum();
        (reason.name().to_string(), count)
    });
    let kernel = slots.iter().map(|slot| slot.flows(listener, OfFlows::KernelDrops).get()).sum();
    let kernel = [("receive_buffer".to_string(), kernel)];
    own.chain(kernel).filter(|(_, count)| *count > 0).collect()
}

fn upstream(knowledge: &Knowledge, index: usize, slots: &[Counters]) -> Upstream {
    let config = &knowledge.config.upstreams[index];
    let servers = config.servers.iter().enumerate().map(|(at, server)| {
        let number = knowledge.layout.server(index, at);
        let sum = |which| slots.iter().map(|slot| slot.server(number, which).get()).sum();
        Server {
            address: server.address.to_string(),
            state: "up".into(),
            weight: server.weight,
            backup: server.backup,
            active: sum(OfServer::Active),
            connections: sum(OfServer::Connections),
            failures: sum(OfServer::Failures),
        }
    });
    Upstream { name: config.name.clone(), balance: config.balance.word().into(), servers: servers.collect() }
}
