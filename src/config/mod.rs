//! The configuration as it is meant: defaults filled in, names joined.
//!
//! `Config` is plain data, made by `load` from a file's text, written to JSON
//! for the workers, and never changed while a generation lives. The way from
//! text to `Config`: `reader` walks the tables, `file` names every key,
//! `kinds` knows what values look like, `checks` what does not go together.

mod checks;
mod file;
mod health;
mod kinds;
mod load;
mod older;
mod problem;
mod reader;
mod show;
mod suggest;
mod summary;
mod value;
mod words;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use health::{Check, Health, StatusRange};
pub use load::{Loaded, NamedServer, load};
pub use older::read_older;
pub use problem::{Problem, Problems};
pub use reader::{Block, Entry};
pub use show::show;
pub use suggest::{did_you_mean, no_such};
pub use summary::{ListenerSummary, ServerSummary, Summary, UpstreamSummary, summary};
pub use words::Word;

/// One generation's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// What concerns the daemon as a whole.
    pub daemon: Daemon,
    /// Where and how the log is written.
    pub log: Log,
    /// The listeners, in the file's order; an index here is a listener's
    /// number everywhere.
    pub listeners: Vec<Listener>,
    /// The upstreams, in the file's order.
    pub upstreams: Vec<Upstream>,
}

/// The `[daemon]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Daemon {
    /// How many worker processes.
    pub workers: Workers,
    /// Each worker runs on one CPU: slot i on CPU i mod CPUs.
    pub pin_workers: bool,
    /// Workers and steward become this user after binding.
    pub user: Option<String>,
    /// And this group; the user's own where only `user` is set.
    pub group: Option<String>,
    /// Where the control socket is bound; `None` = the default of this user.
    pub control_socket: Option<PathBuf>,
    /// Connections of the whole daemon at once; 0 = what descriptors allow.
    pub max_connections: u64,
    /// A worker whose loop does not turn for so long is replaced.
    pub hang_timeout: Duration,
    /// Sessions outlive their worker.
    pub crash_proof: bool,
    /// How long workers go on accepting without a supervisor.
    pub orphan_timeout: Duration,
    /// What a stop does where systemd does not tell it from a restart.
    pub on_stop: OnStop,
    /// Where the status page and the metrics are; `None` = nowhere.
    pub admin: Option<SocketAddr>,
    /// How long a graceful leave may take.
    pub drain_timeout: Duration,
    /// Start although another program already listens at one of our addresses.
    pub share_ports: bool,
}

/// What becomes of the sessions when the daemon is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnStop {
    /// They finish, within `drain_timeout`.
    Drain,
    /// They wait in systemd's store for the next start.
    Park,
}

/// `workers = "auto"` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Workers {
    /// One a CPU that this process may use.
    Auto,
    /// So many, 1 to 64.
    Count(usize),
}

/// The `[log]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Log {
    /// The least severe level that is written.
    pub level: Level,
    /// Text or JSON lines.
    pub format: Format,
    /// Where one line a session or flow goes.
    pub access: AccessLog,
}

/// Where the access log goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessLog {
    /// Nowhere.
    Off,
    /// With the daemon's own log.
    Stderr,
    /// To this file, which is opened anew on USR1.
    File(PathBuf),
}

/// A log level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// How a log line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Format {
    Text,
    Json,
}

/// A `[[listener]]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listener {
    /// Unique among the listeners.
    pub name: String,
    /// At least one address.
    pub bind: Vec<SocketAddr>,
    /// TCP sessions or UDP flows.
    pub mode: Mode,
    /// Where the traffic goes.
    pub target: Target,
    /// How the kernel chooses the slot.
    pub steering: Steering,
    /// The accept queue's length, as given to listen(2).
    pub backlog: u32,
    /// SO_RCVBUF in bytes; `None` = the kernel's own tuning.
    pub receive_buffer: Option<u64>,
    /// SO_SNDBUF in bytes; `None` = the kernel's own tuning.
    pub send_buffer: Option<u64>,
    /// SO_BINDTODEVICE.
    pub interface: Option<String>,
    /// IP_TRANSPARENT.
    pub transparent: bool,
    /// IP_FREEBIND.
    pub freebind: bool,
    /// The `[listener.tcp]` table.
    pub tcp: Tcp,
    /// The `[listener.udp]` table.
    pub udp: Udp,
    /// The `[listener.limits]` table.
    pub limits: Limits,
    /// The `[listener.access]` table.
    pub access: Access,
}

/// The `[listener.limits]` table, over all slots; 0 = no such limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Sessions, or flows, at once.
    pub max_connections: u64,
    /// The same of one client address.
    pub per_source: u32,
    /// New ones a second of one client address.
    pub rate_per_source: u32,
}

/// The `[listener.access]` table: who may come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Access {
    /// These alone; empty = everyone.
    pub allow: Vec<IpNet>,
    /// Never these, allowed or not.
    pub deny: Vec<IpNet>,
}

/// What a listener's sockets speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Mode {
    Tcp,
    Udp,
}

/// How the kernel chooses the slot of a connection or datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Steering {
    /// Evenly, by a hash of both ends.
    Hash,
    /// A slot of the CPU that received the packet.
    Cpu,
    /// A client address has one slot.
    Source,
    /// Every datagram by itself.
    Random,
    /// Evenly, away from slots that have more to do.
    LoadAware,
}

/// Where a listener's traffic goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// To the upstream with this index in `Config::upstreams`.
    Upstream(usize),
    /// Nowhere: the worker answers itself.
    Service(Service),
}

/// What a worker answers by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// Sends back what it gets.
    Echo,
    /// One line that names the worker, then as `Echo`.
    Identify,
    /// Reads and drops.
    Discard,
}

/// The `[listener.tcp]` table. A zero duration means: no such limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tcp {
    /// A session without a byte for so long is ended.
    pub idle_timeout: Duration,
    /// The same once one side has finished sending.
    pub half_close_timeout: Duration,
    /// The longest life of a session, spread by up to a tenth.
    pub max_age: Duration,
    /// TCP keep-alive idle time, both sides.
    pub keepalive: Duration,
    /// TCP_USER_TIMEOUT, both sides.
    pub user_timeout: Duration,
    /// TCP Fast Open on the listener.
    pub fast_open: bool,
    /// TCP_DEFER_ACCEPT on the listener.
    pub defer_accept: bool,
    /// Whether connections begin with a PROXY protocol header.
    pub accept_proxy: AcceptProxy,
    /// Who may send that header.
    pub trusted: Vec<IpNet>,
}

/// Whether a PROXY protocol header is required.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum AcceptProxy {
    Off,
    On,
}

/// The `[listener.udp]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Udp {
    /// A flow without a datagram for so long is over.
    pub idle_timeout: Duration,
    /// A flow is over after so many replies, once each question has one; 0 =
    /// by time alone.
    pub replies: u32,
    /// Flows at once, a slot.
    pub max_flows: u32,
    /// How long the upstream port of a flow that ended with replies
    /// outstanding is kept from use.
    pub quarantine: Duration,
    /// What waited longer when a new process takes up a kept socket is
    /// dropped.
    pub stale_after: Duration,
    /// Who handles a datagram to a group.
    pub multicast: Multicast,
    /// Where a group is joined; `None` = the kernel's choice.
    pub multicast_interface: Option<MulticastInterface>,
}

/// Who handles a datagram to a multicast group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Multicast {
    /// One worker, by the hash of its source.
    Partition,
    /// Every worker.
    Copy,
}

/// Where a multicast group is joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MulticastInterface {
    /// The interface of this name.
    Name(String),
    /// The interface that has this address; IPv4 groups only.
    Address(Ipv4Addr),
}

/// An `[[upstream]]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Upstream {
    /// Unique among the upstreams.
    pub name: String,
    /// How a worker picks a server.
    pub balance: Balance,
    /// How long one connect may take.
    pub connect_timeout: Duration,
    /// How many other servers are tried after the first failed.
    pub retries: u32,
    /// Whether servers are told who the client is.
    pub send_proxy: SendProxy,
    /// Addresses to connect from, in turn; empty = the kernel's choice.
    pub source: Vec<IpAddr>,
    /// Connect from the client's own address (IP_TRANSPARENT).
    pub transparent: bool,
    /// What happens to a new session when every server is down.
    pub all_down: AllDown,
    /// What happens to the open sessions of a server that goes down.
    pub on_down: OnDown,
    /// How long a session waits for a place when every server is full.
    pub queue_timeout: Duration,
    /// The `[upstream.health]` table.
    pub health: Health,
    /// At least one.
    pub servers: Vec<Server>,
}

/// How a worker picks a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Balance {
    RoundRobin,
    LeastConnections,
    TwoChoices,
    SourceHash,
}

/// Whether servers are told who the client is, by a PROXY protocol header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum SendProxy {
    Off,
    V1,
    V2,
}

/// What happens to a new session when every server is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllDown {
    /// It is closed.
    Close,
    /// It is tried on any of them.
    TryAny,
}

/// What happens to the open sessions of a server that goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDown {
    /// They go on as long as they can.
    Keep,
    /// They are reset.
    Reset,
}

/// An `[[upstream.server]]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// Where it is.
    pub address: ServerAddress,
    /// Its share, 0..=256; 0 = nothing new.
    pub weight: u32,
    /// Used only when no other server can be.
    pub backup: bool,
    /// Sessions at once over all workers; 0 = no limit.
    pub max_connections: u32,
}

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerAddress {
    /// `10.0.0.1:80`, `[::1]:80`
    Ip(SocketAddr),
    /// `unix:/path`
    Unix(PathBuf),
    /// `name:port`: the addresses that the name has.
    #[allow(missing_docs)]
    Name { host: String, port: u16 },
    /// `srv:name`: the hosts, ports, priorities and weights that its SRV
    /// records give.
    Srv(String),
}

/// As the file writes it.
impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
            Self::Srv(name) => write!(f, "srv:{name}"),
        }
    }
}
