//! The bundle in which live sessions travel from process to process.
//!
//! ```text
//!   memfd:  [length of the JSON: u32, little-endian][JSON of Bundle][kept bytes, in order]
//!   message's descriptors: the memfd, then for each session its client's
//!   socket and, where it has one, its server's
//! ```
//!
//! Pure: bytes in, records out. Whoever receives a bundle treats it as
//! hostile: every length, name and state is checked, and what does not hold is
//! an error, never a panic. Bounded by `MAX_SESSIONS` a bundle, because a
//! message carries 253 descriptors at most.

pub mod flows;
pub mod protocol;

use std::net::SocketAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::proxy_protocol::Ends;
use crate::relay::{CloseReason, Session, Snapshot};

/// The version of this format; another one is refused, and the sender drains.
pub const VERSION: u32 = 1;
/// Sessions of one bundle: two descriptors each, and the bundle's own.
pub const MAX_SESSIONS: usize = 100;
/// With so many kept bytes a bundle has enough sessions.
pub const ENOUGH_BYTES: usize = 16 << 20;
/// The largest bundle that is read: all sessions keep a full read each way, and
/// as much again for the records and for what was in pipes.
pub const MAX_BYTES: usize = MAX_SESSIONS * 4 * crate::relay::MAX_READ;

/// What is wrong with a bundle.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// It ends early, or says more than it holds.
    #[error("the bundle's lengths do not agree")]
    Lengths,
    /// It is no JSON of this format.
    #[error("the bundle's records cannot be read")]
    Records,
    /// It is of another version.
    #[error("the bundle is of version {version}, this is {expected}")]
    #[allow(missing_docs)]
    Version { version: u32, expected: u32 },
    /// There are more or fewer descriptors than sessions need.
    #[error("{0} sockets came where {1} are needed")]
    Sockets(usize, usize),
    /// A session's state is one that no session has.
    #[error("session {0} of the bundle is in no possible state")]
    State(usize),
}

#[derive(Serialize, Deserialize)]
struct Bundle {
    version: u32,
    sessions: Vec<Record>,
}

/// One session without its sockets. Times are milliseconds of the monotonic
/// clock, which all processes of a host share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The listener's name: numbers may differ between configurations.
    pub listener: String,
    /// The server's address, once one is picked.
    pub server: Option<String>,
    /// How far it is.
    pub stage: Stage,
    /// The relay's state.
    pub relay: Snapshot,
    /// What a PROXY header said of its client.
    #[serde(default)]
    pub origin: Option<Ends>,
    /// When it was accepted.
    pub born: u64,
    /// When the last byte moved.
    pub moved: u64,
    /// What its line of the access log will say.
    #[serde(default)]
    pub story: Option<Story>,
    /// How often it was being worked on when a worker died by its own doing.
    #[serde(default)]
    pub crashes: u8,
}

/// What the access log says of a session beside its state. Times are
/// milliseconds of the monotonic clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Story {
    /// Who came.
    pub client: SocketAddr,
    /// When the last connect to a server began.
    pub connect_began: Option<u64>,
    /// When it was there.
    pub established: Option<u64>,
    /// Servers that were tried in vain.
    pub retries: u32,
}

/// How far a session is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Accepted, and nothing else: whether it may come in is still to be asked.
    Accepted {
        /// Its PROXY header was read.
        header_read: bool,
        /// It was counted as accepted.
        counted: bool,
    },
    /// Its PROXY header is awaited; what has come of it lies in the socket.
    #[allow(missing_docs)]
    Header { until: u64 },
    /// On its way to a server.
    #[allow(missing_docs)]
    Connecting {
        until: u64,
        tried: Vec<String>,
        failure: CloseReason,
        /// Since when it waits for a place at a server, if it does.
        #[serde(default)]
        waits_since: Option<u64>,
    },
    /// Bytes flow.
    Open,
}

/// A session out of a bundle, to be joined with its sockets.
#[derive(Debug)]
pub struct Arrival {
    /// What was said of it.
    pub record: Record,
    /// Its relay, without the bytes that it kept.
    pub session: Session,
    /// Those.
    pub kept: Vec<u8>,
}

/// Writes a bundle; each record comes with the bytes that its relay keeps.
pub fn encode(sessions: &[(Record, Vec<u8>)]) -> Vec<u8> {
    let bundle = Bundle { version: VERSION, sessions: sessions.iter().map(|(r, _)| r.clone()).collect() };
    let json = serde_json::to_vec(&bundle).expect("records are plain data");
    let mut bytes = (json.len() as u32).to_le_bytes().to_vec();
    bytes.extend(json);
    for (_, kept) in sessions {
        bytes.extend(kept);
    }
    bytes
}

/// Reads the JSON of a bundle of this version, of which alone the shape is known.
fn read_json<B: DeserializeOwned>(json: &[u8], expected: u32) -> Result<B, BundleError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let version = serde_json::from_slice::<Version>(json).map_err(|_| BundleError::Records)?.version;
    if version != expected {
        return Err(BundleError::Version { version, expected });
    }
    serde_json::from_slice(json).map_err(|_| BundleError::Records)
}

/// Reads a bundle that came with so many sockets.
pub fn decode(bytes: &[u8], socket_count: usize) -> Result<Vec<Arrival>, BundleError> {
    let (length, rest) = bytes.split_first_chunk::<4>().ok_or(BundleError::Lengths)?;
    let length = u32::from_le_bytes(*length) as usize;
    let (json, mut kept) = rest.split_at_checked(length).ok_or(BundleError::Lengths)?;
    let bundle: Bundle = read_json(json, VERSION)?;
    let needed: usize = bundle.sessions.iter().map(Record::socket_count).sum();
    if needed != socket_count || bundle.sessions.len() > MAX_SESSIONS {
        return Err(BundleError::Sockets(socket_count, needed));
    }
    let mut arrivals = Vec::new();
    for (index, record) in bundle.sessions.into_iter().enumerate() {
        let own = kept.split_off(..record.relay.kept()).ok_or(BundleError::Lengths)?;
        let session = Session::restore(&record.relay).ok_or(BundleError::State(index))?;
        if matches!(record.stage, Stage::Connecting { .. }) && !record.relay.is_relay() {
            return Err(BundleError::State(index));
        }
        if matches!(record.stage, Stage::Header { .. } | Stage::Accepted { .. }) && record.server.is_some() {
            return Err(BundleError::State(index));
        }
        arrivals.push(Arrival { record, session, kept: own.to_vec() });
    }
    if kept.is_empty() { Ok(arrivals) } else { Err(BundleError::Lengths) }
}

impl Record {
    /// How many sockets belong to it: a service has no server.
    pub fn socket_count(&self) -> usize {
        1 + usize::from(self.server.is_some())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::Service;
    use crate::keep::Keep;
    use crate::relay::Progress;
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    /// Holds for a bundle and whatever reads it: cut anywhere it is an error,
    /// and with any byte changed, or of any bytes, no panic.
    pub fn refuses_what_is_spoilt(whole: &[u8], sockets: usize, is_read: impl Fn(&[u8], usize) -> bool) {
        assert!(is_read(whole, sockets));
        for end in 0..whole.len() {
            assert!(!is_read(&whole[..end], sockets), "cut at {end}");
        }
        let any_bytes = (prop::collection::vec(any::<u8>(), 0..500), 0usize..10);
        let rubbish = TestRunner::default().run(&any_bytes, |(bytes, count)| {
            is_read(&bytes, count);
            Ok(())
        });
        rubbish.unwrap();
        let any_change = (any::<prop::sample::Index>(), any::<u8>());
        let changed = TestRunner::default().run(&any_change, |(at, value)| {
            let mut bytes = whole.to_vec();
            bytes[at.index(whole.len())] = value;
            is_read(&bytes, sockets);
            Ok(())
        });
        changed.unwrap();
    }

    fn record(session: &Session, server: bool) -> (Record, Vec<u8>) {
        let (relay, kept) = session.snapshot(&Keep::create(1).unwrap()).expect("unbroken");
        let server = server.then(|| "10.0.0.1:80".to_string());
        let record = Record {
            listener: "web".into(),
            server,
            stage: Stage::Open,
            relay,
            origin: None,
            born: 5,
            moved: 9,
            story: None,
            crashes: 0,
        };
        (record, kept)
    }

    fn bundle() -> Vec<(Record, Vec<u8>)> {
        let mut connecting = record(&Session::relay(), true);
        connecting.0.stage = Stage::Connecting {
            until: 77,
            tried: vec!["a".into()],
            failure: CloseReason::ConnectFailed,
            waits_since: Some(5),
        };
        connecting.0.origin = Some(Ends {
            source: "[2001:db8::1]:4711".parse().unwrap(),
            destination: "[2001:db8::2]:80".parse().unwrap(),
        });
        let mut unknown = record(&Session::relay(), false);
        unknown.0.stage = Stage::Header { until: 78 };
        let mut keeping = record(&Session::echo(), false);
        let up = Progress { received: 10, sent: 0, kept: 10, has_ended: false };
        keeping.0.relay = Snapshot::resume(Some(Service::Echo), [up, Progress::default()]);
        keeping.1 = b"kept bytes".to_vec();
        vec![record(&Session::relay(), true), keeping, connecting, unknown]
    }

    #[test]
    fn what_is_written_is_read_again() {
        let sessions = bundle();
        let arrivals = decode(&encode(&sessions), 6).expect("a sane bundle");
        for ((record, kept), arrival) in sessions.iter().zip(&arrivals) {
            assert_eq!(*record, arrival.record);
            assert_eq!(*kept, arrival.kept);
        }
        assert_eq!(arrivals.len(), 4);
    }

    #[test]
    fn another_version_and_missing_sockets_are_named() {
        let bytes = encode(&bundle());
        assert_eq!(decode(&bytes, 5).unwrap_err(), BundleError::Sockets(5, 6));
        let text = br#"{"version":9,"sessions":[{"new":"shape"}]}"#;
        let mut newer = (text.len() as u32).to_le_bytes().to_vec();
        newer.extend(text);
        assert_eq!(decode(&newer, 0).unwrap_err(), BundleError::Version { version: 9, expected: VERSION });
    }

    #[test]
    fn a_cut_or_changed_bundle_is_an_error_and_never_a_panic() {
        refuses_what_is_spoilt(&encode(&bundle()), 6, |bytes, count| decode(bytes, count).is_ok());
    }
}
