//! Which server of an upstream a session or a flow goes to.
//!
//! Owned by a worker, one for each upstream. Pure: the loads of the servers
//! come in as numbers, randomness as a seed, and what it remembers is only
//! where its round robin stands. Weights are shares; a weight of 0 gets
//! nothing new; backups are taken only where no other server may be.

mod maglev;

use std::net::IpAddr;

use crate::config::{Balance, Upstream};
use maglev::{Maglev, mix};

/// Picks servers of one upstream.
#[derive(Debug)]
pub struct Balancer {
    balance: Balance,
    servers: Vec<Candidate>,
    /// Where the state of `draw` stands.
    random: u64,
    /// By client address, over the servers and over the backups.
    tables: [Option<Maglev>; 2],
}

#[derive(Debug)]
struct Candidate {
    weight: i64,
    backup: bool,
    /// What smooth weighted round robin owes it.
    credit: i64,
}

impl Balancer {
    /// A balancer for an upstream in slot `slot` of `slots`.
    ///
    /// The slots begin at different places of the same rotation, so that
    /// four workers do not all send their first sessions to server one. The
    /// seed is for what is drawn by lot.
    pub fn new(upstream: &Upstream, slot: usize, slots: usize, seed: u64) -> Balancer {
        let servers: Vec<Candidate> = upstream
            .servers
            .iter()
            .map(|server| Candidate { weight: i64::from(server.weight), backup: server.backup, credit: 0 })
            .collect();
        let tables = match upstream.balance {
            Balance::SourceHash => [false, true].map(|backup| table(upstream, backup)),
            Balance::RoundRobin | Balance::LeastConnections | Balance::TwoChoices => [None, None],
        };
        let mut balancer = Balancer { balance: upstream.balance, servers, random: seed, tables };
        let rotation: i64 = balancer.servers.iter().filter(|s| !s.backup).map(|s| s.weight).sum();
        let turns = rotation * slot as i64 / slots.max(1) as i64;
        for _ in 0..turns {
            balancer.rotate(&|_| true);
        }
        balancer
    }

    /// The server for a new session, `None` where none may be tried.
    ///
    /// `active` tells the sessions that a server has now; `tried` the servers
    /// that have already failed this session.
    pub fn pick(
        &mut self,
        client: IpAddr,
        active: impl Fn(usize) -> u64,
        tried: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let backup = !self.servers.iter().enumerate().any(|(i, s)| s.may_take(false) && !tried(i));
        let may = |balancer: &Balancer, i: usize| balancer.servers[i].may_take(backup) && !tried(i);
        match self.balance {
            Balance::RoundRobin => {
                let allowed: Vec<bool> = (0..self.servers.len()).map(|i| may(self, i)).collect();
                self.rotate(&|i| allowed[i])
            }
            Balance::LeastConnections => {
                let allowed: Vec<bool> = (0..self.servers.len()).map(|i| may(self, i)).collect();
                let relative = |i: usize| self.servers[i].load(active(i));
                let least =
                    (0..self.servers.len()).filter(|&i| allowed[i]).map(relative).min_by(f64::total_cmp)?;
                // Among equals in turn, or an idle upstream would send
                // everything to its first server.
                let equals: Vec<bool> =
                    (0..self.servers.len()).map(|i| allowed[i] && relative(i) <= least).collect();
                self.rotate(&|i| equals[i])
            }
            Balance::TwoChoices => {
                let one = self.draw(|balancer, i| may(balancer, i))?;
                let Some(other) = self.draw(|balancer, i| i != one && may(balancer, i)) else {
                    return Some(one);
                };
                let load = |i: usize| self.servers[i].load(active(i));
                Some(if load(other) < load(one) { other } else { one })
            }
            Balance::SourceHash => {
                let mut servers = self.tables[usize::from(backup)].as_ref()?.servers(client);
                servers.find(|&i| may(self, i))
            }
        }
    }

    /// One server by lot, by weight.
    fn draw(&mut self, allowed: impl Fn(&Balancer, usize) -> bool) -> Option<usize> {
        let weight = |i: usize| if allowed(self, i) { self.servers[i].weight as u64 } else { 0 };
        let sum: u64 = (0..self.servers.len()).map(weight).sum();
        // The high half times the sum: no bias that a few servers could see.
        let mut lot = ((u128::from(mix(self.random)) * u128::from(sum)) >> 64) as u64;
        let drawn = (0..self.servers.len()).find(|&i| {
            let weight = weight(i);
            let hit = lot < weight;
            lot = lot.saturating_sub(weight);
            hit
        });
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        drawn
    }

    /// Smooth weighted round robin: everyone earns its weight, the richest is
    /// taken and pays the sum. Over a rotation each gets its exact share, and
    /// heavy servers do not come in runs.
    fn rotate(&mut self, allowed: &dyn Fn(usize) -> bool) -> Option<usize> {
        let mut best: Option<usize> = None;
        let mut sum = 0;
        for i in 0..self.servers.len() {
            if !allowed(i) || self.servers[i].weight == 0 {
                continue;
            }
            let weight = self.servers[i].weight;
            self.servers[i].credit += weight;
            sum += weight;
            if best.is_none_or(|b| self.servers[i].credit > self.servers[b].credit) {
                best = Some(i);
            }
        }
        let best = best?;
        self.servers[best].credit -= sum;
        Some(best)
    }
}

/// The table of an upstream's servers, or of its backups.
fn table(upstream: &Upstream, backup: bool) -> Option<Maglev> {
    let names: Vec<String> = upstream.servers.iter().map(|server| server.address.to_string()).collect();
    let servers = upstream.servers.iter().enumerate().filter(|(_, server)| server.backup == backup);
    Maglev::new(servers.map(|(i, server)| (i, names[i].as_str(), server.weight)))
}

impl Candidate {
    /// Sessions for its weight, with the one that is to come.
    fn load(&self, active: u64) -> f64 {
        (active + 1) as f64 / self.weight as f64
    }

    fn may_take(&self, backup: bool) -> bool {
        self.weight > 0 && self.backup == backup
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Word, load};

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

    fn picks(balancer: &mut Balancer, count: usize) -> Vec<usize> {
        (0..count).map(|_| balancer.pick(CLIENT, |_| 0, |_| false).unwrap()).collect()
    }

    #[test]
    fn round_robin_gives_each_its_weight_without_runs() {
        let mut balancer =
            Balancer::new(&upstream(Balance::RoundRobin, &[(5, false), (1, false), (1, false)]), 0, 1, 7);
        assert_eq!(picks(&mut balancer, 7), [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn slots_begin_at_different_servers() {
        let upstream = upstream(Balance::RoundRobin, &[(1, false); 4]);
        let mut first: Vec<usize> =
            (0..4).map(|slot| picks(&mut Balancer::new(&upstream, slot, 4, 7), 1)[0]).collect();
        first.sort();
        assert_eq!(first, [0, 1, 2, 3]);
    }

    #[test]
    fn a_server_that_failed_is_not_tried_again_for_the_session() {
        let mut balancer = Balancer::new(&upstream(Balance::RoundRobin, &[(1, false); 3]), 0, 1, 7);
        for _ in 0..10 {
            assert_eq!(balancer.pick(CLIENT, |_| 0, |i| i != 1), Some(1));
        }
        assert_eq!(balancer.pick(CLIENT, |_| 0, |_| true), None);
    }

    #[test]
    fn backups_serve_only_when_no_other_may() {
        let mut balancer = Balancer::new(&upstream(Balance::RoundRobin, &[(1, false), (1, true)]), 0, 1, 7);
        assert_eq!(picks(&mut balancer, 5), [0; 5]);
        assert_eq!(balancer.pick(CLIENT, |_| 0, |i| i == 0), Some(1));
    }

    #[test]
    fn a_weight_of_zero_gets_nothing() {
        let mut balancer = Balancer::new(&upstream(Balance::RoundRobin, &[(0, false), (1, false)]), 0, 1, 7);
        assert_eq!(picks(&mut balancer, 3), [1; 3]);
        assert_eq!(balancer.pick(CLIENT, |_| 0, |i| i == 1), None);
    }

    #[test]
    fn least_connections_goes_by_load_and_weight() {
        let servers = [(1, false), (3, false)];
        let mut balancer = Balancer::new(&upstream(Balance::LeastConnections, &servers), 0, 1, 7);
        let mut active = [0u64; 2];
        for _ in 0..400 {
            let i = balancer.pick(CLIENT, |i| active[i], |_| false).unwrap();
            active[i] += 1;
        }
        assert_eq!(active, [100, 300]);
    }

    #[test]
    fn two_choices_keep_the_loads_close_by_weight() {
        let servers = [(1, false), (1, false), (2, false), (0, false), (9, true)];
        let mut balancer = Balancer::new(&upstream(Balance::TwoChoices, &servers), 0, 1, 7);
        let mut active = [0u64; 5];
        for _ in 0..4000 {
            let i = balancer.pick(CLIENT, |i| active[i], |_| false).unwrap();
            active[i] += 1;
        }
        // Seeded, so always the same: no chance is involved.
        for (count, fair) in active.into_iter().zip([1000u64, 1000, 2000, 0, 0]) {
            assert!(count.abs_diff(fair) < 40, "{active:?}");
        }
        assert_eq!(balancer.pick(CLIENT, |_| 0, |i| i < 3), Some(4));
        assert_eq!(balancer.pick(CLIENT, |_| 0, |i| i != 1), Some(1));
    }

    #[test]
    fn source_hash_gives_a_client_the_same_server_in_every_slot() {
        let upstream = upstream(Balance::SourceHash, &[(1, false), (1, false), (1, false), (1, true)]);
        let mut here = Balancer::new(&upstream, 0, 4, 1);
        let mut there = Balancer::new(&upstream, 3, 4, 2);
        for last in 0..=255 {
            let client = IpAddr::from([192, 0, 2, last]);
            let own = here.pick(client, |_| 0, |_| false).unwrap();
            assert_eq!(there.pick(client, |_| 9, |_| false), Some(own));
            let next = here.pick(client, |_| 0, |i| i == own).unwrap();
            assert!(next != own && next < 3);
            assert_eq!(there.pick(client, |_| 0, |i| i == own), Some(next));
            assert_eq!(here.pick(client, |_| 0, |i| i < 3), Some(3));
        }
    }

    #[test]
    fn least_connections_takes_equals_in_turn() {
        let mut balancer = Balancer::new(&upstream(Balance::LeastConnections, &[(1, false); 3]), 0, 1, 7);
        assert_eq!(picks(&mut balancer, 6), [0, 1, 2, 0, 1, 2]);
    }
}
