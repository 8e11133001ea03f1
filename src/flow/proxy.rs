//! Tells a server who the client is: PROXY protocol version 2 for datagrams.
//!
//! "The PROXY protocol", section 2.2, by HAProxy Technologies: signature,
//! version and command, family and protocol (DGRAM), length, addresses. It
//! stands in front of every datagram, not only of a flow's first: most
//! receivers of datagrams keep no state and look at each.

use std::net::SocketAddr;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
const V4_DATAGRAM: u8 = 0x12;
const V6_DATAGRAM: u8 = 0x22;
const V4_ADDRESSES: u16 = 12;
const V6_ADDRESSES: u16 = 36;

/// The header for one flow.
#[derive(Clone, Copy, Debug)]
pub struct ProxyHeader {
    bytes: [u8; 52],
    length: usize,
}

impl ProxyHeader {
    /// For a client and the address of ours that it asked, of one family.
    pub fn new(client: SocketAddr, asked: SocketAddr) -> ProxyHeader {
        let mut header = ProxyHeader { bytes: [0; 52], length: 0 };
        header.put(&SIGNATURE);
        header.put(&[VERSION_AND_COMMAND]);
        match (client, asked) {
            (SocketAddr::V4(client), SocketAddr::V4(asked)) => {
                header.put(&[V4_DATAGRAM]);
                header.put(&V4_ADDRESSES.to_be_bytes());
                header.put(&client.ip().octets());
                header.put(&asked.ip().octets());
            }
            (client, asked) => {
                let octets = |address: SocketAddr| match address {
                    SocketAddr::V4(v4) => v4.ip().to_ipv6_mapped().octets(),
                    SocketAddr::V6(v6) => v6.ip().octets(),
                };
                header.put(&[V6_DATAGRAM]);
                header.put(&V6_ADDRESSES.to_be_bytes());
                header.put(&octets(client));
                header.put(&octets(asked));
            }
        }
        header.put(&client.port().to_be_bytes());
        header.put(&asked.port().to_be_bytes());
        header
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_as_the_specification_draws_it() {
        let header = ProxyHeader::new("192.0.2.1:4660".parse().unwrap(), "198.51.100.2:53".parse().unwrap());
        let expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\xc0\0\x02\x01\xc6\x33\x64\x02\x12\x34\0\x35";
        assert_eq!(header.as_bytes(), expected);
        let header = ProxyHeader::new("[2001:db8::1]:1".parse().unwrap(), "[::1]:2".parse().unwrap());
        let bytes = header.as_bytes();
        assert_eq!(
            (bytes.len(), &bytes[12..16], &bytes[48..]),
            (52, &[0x21, 0x22, 0, 36][..], &[0, 1, 0, 2][..])
        );
    }
}
