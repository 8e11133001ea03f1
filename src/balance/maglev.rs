//! Which server a client's address belongs to: a Maglev table.
//!
//! Eisenbud and others, "Maglev: A Fast and Reliable Software Network Load
//! Balancer", NSDI 2016, section 3.4, with weights. Each server walks the
//! places of the table in an order of its own and takes the next free one
//! whenever its turn comes; turns come by weight. The table depends on the
//! servers' names and weights alone, not on their order, the slot, the time or
//! the machine, so every process that reads the same file computes the same.
//!
//! Made by the owner of the upstream board, 128 KiB a table, and read by
//! every worker. One server more or less moves that server's share and a few
//! places besides.

use std::net::IpAddr;

/// Places of a table, a prime: a hundred for each of 655 servers, which keeps
/// the shares within a few per cent of the weights.
pub const PLACES: usize = 65_537;
/// No server's number: a place that nobody has.
pub const FREE: u16 = u16::MAX;

/// A server while the table is filled.
struct Walker {
    server: u16,
    weight: u64,
    credit: u64,
    at: usize,
    step: usize,
}

/// A table over servers of number, name and weight: a number for every place.
/// `None` where nobody has a weight.
pub fn fill<'n>(servers: impl Iterator<Item = (usize, &'n str, u32)>) -> Option<Box<[u16]>> {
    let mut servers: Vec<(usize, &str, u32)> = servers.filter(|(_, _, weight)| *weight > 0).collect();
    servers.sort_by_key(|(_, name, _)| *name);
    let heaviest = u64::from(servers.iter().map(|(_, _, weight)| *weight).max()?);
    let mut walkers: Vec<Walker> = servers.iter().map(Walker::new).collect();
    let mut places = vec![FREE; PLACES].into_boxed_slice();
    let mut left = PLACES;
    loop {
        for walker in &mut walkers {
            // The heaviest has a turn in each round, the others as often
            // as their weights say.
            walker.credit += walker.weight;
            if walker.credit < heaviest {
                continue;
            }
            walker.credit -= heaviest;
            walker.take(&mut places);
            left -= 1;
            if left == 0 {
                return Some(places);
            }
        }
    }
}

/// The positions of a table at which a client's server is looked for, its own
/// first and then, for where that may not be, the ones that others would fall
/// back to.
pub fn positions(client: IpAddr) -> impl Iterator<Item = usize> {
    let at = (hash_address(client) % PLACES as u64) as usize;
    (at..PLACES).chain(0..at)
}

/// How far a client is from a server, to find the nearest of a few without a
/// table: weighted rendezvous hashing. The smallest wins.
pub fn distance(client: IpAddr, server: u64, weight: u64) -> f64 {
    // The upper 53 bits, never zero: a draw from (0, 1] for this pair.
    let draw = ((mix(hash_address(client) ^ mix(server)) >> 11) + 1) as f64 / (1u64 << 53) as f64;
    -draw.ln() / weight as f64
}

/// A draw for a client from 0 up to `end`, always the same; not the one that
/// its position in a table comes from.
pub fn lot(client: IpAddr, end: u64) -> u64 {
    ((u128::from(mix(hash_address(client))) * u128::from(end)) >> 64) as u64
}

impl Walker {
    fn new((server, name, weight): &(usize, &str, u32)) -> Walker {
        let hash = hash_bytes(name.as_bytes());
        Walker {
            server: u16::try_from(*server).expect("an upstream has fewer than 65,535 servers"),
            weight: u64::from(*weight),
            credit: 0,
            at: (hash % PLACES as u64) as usize,
            // Any step visits every place, for their number is prime.
            step: (mix(hash) % (PLACES as u64 - 1)) as usize + 1,
        }
    }

    fn take(&mut self, places: &mut [u16]) {
        while places[self.at] != FREE {
            self.at = (self.at + self.step) % PLACES;
        }
        places[self.at] = self.server;
    }
}

/// A client's hash; an IPv4 address within IPv6 is the IPv4 address.
fn hash_address(client: IpAddr) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(v4) => hash_bytes(&v4.octets()),
        IpAddr::V6(v6) => hash_bytes(&v6.octets()),
    }
}

/// FNV-1a and a finish that spreads its bits. Fixed for ever: machines of one
/// fleet have to agree, whatever version they run.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(hash)
}

/// The finish of splitmix64.
pub(super) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("10.0.{}.{}:80", i / 256, i % 256)).collect()
    }

    fn table(weights: &[u32]) -> Box<[u16]> {
        let names = names(weights.len());
        fill(weights.iter().enumerate().map(|(i, weight)| (i, names[i].as_str(), *weight))).unwrap()
    }

    fn shares(table: &[u16], count: usize) -> Vec<usize> {
        (0..count).map(|i| table.iter().filter(|place| usize::from(**place) == i).count()).collect()
    }

    fn servers(table: &[u16], client: IpAddr) -> impl Iterator<Item = usize> {
        positions(client).map(|at| usize::from(table[at]))
    }

    #[test]
    fn the_order_of_the_servers_does_not_matter() {
        let names = names(5);
        let list: Vec<(usize, &str, u32)> =
            names.iter().enumerate().map(|(i, n)| (i, n.as_str(), 1)).collect();
        let one = fill(list.iter().copied()).unwrap();
        let other = fill(list.iter().rev().copied()).unwrap();
        assert_eq!(one, other);
    }

    // A change here moves every client of every fleet to another server.
    #[test]
    fn the_table_is_the_same_for_ever() {
        let table = table(&[1, 1, 1]);
        let first = |address: &str| servers(&table, address.parse().unwrap()).next().unwrap();
        let clients =
            ["192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "::ffff:192.0.2.1", "203.0.113.9"];
        assert_eq!(clients.map(first), [2, 2, 2, 1, 2, 0]);
    }

    #[test]
    fn nobody_with_a_weight_makes_no_table() {
        assert!(fill([(0, "a", 0)].into_iter()).is_none());
        assert!(fill(std::iter::empty()).is_none());
    }

    // As far as no chance is involved: the addresses are fixed.
    #[test]
    fn without_a_table_shares_follow_the_weights_too() {
        let mut counts = [0u32; 3];
        for client in (0..20_000u32).map(|i| IpAddr::V4((0x0a00_0000 + i).into())) {
            let nearest = (0..3usize)
                .min_by(|a, b| {
                    let distance = |i: usize| distance(client, hash_bytes(&[i as u8]), [1, 1, 2][i]);
                    distance(*a).total_cmp(&distance(*b))
                })
                .unwrap();
            counts[nearest] += 1;
        }
        for (count, fair) in counts.into_iter().zip([5_000u32, 5_000, 10_000]) {
            assert!(count.abs_diff(fair) < 250, "{counts:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(0u32..=256, 1..20)) {
            prop_assume!(weights.iter().any(|weight| *weight > 0));
            let sum: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            for (share, weight) in shares(&table(&weights), weights.len()).into_iter().zip(&weights) {
                let fair = PLACES as f64 * f64::from(*weight) / sum as f64;
                // After r whole rounds a server has the whole part of
                // r * weight / heaviest; the round that fills the table is cut
                // anywhere. Each of n servers is behind by less than one place
                // then, and rounds go on until that is made up: hence the n.
                let count = weights.iter().filter(|weight| **weight > 0).count() as f64;
                let over = 1.0 + count * f64::from(*weight) / sum as f64;
                let off = share as f64 - fair;
                prop_assert!(off > -2.0 && off < over || *weight == 0 && share == 0, "{share} for a fair {fair}");
            }
        }

        #[test]
        fn a_server_that_goes_moves_few_clients_of_others(count in 2usize..40, gone in 0usize..40) {
            let gone = gone % count;
            let names = names(count);
            let all: Vec<(usize, &str, u32)> = names.iter().enumerate().map(|(i, n)| (i, n.as_str(), 1)).collect();
            let before = fill(all.iter().copied()).unwrap();
            let after = fill(all.iter().copied().filter(|(i, ..)| *i != gone)).unwrap();
            let moved = before.iter().zip(&after)
                .filter(|(b, a)| usize::from(**b) != gone && a != b).count();
            // The paper's figure 12: some per cent at this size of table.
            prop_assert!(moved * 100 < PLACES * 6, "{moved} of {PLACES} moved needlessly");
        }

        #[test]
        fn every_server_is_named_in_the_end(count in 1usize..30, client: [u8; 4]) {
            let table = table(&vec![1; count]);
            let mut seen: Vec<usize> = servers(&table, IpAddr::from(client)).collect();
            seen.sort();
            seen.dedup();
            prop_assert_eq!(seen, (0..count).collect::<Vec<_>>());
        }
    }
}
