//! What few sessions have: who a PROXY header says they are, and what the
//! access log will say of them.
//!
//! ```text
//!   0-1 source's address | 2-3 destination's | 4 ports, 16 each, and kinds | 5 scopes
//!   6   connect began 40, plus one | tries in vain 24      7   established, plus one
//! ```

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use super::layout::EXTRA_WORDS;
use crate::handover::Story;
use crate::proxy_protocol::Ends;

const TIME: u64 = (1 << 40) - 1;
const STORY: usize = 6;

pub(super) fn write_origin(ends: &Ends, mut put: impl FnMut(usize, u64)) {
    let mut rest = [0, 0];
    for (index, address) in [ends.source, ends.destination].into_iter().enumerate() {
        let (octets, is_v6, scope) = match address {
            SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped().octets(), 0, 0),
            SocketAddr::V6(v6) => (v6.ip().octets(), 1, v6.scope_id()),
        };
        let (high, low) = octets.split_at(8);
        for (word, half) in [high, low].into_iter().enumerate() {
            put(2 * index + word, u64::from_be_bytes(half.try_into().expect("eight of sixteen")));
        }
        rest[0] |= u64::from(address.port()) << (16 * index) | is_v6 << (32 + index);
        rest[1] |= u64::from(scope) << (32 * index);
    }
    put(4, rest[0]);
    put(5, rest[1]);
}

pub(super) fn read_origin(words: &[u64; EXTRA_WORDS]) -> Ends {
    let address = |index: usize| {
        let number = u128::from(words[2 * index]) << 64 | u128::from(words[2 * index + 1]);
        let v6 = Ipv6Addr::from(number);
        let port = (words[4] >> (16 * index)) as u16;
        let is_v6 = words[4] >> (32 + index) & 1 == 1;
        match v6.to_ipv4_mapped() {
            Some(v4) if !is_v6 => SocketAddr::from((IpAddr::from(v4), port)),
            _ => SocketAddrV6::new(v6, port, 0, (words[5] >> (32 * index)) as u32).into(),
        }
    };
    Ends { source: address(0), destination: address(1) }
}

pub(super) fn write_story(story: &Story, mut put: impl FnMut(usize, u64)) {
    let time = |time: Option<u64>| time.map_or(0, |time| (time + 1) & TIME);
    put(STORY, time(story.connect_began) | u64::from(story.retries) << 40);
    put(STORY + 1, time(story.established));
}

/// The story of a client that is known otherwise.
pub(super) fn read_story(words: &[u64; EXTRA_WORDS], client: SocketAddr) -> Story {
    let time = |word: u64| (word & TIME).checked_sub(1);
    Story {
        client,
        connect_began: time(words[STORY]),
        established: time(words[STORY + 1]),
        retries: (words[STORY] >> 40) as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for (source, destination) in [
            ("192.0.2.1:4711", "198.51.100.2:80"),
            ("[2001:db8::1]:1", "[fe80::1%7]:65535"),
            ("[::ffff:192.0.2.1]:9", "0.0.0.0:0"),
        ] {
            let ends = Ends { source: source.parse().unwrap(), destination: destination.parse().unwrap() };
            let story = Story { client: ends.source, connect_began: Some(0), established: None, retries: 3 };
            let mut words = [0; EXTRA_WORDS];
            write_origin(&ends, |at, value| words[at] = value);
            write_story(&story, |at, value| words[at] = value);
            assert_eq!(read_origin(&words), ends);
            assert_eq!(read_story(&words, ends.source), story);
        }
    }
}
