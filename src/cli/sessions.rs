//! `evenkeel sessions`: the established ones, listed, filtered, ended.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::json;

use super::{ask, out};
use crate::control::sessions::{Filter, Found, Line, MOST_SESSIONS, Query};
use crate::units::format_duration;

/// What was typed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this listener's
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,
    /// Only those of a client: 10.0.0.7, 10.0.0.7:40000 or 10.0.0.0/8
    #[arg(long, value_name = "ADDRESS", value_parser = client)]
    client: Option<(IpNet, Option<u16>)>,
    /// Only those with this server, as the file or `status` writes its address
    #[arg(long, value_name = "ADDRESS")]
    server: Option<String>,
    /// Only this upstream's
    #[arg(long, value_name = "NAME")]
    upstream: Option<String>,
    /// End them: both sides are reset. Wants a filter, or --all
    #[arg(long)]
    kill: bool,
    /// With --kill: every session there is
    #[arg(long, requires = "kill", conflicts_with_all = ["listener", "client", "server", "upstream"])]
    all: bool,
    /// List at most so many, the oldest first; all are counted
    #[arg(long, value_name = "N", default_value_t = 1000,
          value_parser = clap::value_parser!(u64).range(0..=MOST_SESSIONS as u64))]
    limit: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// An address, an address and port, or a network.
fn client(text: &str) -> Result<(IpNet, Option<u16>), String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((address.into(), None));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok((address.ip().into(), Some(address.port())));
    }
    let network = text.parse::<IpNet>().map(|network| (network.trunc(), None));
    network.map_err(|_| "write an address, an address with a port, or a network like 10.0.0.0/8".into())
}

/// Asks for them and prints what came.
pub fn run(args: Args, socket: &Path) -> ExitCode {
    let Args { listener, client, server, upstream, kill, all, limit, json, .. } = args;
    let filter = Filter {
        listener,
        client: client.map(|(network, _)| network),
        client_port: client.and_then(|(_, port)| port),
        server,
        upstream,
    };
    if kill && !all && filter == Filter::default() {
        eprintln!(
            "evenkeel: --kill alone would end every session\n  name which: --listener, --client, --server or --upstream; or say --all"
        );
        return ExitCode::from(2);
    }
    let query = Query { filter, kill, limit: limit as usize };
    let answer = match ask::ask(socket, &json!({"command": "sessions", "query": query})) {
        Ok(answer) => answer,
        Err(code) => return code,
    };
    let text = if json {
        format!("{:#}\n", answer["found"])
    } else {
        match serde_json::from_value::<Found>(answer["found"].clone()) {
            Ok(found) => table(&found, kill),
            Err(error) => {
                eprintln!("evenkeel: the daemon's answer is of another version: {error}");
                return ExitCode::from(1);
            }
        }
    };
    out::write(&text);
    match answer["silent"].as_u64() {
        Some(silent @ 1..) => {
            eprintln!("evenkeel: {silent} worker(s) gave no answer: their sessions are missing here");
            ExitCode::from(1)
        }
        _ => ExitCode::SUCCESS,
    }
}

fn table(found: &Found, kill: bool) -> String {
    let mut out = String::new();
    if !found.sessions.is_empty() {
        let _ = writeln!(
            out,
            "{:<4} {:<14} {:<24} {:<24} {:<10} {:>9} {:>9} {:>12} {:>12}",
            "SLOT", "LISTENER", "CLIENT", "SERVER", "STATE", "AGE", "IDLE", "IN", "OUT"
        );
    }
    for line in &found.sessions {
        let Line { slot, listener, state, bytes_in, bytes_out, .. } = line;
        let client = line.client.map_or("-".to_string(), |client| client.to_string());
        let server = line.server.as_deref().unwrap_or("-");
        let (age, idle) = (short(line.age_ms), short(line.idle_ms));
        let _ = writeln!(
            out,
            "{slot:<4} {listener:<14} {client:<24} {server:<24} {state:<10} {age:>9} {idle:>9} {bytes_in:>12} {bytes_out:>12}"
        );
    }
    let listed = found.sessions.len() as u64;
    let _ = match (kill, found.matched) {
        (true, _) => writeln!(out, "{} ended", found.ended),
        (false, matched) if listed < matched => {
            writeln!(out, "{matched} sessions, the oldest {listed} listed")
        }
        (false, 1) => writeln!(out, "1 session"),
        (false, matched) => writeln!(out, "{matched} sessions"),
    };
    out
}

/// Whole seconds once there is one.
fn short(ms: u64) -> String {
    format_duration(Duration::from_millis(if ms < 1000 { ms } else { ms / 1000 * 1000 }))
}
