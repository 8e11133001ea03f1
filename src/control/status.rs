//! The document that `evenkeel status --json` prints: its field names are
//! promises to the tools that read it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::spread::Spread;

/// The whole daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Status {
    pub version: String,
    /// The supervisor's process.
    pub pid: u32,
    pub generation: u64,
    /// Seconds since 1970.
    pub started_at: u64,
    pub config_path: String,
    /// Lines of the access log that could not be written since this steward
    /// began.
    #[serde(default)]
    pub access_log_lost: u64,
    pub workers: Vec<Worker>,
    pub listeners: Vec<Listener>,
    pub upstreams: Vec<Upstream>,
}

/// One slot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Worker {
    pub slot: usize,
    /// 0 where the slot is empty.
    pub pid: u32,
    pub generation: u64,
    /// starting, ready, draining, hung or backoff.
    pub state: String,
    pub restarts: u64,
    pub accepted: u64,
    pub active: u64,
    /// The longest turn of its event loop lately.
    pub loop_lag_us: u64,
    /// How often it paused accepting for want of descriptors or memory.
    pub accept_pauses: u64,
    /// How often an address to connect to servers from had no port left.
    #[serde(default)]
    pub port_shortages: u64,
    /// Lines of the access log that were dropped because nobody took them.
    #[serde(default)]
    pub access_log_dropped: u64,
    /// The slot that accepts for it while it is empty.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub helped_by: Option<usize>,
}

/// One listener, over all slots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Listener {
    pub name: String,
    pub mode: String,
    pub bind: Vec<String>,
    pub steering: String,
    /// The mechanism in force.
    pub steering_active: String,
    pub connections: u64,
    pub active: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Flows, where the mode is udp.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub flows: Option<Flows>,
    /// Datagrams that were dropped, by reason.
    #[serde(default)]
    pub dropped: BTreeMap<String, u64>,
    /// The same for each slot, where the mode is udp.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub flows_per_slot: Vec<SlotFlows>,
    /// How sessions or flows ended; connections = active + the sum of these.
    pub ended: BTreeMap<String, u64>,
    pub active_per_slot: Vec<u64>,
    /// The part of new connections that each slot is due now.
    pub shares: Vec<f64>,
    /// How many connections each slot should have by now: what the spread is
    /// judged against.
    pub expected_per_slot: Vec<f64>,
    pub spread: Spread,
}

/// The flows of a UDP listener in one slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SlotFlows {
    pub bytes_in: u64,
    pub bytes_out: u64,
    #[serde(flatten)]
    pub flows: Flows,
    pub dropped: BTreeMap<String, u64>,
}

/// The flows of a UDP listener, over all slots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Flows {
    pub active: u64,
    pub opened: u64,
    /// Ended by `idle_timeout`.
    pub expired: u64,
    /// Ended by `replies`.
    pub finished: u64,
    /// Ended while unanswered, to make room for new ones.
    pub evicted: u64,
    /// Datagrams of flows that were not opened for want of room.
    pub shed: u64,
    /// Went to another server because theirs had failed.
    pub moved: u64,
    /// Upstream ports in quarantine now.
    pub quarantined: u64,
    /// Ports used again before their quarantine was over.
    pub quarantine_cut: u64,
    /// From clients; dropped ones included.
    pub datagrams_in: u64,
    /// To clients.
    pub datagrams_out: u64,
    /// Sockets at which UDP_SEGMENT failed and was given up, each time.
    pub offload_failures: u64,
    /// Handed over from one worker to another, whole.
    #[serde(default)]
    pub handed_over: u64,
    /// Lived while the number of workers changed, where nobody can say which
    /// worker their datagrams come to from then on: some begin anew.
    #[serde(default)]
    pub unsteered: u64,
    /// Datagrams that came to the wrong worker in the moment of a change, and
    /// were passed on to the right one.
    #[serde(default)]
    pub passed_on: u64,
}

impl Listener {
    /// How the kernel really steers: what was asked, or `hash` where the
    /// mechanism in force cannot do it.
    pub fn steering_in_force(&self) -> &str {
        steering_in_force(&self.steering, &self.steering_active)
    }
}

/// What is in force of the steering that was asked, with this mechanism.
pub fn steering_in_force<'a>(asked: &'a str, active: &str) -> &'a str {
    match (asked, active) {
        (_, "hash") | ("load-aware", "cbpf") => "hash",
        _ => asked,
    }
}

/// One upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Upstream {
    pub name: String,
    pub balance: String,
    /// Sessions that wait for a place.
    #[serde(default)]
    pub waiting: u64,
    pub servers: Vec<Server>,
}

/// One server, over all slots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Server {
    pub address: String,
    /// up, down, draining, disabled, or unresolved: a name without an address.
    pub state: String,
    pub weight: u32,
    pub backup: bool,
    /// Sessions at once; 0 = any number.
    #[serde(default)]
    pub max_connections: u64,
    pub active: u64,
    pub connections: u64,
    pub failures: u64,
    /// What its checks say.
    #[serde(skip_serializing_if = "Value::is_null", default)]
    pub check: Value,
    /// How the operator has changed it at run time; absent where it is as the
    /// file has it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub differs_from_file: Option<Difference>,
    /// Why its name has no fresh answer.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub resolve_error: Option<String>,
    /// The addresses that its name has.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub places: Vec<Place>,
}

/// What was changed about a server at run time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Difference {
    /// draining or disabled, where it is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub state: Option<String>,
    /// What the file says, where the weight is another.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub file_weight: Option<u32>,
}

/// One address of a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Place {
    pub address: String,
    pub state: String,
    pub weight: u32,
    /// Lower ones are used first.
    pub priority: u16,
    pub active: u64,
    #[serde(skip_serializing_if = "Value::is_null", default)]
    pub check: Value,
}
