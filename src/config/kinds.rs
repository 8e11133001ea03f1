//! What values look like: each function takes a value of the file and gives
//! what it means, or says why it will not do and what would.
//!
//! Pure and bounded: nothing here reads a file, resolves a name or asks the
//! system.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use super::suggest::did_you_mean;
use super::value::{Value, Wrong};
use super::words::Word;
use super::{AccessLog, Mode, MulticastInterface, ServerAddress, StatusRange, Steering, Workers};
use crate::units::{UnitError, format_duration, format_size, parse_duration, parse_size};

/// `sun_path` holds 108 bytes and a final NUL (unix(7)).
const UNIX_PATH_BYTES: usize = 107;

/// IFNAMSIZ is 16 with the final NUL (netdevice(7)).
const INTERFACE_BYTES: usize = 15;

/// What a check sends or looks for is a greeting, not a load.
const EXCHANGE_BYTES: usize = 4096;

/// `"1h"`, within a range.
pub(super) fn duration(range: RangeInclusive<Duration>) -> impl Fn(&Value) -> Result<Duration, Wrong> {
    move |value| {
        let text = match value {
            Value::Text(text) => text,
            Value::Integer(number) => {
                let help = format!("say which unit, in quotes: \"{number}s\" or \"{number}ms\"");
                return Err(Wrong::new("has no unit", help));
            }
            _ => {
                return Err(Wrong::new("is not a duration", "write a text with a unit, like \"5s\""));
            }
        };
        let duration = parse_duration(text).map_err(|error| match error {
            UnitError::NoUnit => {
                Wrong::new("has no unit", "the units are ms, s, m, h, d: \"250ms\", \"5s\", \"1m30s\"")
            }
            UnitError::Malformed => Wrong::new(
                "is not a duration",
                "write whole numbers with ms, s, m, h or d: \"250ms\", \"5s\", \"1m30s\"",
            ),
            UnitError::Order => {
                Wrong::new("has its units out of order", "write the larger unit first, each once: \"1m30s\"")
            }
            UnitError::TooLarge => {
                Wrong::new("is too long", format!("at most \"{}\"", format_duration(*range.end())))
            }
        })?;
        let (least, most) = (format_duration(*range.start()), format_duration(*range.end()));
        if duration < *range.start() {
            return Err(Wrong::new("is too short", format!("write \"{least}\" to \"{most}\"")));
        }
        if duration > *range.end() {
            return Err(Wrong::new("is too long", format!("write \"{least}\" to \"{most}\"")));
        }
        Ok(duration)
    }
}

/// A duration that the kernel takes in whole seconds.
pub(super) fn whole_seconds(range: RangeInclusive<Duration>) -> impl Fn(&Value) -> Result<Duration, Wrong> {
    let any = duration(range);
    move |value| {
        let duration = any(value)?;
        if duration.subsec_nanos() != 0 {
            return Err(Wrong::new("has a fraction of a second", "the kernel takes whole seconds here"));
        }
        Ok(duration)
    }
}

/// `"auto"` (`None`) or a size within a range.
pub(super) fn auto_or_size(range: RangeInclusive<u64>) -> impl Fn(&Value) -> Result<Option<u64>, Wrong> {
    move |value| {
        let text = match value {
            Value::Text("auto") => return Ok(None),
            Value::Text(text) => text,
            Value::Integer(number) => {
                let help = format!("say which unit, in quotes: \"{number}B\" or \"{number}KiB\"");
                return Err(Wrong::new("has no unit", help));
            }
            _ => {
                return Err(Wrong::new("is not a size", "write \"auto\" or a size like \"64KiB\""));
            }
        };
        let (least, most) = (format_size(*range.start()), format_size(*range.end()));
        let bounds = || format!("write \"auto\", or \"{least}\" to \"{most}\"");
        let size = parse_size(text).map_err(|error| match error {
            UnitError::NoUnit => Wrong::new("has no unit", "the units are B, KiB, MiB, GiB: \"64KiB\""),
            UnitError::Malformed => Wrong::new(
                "is not a size",
                "write \"auto\", or a whole number with B, KiB, MiB or GiB: \"64KiB\"",
            ),
            UnitError::Order => {
                Wrong::new("has its units out of order", "write the larger unit first, each once")
            }
            UnitError::TooLarge => Wrong::new("is too large", bounds()),
        })?;
        match size {
            size if size < *range.start() => Err(Wrong::new("is too small", bounds())),
            size if size > *range.end() => Err(Wrong::new("is too large", bounds())),
            size => Ok(Some(size)),
        }
    }
}

/// A whole number within a range.
pub(super) fn number<T: TryFrom<i64>>(range: RangeInclusive<i64>) -> impl Fn(&Value) -> Result<T, Wrong> {
    move |value| {
        let bounds = || format!("write a number from {} to {}", range.start(), range.end());
        match value {
            Value::Integer(number) if range.contains(number) => {
                T::try_from(*number).map_err(|_| Wrong::new("is out of range", bounds()))
            }
            Value::Integer(_) => Err(Wrong::new("is out of range", bounds())),
            Value::Text(text) if text.parse::<i64>().is_ok() => {
                Err(Wrong::new("is a text", format!("write it without quotes: {text}")))
            }
            _ => Err(Wrong::new("is not a whole number", bounds())),
        }
    }
}

/// A way of steering that this mode knows.
pub(super) fn steering(mode: Mode) -> impl Fn(&Value) -> Result<Steering, Wrong> {
    move |value| match (word(value)?, mode) {
        (Steering::Random, Mode::Tcp) => Err(Wrong::new(
            "is for udp listeners",
            "a connection stays where its first packet went, and \"hash\" spreads connections as evenly: use \"hash\"",
        )),
        (steering, _) => Ok(steering),
    }
}

/// `true` or `false`.
pub(super) fn boolean(value: &Value) -> Result<bool, Wrong> {
    match value {
        Value::Boolean(yes) => Ok(*yes),
        Value::Text(text @ ("true" | "false")) => {
            Err(Wrong::new("is a text", format!("write it without quotes: {text}")))
        }
        _ => Err(Wrong::new("is neither true nor false", "write true or false, without quotes")),
    }
}

/// One of an enum's words.
pub(super) fn word<T: Word>(value: &Value) -> Result<T, Wrong> {
    let words: Vec<&str> = T::WORDS.iter().map(|(word, _)| *word).collect();
    let all = format!("write \"{}\"", words.join("\", or \""));
    let Value::Text(typed) = value else {
        return Err(Wrong::new("is not a word", all));
    };
    match T::WORDS.iter().find(|(word, _)| word == typed) {
        Some((_, value)) => Ok(*value),
        None => Err(Wrong::new("is not known", did_you_mean(typed, &words, &all))),
    }
}

/// `"auto"` or 1 to 64.
pub(super) fn workers(value: &Value) -> Result<Workers, Wrong> {
    let bounds = "write \"auto\" or a number from 1 to 64";
    match value {
        Value::Text("auto") => Ok(Workers::Auto),
        Value::Text(text) if text.parse::<i64>().is_err() => {
            Err(Wrong::new("is not known", did_you_mean(text, &["auto"], bounds)))
        }
        Value::Integer(_) | Value::Text(_) => match number(1..=64)(value) {
            Err(Wrong { message: message @ "is out of range", .. }) => Err(Wrong::new(message, bounds)),
            other => other.map(Workers::Count),
        },
        _ => Err(Wrong::new("is not a whole number", bounds)),
    }
}

/// The name of a listener or an upstream; it becomes a label of metrics.
pub(super) fn name(value: &Value) -> Result<String, Wrong> {
    let text = text(value)?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.len() > 64 || !text.chars().all(allowed) {
        return Err(Wrong::new("is not a name", "a name has 1 to 64 letters, digits, '-', '_' or '.'"));
    }
    Ok(text.to_string())
}

/// The name of a user or a group; who that is is asked at the start.
pub(super) fn account(value: &Value) -> Result<String, Wrong> {
    let text = text(value)?;
    let allowed = |c: char| c.is_ascii_graphic() && !":/,".contains(c);
    if text.is_empty() || text.len() > 32 || !text.chars().all(allowed) {
        return Err(Wrong::new(
            "is not the name of an account",
            "write a name as in /etc/passwd or /etc/group, or leave it out",
        ));
    }
    Ok(text.to_string())
}

/// The name of a network interface; whether it exists is asked at the start.
pub(super) fn interface(value: &Value) -> Result<String, Wrong> {
    let text = text(value)?;
    let allowed = |c: char| c.is_ascii_graphic() && c != '/';
    if text.is_empty() || text.len() > INTERFACE_BYTES || !text.chars().all(allowed) {
        return Err(Wrong::new(
            "is not an interface",
            "write its name of 1 to 15 bytes as `ip link` shows it, like \"eth0\"",
        ));
    }
    Ok(text.to_string())
}

/// Where a multicast group is joined: a name, or an address of it.
pub(super) fn multicast_interface(value: &Value) -> Result<MulticastInterface, Wrong> {
    let typed = text(value)?;
    if let Ok(address) = typed.parse::<Ipv4Addr>() {
        return Ok(MulticastInterface::Address(address));
    }
    if typed.parse::<std::net::Ipv6Addr>().is_ok() {
        return Err(Wrong::new("is an IPv6 address", "name the interface, like \"eth0\""));
    }
    interface(value).map(MulticastInterface::Name)
}

/// The path of a Unix socket.
pub(super) fn socket_path(value: &Value) -> Result<PathBuf, Wrong> {
    let text = text(value)?;
    if !text.starts_with('/') {
        return Err(Wrong::new("is not an absolute path", "start it with \"/\""));
    }
    if text.len() > UNIX_PATH_BYTES {
        return Err(Wrong::new(
            "is too long",
            format!("the path of a socket has at most {UNIX_PATH_BYTES} bytes"),
        ));
    }
    if text.contains('\0') || text.ends_with('/') {
        return Err(Wrong::new(
            "is not the path of a file",
            "write the path of a socket, like \"/run/evenkeel/control.sock\"",
        ));
    }
    Ok(PathBuf::from(text))
}

/// An address that a listener can bind; whether a group will do is the mode's
/// matter, in `checks`.
pub(super) fn bind_address(value: &Value) -> Result<SocketAddr, Wrong> {
    let text = text(value)?;
    if let Some(port) = port_alone(text.strip_prefix('*').unwrap_or(text)) {
        let help = format!("for every address write \"0.0.0.0:{port}\", \"[::]:{port}\", or both in a list");
        return Err(Wrong::new("has no address", help));
    }
    let address = socket_address(text, "0.0.0.0:8080")?;
    if address.port() == 0 {
        return Err(Wrong::new("has port 0", "write the port that clients connect to, 1 to 65535"));
    }
    let ip = address.ip();
    if ip == Ipv4Addr::BROADCAST {
        return Err(Wrong::new("is the broadcast address", "a listener takes an address of this host"));
    }
    if let SocketAddr::V6(v6) = address
        && let Some(v4) = v6.ip().to_ipv4_mapped()
    {
        let help = format!("an IPv6 bind is IPv6 only: write \"{v4}:{}\"", v6.port());
        return Err(Wrong::new("is an IPv4 address within IPv6", help));
    }
    Ok(address)
}

/// Where a server is: `ip:port`, `unix:/path`, `name:port` or `srv:name`.
pub(super) fn server_address(value: &Value) -> Result<ServerAddress, Wrong> {
    let text = text(value)?;
    if let Some(path) = text.strip_prefix("unix:") {
        return socket_path(&Value::Text(path)).map(ServerAddress::Unix);
    }
    if text.starts_with('/') {
        return Err(Wrong::new("is a path", "put \"unix:\" in front of it"));
    }
    if let Some(port) = port_alone(text) {
        return Err(Wrong::new(
            "has no host",
            format!("write the address in front of the port: \"10.0.0.1:{port}\""),
        ));
    }
    if let Some(name) = text.strip_prefix("srv:") {
        return srv_name(name).map(ServerAddress::Srv);
    }
    if let Some(named) = named_server(text)? {
        return Ok(named);
    }
    let address = socket_address(text, "10.0.0.1:80")?;
    if address.port() == 0 {
        return Err(Wrong::new("has port 0", "write the server's port, 1 to 65535"));
    }
    let ip = address.ip();
    if ip.is_unspecified() || ip.is_multicast() || ip == Ipv4Addr::BROADCAST {
        return Err(Wrong::new("is not the address of one host", "write the server's own address"));
    }
    Ok(ServerAddress::Ip(address))
}

/// `name:port`, or nothing where the host is no name.
fn named_server(text: &str) -> Result<Option<ServerAddress>, Wrong> {
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    if !is_host_name(host) {
        return Ok(None);
    }
    match port.parse() {
        Ok(0) => Err(Wrong::new("has port 0", "write the server's port, 1 to 65535")),
        Ok(port) => Ok(Some(ServerAddress::Name { host: host.to_ascii_lowercase(), port })),
        Err(_) if port.is_empty() => Err(Wrong::new(
            "has no port",
            format!("write \"{host}:PORT\", or \"srv:_service._tcp.{host}\" where SRV records tell it"),
        )),
        Err(_) => Err(Wrong::new("has a wrong port", "a port is a number from 1 to 65535")),
    }
}

/// The name that SRV records are asked of.
fn srv_name(name: &str) -> Result<String, Wrong> {
    let mut labels = name.split('.');
    let underscored =
        |label: Option<&str>| label.is_some_and(|label| label.len() > 1 && label.starts_with('_'));
    let rest = name.splitn(3, '.').nth(2).unwrap_or_default();
    if underscored(labels.next()) && underscored(labels.next()) && is_host_name(rest) {
        return Ok(name.to_ascii_lowercase());
    }
    Err(Wrong::new("is not the name of SRV records", "write \"srv:_http._tcp.example.net\" (RFC 2782)"))
}

/// A host name by RFC 1123, its underscores forgiven; the last label has a
/// letter, or it would be an address that was mistyped.
fn is_host_name(host: &str) -> bool {
    let bare = host.strip_suffix('.').unwrap_or(host);
    let label = |label: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        (1..=63).contains(&label.len())
            && label.chars().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let lettered = |label: &str| label.chars().any(|c| c.is_ascii_alphabetic());
    (1..=253).contains(&bare.len())
        && bare.split('.').all(label)
        && bare.rsplit('.').next().is_some_and(lettered)
}

/// `"10.0.0.0/8"`, or one address.
pub(super) fn network(value: &Value) -> Result<IpNet, Wrong> {
    let text = text(value)?;
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    match text.parse::<IpNet>() {
        Ok(network) if network.trunc() == network => Ok(network),
        Ok(network) => {
            let help = format!("this network is written \"{}\"", network.trunc());
            Err(Wrong::new("has bits set that its prefix does not cover", help))
        }
        Err(_) => {
            Err(Wrong::new("is not a network", "write \"10.0.0.0/8\", \"2001:db8::/32\" or a single address"))
        }
    }
}

/// An address of this host to connect from.
pub(super) fn source_address(value: &Value) -> Result<IpAddr, Wrong> {
    let text = text(value)?;
    match text.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() || ip.is_multicast() => {
            Err(Wrong::new("is not the address of a host", "write an address that this host has"))
        }
        Ok(ip) => Ok(ip),
        Err(_) => Err(Wrong::new("is not an IP address", "write it without a port, like \"10.0.0.7\"")),
    }
}

/// Where the status page is.
pub(super) fn admin_address(value: &Value) -> Result<SocketAddr, Wrong> {
    let address = bind_address(value)?;
    if address.ip().is_multicast() {
        return Err(Wrong::new(
            "is a group address",
            "write an address of this host, like \"127.0.0.1:9180\"",
        ));
    }
    Ok(address)
}

/// `"off"`, `"stderr"` or a file's path.
pub(super) fn access_log(value: &Value) -> Result<AccessLog, Wrong> {
    match text(value)? {
        "off" => Ok(AccessLog::Off),
        "stderr" => Ok(AccessLog::Stderr),
        path if path.starts_with('/') && !path.ends_with('/') && !path.contains('\0') => {
            Ok(AccessLog::File(PathBuf::from(path)))
        }
        other => {
            let all = "write \"off\", \"stderr\", or the absolute path of a file";
            Err(Wrong::new("is not known", did_you_mean(other, &["off", "stderr"], all)))
        }
    }
}

/// An HTTP method (RFC 9110: a token).
pub(super) fn method(value: &Value) -> Result<String, Wrong> {
    let text = text(value)?;
    let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    if text.is_empty() || text.len() > 32 || !text.chars().all(token) {
        return Err(Wrong::new("is not an HTTP method", "write \"GET\" or \"HEAD\""));
    }
    Ok(text.to_string())
}

/// The target of an HTTP request.
pub(super) fn http_path(value: &Value) -> Result<String, Wrong> {
    let text = text(value)?;
    if !text.starts_with('/') || text.len() > 2048 || !text.chars().all(|c| c.is_ascii_graphic()) {
        return Err(Wrong::new(
            "is not the path of a request",
            "start it with \"/\" and escape what is not ASCII",
        ));
    }
    Ok(text.to_string())
}

/// A Host header, or nothing.
pub(super) fn http_host(value: &Value) -> Result<String, Wrong> {
    let text = text(value)?;
    if text.len() > 255 || !text.chars().all(|c| c.is_ascii_graphic() && c != '/') {
        return Err(Wrong::new("is not a host", "write a name, like \"www.example.net\""));
    }
    Ok(text.to_string())
}

/// `"200"` or `"200-399"`.
pub(super) fn status_range(value: &Value) -> Result<StatusRange, Wrong> {
    let wrong = || Wrong::new("is not a range of status codes", "write \"200\" or \"200-399\"");
    let code = |text: &str| text.parse().ok().filter(|code| (100..=599).contains(code));
    let (first, last) = match value {
        Value::Integer(number) => (u16::try_from(*number).ok().filter(|c| (100..=599).contains(c)), None),
        Value::Text(text) => match text.split_once('-') {
            Some((first, last)) => (code(first), Some(code(last).ok_or_else(wrong)?)),
            None => (code(text), None),
        },
        _ => return Err(wrong()),
    };
    let first = first.ok_or_else(wrong)?;
    let range = StatusRange { first, last: last.unwrap_or(first) };
    if range.first > range.last { Err(wrong()) } else { Ok(range) }
}

/// A text in which `\xNN`, `\r`, `\n`, `\t` and `\\` stand for bytes.
pub(super) fn escaped_bytes(value: &Value) -> Result<Vec<u8>, Wrong> {
    let text = text(value)?;
    let wrong = || {
        let help = "write bytes as \\xNN, and \\r, \\n, \\t or \\\\; in TOML a text in single quotes keeps its backslashes";
        Wrong::new("has an escape that is not known", help)
    };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'\\' {
            bytes.push(*first);
            continue;
        }
        let [escape, tail @ ..] = rest else { return Err(wrong()) };
        rest = tail;
        bytes.push(match escape {
            b'r' => b'\r',
            b'n' => b'\n',
            b't' => b'\t',
            b'\\' => b'\\',
            b'x' => {
                let digits = rest.get(..2).ok_or_else(wrong)?;
                rest = &rest[2..];
                let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
                u8::from_str_radix(digits, 16).map_err(|_| wrong())?
            }
            _ => return Err(wrong()),
        });
    }
    if bytes.len() > EXCHANGE_BYTES {
        return Err(Wrong::new("is too long", format!("at most {EXCHANGE_BYTES} bytes")));
    }
    Ok(bytes)
}

/// One word of a command line.
pub(super) fn argument(value: &Value) -> Result<String, Wrong> {
    let text = text(value)?;
    if text.contains('\0') || text.len() > 4096 {
        return Err(Wrong::new("is not an argument", "write a text of at most 4096 bytes without NUL"));
    }
    Ok(text.to_string())
}

fn text<'v>(value: &'v Value) -> Result<&'v str, Wrong> {
    match value {
        Value::Text(text) => Ok(text),
        _ => Err(Wrong::new("is not a text", "write it in quotes")),
    }
}

/// The digits of `:80`.
fn port_alone(text: &str) -> Option<&str> {
    let port = text.strip_prefix(':')?;
    port.bytes().all(|byte| byte.is_ascii_digit()).then_some(port)
}

/// `ip:port`, with a word on what people write instead.
fn socket_address(text: &str, example: &str) -> Result<SocketAddr, Wrong> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if text.parse::<std::net::Ipv6Addr>().is_ok() {
        return Err(Wrong::new("has no port", format!("write \"[{text}]:PORT\"")));
    }
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    if bare.parse::<std::net::IpAddr>().is_ok() {
        return Err(Wrong::new("has no port", format!("write \"{text}:PORT\"")));
    }
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    if host.parse::<std::net::Ipv6Addr>().is_ok() {
        return Err(Wrong::new("is not an address", format!("write IPv6 in brackets: \"[{host}]:{port}\"")));
    }
    if let Some((address, interface)) = host.split_once('%')
        && interface.trim_end_matches(']').parse::<u32>().is_err()
    {
        let name = interface.trim_end_matches(']');
        let help = format!("write \"{address}]:{port}\" and interface = \"{name}\"");
        return Err(Wrong::new("names an interface in the address", help));
    }
    let in_brackets = host.starts_with('[') && host.ends_with(']');
    if in_brackets || host.parse::<std::net::IpAddr>().is_ok() {
        return Err(Wrong::new("has a wrong port", "a port is a number from 1 to 65535"));
    }
    let like_a_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if host.chars().all(like_a_name) && host.chars().any(|c| c.is_ascii_alphabetic()) {
        return Err(Wrong::new("is a host name", "write an IP address"));
    }
    Err(Wrong::new("is not an address", format!("write it as \"{example}\" or \"[::1]:80\"")))
}
