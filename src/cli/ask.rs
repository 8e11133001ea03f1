//! Commands that only ask the daemon for something to be done.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use crate::control::client;

/// How long a daemon may take to answer.
const WAIT: Duration = Duration::from_secs(15);

/// Asks for a command without arguments.
pub fn simple(socket: &Path, command: &str) -> ExitCode {
    match ask(socket, command) {
        Ok(_) => ExitCode::SUCCESS,
        Err(code) => code,
    }
}

/// Asks, and says what is wrong where something is.
pub fn ask(socket: &Path, command: &str) -> Result<Value, ExitCode> {
    client::ask(socket, &json!({"command": command}), WAIT).map_err(|error| {
        eprintln!("evenkeel: {error}");
        ExitCode::from(1)
    })
}
