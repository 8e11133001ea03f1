//! Commands that only ask the daemon for something to be done.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::{EXIT_PERMISSION, out};
use crate::control::client;

/// How long a daemon may take to answer: a reload or a change of scale waits
/// until every session has moved.
const WAIT: Duration = Duration::from_secs(130);

/// Asks for a command without arguments.
pub fn command(socket: &Path, command: &str) -> ExitCode {
    simple(socket, &json!({"command": command}))
}

/// Asks, and prints what the daemon says of it.
pub fn simple(socket: &Path, request: &Value) -> ExitCode {
    match ask(socket, request) {
        Ok(answer) => {
            if let Some(text) = answer["text"].as_str().filter(|text| !text.is_empty()) {
                out::line(text);
            }
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}

/// Asks, and says what is wrong where something is.
pub fn ask(socket: &Path, request: &Value) -> Result<Value, ExitCode> {
    client::ask(socket, request, WAIT).map_err(|error| {
        eprintln!("evenkeel: {error}");
        ExitCode::from(if client::is_forbidden(socket) { EXIT_PERMISSION } else { 1 })
    })
}
