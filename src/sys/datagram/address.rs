//! Socket addresses as the kernel writes them, read and written as bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Room for a `sockaddr_in` or a `sockaddr_in6`, aligned as those.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(8))]
pub(super) struct Name(pub [u8; 32]);

const V4_BYTES: usize = size_of::<libc::sockaddr_in>();
const V6_BYTES: usize = size_of::<libc::sockaddr_in6>();

impl Name {
    /// The address in the first `length` bytes.
    pub(super) fn read(&self, length: usize) -> Option<SocketAddr> {
        let family = u16::from_ne_bytes(array(&self.0, 0)?);
        let port = u16::from_be_bytes(array(&self.0, 2)?);
        match i32::from(family) {
            libc::AF_INET if length >= V4_BYTES => {
                let ip = Ipv4Addr::from(array::<4>(&self.0, 4)?);
                Some(SocketAddr::from((ip, port)))
            }
            libc::AF_INET6 if length >= V6_BYTES => {
                let ip = Ipv6Addr::from(array::<16>(&self.0, 8)?);
                let scope = u32::from_ne_bytes(array(&self.0, 24)?);
                Some(SocketAddrV6::new(ip, port, 0, scope).into())
            }
            _ => None,
        }
    }

    /// Puts an address in; the bytes that it takes.
    pub(super) fn write(&mut self, address: SocketAddr) -> usize {
        self.0 = [0; 32];
        self.0[2..4].copy_from_slice(&address.port().to_be_bytes());
        match address {
            SocketAddr::V4(v4) => {
                self.0[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
                self.0[4..8].copy_from_slice(&v4.ip().octets());
                V4_BYTES
            }
            SocketAddr::V6(v6) => {
                self.0[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
                self.0[8..24].copy_from_slice(&v6.ip().octets());
                self.0[24..28].copy_from_slice(&v6.scope_id().to_ne_bytes());
                V6_BYTES
            }
        }
    }
}

/// Some bytes of a slice, where they are there.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// An address of `in_addr` or `in6_addr`.
pub(super) fn ip<const N: usize>(bytes: &[u8], at: usize) -> Option<IpAddr>
where
    IpAddr: From<[u8; N]>,
{
    array::<N>(bytes, at).map(IpAddr::from)
}
