//! Which server of an upstream a session or a flow goes to.
//!
//! Owned by a worker, one for each upstream. Pure: how the servers stand comes
//! in from the upstream board, their loads as numbers, randomness as a seed,
//! and what it remembers is only where its round robin stands. Weights are
//! shares; a weight of 0 gets nothing new; a tier is used only where no lower
//! one has a server to use. Bounded by the places of the upstream.

pub mod maglev;

use std::net::IpAddr;

use crate::board::{Address, Admin, Board, Health, Place, Table};
use crate::config::{AllDown, Balance, Upstream};
use maglev::mix;

/// Parts of a share, so that a slow start has steps.
const WHOLE: u64 = 256;
/// Positions of a table that are looked at for one client. Who finds nobody
/// there has few servers to choose from, and takes the nearest of them.
const LOOKS: usize = 4_096;

/// Picks servers of one upstream.
#[derive(Debug)]
pub struct Balancer {
    balance: Balance,
    all_down: AllDown,
    /// Milliseconds; 0 = none.
    slow_start: u64,
    places: Vec<Place>,
    /// Of the board, as it was read last.
    epoch: Option<u64>,
    /// What smooth weighted round robin owes each place.
    credits: Vec<i64>,
    /// What each place may get at this pick, by its weight; 0 = nothing.
    shares: Vec<u64>,
    /// What least-connections compares, kept for its memory.
    loads: Vec<f64>,
    /// Which part of a rotation this slot begins at.
    begin_at: (usize, usize),
    /// Where the state of `draw` stands.
    random: u64,
}

/// Who asks for a server.
pub struct Ask<'a> {
    /// The client.
    pub client: IpAddr,
    /// The time, in milliseconds.
    pub now: u64,
    /// The upstream's table, for a balance by client address.
    pub table: Option<Table<'a>>,
    /// The sessions that a place has now.
    pub active: &'a dyn Fn(usize) -> u64,
    /// Whether a place has already failed this session.
    pub tried: &'a dyn Fn(usize) -> bool,
}

/// What is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// This place.
    Place(usize),
    /// Every place that may be used has all the sessions that it may have.
    Full,
    /// Every place that may be used has failed already.
    Tried,
    /// None may be used.
    Nobody,
}

impl Balancer {
    /// A balancer for an upstream in slot `slot` of `slots`; nobody is picked
    /// before a `refresh`.
    ///
    /// The slots begin at different places of the same rotation, so that
    /// four workers do not all send their first sessions to server one. The
    /// seed is for what is drawn by lot.
    pub fn new(upstream: &Upstream, slot: usize, slots: usize, seed: u64) -> Balancer {
        Balancer {
            balance: upstream.balance,
            all_down: upstream.all_down,
            slow_start: u64::try_from(upstream.health.slow_start.as_millis()).unwrap_or(u64::MAX / 1024),
            places: Vec::new(),
            epoch: None,
            credits: Vec::new(),
            shares: Vec::new(),
            loads: Vec::new(),
            begin_at: (slot, slots.max(1)),
            random: seed,
        }
    }

    /// Looks at the board; whether it has changed since the last look.
    pub fn refresh(&mut self, board: &Board, upstream: usize) -> bool {
        if self.epoch == Some(board.epoch(upstream)) {
            return false;
        }
        // Overtaken again and again: what was known holds until the next look.
        let Some((epoch, places)) = board.read(upstream) else { return false };
        self.epoch = Some(epoch);
        self.set_places(places);
        true
    }

    fn set_places(&mut self, places: Vec<Place>) {
        let is_first = self.places.is_empty();
        for (index, credit) in self.credits.iter_mut().enumerate() {
            if self.places[index].incarnation != places[index].incarnation {
                *credit = 0;
            }
        }
        self.credits.resize(places.len(), 0);
        self.places = places;
        if is_first {
            self.begin_rotation();
        }
    }

    fn begin_rotation(&mut self) {
        self.shares = self.places.iter().map(|place| u64::from(place.weight)).collect();
        let first = self.places.iter().filter(|place| place.weight > 0).map(|place| place.tier).min();
        for (share, place) in self.shares.iter_mut().zip(&self.places) {
            if Some(place.tier) != first {
                *share = 0;
            }
        }
        let (slot, slots) = self.begin_at;
        // By whole turns a rotation is as long as the sum of the weights; more
        // than so many turns mix no better.
        let rotation = self.shares.iter().sum::<u64>().min(4_096);
        for _ in 0..rotation * slot as u64 / slots as u64 {
            self.rotate();
        }
        for credit in &mut self.credits {
            *credit *= WHOLE as i64;
        }
    }

    /// The places as they were last seen.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The place for a new session.
    pub fn pick(&mut self, ask: &Ask) -> Pick {
        match self.weigh(ask) {
            Pick::Place(_) => {}
            other => return other,
        }
        let found = match self.balance {
            Balance::RoundRobin => self.rotate(),
            Balance::LeastConnections => self.least(ask),
            Balance::TwoChoices => self.better_of_two(ask),
            Balance::SourceHash => self.by_client(ask),
        };
        found.map_or(Pick::Nobody, Pick::Place)
    }

    /// Sets the shares of those that may be picked; what the answer is where
    /// there are none.
    fn weigh(&mut self, ask: &Ask) -> Pick {
        let is_up = |place: &Place| place.is_open() && place.health == Health::Up;
        let any_up = self.places.iter().any(is_up);
        let may = |place: &Place| match self.all_down {
            AllDown::TryAny if !any_up => place.is_open(),
            AllDown::TryAny | AllDown::Close => is_up(place),
        };
        let left = || self.places.iter().enumerate().filter(|(i, place)| may(place) && !(ask.tried)(*i));
        let Some(tier) = left().map(|(_, place)| place.tier).min() else {
            return if self.places.iter().any(may) { Pick::Tried } else { Pick::Nobody };
        };
        let mut shares = std::mem::take(&mut self.shares);
        shares.clear();
        shares.resize(self.places.len(), 0);
        let mut answer = Pick::Full;
        for (index, place) in left().filter(|(_, place)| place.tier == tier) {
            if place.max_connections == 0 || (ask.active)(index) < place.max_connections {
                shares[index] = u64::from(place.weight) * self.part(place, ask.now);
                answer = Pick::Place(index);
            }
        }
        self.shares = shares;
        answer
    }

    /// How much of its weight counts, of `WHOLE`.
    fn part(&self, place: &Place, now: u64) -> u64 {
        if place.slow_start == 0 || self.slow_start == 0 {
            return WHOLE;
        }
        let since = now.saturating_sub(place.slow_start).min(self.slow_start);
        (since * WHOLE / self.slow_start).clamp(1, WHOLE)
    }

    /// Each load is read once: other workers count meanwhile, and a least load
    /// that was overtaken would be nobody's.
    fn least(&mut self, ask: &Ask) -> Option<usize> {
        let mut loads = std::mem::take(&mut self.loads);
        loads.clear();
        let load = |i: usize| if self.shares[i] > 0 { self.load(i, ask) } else { f64::INFINITY };
        loads.extend((0..self.shares.len()).map(load));
        let least = loads.iter().copied().fold(f64::INFINITY, f64::min);
        // Among equals in turn, or an idle upstream would send everything to
        // its first server.
        for (share, load) in self.shares.iter_mut().zip(&loads) {
            if *load > least {
                *share = 0;
            }
        }
        self.loads = loads;
        self.rotate()
    }

    fn better_of_two(&mut self, ask: &Ask) -> Option<usize> {
        let one = self.draw()?;
        let share = std::mem::take(&mut self.shares[one]);
        let other = self.draw();
        self.shares[one] = share;
        let Some(other) = other else { return Some(one) };
        Some(if self.load(other, ask) < self.load(one, ask) { other } else { one })
    }

    /// By the table; by distance where that finds nobody, as for backups,
    /// which no table has.
    fn by_client(&mut self, ask: &Ask) -> Option<usize> {
        let lot = maglev::lot(ask.client, WHOLE);
        if let Some(table) = ask.table {
            let mut places = maglev::positions(ask.client).take(LOOKS).map(|at| table.get(at));
            let share = |place: usize| self.shares.get(place).copied().unwrap_or(0);
            // A part of its clients for a part of its weight.
            let takes = |place: usize| lot < self.part(&self.places[place], ask.now);
            if let Some(found) = places.find(|&place| share(place) > 0 && takes(place)) {
                return Some(found);
            }
        }
        let distance = |place: usize| maglev::distance(ask.client, self.key(place), self.shares[place]);
        let usable = (0..self.shares.len()).filter(|&place| self.shares[place] > 0);
        usable.min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
    }

    /// What tells a place from others, in every process alike.
    fn key(&self, place: usize) -> u64 {
        let words = self.places[place].encode();
        // Two Unix sockets differ by their number alone.
        let number = if self.places[place].address == Some(Address::Unix) { place as u64 } else { 0 };
        words[2..5].iter().fold(number, |key, &word| mix(key ^ word))
    }

    /// Sessions for its share, with the one that is to come.
    fn load(&self, place: usize, ask: &Ask) -> f64 {
        ((ask.active)(place) + 1) as f64 / self.shares[place] as f64
    }

    /// One place by lot, by share.
    fn draw(&mut self) -> Option<usize> {
        let sum: u64 = self.shares.iter().sum();
        // The high half times the sum: no bias that a few servers could see.
        let mut lot = ((u128::from(mix(self.random)) * u128::from(sum)) >> 64) as u64;
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (0..self.shares.len()).find(|&i| {
            let share = self.shares[i];
            let hit = lot < share;
            lot = lot.saturating_sub(share);
            hit
        })
    }

    /// Smooth weighted round robin: everyone earns its share, the richest is
    /// taken and pays the sum. Over a rotation each gets its exact share, and
    /// heavy servers do not come in runs.
    fn rotate(&mut self) -> Option<usize> {
        let mut best: Option<usize> = None;
        let mut sum = 0;
        for i in 0..self.shares.len() {
            if self.shares[i] == 0 {
                continue;
            }
            let share = self.shares[i] as i64;
            self.credits[i] += share;
            sum += share;
            if best.is_none_or(|b| self.credits[i] > self.credits[b]) {
                best = Some(i);
            }
        }
        let best = best?;
        self.credits[best] -= sum;
        Some(best)
    }
}

impl Place {
    /// Whether it may get something new, down or not.
    fn is_open(&self) -> bool {
        self.address.is_some() && self.weight > 0 && self.admin == Admin::Ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::{Layout, Overrides, Standing};
    use crate::config::{Config, Word, load};
    use std::sync::atomic::AtomicU64;

    fn upstream(balance: Balance, servers: &[(u32, bool)]) -> Upstream {
        let mut text = format!(
            "[[listener]]\nname = \"l\"\nbind = \"127.0.0.1:80\"\nmode = \"tcp\"\nupstream = \"u\"\n\
             [[upstream]]\nname = \"u\"\nbalance = \"{}\"\n",
            balance.word()
        );
        for (i, (weight, backup)) in servers.iter().enumerate() {
            text += &format!(
                "[[upstream.server]]\naddress = \"10.0.{i}.1:80\"\nweight = {weight}\nbackup = {backup}\n"
            );
        }
        load("test", &text).expect("it is right").config.upstreams.remove(0)
    }

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn balancer(upstream: &Upstream, slot: usize, slots: usize) -> Balancer {
        let mut balancer = Balancer::new(upstream, slot, slots, 7);
        balancer.set_places(places(upstream));
        balancer
    }

    fn places(upstream: &Upstream) -> Vec<Place> {
        Standing::new(&config(upstream), &Overrides::default()).upstreams()[0].places.clone()
    }

    fn config(upstream: &Upstream) -> Config {
        let text =
            "[[listener]]\nname = \"l\"\nbind = \"127.0.0.1:80\"\nmode = \"tcp\"\nservice = \"echo\"\n";
        let mut config = load("test", text).expect("it is right").config;
        config.upstreams = vec![upstream.clone()];
        config
    }

    fn ask(balancer: &mut Balancer, active: impl Fn(usize) -> u64, tried: impl Fn(usize) -> bool) -> Pick {
        balancer.pick(&Ask { client: CLIENT, now: 0, table: None, active: &active, tried: &tried })
    }

    fn picks(balancer: &mut Balancer, count: usize) -> Vec<usize> {
        let place = |pick| if let Pick::Place(place) = pick { place } else { panic!("{pick:?}") };
        (0..count).map(|_| place(ask(balancer, |_| 0, |_| false))).collect()
    }

    #[test]
    fn loads_that_grow_while_they_are_read_leave_somebody_to_pick() {
        for servers in [&[(1, false)][..], &[(1, false), (1, false), (2, false)]] {
            let mut balancer = balancer(&upstream(Balance::LeastConnections, servers), 0, 1);
            let count = std::cell::Cell::new(0);
            let growing = |_| count.replace(count.get() + 1);
            for _ in 0..100 {
                assert!(matches!(ask(&mut balancer, growing, |_| false), Pick::Place(_)));
            }
        }
    }

    #[test]
    fn round_robin_gives_each_its_weight_without_runs() {
        let mut balancer =
            balancer(&upstream(Balance::RoundRobin, &[(5, false), (1, false), (1, false)]), 0, 1);
        assert_eq!(picks(&mut balancer, 7), [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn slots_begin_at_different_servers() {
        let upstream = upstream(Balance::RoundRobin, &[(1, false); 4]);
        let mut first: Vec<usize> =
            (0..4).map(|slot| picks(&mut balancer(&upstream, slot, 4), 1)[0]).collect();
        first.sort();
        assert_eq!(first, [0, 1, 2, 3]);
    }

    #[test]
    fn a_server_that_failed_is_not_tried_again_for_the_session() {
        let mut balancer = balancer(&upstream(Balance::RoundRobin, &[(1, false); 3]), 0, 1);
        for _ in 0..10 {
            assert_eq!(ask(&mut balancer, |_| 0, |i| i != 1), Pick::Place(1));
        }
        assert_eq!(ask(&mut balancer, |_| 0, |_| true), Pick::Tried);
    }

    #[test]
    fn backups_serve_only_when_no_other_may() {
        let mut balancer = balancer(&upstream(Balance::RoundRobin, &[(1, false), (1, true)]), 0, 1);
        assert_eq!(picks(&mut balancer, 5), [0; 5]);
        assert_eq!(ask(&mut balancer, |_| 0, |i| i == 0), Pick::Place(1));
        balancer.places[0].health = Health::Down;
        assert_eq!(picks(&mut balancer, 2), [1; 2]);
    }

    #[test]
    fn a_weight_of_zero_gets_nothing() {
        let mut balancer = balancer(&upstream(Balance::RoundRobin, &[(0, false), (1, false)]), 0, 1);
        assert_eq!(picks(&mut balancer, 3), [1; 3]);
        assert_eq!(ask(&mut balancer, |_| 0, |i| i == 1), Pick::Tried);
    }

    #[test]
    fn who_is_down_draining_or_disabled_gets_nothing() {
        let mut balancer = balancer(&upstream(Balance::RoundRobin, &[(1, false); 4]), 0, 1);
        balancer.places[0].health = Health::Down;
        balancer.places[1].admin = Admin::Draining;
        balancer.places[2].admin = Admin::Disabled;
        assert_eq!(picks(&mut balancer, 3), [3; 3]);
        balancer.places[3].address = None;
        assert_eq!(ask(&mut balancer, |_| 0, |_| false), Pick::Nobody);
    }

    #[test]
    fn when_all_are_down_any_is_tried_if_that_is_asked() {
        let mut upstream = upstream(Balance::RoundRobin, &[(1, false); 3]);
        for (all_down, expected) in [(AllDown::Close, Pick::Nobody), (AllDown::TryAny, Pick::Place(1))] {
            upstream.all_down = all_down;
            let mut balancer = balancer(&upstream, 0, 1);
            balancer.places.iter_mut().for_each(|place| place.health = Health::Down);
            balancer.places[0].admin = Admin::Draining;
            assert_eq!(ask(&mut balancer, |_| 0, |_| false), expected);
        }
        // One that is up is not passed over for those that are down.
        let mut balancer = balancer(&upstream, 0, 1);
        balancer.places[0].health = Health::Down;
        assert_eq!(ask(&mut balancer, |_| 0, |i| i > 0), Pick::Tried);
    }

    #[test]
    fn a_full_server_is_passed_over_and_backups_are_no_way_out() {
        let mut balancer =
            balancer(&upstream(Balance::RoundRobin, &[(1, false), (1, false), (1, true)]), 0, 1);
        balancer.places.iter_mut().for_each(|place| place.max_connections = 2);
        assert_eq!(ask(&mut balancer, |i| [2, 1, 0][i], |_| false), Pick::Place(1));
        assert_eq!(ask(&mut balancer, |i| [2, 2, 0][i], |_| false), Pick::Full);
    }

    #[test]
    fn a_server_that_comes_back_gets_its_share_slowly() {
        let mut upstream = upstream(Balance::RoundRobin, &[(1, false), (1, false)]);
        upstream.health.slow_start = std::time::Duration::from_secs(10);
        let mut balancer = balancer(&upstream, 0, 1);
        balancer.places[0].slow_start = 1_000;
        let mut share = |now| {
            let count = |_| {
                let ask = Ask { client: CLIENT, now, table: None, active: &|_| 0, tried: &|_| false };
                u32::from(balancer.pick(&ask) == Pick::Place(0))
            };
            (0..1200).map(count).sum::<u32>()
        };
        // A quarter of its weight beside a whole: a fifth; then half; then even.
        for (now, fair) in [(1_000, 5), (3_500, 240), (6_000, 400), (11_000, 600), (99_000, 600)] {
            let share = share(now);
            assert!(share.abs_diff(fair) <= 5, "{share} instead of {fair} at {now}");
        }
    }

    #[test]
    fn a_changed_weight_holds_from_the_next_pick() {
        let mut balancer = balancer(&upstream(Balance::RoundRobin, &[(1, false), (1, false)]), 0, 1);
        picks(&mut balancer, 10);
        let mut places = balancer.places.clone();
        places[1].weight = 3;
        balancer.set_places(places);
        let ones: usize = picks(&mut balancer, 400).into_iter().sum();
        assert!(ones.abs_diff(300) <= 1, "{ones}");
    }

    #[test]
    fn least_connections_goes_by_load_and_weight() {
        let mut balancer = balancer(&upstream(Balance::LeastConnections, &[(1, false), (3, false)]), 0, 1);
        let mut active = [0u64; 2];
        for _ in 0..400 {
            let Pick::Place(i) = ask(&mut balancer, |i| active[i], |_| false) else { panic!() };
            active[i] += 1;
        }
        assert_eq!(active, [100, 300]);
    }

    #[test]
    fn two_choices_keep_the_loads_close_by_weight() {
        let servers = [(1, false), (1, false), (2, false), (0, false), (9, true)];
        let mut balancer = balancer(&upstream(Balance::TwoChoices, &servers), 0, 1);
        let mut active = [0u64; 5];
        for _ in 0..4000 {
            let Pick::Place(i) = ask(&mut balancer, |i| active[i], |_| false) else { panic!() };
            active[i] += 1;
        }
        // Seeded, so always the same: no chance is involved.
        for (count, fair) in active.into_iter().zip([1000u64, 1000, 2000, 0, 0]) {
            assert!(count.abs_diff(fair) < 40, "{active:?}");
        }
        assert_eq!(ask(&mut balancer, |_| 0, |i| i < 3), Pick::Place(4));
        assert_eq!(ask(&mut balancer, |_| 0, |i| i != 1), Pick::Place(1));
    }

    #[test]
    fn source_hash_gives_a_client_the_same_server_in_every_slot() {
        let upstream = upstream(Balance::SourceHash, &[(1, false), (1, false), (1, false), (1, true)]);
        let config = config(&upstream);
        let layout = Layout::of(&config);
        let words: Vec<AtomicU64> = (0..layout.word_count()).map(|_| AtomicU64::new(0)).collect();
        let board = Board::over(&words, &layout).unwrap();
        Standing::new(&config, &Overrides::default()).publish(&board);
        let mut balancers = [(0, 1), (3, 2)].map(|(slot, seed)| Balancer::new(&upstream, slot, 4, seed));
        assert!(
            balancers.iter_mut().all(|balancer| balancer.refresh(&board, 0) && !balancer.refresh(&board, 0))
        );
        let mut own_counts = [0; 4];
        for last in 0..=255 {
            let client = IpAddr::from([192, 0, 2, last]);
            let mut pick = |slot: usize, tried: &dyn Fn(usize) -> bool| {
                let ask = Ask { client, now: 0, table: board.table(0), active: &|_| slot as u64, tried };
                let Pick::Place(place) = balancers[slot].pick(&ask) else { panic!() };
                place
            };
            let own = pick(0, &|_| false);
            own_counts[own] += 1;
            assert_eq!(pick(1, &|_| false), own);
            let next = pick(0, &|i| i == own);
            assert!(next != own && next < 3);
            assert_eq!(pick(1, &|i| i == own), next);
            assert_eq!(pick(0, &|i| i < 3), 3);
        }
        assert!(own_counts[..3].iter().all(|&count| count > 50), "{own_counts:?}");
    }

    #[test]
    fn a_server_that_goes_and_comes_back_moves_its_own_clients_alone() {
        let mut upstream = upstream(Balance::SourceHash, &[(1, false); 4]);
        upstream.health.slow_start = std::time::Duration::from_secs(8);
        let config = config(&upstream);
        let layout = Layout::of(&config);
        let words: Vec<AtomicU64> = (0..layout.word_count()).map(|_| AtomicU64::new(0)).collect();
        let board = Board::over(&words, &layout).unwrap();
        Standing::new(&config, &Overrides::default()).publish(&board);
        let mut balancer = Balancer::new(&upstream, 0, 1, 7);
        balancer.refresh(&board, 0);
        let all = |balancer: &mut Balancer, now| -> Vec<Pick> {
            let pick = |i: u32| {
                let client = IpAddr::V4((0x0a00_0000 + i).into());
                balancer.pick(&Ask { client, now, table: board.table(0), active: &|_| 0, tried: &|_| false })
            };
            (0..800).map(pick).collect()
        };
        let before = all(&mut balancer, 0);
        balancer.places[2].health = Health::Down;
        let while_down = all(&mut balancer, 0);
        let is_own = |i: usize| before[i] == Pick::Place(2);
        assert!((0..800).all(|i| is_own(i) || before[i] == while_down[i]));
        (balancer.places[2].health, balancer.places[2].slow_start) = (Health::Up, 1_000);
        let mut last = 0;
        for (now, least) in [(1_000, 0), (3_000, 20), (5_000, 60), (9_000, 150)] {
            let picks = all(&mut balancer, now);
            let back = picks.iter().filter(|pick| **pick == Pick::Place(2)).count();
            assert!(back >= last && back >= least, "{back} of its clients at {now}");
            assert!((0..800).all(|i| is_own(i) || before[i] == picks[i]));
            last = back;
        }
        assert_eq!(all(&mut balancer, 9_000), before);
    }

    #[test]
    fn least_connections_takes_equals_in_turn() {
        let mut balancer = balancer(&upstream(Balance::LeastConnections, &[(1, false); 3]), 0, 1);
        assert_eq!(picks(&mut balancer, 6), [0, 1, 2, 0, 1, 2]);
    }
}
