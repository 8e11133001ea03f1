//! Which place of its upstream a session goes to, and what that place is.

use super::connect::Attempt;
use super::{Sessions, Stage};
use crate::balance::{Ask, Pick};
use crate::board::Health;
use crate::config::{OnDown, ServerAddress};
use crate::relay::CloseReason;
use crate::sys::clock::Millis;

impl Sessions<'_> {
    /// The board may have changed: sessions of servers that went down are
    /// reset where that is asked, and waiting ones may find a place.
    pub fn handle_board(&mut self, now: Millis) {
        self.waiting.look_soon();
        for upstream in 0..self.seen_epochs.len() {
            let epoch = self.context.board.epoch(upstream);
            if self.seen_epochs[upstream] == epoch {
                continue;
            }
            self.seen_epochs[upstream] = epoch;
            self.balancers[upstream].refresh(&self.context.board, upstream);
            if self.context.config.upstreams[upstream].on_down == OnDown::Reset {
                self.reset_down(upstream, now);
            }
        }
    }

    /// A look at every session: servers go down seldom.
    fn reset_down(&mut self, upstream: usize, now: Millis) {
        for key in self.slab.keys() {
            let Some(entry) = self.slab.get(key) else { continue };
            let is_open = matches!(entry.stage, Stage::Open) && !entry.frozen;
            let place = entry.server_index.filter(|_| is_open && self.upstream(key) == Some(upstream));
            let place = place.and_then(|place| self.balancers[upstream].places().get(place as usize));
            let is_down =
                place.is_some_and(|p| p.health == Health::Down && p.incarnation == entry.incarnation);
            if is_down {
                self.close(key, CloseReason::ServerDown, now);
            }
        }
    }

    /// The place that a session is to try.
    pub(super) fn pick(&mut self, upstream: usize, attempt: &Attempt, now: Millis) -> Pick {
        let tried = &attempt.tried;
        if tried.len() as u64 > u64::from(self.context.config.upstreams[upstream].retries) {
            return Pick::Tried;
        }
        let context = &self.context;
        let balancer = &mut self.balancers[upstream];
        balancer.refresh(&context.board, upstream);
        if !self.may_pass(upstream, attempt.waits_since, now) {
            return Pick::Full;
        }
        let context = &self.context;
        let ask = Ask {
            client: attempt.client.ip().to_canonical(),
            now,
            table: context.board.table(upstream),
            active: &|place| context.active_at(upstream, place),
            tried: &|place| tried.contains(&(place as u32)),
        };
        self.balancers[upstream].pick(&ask)
    }

    /// The server of the configuration that a place belongs to.
    pub(super) fn server_at(&self, upstream: usize, place: usize) -> &ServerAddress {
        self.context.server_at(upstream, place)
    }

    /// Where a place leads now; `None` where it is vacant.
    pub(super) fn address_at(&self, upstream: usize, place: usize) -> Option<ServerAddress> {
        self.context.address_at(&self.balancers[upstream], upstream, place)
    }

    /// What a place is called between processes, whatever its number.
    pub(super) fn place_name(&self, upstream: usize, place: usize) -> String {
        self.context.place_name(&self.balancers[upstream], upstream, place)
    }

    /// The place of this name.
    pub(super) fn place_named(&self, upstream: usize, name: &str) -> Option<usize> {
        self.context.place_named(&self.balancers[upstream], upstream, name)
    }
}
