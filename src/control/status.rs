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
    /// Milliseconds since then, by a clock that is never set: what rates are
    /// computed with.
    #[serde(default)]
    pub uptime_ms: u64,
    pub config_path: String,
    /// Whether every worker serves and the daemon is not leaving.
    #[serde(default)]
    pub healthy: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unhealthy: Option<String>,
    /// The last change of the configuration that was tried, if one was.
    #[serde(default)]
    pub reload: Option<Reload>,
    /// Lines of the access log that could not be written since this steward
    /// began.
    #[serde(default)]
    pub access_log_lost: u64,
    pub workers: Vec<Worker>,
    pub listeners: Vec<Listener>,
    pub upstreams: Vec<Upstream>,
}

/// How the last reload, or change of the number of workers, went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Reload {
    pub success: bool,
    /// Seconds since 1970.
    pub at: u64,
    /// What the operator was told.
    pub text: String,
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
    /// Why it was replaced, with how often: crash, hang, killed, exit or other.
    #[serde(default)]
    pub restart_reasons: BTreeMap<String, u64>,
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
    /// Who keeps its sessions; missing with `crash_proof = false`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub keeper: Option<Keeper>,
    /// The slot that accepts for it while it is empty.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub helped_by: Option<usize>,
}

/// A slot's keeper: with what is here the sessions of a worker that died went
/// on. All but `pid` are sums since the supervisor began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Keeper {
    /// 0 where there is none at present.
    pub pid: u32,
    /// Deaths of a worker at which there was one.
    pub takeovers: u64,
    pub sessions: u64,
    pub flows: u64,
    /// What was received and not yet sent.
    pub bytes: u64,
    /// Sessions whose numbers did not agree.
    pub self_check_resets: u64,
    /// Other sessions that could not go on.
    pub lost: u64,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unavailable: Option<String>,
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
    /// Sockets of other programs that take a part of its clients.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub strangers: Vec<String>,
    pub connections: u64,
    pub active: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// TCP: connections that wait to be accepted. UDP: bytes that wait to be
    /// read.
    #[serde(default)]
    pub accept_queue: u64,
    /// TCP: handshakes that the kernel dropped, mostly because the accept queue
    /// was full. UDP: 0, see `dropped`.
    #[serde(default)]
    pub accept_overflows: u64,
    /// The queue of each slot.
    #[serde(default)]
    pub queues: Vec<Queue>,
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
    /// The spread in a sentence.
    #[serde(default)]
    pub verdict: String,
    /// Whether it is more uneven than chance would have it.
    #[serde(default)]
    pub uneven: bool,
}

/// A listener's queue in one slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// Connections that wait, or bytes of datagrams.
    pub waiting: u64,
    /// How much may wait.
    pub limit: u64,
    /// What the kernel dropped.
    pub dropped: u64,
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
    /// How long connecting took.
    #[serde(default)]
    pub connect: Connect,
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

/// How long connects took that succeeded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// How many.
    pub count: u64,
    /// Microseconds together.
    pub sum_us: u64,
    /// The upper end of the bucket in which the median lies; 0 without a
    /// connect, and the last bound where it is above all.
    pub p50_us: u64,
    /// The same of the slowest hundredth.
    pub p99_us: u64,
    /// How many took up to 100, 250, 500, 1,000, ... 5,000,000 microseconds
    /// and longer than the one before (`counters::CONNECT_BOUNDS`); the last,
    /// how many took longer than all.
    pub buckets: Vec<u64>,
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

/// How a place is checked, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Check {
    /// none, connect, http, exchange or command.
    pub kind: String,
    /// What spoke last: none (nothing yet), good, bad, unknown (this host could
    /// not ask) or traffic (failures of real traffic).
    pub last: String,
    /// Why, where it was not good.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// How long the last good check took.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub latency_us: Option<u64>,
    /// When the place last went up or down, seconds since 1970.
    pub since: u64,
    /// Checks that were good, and that were not, since this steward started.
    pub good: u64,
    pub bad: u64,
    /// Good checks in a row, and how many bring it up now.
    pub rise: u32,
    pub rise_needed: u32,
    /// Failures in a row, and how many take it down.
    pub fall: u32,
    pub fall_needed: u32,
    /// It goes up and down so often that it is not told.
    pub flapping: bool,
    /// It is used to find out whether it is up: nothing checks it.
    pub on_trial: bool,
}
