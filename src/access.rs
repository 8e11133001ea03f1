//! Whether an address is in a list of prefixes: who may come, and whom a
//! PROXY header is believed from.
//!
//! Prefixes become disjoint ranges in order, so that an answer takes a binary
//! search whatever their number: thousands cost some ten comparisons. Pure;
//! made once a worker and never changed. An IPv4 address written as
//! `::ffff:a.b.c.d` is the IPv4 address.

use std::net::IpAddr;

use ipnet::IpNet;

/// A set of addresses.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

impl Addresses {
    /// Everything in these prefixes.
    pub fn of(prefixes: &[IpNet]) -> Addresses {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for prefix in prefixes {
            match (prefix.network(), prefix.broadcast()) {
                (IpAddr::V4(first), IpAddr::V4(last)) => v4.push((first.to_bits(), last.to_bits())),
                (IpAddr::V6(first), IpAddr::V6(last)) => {
                    v6.push((first.to_bits(), last.to_bits()));
                    // Within ::ffff:0:0/96 it is a prefix of IPv4.
                    if let (Some(first), Some(last)) = (first.to_ipv4_mapped(), last.to_ipv4_mapped()) {
                        v4.push((first.to_bits(), last.to_bits()));
                    }
                }
                _ => unreachable!("a prefix is of one family"),
            }
        }
        Addresses { v4: merged(v4), v6: merged(v6) }
    }

    /// Whether it is one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        match address.to_canonical() {
            IpAddr::V4(v4) => is_within(&self.v4, v4.to_bits()),
            IpAddr::V6(v6) => is_within(&self.v6, v6.to_bits()),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

/// Who may come: whoever is allowed (everyone, where nobody is named) and not
/// denied. A denial counts for more, whichever prefix is the longer.
#[derive(Clone, Debug, Default)]
pub struct Access {
    allow: Addresses,
    deny: Addresses,
}

impl Access {
    /// From a listener's two lists.
    pub fn new(allow: &[IpNet], deny: &[IpNet]) -> Access {
        Access { allow: Addresses::of(allow), deny: Addresses::of(deny) }
    }

    /// Whether this client may come.
    pub fn permits(&self, client: IpAddr) -> bool {
        (self.allow.is_empty() || self.allow.contains(client)) && !self.deny.contains(client)
    }
}

/// Sorted, and what overlaps made one.
fn merged<T: Copy + Ord>(mut ranges: Vec<(T, T)>) -> Vec<(T, T)> {
    ranges.sort_unstable();
    let mut merged: Vec<(T, T)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= *end => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn is_within<T: Copy + Ord>(ranges: &[(T, T)], value: T) -> bool {
    let after = ranges.partition_point(|(first, _)| *first <= value);
    after.checked_sub(1).is_some_and(|at| value <= ranges[at].1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn nobody_named_means_everyone_and_a_denial_wins() {
        let permits = |allow: &[&str], deny: &[&str], client: &str| {
            Access::new(&nets(allow), &nets(deny)).permits(client.parse().unwrap())
        };
        assert!(permits(&[], &[], "192.0.2.1") && permits(&[], &[], "2001:db8::1"));
        assert!(permits(&["10.0.0.0/8"], &[], "10.9.9.9") && !permits(&["10.0.0.0/8"], &[], "11.0.0.0"));
        // Also where the allowed prefix is the longer one.
        assert!(!permits(&["10.1.0.0/16"], &["10.0.0.0/8"], "10.1.2.3"));
        assert!(!permits(&["10.0.0.0/8"], &[], "2001:db8::1"));
        assert!(!permits(&["10.0.0.0/8"], &["10.1.0.0/16"], "::ffff:10.1.2.3"));
        assert!(permits(&["::ffff:10.0.0.0/104"], &[], "10.1.2.3"));
        assert!(!permits(&[], &["0.0.0.0/0"], "0.0.0.0") && permits(&[], &["0.0.0.0/0"], "::1"));
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        // Few bits, so that prefixes nest and touch.
        let v4 = (0u32..64, 24u8..=32).prop_map(|(bits, length)| {
            IpNet::new(IpAddr::from((0x0a00_0000 + bits * 8).to_be_bytes()), length).unwrap()
        });
        let v6 = (0u128..64, 110u8..=128).prop_map(|(bits, length)| {
            IpNet::new(IpAddr::from(((0x2001_0db8 << 96) + bits * 32).to_be_bytes()), length).unwrap()
        });
        prop_oneof![v4, v6, Just("0.0.0.0/0".parse().unwrap()), Just("::/0".parse().unwrap())]
    }

    proptest! {
        #[test]
        fn it_answers_as_a_look_at_each_prefix_does(
            nets in prop::collection::vec(any_net(), 0..40),
            v4 in 0u32..600,
            v6 in 0u128..3000,
        ) {
            let addresses = Addresses::of(&nets);
            let v4 = IpAddr::from((0x0a00_0000 + v4).to_be_bytes());
            let v6 = IpAddr::from(((0x2001_0db8 << 96) + v6).to_be_bytes());
            for address in [v4, v6] {
                let plain = nets.iter().any(|net| net.contains(&address));
                prop_assert_eq!(addresses.contains(address), plain, "{}", address);
            }
        }
    }

    #[test]
    fn thousands_of_prefixes_become_ranges_that_do_not_touch_each_other() {
        let many: Vec<IpNet> =
            (0..5_000u32).map(|i| IpNet::new(IpAddr::from((i << 12).to_be_bytes()), 24).unwrap()).collect();
        let addresses = Addresses::of(&many);
        assert_eq!(addresses.v4.len(), 5_000);
        assert!(
            many.iter().all(|net| addresses.contains(net.network()) && addresses.contains(net.broadcast()))
        );
        assert!(addresses.v4.windows(2).all(|pair| pair[0].1 < pair[1].0));
    }
}
