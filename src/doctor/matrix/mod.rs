//! The rules of SO_REUSEADDR and SO_REUSEPORT as this kernel applies them.
//!
//! Nothing here is looked up: for each cell two sockets are made and the
//! kernel answers (`tries`). `rules` only adds the reason, and says so where
//! the answer is not the one that it knows a reason for. The tries run in a
//! child process in a network of its own, where that is allowed, else on free
//! ports of the loopback. Bounded: some 1,900 cells, and a deadline.

mod rules;
mod table;
mod tries;

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::sys::isolated::{self, Network};

pub use rules::{Rule, Verdict};

/// The whole takes a second or two; a kernel that hangs is not waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// What the first socket is when the second one tries to bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TCP listener.
    TcpListening,
    /// A TCP socket that is bound and does not listen.
    TcpBound,
    /// A TCP connection that a listener accepted which is closed since.
    TcpConnection,
    /// The same after both ends closed, this one first.
    TcpTimeWait,
    /// A UDP socket on a unicast address or the wildcard.
    Udp,
    /// A UDP socket bound to a group's address.
    UdpMulticast,
}

impl Kind {
    /// Every kind, in the order of the table.
    pub const ALL: [Kind; 6] = [
        Kind::TcpListening,
        Kind::TcpBound,
        Kind::TcpConnection,
        Kind::TcpTimeWait,
        Kind::Udp,
        Kind::UdpMulticast,
    ];

    /// As the JSON names it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::TcpListening => "tcp-listening",
            Kind::TcpBound => "tcp-bound",
            Kind::TcpConnection => "tcp-connection",
            Kind::TcpTimeWait => "tcp-time-wait",
            Kind::Udp => "udp",
            Kind::UdpMulticast => "udp-multicast",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Kind::TcpListening => "TCP, the first socket listens",
            Kind::TcpBound => "TCP, the first socket is bound and does not listen",
            Kind::TcpConnection => "TCP, a connection is open and its listener closed",
            Kind::TcpTimeWait => "TCP, a connection is in TIME_WAIT and its listener closed",
            Kind::Udp => "UDP, unicast",
            Kind::UdpMulticast => "UDP, bound to a multicast group",
        }
    }

    fn is_udp(self) -> bool {
        matches!(self, Kind::Udp | Kind::UdpMulticast)
    }

    /// The pairs of addresses that are tried for this kind.
    pub fn pairs(self) -> &'static [Pair] {
        match self {
            Kind::UdpMulticast => &GROUP_PAIRS,
            _ => &PAIRS,
        }
    }
}

/// The reuse options of one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reuse {
    /// SO_REUSEADDR
    pub address: bool,
    /// SO_REUSEPORT
    pub port: bool,
}

impl Reuse {
    /// Neither option.
    pub const NONE: Reuse = Reuse { address: false, port: false };
    /// SO_REUSEADDR alone.
    pub const ADDRESS: Reuse = Reuse { address: true, port: false };
    /// SO_REUSEPORT alone.
    pub const PORT: Reuse = Reuse { address: false, port: true };
    /// Both options.
    pub const BOTH: Reuse = Reuse { address: true, port: true };
    /// In the order of the table.
    pub const ALL: [Reuse; 4] = [Reuse::NONE, Reuse::ADDRESS, Reuse::PORT, Reuse::BOTH];

    /// The options' names.
    pub fn names(self) -> Vec<String> {
        let named = [(self.address, "SO_REUSEADDR"), (self.port, "SO_REUSEPORT")];
        named.iter().filter(|(set, _)| *set).map(|(_, name)| (*name).into()).collect()
    }
}

/// Where a socket is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address; the port is chosen for each cell.
    pub ip: IpAddr,
    /// IPV6_V6ONLY
    pub v6_only: bool,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.ip, self.v6_only) {
            (IpAddr::V4(v4), _) => v4.fmt(f),
            (IpAddr::V6(v6), true) => write!(f, "[{v6}] v6only"),
            (IpAddr::V6(v6), false) => write!(f, "[{v6}] dual"),
        }
    }
}

/// Two places, the first socket's and the second's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Of the socket that is there.
    pub first: Place,
    /// Of the socket that comes.
    pub second: Place,
    /// Is there an address that both would take?
    pub overlap: bool,
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> Place {
    Place { ip: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), v6_only: false }
}

const ONE: Place = v4(127, 0, 0, 1);
const TWO: Place = v4(127, 0, 0, 2);
const ANY: Place = v4(0, 0, 0, 0);
const DUAL: Place = Place { ip: IpAddr::V6(Ipv6Addr::UNSPECIFIED), v6_only: false };
const ONLY: Place = Place { ip: IpAddr::V6(Ipv6Addr::UNSPECIFIED), v6_only: true };
const LOOP: Place = Place { ip: IpAddr::V6(Ipv6Addr::LOCALHOST), v6_only: true };
const GROUP: Place = v4(239, 255, 77, 1);
const GROUP_TWO: Place = v4(239, 255, 77, 2);
const GROUP_SIX: Place =
    Place { ip: IpAddr::V6(Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 0, 0x7701)), v6_only: true };

const fn meet(first: Place, second: Place) -> Pair {
    Pair { first, second, overlap: true }
}

const fn apart(first: Place, second: Place) -> Pair {
    Pair { first, second, overlap: false }
}

const PAIRS: [Pair; 13] = [
    meet(ONE, ONE),
    meet(ANY, ANY),
    meet(LOOP, LOOP),
    apart(ONE, TWO),
    meet(ONE, ANY),
    meet(ANY, ONE),
    meet(LOOP, ONLY),
    meet(ANY, DUAL),
    meet(DUAL, ANY),
    meet(ONE, DUAL),
    meet(DUAL, ONE),
    apart(ANY, ONLY),
    apart(ONLY, ANY),
];

const GROUP_PAIRS: [Pair; 7] = [
    meet(GROUP, GROUP),
    meet(GROUP_SIX, GROUP_SIX),
    apart(GROUP, GROUP_TWO),
    meet(GROUP, ANY),
    meet(ANY, GROUP),
    meet(GROUP, DUAL),
    apart(GROUP, ONLY),
];

/// One question to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// What the first socket is.
    pub kind: Kind,
    /// Where the two are bound.
    pub pair: Pair,
    /// Options of the first socket.
    pub first: Reuse,
    /// Options of the second socket.
    pub second: Reuse,
    /// Is the second socket made by the user that made the first?
    pub same_uid: bool,
}

/// The kernel's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The second socket was bound (and, for TCP, listens).
    Bound,
    /// bind(2) or listen(2) answered with this error.
    Refused {
        /// Its name: `EADDRINUSE`.
        errno: String,
        /// The call: `bind` or `listen`.
        call: String,
    },
    /// It could not be asked, for this reason.
    NotTried(String),
}

impl Outcome {
    /// `ok`, the error's name, or `not tried`.
    pub fn word(&self) -> &str {
        match self {
            Outcome::Bound => "ok",
            Outcome::Refused { errno, .. } => errno,
            Outcome::NotTried(_) => "not tried",
        }
    }

    fn in_use(&self) -> bool {
        self.word() == "EADDRINUSE"
    }
}

/// What was asked besides the cells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extras {
    /// 127.0.0.2 beside 127.0.0.1 from another process: TCP, then UDP.
    pub two_processes: [Outcome; 2],
    /// Who gets the datagrams after another user joined by SO_REUSEADDR:
    /// (first socket, thief), or why that was not tried.
    pub theft: Result<(usize, usize), String>,
    /// The same try against SO_REUSEPORT alone.
    pub theft_refused: Outcome,
}

/// What the child brings home.
#[derive(Debug, Serialize, Deserialize)]
struct Harvest {
    network: Network,
    outcomes: Vec<Outcome>,
    extras: Extras,
}

/// All answers of this kernel.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Its release.
    pub kernel: String,
    /// Where it was asked.
    pub network: Network,
    /// Each question with its answer.
    pub trials: Vec<(Trial, Outcome)>,
    /// The further questions.
    pub extras: Extras,
}

/// One cell as the JSON has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// What the first socket is.
    pub kind: &'static str,
    /// Its options.
    pub first: Vec<String>,
    /// Those of the second socket.
    pub second: Vec<String>,
    /// Where the two are bound.
    pub addresses: [String; 2],
    /// Are they made by one user?
    pub same_uid: bool,
    /// The answer.
    pub bind: String,
    /// One sentence of reason.
    pub why: String,
}

impl Matrix {
    /// Asks this kernel.
    pub fn measure() -> io::Result<Matrix> {
        let bytes = isolated::in_child(LIMIT, || {
            let harvest = isolated::leave_network().map(tries::harvest);
            serde_json::to_vec(&harvest.map_err(|e| e.to_string())).unwrap_or_default()
        })?;
        let harvest: Result<Harvest, String> = serde_json::from_slice(&bytes)?;
        let Harvest { network, outcomes, extras } = harvest.map_err(io::Error::other)?;
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease");
        Ok(Matrix {
            kernel: kernel.map_or("unknown".into(), |text| text.trim().to_string()),
            network,
            trials: trials().into_iter().zip(outcomes).collect(),
            extras,
        })
    }

    /// The cells with their reasons.
    pub fn cells(&self) -> Vec<Cell> {
        self.trials.iter().map(|(trial, outcome)| cell(trial, outcome)).collect()
    }

    /// The sentences of the classic description, each held against the
    /// answers.
    pub fn rules(&self) -> Vec<Rule> {
        rules::rules(self)
    }

    /// The answer to one question; `None` = it is not among those asked.
    pub fn outcome(&self, trial: Trial) -> Option<&Outcome> {
        self.trials.iter().find(|(asked, _)| *asked == trial).map(|(_, outcome)| outcome)
    }

    /// As a table.
    pub fn text(&self) -> String {
        table::text(self)
    }

    /// As JSON.
    pub fn json(&self) -> String {
        let value = serde_json::json!({
            "kernel": self.kernel,
            "network": network_name(self.network),
            "cells": self.cells(),
            "rules": self.rules(),
        });
        value.to_string()
    }
}

fn network_name(network: Network) -> &'static str {
    match network {
        Network::Own => "own namespace",
        Network::OwnOneUser => "own namespace, one user",
        Network::Shared => "loopback of this host",
    }
}

/// Every question, in the order of the table.
pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in Kind::ALL {
        for pair in kind.pairs() {
            for same_uid in [true, false] {
                for first in Reuse::ALL {
                    let ask = |second| Trial { kind, pair: *pair, first, second, same_uid };
                    trials.extend(Reuse::ALL.map(ask));
                }
            }
        }
    }
    trials
}

fn cell(trial: &Trial, outcome: &Outcome) -> Cell {
    Cell {
        kind: trial.kind.name(),
        first: trial.first.names(),
        second: trial.second.names(),
        addresses: [trial.pair.first.to_string(), trial.pair.second.to_string()],
        same_uid: trial.same_uid,
        bind: outcome.word().to_string(),
        why: rules::why(trial, outcome),
    }
}
