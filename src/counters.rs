//! What the daemon counts, in memory that outlives a worker.
//!
//! One region a slot, written by that slot's worker alone and read by anyone
//! it was passed to. A worker that is killed leaves its counts behind; its
//! successor goes on from them. Only the gauges (`active`) are what the dead
//! process held: `begin_life` turns them into losses.
//!
//! ```text
//! [ process | listener 0 | ... | place 0 | ... | upstream 0 | ... | sources of a listener | ... ]
//! ```
//! Places of servers are numbered as on the upstream board. All cells are
//! 64-bit words; one writer, so a plain load and store, no locked add.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::board::Numbering;
use crate::config::{Config, Listener};
use crate::flow::DropReason;
use crate::relay::CloseReason;
use crate::sources::{self, TABLE_WORDS};

const PROCESS_WORDS: usize = 16;
const LISTENER_WORDS: usize = 64;
const SERVER_WORDS: usize = 32;
const UPSTREAM_WORDS: usize = 2;

/// How many words each part has: what is counted by another shape cannot be
/// read. Counters are only ever added behind the others of their part.
pub const SHAPE: [usize; 3] = [PROCESS_WORDS, LISTENER_WORDS, SERVER_WORDS];
/// How long a connect to a server took: the upper ends of the histogram's
/// buckets in microseconds; one more holds what took longer.
pub const CONNECT_BOUNDS: [u64; 15] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000,
];

/// In `Process::Beat`: the loop waits for something to happen.
pub const ASLEEP: u64 = 1 << 63;

/// Counters of the worker as a whole.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum Process {
    /// Connections accepted, over all listeners.
    Accepted,
    /// Sessions that live, over all listeners.
    Active,
    /// The longest turn of the event loop lately, in microseconds.
    LoopLag,
    /// How often accepting was paused for want of descriptors or memory.
    AcceptPauses,
    /// Lines of the access log that nobody took in time.
    AccessDropped,
    /// When the event loop last turned, in milliseconds of the monotonic
    /// clock, with the bit `ASLEEP` when it went to sleep afterwards. What the
    /// worker says of itself, and so never trusted further than to judge that
    /// worker.
    Beat,
    /// The secret of the sources' hash, the same in all slots; set by the
    /// supervisor.
    SourceSeed,
    /// Times that an address to connect from had no port left.
    PortShortages,
}

/// Counters of one listener in this slot.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum OfListener {
    /// Connections accepted.
    Connections,
    /// Sessions that live.
    Active,
    /// Bytes from clients.
    BytesIn,
    /// Bytes to clients.
    BytesOut,
    /// Sessions that ended, by reason: this word and the following ones.
    Ended,
}

/// Counters of one UDP listener in this slot, besides those of every listener.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum OfFlows {
    /// Datagrams from clients, those that were dropped later included.
    DatagramsIn = 32,
    /// Datagrams to clients.
    DatagramsOut,
    /// Flows that went to another server because theirs had failed.
    Moved,
    /// Upstream ports that rest now.
    Quarantined,
    /// Ports that were taken out of quarantine early, for want of others.
    QuarantineCut,
    /// Times that cutting datagrams in the kernel failed at a socket.
    OffloadFailures,
    /// Datagrams that the kernel dropped because the receive buffer was full.
    /// Not of a socket with a share of a group: there the kernel counts what
    /// the filter refuses as well.
    KernelDrops,
    /// Flows that another process had and this one took over, whole.
    TakenOver,
    /// Flows that lived here when the slots changed and nobody could say where
    /// their datagrams come from then on.
    Unsteered,
    /// Datagrams that came a moment too late and were passed on to the slot
    /// that has their flow.
    PassedOn,
    /// Datagrams that the worker dropped, by reason: this word and the
    /// following ones.
    Dropped = 48,
}

/// Counters of one place of a server as this slot used it.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum OfServer {
    /// Connections established.
    Connections,
    /// Sessions that live.
    Active,
    /// Connects that failed.
    Failures,
    /// Microseconds that the established ones took, together.
    ConnectTime = 15,
    /// How many of them took how long: this word and the following ones, one a
    /// bucket of `CONNECT_BOUNDS` and one for what took longer.
    Connects,
}

/// Gauges of one upstream in this slot.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum OfUpstream {
    /// Sessions that wait for a place.
    Waiting,
    /// Since when the first of them waits, in milliseconds of the monotonic
    /// clock; 0 = nobody does.
    WaitingSince,
}

/// How a region is laid out for a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    listener_count: usize,
    numbering: Numbering,
    /// Which listeners count their sources.
    counts_sources: Vec<bool>,
}

impl Layout {
    /// The layout that every process of a generation computes alike.
    pub fn of(config: &Config) -> Layout {
        let counts =
            |listener: &Listener| listener.limits.per_source > 0 || listener.limits.rate_per_source > 0;
        let counts_sources = config.listeners.iter().map(counts).collect();
        Layout { listener_count: config.listeners.len(), numbering: Numbering::of(config), counts_sources }
    }

    /// The size of a region.
    pub fn word_count(&self) -> usize {
        self.first_table() + self.counts_sources.iter().filter(|counts| **counts).count() * TABLE_WORDS
    }

    fn first_table(&self) -> usize {
        PROCESS_WORDS
            + self.listener_count * LISTENER_WORDS
            + self.numbering.place_count() * SERVER_WORDS
            + self.numbering.upstream_count() * UPSTREAM_WORDS
    }

    fn table(&self, listener: usize) -> Option<usize> {
        let before = self.counts_sources.get(..listener)?.iter().filter(|counts| **counts).count();
        self.counts_sources.get(listener)?.then_some(self.first_table() + before * TABLE_WORDS)
    }

    /// How the places of servers are numbered.
    pub fn numbering(&self) -> &Numbering {
        &self.numbering
    }

    /// The number among all places of an upstream's place.
    pub fn place(&self, upstream: usize, place: usize) -> usize {
        self.numbering.place(upstream, place)
    }
}

/// A cell of the worker as a whole, whatever the layout behind it is; `None`
/// where the region is too small for any.
pub fn process_cell(words: &[AtomicU64], which: Process) -> Option<Cell<'_>> {
    words.get(which as usize).map(Cell)
}

/// One slot's counters, to read, and for its owner to write.
#[derive(Clone, Copy, Debug)]
pub struct Counters<'a> {
    words: &'a [AtomicU64],
    listener_count: usize,
    place_count: usize,
}

impl<'a> Counters<'a> {
    /// Counters over a region's words; `None` where they are too few.
    pub fn over(words: &'a [AtomicU64], layout: &Layout) -> Option<Counters<'a>> {
        (words.len() >= layout.word_count()).then_some(Counters {
            words,
            listener_count: layout.listener_count,
            place_count: layout.numbering.place_count(),
        })
    }

    /// A cell of the worker as a whole.
    pub fn process(&self, which: Process) -> Cell<'a> {
        Cell(&self.words[which as usize])
    }

    /// A cell of a listener.
    pub fn listener(&self, listener: usize, which: OfListener) -> Cell<'a> {
        debug_assert!(listener < self.listener_count);
        Cell(&self.words[PROCESS_WORDS + listener * LISTENER_WORDS + which as usize])
    }

    /// How many sessions of a listener ended for a reason.
    pub fn ended(&self, listener: usize, reason: CloseReason) -> Cell<'a> {
        let at = OfListener::Ended as usize + reason as usize;
        debug_assert!(at < OfFlows::DatagramsIn as usize);
        Cell(&self.words[PROCESS_WORDS + listener * LISTENER_WORDS + at])
    }

    /// A cell of a UDP listener.
    pub fn flows(&self, listener: usize, which: OfFlows) -> Cell<'a> {
        debug_assert!(listener < self.listener_count);
        Cell(&self.words[PROCESS_WORDS + listener * LISTENER_WORDS + which as usize])
    }

    /// How many datagrams of a listener the worker dropped for a reason.
    pub fn dropped(&self, listener: usize, reason: DropReason) -> Cell<'a> {
        let at = OfFlows::Dropped as usize + reason as usize;
        debug_assert!(at < LISTENER_WORDS);
        Cell(&self.words[PROCESS_WORDS + listener * LISTENER_WORDS + at])
    }

    /// A cell of a server's place, numbered by `Layout::place`.
    pub fn server(&self, place: usize, which: OfServer) -> Cell<'a> {
        debug_assert!(place < self.place_count);
        let first = PROCESS_WORDS + self.listener_count * LISTENER_WORDS;
        Cell(&self.words[first + place * SERVER_WORDS + which as usize])
    }

    /// A cell of an upstream.
    pub fn upstream(&self, upstream: usize, which: OfUpstream) -> Cell<'a> {
        let places = self.listener_count * LISTENER_WORDS + self.place_count * SERVER_WORDS;
        Cell(&self.words[PROCESS_WORDS + places + upstream * UPSTREAM_WORDS + which as usize])
    }

    /// How many connects to a server's place fell into a bucket of `CONNECT_BOUNDS`.
    pub fn connects(&self, place: usize, bucket: usize) -> Cell<'a> {
        let at = OfServer::Connects as usize + bucket;
        debug_assert!(place < self.place_count && at < SERVER_WORDS);
        let first = PROCESS_WORDS + self.listener_count * LISTENER_WORDS;
        Cell(&self.words[first + place * SERVER_WORDS + at])
    }

    /// A connect to a server succeeded after so many microseconds. Owner only.
    pub fn count_connect(&self, place: usize, micros: u64) {
        let bucket = CONNECT_BOUNDS.partition_point(|&bound| bound < micros);
        self.connects(place, bucket).add(1);
        self.server(place, OfServer::ConnectTime).add(micros);
    }

    /// What each client address has at a listener, where that is limited.
    pub fn sources(&self, layout: &Layout, listener: usize) -> Option<sources::Table<'a>> {
        sources::Table::over(self.words.get(layout.table(listener)?..)?)
    }

    /// Adds what another region has counted, listener by listener and server by
    /// server of the same name. Of the gauges only what a process still held
    /// when it ended: that is lost with it.
    pub fn add_all(&self, own: &Config, from: &Counters, other: &Config) {
        for which in [Process::Accepted, Process::AcceptPauses, Process::PortShortages] {
            self.process(which).add(from.process(which).get());
        }
        for (index, listener) in own.listeners.iter().enumerate() {
            let Some(old) = other.listeners.iter().position(|l| l.name == listener.name) else { continue };
            use OfListener::{BytesIn, BytesOut, Connections};
            for which in [Connections, BytesIn, BytesOut] {
                self.listener(index, which).add(from.listener(old, which).get());
            }
            for reason in CloseReason::ALL {
                self.ended(index, reason).add(from.ended(old, reason).get());
            }
            let held = from.listener(old, OfListener::Active).get();
            self.ended(index, CloseReason::WorkerLost).add(held);
            // Not the kernel's drops: those are the sockets' own, and the
            // sockets live on.
            use OfFlows::{
                DatagramsIn, DatagramsOut, Moved, OffloadFailures, PassedOn, QuarantineCut, TakenOver,
                Unsteered,
            };
            let counts = [DatagramsIn, DatagramsOut, Moved, OffloadFailures, QuarantineCut];
            for which in counts.into_iter().chain([PassedOn, TakenOver, Unsteered]) {
                self.flows(index, which).add(from.flows(old, which).get());
            }
            for reason in DropReason::ALL {
                self.dropped(index, reason).add(from.dropped(old, reason).get());
            }
        }
        let servers = servers_of(other);
        for (name, places) in servers_of(own) {
            let Some((_, old)) = servers.iter().find(|(old, _)| *old == name) else { continue };
            for which in [OfServer::Connections, OfServer::Failures, OfServer::ConnectTime] {
                // An address may have another place by now: the server's sum
                // is what stays.
                let sum: u64 = old.clone().map(|place| from.server(place, which).get()).sum();
                self.server(places.start, which).add(sum);
            }
            for bucket in 0..=CONNECT_BOUNDS.len() {
                let sum: u64 = old.clone().map(|place| from.connects(place, bucket).get()).sum();
                self.connects(places.start, bucket).add(sum);
            }
        }
    }

    /// Called by a slot's new worker: what the last one held is lost with it,
    /// so that accepted = active + ended by some reason, always.
    pub fn begin_life(&self, layout: &Layout) {
        for listener in 0..self.listener_count {
            if let Some(table) = self.sources(layout, listener) {
                table.begin_life();
            }
            let active = self.listener(listener, OfListener::Active);
            self.ended(listener, CloseReason::WorkerLost).add(active.get());
            active.set(0);
            self.flows(listener, OfFlows::Quarantined).set(0);
        }
        for place in 0..layout.numbering.place_count() {
            self.server(place, OfServer::Active).set(0);
        }
        for upstream in 0..layout.numbering.upstream_count() {
            self.upstream(upstream, OfUpstream::Waiting).set(0);
            self.upstream(upstream, OfUpstream::WaitingSince).set(0);
        }
        self.process(Process::Active).set(0);
        self.process(Process::LoopLag).set(0);
    }
}

/// Upstream and address of every server, and its places.
fn servers_of(config: &Config) -> Vec<((&str, String), Range<usize>)> {
    let numbering = Numbering::of(config);
    let mut servers = Vec::new();
    for (index, upstream) in config.upstreams.iter().enumerate() {
        for (number, server) in upstream.servers.iter().enumerate() {
            let within = numbering.places_of(index, number);
            let first = numbering.place(index, within.start);
            let places = first..first + within.len();
            servers.push(((upstream.name.as_str(), server.address.to_string()), places));
        }
    }
    servers
}

/// One counter.
#[derive(Clone, Copy, Debug)]
pub struct Cell<'a>(&'a AtomicU64);

impl Cell<'_> {
    /// Its value.
    pub fn get(self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Sets it. Owner only.
    pub fn set(self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Adds to it. Owner only: there is one writer, so nothing is lost
    /// between the load and the store.
    pub fn add(self, count: u64) {
        self.set(self.get().wrapping_add(count));
    }

    /// Takes one from a gauge. Owner only.
    pub fn less_one(self) {
        let value = self.get();
        debug_assert!(value > 0, "a gauge went below zero");
        self.set(value.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::sources::Source;

    fn layout(listener_count: usize, servers: &[usize]) -> Layout {
        let numbering = Numbering::from_counts(servers.iter().map(|&count| vec![1; count]));
        let counts_sources = (0..listener_count).map(|listener| listener % 2 == 0).collect();
        Layout { listener_count, numbering, counts_sources }
    }

    #[test]
    fn no_two_counters_share_a_word() {
        let layout = layout(3, &[2, 5]);
        let words: Vec<AtomicU64> = (0..layout.word_count()).map(|_| AtomicU64::new(0)).collect();
        let counters = Counters::over(&words, &layout).unwrap();
        let mut cells = vec![
            counters.process(Process::Accepted),
            counters.process(Process::Active),
            counters.process(Process::LoopLag),
            counters.process(Process::AcceptPauses),
            counters.process(Process::Beat),
            counters.process(Process::SourceSeed),
            counters.process(Process::PortShortages),
        ];
        for listener in 0..3 {
            use OfListener::{Active, BytesIn, BytesOut, Connections};
            for which in [Connections, Active, BytesIn, BytesOut] {
                cells.push(counters.listener(listener, which));
            }
            cells.extend(CloseReason::ALL.map(|reason| counters.ended(listener, reason)));
            use OfFlows::*;
            let flows =
                [DatagramsIn, DatagramsOut, Moved, Quarantined, QuarantineCut, OffloadFailures, KernelDrops];
            cells.extend([TakenOver, Unsteered, PassedOn].map(|which| counters.flows(listener, which)));
            cells.extend(flows.map(|which| counters.flows(listener, which)));
            cells.extend(DropReason::ALL.map(|reason| counters.dropped(listener, reason)));
        }
        for server in 0..7 {
            use OfServer::{Active, ConnectTime, Connections, Failures};
            let own = [Connections, Active, Failures, ConnectTime];
            cells.extend(own.map(|which| counters.server(server, which)));
            cells.extend((0..=CONNECT_BOUNDS.len()).map(|bucket| counters.connects(server, bucket)));
        }
        for upstream in 0..2 {
            let gauges = [OfUpstream::Waiting, OfUpstream::WaitingSince];
            cells.extend(gauges.map(|which| counters.upstream(upstream, which)));
        }
        for cell in &cells {
            cell.add(1);
        }
        // Listeners 0 and 2 have tables.
        let source = Source::of(Ipv4Addr::LOCALHOST.into(), 0);
        let table = |listener| counters.sources(&layout, listener);
        assert!(table(1).is_none() && table(3).is_none());
        table(0).unwrap().add(source, 0);
        let limits = sources::Limits { live: 1, per_second: 0 };
        assert_eq!(
            sources::check(table(0).map(|table| (table, source)).into_iter(), limits, 0),
            Err(sources::Full::Live)
        );
        assert_eq!(sources::check(table(2).map(|table| (table, source)).into_iter(), limits, 0), Ok(()));
        table(2).unwrap().add(source, 0);
        assert!(cells.iter().all(|cell| cell.get() == 1));
    }

    #[test]
    fn a_new_life_counts_what_the_last_one_held_as_lost() {
        let layout = layout(1, &[1]);
        let words: Vec<AtomicU64> = (0..layout.word_count()).map(|_| AtomicU64::new(0)).collect();
        let counters = Counters::over(&words, &layout).unwrap();
        counters.listener(0, OfListener::Connections).add(10);
        counters.listener(0, OfListener::Active).add(4);
        counters.ended(0, CloseReason::Finished).add(6);
        counters.server(0, OfServer::Active).add(4);
        counters.begin_life(&layout);
        let ended: u64 = CloseReason::ALL.iter().map(|&reason| counters.ended(0, reason).get()).sum();
        assert_eq!((ended, counters.listener(0, OfListener::Active).get()), (10, 0));
        assert_eq!(counters.server(0, OfServer::Active).get(), 0);
    }

    #[test]
    fn a_connect_falls_into_the_bucket_that_ends_at_or_after_it() {
        let layout = layout(0, &[2]);
        let words: Vec<AtomicU64> = (0..layout.word_count()).map(|_| AtomicU64::new(0)).collect();
        let counters = Counters::over(&words, &layout).unwrap();
        for micros in [0, 100, 101, 5_000_000, 5_000_001] {
            counters.count_connect(1, micros);
        }
        let filled = |bucket: &usize| counters.connects(1, *bucket).get();
        let counts: Vec<u64> = (0..=CONNECT_BOUNDS.len()).map(|bucket| filled(&bucket)).collect();
        assert_eq!((counts[0], counts[1], counts[14], counts[15]), (2, 1, 1, 1));
        assert_eq!(counts.iter().sum::<u64>(), 5);
        assert_eq!(counters.server(1, OfServer::ConnectTime).get(), 10_000_202);
    }

    #[test]
    fn a_region_that_is_too_small_is_refused() {
        assert!(Counters::over(&[], &layout(1, &[])).is_none());
    }
}
