//! The daemon behind the target: what its status says of the listener there.
//!
//! Nothing else in the load generator knows the status document. It is read as
//! loose JSON, so that a bench understands the daemons of other versions too.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::control::client;
use crate::control::status::steering_in_force;
use crate::sys::accounts;

/// How long the daemon may take to answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// What one look at the daemon showed of the target's listener.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The listener's name.
    pub listener: String,
    /// The steering in force.
    pub steering: Option<String>,
    /// Connections accepted, or flows opened, of each slot since the start.
    pub per_slot: Vec<u64>,
    /// How many each slot should have had by now, where the daemon says so.
    pub expected: Option<Vec<f64>>,
    /// Open sessions by slot: of the listener, or where the daemon does not
    /// tell that, of all listeners.
    pub active: Vec<u64>,
}

/// Where the control socket is, unless it was typed.
pub fn default_socket() -> PathBuf {
    let usual =
        || client::default_socket(accounts::current_uid(), std::env::var("XDG_RUNTIME_DIR").ok().as_deref());
    std::env::var_os("EVENKEEL_SOCKET").map_or_else(usual, PathBuf::from)
}

/// Asks for the status and finds the target's listener in it; else a text for
/// the operator.
pub fn look(socket: &Path, mode: &str, target: SocketAddr) -> Result<Snapshot, String> {
    let answer = client::ask(socket, &json!({ "command": "status" }), TIMEOUT)?;
    let status =
        answer.get("status").ok_or_else(|| format!("{}: the answer has no \"status\"", socket.display()))?;
    snapshot(status, mode, target)
}

/// Takes out of a status document what concerns the target.
fn snapshot(status: &Value, mode: &str, target: SocketAddr) -> Result<Snapshot, String> {
    let listeners = status["listeners"].as_array().map_or(&[][..], Vec::as_slice);
    let listener = find_listener(listeners, mode, target).ok_or_else(|| {
        let known: Vec<String> = listeners.iter().flat_map(binds).map(|bind| bind.to_string()).collect();
        format!(
            "the daemon has no {mode} listener on {target}; it listens on {}",
            if known.is_empty() { "nothing".to_string() } else { known.join(", ") }
        )
    })?;
    let spread = &listener["spread"];
    let per_slot =
        numbers(&spread["per_slot"]).ok_or("the daemon's status has no spread.per_slot for this listener")?;
    let expected = listener.get("expected_per_slot").and_then(Value::as_array);
    let asked = listener["steering"].as_str();
    let in_force = |active| steering_in_force(asked.unwrap_or(active), active).to_string();
    Ok(Snapshot {
        listener: listener["name"].as_str().unwrap_or("?").to_string(),
        steering: listener["steering_active"].as_str().map(in_force),
        per_slot,
        expected: expected.map(|expected| expected.iter().filter_map(Value::as_f64).collect()),
        active: numbers(&listener["active_per_slot"]).unwrap_or_else(|| active_by_slot(&status["workers"])),
    })
}

/// The listener bound to the target itself, else to the wildcard of its family.
fn find_listener<'a>(listeners: &'a [Value], mode: &str, target: SocketAddr) -> Option<&'a Value> {
    let of_mode = || listeners.iter().filter(|listener| listener["mode"] == mode);
    let bound_to = |wanted: SocketAddr| {
        of_mode().find(|listener| binds(listener).iter().any(|bind| same_place(*bind, wanted)))
    };
    let wildcard = match target {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    bound_to(target).or_else(|| bound_to(SocketAddr::new(wildcard, target.port())))
}

/// Scope and flow label of an IPv6 address do not matter here.
fn same_place(a: SocketAddr, b: SocketAddr) -> bool {
    a.ip() == b.ip() && a.port() == b.port()
}

fn binds(listener: &Value) -> Vec<SocketAddr> {
    let texts = listener["bind"].as_array().map_or(&[][..], Vec::as_slice);
    texts.iter().filter_map(|text| text.as_str()?.parse().ok()).collect()
}

fn numbers(value: &Value) -> Option<Vec<u64>> {
    value.as_array()?.iter().map(Value::as_u64).collect()
}

/// A slot whose worker is being replaced may be listed twice: both count.
fn active_by_slot(workers: &Value) -> Vec<u64> {
    let mut active = Vec::new();
    for worker in workers.as_array().map_or(&[][..], Vec::as_slice) {
        let (Some(slot), Some(count)) = (worker["slot"].as_u64(), worker["active"].as_u64()) else {
            continue;
        };
        let slot = slot.min(4095) as usize;
        if active.len() <= slot {
            active.resize(slot + 1, 0);
        }
        active[slot] += count;
    }
    active
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn document() -> Value {
        let spread = |per_slot: &[u64]| json!({ "per_slot": per_slot });
        json!({
            "workers": [ { "slot": 0, "active": 5 }, { "slot": 1, "active": 7 }, { "slot": 1, "active": 1 } ],
            "listeners": [
                { "name": "all", "mode": "tcp", "bind": ["0.0.0.0:80"], "steering_active": "hash", "spread": spread(&[1, 2]) },
                { "name": "one", "mode": "tcp", "bind": ["10.0.0.1:81", "127.0.0.1:80"], "spread": spread(&[3, 4]) },
                { "name": "six", "mode": "tcp", "bind": ["[::]:80"], "spread": spread(&[5, 6]) },
                { "name": "dns", "mode": "udp", "bind": ["0.0.0.0:80"], "spread": spread(&[7, 8]) },
            ],
        })
    }

    #[test]
    fn the_listener_is_found_by_address_then_by_wildcard_of_the_family() {
        let name = |mode: &str, target: &str| {
            snapshot(&document(), mode, target.parse().expect("an address")).map(|found| found.listener)
        };
        assert_eq!(name("tcp", "127.0.0.1:80").expect("exact"), "one");
        assert_eq!(name("tcp", "127.0.0.2:80").expect("wildcard"), "all");
        assert_eq!(name("tcp", "[::1]:80").expect("wildcard of IPv6"), "six");
        assert_eq!(name("udp", "127.0.0.1:80").expect("of the mode"), "dns");
        let error = name("udp", "127.0.0.1:81").expect_err("nobody is there");
        assert!(
            error.contains("no udp listener on 127.0.0.1:81; it listens on 0.0.0.0:80, 10.0.0.1:81"),
            "{error}"
        );
    }

    #[test]
    fn counts_and_active_sessions_come_by_slot() {
        let found = snapshot(&document(), "tcp", "127.0.0.9:80".parse().expect("an address")).expect("found");
        assert_eq!((found.per_slot, found.active), (vec![1, 2], vec![5, 8]));
        assert_eq!(found.steering.as_deref(), Some("hash"));
    }

    #[test]
    fn the_steering_is_the_one_in_force_and_what_slots_should_have_is_taken_over() {
        let mut document = document();
        document["listeners"][0]["steering"] = json!("source");
        document["listeners"][0]["steering_active"] = json!("ebpf-table");
        document["listeners"][0]["expected_per_slot"] = json!([1.5, 1.5]);
        let found = snapshot(&document, "tcp", "127.0.0.9:80".parse().expect("an address")).expect("found");
        assert_eq!((found.steering.as_deref(), found.expected), (Some("source"), Some(vec![1.5, 1.5])));
    }

    #[test]
    fn a_document_without_the_promised_fields_is_an_error_not_a_panic() {
        let target = "127.0.0.1:80".parse().expect("an address");
        for document in
            [json!(null), json!({}), json!({ "listeners": [{ "mode": "tcp", "bind": ["0.0.0.0:80"] }] })]
        {
            assert!(snapshot(&document, "tcp", target).is_err(), "{document}");
        }
    }
}
