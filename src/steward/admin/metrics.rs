//! `/metrics`: the status document as numbers for a scraper.
//!
//! Pure. Names and labels are promises (docs/OBSERVABILITY.md lists them). A
//! reason that has not occurred is written as 0, so that its first occurrence
//! is a rise; bounded by the configuration, for labels come from there alone.

use std::collections::{BTreeMap, BTreeSet};

use super::encoder::{Encoder, Kind};
use crate::control::status::{Listener, Server, Status, Worker};
use crate::counters::CONNECT_BOUNDS;
use crate::flow::DropReason;
use crate::relay::CloseReason;

pub use super::encoder::Format;

/// Why workers are replaced.
const RESTART_REASONS: [&str; 5] = ["crash", "exit", "hang", "killed", "other"];
/// Datagrams for which the socket's buffer had no room.
const FULL_BUFFER: &str = "receive_buffer";

/// The whole text.
pub fn text(status: &Status, format: Format) -> String {
    let mut out = Encoder::new(format);
    daemon(&mut out, status);
    workers(&mut out, &status.workers);
    keepers(&mut out, &status.workers);
    listeners(&mut out, &status.listeners);
    let tcp: Vec<&Listener> = status.listeners.iter().filter(|listener| listener.flows.is_none()).collect();
    accept_queues(&mut out, &tcp);
    let udp: Vec<&Listener> = status.listeners.iter().filter(|listener| listener.flows.is_some()).collect();
    flows(&mut out, &udp);
    servers(&mut out, status);
    out.finish()
}

fn daemon(out: &mut Encoder, status: &Status) {
    out.family("evenkeel_build", Kind::Info, "", "The program that runs.");
    out.sample(&[("version", &status.version)], 1);
    out.family("evenkeel_start_time_seconds", Kind::Gauge, "seconds", "When the daemon started, since 1970.");
    out.sample(&[], status.started_at);
    out.family(
        "evenkeel_healthy",
        Kind::Gauge,
        "",
        "Whether every worker serves and the daemon is not leaving.",
    );
    out.sample(&[], u8::from(status.healthy));
    out.family("evenkeel_generation", Kind::Gauge, "", "The configuration in force, counted from 1.");
    out.sample(&[], status.generation);
    let reload = status.reload.as_ref();
    out.family(
        "evenkeel_reload_success",
        Kind::Gauge,
        "",
        "Whether the last reload came into force; 1 before any.",
    );
    out.sample(&[], u8::from(reload.is_none_or(|reload| reload.success)));
    out.family(
        "evenkeel_reload_time_seconds",
        Kind::Gauge,
        "seconds",
        "When that was, since 1970; 0 before any.",
    );
    out.sample(&[], reload.map_or(0, |reload| reload.at));
}

fn workers(out: &mut Encoder, workers: &[Worker]) {
    out.family("evenkeel_worker_up", Kind::Gauge, "", "Whether the slot's worker accepts.");
    for worker in workers {
        out.sample(&[("slot", &worker.slot.to_string())], u8::from(worker.state == "ready"));
    }
    out.family(
        "evenkeel_worker_restarts",
        Kind::Counter,
        "",
        "Workers of the slot that ended and were replaced.",
    );
    for worker in workers {
        let slot = worker.slot.to_string();
        for (reason, count) in with_zeros(&worker.restart_reasons, RESTART_REASONS) {
            out.sample(&[("slot", &slot), ("reason", reason)], count);
        }
    }
    out.family(
        "evenkeel_worker_loop_lag_seconds",
        Kind::Gauge,
        "seconds",
        "The longest turn of the event loop lately.",
    );
    for worker in workers {
        out.sample(&[("slot", &worker.slot.to_string())], seconds(worker.loop_lag_us));
    }
    let help = "How often the worker paused accepting for want of descriptors or memory.";
    out.family("evenkeel_worker_accept_pauses", Kind::Counter, "", help);
    for worker in workers {
        out.sample(&[("slot", &worker.slot.to_string())], worker.accept_pauses);
    }
    let help = "Lines of the access log that were dropped because the writer did not keep up.";
    out.family("evenkeel_worker_access_log_dropped", Kind::Counter, "", help);
    for worker in workers {
        out.sample(&[("slot", &worker.slot.to_string())], worker.access_log_dropped);
    }
}

/// Of slots that are to have a keeper.
fn keepers(out: &mut Encoder, workers: &[Worker]) {
    let kept =
        || workers.iter().filter_map(|worker| Some((worker.slot.to_string(), worker.keeper.as_ref()?)));
    let help = "Whether somebody keeps what the slot's worker has.";
    out.family("evenkeel_keeper_up", Kind::Gauge, "", help);
    for (slot, keeper) in kept() {
        out.sample(&[("slot", &slot)], u8::from(keeper.pid != 0));
    }
    let help = "Deaths of a worker whose keeper passed on what it had.";
    out.family("evenkeel_keeper_takeovers", Kind::Counter, "", help);
    for (slot, keeper) in kept() {
        out.sample(&[("slot", &slot)], keeper.takeovers);
    }
    let help = "Sessions and flows of dead workers: kept, reset by the self-check, lost otherwise.";
    out.family("evenkeel_keeper_sessions", Kind::Counter, "", help);
    for (slot, keeper) in kept() {
        let fates = [
            ("kept", keeper.sessions + keeper.flows),
            ("self_check", keeper.self_check_resets),
            ("lost", keeper.lost),
        ];
        for (fate, count) in fates {
            out.sample(&[("slot", &slot), ("fate", fate)], count);
        }
    }
    let help = "Bytes that dead workers had received and not yet sent.";
    out.family("evenkeel_keeper_recovered_bytes", Kind::Counter, "bytes", help);
    for (slot, keeper) in kept() {
        out.sample(&[("slot", &slot)], keeper.bytes);
    }
}

fn listeners(out: &mut Encoder, listeners: &[Listener]) {
    let help = "TCP connections accepted, or UDP flows opened.";
    out.family("evenkeel_listener_connections", Kind::Counter, "", help);
    per_slot(out, listeners, |listener| &listener.spread.per_slot);
    out.family("evenkeel_listener_active", Kind::Gauge, "", "Sessions or flows that live.");
    per_slot(out, listeners, |listener| &listener.active_per_slot);
    out.family("evenkeel_listener_bytes", Kind::Counter, "bytes", "Bytes from (in) and to (out) clients.");
    for Listener { name, bytes_in, bytes_out, .. } in listeners {
        out.sample(&[("listener", name), ("direction", "in")], bytes_in);
        out.sample(&[("listener", name), ("direction", "out")], bytes_out);
    }
    out.family("evenkeel_session_end", Kind::Counter, "", "Sessions or flows that ended, by reason.");
    for listener in listeners {
        for (reason, count) in with_zeros(&listener.ended, CloseReason::ALL.map(CloseReason::name)) {
            out.sample(&[("listener", &listener.name), ("reason", reason)], count);
        }
    }
    let help =
        "The busiest slot's connections over the mean, or over its share where shares differ; 1 is even.";
    out.family("evenkeel_worker_spread_ratio", Kind::Gauge, "ratio", help);
    for listener in listeners {
        out.sample(&[("listener", &listener.name)], listener.spread.max_over_mean);
    }
}

fn per_slot(out: &mut Encoder, listeners: &[Listener], counts: impl Fn(&Listener) -> &[u64]) {
    for listener in listeners {
        for (slot, count) in counts(listener).iter().enumerate() {
            out.sample(&[("listener", &listener.name), ("slot", &slot.to_string())], count);
        }
    }
}

fn accept_queues(out: &mut Encoder, listeners: &[&Listener]) {
    out.family("evenkeel_listener_accept_queue", Kind::Gauge, "", "Connections that wait to be accepted.");
    for listener in listeners {
        for (slot, queue) in listener.queues.iter().enumerate() {
            out.sample(&[("listener", &listener.name), ("slot", &slot.to_string())], queue.waiting);
        }
    }
    let help = "Connections that may wait to be accepted.";
    out.family("evenkeel_listener_accept_queue_limit", Kind::Gauge, "", help);
    for listener in listeners {
        for (slot, queue) in listener.queues.iter().enumerate() {
            out.sample(&[("listener", &listener.name), ("slot", &slot.to_string())], queue.limit);
        }
    }
    let help = "Handshakes that the kernel dropped, mostly because the accept queue was full.";
    out.family("evenkeel_listener_accept_overflows", Kind::Counter, "", help);
    for listener in listeners {
        out.sample(&[("listener", &listener.name)], listener.accept_overflows);
    }
}

fn flows(out: &mut Encoder, listeners: &[&Listener]) {
    let counted = |listener: &Listener| listener.flows.clone().unwrap_or_default();
    let help = "Datagrams from (in) and to (out) clients; dropped ones are among the former.";
    out.family("evenkeel_udp_datagrams", Kind::Counter, "", help);
    for listener in listeners {
        let flows = counted(listener);
        out.sample(&[("listener", &listener.name), ("direction", "in")], flows.datagrams_in);
        out.sample(&[("listener", &listener.name), ("direction", "out")], flows.datagrams_out);
    }
    out.family("evenkeel_udp_dropped", Kind::Counter, "", "Datagrams that were dropped, by reason.");
    for listener in listeners {
        let reasons = DropReason::ALL.into_iter().map(DropReason::name).chain([FULL_BUFFER]);
        for (reason, count) in with_zeros(&listener.dropped, reasons) {
            out.sample(&[("listener", &listener.name), ("reason", reason)], count);
        }
    }
    let help = "Bytes that wait to be read, as the kernel charges them.";
    out.family("evenkeel_udp_receive_queue_bytes", Kind::Gauge, "bytes", help);
    for listener in listeners {
        for (slot, queue) in listener.queues.iter().enumerate() {
            out.sample(&[("listener", &listener.name), ("slot", &slot.to_string())], queue.waiting);
        }
    }
    let help = "Upstream ports that rest after a flow ended with replies outstanding.";
    out.family("evenkeel_udp_quarantined_ports", Kind::Gauge, "", help);
    for listener in listeners {
        out.sample(&[("listener", &listener.name)], counted(listener).quarantined);
    }
}

fn servers(out: &mut Encoder, status: &Status) {
    let mut seen = BTreeSet::new();
    let mut servers: Vec<([(&str, &str); 2], &Server)> = Vec::new();
    for upstream in &status.upstreams {
        for server in &upstream.servers {
            // Two samples with the same labels would spoil the whole scrape.
            if seen.insert((&upstream.name, &server.address)) {
                servers.push(([("upstream", &upstream.name), ("server", &server.address)], server));
            }
        }
    }
    out.family("evenkeel_server_up", Kind::Gauge, "", "Whether the server works: up, or draining.");
    for (labels, server) in &servers {
        out.sample(labels, u8::from(matches!(server.state.as_str(), "up" | "draining")));
    }
    out.family("evenkeel_server_active", Kind::Gauge, "", "Sessions or flows that live.");
    for (labels, server) in &servers {
        out.sample(labels, server.active);
    }
    out.family("evenkeel_server_weight", Kind::Gauge, "", "The server's weight.");
    for (labels, server) in &servers {
        out.sample(labels, server.weight);
    }
    out.family("evenkeel_server_connections", Kind::Counter, "", "Connections established, or flows opened.");
    for (labels, server) in &servers {
        out.sample(labels, server.connections);
    }
    out.family("evenkeel_server_failures", Kind::Counter, "", "Connects that failed.");
    for (labels, server) in &servers {
        out.sample(labels, server.failures);
    }
    let help = "How long connecting took, where it succeeded.";
    out.family("evenkeel_server_connect_seconds", Kind::Histogram, "seconds", help);
    let bounds = CONNECT_BOUNDS.map(seconds);
    for (labels, server) in &servers {
        out.histogram(labels, &bounds, &server.connect.buckets, seconds(server.connect.sum_us));
    }
}

/// Every reason that is known, with those that occurred.
fn with_zeros(
    counts: &BTreeMap<String, u64>,
    known: impl IntoIterator<Item = &'static str>,
) -> BTreeMap<&str, u64> {
    let mut all: BTreeMap<&str, u64> = known.into_iter().map(|reason| (reason, 0)).collect();
    all.extend(counts.iter().map(|(reason, &count)| (reason.as_str(), count)));
    all
}

fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}
