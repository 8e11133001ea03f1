//! How places are numbered: upstream by upstream, server by server.
//!
//! Every process of a generation computes the same from its configuration, for
//! the board and for the counters. A server with an address has one place; a
//! name has as many as it may have addresses at once.

use std::ops::Range;

use crate::config::{Config, ServerAddress};

/// The places of each server of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbering {
    upstreams: Vec<Upstream>,
    place_count: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Upstream {
    /// The number of its first place among all.
    first: usize,
    /// Where each server's places end, within the upstream.
    ends: Vec<usize>,
}

/// Addresses of a name at once. More than that a resolver passes over TCP
/// alone, and rotates.
const PLACES_OF_NAME: usize = 16;
/// Targets of an SRV name at once, with all their addresses.
const PLACES_OF_SRV: usize = 64;

/// How many addresses a server may have at once.
pub fn place_count(address: &ServerAddress) -> usize {
    match address {
        ServerAddress::Ip(_) | ServerAddress::Unix(_) => 1,
        ServerAddress::Name { .. } => PLACES_OF_NAME,
        ServerAddress::Srv(_) => PLACES_OF_SRV,
    }
}

impl Numbering {
    /// The numbering of a configuration.
    pub fn of(config: &Config) -> Numbering {
        Numbering::from_counts(config.upstreams.iter().map(|upstream| {
            upstream.servers.iter().map(|server| place_count(&server.address)).collect::<Vec<_>>()
        }))
    }

    /// The numbering for so many places a server, upstream by upstream.
    pub fn from_counts(upstreams: impl Iterator<Item = Vec<usize>>) -> Numbering {
        let mut first = 0;
        let upstreams = upstreams
            .map(|counts| {
                let mut end = 0;
                let add = |count| {
                    end += count;
                    end
                };
                let upstream = Upstream { first, ends: counts.into_iter().map(add).collect() };
                first += end;
                upstream
            })
            .collect();
        Numbering { upstreams, place_count: first }
    }

    /// Upstreams.
    pub fn upstream_count(&self) -> usize {
        self.upstreams.len()
    }

    /// Places of all upstreams.
    pub fn place_count(&self) -> usize {
        self.place_count
    }

    /// Places of one upstream.
    pub fn places_in(&self, upstream: usize) -> usize {
        self.upstreams[upstream].ends.last().copied().unwrap_or(0)
    }

    /// The number among all places of an upstream's place.
    pub fn place(&self, upstream: usize, place: usize) -> usize {
        debug_assert!(place < self.places_in(upstream));
        self.upstreams[upstream].first + place
    }

    /// The places of a server, numbered within its upstream.
    pub fn places_of(&self, upstream: usize, server: usize) -> Range<usize> {
        let ends = &self.upstreams[upstream].ends;
        let start = if server == 0 { 0 } else { ends[server - 1] };
        start..ends[server]
    }

    /// The server that a place of an upstream belongs to.
    pub fn server_of(&self, upstream: usize, place: usize) -> usize {
        self.upstreams[upstream].ends.partition_point(|&end| end <= place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_belongs_to_one_server() {
        let numbering = Numbering::from_counts([vec![1, 16, 1], vec![], vec![64]].into_iter());
        assert_eq!((numbering.place_count(), numbering.places_in(0), numbering.places_in(1)), (82, 18, 0));
        for (upstream, servers) in [(0, 3), (2, 1)] {
            for server in 0..servers {
                for place in numbering.places_of(upstream, server) {
                    assert_eq!(numbering.server_of(upstream, place), server);
                }
            }
        }
        assert_eq!(numbering.place(2, 63), 81);
    }
}
