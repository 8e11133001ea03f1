//! Which server of an upstream a session goes to.
//!
//! Owned by a worker, one for each upstream. Pure: the loads of the servers
//! come in as numbers, and what it remembers is only where its round robin
//! stands. Weights are shares; a weight of 0 gets nothing new; backups are
//! taken only where no other server may be.

use crate::config::{Balance, Upstream};

/// Picks servers of one upstream.
#[derive(Debug)]
pub struct Balancer {
    balance: Balance,
    servers: Vec<Candidate>,
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
    /// four workers do not all send their first sessions to server one.
    pub fn new(upstream: &Upstream, slot: usize, slots: usize) -> Balancer {
        let servers: Vec<Candidate> = upstream
            .servers
            .iter()
            .map(|server| Candidate { weight: i64::from(server.weight), backup: server.backup, credit: 0 })
            .collect();
        let mut balancer = Balancer { balance: upstream.balance, servers };
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
    pub fn pick(&mut self, active: impl Fn(usize) -> u64, tried: impl Fn(usize) -> bool) -> Option<usize> {
        let backup = !self.servers.iter().enumerate().any(|(i, s)| s.may_take(false) && !tried(i));
        let may = |balancer: &Balancer, i: usize| balancer.servers[i].may_take(backup) && !tried(i);
        match self.balance {
            Balance::RoundRobin => {
                let allowed: Vec<bool> = (0..self.servers.len()).map(|i| may(self, i)).collect();
                self.rotate(&|i| allowed[i])
            }
            Balance::LeastConnections => {
                let allowed: Vec<bool> = (0..self.servers.len()).map(|i| may(self, i)).collect();
                let relative = |i: usize| (active(i) + 1) as f64 / self.servers[i].weight as f64;
                let least =
                    (0..self.servers.len()).filter(|&i| allowed[i]).map(relative).min_by(f64::total_cmp)?;
                // Among equals in turn, or an idle upstream would send
                // everything to its first server.
                let equals: Vec<bool> =
                    (0..self.servers.len()).map(|i| allowed[i] && relative(i) <= least).collect();
                self.rotate(&|i| equals[i])
            }
        }
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

impl Candidate {
    fn may_take(&self, backup: bool) -> bool {
        self.weight > 0 && self.backup == backup
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Server, ServerAddress};
    use std::time::Duration;

    fn upstream(balance: Balance, servers: &[(u32, bool)]) -> Upstream {
        let servers = servers
            .iter()
            .map(|&(weight, backup)| Server {
                address: ServerAddress::Ip("10.0.0.1:80".parse().unwrap()),
                weight,
                backup,
            })
            .collect();
        Upstream { name: "u".into(), balance, connect_timeout: Duration::from_secs(1), retries: 2, servers }
    }

    fn picks(balancer: &mut Balancer, count: usize) -> Vec<usize> {
        (0..count).map(|_| balancer.pick(|_| 0, |_| false).unwrap()).collect()
    }

    #[test]
    fn round_robin_gives_each_its_weight_without_runs() {
        let mut balancer =
            Balancer::new(&upstream(Balance::RoundRobin, &[(5, false), (1, false), (1, false)]), 0, 1);
        assert_eq!(picks(&mut balancer, 7), [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn slots_begin_at_different_servers() {
        let upstream = upstream(Balance::RoundRobin, &[(1, false); 4]);
        let mut first: Vec<usize> =
            (0..4).map(|slot| picks(&mut Balancer::new(&upstream, slot, 4), 1)[0]).collect();
        first.sort();
        assert_eq!(first, [0, 1, 2, 3]);
    }

    #[test]
    fn a_server_that_failed_is_not_tried_again_for_the_session() {
        let mut balancer = Balancer::new(&upstream(Balance::RoundRobin, &[(1, false); 3]), 0, 1);
        for _ in 0..10 {
            assert_eq!(balancer.pick(|_| 0, |i| i != 1), Some(1));
        }
        assert_eq!(balancer.pick(|_| 0, |_| true), None);
    }

    #[test]
    fn backups_serve_only_when_no_other_may() {
        let mut balancer = Balancer::new(&upstream(Balance::RoundRobin, &[(1, false), (1, true)]), 0, 1);
        assert_eq!(picks(&mut balancer, 5), [0; 5]);
        assert_eq!(balancer.pick(|_| 0, |i| i == 0), Some(1));
    }

    #[test]
    fn a_weight_of_zero_gets_nothing() {
        let mut balancer = Balancer::new(&upstream(Balance::RoundRobin, &[(0, false), (1, false)]), 0, 1);
        assert_eq!(picks(&mut balancer, 3), [1; 3]);
        assert_eq!(balancer.pick(|_| 0, |i| i == 1), None);
    }

    #[test]
    fn least_connections_goes_by_load_and_weight() {
        let servers = [(1, false), (3, false)];
        let mut balancer = Balancer::new(&upstream(Balance::LeastConnections, &servers), 0, 1);
        let mut active = [0u64; 2];
        for _ in 0..400 {
            let i = balancer.pick(|i| active[i], |_| false).unwrap();
            active[i] += 1;
        }
        assert_eq!(active, [100, 300]);
    }

    #[test]
    fn least_connections_takes_equals_in_turn() {
        let mut balancer = Balancer::new(&upstream(Balance::LeastConnections, &[(1, false); 3]), 0, 1);
        assert_eq!(picks(&mut balancer, 6), [0, 1, 2, 0, 1, 2]);
    }
}
