//! One UDP flow of the load generator: a connected socket and the datagrams
//! that it waits for.
//!
//! Owned by `engine`. Each datagram carries the flow's tag and its number, so
//! that a late, doubled, foreign or changed answer is told from the right one.
//! Bounded by the window of datagrams under way.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use mio::net::UdpSocket;

use super::args::{Direction, Pattern};
use super::dialogue::{self, Heard, Script};
use super::identity;
use super::pattern::{self, HEADER};
use super::plan::Plan;
use super::session::{Desk, Step};
use super::tally::{Mishap, Trouble};

/// Answers to so many earlier datagrams are still told from foreign ones.
const REMEMBERED: u32 = 1 << 16;

/// So many datagrams that were given up are told from doubled ones.
const LOST_REMEMBERED: usize = 1024;

/// A datagram under way.
#[derive(Debug)]
struct Datagram {
    number: u32,
    /// When it was meant to be sent: latencies count from here.
    start: Instant,
    /// When it was: the timeout counts from here.
    begun: Instant,
    sent: bool,
    answered: bool,
}

/// One flow.
#[derive(Debug)]
pub struct Flow {
    /// For the poll.
    pub socket: UdpSocket,
    tag: u32,
    next_number: u32,
    under_way: VecDeque<Datagram>,
    unsent: usize,
    slot: Option<usize>,
    left: Option<u64>,
    /// Given up lately: their answers may still come.
    lost: VecDeque<u32>,
    /// Refused lately: sends nothing before the next sweep.
    resting: bool,
}

impl Flow {
    /// A flow that was just opened, for so many exchanges.
    pub fn new(socket: UdpSocket, number: u64, left: Option<u64>, plan: &Plan) -> Flow {
        Flow {
            socket,
            tag: (number as u32) ^ (plan.seed as u32) << 20,
            next_number: 0,
            under_way: VecDeque::new(),
            unsent: 0,
            slot: None,
            left,
            lost: VecDeque::new(),
            resting: false,
        }
    }

    /// Whether another datagram may be sent.
    pub fn has_room(&self, plan: &Plan) -> bool {
        self.left != Some(0) && self.under_way.len() < plan.window && self.unsent == 0 && !self.resting
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Whether it has done all it was made for.
    pub fn is_finished(&self) -> bool {
        self.left == Some(0) && self.under_way.is_empty()
    }

    /// Queues one datagram, meant to be sent at `start`; `flush` sends it.
    pub fn start(&mut self, start: Instant, begun: Instant) {
        let number = self.next_number;
        self.next_number = number.wrapping_add(1);
        self.under_way.push_back(Datagram { number, start, begun, sent: false, answered: false });
        self.unsent += 1;
        self.left = self.left.map(|left| left - 1);
    }

    /// Sends what is queued, until the socket would block.
    pub fn flush(&mut self, desk: &mut Desk) -> Step {
        while self.unsent > 0 {
            let at = self.under_way.len() - self.unsent;
            let length = self.compose(self.under_way[at].number, desk);
            match self.socket.send(&desk.scratch[..length]) {
                Ok(_) => {
                    desk.tally.bytes_sent += length as u64;
                    self.under_way[at].sent = true;
                    self.unsent -= 1;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The refusal belongs to an earlier datagram; this one may be sent again.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused && at > 0 => {
                    self.refuse_oldest(error.into(), desk);
                }
                Err(error) => return Step::Failed(error.into()),
            }
        }
        if desk.plan.direction == Direction::Up {
            let done = self.under_way.len() - self.unsent;
            self.under_way.drain(..done);
            desk.tally.requests += done as u64;
        }
        Step::Open
    }

    /// Takes what has come in.
    pub fn handle_readable(&mut self, desk: &mut Desk) -> Step {
        loop {
            let scratch = std::mem::take(&mut desk.scratch);
            let outcome = self.socket.recv(scratch);
            desk.now = Instant::now();
            let mut stop = false;
            match outcome {
                Ok(count) => {
                    desk.tally.bytes_received += count as u64;
                    self.handle_datagram(&scratch[..count], desk);
                    // Nothing more is expected; what comes late is a new edge.
                    stop = self.under_way.is_empty() && desk.plan.window == 1;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => stop = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionRefused && !self.under_way.is_empty() => {
                    self.refuse_oldest(error.into(), desk);
                }
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => {
                    desk.scratch = scratch;
                    return Step::Failed(error.into());
                }
            }
            desk.scratch = scratch;
            if stop {
                break;
            }
        }
        let over = desk.plan.pattern == Pattern::Connect && self.is_finished();
        if over { Step::Ended } else { Step::Open }
    }

    /// The rest after a refusal is over; true if there was one.
    pub fn wake(&mut self) -> bool {
        std::mem::take(&mut self.resting)
    }

    /// Counts as lost what has waited too long; true if there was any.
    pub fn expire(&mut self, timeout: Duration, desk: &mut Desk) -> bool {
        let mut any = false;
        while let Some(oldest) = self.under_way.front()
            && desk.now.saturating_duration_since(oldest.begun) >= timeout
        {
            if !oldest.sent {
                self.unsent -= 1;
            }
            let text = format!("datagram {} of flow {} was not answered", oldest.number, self.tag);
            desk.tally.count_mishap(desk.now, Mishap::new(Trouble::LostDatagram, text));
            if self.lost.len() == LOST_REMEMBERED {
                self.lost.pop_front();
            }
            self.lost.push_back(oldest.number);
            self.under_way.pop_front();
            self.forget_answered();
            any = true;
        }
        any
    }

    /// Writes a datagram into the scratch buffer; its length.
    fn compose(&self, number: u32, desk: &mut Desk) -> usize {
        match &desk.plan.script {
            Script::Echo => {
                let size = desk.plan.size;
                let start = pattern::start_of_datagram(self.tag, number);
                desk.scratch[..HEADER].copy_from_slice(&pattern::header(self.tag, number));
                desk.scratch[HEADER..size].copy_from_slice(desk.noise.piece(start, size - HEADER));
                size
            }
            other => {
                let message = other.message();
                desk.scratch[..message.len()].copy_from_slice(message);
                if let Script::Dns(_) = other {
                    desk.scratch[..2].copy_from_slice(&(number as u16).to_be_bytes());
                }
                message.len()
            }
        }
    }

    fn handle_datagram(&mut self, datagram: &[u8], desk: &mut Desk) {
        let (identity, payload) = identity::split_datagram(datagram);
        if let Some(identity) = identity {
            match self.slot {
                None => desk.tally.count_identity(&identity),
                Some(slot) => desk.tally.slot_changes += u64::from(slot != identity.slot),
            }
            self.slot = Some(identity.slot);
        }
        if desk.plan.direction == Direction::Up {
            return;
        }
        match &desk.plan.script {
            Script::Echo => self.handle_echo(payload, desk),
            Script::Dns(_) => self.handle_numbered(payload, desk),
            _ => match self.under_way.front() {
                Some(oldest) => self.conclude(oldest.number, payload, desk),
                None => self.complain(Trouble::WrongReply, "a datagram came that nothing asked for", desk),
            },
        }
    }

    fn handle_echo(&mut self, payload: &[u8], desk: &mut Desk) {
        let Some((header, noise)) = payload.split_first_chunk::<HEADER>() else {
            let text = format!("{} bytes came back of {}", payload.len(), desk.plan.size);
            return self.complain_of_oldest(Trouble::ShortReply, &text, desk);
        };
        let number = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        if header[..4] != pattern::header(self.tag, 0)[..4] {
            return self.complain_of_oldest(
                Trouble::WrongReply,
                "an answer carries another flow's tag",
                desk,
            );
        }
        let Some(at) = self.place_of(number) else {
            return self.handle_unexpected(number, desk);
        };
        if payload.len() < desk.plan.size {
            let text = format!("{} bytes came back of {}", payload.len(), desk.plan.size);
            return self.fail_at(at, Trouble::ShortReply, &text, desk);
        }
        let start = pattern::start_of_datagram(self.tag, number);
        if payload.len() > desk.plan.size {
            let text = format!("{} bytes came back of {}", payload.len(), desk.plan.size);
            return self.fail_at(at, Trouble::WrongReply, &text, desk);
        }
        match desk.noise.first_difference(start, noise) {
            Some(wrong) => {
                let text = format!("byte {} of an answer is not what was sent", HEADER + wrong);
                self.fail_at(at, Trouble::WrongReply, &text, desk);
            }
            None => self.complete_at(at, desk),
        }
    }

    /// A right tag and a number that is not waited for: answered before, or
    /// given up (which was counted then), or never sent.
    fn handle_unexpected(&mut self, number: u32, desk: &mut Desk) {
        if let Some(at) = self.lost.iter().position(|lost| *lost == number) {
            self.lost.remove(at);
        } else if self.next_number.wrapping_sub(number).wrapping_sub(1) < REMEMBERED {
            self.complain(Trouble::DuplicateDatagram, "a datagram was answered twice", desk);
        } else {
            self.complain(Trouble::WrongReply, "an answer carries a number that was never sent", desk);
        }
    }

    fn handle_numbered(&mut self, payload: &[u8], desk: &mut Desk) {
        let id = payload.first_chunk::<2>().map(|id| u16::from_be_bytes(*id));
        let same = |datagram: &Datagram| Some(datagram.number as u16) == id && !datagram.answered;
        match self.under_way.iter().find(|datagram| same(datagram)) {
            Some(datagram) => self.conclude(datagram.number, payload, desk),
            None => {
                self.complain(Trouble::WrongReply, "an answer carries a number that is not waited for", desk)
            }
        }
    }

    fn conclude(&mut self, number: u32, payload: &[u8], desk: &mut Desk) {
        let at = self.place_of(number).expect("the caller found it under way");
        match dialogue::judge_datagram(&desk.plan.script, number, payload) {
            Heard::Done { .. } => self.complete_at(at, desk),
            Heard::Error(code) => {
                self.fail_at(at, Trouble::ErrorReply, &format!("the answer has code {code}"), desk);
            }
            Heard::More | Heard::Wrong => {
                self.fail_at(at, Trouble::WrongReply, "the answer is not of the expected kind", desk);
            }
        }
    }

    fn place_of(&self, number: u32) -> Option<usize> {
        let oldest = self.under_way.front()?.number;
        let at = number.wrapping_sub(oldest) as usize;
        self.under_way.get(at).filter(|datagram| datagram.sent && !datagram.answered).map(|_| at)
    }

    fn complete_at(&mut self, at: usize, desk: &mut Desk) {
        desk.tally.count_answer(desk.now.saturating_duration_since(self.under_way[at].start));
        self.settle(at);
    }

    fn fail_at(&mut self, at: usize, trouble: Trouble, text: &str, desk: &mut Desk) {
        self.complain(trouble, text, desk);
        self.settle(at);
    }

    /// A bad answer that does not say whose it is: the oldest one's.
    fn complain_of_oldest(&mut self, trouble: Trouble, text: &str, desk: &mut Desk) {
        self.complain(trouble, text, desk);
        if self.under_way.front().is_some_and(|oldest| oldest.sent) {
            self.settle(0);
        }
    }

    fn refuse_oldest(&mut self, mishap: Mishap, desk: &mut Desk) {
        desk.tally.count_mishap(desk.now, mishap);
        // A rate goes on whatever happens; a closed loop would only hammer.
        self.resting = desk.plan.rate.is_none();
        if self.under_way.front().is_some_and(|oldest| oldest.sent) {
            self.settle(0);
        }
    }

    fn complain(&self, trouble: Trouble, text: &str, desk: &mut Desk) {
        desk.tally.count_mishap(desk.now, Mishap::new(trouble, text));
    }

    fn settle(&mut self, at: usize) {
        self.under_way[at].answered = true;
        self.forget_answered();
    }

    fn forget_answered(&mut self) {
        while self.under_way.front().is_some_and(|datagram| datagram.answered) {
            self.under_way.pop_front();
        }
    }
}
