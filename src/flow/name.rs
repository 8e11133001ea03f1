//! A flow's name as it is kept: for each of many flows, so in few bytes, and
//! compared and hashed as bytes.

use std::hash::{DefaultHasher, Hasher};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use super::FlowKey;

const CLIENT_IS_V6: u8 = 1;
const LOCAL_IS_V6: u8 = 2;

/// 44 bytes for the 56 of a `FlowKey`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    client: [u8; 16],
    local: [u8; 16],
    scope: u32,
    port: u16,
    listener: u16,
    address: u16,
    kinds: u8,
}

impl From<&FlowKey> for Name {
    fn from(key: &FlowKey) -> Name {
        let (client, client_kind) = octets(key.client.ip(), CLIENT_IS_V6);
        let (local, local_kind) = octets(key.local, LOCAL_IS_V6);
        let scope = match key.client {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(v6) => v6.scope_id(),
        };
        let port = key.client.port();
        let FlowKey { listener, address, .. } = *key;
        Name { client, local, scope, port, listener, address, kinds: client_kind | local_kind }
    }
}

impl From<Name> for FlowKey {
    fn from(name: Name) -> FlowKey {
        let client = match address(name.client, name.kinds & CLIENT_IS_V6 != 0) {
            IpAddr::V4(v4) => (v4, name.port).into(),
            IpAddr::V6(v6) => SocketAddrV6::new(v6, name.port, 0, name.scope).into(),
        };
        let local = address(name.local, name.kinds & LOCAL_IS_V6 != 0);
        FlowKey { client, local, listener: name.listener, address: name.address }
    }
}

impl Name {
    /// The same in six words, of which the last one's upper half is free.
    pub(super) fn to_words(self) -> [u64; 6] {
        let half = |octets: &[u8; 16], at: usize| {
            u64::from_ne_bytes(octets[at..at + 8].try_into().expect("eight of sixteen"))
        };
        let ends = u64::from(self.scope) | u64::from(self.port) << 32 | u64::from(self.listener) << 48;
        let rest = u64::from(self.address) | u64::from(self.kinds) << 16;
        [half(&self.client, 0), half(&self.client, 8), half(&self.local, 0), half(&self.local, 8), ends, rest]
    }

    /// What `to_words` wrote.
    pub(super) fn from_words(words: [u64; 6]) -> Name {
        let octets = |at: usize| {
            let mut octets = [0; 16];
            octets[..8].copy_from_slice(&words[at].to_ne_bytes());
            octets[8..].copy_from_slice(&words[at + 1].to_ne_bytes());
            octets
        };
        Name {
            client: octets(0),
            local: octets(2),
            scope: words[4] as u32,
            port: (words[4] >> 32) as u16,
            listener: (words[4] >> 48) as u16,
            address: words[5] as u16,
            kinds: (words[5] >> 16) as u8,
        }
    }

    /// The listener's number.
    pub(super) fn listener(&self) -> usize {
        usize::from(self.listener)
    }

    /// Nobody outside knows the seed, and so nobody can make names meet.
    pub(super) fn hash(&self, seed: u64) -> u64 {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(seed);
        hasher.write(&self.client);
        hasher.write(&self.local);
        let ends = [self.port, self.listener, self.address, u16::from(self.kinds)];
        hasher.write_u64(ends.into_iter().fold(0, |sum, end| sum << 16 | u64::from(end)));
        if self.scope != 0 {
            hasher.write_u32(self.scope);
        }
        hasher.finish()
    }
}

fn octets(ip: IpAddr, kind_of_v6: u8) -> ([u8; 16], u8) {
    match ip {
        IpAddr::V4(v4) => (v4.to_ipv6_mapped().octets(), 0),
        IpAddr::V6(v6) => (v6.octets(), kind_of_v6),
    }
}

fn address(octets: [u8; 16], is_v6: bool) -> IpAddr {
    let v6 = Ipv6Addr::from(octets);
    match v6.to_ipv4_mapped() {
        Some(v4) if !is_v6 => v4.into(),
        _ => v6.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<[u8; 4]>().prop_map(IpAddr::from),
            any::<[u8; 16]>().prop_map(IpAddr::from),
            // An IPv6 address that looks like an IPv4 one is another.
            any::<[u8; 4]>().prop_map(|octets| std::net::Ipv4Addr::from(octets).to_ipv6_mapped().into()),
        ]
    }

    fn key() -> impl Strategy<Value = FlowKey> {
        (ip(), any::<u16>(), any::<u32>(), ip(), any::<u16>(), any::<u16>()).prop_map(
            |(client, port, scope, local, listener, address)| {
                let client = match client {
                    IpAddr::V4(v4) => (v4, port).into(),
                    IpAddr::V6(v6) => SocketAddrV6::new(v6, port, 0, scope).into(),
                };
                FlowKey { client, local, listener, address }
            },
        )
    }

    proptest! {
        #[test]
        fn a_name_says_all_of_its_key(key in key(), other in key()) {
            let name = Name::from(&key);
            prop_assert_eq!(FlowKey::from(name), key);
            prop_assert_eq!(Name::from_words(name.to_words()), name);
            prop_assert_eq!(name == Name::from(&other), key == other);
            prop_assert_eq!(name.hash(7), Name::from(&key).hash(7));
            prop_assert_ne!(name.hash(7), name.hash(8), "one chance in 2^64");
        }
    }
}
