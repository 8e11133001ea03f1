//! Who holds an address, and what else the kernel knows about a bind there.
//!
//! Called by the supervisor after a failed bind and by `doctor`; not on any
//! path that carries traffic. Reads only: sock_diag for the sockets (bound
//! ones that do not listen too), else /proc/net; /proc/PID for the owners;
//! and pidfd_getfd(2) for the reuse options, which no table shows. One pass
//! over /proc, so bounded by the descriptors of this host. What may not be
//! read is `None` or an empty list, never a guess, and never an error.

mod diag;
mod owner;
mod tables;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use nix::net::if_::if_nametoindex;
use nix::unistd::{Uid, geteuid};

use crate::sys::listen::Options;

pub use owner::Process;

/// Which port space: TCP and UDP never conflict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// "tcp" or "udp"
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// What a socket does with its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// TCP, accepts connections.
    Listening,
    /// Bound and nothing else: TCP before listen(2) or connect(2), UDP always.
    Bound,
    /// A connection, or a UDP socket that was connected.
    Connected,
    /// A TCP connection on its way up or down.
    Closing,
    /// What the kernel keeps for a minute after a connection.
    TimeWait,
}

impl State {
    /// As `doctor --json` says it.
    pub fn name(self) -> &'static str {
        match self {
            State::Listening => "listening",
            State::Bound => "bound",
            State::Connected => "connected",
            State::Closing => "closing",
            State::TimeWait => "time-wait",
        }
    }

    /// From the kernel's number (include/net/tcp_states.h).
    fn from_kernel(protocol: Protocol, number: u8) -> State {
        const ESTABLISHED: u8 = 1;
        const TIME_WAIT: u8 = 6;
        const CLOSE: u8 = 7;
        const LISTEN: u8 = 10;
        const BOUND_INACTIVE: u8 = 13;
        match (protocol, number) {
            (_, ESTABLISHED) => State::Connected,
            (Protocol::Udp, _) | (_, CLOSE | BOUND_INACTIVE) => State::Bound,
            (_, TIME_WAIT) => State::TimeWait,
            (_, LISTEN) => State::Listening,
            _ => State::Closing,
        }
    }
}

/// Sockets that are alike in all that matters to a bind, and their owners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// What they are bound to.
    pub local: SocketAddr,
    /// What they do there.
    pub state: State,
    /// The user that made them, in this user namespace.
    pub uid: u32,
    /// The interface they are bound to, 0 = any.
    pub interface: u32,
    /// SO_REUSEADDR; `None` = could not be read.
    pub reuse_address: Option<bool>,
    /// SO_REUSEPORT; `None` = could not be read.
    pub reuse_port: Option<bool>,
    /// How many sockets.
    pub socket_count: usize,
    /// Who has them open; empty = not visible from here.
    pub processes: Vec<Process>,
}

/// What is known about an address and this process when a bind is judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Who is there already.
    pub holders: Vec<Holder>,
    /// The effective user that sockets of this process are made by.
    pub our_uid: u32,
    /// The first port that needs no privilege; `None` = could not be read.
    pub unprivileged_port_start: Option<u16>,
    /// Is the address on an interface of this host?
    pub placement: Placement,
}

/// Where an address is on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// A wildcard, a group, or not asked.
    #[default]
    Everywhere,
    /// On no interface.
    Nowhere,
    /// On this interface, which is up.
    Up(String),
    /// On this interface, which is down.
    Down(String),
    /// On this interface and not to be used yet: the search for a duplicate
    /// (RFC 4862) is not over.
    Tentative(String),
    /// On this interface and refused: another host has it.
    Duplicate(String),
    /// IPv6 is switched off here.
    FamilyDisabled,
}

/// One socket of the kernel's tables.
#[derive(Clone, Copy, Debug)]
struct Row {
    local: SocketAddr,
    state: State,
    uid: u32,
    inode: u64,
    interface: u32,
    /// `None` for IPv4, or where the table does not say.
    v6_only: Option<bool>,
}

/// Everything that `explain::bind_failure` wants to know of this host.
pub fn gather(address: SocketAddr, protocol: Protocol, options: &Options) -> Facts {
    Facts {
        holders: find(address, protocol, options.interface.as_deref()),
        our_uid: Uid::as_raw(geteuid()),
        unprivileged_port_start: tables::unprivileged_port_start(),
        placement: tables::placement(address),
    }
}

/// The sockets that a bind to `address` would meet, listeners first.
pub fn find(address: SocketAddr, protocol: Protocol, interface: Option<&str>) -> Vec<Holder> {
    fold(protocol, rows(address, protocol, interface))
}

/// The sockets there that take connections or datagrams and are not ours, who
/// are named by inode.
pub fn strangers(
    address: SocketAddr,
    protocol: Protocol,
    interface: Option<&str>,
    ours: &std::collections::HashSet<u64>,
) -> Vec<Holder> {
    let mut rows = rows(address, protocol, interface);
    let takes = if protocol == Protocol::Tcp { State::Listening } else { State::Bound };
    rows.retain(|row| row.state == takes && !ours.contains(&row.inode));
    if rows.is_empty() { Vec::new() } else { fold(protocol, rows) }
}

/// The states of the sockets there, without a look at their owners.
pub fn states(address: SocketAddr, protocol: Protocol) -> Vec<State> {
    rows(address, protocol, None).into_iter().map(|row| row.state).collect()
}

/// Is all that stands there left from connections: nobody listens, and no
/// socket is bound that might? False too where nothing can be seen.
pub(super) fn only_connections_remain(address: SocketAddr, protocol: Protocol, options: &Options) -> bool {
    let rows = rows(address, protocol, options.interface.as_deref());
    let remains = |row: &Row| matches!(row.state, State::Connected | State::Closing | State::TimeWait);
    !rows.is_empty() && rows.iter().all(remains)
}

fn rows(address: SocketAddr, protocol: Protocol, interface: Option<&str>) -> Vec<Row> {
    let interface = interface.and_then(|name| if_nametoindex(name).ok()).unwrap_or(0);
    let rows = diag::rows(protocol, address.port())
        .or_else(|_| tables::rows(protocol, address.port()))
        .unwrap_or_default();
    rows.into_iter().filter(|row| overlaps(address, interface, row)).collect()
}

/// Would the two stand in each other's way, the reuse options aside?
fn overlaps(address: SocketAddr, interface: u32, row: &Row) -> bool {
    if interface != 0 && row.interface != 0 && interface != row.interface {
        return false;
    }
    match (address.ip(), row.local.ip()) {
        (IpAddr::V4(ours), IpAddr::V4(theirs)) => v4_overlaps(ours, theirs),
        (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
            let scopes_differ = match (address, row.local) {
                (SocketAddr::V6(a), SocketAddr::V6(_)) => {
                    a.scope_id() != 0 && row.interface != 0 && a.scope_id() != row.interface
                }
                _ => false,
            };
            !scopes_differ && (ours == theirs || ours.is_unspecified() || theirs.is_unspecified())
        }
        (IpAddr::V4(ours), IpAddr::V6(theirs)) => match theirs.to_ipv4_mapped() {
            Some(mapped) => v4_overlaps(ours, mapped),
            // A dual socket takes the IPv4 side too. Where it is not known
            // whether it is one, better named than left out.
            None => theirs.is_unspecified() && row.v6_only != Some(true),
        },
        // Our IPv6 sockets are IPv6 only, always.
        (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

fn v4_overlaps(ours: Ipv4Addr, theirs: Ipv4Addr) -> bool {
    ours == theirs || ours.is_unspecified() || theirs.is_unspecified()
}

/// Puts sockets together that a reader need not tell apart. The options of
/// each are read before, so a group never mixes them.
fn fold(protocol: Protocol, rows: Vec<Row>) -> Vec<Holder> {
    let owners = owner::find(&rows.iter().map(|row| row.inode).filter(|inode| *inode != 0).collect());
    let mut groups: BTreeMap<(State, SocketAddr, u32, u32, owner::Reuse), Holder> = BTreeMap::new();
    for row in rows {
        let owned = owners.get(&row.inode);
        let reuse = owned.map(|o| o.reuse).unwrap_or_default();
        let key = (row.state, row.local, row.uid, row.interface, reuse);
        let holder = groups.entry(key).or_insert_with(|| Holder {
            protocol,
            local: row.local,
            state: row.state,
            uid: row.uid,
            interface: row.interface,
            reuse_address: reuse.address,
            reuse_port: reuse.port,
            socket_count: 0,
            processes: Vec::new(),
        });
        holder.socket_count += 1;
        for process in owned.map(|o| o.processes.as_slice()).unwrap_or_default() {
            if !holder.processes.contains(process) {
                holder.processes.push(process.clone());
            }
        }
    }
    let mut holders: Vec<Holder> = groups.into_values().collect();
    for holder in &mut holders {
        holder.processes.sort_by_key(|process| process.pid);
    }
    holders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(local: &str, v6_only: Option<bool>) -> Row {
        let local = local.parse().expect("a test address");
        Row { local, state: State::Listening, uid: 0, inode: 0, interface: 0, v6_only }
    }

    fn meet(ours: &str, theirs: &str, v6_only: Option<bool>) -> bool {
        overlaps(ours.parse().expect("a test address"), 0, &row(theirs, v6_only))
    }

    #[test]
    fn a_wildcard_meets_every_address_of_its_family() {
        assert!(meet("0.0.0.0:1", "127.0.0.1:1", None));
        assert!(meet("127.0.0.1:1", "0.0.0.0:1", None));
        assert!(meet("[::]:1", "[::1]:1", Some(true)));
        assert!(!meet("127.0.0.1:1", "127.0.0.2:1", None));
        assert!(!meet("[::1]:1", "[fe80::1]:1", Some(true)));
    }

    #[test]
    fn a_dual_socket_meets_ipv4_and_an_ipv6_only_one_does_not() {
        assert!(meet("127.0.0.1:1", "[::]:1", Some(false)));
        assert!(meet("0.0.0.0:1", "[::]:1", None));
        assert!(!meet("0.0.0.0:1", "[::]:1", Some(true)));
        assert!(meet("127.0.0.1:1", "[::ffff:127.0.0.1]:1", Some(false)));
        assert!(!meet("[::]:1", "0.0.0.0:1", None));
    }

    #[test]
    fn sockets_of_two_interfaces_do_not_meet() {
        let address = "0.0.0.0:1".parse().expect("a test address");
        let mut theirs = row("0.0.0.0:1", None);
        theirs.interface = 2;
        assert!(overlaps(address, 0, &theirs));
        assert!(overlaps(address, 2, &theirs));
        assert!(!overlaps(address, 3, &theirs));
    }
}
