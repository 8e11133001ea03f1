//! What /proc tells about sockets, ports and addresses.
//!
//! /proc/net is a link to the network namespace of the process's first
//! thread; /proc/thread-self/net is that of the caller, so that is read. A
//! file that cannot be read counts as one that says nothing.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

use super::{Placement, Protocol, Row, State};

/// IFA_F_DADFAILED and IFA_F_TENTATIVE (linux/if_addr.h).
const DUPLICATE: u32 = 0x08;
const TENTATIVE: u32 = 0x40;

/// The rows of /proc/net/{tcp,udp}{,6} with this port.
pub(super) fn rows(protocol: Protocol, port: u16) -> io::Result<Vec<Row>> {
    let name = protocol.name();
    let mut rows = Vec::new();
    let text = fs::read_to_string(format!("/proc/thread-self/net/{name}"))?;
    rows.extend(text.lines().skip(1).filter_map(|line| row(line, protocol)));
    // Not there where IPv6 is not built in.
    let text = fs::read_to_string(format!("/proc/thread-self/net/{name}6")).unwrap_or_default();
    rows.extend(text.lines().skip(1).filter_map(|line| row(line, protocol)));
    rows.retain(|row| row.local.port() == port);
    Ok(rows)
}

fn row(line: &str, protocol: Protocol) -> Option<Row> {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = columns.get(1)?.split_once(':')?;
    let state = u8::from_str_radix(columns.get(3)?, 16).ok()?;
    Some(Row {
        local: SocketAddr::new(kernel_address(address)?, u16::from_str_radix(port, 16).ok()?),
        state: State::from_kernel(protocol, state),
        uid: columns.get(7)?.parse().ok()?,
        inode: columns.get(9)?.parse().ok()?,
        interface: 0,
        v6_only: None,
    })
}

/// Words of 32 bits, each written as a number of this machine.
fn kernel_address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(hex.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    match hex.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let mut bytes = [0; 16];
            for at in 0..4 {
                bytes[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
            }
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

pub(super) fn unprivileged_port_start() -> Option<u16> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").ok()?;
    // 65536 means that every port needs the privilege.
    text.trim().parse::<u32>().ok().map(|port| u16::try_from(port).unwrap_or(u16::MAX))
}

/// Where the address is on this host.
pub(super) fn placement(address: SocketAddr) -> Placement {
    let ip = address.ip();
    if ip.is_ipv6() && ipv6_is_off() {
        return Placement::FamilyDisabled;
    }
    // All of 127.0.0.0/8 is local though only 127.0.0.1 stands on `lo`.
    if ip.is_unspecified() || ip.is_multicast() || (ip.is_ipv4() && ip.is_loopback()) {
        return Placement::Everywhere;
    }
    let Ok(mut addresses) = getifaddrs() else {
        return Placement::Everywhere;
    };
    let found = addresses.find(|entry| {
        let entry = entry.address.as_ref();
        let v4 = entry.and_then(|a| a.as_sockaddr_in()).map(|a| IpAddr::V4(a.ip()));
        let v6 = entry.and_then(|a| a.as_sockaddr_in6()).map(|a| IpAddr::V6(a.ip()));
        v4.or(v6) == Some(ip)
    });
    let Some(entry) = found else {
        return Placement::Nowhere;
    };
    let name = entry.interface_name;
    if !entry.flags.contains(InterfaceFlags::IFF_UP) {
        return Placement::Down(name);
    }
    match duplicate_search(ip) {
        Some(flags) if flags & DUPLICATE != 0 => Placement::Duplicate(name),
        Some(flags) if flags & TENTATIVE != 0 => Placement::Tentative(name),
        _ => Placement::Up(name),
    }
}

fn ipv6_is_off() -> bool {
    if !fs::exists("/proc/thread-self/net/if_inet6").unwrap_or(true) {
        return true;
    }
    fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|text| text.trim() == "1")
}

/// The flags of an IPv6 address: /proc/net/if_inet6 has address, interface,
/// prefix, scope, flags and name in hexadecimal.
fn duplicate_search(ip: IpAddr) -> Option<u32> {
    let IpAddr::V6(v6) = ip else { return None };
    let wanted: String = v6.octets().iter().map(|byte| format!("{byte:02x}")).collect();
    let text = fs::read_to_string("/proc/thread-self/net/if_inet6").ok()?;
    let line = text.lines().find(|line| line.starts_with(&wanted))?;
    u32::from_str_radix(line.split_whitespace().nth(4)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn a_line_of_the_table_is_read_as_the_kernel_wrote_it() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000    33        0 4711 1 0";
        let row = row(line, Protocol::Tcp).expect("a whole line");
        assert_eq!(row.local, "127.0.0.1:8080".parse().expect("an address"));
        assert_eq!((row.state, row.uid, row.inode), (State::Listening, 33, 4711));
        let six = kernel_address("00000000000000000000000001000000");
        assert_eq!(six, Some("::1".parse().expect("an address")));
        assert_eq!(kernel_address("zz"), None);
    }
}
