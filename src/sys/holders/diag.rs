//! The kernel's socket tables through netlink (sock_diag(7)).
//!
//! Preferred over /proc/net: the kernel picks the port out itself, and only
//! here do TCP sockets show that are bound and not listening (Linux 6.8).
//! One dump a family; ends at NLMSG_DONE. Any trouble is an error, and the
//! caller then reads /proc/net.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::{Protocol, Row, State};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x001 | 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_HEADER: usize = 16;
/// struct inet_diag_req_v2 and struct inet_diag_msg (linux/inet_diag.h).
const REQUEST: usize = NLMSG_HEADER + 56;
const MESSAGE: usize = 72;
const INET_DIAG_SKV6ONLY: u16 = 11;

pub(super) fn rows(protocol: Protocol, port: u16) -> io::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        dump(protocol, family as u8, port, &mut rows)?;
    }
    Ok(rows)
}

fn dump(protocol: Protocol, family: u8, port: u16, rows: &mut Vec<Row>) -> io::Result<()> {
    let netlink =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    // A kernel that does not answer must not hold up the message.
    setsockopt(&netlink, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
    send(netlink.as_raw_fd(), &request(protocol, family, port), MsgFlags::empty())?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if length == 0 || !take(&buffer[..length], protocol, port, rows)? {
            return Ok(());
        }
    }
}

fn request(protocol: Protocol, family: u8, port: u16) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[0..4].copy_from_slice(&(REQUEST as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    bytes[16] = family;
    bytes[17] = match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP,
        Protocol::Udp => libc::IPPROTO_UDP,
    } as u8;
    // Every state, the ones included that older kernels do not know.
    bytes[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
    bytes[24..26].copy_from_slice(&port.to_be_bytes());
    bytes
}

/// Reads one datagram of answers; false after the last one.
fn take(mut bytes: &[u8], protocol: Protocol, port: u16, rows: &mut Vec<Row>) -> io::Result<bool> {
    while bytes.len() >= NLMSG_HEADER {
        let length = u32_at(bytes, 0) as usize;
        if length < NLMSG_HEADER || length > bytes.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let body = &bytes[NLMSG_HEADER..length];
        match u16_at(bytes, 4) {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR if body.len() >= 4 => {
                return Err(io::Error::from_raw_os_error((u32_at(body, 0) as i32).saturating_neg()));
            }
            // The port is compared again: a kernel may ignore the filter.
            SOCK_DIAG_BY_FAMILY => {
                rows.extend(row(body, protocol).filter(|row| row.local.port() == port));
            }
            _ => {}
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    Ok(true)
}

fn row(body: &[u8], protocol: Protocol) -> Option<Row> {
    if body.len() < MESSAGE {
        return None;
    }
    let port = u16::from_be_bytes([body[4], body[5]]);
    let address: [u8; 16] = body[8..24].try_into().ok()?;
    let ip = match i32::from(body[0]) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::new(address[0], address[1], address[2], address[3])),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(address)),
        _ => return None,
    };
    Some(Row {
        local: SocketAddr::new(ip, port),
        state: State::from_kernel(protocol, body[1]),
        interface: u32_at(body, 40),
        uid: u32_at(body, 64),
        inode: u64::from(u32_at(body, 68)),
        v6_only: attribute(&body[MESSAGE..], INET_DIAG_SKV6ONLY).map(|value| value.first() == Some(&1)),
    })
}

fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while bytes.len() >= 4 {
        let length = usize::from(u16_at(bytes, 0));
        if length < 4 || length > bytes.len() {
            return None;
        }
        if u16_at(bytes, 2) == wanted {
            return Some(&bytes[4..length]);
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
