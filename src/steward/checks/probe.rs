//! One check of one server: what it asks, and what came of it.
//!
//! Made by `checks` from the configuration and run as often as it says. Holds
//! no socket between two runs. Bounded by its `timeout`, and by `MAX_ANSWER`
//! for what it reads; ends with an `Answer`, or with the future that runs it.

use std::io;
use std::time::{Duration, Instant};

use super::dial::Place;
use super::{command, exchange, http};
use crate::config::StatusRange;

/// So much of an answer is looked at.
pub const MAX_ANSWER: usize = 64 * 1024;

/// A check that can be run again and again.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// What it does.
    pub kind: Kind,
    /// Where, and from where.
    pub place: Place,
    /// How long it may take.
    pub timeout: Duration,
}

/// What a check does.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Connects.
    Connect,
    /// Asks by HTTP and looks at the status.
    #[allow(missing_docs)]
    Http { method: String, path: String, host: String, expect_status: Vec<StatusRange> },
    /// Sends bytes over TCP or a Unix socket and looks for others.
    #[allow(missing_docs)]
    Exchange { send: Vec<u8>, expect: Vec<u8> },
    /// The same with datagrams.
    #[allow(missing_docs)]
    ExchangeDatagrams { send: Vec<u8>, expect: Vec<u8> },
    /// Runs a program.
    Command {
        /// The program and its arguments.
        arguments: Vec<String>,
        /// What it is told of the server.
        server: String,
        /// And of the upstream.
        upstream: String,
    },
}

/// What came of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The server is well, and took so long to say so.
    Good(Duration),
    /// It is not, for this reason.
    Bad(String),
    /// This host could not even ask: nothing is known.
    Unknown(String),
}

/// Why a check did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// The system says no.
    System(&'static str, io::Error),
    /// The server's answer is not that of a server that is well.
    Wrong(String),
}

impl Probe {
    /// Runs it once.
    pub async fn run(&self) -> Answer {
        let begin = Instant::now();
        // A command has to be killed where time runs out, and says then what
        // it printed.
        if let Kind::Command { arguments, server, upstream } = &self.kind {
            return answer(command::run(arguments, server, upstream, self.timeout).await, begin);
        }
        match tokio::time::timeout(self.timeout, self.ask()).await {
            Ok(result) => answer(result, begin),
            Err(_) => {
                Answer::Bad(format!("no answer within {}", crate::units::format_duration(self.timeout)))
            }
        }
    }

    async fn ask(&self) -> Result<(), Failure> {
        match &self.kind {
            Kind::Connect => self.place.connect().await.map(drop),
            Kind::Http { method, path, host, expect_status } => {
                let stream = self.place.connect().await?;
                http::ask(stream, &http::request(method, path, host), expect_status).await
            }
            Kind::Exchange { send, expect } => {
                exchange::over_stream(self.place.connect().await?, send, expect).await
            }
            Kind::ExchangeDatagrams { send, expect } => {
                exchange::over_datagrams(&self.place, send, expect).await
            }
            Kind::Command { .. } => unreachable!("`run` has its own way for commands"),
        }
    }
}

fn answer(result: Result<(), Failure>, begin: Instant) -> Answer {
    match result {
        Ok(()) => Answer::Good(begin.elapsed()),
        Err(Failure::Wrong(reason)) => Answer::Bad(reason),
        Err(Failure::System(what, error)) => {
            let reason = format!("{what}: {}", words(&error));
            if is_ours(&error) { Answer::Unknown(reason) } else { Answer::Bad(reason) }
        }
    }
}

/// Whether an error says that this host lacks something, and nothing of the
/// server: no descriptor, no memory, no port or no such address.
fn is_ours(error: &io::Error) -> bool {
    use nix::libc::{EADDRINUSE, EADDRNOTAVAIL, EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM};
    let ours = [EMFILE, ENFILE, ENOBUFS, ENOMEM, EADDRNOTAVAIL, EADDRINUSE];
    match error.raw_os_error() {
        // A Unix server whose queue is full; of fork(2) and of connect(2) it
        // means that the host is short of something, but that is rare.
        Some(EAGAIN) => false,
        Some(code) => ours.contains(&code),
        None => false,
    }
}

/// An error in words alone, in lower case.
pub fn words(error: &io::Error) -> String {
    let text = match error.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_string(),
        None => error.to_string(),
    };
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_lowercase());
    first.into_iter().chain(chars).collect()
}

/// Bytes as they may stand in a log line or a status: printable, short.
pub fn printable(bytes: &[u8], most: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let clean = |c: char| if c.is_control() || c == '\u{fffd}' { '.' } else { c };
    let mut shown: String = text.chars().take(most).map(clean).collect();
    if text.chars().nth(most).is_some() {
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_of_this_host_is_not_held_against_the_server() {
        let ask = |code| {
            answer(Err(Failure::System("connect", io::Error::from_raw_os_error(code))), Instant::now())
        };
        assert_eq!(ask(nix::libc::ECONNREFUSED), Answer::Bad("connect: connection refused".into()));
        assert!(matches!(ask(nix::libc::EMFILE), Answer::Unknown(_)));
        assert!(matches!(ask(nix::libc::EADDRNOTAVAIL), Answer::Unknown(_)));
    }

    #[test]
    fn hostile_bytes_cannot_break_a_line() {
        assert_eq!(printable(b"a\nb\x1b[31m\xff", 40), "a.b.[31m.");
        assert_eq!(printable(b"abcdef", 3), "abc...");
    }
}
