//! How long connecting to a server took, over everything that counted it.

use super::{Source, places_in};
use crate::control::status::Connect;
use crate::counters::{CONNECT_BOUNDS, OfServer};

/// All connects to a server of an upstream that succeeded.
pub fn of(sources: &[Source], upstream: &str, address: &str) -> Connect {
    let mut buckets = vec![0; CONNECT_BOUNDS.len() + 1];
    let mut sum_us = 0;
    for source in sources {
        let Some(index) = source.config.upstreams.iter().position(|u| u.name == upstream) else { continue };
        for place in places_in(source, index, address).into_iter().flatten() {
            let place = source.layout.place(index, place);
            sum_us += source.counters.server(place, OfServer::ConnectTime).get();
            for (bucket, count) in buckets.iter_mut().enumerate() {
                *count += source.counters.connects(place, bucket).get();
            }
        }
    }
    Connect {
        count: buckets.iter().sum(),
        sum_us,
        p50_us: quantile(&buckets, 50),
        p99_us: quantile(&buckets, 99),
        buckets,
    }
}

/// The upper bound of the bucket in which so many percent are reached.
fn quantile(buckets: &[u64], percent: u64) -> u64 {
    let wanted = (buckets.iter().sum::<u64>() * percent).div_ceil(100);
    let mut seen = 0;
    let bucket = buckets.iter().position(|count| {
        seen += count;
        seen >= wanted && wanted > 0
    });
    bucket.map_or(0, |bucket| CONNECT_BOUNDS[bucket.min(CONNECT_BOUNDS.len() - 1)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_ends_of_their_buckets() {
        let mut buckets = vec![0; CONNECT_BOUNDS.len() + 1];
        assert_eq!(quantile(&buckets, 50), 0);
        buckets[0] = 98;
        buckets[3] = 2;
        assert_eq!(
            (quantile(&buckets, 50), quantile(&buckets, 98), quantile(&buckets, 99)),
            (100, 100, 1_000)
        );
        buckets[15] = 1_000;
        assert_eq!(quantile(&buckets, 99), 5_000_000);
    }
}
