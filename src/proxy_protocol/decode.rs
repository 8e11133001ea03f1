//! From bytes to both ends of a connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::{Ends, V1_BEGIN, V1_BYTES, V2_BYTES, V2_FIXED, V2_SIGNATURE};

/// What the bytes so far are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// The beginning of a header, as far as it goes.
    Incomplete,
    /// A whole header in so many bytes; what follows belongs to the stream.
    /// No ends where the sender speaks for itself (LOCAL), does not know
    /// (UNKNOWN, UNSPEC) or names what is no TCP connection: the ends are then
    /// those of the connection that the header came on.
    #[allow(missing_docs)]
    Header { length: usize, ends: Option<Ends> },
}

/// Why it is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It begins like neither version.
    #[error("no PROXY protocol header")]
    NoHeader,
    /// The line of version 1 is longer than 107 bytes.
    #[error("a header of version 1 that is longer than 107 bytes")]
    V1TooLong,
    /// The line of version 1 does not hold what it should.
    #[error("a header of version 1 that cannot be read")]
    V1,
    /// Longer than is taken.
    #[error("a header of version 2 that is longer than 4096 bytes")]
    V2TooLong,
    /// An unknown version, command, family or transport.
    #[error("a header of version 2 of an unknown kind")]
    V2Kind,
    /// The lengths within it do not agree.
    #[error("a header of version 2 whose lengths do not agree")]
    V2Lengths,
}

/// Looks at the bytes that have come so far; more bytes never change an error
/// or a whole header.
pub fn decode(bytes: &[u8]) -> Result<Decoded, Malformed> {
    if begins_alike(bytes, &V2_SIGNATURE) {
        version_2(bytes)
    } else if begins_alike(bytes, V1_BEGIN) {
        version_1(bytes)
    } else {
        Err(Malformed::NoHeader)
    }
}

fn begins_alike(bytes: &[u8], expected: &[u8]) -> bool {
    let common = bytes.len().min(expected.len());
    bytes[..common] == expected[..common]
}

fn version_1(bytes: &[u8]) -> Result<Decoded, Malformed> {
    let Some(end) = bytes.iter().take(V1_BYTES).position(|&byte| byte == b'\n') else {
        return if bytes.len() < V1_BYTES { Ok(Decoded::Incomplete) } else { Err(Malformed::V1TooLong) };
    };
    let line = bytes[..end].strip_suffix(b"\r").ok_or(Malformed::V1)?;
    let line = std::str::from_utf8(line).map_err(|_| Malformed::V1)?;
    let ends = ends_of_line(line).ok_or(Malformed::V1)?;
    Ok(Decoded::Header { length: end + 1, ends })
}

/// `PROXY TCP4 SOURCE DESTINATION PORT PORT`, one space between the words.
fn ends_of_line(line: &str) -> Option<Option<Ends>> {
    let mut words = line.split(' ').skip(1);
    let kind = words.next()?;
    if kind == "UNKNOWN" {
        // Whatever else the line says is to be ignored.
        return Some(None);
    }
    let mut address = || -> Option<IpAddr> {
        let word = words.next()?;
        match kind {
            "TCP4" => Ipv4Addr::from_str(word).ok().map(IpAddr::from),
            "TCP6" => Ipv6Addr::from_str(word).ok().map(IpAddr::from),
            _ => None,
        }
    };
    let (source, destination) = (address()?, address()?);
    let mut port = || -> Option<u16> {
        // `parse` would take a sign.
        let word = words.next().filter(|word| word.bytes().all(|byte| byte.is_ascii_digit()))?;
        word.parse().ok()
    };
    let (source_port, destination_port) = (port()?, port()?);
    words.next().is_none().then_some(Some(Ends {
        source: (source, source_port).into(),
        destination: (destination, destination_port).into(),
    }))
}

fn version_2(bytes: &[u8]) -> Result<Decoded, Malformed> {
    // Refused as early as it can be told.
    if bytes.get(12).is_some_and(|kind| !matches!(kind, 0x20 | 0x21)) {
        return Err(Malformed::V2Kind);
    }
    if bytes.get(13).is_some_and(|kind| kind >> 4 > 3 || kind & 0xf > 2) {
        return Err(Malformed::V2Kind);
    }
    let Some(fixed) = bytes.first_chunk::<V2_FIXED>() else { return Ok(Decoded::Incomplete) };
    let length = V2_FIXED + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > V2_BYTES {
        return Err(Malformed::V2TooLong);
    }
    let Some(body) = bytes.get(V2_FIXED..length) else { return Ok(Decoded::Incomplete) };
    let is_local = fixed[12] == 0x20;
    let ends = if is_local { None } else { ends_of_body(fixed[13], body)? };
    Ok(Decoded::Header { length, ends })
}

fn ends_of_body(kind: u8, body: &[u8]) -> Result<Option<Ends>, Malformed> {
    // Two addresses and two ports; two paths of a Unix socket.
    let (ip_bytes, addresses_bytes) = match kind >> 4 {
        1 => (4, 12),
        2 => (16, 36),
        3 => (0, 216),
        _ => return Ok(None),
    };
    let (addresses, tlvs) = body.split_at_checked(addresses_bytes).ok_or(Malformed::V2Lengths)?;
    if !are_tlvs(tlvs) {
        return Err(Malformed::V2Lengths);
    }
    let is_stream = kind & 0xf == 1;
    if ip_bytes == 0 || !is_stream {
        return Ok(None);
    }
    let end = |number: usize| -> Option<SocketAddr> {
        let ip = ip(addresses.get(number * ip_bytes..(number + 1) * ip_bytes)?)?;
        let port = addresses.get(2 * ip_bytes + 2 * number..)?.first_chunk::<2>()?;
        Some((ip, u16::from_be_bytes(*port)).into())
    };
    match (end(0), end(1)) {
        (Some(source), Some(destination)) => Ok(Some(Ends { source, destination })),
        _ => Err(Malformed::V2Lengths),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from).ok();
    v4.or_else(|| <[u8; 16]>::try_from(bytes).map(IpAddr::from).ok())
}

/// Whether these are whole TLVs, one after the other. What they say is not
/// looked at.
fn are_tlvs(mut bytes: &[u8]) -> bool {
    while let Some(([_, high, low], rest)) = bytes.split_first_chunk::<3>() {
        let Some(next) = rest.get(usize::from(u16::from_be_bytes([*high, *low]))..) else { return false };
        bytes = next;
    }
    bytes.is_empty()
}
