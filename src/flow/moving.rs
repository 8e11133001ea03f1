//! Flows on their way from process to process.
//!
//! ```text
//!   here:   living --freeze--> frozen --end--> gone (the other side has it)
//!                                 \--thaw--> living (it has not)
//!   there:  adopt --> living
//! ```
//! A frozen flow keeps its place and its name, so that nobody opens it a
//! second time, but has no deadline and makes room for nobody.

use serde::{Deserialize, Serialize};

use super::{FlowKey, Flows, GONE_SERVER};
use crate::slab::Key;

/// What a flow is besides its name, its server and its socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its server failed; the next datagram goes to another.
    pub failed: bool,
    /// A reply has come.
    pub answered: bool,
    /// A client's datagram came after the last reply.
    pub awaits: bool,
    /// Datagrams from the client.
    pub requests: u32,
    /// Datagrams from the server.
    pub replies: u32,
    /// When the last datagram came, in milliseconds of the monotonic clock.
    pub last: u64,
}

impl Snapshot {
    /// Whether a flow can be in this state.
    pub fn is_possible(&self) -> bool {
        self.requests > 0 && self.answered == (self.replies > 0)
    }
}

impl Flows {
    /// Takes a flow out of use, and tells its state; `None` where it is gone
    /// or frozen already.
    pub fn freeze(&mut self, key: Key) -> Option<Snapshot> {
        let flow = self.table.get(key).filter(|flow| !flow.frozen)?;
        if !flow.answered {
            self.unlink(key.index);
        }
        self.deadlines.clear(key.index);
        self.table.change(key, |flow| flow.frozen = true);
        let flow = self.table.get(key)?;
        Some(Snapshot {
            failed: flow.failed,
            answered: flow.answered,
            awaits: flow.awaits,
            requests: flow.requests,
            replies: flow.replies,
            last: flow.last,
        })
    }

    /// It goes on here.
    pub fn thaw(&mut self, key: Key, now: u64) {
        let Some(flow) = self.table.get(key).filter(|flow| flow.frozen) else { return };
        self.table.change(key, |flow| flow.frozen = false);
        let (answered, last, listener) = (flow.answered, flow.last, flow.name.listener());
        let idle_timeout = self.books[listener].limits.idle_timeout;
        self.deadlines.set(key.index, last.saturating_add(idle_timeout).max(now));
        if !answered {
            self.link(key.index);
        }
    }

    /// A flow that another process had. `None` where its name is known here,
    /// or where the process has all the sockets that it may. The listener's
    /// own bound does not count: a flow that lives is worth more than one that
    /// may come.
    pub fn adopt(&mut self, name: FlowKey, server: u32, state: &Snapshot, now: u64) -> Option<Key> {
        let limits = self.books.get(usize::from(name.listener))?.limits;
        if self.table.is_full()
            || self.find(&name).is_some()
            || (limits.has_sockets && self.socket_count >= self.socket_limit)
        {
            return None;
        }
        let key = self.open(name, server, now);
        if state.answered {
            self.unlink(key.index);
        }
        // The other process may have looked at its clock a moment later.
        let last = state.last.min(now);
        self.table.change(key, |flow| {
            flow.failed = state.failed || server == GONE_SERVER;
            flow.answered = state.answered;
            flow.awaits = state.awaits;
            flow.requests = state.requests;
            flow.replies = state.replies;
            flow.arriving = true;
            flow.last = last;
        });
        self.deadlines.set(key.index, last.saturating_add(limits.idle_timeout).max(now));
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Arrival, Limits, Reply};
    use super::*;
    use crate::deadline::TICK;

    const LIMITS: Limits = Limits { idle_timeout: 100, replies: 2, max_flows: 2, has_sockets: true };

    fn flows() -> Flows {
        Flows::new(vec![LIMITS], 10, 7, 0)
    }

    fn name(port: u16) -> FlowKey {
        let local = std::net::Ipv4Addr::LOCALHOST.into();
        FlowKey { client: ([10, 0, 0, 1], port).into(), local, listener: 0, address: 0 }
    }

    #[test]
    fn a_flow_that_moves_goes_on_where_it_was() {
        let (mut here, mut there) = (flows(), flows());
        let key = here.open(name(1), 3, 10);
        here.handle_client(&name(1), 20);
        here.handle_reply(key, 30);
        let state = here.freeze(key).unwrap();
        assert!(state.is_possible() && here.freeze(key).is_none());
        let moved = there.adopt(name(1), 3, &state, 40).unwrap();
        assert!(here.end(key).is_some() && here.is_empty() && here.next_deadline().is_none());
        assert!(there.get(moved).unwrap().has_replies_outstanding());
        // One reply of two was counted there, and the silence began there.
        assert_eq!(there.handle_reply(moved, 40), Reply::Last);
        there.end(moved);
        let (mut due, mut fired) = (Vec::new(), Vec::new());
        let other = there.adopt(name(2), 3, &state, 40).unwrap();
        there.expire(129, &mut due, &mut fired);
        assert!(due.is_empty());
        there.expire(130 + TICK, &mut due, &mut fired);
        assert_eq!(due, [other]);
    }

    #[test]
    fn a_frozen_flow_is_known_and_neither_ends_nor_makes_room() {
        let mut flows = flows();
        let first = flows.open(name(1), 0, 0);
        let second = flows.open(name(2), 0, 1);
        flows.freeze(first);
        assert_eq!(flows.handle_client(&name(1), 5), Arrival::Frozen(first));
        assert_eq!(flows.handle_reply(first, 5), Reply::Drop);
        assert_eq!(flows.handle_client(&name(3), 5), Arrival::Open { evict: Some(second) });
        let (mut due, mut fired) = (Vec::new(), Vec::new());
        flows.expire(500, &mut due, &mut fired);
        assert_eq!(due, [second]);
        flows.thaw(first, 500);
        flows.end(second);
        due.clear();
        flows.expire(500 + TICK, &mut due, &mut fired);
        assert_eq!(due, [first]);
        assert!(flows.end(first).is_some() && flows.evictable().is_none());
    }

    #[test]
    fn a_name_that_is_known_and_a_full_house_are_refused() {
        let mut flows = Flows::new(vec![LIMITS], 3, 7, 0);
        let state = Snapshot { requests: 1, ..Snapshot::default() };
        assert!(flows.adopt(name(1), 0, &state, 0).is_some());
        assert!(flows.adopt(name(1), 0, &state, 0).is_none());
        // More than the listener's bound, not more than there are sockets.
        assert!(flows.adopt(name(2), 0, &state, 0).is_some());
        assert!(flows.adopt(name(3), 0, &state, 0).is_some());
        assert!(flows.adopt(name(4), 0, &state, 0).is_none());
        assert_eq!(flows.evictable().and_then(|key| flows.get(key)).map(|flow| flow.key()), Some(name(1)));
    }

    #[test]
    fn a_flow_of_a_server_that_is_gone_asks_for_another_at_its_next_datagram() {
        let mut flows = flows();
        let state = Snapshot { requests: 1, ..Snapshot::default() };
        let key = flows.adopt(name(1), GONE_SERVER, &state, 0).unwrap();
        assert_eq!(flows.handle_reply(key, 1), Reply::Pass);
        assert_eq!(flows.handle_client(&name(1), 2), Arrival::Move(key));
    }
}
