//! The control socket: one JSON object a line, both ways.
//!
//! Bounded against callers of any kind: so many at once, a line no longer than
//! `MAX_LINE`, and `PATIENCE` for a line to arrive whole and for an answer to
//! be taken. Who may connect is decided by the socket's mode.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tracing::warn;

use super::{Knowledge, report};
use crate::board::Change;
use crate::control::Request;

/// Callers at once; further ones are told so.
pub const MAX_CALLERS: usize = 64;
/// How long a caller may take for a line, and to take an answer.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The longest request.
const MAX_LINE: usize = 64 * 1024;

/// Accepts callers for ever.
pub fn serve(listener: &UnixListener, knowledge: &Arc<Knowledge>) {
    let callers = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "the control socket");
                // Out of descriptors: others will end.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if callers.fetch_add(1, Ordering::AcqRel) >= MAX_CALLERS {
            let _ = answer(&stream, &json!({"error": "too many callers at the control socket"}));
            callers.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (knowledge, callers) = (Arc::clone(knowledge), Arc::clone(&callers));
        std::thread::spawn(move || {
            let _ = converse(&stream, &knowledge);
            callers.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

fn converse(stream: &UnixStream, knowledge: &Knowledge) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut buffer = Vec::new();
    while let Some(line) = read_line(stream, &mut buffer)? {
        knowledge.busy.fetch_add(1, Ordering::AcqRel);
        let reply = match serde_json::from_slice::<Value>(&line) {
            Ok(request) => handle(&request, knowledge),
            Err(error) => json!({"error": format!("not a JSON object: {error}")}),
        };
        let answered = answer(stream, &reply);
        knowledge.busy.fetch_sub(1, Ordering::AcqRel);
        answered?;
    }
    Ok(())
}

/// The next line, without its end; `None` at the end of the stream. The whole
/// line has to come in time, however it is split.
fn read_line(mut stream: &UnixStream, buffer: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
            let line = buffer.drain(..=end).collect::<Vec<u8>>();
            return Ok(Some(line[..end].to_vec()));
        }
        if buffer.len() > MAX_LINE {
            answer(stream, &json!({"error": format!("a request is longer than {MAX_LINE} bytes")}))?;
            return Ok(None);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk)? {
            0 => return Ok(None),
            count => buffer.extend_from_slice(&chunk[..count]),
        }
    }
}

fn answer(mut stream: &UnixStream, reply: &Value) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// A hook for tests, in debug builds alone: a verdict without a check.
#[cfg(debug_assertions)]
fn test_verdict(request: &Value, knowledge: &Knowledge) -> Value {
    use crate::board::{Health, PlaceId};
    let text = |key: &str| request.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    let id = PlaceId { upstream: text("upstream"), server: text("server"), address: text("server") };
    let health = if text("health") == "down" { Health::Down } else { Health::Up };
    knowledge.servers.handle_verdict(&id, health, "a test says so", crate::sys::clock::coarse());
    json!({"ok": true, "text": ""})
}

/// `{"command": "server", "change": "drain", "server": "web/10.0.0.1:80"}`
fn server_request(request: &Value) -> Result<Request, String> {
    let text = |key| request.get(key).and_then(Value::as_str);
    let weight = request.get("weight").and_then(Value::as_u64);
    let change = match (text("change"), weight) {
        (Some("drain"), _) => Change::Drain,
        (Some("disable"), _) => Change::Disable,
        (Some("ready"), _) => Change::Ready,
        (Some("weight"), Some(weight @ 0..=256)) => Change::Weight(weight as u32),
        (Some("weight"), _) => return Err("weight wants \"weight\", a number from 0 to 256".into()),
        _ => return Err("server wants \"change\": drain, disable, ready or weight".into()),
    };
    // A Unix socket's path has slashes, an upstream's name has none.
    let name = text("server").and_then(|name| name.split_once('/'));
    let (upstream, server) =
        name.ok_or("server wants \"server\": UPSTREAM/ADDRESS, the address as the file has it")?;
    Ok(Request::Server { upstream: upstream.into(), server: server.into(), change })
}

/// The answer to one request.
fn handle(request: &Value, knowledge: &Knowledge) -> Value {
    let done = |request| match knowledge.ask(request) {
        Ok(text) => json!({"ok": true, "text": text}),
        Err(error) => json!({"error": error}),
    };
    match request.get("command").and_then(Value::as_str) {
        Some("status") => json!({"status": report::status(knowledge)}),
        Some("drain") => done(Request::Drain),
        Some("stop") => done(Request::Stop),
        Some("reload") => done(Request::Reload {
            dry_run: request.get("dry_run").and_then(Value::as_bool).unwrap_or(false),
        }),
        Some("scale") => match request.get("workers").and_then(Value::as_u64) {
            Some(count @ 1..=64) => done(Request::Scale(count as usize)),
            _ => json!({"error": "scale wants \"workers\", a number from 1 to 64"}),
        },
        Some("rebalance") => done(Request::Rebalance),
        Some("server") => match server_request(request) {
            Ok(request) => done(request),
            Err(text) => json!({"error": text}),
        },
        Some("upgrade") => done(Request::Upgrade),
        Some("sessions") => {
            let query = request.get("query").cloned().unwrap_or_else(|| json!({}));
            match serde_json::from_value(query).map_err(|error| format!("query: {error}")) {
                Ok(query) => match knowledge.find_sessions(query) {
                    Ok((found, silent)) => json!({"found": found, "silent": silent}),
                    Err(error) => json!({"error": error}),
                },
                Err(error) => json!({"error": error}),
            }
        }
        #[cfg(debug_assertions)]
        Some("test-verdict") => test_verdict(request, knowledge),
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            let known = "status, reload, scale, rebalance, server, upgrade, sessions, drain, stop";
            json!({"error": format!("unknown command {shown:?}; known are {known}")})
        }
        None => json!({"error": "a request is an object with a \"command\""}),
    }
}
