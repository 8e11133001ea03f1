//! The `[upstream.health]` table: how servers are checked.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How the servers of an upstream are checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// What a check does.
    pub check: Check,
    /// The port that is checked; 0 = the server's.
    pub port: u16,
    /// From one check of a server to the next.
    pub interval: Duration,
    /// How long one check may take.
    pub timeout: Duration,
    /// So many good checks in a row bring a server up.
    pub rise: u32,
    /// So many bad ones in a row take it down.
    pub fall: u32,
    /// Failures of real traffic count too.
    pub passive: bool,
    /// How long a server that came up takes to its full share; zero = none.
    pub slow_start: Duration,
    /// `http`: the method.
    pub method: String,
    /// `http`: the path, with its query.
    pub path: String,
    /// `http`: the Host header; empty = the server's address.
    pub host: String,
    /// `http`: the status codes of a server that is up.
    pub expect_status: Vec<StatusRange>,
    /// `exchange`: what is sent.
    pub send: Vec<u8>,
    /// `exchange`: what must occur in the answer.
    pub expect: Vec<u8>,
    /// `command`: the program and its arguments.
    pub command: Vec<String>,
}

/// What a check does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// Nothing: only failures of real traffic tell.
    None,
    /// Connects.
    Connect,
    /// Asks by HTTP/1.1 and looks at the status.
    Http,
    /// Sends bytes and looks for others in the answer.
    Exchange,
    /// Runs a program.
    Command,
}

/// HTTP status codes, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct StatusRange {
    pub first: u16,
    pub last: u16,
}

impl StatusRange {
    /// Whether this code is among them.
    pub fn contains(self, code: u16) -> bool {
        (self.first..=self.last).contains(&code)
    }
}
