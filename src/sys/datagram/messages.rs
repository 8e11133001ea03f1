//! Control messages as the kernel writes them, read and written as bytes.
//!
//! `struct cmsghdr` in the kernel's own layout (include/linux/socket.h): a
//! `size_t` length with the header, level, type, data, the whole padded to
//! the size of a `size_t`.

use std::net::IpAddr;
use std::time::Duration;

use super::address::{array, ip};

const WORD: usize = size_of::<usize>();
const HEADER: usize = WORD + 8;

/// Room for every message that a socket of ours gets: packet info (20 bytes
/// at most), time (16), length of segments (4), each with its header.
pub(super) const CONTROL_BYTES: usize = 128;

/// A buffer for control messages, aligned as they have to be.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub(super) struct Control(pub [u8; CONTROL_BYTES]);

impl Default for Control {
    fn default() -> Control {
        Control([0; CONTROL_BYTES])
    }
}

/// What the messages of one datagram say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) local: Option<IpAddr>,
    pub(super) segment: Option<usize>,
    pub(super) stamp: Option<Duration>,
}

impl Control {
    /// What the first `length` bytes say.
    pub(super) fn read(&self, length: usize) -> Told {
        let mut told = Told::default();
        let mut rest = &self.0[..length.min(CONTROL_BYTES)];
        while let Some(size) = array::<WORD>(rest, 0).map(usize::from_ne_bytes) {
            let (Some(level), Some(kind)) = (array(rest, WORD), array(rest, WORD + 4)) else { break };
            let Some(data) = rest.get(HEADER..size) else { break };
            read_one(&mut told, i32::from_ne_bytes(level), i32::from_ne_bytes(kind), data);
            rest = rest.get(size.next_multiple_of(WORD)..).unwrap_or(&[]);
        }
        told
    }

    /// Puts in where a datagram leaves from and how it is cut; the bytes that
    /// this takes. `interface` goes with an IPv6 address of link scope.
    pub(super) fn write(&mut self, from: Option<IpAddr>, interface: u32, segment: Option<usize>) -> usize {
        let mut end = 0;
        match from {
            Some(IpAddr::V4(v4)) => {
                // in_pktinfo: interface, address to leave from, unused.
                let mut info = [0; 12];
                info[4..8].copy_from_slice(&v4.octets());
                end = self.put(end, libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
            }
            Some(IpAddr::V6(v6)) => {
                let mut info = [0; 20];
                info[..16].copy_from_slice(&v6.octets());
                info[16..].copy_from_slice(&interface.to_ne_bytes());
                end = self.put(end, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
            }
            None => {}
        }
        if let Some(segment) = segment {
            let bytes = (segment as u16).to_ne_bytes();
            end = self.put(end, libc::SOL_UDP, libc::UDP_SEGMENT, &bytes);
        }
        end
    }

    fn put(&mut self, at: usize, level: i32, kind: i32, data: &[u8]) -> usize {
        let size = HEADER + data.len();
        let into = &mut self.0[at..at + size.next_multiple_of(WORD)];
        into.fill(0);
        into[..WORD].copy_from_slice(&size.to_ne_bytes());
        into[WORD..WORD + 4].copy_from_slice(&level.to_ne_bytes());
        into[WORD + 4..HEADER].copy_from_slice(&kind.to_ne_bytes());
        into[HEADER..size].copy_from_slice(data);
        at + size.next_multiple_of(WORD)
    }
}

fn read_one(told: &mut Told, level: i32, kind: i32, data: &[u8]) {
    match (level, kind) {
        // ipi_spec_dst, not ipi_addr: for a datagram to a group or to all it
        // is the address of ours that can answer.
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => told.local = ip::<4>(data, 4),
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => told.local = ip::<16>(data, 0),
        (libc::SOL_UDP, libc::UDP_GRO) => {
            let segment = array(data, 0).map(i32::from_ne_bytes);
            told.segment = segment.and_then(|segment| usize::try_from(segment).ok()).filter(|s| *s > 0);
        }
        (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
            let seconds = array(data, 0).map(i64::from_ne_bytes);
            let nanoseconds = array(data, 8).map(i64::from_ne_bytes);
            if let (Some(seconds), Some(nanoseconds)) = (seconds, nanoseconds) {
                let (seconds, nanoseconds) =
                    (seconds.max(0) as u64, nanoseconds.clamp(0, 999_999_999) as u32);
                told.stamp = Some(Duration::new(seconds, nanoseconds));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: [[u8; 32]; 4], length in 0usize..300) {
            let mut control = Control::default();
            control.0.copy_from_slice(bytes.as_flattened());
            control.read(length);
        }

        #[test]
        fn short_sizes_end_the_reading(size in 0usize..64) {
            let mut control = Control::default();
            control.0[..WORD].copy_from_slice(&size.to_ne_bytes());
            control.read(CONTROL_BYTES);
        }
    }
}
