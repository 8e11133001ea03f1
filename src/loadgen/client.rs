//! What sits at a place of the engine: a TCP session or a UDP flow.
//!
//! Owned by `engine`. Nothing but the choice between the two.

use std::time::Instant;

use super::flow::Flow;
use super::plan::Plan;
use super::session::{Desk, Session, Step};

/// One or the other.
pub enum Client {
    /// A connection.
    Tcp(Session),
    /// A flow.
    Udp(Flow),
}

impl Client {
    /// Whether it stands and another exchange may start on it.
    pub fn has_room(&self, plan: &Plan) -> bool {
        match self {
            Client::Tcp(session) => session.is_connected() && session.has_room(plan),
            Client::Udp(flow) => flow.has_room(plan),
        }
    }

    /// The same for a closed loop, which queues its first exchange on a
    /// connection that does not stand yet.
    pub fn may_start(&self, plan: &Plan) -> bool {
        match self {
            Client::Tcp(session) => session.has_room(plan) && (session.is_connected() || session.is_idle()),
            Client::Udp(flow) => flow.has_room(plan),
        }
    }

    /// Whether nothing is under way; a connect is.
    pub fn is_idle(&self) -> bool {
        match self {
            Client::Tcp(session) => session.is_connected() && session.is_idle(),
            Client::Udp(flow) => flow.is_idle(),
        }
    }

    /// Whether it has done all it was made for.
    pub fn is_finished(&self) -> bool {
        match self {
            Client::Tcp(session) => session.is_finished(),
            Client::Udp(flow) => flow.is_finished(),
        }
    }

    /// Whether a connect is under way.
    pub fn is_dialling(&self) -> bool {
        matches!(self, Client::Tcp(session) if !session.is_connected())
    }

    /// Queues one exchange, meant to start at `due`; `flush` sends it.
    pub fn start(&mut self, due: Instant, begun: Instant, plan: &Plan) {
        match self {
            Client::Tcp(session) => session.start(due, begun, plan),
            Client::Udp(flow) => flow.start(due, begun),
        }
    }

    /// Sends what is queued.
    pub fn flush(&mut self, desk: &mut Desk) -> Step {
        match self {
            Client::Tcp(session) => session.flush(desk),
            Client::Udp(flow) => flow.flush(desk),
        }
    }

    /// The socket takes bytes again, or the connect is decided.
    pub fn handle_writable(&mut self, desk: &mut Desk) -> Step {
        match self {
            Client::Tcp(session) => session.handle_writable(desk),
            Client::Udp(flow) => flow.flush(desk),
        }
    }

    /// Something has come; `end` when the other side's end was announced.
    pub fn handle_readable(&mut self, desk: &mut Desk, end: bool) -> Step {
        match self {
            Client::Tcp(session) => session.handle_readable(desk, end),
            Client::Udp(flow) => flow.handle_readable(desk),
        }
    }

    /// Gives up what has waited too long. True if that made room.
    pub fn expire(&mut self, desk: &mut Desk) -> (Step, bool) {
        let (timeout, now) = (desk.plan.timeout, desk.now);
        match self {
            Client::Tcp(session) => {
                let late = |since: Instant| now.saturating_duration_since(since) >= timeout;
                match session.waiting_since(desk.plan).filter(|since| late(*since)) {
                    Some(_) => (Step::Failed(session.timed_out(desk.plan)), false),
                    None => (Step::Open, false),
                }
            }
            Client::Udp(flow) => {
                let made_room = flow.expire(timeout, desk) | flow.wake();
                (Step::Open, made_room)
            }
        }
    }
}
