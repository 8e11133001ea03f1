//! What the daemon's processes say to each other, and how it is written.
//!
//! One JSON text a message, over `sys::channel`, with the descriptors that
//! the message names. All processes are of one build, so a message that cannot
//! be read is a bug and ends the connection.

pub mod client;
pub mod misbehave;
pub mod sessions;
pub mod status;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::board::{Change, Override};
use crate::config::{self, Word};
use crate::logging;
use crate::steering::Route;
use crate::sys::accounts::Account;
use crate::sys::channel::{Channel, MAX_FDS};
use crate::sys::clock::Millis;

/// One listening socket's place: the listener's number in the configuration
/// and the number of the address in its `bind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Place {
    pub listener: usize,
    pub address: usize,
}

/// What makes two sockets the same, whatever number a configuration gives
/// them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SocketId {
    /// The address, as bound.
    pub address: SocketAddr,
    /// UDP, else TCP.
    pub udp: bool,
    /// SO_BINDTODEVICE.
    pub interface: Option<String>,
}

/// From the supervisor to a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// Who it is. Descriptors: the configuration (sealed JSON), its own
    /// counters, the upstream board to read, the bell that the steward rings
    /// when the board has changed, the bell that the worker rings when traffic
    /// fails, with `tells_load` the page of loads, with `logs_access` where
    /// lines of the access log go, then the counters of all
    /// slots to read. What is `outliving` is open elsewhere too, and who waits
    /// there is served after the daemon's end.
    #[allow(missing_docs)]
    Birth {
        slot: usize,
        slot_count: usize,
        generation: u64,
        account: Option<Account>,
        outliving: Vec<Place>,
        tells_load: bool,
        /// Open nothing, say `Ready` and end: a new image is tried out.
        #[serde(default)]
        trial: bool,
        logs_access: bool,
        /// So many slots' counters of the generation before, whose workers may
        /// still have sessions: after its configuration they come before those
        /// of all slots.
        before: usize,
        /// What the gauges of its counters say is what its predecessor had, and
        /// is on its way here.
        #[serde(default)]
        recovers: bool,
    },
    /// Sockets that its slot has already, one descriptor a place.
    Sockets(Vec<Place>),
    /// Open what was not given, and give up privileges.
    Begin,
    /// Accept.
    Serve,
    /// Pass every flow and session to the worker at the other end of this
    /// descriptor and leave; what cannot be passed is finished within the
    /// limit. The sockets of these places are in no configuration any more:
    /// what waits in their queues is accepted first.
    #[allow(missing_docs)]
    HandOver {
        removed: Vec<Place>,
        limit: Option<u64>,
        /// Nobody answers: what was sent is as good as taken.
        #[serde(default)]
        park: bool,
        /// To a keeper: the receiver counts in the dead worker's counters, and
        /// the gauges are its to settle.
        #[serde(default)]
        shares: bool,
        /// To a keeper: its worker died by its own doing.
        #[serde(default)]
        fault: bool,
    },
    /// Take what was parked at the other end of this descriptor before a
    /// restart, to its end, and say `Unparked`.
    Unpark,
    /// Take what the worker at the other end of this descriptor passes. Where
    /// flows are among it, no client's datagram is read before they are here.
    /// From a keeper of the same counters the receiver `recovers`.
    #[allow(missing_docs)]
    TakeOver {
        flows: bool,
        #[serde(default)]
        recovers: bool,
    },
    /// Read no client's datagram from now on, and say so (`Held`): they are
    /// about to be steered anew.
    Hold,
    /// Every `TakeOver` has been sent: read again once those are through.
    Release,
    /// Clients' datagrams are steered anew. Read what has come so far, then
    /// pass each flow whose datagrams come to another slot to that one's
    /// worker, and say so (`FlowsPassed`). Descriptors: `Routes` as sealed
    /// JSON, then a channel to each of these slots.
    #[allow(missing_docs)]
    PassFlows { to: Vec<usize> },
    /// Pass so many sessions to the worker at the other end of this
    /// descriptor, and serve on.
    #[allow(missing_docs)]
    Share { count: usize },
    /// A neighbour slot is empty: accept for it too. One descriptor a place.
    #[allow(missing_docs)]
    Lend { slot: usize, places: Vec<Place> },
    /// That slot is filled again.
    #[allow(missing_docs)]
    Recall { slot: usize },
    /// Other workers begin to take the places of all that there are. Their
    /// configuration and the counters of their slots, to read.
    Successors,
    /// Turn once: the beat of that turn is the answer.
    Ask,
    /// List, or end, the sessions that the query takes.
    #[allow(missing_docs)]
    Sessions { id: u64, query: sessions::Query },
    /// Leave gracefully; after so many milliseconds (`None` = no limit) what
    /// is left is reset.
    #[allow(missing_docs)]
    Drain { limit: Option<u64> },
}

/// From a worker to the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// Duplicates of sockets that it opened, one descriptor a place.
    Sockets(Vec<Place>),
    /// All its sockets are open.
    Opened,
    /// It accepts on every listener.
    Ready,
    /// The listeners that it was to close are closed, their queues served.
    QueuesClosed,
    /// What could move has moved to another worker; `gone` = that one ended
    /// meanwhile, and the next may have the rest.
    #[allow(missing_docs)]
    HandedOver { moved: usize, left: usize, gone: bool },
    /// It has read what was parked for it.
    Unparked,
    /// This process keeps its sessions should it die, and why none does.
    #[allow(missing_docs)]
    Keeper { pid: Option<u32>, why: String },
    /// From a keeper: what it found when its worker had died.
    Recovered(Kept),
    /// It reads no client's datagram.
    Held,
    /// So many flows are where their datagrams come; so many others could not
    /// be passed.
    #[allow(missing_docs)]
    FlowsPassed { moved: usize, left: usize },
    /// The sessions that were asked for: one descriptor, sealed JSON.
    #[allow(missing_docs)]
    Found { id: u64 },
    /// It cannot work: what to tell the operator, and the exit code.
    #[allow(missing_docs)]
    Failed { text: String, advice: String, exit_code: u8 },
    /// It slept for long, and turns: it is to be looked at again.
    Awake,
}

/// What a keeper found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Sessions that go on.
    pub sessions: u64,
    /// Flows that go on.
    pub flows: u64,
    /// Bytes that were received and not yet sent.
    pub bytes: u64,
    /// Connections that were accepted and not written down yet.
    pub adopted: u64,
    /// Sessions whose numbers did not agree: reset.
    pub self_check_resets: u64,
    /// Other sessions that could not go on: reset.
    pub lost: u64,
    /// What the operator is to know.
    pub complaints: Vec<String>,
}

/// How each UDP listener of this name is steered from now on.
pub type Routes = Vec<(String, Route)>;

/// Between two workers, while flows and sessions move. Flows come first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// A bundle of flows: its memory, then their sockets. Answered by `Taken`.
    #[allow(missing_docs)]
    Flows {
        count: usize,
        /// Of the bundles of this hand-over; 0 where the sender counts none.
        #[serde(default)]
        number: u64,
    },
    /// No further flows will come.
    FlowsDone,
    /// Datagrams of a client that came to the sender a moment too late. One
    /// descriptor: their bytes.
    Straggler(Straggler),
    /// A bundle: its memory, then the sessions' sockets.
    #[allow(missing_docs)]
    Sessions {
        count: usize,
        #[serde(default)]
        number: u64,
    },
    /// The bundle was taken but for these, by their place in it. May be said
    /// twice of the same one: by a worker, and by its keeper, which does not
    /// know whether it was said.
    #[allow(missing_docs)]
    Taken {
        refused: Vec<usize>,
        #[serde(default)]
        number: u64,
    },
    /// The last bundle was not understood, and nothing more is wanted.
    Refused,
    /// Nothing more will come. Up to this number the sender knows of every
    /// bundle that it was taken, and of none after it.
    #[allow(missing_docs)]
    Done { heard: u64 },
}

/// Datagrams that are passed on, of one length but for the last where there
/// are several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Straggler {
    pub listener: String,
    pub bind: SocketAddr,
    pub client: SocketAddr,
    pub local: IpAddr,
    pub segment: Option<usize>,
}

/// From the supervisor to the steward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToSteward {
    /// Descriptors: the present configuration, the control listener, the bell
    /// that workers hear, and the one that they ring.
    Birth(StewardBirth),
    /// Where the counters and the upstream boards are. Descriptors: so many
    /// configurations, the present one first; the boards of these of them, to
    /// write; then the counters of each table.
    #[allow(missing_docs)]
    Tables { generation: u64, config_count: usize, boards: Vec<usize>, tables: Vec<Table> },
    /// All that the operator has changed about servers at run time, by upstream
    /// and server.
    Overrides(Vec<(String, String, Override)>),
    /// By listener, sockets of other programs on its addresses.
    Strangers(BTreeMap<String, Vec<String>>),
    /// What the workers do now.
    Workers(Vec<WorkerState>),
    /// How the listener of this name is steered from now on, and the part of
    /// what comes that each slot is due.
    #[allow(missing_docs)]
    Steering { listener: String, active: String, shares: Vec<f64> },
    /// How the daemon as a whole is.
    Daemon(DaemonState),
    /// Where it answers over HTTP from now on: one descriptor, or none.
    #[allow(missing_docs)]
    Admin { address: Option<SocketAddr> },
    /// What it asked for. Descriptor: a list of `ListenerFigures` (sealed JSON).
    Figures,
    /// The access log. Descriptors: where lines come from, then the file, or
    /// none for standard error.
    AccessLog,
    /// The answer to its request.
    #[allow(missing_docs)]
    Answer { id: u64, answer: Result<String, String> },
    /// What the workers found for its request: one descriptor a worker. So
    /// many did not answer.
    #[allow(missing_docs)]
    Found { id: u64, silent: usize },
}

/// What a steward is told when it starts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StewardBirth {
    /// The account that it takes.
    pub account: Option<Account>,
    /// The supervisor's process.
    pub supervisor_pid: u32,
    /// Where the configuration was read; "embedded demo" where it was not.
    pub config_path: String,
    /// When the daemon started, seconds since 1970.
    pub started_at: u64,
    /// The same in milliseconds of the monotonic clock.
    pub started: Millis,
    /// No steward of this daemon was there before, so none has judged a server.
    pub is_first: bool,
}

/// How the daemon as a whole is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DaemonState {
    /// Every worker has accepted on every listener.
    pub announced: bool,
    /// It is on its way out.
    pub leaving: bool,
    /// The last change of the configuration that was tried.
    pub reload: Option<status::Reload>,
}

/// What waits at a listener's sockets, for each slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ListenerFigures {
    pub listener: String,
    pub slots: Vec<SlotFigures>,
}

/// What waits at a listener's sockets in one slot: `sys::queues::Queue`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SlotFigures {
    pub waiting: u64,
    pub limit: u64,
    pub dropped: u64,
}

/// Some of a slot's counters. What a slot has counted is the sum of its tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// The slot.
    pub slot: usize,
    /// Which of the configurations says how they are laid out.
    pub config: usize,
}

/// One worker as `status` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerState {
    /// Its slot.
    pub slot: usize,
    /// Its process, 0 where there is none.
    pub pid: u32,
    /// The generation that it serves.
    pub generation: u64,
    /// `starting`, `ready`, `draining`, `hung` or `backoff`.
    pub state: String,
    /// How often the slot's worker was replaced.
    pub restarts: u64,
    /// Why, with how often.
    pub restart_reasons: BTreeMap<String, u64>,
    /// The neighbour that accepts for it while it is empty.
    pub helped_by: Option<usize>,
    /// Who keeps its sessions; `None` where nobody is to.
    #[serde(default)]
    pub keeper: Option<status::Keeper>,
}

/// From the steward to the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromSteward {
    /// It answers the control socket.
    Ready,
    /// What waits at the listeners' sockets now?
    Figures,
    /// A caller, who was let in by the socket's mode, asks for this.
    #[allow(missing_docs)]
    Request { id: u64, request: Request },
}

/// What a caller may ask of the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Leave gracefully within `drain_timeout`.
    Drain,
    /// Leave at once.
    Stop,
    /// Read the file again and bring it into force.
    #[allow(missing_docs)]
    Reload { dry_run: bool },
    /// So many workers from now on.
    Scale(usize),
    /// Move sessions until the workers have equally many.
    Rebalance,
    /// systemd is about to do this with the unit.
    NoteJob(String),
    /// Replace the running program by the file at its path.
    Upgrade,
    /// The sessions that this takes.
    Sessions(sessions::Query),
    /// One server of the file is to be used otherwise than the file says.
    #[allow(missing_docs)]
    Server { upstream: String, server: String, change: Change },
}

/// Starts the log of a process as the configuration has it.
pub fn start_log(log: &config::Log, role: &str) -> logging::Log {
    let shape = match log.format {
        config::Format::Text => logging::Shape::Text,
        config::Format::Json => logging::Shape::Json,
    };
    logging::init(log.level.word(), shape, role)
}

/// Sends one message with its descriptors.
pub fn send(channel: &Channel, message: &impl Serialize, fds: &[BorrowedFd]) -> io::Result<()> {
    channel.send(&serde_json::to_vec(message)?, fds)
}

/// Receives one message; `None` = the other process is gone.
pub fn receive<T: DeserializeOwned>(channel: &Channel) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let Some(packet) = channel.receive()? else { return Ok(None) };
    let message = serde_json::from_slice(&packet.bytes)?;
    Ok(Some((message, packet.fds)))
}

/// Looks at the next message, which stays to be received.
pub fn peek<T: DeserializeOwned>(channel: &Channel) -> io::Result<Option<T>> {
    let Some(bytes) = channel.peek()? else { return Ok(None) };
    Ok(Some(serde_json::from_slice(&bytes)?))
}

/// Sends sockets in as many messages as they need.
pub fn send_sockets<M: Serialize>(
    channel: &Channel,
    sockets: &[(Place, BorrowedFd)],
    message: impl Fn(Vec<Place>) -> M,
) -> io::Result<()> {
    for chunk in sockets.chunks(MAX_FDS) {
        let places = chunk.iter().map(|(place, _)| *place).collect();
        let fds: Vec<BorrowedFd> = chunk.iter().map(|(_, fd)| *fd).collect();
        send(channel, &message(places), &fds)?;
    }
    Ok(())
}

/// The places of a message with their descriptors; an error where a
/// descriptor is missing or too much.
pub fn pair_up(places: Vec<Place>, fds: Vec<OwnedFd>) -> io::Result<Vec<(Place, OwnedFd)>> {
    if places.len() != fds.len() {
        let text = format!("{} places came with {} descriptors", places.len(), fds.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(places.into_iter().zip(fds).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn three_hundred_sockets_arrive_at_their_places() {
        let (a, b) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let sockets: Vec<(Place, BorrowedFd)> =
            (0..300).map(|address| (Place { listener: 1, address }, file.as_fd())).collect();
        send_sockets(&a, &sockets, ToWorker::Sockets).unwrap();
        let mut arrived = Vec::new();
        while arrived.len() < 300 {
            let (message, fds) = receive(&b).unwrap().unwrap();
            let ToWorker::Sockets(places) = message else { panic!("{message:?}") };
            arrived.extend(pair_up(places, fds).unwrap().into_iter().map(|(place, _)| place.address));
        }
        assert!(arrived.into_iter().eq(0..300));
    }

    #[test]
    fn rubbish_is_an_error_and_no_panic() {
        let (a, b) = Channel::pair().unwrap();
        a.send(b"{\"Lend\":", &[]).unwrap();
        assert!(receive::<ToWorker>(&b).is_err());
        assert!(pair_up(vec![Place { listener: 0, address: 0 }], vec![]).is_err());
    }
}
