//! The PROXY protocol, versions 1 and 2: who the client is, said by whoever
//! stands in front of us, or by us to a server.
//!
//! "The PROXY protocol", sections 2.1 and 2.2, by HAProxy Technologies. Pure:
//! `decode` looks at the bytes that have come so far and says whether the
//! header is whole, `encode` writes one. Bounded by `V1_BYTES` and `V2_BYTES`;
//! what is longer is refused before it is whole. Bytes from the network never
//! make it panic.

mod decode;
mod encode;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

pub use decode::{Decoded, Malformed, decode};
pub use encode::{Header, Transport};

/// The longest header of version 1, its line end included (section 2.1).
pub const V1_BYTES: usize = 107;
/// The longest header of version 2 that is taken, its TLVs included. The
/// format would allow 64 KiB; senders in use stay far below 1 KiB.
pub const V2_BYTES: usize = 4096;

const V1_BEGIN: &[u8] = b"PROXY ";
const V2_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length.
const V2_FIXED: usize = 16;

/// Both ends of the connection that a client made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// The client.
    pub source: SocketAddr,
    /// What it connected to.
    pub destination: SocketAddr,
}
