//! Sessions at a server that workers of another generation have.
//!
//! A limit over all workers has to hold while they hand over: a new worker is
//! told at its birth where those before it count, an old one where those that
//! take its place do. Read only; what a dead worker had is counted out by the
//! supervisor. Bounded by one generation on either side: what is left of still
//! elsewhere ones is not counted. Lives as long as the worker.

use std::os::fd::OwnedFd;

use crate::config::Config;
use crate::counters::{Counters, Layout, OfServer};
use crate::sys::shared::{self, Region};

/// The counters of another generation, by the places of one's own.
#[derive(Debug)]
pub struct Elsewhere {
    regions: Vec<Region>,
    layout: Layout,
    /// By upstream and place: the number among all places there.
    places: Vec<Vec<Option<usize>>>,
}

impl Elsewhere {
    /// From a configuration and the counters of its slots; `own` = one's own.
    pub fn open(own: &Config, fds: impl IntoIterator<Item = OwnedFd>) -> Result<Elsewhere, String> {
        let mut fds = fds.into_iter();
        let sealed = fds.next().ok_or("a generation without its configuration")?;
        let bytes = shared::read_sealed(sealed).map_err(|error| error.to_string())?;
        let other: Config = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        let regions = fds.map(Region::open_read_only).collect::<Result<_, _>>();
        Ok(Elsewhere::new(&other, own, regions.map_err(|error| error.to_string())?))
    }

    /// The counters of `other`, to be asked for places of `own`.
    fn new(other: &Config, own: &Config, regions: Vec<Region>) -> Elsewhere {
        let (layout, own_layout) = (Layout::of(other), Layout::of(own));
        let places = own.upstreams.iter().enumerate().map(|(number, upstream)| {
            let before = other.upstreams.iter().position(|old| old.name == upstream.name);
            let find = |place: usize| {
                let (before, server) = (before?, own_layout.numbering().server_of(number, place));
                let within = place - own_layout.numbering().places_of(number, server).start;
                let address = &upstream.servers[server].address;
                let servers = &other.upstreams[before].servers;
                let server = servers.iter().position(|old| old.address == *address)?;
                // A server of the same name has as many places.
                let place = layout.numbering().places_of(before, server).nth(within)?;
                Some(layout.place(before, place))
            };
            (0..own_layout.numbering().places_in(number)).map(find).collect()
        });
        Elsewhere { places: places.collect(), regions, layout }
    }

    /// Descriptors that it keeps.
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// Sessions of a place.
    pub fn active_at(&self, upstream: usize, place: usize) -> u64 {
        let Some(number) = self.places[upstream][place] else { return 0 };
        let counters = self.regions.iter().filter_map(|region| Counters::over(region.words(), &self.layout));
        counters.map(|counters| counters.server(number, OfServer::Active).get()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(servers: &[&str]) -> Config {
        let mut text = String::from(
            "[[listener]]\nname = \"l\"\nbind = \"127.0.0.1:80\"\nmode = \"tcp\"\nupstream = \"u\"\n\
             [[upstream]]\nname = \"u\"\n",
        );
        servers.iter().for_each(|server| text += &format!("[[upstream.server]]\naddress = \"{server}\"\n"));
        crate::config::load("test", &text).expect("a sane configuration").config
    }

    #[test]
    fn places_are_known_again_by_their_servers() {
        let old = config(&["10.0.0.1:80", "db.example:80", "10.0.0.2:80"]);
        let new = config(&["10.0.0.2:80", "10.0.0.3:80", "db.example:80"]);
        let layout = Layout::of(&old);
        let regions: Vec<Region> =
            (0..2).map(|_| Region::create("test", layout.word_count()).unwrap()).collect();
        for region in &regions {
            let counters = Counters::over(region.words(), &layout).unwrap();
            (0..18).for_each(|place| counters.server(place, OfServer::Active).set(place as u64));
        }
        let elsewhere = Elsewhere::new(&old, &new, regions);
        // Twice the old number; nothing for the server that is new.
        assert_eq!([0, 1, 2, 17].map(|place| elsewhere.active_at(0, place)), [34, 0, 2, 32]);
    }
}
