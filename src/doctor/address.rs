//! `doctor ADDRESS`: would a bind work there, and if not, who holds it?
//!
//! Asks by `sys::listen`'s probes, which never listen, so no client of a
//! program that runs there is taken away. A group's address is opened as a
//! listener would open it: each member gets its own copy, nobody loses any.

use std::fmt::Write;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};

use crate::explain::{self, BindFailure, Explanation};
use crate::sys::holders::{self, Holder, Protocol};
use crate::sys::listen::{self, MulticastInterface, OpenError, Options, Step};

/// The answer for all that an ADDRESS stands for.
#[derive(Clone, Debug)]
pub struct Answer {
    typed: String,
    protocol: Protocol,
    checked: Vec<Checked>,
}

/// The answer for one socket address.
#[derive(Clone, Debug)]
struct Checked {
    address: SocketAddr,
    /// `ok` or the error's name.
    bind: String,
    holders: Vec<Holder>,
    our_uid: u32,
    trouble: Option<Explanation>,
}

/// The socket addresses that `8080`, `:8080`, `127.0.0.1:8080`, `[::]:8080`
/// or `[fe80::1%eth0]:8080` stands for. A bare port is both wildcards.
pub fn parse(text: &str) -> Result<Vec<SocketAddr>, String> {
    let wrong = || {
        format!(
            "{text:?} is not an address to bind\n  write 127.0.0.1:8080, [::1]:8080, or :8080 for all addresses"
        )
    };
    let port = text.strip_prefix(':').unwrap_or(text);
    if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) {
        let port: u16 = port.parse().map_err(|_| wrong())?;
        return Ok(vec![(Ipv4Addr::UNSPECIFIED, port).into(), (Ipv6Addr::UNSPECIFIED, port).into()]);
    }
    if let Some((ip, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once('%')) {
        let (interface, port) = rest.split_once("]:").ok_or_else(wrong)?;
        let ip: Ipv6Addr = ip.parse().map_err(|_| wrong())?;
        let port = port.parse().map_err(|_| wrong())?;
        let scope = interface.parse().or_else(|_| if_nametoindex(interface));
        let scope = scope.map_err(|_| {
            format!("{text:?}: there is no interface {interface}\n  ip link shows the names of this host's")
        })?;
        return Ok(vec![SocketAddrV6::new(ip, port, 0, scope).into()]);
    }
    text.parse().map(|address| vec![address]).map_err(|_| wrong())
}

/// Asks the kernel about the addresses that `typed` stands for.
pub fn check(typed: &str, addresses: &[SocketAddr], protocol: Protocol) -> Answer {
    let mut checked: Vec<Checked> = addresses.iter().map(|address| check_one(*address, protocol)).collect();
    // A host without IPv6 is no trouble where the other family was meant too.
    if checked.len() > 1 {
        checked.retain(|one| !(one.address.is_ipv6() && one.bind == "EAFNOSUPPORT"));
    }
    Answer { typed: typed.into(), protocol, checked }
}

fn check_one(address: SocketAddr, protocol: Protocol) -> Checked {
    let options = Options::default();
    let failed = |source: io::Error| OpenError { step: Step::Bind, address, source };
    let (result, probing) = match protocol {
        Protocol::Tcp => (listen::probe_tcp(address, &options).map_err(failed), true),
        Protocol::Udp if listen::is_group(address) => {
            (listen::multicast(address, &MulticastInterface::Any, None, &options).map(drop), false)
        }
        Protocol::Udp => (listen::probe_udp(address, &options).map_err(failed), true),
    };
    // Port 0 is any free one, so nobody can hold it.
    let facts = match address.port() {
        0 => holders::Facts::default(),
        _ => holders::gather(address, protocol, &options),
    };
    let (holders, our_uid) = (facts.holders.clone(), facts.our_uid);
    let (bind, trouble) = match result {
        Ok(()) => ("ok".into(), None),
        Err(error) => {
            let failure = BindFailure { probing, ..BindFailure::new(&error, protocol, &options, facts) };
            (format!("{:?}", Errno::from_raw(failure.errno)), Some(explain::bind_failure(&failure)))
        }
    };
    Checked { address, bind, holders, our_uid, trouble }
}

impl Answer {
    /// 0, or why a daemon would end: 69, 77.
    pub fn exit_code(&self) -> u8 {
        let codes =
            self.checked.iter().filter_map(|one| one.trouble.as_ref()).map(|trouble| trouble.exit_code);
        codes.max().unwrap_or(0)
    }

    /// For a reader.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for one in &self.checked {
            match &one.trouble {
                Some(trouble) => {
                    let _ = writeln!(text, "{}\n  {}", trouble.text, trouble.advice);
                }
                None => {
                    let _ = writeln!(text, "{}/{} can be bound", one.address, self.protocol.name());
                    for holder in &one.holders {
                        let line = explain::holder_line(holder, one.our_uid);
                        let _ = writeln!(text, "  not in the way: {line}");
                    }
                }
            }
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> String {
        let first_trouble = self.checked.iter().find(|one| one.trouble.is_some());
        let explanations = || self.checked.iter().filter_map(|one| one.trouble.as_ref());
        let mut advice: Vec<&str> = explanations().map(|trouble| trouble.advice.as_str()).collect();
        advice.dedup();
        let text: Vec<&str> = explanations().map(|trouble| trouble.text.as_str()).collect();
        let mut holders: Vec<Value> = Vec::new();
        for holder in self.checked.iter().flat_map(|one| &one.holders) {
            // A dual socket is met by both wildcards.
            holders.extend(
                holder_json(holder).into_iter().filter(|new| !holders.contains(new)).collect::<Vec<_>>(),
            );
        }
        let value = json!({
            "address": self.typed,
            "protocol": self.protocol.name(),
            "bind": first_trouble.map_or("ok", |one| one.bind.as_str()),
            "holders": holders,
            "text": text.join("; "),
            "advice": advice.join("; "),
        });
        value.to_string()
    }
}

/// One entry for each process, or one without where none is visible.
fn holder_json(holder: &Holder) -> Vec<Value> {
    let read = [(holder.reuse_address, "SO_REUSEADDR"), (holder.reuse_port, "SO_REUSEPORT")];
    let known = read.iter().all(|(set, _)| set.is_some());
    let set: Vec<&str> = read.iter().filter(|(set, _)| *set == Some(true)).map(|(_, name)| *name).collect();
    let entry = |pid: Option<i32>, command: Option<&str>, unit: Option<&str>| {
        json!({
            "pid": pid,
            "command": command,
            "uid": holder.uid,
            "unit": unit,
            "state": holder.state.name(),
            // null: not ours to read, which is not the same as none.
            "options": known.then_some(&set),
            "address": holder.local,
            "sockets": holder.socket_count,
        })
    };
    if holder.processes.is_empty() {
        return vec![entry(None, None, None)];
    }
    let processes = holder.processes.iter();
    processes.map(|p| entry(Some(p.pid), Some(&p.command), p.unit.as_deref())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_be_written_in_every_usual_way() {
        let both = ["0.0.0.0:8080", "[::]:8080"].map(|text| text.parse().expect("an address"));
        assert_eq!(parse("8080").expect("a port"), both);
        assert_eq!(parse(":8080").expect("a port"), both);
        assert_eq!(parse("127.0.0.1:8080").map(|list| list.len()), Ok(1));
        assert_eq!(parse("[::]:80").map(|list| list[0].is_ipv6()), Ok(true));
        assert_eq!(parse("[fe80::1%lo]:80").map(|list| list[0].to_string()), Ok("[fe80::1%1]:80".into()));
    }

    #[test]
    fn what_is_no_address_is_refused_with_an_example() {
        for text in ["", ":", "65536", "localhost:80", "127.0.0.1", "::1:80", "[::1]", "[fe80::1%nosuch]:80"]
        {
            let said = parse(text).expect_err(text);
            assert!(said.contains(text) && said.contains('\n'), "{said}");
        }
    }
}
