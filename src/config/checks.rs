//! What concerns several values of a file at once: names that meet, addresses
//! that overlap, servers that can never be picked.
//!
//! Errors are what could not work or would not do what it says; warnings are
//! what works and is hardly meant.

use std::net::{IpAddr, SocketAddr};

use super::file::{File, ReadListener, ReadUpstream};
use super::problem::{Problem, Source, called};
use super::{
    AcceptProxy, Check, Listener, Mode, MulticastInterface, SendProxy, ServerAddress, Steering, Target,
};

/// What was found, in no order.
#[derive(Default)]
pub(super) struct Found {
    pub(super) errors: Vec<Problem>,
    pub(super) warnings: Vec<Problem>,
}

pub(super) fn check(file: &File, source: &Source) -> Found {
    let mut found = Found::default();
    if file.listeners.is_empty() {
        let help = "add a [[listener]] with name, bind, mode and upstream";
        found.errors.push(source.problem(0, "there is no listener", help));
    }
    let listeners = file.listeners.iter().map(|l| (l.listener.name.as_str(), l.at));
    duplicate_names("listener", listeners, source, &mut found);
    let upstreams = file.upstreams.iter().map(|u| (u.upstream.name.as_str(), u.at));
    duplicate_names("upstream", upstreams, source, &mut found);
    overlapping_addresses(&file.listeners, source, &mut found);
    unpinned_workers(file, source, &mut found);
    for read in &file.listeners {
        groups(read, source, &mut found);
        proxied(read, source, &mut found);
    }
    for (index, upstream) in file.upstreams.iter().enumerate() {
        let users: Vec<&Listener> = file
            .listeners
            .iter()
            .map(|read| &read.listener)
            .filter(|listener| listener.target == Target::Upstream(index))
            .collect();
        servers(upstream, &users, source, &mut found);
        told_of_clients(upstream, &users, source, &mut found);
        checked(upstream, &users, source, &mut found);
        leaving_from(upstream, source, &mut found);
        if users.is_empty() {
            let message = format!("{} is used by no listener", called("upstream", &upstream.upstream.name));
            found.warnings.push(source.problem(
                upstream.at,
                message,
                "name it in a listener, or take it out",
            ));
        }
        loops(upstream, &users, source, &mut found);
    }
    found
}

fn duplicate_names<'n>(
    what: &str,
    names: impl Iterator<Item = (&'n str, usize)>,
    source: &Source,
    found: &mut Found,
) {
    let mut seen: Vec<(&str, usize)> = Vec::new();
    // An empty name is one that was wrong already.
    for (name, at) in names.filter(|(name, _)| !name.is_empty()) {
        match seen.iter().find(|(other, _)| *other == name) {
            Some((_, first)) => {
                let message = format!("{what} \"{name}\" is there twice");
                let help =
                    format!("the first is in line {}: give one of them another name", source.line(*first));
                found.errors.push(source.problem(at, message, help));
            }
            None => seen.push((name, at)),
        }
    }
}

/// Steering by CPU promises that a packet is served where it arrived.
fn unpinned_workers(file: &File, source: &Source, found: &mut Found) {
    let by_cpu = |read: &&ReadListener| read.listener.steering == Steering::Cpu;
    for read in file.listeners.iter().filter(by_cpu).filter(|_| !file.daemon.pin_workers) {
        let name = called("listener", &read.listener.name);
        let message = format!("{name} steers by cpu, but workers may run on any CPU");
        let help = "add pin_workers = true to [daemon], or use steering = \"hash\"";
        found.warnings.push(source.problem(read.at, message, help));
    }
}

/// Every pair of addresses is looked at once; a later one is what is wrong.
fn overlapping_addresses(listeners: &[ReadListener], source: &Source, found: &mut Found) {
    let mut seen: Vec<(&Listener, SocketAddr, usize)> = Vec::new();
    for read in listeners {
        for (address, at) in read.listener.bind.iter().zip(&read.bind_at) {
            let earlier = seen.iter().find_map(|(other, taken, first)| {
                let clash = may_meet(other, &read.listener).then(|| overlap(*taken, *address))??;
                Some((clash, *taken, source.line(*first)))
            });
            if let Some((clash, taken, line)) = earlier {
                found.errors.push(clash.problem(*address, taken, line, *at, source));
            }
            seen.push((&read.listener, *address, *at));
        }
    }
}

/// Sockets of two modes never meet, nor those of two interfaces.
fn may_meet(a: &Listener, b: &Listener) -> bool {
    let interfaces_meet = match (&a.interface, &b.interface) {
        (Some(a), Some(b)) => a == b,
        _ => true,
    };
    a.mode == b.mode && interfaces_meet
}

/// How two addresses overlap.
enum Overlap {
    Same,
    /// One of them is the wildcard.
    Wildcard,
}

fn overlap(a: SocketAddr, b: SocketAddr) -> Option<Overlap> {
    if a == b {
        return Some(Overlap::Same);
    }
    // An IPv6 bind is IPv6 only, so the families never meet.
    let comparable = a.port() == b.port() && a.is_ipv4() == b.is_ipv4();
    (comparable && (a.ip().is_unspecified() || b.ip().is_unspecified())).then_some(Overlap::Wildcard)
}

impl Overlap {
    fn problem(
        &self,
        address: SocketAddr,
        taken: SocketAddr,
        line: usize,
        at: usize,
        source: &Source,
    ) -> Problem {
        match self {
            Self::Same => {
                let help = format!("it is in line {line} already: take one of them out");
                source.problem(at, format!("{address} is bound twice"), help)
            }
            Self::Wildcard => {
                let specific = if address.ip().is_unspecified() { taken } else { address };
                let message = format!("{address} overlaps {taken} of line {line}");
                let help = format!(
                    "the kernel gives all traffic for {specific} to the socket of that very address: bind either all or single addresses on port {}",
                    address.port()
                );
                source.problem(at, message, help)
            }
        }
    }
}

/// Multicast groups among the addresses of a listener, and where to join them.
fn groups(read: &ReadListener, source: &Source, found: &mut Found) {
    let listener = &read.listener;
    let group = |bind: &SocketAddr| bind.ip().is_multicast();
    for (bind, at) in listener.bind.iter().zip(&read.bind_at) {
        if group(bind) && listener.mode == Mode::Tcp {
            let help = "a TCP listener takes an address of this host; groups are for mode \"udp\"";
            found.errors.push(source.problem(*at, format!("bind = \"{bind}\" is a group address"), help));
        }
    }
    let Some(interface) = &listener.udp.multicast_interface else { return };
    let called = called("listener", &listener.name);
    if !listener.bind.iter().any(group) && !listener.bind.is_empty() {
        let message = format!("{called} has a multicast_interface and binds no group");
        let help =
            "take it out, or bind a group like \"239.1.1.1:5000\"; for other addresses there is `interface`";
        found.errors.push(source.problem(read.at, message, help));
    }
    let v6 = listener.bind.iter().find(|bind| group(bind) && bind.is_ipv6());
    if let (MulticastInterface::Address(address), Some(v6)) = (interface, v6) {
        let message = format!("{called} cannot join {v6} on the interface of {address}");
        let help = "IPv6 groups are joined by an interface's name: write it, like \"eth0\"";
        found.errors.push(source.problem(read.at, message, help));
    }
}

/// A listener that requires a PROXY header takes it from somebody.
fn proxied(read: &ReadListener, source: &Source, found: &mut Found) {
    let tcp = &read.listener.tcp;
    if tcp.accept_proxy == AcceptProxy::On && tcp.trusted.is_empty() {
        let message = format!(
            "{} has accept_proxy = \"on\" and trusts nobody",
            called("listener", &read.listener.name)
        );
        let help = "name the load balancers in front: trusted = [\"10.0.0.0/8\"]";
        found.errors.push(source.problem(read.at, message, help));
    }
}

/// Checks that could never say anything.
fn checked(read: &ReadUpstream, users: &[&Listener], source: &Source, found: &mut Found) {
    let health = &read.upstream.health;
    let upstream = called("upstream", &read.upstream.name);
    let udp = users.iter().any(|user| user.mode == Mode::Udp);
    let mut wrong = |message: String, help: &str| found.errors.push(source.problem(read.at, message, help));
    match health.check {
        Check::Command if health.command.is_empty() => {
            wrong(
                format!("{upstream} has check = \"command\" and no command"),
                "write command = [\"/path/of/program\"]",
            );
        }
        Check::Exchange if udp && (health.send.is_empty() || health.expect.is_empty()) => {
            let help = "a datagram has to be sent and answered: write both send and expect";
            wrong(format!("{upstream} has check = \"exchange\" for udp without send and expect"), help);
        }
        Check::Exchange if health.send.is_empty() && health.expect.is_empty() => {
            let help = "write send, expect or both; to connect alone is check = \"connect\"";
            wrong(format!("{upstream} has check = \"exchange\" without send and expect"), help);
        }
        Check::Http if health.expect_status.is_empty() => {
            let help = "write expect_status = [\"200-399\"]";
            wrong(format!("{upstream} has check = \"http\" and expects no status"), help);
        }
        _ => {}
    }
}

/// PROXY headers and Unix sockets, by the modes of the listeners in front.
fn told_of_clients(read: &ReadUpstream, users: &[&Listener], source: &Source, found: &mut Found) {
    let upstream = called("upstream", &read.upstream.name);
    let udp = users.iter().find(|user| user.mode == Mode::Udp);
    if let (SendProxy::V1, Some(user)) = (read.upstream.send_proxy, udp) {
        let message =
            format!("{upstream} has send_proxy = \"v1\", and listener \"{}\" is of mode udp", user.name);
        let help = "version 1 of the PROXY protocol knows TCP alone: write \"v2\"";
        found.errors.push(source.problem(read.at, message, help));
    }
    let Some(user) = udp else { return };
    for (server, at) in read.upstream.servers.iter().zip(&read.server_at) {
        // An empty path is an address that was wrong already.
        if let ServerAddress::Unix(path) = &server.address
            && !path.as_os_str().is_empty()
        {
            let message =
                format!("{upstream} has a Unix socket, and listener \"{}\" is of mode udp", user.name);
            let help = "datagrams go to servers with an IP address: write \"10.0.0.1:53\"";
            found.errors.push(source.problem(*at, message, help));
        }
    }
}

fn servers(read: &ReadUpstream, users: &[&Listener], source: &Source, found: &mut Found) {
    let upstream = called("upstream", &read.upstream.name);
    let servers = &read.upstream.servers;
    if servers.is_empty() {
        let help = match users {
            [] => "add a [[upstream.server]] table, or take the upstream out".to_string(),
            [user, ..] => {
                format!("add a [[upstream.server]] table, or point listener \"{}\" elsewhere", user.name)
            }
        };
        found.errors.push(source.problem(read.at, format!("{upstream} has no servers"), help));
    } else if servers.iter().all(|server| server.weight == 0) {
        let message = format!("all servers of {upstream} have weight 0");
        let help = "nothing would ever be sent: give at least one a weight of 1 or more";
        found.errors.push(source.problem(read.at, message, help));
    }
    for (index, server) in servers.iter().enumerate() {
        // An empty path is an address that was wrong already.
        let known = server.address != ServerAddress::Unix("".into());
        if let Some(first) = servers[..index].iter().position(|other| other.address == server.address)
            && known
        {
            let message = format!("{upstream} has the server {} twice", server.address);
            let line = source.line(read.server_at[first]);
            let help = format!("it is in line {line} already: for a larger share give it a weight");
            found.errors.push(source.problem(read.server_at[index], message, help));
        }
    }
}

/// One address to leave from, not two.
fn leaving_from(read: &ReadUpstream, source: &Source, found: &mut Found) {
    let upstream = called("upstream", &read.upstream.name);
    if read.upstream.transparent && !read.upstream.source.is_empty() {
        let message = format!("{upstream} has both transparent = true and source");
        let help = "connections leave from the client's own address or from these: keep one of the two";
        found.errors.push(source.problem(read.at, message, help));
    }
}

/// A server that is the very listener which would connect to it.
fn loops(read: &ReadUpstream, users: &[&Listener], source: &Source, found: &mut Found) {
    for (server, at) in read.upstream.servers.iter().zip(&read.server_at) {
        let ServerAddress::Ip(address) = server.address else {
            continue;
        };
        let user = users.iter().find(|user| user.bind.iter().any(|bind| reaches(address, *bind)));
        if let Some(user) = user {
            let message = format!("server {address} is {} itself", called("listener", &user.name));
            let help = "every connection would go round in circles: write the server's own address";
            found.warnings.push(source.problem(*at, message, help));
        }
    }
}

/// Does a connect to `server` surely end at a socket bound to `bind`?
fn reaches(server: SocketAddr, bind: SocketAddr) -> bool {
    let loopback_of_wildcard = bind.ip().is_unspecified()
        && server.ip().is_loopback()
        && matches!(
            (server.ip(), bind.ip()),
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_))
        );
    server.port() == bind.port() && (server.ip() == bind.ip() || loopback_of_wildcard)
}
