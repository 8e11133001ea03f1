//! From both ends of a connection to the bytes that tell a server of them.

use std::io::Write;
use std::net::SocketAddr;

use super::{Ends, V1_BYTES, V2_FIXED, V2_SIGNATURE};

/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
const V4: u8 = 0x10;
const V6: u8 = 0x20;

/// What the client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Transport {
    Stream = 1,
    Datagram = 2,
}

/// A header, ready to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    bytes: [u8; V1_BYTES],
    length: usize,
}

impl Header {
    /// Version 1. Where the ends are of two families, which one line cannot
    /// say, the server is told that they are not known.
    pub fn version_1(ends: &Ends) -> Header {
        let Ends { source, destination } = ends;
        let (from, to) = (source.port(), destination.port());
        match (source, destination) {
            (SocketAddr::V4(source), SocketAddr::V4(destination)) => {
                Header::line(format_args!("PROXY TCP4 {} {} {from} {to}\r\n", source.ip(), destination.ip()))
            }
            (SocketAddr::V6(source), SocketAddr::V6(destination)) => {
                Header::line(format_args!("PROXY TCP6 {} {} {from} {to}\r\n", source.ip(), destination.ip()))
            }
            _ => Header::line(format_args!("PROXY UNKNOWN\r\n")),
        }
    }

    /// Version 2. An IPv4 end beside one of IPv6 is written as
    /// `::ffff:a.b.c.d`.
    pub fn version_2(ends: &Ends, transport: Transport) -> Header {
        let mut header = Header::empty();
        header.put(&V2_SIGNATURE);
        header.put(&[VERSION_AND_COMMAND]);
        match (ends.source, ends.destination) {
            (SocketAddr::V4(source), SocketAddr::V4(destination)) => {
                header.put(&[V4 | transport as u8, 0, 12]);
                header.put(&source.ip().octets());
                header.put(&destination.ip().octets());
            }
            (source, destination) => {
                let octets = |end: SocketAddr| match end {
                    SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped().octets(),
                    SocketAddr::V6(v6) => v6.ip().octets(),
                };
                header.put(&[V6 | transport as u8, 0, 36]);
                header.put(&octets(source));
                header.put(&octets(destination));
            }
        }
        header.put(&ends.source.port().to_be_bytes());
        header.put(&ends.destination.port().to_be_bytes());
        debug_assert!(matches!(header.length - V2_FIXED, 12 | 36));
        header
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn empty() -> Header {
        Header { bytes: [0; V1_BYTES], length: 0 }
    }

    fn line(text: std::fmt::Arguments) -> Header {
        let mut header = Header::empty();
        let mut rest = &mut header.bytes[..];
        rest.write_fmt(text).expect("two addresses and two ports take 104 bytes at most");
        header.length = V1_BYTES - rest.len();
        header
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }
}
