//! Holds the readings of a host against a configuration. Pure.

use std::collections::BTreeSet;

use crate::config::{Config, Listener, Target, Workers};

use super::{Finding, Host, Level, Remedy};

/// Descriptors of a process that carry no session: listeners, pipes, logs.
const OWN_DESCRIPTORS: u64 = 128;
/// Capability numbers (linux/capability.h).
const CAP_NET_BIND_SERVICE: u32 = 10;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;
/// The oldest kernel that is supported.
const OLDEST: (u32, u32) = (5, 10);
/// The backlog of a listener that names none.
const DEFAULT_BACKLOG: u32 = 4096;

/// Every limit, in a fixed order.
pub fn judge(host: &Host, config: Option<&Config>) -> Vec<Finding> {
    let load = Load::new(host, config);
    let mut findings = vec![kernel(host), open_files(host, &load), accept_queue(host, config)];
    findings.push(outgoing_ports(host, config, &load));
    findings.push(listening_ports(host, config));
    findings.push(low_ports(host, config));
    findings.push(buffers(host, config));
    findings.push(conntrack(host, &load));
    findings.push(migrate_req(host));
    findings.push(bpf(host));
    findings.extend(fast_open(host, config));
    findings.push(udp_offloads(host));
    findings
}

/// What the configuration asks of the host.
struct Load {
    workers: u64,
    /// Sockets of a session: two, or one where the worker itself answers.
    session_sockets: u64,
    /// Sessions at once; 0 = as many as there is room for.
    wanted: u64,
    /// Sessions that the open-file limit has room for, if it is known.
    room: Option<u64>,
}

impl Load {
    fn new(host: &Host, config: Option<&Config>) -> Load {
        let workers = match config.map(|config| config.daemon.workers) {
            Some(Workers::Count(count)) => count.max(1),
            Some(Workers::Auto) | None => host.cpus.max(1),
        } as u64;
        let balances = |listener: &Listener| matches!(listener.target, Target::Upstream(_));
        let session_sockets = match config {
            Some(config) if !config.listeners.iter().any(balances) => 1,
            _ => 2,
        };
        let room = host
            .open_files
            .map(|(_, hard)| hard.saturating_sub(OWN_DESCRIPTORS).saturating_mul(workers) / session_sockets);
        let wanted = config.map_or(0, |config| config.daemon.max_connections);
        Load { workers, session_sockets, wanted, room }
    }

    /// Sessions to reckon with.
    fn sessions(&self) -> Option<u64> {
        if self.wanted > 0 { Some(self.wanted) } else { self.room }
    }

    /// Descriptors of one worker for all the sessions wanted. A quarter more
    /// than the mean, because the kernel's hash does not deal evenly.
    fn descriptors(&self) -> u64 {
        let mean = self.wanted.div_ceil(self.workers).saturating_mul(self.session_sockets);
        mean.saturating_add(mean / 4).saturating_add(OWN_DESCRIPTORS)
    }
}

fn finding(name: &'static str, level: Level, found: String, cost: &str, remedy: Vec<Remedy>) -> Finding {
    Finding { name, level, found, cost: cost.into(), remedy }
}

fn unknown(name: &'static str, file: &str) -> Finding {
    finding(name, Level::Unknown, format!("{file} cannot be read here"), "", Vec::new())
}

fn sysctl(line: String) -> Vec<Remedy> {
    vec![Remedy::Sysctl(line)]
}

fn listeners(config: Option<&Config>) -> &[Listener] {
    config.map(|config| config.listeners.as_slice()).unwrap_or_default()
}

fn kernel(host: &Host) -> Finding {
    let Some(version) = host.version() else {
        return unknown("kernel", "/proc/sys/kernel/osrelease");
    };
    let found = host.kernel.clone().unwrap_or_default();
    if version < OLDEST {
        let words = Remedy::Words(format!("use Linux {}.{} or newer", OLDEST.0, OLDEST.1));
        return finding("kernel", Level::Short, found, "older than what is supported", vec![words]);
    }
    finding("kernel", Level::Ok, found, "", Vec::new())
}

fn open_files(host: &Host, load: &Load) -> Finding {
    const NAME: &str = "open files";
    let (Some((soft, hard)), Some(room)) = (host.open_files, load.room) else {
        return unknown(NAME, "RLIMIT_NOFILE");
    };
    let found =
        format!("up to {hard} a process (now {soft}, which the daemon raises), {} workers", load.workers);
    let each = load.session_sockets;
    let needed = load.descriptors();
    if load.wanted == 0 || needed <= hard {
        let cost = format!("room for about {room} sessions of {each} sockets");
        return finding(NAME, Level::Ok, found, &cost, Vec::new());
    }
    let cost = format!(
        "max_connections = {} wants {needed} in each worker; there is room for about {room}, the rest is shed",
        load.wanted
    );
    let mut remedy = vec![Remedy::Unit(format!("LimitNOFILE={needed}"))];
    if host.nr_open.is_some_and(|most| needed > most) {
        remedy.push(Remedy::Sysctl(format!("fs.nr_open = {needed}")));
    }
    finding(NAME, Level::Short, found, &cost, remedy)
}

fn accept_queue(host: &Host, config: Option<&Config>) -> Finding {
    const NAME: &str = "accept queue";
    let Some(most) = host.somaxconn else {
        return unknown(NAME, "/proc/sys/net/core/somaxconn");
    };
    let found = format!("net.core.somaxconn = {most}");
    let cut: Vec<&Listener> = listeners(config).iter().filter(|l| u64::from(l.backlog) > most).collect();
    let wanted = match config {
        Some(_) => cut.iter().map(|listener| listener.backlog).max(),
        None => (u64::from(DEFAULT_BACKLOG) > most).then_some(DEFAULT_BACKLOG),
    };
    let Some(wanted) = wanted else {
        return finding(NAME, Level::Ok, found, "", Vec::new());
    };
    let cost = format!(
        "the backlog of {wanted}{} is cut to {most} in each worker: a burst past it is dropped, and its clients try \
         again a second later",
        of(&cut)
    );
    finding(NAME, Level::Short, found, &cost, sysctl(format!("net.core.somaxconn = {wanted}")))
}

/// ` of listener "web" and 2 more`
fn of(listeners: &[&Listener]) -> String {
    match listeners {
        [] => String::new(),
        [one] => format!(" of listener {:?}", one.name),
        [one, others @ ..] => format!(" of listener {:?} and {} more", one.name, others.len()),
    }
}

fn outgoing_ports(host: &Host, config: Option<&Config>, load: &Load) -> Finding {
    const NAME: &str = "outgoing ports";
    let Some(range) = &host.port_range else {
        return unknown(NAME, "/proc/sys/net/ipv4/ip_local_port_range");
    };
    let count = range.len() as u64;
    let found = format!("{} to {}, {count} for each server", range.start(), range.end());
    // All sessions may be of the upstream with the fewest servers.
    let upstreams = config.map(|config| config.upstreams.as_slice()).unwrap_or_default();
    let fewest = upstreams.iter().min_by_key(|upstream| upstream.servers.len());
    let (Some(upstream), Some(sessions)) = (fewest, load.sessions()) else {
        return finding(NAME, Level::Ok, found, "", Vec::new());
    };
    let servers = upstream.servers.len().max(1) as u64;
    if sessions <= count.saturating_mul(servers) {
        return finding(NAME, Level::Ok, found, "", Vec::new());
    }
    let cost = format!(
        "upstream {:?} can have {} sessions from one address of ours, {sessions} may come: connects past it fail",
        upstream.name,
        count.saturating_mul(servers)
    );
    let mut remedy = Vec::new();
    if count < 64_000 {
        remedy.push(Remedy::Sysctl("net.ipv4.ip_local_port_range = 1024 65535".into()));
    }
    remedy.push(Remedy::Words("more servers, more addresses in source, or a lower max_connections".into()));
    finding(NAME, Level::Short, found, &cost, remedy)
}

/// Ports of listeners that the kernel may lend to outgoing connections.
fn listening_ports(host: &Host, config: Option<&Config>) -> Finding {
    const NAME: &str = "listening ports";
    let Some(range) = &host.port_range else {
        return unknown(NAME, "/proc/sys/net/ipv4/ip_local_port_range");
    };
    let reserved = |port: &u16| host.reserved_ports.iter().any(|range| range.contains(port));
    let ports = listeners(config).iter().flat_map(|listener| &listener.bind).map(|address| address.port());
    let lent: BTreeSet<u16> = ports.filter(|port| range.contains(port) && !reserved(port)).collect();
    if lent.is_empty() {
        let found = "none of ours is lent to outgoing connections".into();
        return finding(NAME, Level::Ok, found, "", Vec::new());
    }
    let list: Vec<String> = lent.iter().map(u16::to_string).collect();
    let list = list.join(",");
    let mut line = String::from("net.ipv4.ip_local_reserved_ports = ");
    for range in &host.reserved_ports {
        line.push_str(&format!("{}-{},", range.start(), range.end()));
    }
    line.push_str(&list);
    finding(
        NAME,
        Level::Short,
        format!("{list} in ip_local_port_range ({} to {})", range.start(), range.end()),
        "an outgoing connection of any program may hold the port when we start: address already in use",
        sysctl(line),
    )
}

fn low_ports(host: &Host, config: Option<&Config>) -> Finding {
    const NAME: &str = "low ports";
    let Some(start) = host.unprivileged_port_start else {
        return unknown(NAME, "/proc/sys/net/ipv4/ip_unprivileged_port_start");
    };
    let found = format!("below {start} CAP_NET_BIND_SERVICE is needed");
    let ports = listeners(config).iter().flat_map(|listener| &listener.bind).map(|address| address.port());
    let low: Vec<u16> = ports.filter(|port| *port != 0 && u64::from(*port) < start).collect();
    match (low.iter().min(), host.capable(CAP_NET_BIND_SERVICE)) {
        (None, _) | (Some(_), Some(true)) => finding(NAME, Level::Ok, found, "", Vec::new()),
        (Some(port), _) => finding(
            NAME,
            Level::Short,
            found,
            &format!("this shell lacks it: port {port} would be refused (permission denied)"),
            vec![
                Remedy::Unit("AmbientCapabilities=CAP_NET_BIND_SERVICE".into()),
                Remedy::Sysctl(format!("net.ipv4.ip_unprivileged_port_start = {port}")),
            ],
        ),
    }
}

fn buffers(host: &Host, config: Option<&Config>) -> Finding {
    const NAME: &str = "socket buffers";
    let (Some(rmem), Some(wmem)) = (host.rmem_max, host.wmem_max) else {
        return unknown(NAME, "/proc/sys/net/core/{rmem,wmem}_max");
    };
    let largest = |pick: fn(&Listener) -> Option<u64>| listeners(config).iter().filter_map(pick).max();
    let receive = largest(|listener| listener.receive_buffer).filter(|bytes| *bytes > rmem);
    let send = largest(|listener| listener.send_buffer).filter(|bytes| *bytes > wmem);
    let found = format!("rmem_max = {rmem}, wmem_max = {wmem}");
    let mut costs = Vec::new();
    let mut remedy = Vec::new();
    if let Some(bytes) = receive {
        costs.push(format!("receive_buffer of {bytes} bytes is cut to {rmem}"));
        remedy.push(Remedy::Sysctl(format!("net.core.rmem_max = {bytes}")));
    }
    if let Some(bytes) = send {
        costs.push(format!("send_buffer of {bytes} bytes is cut to {wmem}"));
        remedy.push(Remedy::Sysctl(format!("net.core.wmem_max = {bytes}")));
    }
    let level = if costs.is_empty() { Level::Ok } else { Level::Short };
    finding(NAME, level, found, &costs.join("; "), remedy)
}

fn conntrack(host: &Host, load: &Load) -> Finding {
    const NAME: &str = "conntrack";
    let Some(most) = host.conntrack_max else {
        return finding(NAME, Level::Ok, "not loaded, or hidden here".into(), "", Vec::new());
    };
    let used = host.conntrack_count.unwrap_or(0);
    let found = format!("{used} of {most} entries used");
    // One entry for each socket of a session.
    let wanted = load.sessions().map(|sessions| sessions.saturating_mul(load.session_sockets));
    match wanted.filter(|wanted| wanted.saturating_add(used) > most) {
        None => finding(NAME, Level::Ok, found, "", Vec::new()),
        Some(wanted) => finding(
            NAME,
            Level::Short,
            found,
            &format!(
                "if the firewall tracks our traffic, {wanted} entries are wanted: past the limit packets are dropped"
            ),
            vec![
                Remedy::Sysctl(format!("net.netfilter.nf_conntrack_max = {}", wanted.saturating_add(used))),
                Remedy::Words("or leave our ports untracked: nft ... tcp dport PORT notrack".into()),
            ],
        ),
    }
}

fn migrate_req(host: &Host) -> Finding {
    const NAME: &str = "tcp_migrate_req";
    match host.migrate_req {
        None => unknown(NAME, "/proc/sys/net/ipv4/tcp_migrate_req"),
        Some(0) => finding(
            NAME,
            Level::Ok,
            "off".into(),
            "not needed: the supervisor keeps each accept queue alive over the death of its worker",
            Vec::new(),
        ),
        Some(_) => finding(
            NAME,
            Level::Note,
            "on".into(),
            "queued connections of a closed listener may go to any program of the same user on that port",
            sysctl("net.ipv4.tcp_migrate_req = 0".into()),
        ),
    }
}

fn bpf(host: &Host) -> Finding {
    const NAME: &str = "BPF";
    let may = host.capable(CAP_BPF).zip(host.capable(CAP_SYS_ADMIN)).map(|(bpf, admin)| bpf || admin);
    match may {
        None => unknown(NAME, "/proc/self/status"),
        Some(true) => finding(NAME, Level::Ok, "may load a steering program".into(), "", Vec::new()),
        Some(false) => finding(
            NAME,
            Level::Note,
            "may not load a steering program".into(),
            "steering falls back to classic BPF or the kernel's hash: UDP flows move when the number of workers changes",
            vec![Remedy::Unit("AmbientCapabilities=CAP_BPF".into())],
        ),
    }
}

/// Only worth a word where a listener wants it.
fn fast_open(host: &Host, config: Option<&Config>) -> Option<Finding> {
    const NAME: &str = "fast open";
    const SERVER: u64 = 2;
    let wants: Vec<&Listener> = listeners(config).iter().filter(|listener| listener.tcp.fast_open).collect();
    if wants.is_empty() {
        return None;
    }
    Some(match host.fast_open {
        None => unknown(NAME, "/proc/sys/net/ipv4/tcp_fastopen"),
        Some(bits) if bits & SERVER != 0 => {
            finding(NAME, Level::Ok, format!("net.ipv4.tcp_fastopen = {bits}"), "", Vec::new())
        }
        Some(bits) => finding(
            NAME,
            Level::Short,
            format!("net.ipv4.tcp_fastopen = {bits}"),
            &format!("fast_open{} has no effect: the kernel takes no data with a SYN", of(&wants)),
            sysctl(format!("net.ipv4.tcp_fastopen = {}", bits | SERVER)),
        ),
    })
}

fn udp_offloads(host: &Host) -> Finding {
    const NAME: &str = "UDP offloads";
    let has = |has: bool| if has { "yes" } else { "no" };
    match host.udp_offloads {
        None => unknown(NAME, "a UDP socket's options"),
        Some((segment, gro)) => {
            let found = format!("UDP_SEGMENT {}, UDP_GRO {}", has(segment), has(gro));
            let (level, cost) = match segment && gro {
                true => (Level::Ok, ""),
                false => {
                    (Level::Note, "one system call a datagram in bursts; a newer kernel has both (Linux 5.0)")
                }
            };
            finding(NAME, level, found, cost, Vec::new())
        }
    }
}
