//! The bundle in which live flows travel from process to process.
//!
//! ```text
//!   memfd:  [JSON of Bundle]
//!   message's descriptors: the memfd, then the socket of each record that has one
//! ```
//!
//! The same rules as for sessions: versioned, hostile until checked, bounded by
//! the descriptors of a message. No datagram travels: a worker keeps none
//! between two turns, and what waits in a socket stays there.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::BundleError;
use crate::flow::{Snapshot, Story};

/// The version of this format; another one is refused, and the sender keeps
/// its flows until they are idle.
pub const VERSION: u32 = 1;
/// Records of one bundle: a descriptor each, and the bundle's own.
pub const MAX_RECORDS: usize = 250;
/// The largest bundle, names of listeners and servers included.
pub const MAX_BYTES: usize = MAX_RECORDS * 2048;

#[derive(Serialize, Deserialize)]
struct Bundle {
    version: u32,
    records: Vec<Record>,
}

/// What one record is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// A flow that lives.
    Flow(Flow),
    /// The port of one that has ended, which nobody may use yet.
    #[allow(missing_docs)]
    Resting { listener: String, since: u64 },
}

/// One flow without its socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// The listener's name: numbers may differ between configurations.
    pub listener: String,
    /// The address that the listener is bound to.
    pub bind: SocketAddr,
    /// Where the client sends from.
    pub client: SocketAddr,
    /// The address of ours that it asked.
    pub local: IpAddr,
    /// The server's address, empty where no configuration has it any more;
    /// `None` where the worker answers by itself, and there is no socket.
    pub server: Option<String>,
    /// The kernel cuts joined datagrams on its socket (UDP_SEGMENT).
    pub can_cut: bool,
    /// How far it is.
    pub state: Snapshot,
    /// What its line of the access log will say.
    #[serde(default)]
    pub story: Option<Story>,
}

impl Record {
    /// How many sockets belong to it.
    pub fn socket_count(&self) -> usize {
        match self {
            Record::Flow(flow) => usize::from(flow.server.is_some()),
            Record::Resting { .. } => 1,
        }
    }

    fn is_possible(&self) -> bool {
        match self {
            Record::Flow(flow) => {
                let one_family = [flow.bind.is_ipv4(), flow.local.is_ipv4()] == [flow.client.is_ipv4(); 2];
                one_family && flow.client.port() != 0 && flow.state.is_possible()
            }
            Record::Resting { .. } => true,
        }
    }
}

/// Writes a bundle.
pub fn encode(records: &[Record]) -> Vec<u8> {
    let bundle = Bundle { version: VERSION, records: records.to_vec() };
    serde_json::to_vec(&bundle).expect("records are plain data")
}

/// Reads a bundle that came with so many sockets.
pub fn decode(bytes: &[u8], socket_count: usize) -> Result<Vec<Record>, BundleError> {
    let bundle: Bundle = super::read_json(bytes, VERSION)?;
    let needed: usize = bundle.records.iter().map(Record::socket_count).sum();
    if needed != socket_count || bundle.records.len() > MAX_RECORDS {
        return Err(BundleError::Sockets(socket_count, needed));
    }
    match bundle.records.iter().position(|record| !record.is_possible()) {
        Some(index) => Err(BundleError::State(index)),
        None => Ok(bundle.records),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::tests::refuses_what_is_spoilt;

    fn flow(server: Option<&str>) -> Record {
        let state = Snapshot { requests: 3, replies: 2, answered: true, last: 77, ..Snapshot::default() };
        Record::Flow(Flow {
            listener: "dns".into(),
            bind: "0.0.0.0:53".parse().unwrap(),
            client: "10.0.0.1:4000".parse().unwrap(),
            local: "192.0.2.1".parse().unwrap(),
            server: server.map(str::to_string),
            can_cut: true,
            state,
            story: None,
        })
    }

    fn records() -> Vec<Record> {
        vec![flow(Some("10.0.0.2:53")), flow(None), Record::Resting { listener: "dns".into(), since: 5 }]
    }

    #[test]
    fn what_is_written_is_read_again() {
        assert_eq!(decode(&encode(&records()), 2).unwrap(), records());
        assert!(encode(&vec![flow(Some("10.0.0.2:53")); MAX_RECORDS]).len() < MAX_BYTES / 2);
    }

    #[test]
    fn another_version_missing_sockets_and_impossible_states_are_named() {
        let bytes = encode(&records());
        assert_eq!(decode(&bytes, 3).unwrap_err(), BundleError::Sockets(3, 2));
        let newer = br#"{"version":9,"records":[{"new":"shape"}]}"#;
        assert_eq!(decode(newer, 0).unwrap_err(), BundleError::Version { version: 9, expected: VERSION });
        let change = |f: &dyn Fn(&mut Flow)| {
            let Record::Flow(mut flow) = flow(Some("a")) else { unreachable!() };
            f(&mut flow);
            decode(&encode(&[Record::Flow(flow)]), 1)
        };
        assert!(change(&|_| {}).is_ok());
        for wrong in [
            change(&|flow| flow.client.set_port(0)),
            change(&|flow| flow.local = "::1".parse().unwrap()),
            change(&|flow| flow.bind = "[::]:53".parse().unwrap()),
            change(&|flow| flow.state.requests = 0),
            change(&|flow| flow.state.answered = false),
        ] {
            assert_eq!(wrong.unwrap_err(), BundleError::State(0));
        }
    }

    #[test]
    fn a_cut_or_changed_bundle_is_an_error_and_never_a_panic() {
        refuses_what_is_spoilt(&encode(&records()), 2, |bytes, count| decode(bytes, count).is_ok());
    }
}
