//! `evenkeel status`: what runs, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use super::{ask, out};
use crate::control::status::{Check, Difference, Flows, Keeper, Listener, Status, Upstream, Worker};
use crate::spread::{Circumstances, Verdict};

/// Prints what the daemon says.
pub fn run(socket: &Path, json: bool) -> ExitCode {
    let answer = match ask::ask(socket, &serde_json::json!({"command": "status"})) {
        Ok(mut answer) => answer["status"].take(),
        Err(code) => return code,
    };
    let text = if json {
        format!("{answer:#}\n")
    } else {
        match serde_json::from_value::<Status>(answer) {
            Ok(status) => table(&status),
            Err(error) => {
                eprintln!("evenkeel: the daemon's answer is of another version: {error}");
                return ExitCode::from(1);
            }
        }
    };
    out::write(&text);
    ExitCode::SUCCESS
}

fn table(status: &Status) -> String {
    let mut out = String::new();
    let Status { version, pid, generation, config_path, .. } = status;
    let _ = writeln!(out, "evenkeel {version}  pid {pid}  generation {generation}  {config_path}\n");
    if let Some(reason) = &status.unhealthy {
        let _ = writeln!(out, "not healthy: {reason}\n");
    }
    if let Some(reload) = status.reload.as_ref().filter(|reload| !reload.success) {
        let _ = writeln!(out, "the last reload was refused: {}\n", reload.text);
    }
    workers(&mut out, &status.workers);
    for listener in &status.listeners {
        describe_listener(&mut out, listener);
    }
    for upstream in &status.upstreams {
        describe_upstream(&mut out, upstream);
    }
    out
}

fn workers(out: &mut String, workers: &[Worker]) {
    let _ = writeln!(
        out,
        "{:<5} {:>8} {:<9} {:>8} {:>10} {:>8} {:>9} {:>7}",
        "SLOT", "PID", "STATE", "RESTARTS", "ACCEPTED", "ACTIVE", "LAG", "PAUSES"
    );
    for worker in workers {
        let lag = format!("{:.1} ms", worker.loop_lag_us as f64 / 1000.0);
        let _ = writeln!(
            out,
            "{:<5} {:>8} {:<9} {:>8} {:>10} {:>8} {:>9} {:>7}{}",
            worker.slot,
            worker.pid,
            worker.state,
            worker.restarts,
            worker.accepted,
            worker.active,
            lag,
            worker.accept_pauses,
            remarks(worker),
        );
    }
}

/// Who helps it, and why it was replaced.
fn remarks(worker: &Worker) -> String {
    let help = worker.helped_by.map(|slot| format!("slot {slot} accepts for it"));
    let replaced = worker.restart_reasons.iter().map(|(reason, count)| format!("{reason} {count}"));
    let kept = worker.keeper.as_ref().map(describe_keeper);
    help.into_iter().chain(replaced).chain(kept).map(|remark| format!("  {remark}")).collect()
}

/// Who keeps its sessions, and what came of that.
fn describe_keeper(keeper: &Keeper) -> String {
    let who = match keeper.pid {
        0 => match &keeper.unavailable {
            Some(why) => format!("no keeper: {why}"),
            None => "no keeper".to_string(),
        },
        pid => format!("keeper {pid}"),
    };
    let did = match keeper.takeovers {
        0 => String::new(),
        count => format!(
            ": {count} deaths, {} sessions and {} flows kept, {} self-check resets, {} lost",
            keeper.sessions, keeper.flows, keeper.self_check_resets, keeper.lost
        ),
    };
    format!("{who}{did}")
}

fn describe_listener(out: &mut String, listener: &Listener) {
    let Listener { name, mode, connections, active, bytes_in, bytes_out, spread, .. } = listener;
    let _ = writeln!(out, "\nlistener {name}  {mode} {}", listener.bind.join(" "));
    let _ = writeln!(out, "  steering {}, by {}", listener.steering, listener.steering_active);
    let _ =
        writeln!(out, "  connections {connections}  active {active}  bytes in {bytes_in}  out {bytes_out}");
    if listener.flows.is_none() {
        let limit: u64 = listener.queues.iter().map(|queue| queue.limit).sum();
        let Listener { accept_queue, accept_overflows, .. } = listener;
        let _ = writeln!(out, "  accept queue {accept_queue} of {limit}  overflows {accept_overflows}");
    }
    if !listener.ended.is_empty() {
        let ended: Vec<String> =
            listener.ended.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let _ = writeln!(out, "  ended: {}", ended.join("  "));
    }
    if let Some(flows) = &listener.flows {
        describe_flows(out, flows, &listener.dropped);
    }
    for (slot, count) in spread.per_slot.iter().enumerate() {
        let share = spread.share(slot);
        let bar = "#".repeat((share * 40.0).round() as usize);
        let _ = writeln!(out, "  slot {slot:<3} {count:>10} {:>5.1} %  {bar}", share * 100.0);
    }
    if *connections > 0 {
        let _ = writeln!(
            out,
            "  spread: max/mean {:.3}  cv {:.3}  jain {:.4}  chi-square {:.2}  p {:.3}",
            spread.max_over_mean, spread.cv, spread.jain, spread.chi_square, spread.p_value
        );
        let about = Circumstances {
            noun: if listener.flows.is_some() { "flows" } else { "connections" },
            steering: Some(listener.steering_in_force()),
            client_addresses: None,
        };
        let _ = writeln!(
            out,
            "  {}",
            Verdict::weighted(spread, &listener.expected_per_slot).sentence(spread, &about)
        );
    }
}

fn describe_flows(out: &mut String, flows: &Flows, dropped: &BTreeMap<String, u64>) {
    let Flows { datagrams_in, datagrams_out, moved, quarantined, quarantine_cut, .. } = flows;
    let _ = writeln!(
        out,
        "  datagrams in {datagrams_in}  out {datagrams_out}  flows moved {moved}  ports in quarantine {quarantined} (cut {quarantine_cut})"
    );
    if !dropped.is_empty() {
        let dropped: Vec<String> =
            dropped.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let _ = writeln!(out, "  dropped: {}", dropped.join("  "));
    }
}

fn describe_upstream(out: &mut String, upstream: &Upstream) {
    let waiting = match upstream.waiting {
        0 => String::new(),
        count => format!("  {count} wait for a place"),
    };
    let _ = writeln!(out, "\nupstream {}  {}{waiting}", upstream.name, upstream.balance);
    let _ = writeln!(
        out,
        "  {:<28} {:<10} {:>6} {:>8} {:>11} {:>8}",
        "SERVER", "STATE", "WEIGHT", "ACTIVE", "CONNECTIONS", "FAILURES"
    );
    for server in &upstream.servers {
        let active = match server.max_connections {
            0 => server.active.to_string(),
            most => format!("{}/{most}", server.active),
        };
        let _ = writeln!(
            out,
            "  {:<28} {:<10} {:>6} {active:>8} {:>11} {:>8}{}{}",
            server.address,
            server.state,
            server.weight,
            server.connections,
            server.failures,
            if server.backup { "  backup" } else { "" },
            server.differs_from_file.as_ref().map_or(String::new(), differs),
        );
        describe_check(out, &server.check, &server.state);
        for place in &server.places {
            let _ = writeln!(
                out,
                "    {:<26} {:<10} {:>6} {:>8}",
                place.address, place.state, place.weight, place.active
            );
            describe_check(out, &place.check, &place.state);
        }
        if let Some(error) = &server.resolve_error {
            let _ = writeln!(out, "    {error}");
        }
    }
}

/// Why a server is not well, or not known to be; nothing where it is.
fn describe_check(out: &mut String, check: &serde_json::Value, state: &str) {
    let Ok(check) = serde_json::from_value::<Check>(check.clone()) else { return };
    let Check { kind, last, reason, rise, rise_needed, fall, fall_needed, .. } = &check;
    let reason = reason.as_deref().unwrap_or("no reason known");
    let _ = match last.as_str() {
        "good" if rise < rise_needed && check.flapping => {
            writeln!(out, "      check {kind}: good {rise} times of {rise_needed}, flaps")
        }
        "bad" if state == "down" => writeln!(out, "      check {kind}: {reason}"),
        "bad" => writeln!(out, "      check {kind}: {reason}, {fall} times of {fall_needed}"),
        "unknown" => writeln!(out, "      check {kind}: cannot be asked: {reason}"),
        "traffic" if check.on_trial => writeln!(out, "      {reason}; is being tried again"),
        "traffic" => writeln!(out, "      {reason}"),
        _ => Ok(()),
    };
}

/// What an operator should not forget to take back.
fn differs(difference: &Difference) -> String {
    let state = difference.state.as_ref().map(|state| format!("{state} by hand"));
    let weight = difference.file_weight.map(|weight| format!("weight by hand, {weight} in the file"));
    let all: Vec<String> = state.into_iter().chain(weight).collect();
    format!("  ({})", all.join(", "))
}
