//! Where a client's datagrams go: what the kernel's program will answer,
//! computed here, so that a flow can be where its datagrams come.
//!
//! `None` = nobody can say: the kernel's own hash is keyed by a secret, and by
//! CPU or at random it is not the client that decides. Made by the supervisor
//! at each change, handed to the workers, bounded by the table.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::bucket::{FOLD, LAST_MULTIPLIER, MULTIPLIER};
use super::{BUCKET_COUNT, Table, bucket, source_bucket};

/// How one listener's datagrams are steered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Route {
    /// By the table of the kernel's program: a slot for each bucket.
    #[allow(missing_docs)]
    Table { seed: u32, with_port: bool, slots: Vec<u8> },
    /// By classic BPF.
    #[allow(missing_docs)]
    Classic { seed: u32, with_port: bool, live: Vec<bool> },
    /// Nobody can say.
    Unknown,
}

impl Route {
    /// By this table.
    pub fn of_table(seed: u32, with_port: bool, table: &Table) -> Route {
        Route::Table { seed, with_port, slots: table.bytes().to_vec() }
    }

    /// The slot that a client's datagrams come to.
    pub fn slot(&self, client: SocketAddr) -> Option<usize> {
        match self {
            Route::Table { seed, with_port, slots } => {
                let bucket =
                    if *with_port { bucket(*seed, client) } else { source_bucket(*seed, client.ip()) };
                slots.get(bucket % BUCKET_COUNT).map(|slot| usize::from(*slot))
            }
            Route::Classic { seed, with_port, live } => {
                let hash = classic_hash(*seed, client, *with_port) as usize;
                let first = hash.checked_rem(live.len())?;
                if live[first] {
                    return Some(first);
                }
                let here: Vec<usize> = (0..live.len()).filter(|&slot| live[slot]).collect();
                here.get((hash / live.len()).checked_rem(here.len())?).copied()
            }
            Route::Unknown => None,
        }
    }
}

/// What `classic::program` computes: words as BPF loads them, in network order,
/// the port first.
fn classic_hash(seed: u32, client: SocketAddr, with_port: bool) -> u32 {
    let port = if with_port { u32::from(client.port()) } else { 0 };
    let mut hash = fold(port ^ seed, MULTIPLIER);
    let mut take = |octets: &[u8]| {
        for four in octets.chunks_exact(4) {
            let word = u32::from_be_bytes(four.try_into().expect("chunks of four"));
            hash = fold(hash ^ word, MULTIPLIER);
        }
    };
    match client.ip() {
        IpAddr::V4(address) => take(&address.octets()),
        IpAddr::V6(address) => take(&address.octets()),
    }
    fold(hash, LAST_MULTIPLIER)
}

fn fold(hash: u32, multiplier: u32) -> u32 {
    let product = hash.wrapping_mul(multiplier);
    product ^ product >> FOLD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_s_route_is_the_slot_of_the_clients_bucket() {
        let table = Table::new(&[1, 1, 1]);
        let client: SocketAddr = "10.1.2.3:999".parse().unwrap();
        let route = Route::of_table(5, true, &table);
        assert_eq!(route.slot(client), Some(table.slot(bucket(5, client))));
        let route = Route::of_table(5, false, &table);
        assert_eq!(route.slot(client), Some(table.slot(source_bucket(5, client.ip()))));
        assert_eq!(Route::Unknown.slot(client), None);
    }

    #[test]
    fn a_short_table_and_a_daemon_without_slots_lead_nowhere() {
        let client: SocketAddr = "10.1.2.3:999".parse().unwrap();
        assert_eq!(Route::Table { seed: 1, with_port: true, slots: vec![] }.slot(client), None);
        assert_eq!(Route::Classic { seed: 1, with_port: true, live: vec![] }.slot(client), None);
        assert_eq!(Route::Classic { seed: 1, with_port: true, live: vec![false; 3] }.slot(client), None);
    }

    #[test]
    fn a_slot_that_is_away_gives_its_clients_alone_to_those_that_are_there() {
        let route = |live: &[bool]| Route::Classic { seed: 3, with_port: true, live: live.to_vec() };
        let (all, two) = (route(&[true; 3]), route(&[true, false, true]));
        for port in 1..500 {
            let client = SocketAddr::from(([10, 0, 0, 1], port));
            match all.slot(client) {
                Some(1) => assert_ne!(two.slot(client), Some(1)),
                other => assert_eq!(two.slot(client), other),
            }
        }
    }
}
