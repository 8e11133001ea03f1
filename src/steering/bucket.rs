//! Where a client falls: the hash that the steering program computes over the
//! packet, computed here over the client's address.
//!
//! The kernel's own hash is keyed by a secret of the kernel, so nobody could
//! say where a flow belongs; this one is keyed by a seed of ours. It spreads
//! well and is no cryptography: who knows the seed can aim at a slot.

use std::net::{IpAddr, SocketAddr};

use super::table::BUCKET_COUNT;

/// Odd numbers whose products spread well; the same in `program`, `classic`.
pub const MULTIPLIER: u32 = 0x9E37_79B1;
/// For the last step.
pub const LAST_MULTIPLIER: u32 = 0x85EB_CA6B;
/// How far a product is folded onto itself.
pub const FOLD: u32 = 15;

/// The bucket of everything that this client sends from this port.
pub fn bucket(seed: u32, client: SocketAddr) -> usize {
    let [high, low] = client.port().to_be_bytes();
    of_hash(hash(seed, client.ip(), u32::from_ne_bytes([high, low, 0, 0])))
}

/// The bucket of everything that this client sends.
pub fn source_bucket(seed: u32, client: IpAddr) -> usize {
    of_hash(hash(seed, client, 0))
}

fn of_hash(hash: u32) -> usize {
    hash as usize % BUCKET_COUNT
}

/// The words are taken as they lie in the packet, in the machine's own order,
/// because that is how the program loads them.
fn hash(seed: u32, client: IpAddr, port: u32) -> u32 {
    let mut words = [0, 0, 0, 0, port];
    // A client that an IPv6 socket shows as ::ffff:1.2.3.4 sends IPv4 packets.
    match client.to_canonical() {
        IpAddr::V4(address) => words[0] = u32::from_ne_bytes(address.octets()),
        IpAddr::V6(address) => {
            for (word, four) in words.iter_mut().zip(address.octets().chunks_exact(4)) {
                *word = u32::from_ne_bytes(four.try_into().expect("chunks of four"));
            }
        }
    }
    let mixed = words.into_iter().fold(seed, |hash, word| {
        let product = (hash ^ word).wrapping_mul(MULTIPLIER);
        product ^ product >> FOLD
    });
    let last = mixed.wrapping_mul(LAST_MULTIPLIER);
    last ^ last >> FOLD
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spread::Spread;

    #[test]
    fn a_mapped_address_falls_where_its_ipv4_packets_fall() {
        let plain: SocketAddr = "10.1.2.3:4567".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:10.1.2.3]:4567".parse().unwrap();
        assert_eq!(bucket(7, plain), bucket(7, mapped));
        assert_eq!(source_bucket(7, plain.ip()), source_bucket(7, mapped.ip()));
    }

    #[test]
    fn the_port_counts_for_a_flow_and_not_for_a_source() {
        let at = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let distinct =
            |buckets: Vec<usize>| buckets.into_iter().collect::<std::collections::HashSet<_>>().len();
        assert!(distinct((1..1000).map(|port| bucket(1, at(port))).collect()) > 500);
        assert_eq!(distinct((1..1000).map(|port| source_bucket(1, at(port).ip())).collect()), 1);
    }

    /// Neighbouring addresses and ports are what clients have. Seeded: what
    /// passes once passes always; p = 0.001 each, so a fair hash had 1 chance
    /// in 60 to be rejected when the numbers were first drawn.
    #[test]
    fn neighbouring_clients_fall_evenly_over_the_buckets() {
        for seed in [0, 1, 0xDEAD_BEEF, u32::MAX] {
            let clients: [Vec<SocketAddr>; 4] = [
                (0..65_536u32).map(|i| SocketAddr::from(((0x0A00_0000 + i).to_be_bytes(), 999))).collect(),
                (0..65_536u32).map(|i| SocketAddr::from(([10, 0, 0, 1], i as u16))).collect(),
                (0..65_536u32).map(|i| SocketAddr::from(([10, 0, (i >> 12) as u8, 1], i as u16))).collect(),
                (0..65_536u128)
                    .map(|i| SocketAddr::from(((0x2001_0DB8_u128 << 96 | i << 64 | 1).to_be_bytes(), 53)))
                    .collect(),
            ];
            for (kind, clients) in clients.iter().enumerate() {
                let mut counts = vec![0; BUCKET_COUNT];
                clients.iter().for_each(|client| counts[bucket(seed, *client)] += 1);
                // A multiplicative hash may be more even than chance; that is no fault.
                let spread = Spread::equal(&counts);
                assert!(spread.p_value > 0.001, "seed {seed} kind {kind}: {}", spread.chi_square);
            }
        }
    }
}
