//! The status document, from the counters and what the supervisor said.

use std::collections::BTreeMap;

use super::Knowledge;
use crate::config::Word;
use crate::control::WorkerState;
use crate::control::status::{Listener, Server, Status, Upstream, Worker};
use crate::counters::{Counters, OfListener, OfServer, Process};
use crate::relay::CloseReason;
use crate::spread::Spread;
use crate::steering::Expected;

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
    let connections = per_slot(OfListener::Connections);
    let steering = knowledge.steering.lock().expect("no thread panics with it").get(&index).cloned();
    // Where nothing was told yet, as the kernel's hash would.
    let (active, expected) = steering
        .unwrap_or_else(|| ("hash".to_string(), Expected::new(vec![1.0 / slots.len() as f64; slots.len()])));
    let expected_per_slot = expected.at(connections.iter().sum());
    Listener {
        name: config.name.clone(),
        mode: config.mode.word().into(),
        bind: config.bind.iter().map(ToString::to_string).collect(),
        steering: config.steering.word().into(),
        steering_active: active,
        connections: sum(OfListener::Connections),
        active: sum(OfListener::Active),
        bytes_in: sum(OfListener::BytesIn),
        bytes_out: sum(OfListener::BytesOut),
        ended,
        active_per_slot: per_slot(OfListener::Active),
        spread: Spread::weighted(&connections, &expected_per_slot),
        shares: expected.shares().to_vec(),
        expected_per_slot,
    }
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
