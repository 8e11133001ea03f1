//! What one thread has counted since it last reported.
//!
//! Plain data: filled by one thread's engine, sent to the collector, merged
//! there. Bounded by the kinds of trouble and the size of three histograms.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::identity::Identity;

/// Latencies in nanoseconds, to one part in a thousand.
pub type Nanos = Histogram<u64>;

/// What can go wrong with a connection or an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trouble {
    /// Nobody listens.
    Refused,
    /// The connection was reset.
    Reset,
    /// No route, network down.
    Unreachable,
    /// The connection was not made in time.
    ConnectTimedOut,
    /// The answer did not come in time.
    TimedOut,
    /// The connection was closed before the answer began.
    Closed,
    /// The answer ended too early.
    ShortReply,
    /// The answer is not what was expected.
    WrongReply,
    /// A complete answer that reports an error: HTTP 4xx, DNS SERVFAIL.
    ErrorReply,
    /// A datagram was not answered in time.
    LostDatagram,
    /// A datagram was answered twice.
    DuplicateDatagram,
    /// No local port was free.
    NoPort,
    /// No descriptor was free.
    NoDescriptor,
    /// Anything else; the first one's text is in the report.
    Other,
}

impl Trouble {
    /// As in the report.
    pub fn name(self) -> &'static str {
        match self {
            Trouble::Refused => "refused",
            Trouble::Reset => "reset",
            Trouble::Unreachable => "unreachable",
            Trouble::ConnectTimedOut => "connect_timed_out",
            Trouble::TimedOut => "timed_out",
            Trouble::Closed => "closed",
            Trouble::ShortReply => "short_reply",
            Trouble::WrongReply => "wrong_reply",
            Trouble::ErrorReply => "error_reply",
            Trouble::LostDatagram => "lost_datagram",
            Trouble::DuplicateDatagram => "duplicate_datagram",
            Trouble::NoPort => "no_port",
            Trouble::NoDescriptor => "no_descriptor",
            Trouble::Other => "other",
        }
    }

    /// Sorts an error of the operating system.
    pub fn of(error: &io::Error) -> Trouble {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionRefused => Trouble::Refused,
            Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe => Trouble::Reset,
            Kind::NetworkUnreachable | Kind::HostUnreachable | Kind::NetworkDown => Trouble::Unreachable,
            Kind::TimedOut => Trouble::ConnectTimedOut,
            Kind::AddrNotAvailable | Kind::AddrInUse => Trouble::NoPort,
            _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => Trouble::NoDescriptor,
            _ => Trouble::Other,
        }
    }
}

/// A trouble with what is known of it.
#[derive(Clone, Debug)]
pub struct Mishap {
    /// Its kind.
    pub trouble: Trouble,
    /// More, for a person.
    pub text: String,
}

impl Mishap {
    /// A trouble with a text.
    pub fn new(trouble: Trouble, text: impl Into<String>) -> Mishap {
        Mishap { trouble, text: text.into() }
    }
}

impl From<io::Error> for Mishap {
    fn from(error: io::Error) -> Mishap {
        Mishap::new(Trouble::of(&error), error.to_string())
    }
}

/// Counts of one thread, or of all.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Connections made, flows opened.
    pub connections: u64,
    /// Of them, outside the warm-up.
    pub connections_measured: u64,
    /// Exchanges completed.
    pub requests: u64,
    /// Payload bytes sent.
    pub bytes_sent: u64,
    /// Payload bytes received (and, under an echo, checked).
    pub bytes_received: u64,
    /// Troubles by kind.
    pub errors: BTreeMap<Trouble, u64>,
    /// The first trouble.
    pub first_error: Option<(Instant, Mishap)>,
    /// From the (intended) start of an exchange to its completion.
    pub latency: Nanos,
    /// From connect to the connection standing.
    pub connect: Nanos,
    /// How late starts of an open loop were made although nothing was in the way.
    pub late: Nanos,
    /// Connections or flows of each slot, by identify lines.
    pub slots: Vec<u64>,
    /// Flows that were answered by another slot than before.
    pub slot_changes: u64,
    /// The listener's name, by identify lines.
    pub listener: Option<String>,
}

impl Default for Tally {
    fn default() -> Tally {
        let empty = || Nanos::new_with_bounds(1, 3_600_000_000_000, 3).expect("constant bounds are valid");
        Tally {
            connections: 0,
            connections_measured: 0,
            requests: 0,
            bytes_sent: 0,
            bytes_received: 0,
            errors: BTreeMap::new(),
            first_error: None,
            latency: empty(),
            connect: empty(),
            late: empty(),
            slots: Vec::new(),
            slot_changes: 0,
            listener: None,
        }
    }
}

impl Tally {
    /// A connection stands.
    pub fn count_connection(&mut self, took: Duration) {
        self.connections += 1;
        self.connections_measured += 1;
        self.connect.saturating_record(nanos(took));
    }

    /// An exchange is complete.
    pub fn count_answer(&mut self, took: Duration) {
        self.requests += 1;
        self.latency.saturating_record(nanos(took));
    }

    /// Something went wrong.
    pub fn count_mishap(&mut self, now: Instant, mishap: Mishap) {
        *self.errors.entry(mishap.trouble).or_default() += 1;
        self.first_error.get_or_insert((now, mishap));
    }

    /// A connection turned out to be served by this slot.
    pub fn count_identity(&mut self, identity: &Identity) {
        if self.slots.len() <= identity.slot {
            self.slots.resize(identity.slot + 1, 0);
        }
        self.slots[identity.slot] += 1;
        if self.listener.is_none() {
            self.listener = Some(identity.listener.clone());
        }
    }

    /// All troubles.
    pub fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Forgets what a warm-up is not to leave behind: rates and latencies.
    /// Connections and troubles stay, they really happened.
    pub fn forget_measures(&mut self) {
        let kept = std::mem::take(self);
        self.connections = kept.connections;
        self.errors = kept.errors;
        self.first_error = kept.first_error;
        self.slots = kept.slots;
        self.slot_changes = kept.slot_changes;
        self.listener = kept.listener;
    }

    /// Adds another thread's or interval's counts.
    pub fn merge(&mut self, other: Tally) {
        self.connections += other.connections;
        self.connections_measured += other.connections_measured;
        self.requests += other.requests;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        for (trouble, count) in other.errors {
            *self.errors.entry(trouble).or_default() += count;
        }
        let first = [self.first_error.take(), other.first_error].into_iter().flatten();
        self.first_error = first.min_by_key(|(at, _)| *at);
        for (mine, theirs) in [
            (&mut self.latency, &other.latency),
            (&mut self.connect, &other.connect),
            (&mut self.late, &other.late),
        ] {
            if !theirs.is_empty() {
                mine.add(theirs).expect("all histograms have the same bounds");
            }
        }
        if self.slots.len() < other.slots.len() {
            self.slots.resize(other.slots.len(), 0);
        }
        self.slots.iter_mut().zip(&other.slots).for_each(|(mine, theirs)| *mine += theirs);
        self.slot_changes += other.slot_changes;
        self.listener = self.listener.take().or(other.listener);
    }
}

/// At least one: a histogram has no place for zero.
pub fn nanos(duration: Duration) -> u64 {
    (duration.as_nanos() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_tallies_hold_the_sum_and_the_earliest_trouble() {
        let now = Instant::now();
        let (mut a, mut b) = (Tally::default(), Tally::default());
        a.count_mishap(now + Duration::from_secs(1), Mishap::new(Trouble::Reset, "later"));
        b.count_mishap(now, Mishap::new(Trouble::Refused, "sooner"));
        a.count_answer(Duration::from_millis(1));
        b.count_answer(Duration::from_millis(3));
        let of_slot = |slot| Identity { listener: "web".into(), slot, pid: 1, generation: 1 };
        a.count_identity(&of_slot(0));
        b.count_identity(&of_slot(2));
        a.merge(b);
        assert_eq!((a.requests, a.latency.len(), a.error_count()), (2, 2, 2));
        assert_eq!(a.slots, [1, 0, 1]);
        assert_eq!(a.first_error.expect("one is kept").1.text, "sooner");
    }

    #[test]
    fn a_warm_up_leaves_connections_and_troubles_behind() {
        let mut tally = Tally::default();
        tally.count_connection(Duration::from_millis(1));
        tally.count_answer(Duration::from_millis(1));
        tally.count_mishap(Instant::now(), Mishap::new(Trouble::Reset, ""));
        tally.forget_measures();
        assert_eq!((tally.connections, tally.connections_measured, tally.error_count()), (1, 0, 1));
        assert_eq!((tally.requests, tally.latency.len(), tally.connect.len()), (0, 0, 0));
    }
}
