//! Every key of the file, one line each: its name, its default, its kind.
//!
//! To add a key, give the type in `config` a field, read it here, and name it
//! in `config/reference.toml`; a test holds the two together. An enum's words
//! are in `words`, what a value looks like is in `kinds`, and what concerns
//! several values at once is in `checks`.

use std::time::Duration;

use super::kinds::*;
use super::problem::called;
use super::reader::Table;
use super::suggest::did_you_mean;
use super::value::{At, Value, Wrong};
use super::{
    Access, Daemon, Health, Limits, Listener, Log, Mode, Server, ServerAddress, Service, Target, Tcp, Udp,
    Upstream,
};

/// No timeout is longer; a deadline then fits every clock and timer.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);
/// TCP_KEEPIDLE takes at most 32767 seconds (tcp(7), MAX_TCP_KEEPIDLE).
const LONGEST_KEEPALIVE: Duration = Duration::from_secs(32_767);
/// TCP_USER_TIMEOUT is an int of milliseconds.
const LONGEST_USER_TIMEOUT: Duration = Duration::from_millis(i32::MAX as u64);
/// Below 4 KiB a socket hardly works; the kernel doubles the number, so that
/// 512 MiB is the largest round one that its int takes.
const BUFFER_BYTES: std::ops::RangeInclusive<u64> = 4096..=512 << 20;
/// Below this a loaded machine's scheduling looks like a hang.
const SHORTEST_HANG: Duration = Duration::from_millis(100);
/// A check is a connection to a server; more of them would be load.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);
const MILLISECOND: Duration = Duration::from_millis(1);

/// The file as it was read, with the places that `checks` speaks of.
pub(super) struct File {
    pub(super) daemon: Daemon,
    pub(super) log: Log,
    pub(super) listeners: Vec<ReadListener>,
    pub(super) upstreams: Vec<ReadUpstream>,
}

/// A listener, where its name stands, and where each address stands.
pub(super) struct ReadListener {
    pub(super) listener: Listener,
    pub(super) at: usize,
    pub(super) bind_at: Vec<usize>,
}

/// An upstream, where its name stands, and where each server's address stands.
pub(super) struct ReadUpstream {
    pub(super) upstream: Upstream,
    pub(super) at: usize,
    pub(super) server_at: Vec<usize>,
}

pub(super) fn file(t: &mut Table) -> File {
    let daemon = t.table("daemon", daemon);
    let log = t.table("log", log);
    // Before the listeners, which refer to them.
    let glance = t.glance("listener", ["mode", "upstream"]);
    let of_udp = glance.iter().filter(|[mode, _]| *mode == Some("udp"));
    let udp_upstreams: Vec<&str> = of_udp.filter_map(|[_, upstream]| *upstream).collect();
    let upstreams = t.tables("upstream", |t| upstream(t, &udp_upstreams));
    let names: Vec<&str> = upstreams.iter().map(|read| read.upstream.name.as_str()).collect();
    let listeners = t.tables("listener", |t| listener(t, &names));
    File { daemon, log, listeners, upstreams }
}

fn daemon(t: &mut Table) -> Daemon {
    Daemon {
        workers: t.read("workers", "auto", workers),
        pin_workers: t.read("pin_workers", false, boolean),
        user: t.optional("user", account).map(At::into_value),
        group: t.optional("group", account).map(At::into_value),
        control_socket: t.optional("control_socket", socket_path).map(At::into_value),
        max_connections: t.read("max_connections", 0, number(0..=1_000_000_000)),
        hang_timeout: t.read("hang_timeout", "2s", duration(SHORTEST_HANG..=LONGEST)),
        crash_proof: t.read("crash_proof", true, boolean),
        orphan_timeout: t.read("orphan_timeout", "10s", duration(Duration::ZERO..=LONGEST)),
        on_stop: t.read("on_stop", "drain", word),
        admin: t.optional("admin", admin_address).map(At::into_value),
        drain_timeout: t.read("drain_timeout", "30s", duration(Duration::ZERO..=LONGEST)),
        share_ports: t.read("share_ports", false, boolean),
    }
}

fn log(t: &mut Table) -> Log {
    Log {
        level: t.read("level", "info", word),
        format: t.read("format", "text", word),
        access: t.read("access", "off", access_log),
    }
}

fn listener(t: &mut Table, upstreams: &[&str]) -> ReadListener {
    let (name, at) = required_name(t);
    let bind = t.required_list("bind", "\"0.0.0.0:8080\"", bind_address);
    let mode = t.required("mode", "\"tcp\"", word).map_or(Mode::Tcp, At::into_value);
    other_modes_keys(t, &name, mode);
    let listener = Listener {
        bind: bind.iter().map(|bind| bind.value).collect(),
        mode,
        target: target(t, &name, at, upstreams),
        steering: t.read("steering", "hash", steering(mode)),
        backlog: t.read("backlog", 4096, number(1..=65_535)),
        receive_buffer: t.read("receive_buffer", "auto", auto_or_size(BUFFER_BYTES)),
        send_buffer: t.read("send_buffer", "auto", auto_or_size(BUFFER_BYTES)),
        interface: t.optional("interface", interface).map(At::into_value),
        transparent: t.read("transparent", false, boolean),
        freebind: t.read("freebind", false, boolean),
        tcp: t.table_where(mode == Mode::Tcp, "tcp", tcp),
        udp: t.table_where(mode == Mode::Udp, "udp", udp),
        limits: t.table("limits", limits),
        access: t.table("access", access),
        name,
    };
    ReadListener { listener, at, bind_at: bind.iter().map(|bind| bind.at).collect() }
}

/// A table that would have no effect is refused, not ignored.
fn other_modes_keys(t: &mut Table, name: &str, mode: Mode) {
    let (other, mode) = match mode {
        Mode::Tcp => ("udp", "tcp"),
        Mode::Udp => ("tcp", "udp"),
    };
    if let Some(at) = t.place_of(other) {
        let listener = called("listener", name);
        let message = format!("[listener.{other}] stands in {listener}, which has mode \"{mode}\"");
        t.problem(at, message, "take it out, or change the mode");
    }
}

/// `upstream` or `service`: exactly one of them.
fn target(t: &mut Table, name: &str, at: usize, upstreams: &[&str]) -> Target {
    let listener = called("listener", name);
    let (has_upstream, has_service) = (t.has("upstream"), t.has("service"));
    let upstream = t.optional("upstream", |value| upstream_named(value, upstreams));
    let service = t.optional("service", word::<Service>);
    if has_upstream && has_service {
        t.problem(at, format!("{listener} has both upstream and service"), "keep one of the two");
    }
    if !has_upstream && !has_service {
        let help = "add upstream = \"NAME\", or service = \"echo\"";
        t.problem(at, format!("{listener} has neither upstream nor service"), help);
    }
    match (upstream, service) {
        (Some(upstream), _) => Target::Upstream(upstream.value),
        (None, Some(service)) => Target::Service(service.value),
        // There is a problem already.
        (None, None) => Target::Service(Service::Discard),
    }
}

fn tcp(t: &mut Table) -> Tcp {
    Tcp {
        idle_timeout: t.read("idle_timeout", "1h", duration(Duration::ZERO..=LONGEST)),
        half_close_timeout: t.read("half_close_timeout", "1m", duration(Duration::ZERO..=LONGEST)),
        max_age: t.read("max_age", "0s", duration(Duration::ZERO..=LONGEST)),
        keepalive: t.read("keepalive", "1m", whole_seconds(Duration::ZERO..=LONGEST_KEEPALIVE)),
        user_timeout: t.read("user_timeout", "0s", duration(Duration::ZERO..=LONGEST_USER_TIMEOUT)),
        fast_open: t.read("fast_open", false, boolean),
        defer_accept: t.read("defer_accept", false, boolean),
        accept_proxy: t.read("accept_proxy", "off", word),
        trusted: t.optional_list("trusted", network),
    }
}

fn limits(t: &mut Table) -> Limits {
    Limits {
        max_connections: t.read("max_connections", 0, number(0..=1_000_000_000)),
        per_source: t.read("per_source", 0, number(0..=1_000_000_000)),
        rate_per_source: t.read("rate_per_source", 0, number(0..=1_000_000)),
    }
}

fn access(t: &mut Table) -> Access {
    Access { allow: t.list("allow", &[], network), deny: t.list("deny", &[], network) }
}

fn udp(t: &mut Table) -> Udp {
    Udp {
        idle_timeout: t.read("idle_timeout", "60s", duration(MILLISECOND..=LONGEST)),
        replies: t.read("replies", 0, number(0..=1_000_000_000)),
        max_flows: t.read("max_flows", 65_536, number(1..=1_000_000_000)),
        quarantine: t.read("quarantine", "30s", duration(Duration::ZERO..=LONGEST)),
        stale_after: t.read("stale_after", "1s", duration(Duration::ZERO..=LONGEST)),
        multicast: t.read("multicast", "partition", word),
        multicast_interface: t.optional("multicast_interface", multicast_interface).map(At::into_value),
    }
}

fn upstream(t: &mut Table, udp_upstreams: &[&str]) -> ReadUpstream {
    let (name, at) = required_name(t);
    let balance = t.read("balance", "round-robin", word);
    let connect_timeout = t.read("connect_timeout", "3s", duration(MILLISECOND..=LONGEST));
    let retries = t.read("retries", 2, number(0..=16));
    let send_proxy = t.read("send_proxy", "off", word);
    let source = t.optional_list("source", source_address);
    let transparent = t.read("transparent", false, boolean);
    let all_down = t.read("all_down", "close", word);
    let on_down = t.read("on_down", "keep", word);
    let queue_timeout = t.read("queue_timeout", "5s", duration(Duration::ZERO..=LONGEST));
    let of_udp = udp_upstreams.contains(&name.as_str());
    let health = t.table("health", |t| health(t, of_udp));
    let servers = t.tables("server", server);
    let server_at = servers.iter().map(|server| server.at).collect();
    let servers = servers.into_iter().map(At::into_value).collect();
    let upstream = Upstream {
        balance,
        connect_timeout,
        retries,
        send_proxy,
        source,
        transparent,
        all_down,
        on_down,
        queue_timeout,
        health,
        servers,
        name,
    };
    ReadUpstream { upstream, at, server_at }
}

/// Where datagrams go there is hardly ever something to connect to.
fn health(t: &mut Table, of_udp: bool) -> Health {
    Health {
        check: t.read("check", if of_udp { "none" } else { "connect" }, word),
        port: t.read("port", 0, number(0..=65_535)),
        interval: t.read("interval", "2s", duration(SHORTEST_INTERVAL..=LONGEST)),
        timeout: t.read("timeout", "1s", duration(MILLISECOND..=LONGEST)),
        rise: t.read("rise", 2, number(1..=1000)),
        fall: t.read("fall", 3, number(1..=1000)),
        passive: t.read("passive", true, boolean),
        slow_start: t.read("slow_start", "0s", duration(Duration::ZERO..=LONGEST)),
        method: t.read("method", "GET", method),
        path: t.read("path", "/", http_path),
        host: t.read("host", "", http_host),
        expect_status: t.list("expect_status", &["200-399"], status_range),
        send: t.read("send", "", escaped_bytes),
        expect: t.read("expect", "", escaped_bytes),
        command: t.list("command", &[], argument),
    }
}

fn server(t: &mut Table) -> At<Server> {
    let address = t.required("address", "\"10.0.0.1:80\"", server_address);
    let at = address.as_ref().map_or(t.at(), |address| address.at);
    let value = Server {
        // Where it is missing there is a problem already.
        address: address.map_or(ServerAddress::Unix("".into()), At::into_value),
        weight: t.read("weight", 1, number(0..=256)),
        backup: t.read("backup", false, boolean),
        max_connections: t.read("max_connections", 0, number(0..=1_000_000_000)),
    };
    At { value, at }
}

/// The name and its place; an empty one where there is a problem already.
fn required_name(t: &mut Table) -> (String, usize) {
    match t.required("name", "\"web\"", name) {
        Some(name) => (name.value, name.at),
        None => (String::new(), t.at()),
    }
}

/// The number of the upstream with this name.
fn upstream_named(value: &Value, names: &[&str]) -> Result<usize, Wrong> {
    let Value::Text(typed) = value else {
        return Err(Wrong::new("is not a text", "write the name of an upstream in quotes"));
    };
    names.iter().position(|name| name == typed).ok_or_else(|| {
        let known: Vec<&str> = names.iter().copied().filter(|name| !name.is_empty()).collect();
        let all = match known.as_slice() {
            [] => "add an [[upstream]] table with this name".to_string(),
            known => format!("the upstreams are: {}", known.join(", ")),
        };
        Wrong::new("is not an upstream", did_you_mean(typed, &known, &all))
    })
}
