//! What a place of the upstream board is: its server in the file, where it
//! leads now, and what it is called where numbers mean nothing.

use std::sync::atomic::{Ordering::SeqCst, fence};

use super::sessions::Context;
use crate::balance::Balancer;
use crate::board::Address;
use crate::config::ServerAddress;
use crate::counters::OfServer;

impl Context<'_> {
    /// The server of the configuration that a place belongs to.
    pub fn server_at(&self, upstream: usize, place: usize) -> &ServerAddress {
        let server = self.layout.numbering().server_of(upstream, place);
        &self.config.upstreams[upstream].servers[server].address
    }

    /// Counts a session or flow at a place before it is there; false, and
    /// nothing is counted, where other workers were faster and it has the most
    /// that it may (0 = any number).
    pub fn reserve(&self, upstream: usize, place: usize, most: u64) -> bool {
        let active = self.counters.server(self.layout.place(upstream, place), OfServer::Active);
        active.add(1);
        if most == 0 {
            return true;
        }
        // Each worker counts itself first and looks at the others then: of
        // those that come at once, the last to look sees all of them.
        fence(SeqCst);
        let has_room = self.active_at(upstream, place) <= most;
        if !has_room {
            active.less_one();
        }
        has_room
    }

    /// Where a place leads now; `None` where it is vacant.
    pub fn address_at(&self, balancer: &Balancer, upstream: usize, place: usize) -> Option<ServerAddress> {
        match balancer.places().get(place)?.address? {
            Address::Ip(address) => Some(ServerAddress::Ip(address)),
            Address::Unix => Some(self.server_at(upstream, place).clone()),
        }
    }

    /// What a place is called between processes, whatever its number.
    pub fn place_name(&self, balancer: &Balancer, upstream: usize, place: usize) -> String {
        let server = self.server_at(upstream, place);
        match server {
            ServerAddress::Ip(_) | ServerAddress::Unix(_) => server.to_string(),
            ServerAddress::Name { .. } | ServerAddress::Srv(_) => {
                match self.address_at(balancer, upstream, place) {
                    Some(address) => format!("{server}={address}"),
                    None => String::new(),
                }
            }
        }
    }

    /// The place of this name.
    pub fn place_named(&self, balancer: &Balancer, upstream: usize, name: &str) -> Option<usize> {
        let places = self.layout.numbering().places_in(upstream);
        (0..places).find(|&place| !name.is_empty() && self.place_name(balancer, upstream, place) == name)
    }
}
