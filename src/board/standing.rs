//! How every server stands, and with it what belongs on the board.
//!
//! ```text
//!   file + overrides ---------+
//!   verdicts of checks -------+--> places --publish--> board
//!   answers of the resolver --+
//! ```
//! Owned by the steward; the supervisor makes one for a moment to fill the
//! board of a new generation. Pure: it changes by what it is told, and nothing
//! ends by itself. Bounded by the configuration: a name has so many places and
//! no more (`place_count`).

use std::net::SocketAddr;
use std::ops::Range;

use super::{Address, Admin, Board, Health, Layout, Override, Overrides, Place, State};
use crate::balance::maglev;
use crate::config::{Balance, Config, ServerAddress, Upstream as FileUpstream};

/// Above every priority: backups are used when nobody else can be.
const BACKUP_TIER: u32 = 1 << 16;

/// One address of a server, by names that hold over reloads.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlaceId {
    /// The upstream's name.
    pub upstream: String,
    /// The server's address as the file writes it.
    pub server: String,
    /// The address behind it: the same again, unless the file names a name.
    pub address: String,
}

/// An address that a name has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Where.
    pub address: SocketAddr,
    /// Its share as its SRV record has it; 1 for an address record. 0 counts
    /// as the smallest share.
    pub weight: u32,
    /// Its priority as its SRV record has it, the lowest first; 0 for an
    /// address record.
    pub priority: u16,
}

/// All upstreams.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    upstreams: Vec<Upstream>,
}

/// One upstream.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Its name.
    pub name: String,
    /// Its servers, in the file's order.
    pub servers: Vec<Server>,
    /// Its places, in the board's order.
    pub places: Vec<Place>,
    is_hashed: bool,
    /// Milliseconds; 0 = none.
    slow_start: u64,
}

/// One server of the file.
#[derive(Clone, Debug)]
pub struct Server {
    /// Its address as the file writes it.
    pub name: String,
    /// The same, as meant.
    pub address: ServerAddress,
    /// Its weight in the file.
    pub file_weight: u32,
    /// How the operator changed it.
    pub own: Override,
    /// Its places among the upstream's.
    pub places: Range<usize>,
    /// Why its name has no fresh answer.
    pub resolve_error: Option<String>,
    is_backup: bool,
    max_connections: u64,
    was_resolved: bool,
}

impl Standing {
    /// Everything as the file and the operator have it; names without
    /// addresses.
    pub fn new(config: &Config, overrides: &Overrides) -> Standing {
        let layout = Layout::of(config);
        let upstreams = config.upstreams.iter().enumerate().map(|(index, upstream)| {
            let places = |server| layout.numbering().places_of(index, server);
            let mut upstream = Upstream::new(upstream, &places);
            upstream.set_overrides(overrides, 0);
            upstream
        });
        Standing { upstreams: upstreams.collect() }
    }

    /// Takes up what a board of the same configuration says: the verdicts and
    /// addresses that stood when their owner went away.
    pub fn take_up(&mut self, board: &Board) {
        for (index, upstream) in self.upstreams.iter_mut().enumerate() {
            let Some((_, places)) = board.read(index) else { continue };
            for (own, there) in upstream.places.iter_mut().zip(places) {
                own.take_state(there);
            }
            upstream.refresh_all();
        }
    }

    /// Takes over how servers stand that another configuration had as well, by
    /// the upstream's name and the server's address.
    pub fn carry_over(&mut self, from: &Standing) {
        for upstream in &mut self.upstreams {
            let Some(old) = from.upstreams.iter().find(|old| old.name == upstream.name) else { continue };
            for server in &mut upstream.servers {
                let Some(before) = old.servers.iter().find(|old| old.name == server.name) else { continue };
                server.resolve_error = before.resolve_error.clone();
                let pairs = server.places.clone().zip(before.places.clone());
                for (place, other) in pairs {
                    upstream.places[place].take_state(old.places[other].clone());
                }
            }
            upstream.refresh_all();
        }
    }

    /// Takes in what the operator changed, all of it. Whether anything did.
    pub fn set_overrides(&mut self, overrides: &Overrides, now: u64) -> bool {
        self.upstreams.iter_mut().fold(false, |any, upstream| upstream.set_overrides(overrides, now) | any)
    }

    /// A verdict on a place. Whether it changes anything: a place that is not
    /// there any more changes nothing.
    pub fn handle_verdict(&mut self, id: &PlaceId, health: Health, now: u64) -> bool {
        let Some((upstream, place)) = self.find(id) else { return false };
        let upstream = &mut self.upstreams[upstream];
        let slow_start = upstream.slow_start;
        let place = &mut upstream.places[place];
        if place.health == health {
            return false;
        }
        place.health = health;
        place.slow_start = if health == Health::Up && slow_start > 0 { now.max(1) } else { 0 };
        true
    }

    /// What a server's name resolves to now, or why it does not: then the
    /// addresses that it had stand. Whether a place changed, and how many
    /// addresses found no room.
    pub fn handle_resolution(
        &mut self,
        upstream: &str,
        server: &str,
        answer: Result<Vec<Resolved>, String>,
        now: u64,
    ) -> (bool, usize) {
        let Some(upstream) = self.upstreams.iter_mut().find(|own| own.name == upstream) else {
            return (false, 0);
        };
        let Some(index) = upstream.servers.iter().position(|own| own.name == server) else {
            return (false, 0);
        };
        match answer {
            Err(error) => {
                upstream.servers[index].resolve_error = Some(error);
                (false, 0)
            }
            Ok(addresses) => upstream.handle_addresses(index, addresses, now),
        }
    }

    /// All upstreams, in the file's order.
    pub fn upstreams(&self) -> &[Upstream] {
        &self.upstreams
    }

    /// The numbers of a place's upstream and of the place in it, if it is
    /// there.
    pub fn find(&self, id: &PlaceId) -> Option<(usize, usize)> {
        let number = self.upstreams.iter().position(|upstream| upstream.name == id.upstream)?;
        let upstream = &self.upstreams[number];
        let server = upstream.servers.iter().find(|server| server.name == id.server)?;
        let is_it = |&place: &usize| {
            upstream.places[place].address.is_some_and(|address| server.shown(address) == id.address)
        };
        server.places.clone().find(is_it).map(|place| (number, place))
    }

    /// Every place with an address, and where it is.
    pub fn places(&self) -> impl Iterator<Item = (PlaceId, &Upstream, &Server, &Place)> {
        self.upstreams.iter().flat_map(|upstream| {
            upstream.servers.iter().flat_map(move |server| {
                server.places.clone().filter_map(move |place| {
                    let place = &upstream.places[place];
                    let id = PlaceId {
                        upstream: upstream.name.clone(),
                        server: server.name.clone(),
                        address: server.shown(place.address?),
                    };
                    Some((id, upstream, server, place))
                })
            })
        })
    }

    /// Brings the board up to date. Whether anything was written.
    pub fn publish(&self, board: &Board) -> bool {
        let mut any = false;
        for (index, upstream) in self.upstreams.iter().enumerate() {
            let table = upstream.table_key();
            if upstream.is_hashed && table != board.table_key(index) {
                let entries: Vec<(usize, String, u32)> = upstream.table_entries().collect();
                let entries = entries.iter().map(|(place, name, weight)| (*place, name.as_str(), *weight));
                if let Some(filled) = maglev::fill(entries) {
                    board.write_table(index, table, &filled);
                    any = true;
                }
            }
            if board.read(index).is_none_or(|(_, there)| there != upstream.places) {
                board.write(index, &upstream.places);
                any = true;
            }
        }
        any
    }
}

impl Upstream {
    fn new(file: &FileUpstream, places_of: &dyn Fn(usize) -> Range<usize>) -> Upstream {
        let servers = file.servers.iter().enumerate().map(|(index, server)| Server {
            name: server.address.to_string(),
            address: server.address.clone(),
            file_weight: server.weight,
            own: Override::default(),
            places: places_of(index),
            resolve_error: None,
            is_backup: server.backup,
            max_connections: u64::from(server.max_connections),
            was_resolved: false,
        });
        let servers: Vec<Server> = servers.collect();
        let place_count = servers.last().map_or(0, |server| server.places.end);
        let mut places = vec![Place { share: 1, ..Place::default() }; place_count];
        for server in &servers {
            places[server.places.start].address = server.fixed_address();
        }
        Upstream {
            name: file.name.clone(),
            servers,
            places,
            is_hashed: file.balance == Balance::SourceHash,
            slow_start: u64::try_from(file.health.slow_start.as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn set_overrides(&mut self, overrides: &Overrides, now: u64) -> bool {
        let before = self.places.clone();
        for server in &mut self.servers {
            server.own = overrides.get(&self.name, &server.name);
        }
        self.refresh_all();
        for (place, before) in self.places.iter_mut().zip(&before) {
            // What was not checked may have been down, or just restarted.
            let is_back = before.admin == Admin::Disabled && place.admin != Admin::Disabled;
            if is_back && self.slow_start > 0 && place.health == Health::Up {
                place.slow_start = now.max(1);
            }
        }
        self.places != before
    }

    /// Brings what follows from the file and the operator up to date.
    fn refresh_all(&mut self) {
        for server in &mut self.servers {
            for place in &mut self.places[server.places.clone()] {
                server.was_resolved |= place.address.is_some();
                server.refresh(place);
            }
        }
    }

    fn handle_addresses(&mut self, index: usize, addresses: Vec<Resolved>, now: u64) -> (bool, usize) {
        let before = self.places.clone();
        let server = &mut self.servers[index];
        server.resolve_error = None;
        let places = &mut self.places[server.places.clone()];
        for place in places.iter_mut() {
            match addresses.iter().find(|found| place.address == Some(Address::Ip(found.address))) {
                Some(found) => (place.share, place.priority) = (found.weight.max(1), found.priority),
                None => (place.address, place.health, place.slow_start) = (None, Health::Up, 0),
            }
        }
        // The first addresses of all have nobody beside them to spare them.
        let slow_start = if server.was_resolved && self.slow_start > 0 { now.max(1) } else { 0 };
        let mut without_room = 0;
        for found in &addresses {
            let address = Some(Address::Ip(found.address));
            if places.iter().any(|place| place.address == address) {
                continue;
            }
            // Sessions of whoever had a place still count there: the one that
            // was used least is the least likely to have any.
            let vacant = places.iter_mut().filter(|place| place.address.is_none());
            let Some(place) = vacant.min_by_key(|place| place.incarnation) else {
                without_room += 1;
                continue;
            };
            let (share, priority) = (found.weight.max(1), found.priority);
            let incarnation = place.incarnation.wrapping_add(1);
            *place = Place { address, share, priority, incarnation, slow_start, ..Place::default() };
        }
        self.refresh_all();
        (self.places != before, without_room)
    }

    /// The places that a table by client address is made of: those of the
    /// first tier, up or not, so that a server which goes and comes back moves
    /// nobody else's clients.
    fn table_entries(&self) -> impl Iterator<Item = (usize, String, u32)> {
        let usable = |place: &&Place| place.address.is_some() && place.weight > 0;
        let first = self.places.iter().filter(usable).map(|place| place.tier).min();
        self.servers.iter().flat_map(move |server| {
            server.places.clone().filter_map(move |number| {
                let place = &self.places[number];
                let is_in = place.weight > 0 && Some(place.tier) == first;
                let address = place.address.filter(|_| is_in)?;
                Some((number, server.shown(address), place.weight))
            })
        })
    }

    fn table_key(&self) -> u64 {
        if !self.is_hashed {
            return 0;
        }
        let text = self.table_entries().fold(String::new(), |mut text, (place, name, weight)| {
            use std::fmt::Write;
            let _ = writeln!(text, "{place} {name} {weight}");
            text
        });
        if text.is_empty() { 0 } else { maglev::hash_bytes(text.as_bytes()).max(1) }
    }
}

impl Server {
    /// The place's address as people and checks see it.
    pub fn shown(&self, address: Address) -> String {
        match address {
            Address::Ip(address) => address.to_string(),
            Address::Unix => self.name.clone(),
        }
    }

    /// Its weight as the operator or the file has it.
    pub fn weight(&self) -> u32 {
        self.own.weight.unwrap_or(self.file_weight)
    }

    /// Whether it is not as the file has it.
    pub fn differs(&self) -> bool {
        self.own != Override::default()
    }

    /// How it stands as a whole: as the best of its places.
    pub fn state(&self, upstream: &Upstream) -> State {
        let states = || upstream.places[self.places.clone()].iter().map(Place::state);
        let order = [State::Disabled, State::Draining, State::Up, State::Down];
        order.into_iter().find(|state| states().any(|own| own == *state)).unwrap_or(State::Unresolved)
    }

    fn fixed_address(&self) -> Option<Address> {
        match &self.address {
            ServerAddress::Ip(address) => Some(Address::Ip(*address)),
            ServerAddress::Unix(_) => Some(Address::Unix),
            ServerAddress::Name { .. } | ServerAddress::Srv(_) => None,
        }
    }

    fn refresh(&self, place: &mut Place) {
        if let Some(address) = self.fixed_address() {
            (place.address, place.share, place.priority) = (Some(address), 1, 0);
        }
        place.weight = self.weight().saturating_mul(place.share);
        place.tier = u32::from(place.priority) + if self.is_backup { BACKUP_TIER } else { 0 };
        place.admin = self.own.admin();
        place.max_connections = self.max_connections;
    }
}

impl Place {
    /// Takes over what was found out about it; what the file and the operator
    /// say of it is `refresh`ed.
    fn take_state(&mut self, from: Place) {
        let Place { address, health, slow_start, incarnation, share, priority, .. } = from;
        *self = Place { address, health, slow_start, incarnation, share, priority, ..std::mem::take(self) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Change;
    use std::sync::atomic::AtomicU64;

    fn config(servers: &str) -> Config {
        let text = format!(
            "[[listener]]\nname = \"a\"\nmode = \"tcp\"\nbind = \"127.0.0.1:1\"\nupstream = \"web\"\n\
             [[upstream]]\nname = \"web\"\nbalance = \"source-hash\"\n{servers}\
             [upstream.health]\nslow_start = \"10s\"\n"
        );
        crate::config::load("test", &text).expect("a sane configuration").config
    }

    fn server(address: &str) -> String {
        format!("[[upstream.server]]\naddress = \"{address}\"\n")
    }

    fn id(server: &str, address: &str) -> PlaceId {
        PlaceId { upstream: "web".into(), server: server.into(), address: address.into() }
    }

    fn found(address: &str) -> Resolved {
        Resolved { address: address.parse().unwrap(), weight: 1, priority: 0 }
    }

    fn state(standing: &Standing, server: usize) -> State {
        let upstream = &standing.upstreams()[0];
        upstream.servers[server].state(upstream)
    }

    const NAME: &str = "db.example:80";

    #[test]
    fn a_verdict_holds_and_coming_back_is_slow() {
        let config = config(&(server("10.0.0.1:80") + &server("10.0.0.2:80")));
        let mut standing = Standing::new(&config, &Overrides::default());
        let id = id("10.0.0.1:80", "10.0.0.1:80");
        assert!(standing.handle_verdict(&id, Health::Down, 500));
        assert!(!standing.handle_verdict(&id, Health::Down, 600));
        assert_eq!((state(&standing, 0), state(&standing, 1)), (State::Down, State::Up));
        assert!(standing.handle_verdict(&id, Health::Up, 700));
        let places = &standing.upstreams()[0].places;
        assert_eq!((places[0].slow_start, places[1].slow_start), (700, 0));
    }

    #[test]
    fn an_address_keeps_its_place_while_others_come_and_go() {
        let config = config(&server(NAME));
        let mut standing = Standing::new(&config, &Overrides::default());
        assert_eq!(state(&standing, 0), State::Unresolved);
        let mut resolve = |addresses: &[&str], now| {
            let answer = addresses.iter().map(|address| found(address)).collect();
            standing.handle_resolution("web", NAME, Ok(answer), now)
        };
        assert_eq!(resolve(&["10.0.0.1:80", "10.0.0.2:80"], 5), (true, 0));
        assert_eq!(resolve(&["10.0.0.2:80", "10.0.0.1:80"], 6), (false, 0));
        assert_eq!(resolve(&["10.0.0.3:80", "10.0.0.2:80"], 7), (true, 0));
        let places = &standing.upstreams()[0].places;
        let at = |place: usize| {
            places[place].address.map(|address| standing.upstreams()[0].servers[0].shown(address))
        };
        assert_eq!(
            (at(0), at(1).as_deref(), at(2).as_deref()),
            (None, Some("10.0.0.2:80"), Some("10.0.0.3:80"))
        );
        // The first answer began at once, the newcomer does not.
        assert_eq!((places[1].slow_start, places[2].slow_start), (0, 7));
        // A name that fails keeps what it had.
        standing.handle_resolution("web", NAME, Err("timed out".into()), 8);
        assert_eq!((state(&standing, 0), standing.places().count()), (State::Up, 2));
    }

    #[test]
    fn more_addresses_than_places_are_counted() {
        let config = config(&server(NAME));
        let mut standing = Standing::new(&config, &Overrides::default());
        let many = (1..=20).map(|i| found(&format!("10.0.0.{i}:80"))).collect();
        assert_eq!(standing.handle_resolution("web", NAME, Ok(many), 5), (true, 4));
    }

    #[test]
    fn the_operators_word_is_over_that_of_checks_and_goes_again() {
        let config = config(&server("10.0.0.1:80"));
        let mut overrides = Overrides::default();
        let mut standing = Standing::new(&config, &overrides);
        let mut change = |standing: &mut Standing, change| {
            overrides.handle_change(&config, "web", "10.0.0.1:80", change).unwrap();
            standing.set_overrides(&overrides, 9)
        };
        standing.handle_verdict(&id("10.0.0.1:80", "10.0.0.1:80"), Health::Down, 1);
        assert!(change(&mut standing, Change::Drain));
        assert!(change(&mut standing, Change::Weight(40)));
        assert_eq!((state(&standing, 0), standing.upstreams()[0].places[0].weight), (State::Draining, 40));
        assert!(!change(&mut standing, Change::Drain));
        assert!(change(&mut standing, Change::Ready));
        assert_eq!((state(&standing, 0), standing.upstreams()[0].places[0].weight), (State::Down, 1));
    }

    #[test]
    fn a_new_owner_takes_up_what_stood_and_writes_nothing() {
        let config = config(&(server("10.0.0.1:80") + &server(NAME)));
        let layout = Layout::of(&config);
        let words: Vec<AtomicU64> = (0..layout.word_count()).map(|_| AtomicU64::new(0)).collect();
        let board = Board::over(&words, &layout).unwrap();
        let mut first = Standing::new(&config, &Overrides::default());
        first.handle_verdict(&id("10.0.0.1:80", "10.0.0.1:80"), Health::Down, 1);
        let records = Resolved { weight: 7, priority: 3, ..found("10.0.0.9:80") };
        first.handle_resolution("web", NAME, Ok(vec![records]), 2);
        assert!(first.publish(&board));
        assert!(!first.publish(&board));
        let mut second = Standing::new(&config, &Overrides::default());
        second.take_up(&board);
        assert_eq!(second.upstreams()[0].places, first.upstreams()[0].places);
        assert!(!second.publish(&board));
    }

    #[test]
    fn a_reload_carries_over_what_stays() {
        let old = config(&(server("10.0.0.1:80") + &server(NAME)));
        let mut before = Standing::new(&old, &Overrides::default());
        before.handle_verdict(&id("10.0.0.1:80", "10.0.0.1:80"), Health::Down, 1);
        before.handle_resolution("web", NAME, Ok(vec![found("10.0.0.9:80")]), 2);
        let new = config(&(server("10.0.0.5:80") + &server(NAME) + &server("10.0.0.1:80")));
        let mut after = Standing::new(&new, &Overrides::default());
        after.carry_over(&before);
        assert_eq!([0, 1, 2].map(|server| state(&after, server)), [State::Up, State::Up, State::Down]);
        assert!(after.find(&id(NAME, "10.0.0.9:80")).is_some());
    }

    #[test]
    fn the_table_follows_membership_and_weight_and_no_verdict() {
        let config = config(&(server("10.0.0.1:80") + &server("10.0.0.2:80")));
        let mut standing = Standing::new(&config, &Overrides::default());
        let key = standing.upstreams()[0].table_key();
        standing.handle_verdict(&id("10.0.0.1:80", "10.0.0.1:80"), Health::Down, 1);
        assert_eq!(standing.upstreams()[0].table_key(), key);
        let mut overrides = Overrides::default();
        overrides.handle_change(&config, "web", "10.0.0.1:80", Change::Weight(2)).unwrap();
        standing.set_overrides(&overrides, 1);
        assert_ne!(standing.upstreams()[0].table_key(), key);
    }
}
