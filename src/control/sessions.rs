//! The list that `evenkeel sessions` prints, and what is asked for it.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::{Config, Mode, no_such};

/// The longest list that one process writes, and that an answer has: some
/// 25 MB of JSON.
pub const MOST_SESSIONS: usize = 100_000;

/// What is asked of every worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Query {
    /// Which sessions.
    #[serde(default)]
    pub filter: Filter,
    /// End them, by a reset of both sides.
    #[serde(default)]
    pub kill: bool,
    /// So many lines at most; all are counted.
    #[serde(default = "default_limit")]
    pub limit: usize,
}

fn default_limit() -> usize {
    1_000
}

/// Which sessions; an empty one is all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// The listener's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<String>,
    /// The client is in this network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<IpNet>,
    /// And comes from this port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_port: Option<u16>,
    /// The server's address as the file writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The upstream's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
}

/// What one process found. A sealed JSON text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Every session that the filter takes, listed or not.
    pub matched: u64,
    /// Those that were ended.
    pub ended: u64,
    /// The oldest first, up to the limit.
    pub sessions: Vec<Line>,
}

/// One session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Line {
    pub slot: usize,
    pub pid: u32,
    pub listener: String,
    /// `None` where the connection has no address any more.
    pub client: Option<SocketAddr>,
    pub upstream: Option<String>,
    pub server: Option<String>,
    /// connecting, waiting, open or resetting.
    pub state: String,
    /// Since it was accepted.
    pub age_ms: u64,
    /// Since the last byte either way.
    pub idle_ms: u64,
    /// From the client.
    pub bytes_in: u64,
    /// To the client.
    pub bytes_out: u64,
}

impl Filter {
    /// What is wrong with a filter that took nothing: a name that this
    /// configuration does not have. Sessions of names that are gone are taken.
    pub fn mistake(&self, config: &Config) -> Option<String> {
        if let Some(name) = &self.listener {
            match config.listeners.iter().find(|listener| listener.name == *name) {
                None => {
                    let names: Vec<&str> = config.listeners.iter().map(|one| one.name.as_str()).collect();
                    return Some(no_such("listener", name, &names));
                }
                Some(listener) if listener.mode == Mode::Udp => {
                    let way_out = "evenkeel status counts its flows";
                    return Some(format!(
                        "listener \"{name}\" is udp: it has flows and no sessions\n  {way_out}"
                    ));
                }
                Some(_) => {}
            }
        }
        let upstreams = || config.upstreams.iter();
        if let Some(name) = self.upstream.as_ref().filter(|name| upstreams().all(|one| one.name != **name)) {
            let names: Vec<&str> = upstreams().map(|one| one.name.as_str()).collect();
            return Some(no_such("upstream", name, &names));
        }
        let wanted = self.server.as_ref()?;
        let here = upstreams().filter(|one| self.upstream.as_ref().is_none_or(|name| one.name == *name));
        let servers: Vec<String> =
            here.flat_map(|one| &one.servers).map(|server| server.address.to_string()).collect();
        let known: Vec<&str> = servers.iter().map(String::as_str).collect();
        (!known.contains(&wanted.as_str())).then(|| no_such("server", wanted, &known))
    }

    /// Whether it takes a session with this client.
    pub fn takes_client(&self, client: Option<SocketAddr>) -> bool {
        let address: Option<IpAddr> = client.map(|client| client.ip().to_canonical());
        let network = self.client.is_none_or(|network| address.is_some_and(|ip| network.contains(&ip)));
        network && self.client_port.is_none_or(|port| client.is_some_and(|client| client.port() == port))
    }
}

impl Found {
    /// Adds what another process found.
    pub fn add(&mut self, other: Found, limit: usize) {
        self.matched += other.matched;
        self.ended += other.ended;
        self.sessions.extend(other.sessions);
        self.sessions.sort_by_key(|line| std::cmp::Reverse(line.age_ms));
        self.sessions.truncate(limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_taken_by_network_and_port() {
        let filter = |client: &str, client_port| Filter {
            client: Some(client.parse().unwrap()),
            client_port,
            ..Filter::default()
        };
        let client = |text: &str| Some(text.parse().unwrap());
        assert!(filter("10.0.0.0/8", None).takes_client(client("10.1.2.3:4")));
        assert!(!filter("10.0.0.0/8", None).takes_client(client("11.1.2.3:4")));
        assert!(!filter("10.0.0.0/8", Some(5)).takes_client(client("10.1.2.3:4")));
        assert!(filter("10.1.2.3/32", Some(4)).takes_client(client("[::ffff:10.1.2.3]:4")));
        assert!(!filter("10.0.0.0/8", None).takes_client(None));
        assert!(Filter::default().takes_client(None));
    }

    #[test]
    fn the_oldest_of_all_are_listed() {
        let line = |age_ms| Line {
            slot: 0,
            pid: 1,
            listener: "l".into(),
            client: None,
            upstream: None,
            server: None,
            state: "open".into(),
            age_ms,
            idle_ms: 0,
            bytes_in: 0,
            bytes_out: 0,
        };
        let found = |ages: &[u64]| Found {
            matched: ages.len() as u64,
            ended: 0,
            sessions: ages.iter().map(|age| line(*age)).collect(),
        };
        let mut all = Found::default();
        all.add(found(&[9, 3]), 3);
        all.add(found(&[5, 4]), 3);
        assert_eq!(all.sessions.iter().map(|line| line.age_ms).collect::<Vec<_>>(), [9, 5, 4]);
        assert_eq!(all.matched, 4);
    }
}
