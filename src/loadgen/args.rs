//! What can be typed after `evenkeel bench`.
//!
//! Owned by the command line; `plan` turns it into what is meant.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use super::values;

/// Options of `evenkeel bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What the target speaks
    #[arg(value_enum)]
    pub mode: Transport,
    /// The target: ADDRESS:PORT or NAME:PORT, an IPv6 address in brackets
    pub address: String,
    /// What one client does [default: connect for tcp, request for udp]
    #[arg(long, value_enum)]
    pub pattern: Option<Pattern>,
    /// Connections (udp: flows) to open in all
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub connections: Option<u64>,
    /// Connections open at once [default: 64; for request and stream, --connections where given]
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub concurrency: Option<u64>,
    /// Exchanges to make in all, over all connections
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub requests: Option<u64>,
    /// Open loop: start so many exchanges a second, whatever the answers do
    #[arg(long, value_name = "R")]
    pub rate: Option<f64>,
    /// How the starts of an open loop are spaced
    #[arg(long, value_enum, default_value = "poisson")]
    pub arrivals: Spacing,
    /// How long to go on [default: 10s, if neither --connections nor --requests ends the run]
    #[arg(long, value_name = "D", value_parser = values::duration_or_seconds)]
    pub duration: Option<Duration>,
    /// Leave the first part of the run out of latencies and rates
    #[arg(long, value_name = "D", value_parser = values::duration_or_seconds, default_value = "0s")]
    pub warmup: Duration,
    /// How long to wait for an answer [default: 5s, udp 1s]
    #[arg(long, value_name = "D", value_parser = values::duration_or_seconds)]
    pub timeout: Option<Duration>,
    /// Payload of one exchange [default: 64, for stream 16KiB, udp stream 1200]
    #[arg(long, value_name = "BYTES", value_parser = values::size)]
    pub size: Option<usize>,
    /// Which way a stream flows
    #[arg(long, value_enum, default_value = "both")]
    pub direction: Direction,
    /// What is sent, and what is an answer
    #[arg(long, value_enum, default_value = "pattern")]
    pub payload: Payload,
    /// Path that --payload http asks for
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub path: String,
    /// Name that --payload dns asks for
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    pub query: String,
    /// Send this instead of a payload (escapes: \n \r \xNN)
    #[arg(long, value_name = "TEXT")]
    pub send: Option<String>,
    /// An answer has these bytes in it, or `any` for whatever comes
    #[arg(long, value_name = "TEXT|any")]
    pub expect: Option<String>,
    /// Threads that make the load [default: half of the CPUs]
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub threads: Option<u64>,
    /// Connect from these addresses, in turn
    #[arg(long, value_name = "ADDR", num_args = 1.., value_delimiter = ',')]
    pub source: Vec<IpAddr>,
    /// The daemon's control socket, for the spread
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Slots of the target, where only identify lines tell (a slot without a connection tells nothing)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=64))]
    pub slots: Option<u64>,
    /// Write the result as JSON, and nothing else, to standard output
    #[arg(long)]
    pub json: bool,
    /// Write a page with plots
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    /// Fail if a slot gets more than RATIO times its share
    #[arg(long, value_name = "RATIO")]
    pub max_spread: Option<f64>,
    /// Fail on more errors than this
    #[arg(long, value_name = "N")]
    pub max_errors: Option<u64>,
    /// Fail if one answer in a hundred takes longer
    #[arg(long, value_name = "D", value_parser = values::duration)]
    pub max_p99: Option<Duration>,
    /// Seed of payloads and arrivals
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// What the target speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Transport {
    Tcp,
    Udp,
}

/// What one client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// Connect, one exchange, close
    Connect,
    /// Exchanges on connections kept open
    Request,
    /// Bulk
    Stream,
}

/// Which way a stream flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Direction {
    /// Sent, and expected back
    Both,
    /// Sent only
    Up,
    /// Received only
    Down,
}

/// How the starts of an open loop are spaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Spacing {
    /// As independent clients come
    Poisson,
    /// All at the same distance
    Fixed,
}

/// What is sent, and what is an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Payload {
    /// Numbered bytes that must come back unchanged
    Pattern,
    /// GET; a complete answer with a status below 400
    Http,
    /// A query for an A record; NOERROR or NXDOMAIN
    Dns,
}

impl Transport {
    /// As typed and printed.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        }
    }
}

impl Pattern {
    /// As typed and printed.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Connect => "connect",
            Pattern::Request => "request",
            Pattern::Stream => "stream",
        }
    }
}
