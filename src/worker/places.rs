//! What a place of the upstream board is: its server in the file, where it
//! leads now, and what it is called where numbers mean nothing.

use super::sessions::Context;
use crate::balance::Balancer;
use crate::board::Address;
use crate::config::ServerAddress;

impl Context<'_> {
    /// The server of the configuration that a place belongs to.
    pub fn server_at(&self, upstream: usize, place: usize) -> &ServerAddress {
        let server = self.layout.numbering().server_of(upstream, place);
        &self.config.upstreams[upstream].servers[server].address
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
