//! Why a session or a flow ended: the list that counters, logs and documents share.

use std::io;

use serde::{Deserialize, Serialize};

use super::Side;

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CloseReason {
    /// Both sides finished in an orderly way.
    Finished,
    /// The client reset the connection.
    ClientReset,
    /// The server reset the connection.
    ServerReset,
    /// The client stopped answering (keep-alive, user timeout, no route).
    ClientLost,
    /// The server stopped answering.
    ServerLost,
    /// No byte for `idle_timeout`.
    IdleTimeout,
    /// One side had finished and the other was silent for
    /// `half_close_timeout`.
    HalfCloseTimeout,
    /// Older than `max_age`.
    MaxAge,
    /// Every server that could be tried refused.
    ConnectFailed,
    /// The last server that was tried did not answer in `connect_timeout`.
    ConnectTimeout,
    /// No local port was left to connect from.
    NoPorts,
    /// No descriptor, or no memory, for the connection to the server.
    NoResources,
    /// `drain_timeout` was over.
    Drained,
    /// The worker that had it died.
    WorkerLost,
    /// A flow that waited for its first answer made room for a new one.
    Evicted,
    /// An operator ended it.
    Killed,
    /// Every server was down, draining, disabled or without an address.
    NoServer,
    /// Every server had all the sessions that it may for `queue_timeout`.
    QueueTimeout,
    /// Its server went down, and `on_down` is reset.
    ServerDown,
    /// The client is not allowed, or denied, by the listener's `access`.
    Denied,
    /// The client's address has as many as it may.
    PerSource,
    /// The client's address began as many within a second as it may.
    RatePerSource,
    /// A PROXY header is required, and who came is not trusted to send one.
    ProxyUntrusted,
    /// What came is no PROXY header, or one that is not taken.
    ProxyMalformed,
    /// The PROXY header did not come in time.
    ProxyTimeout,
}

impl CloseReason {
    /// All of them, in the order of the counters.
    pub const ALL: [CloseReason; 25] = [
        CloseReason::Finished,
        CloseReason::ClientReset,
        CloseReason::ServerReset,
        CloseReason::ClientLost,
        CloseReason::ServerLost,
        CloseReason::IdleTimeout,
        CloseReason::HalfCloseTimeout,
        CloseReason::MaxAge,
        CloseReason::ConnectFailed,
        CloseReason::ConnectTimeout,
        CloseReason::NoPorts,
        CloseReason::NoResources,
        CloseReason::Drained,
        CloseReason::WorkerLost,
        CloseReason::Evicted,
        CloseReason::Killed,
        CloseReason::NoServer,
        CloseReason::QueueTimeout,
        CloseReason::ServerDown,
        CloseReason::Denied,
        CloseReason::PerSource,
        CloseReason::RatePerSource,
        CloseReason::ProxyUntrusted,
        CloseReason::ProxyMalformed,
        CloseReason::ProxyTimeout,
    ];

    /// Its name in `status` and metrics.
    pub fn name(self) -> &'static str {
        match self {
            CloseReason::Finished => "finished",
            CloseReason::ClientReset => "client_reset",
            CloseReason::ServerReset => "server_reset",
            CloseReason::ClientLost => "client_lost",
            CloseReason::ServerLost => "server_lost",
            CloseReason::IdleTimeout => "idle_timeout",
            CloseReason::HalfCloseTimeout => "half_close_timeout",
            CloseReason::MaxAge => "max_age",
            CloseReason::ConnectFailed => "connect_failed",
            CloseReason::ConnectTimeout => "connect_timeout",
            CloseReason::NoPorts => "no_ports",
            CloseReason::NoResources => "no_resources",
            CloseReason::Drained => "drained",
            CloseReason::WorkerLost => "worker_lost",
            CloseReason::Evicted => "evicted",
            CloseReason::Killed => "killed",
            CloseReason::NoServer => "no_server",
            CloseReason::QueueTimeout => "queue_timeout",
            CloseReason::ServerDown => "server_down",
            CloseReason::Denied => "denied",
            CloseReason::PerSource => "per_source",
            CloseReason::RatePerSource => "rate_per_source",
            CloseReason::ProxyUntrusted => "proxy_untrusted",
            CloseReason::ProxyMalformed => "proxy_malformed",
            CloseReason::ProxyTimeout => "proxy_timeout",
        }
    }

    /// What an error of a side's socket means for the session.
    pub fn of_error(side: Side, error: &io::Error) -> CloseReason {
        let reset = matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted
        );
        match (side, reset) {
            (Side::Client, true) => CloseReason::ClientReset,
            (Side::Client, false) => CloseReason::ClientLost,
            (Side::Server, true) => CloseReason::ServerReset,
            (Side::Server, false) => CloseReason::ServerLost,
        }
    }

    /// Whether the client was turned away before anything was done for it.
    pub fn is_refusal(self) -> bool {
        matches!(
            self,
            CloseReason::Denied
                | CloseReason::PerSource
                | CloseReason::RatePerSource
                | CloseReason::ProxyUntrusted
                | CloseReason::ProxyMalformed
                | CloseReason::ProxyTimeout
        )
    }

    /// The side whose end caused it, where one did: that socket is dead
    /// already.
    pub fn broken_side(self) -> Option<Side> {
        match self {
            CloseReason::ClientReset | CloseReason::ClientLost => Some(Side::Client),
            CloseReason::ServerReset | CloseReason::ServerLost => Some(Side::Server),
            CloseReason::Finished
            | CloseReason::IdleTimeout
            | CloseReason::HalfCloseTimeout
            | CloseReason::MaxAge
            | CloseReason::ConnectFailed
            | CloseReason::ConnectTimeout
            | CloseReason::NoPorts
            | CloseReason::NoResources
            | CloseReason::Drained
            | CloseReason::WorkerLost
            | CloseReason::Evicted
            | CloseReason::Killed
            | CloseReason::NoServer
            | CloseReason::QueueTimeout
            | CloseReason::ServerDown
            | CloseReason::Denied
            | CloseReason::PerSource
            | CloseReason::RatePerSource
            | CloseReason::ProxyUntrusted
            | CloseReason::ProxyMalformed
            | CloseReason::ProxyTimeout => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_stands_at_its_own_place() {
        for (index, reason) in CloseReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index, "{}", reason.name());
        }
    }
}
