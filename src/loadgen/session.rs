//! One TCP connection of the load generator.
//!
//!   Dialling --first write taken--> Open --last exchange done--> closed
//!        \--refused, timed out-----------\--reset, wrong bytes--> closed
//!
//! Owned by `engine`, which lends it a `Desk`: plan, noise, tally, scratch
//! buffer. Edge-triggered: a call goes on until the socket would block. Bounded
//! by its window of exchanges under way.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::time::Instant;

use mio::net::TcpStream;

use super::args::{Direction, Pattern};
use super::dialogue::{Heard, Listening, Script};
use super::identity::{Finder, Found};
use super::pattern::{self, LONGEST, Noise};
use super::plan::Plan;
use super::tally::{Mishap, Tally, Trouble};

/// What the engine lends to a connection for one call.
pub struct Desk<'a> {
    /// The run.
    pub plan: &'a Plan,
    /// The payload.
    pub noise: &'a Noise,
    /// Where things are counted.
    pub tally: &'a mut Tally,
    /// For reading.
    pub scratch: &'a mut [u8],
    /// Brought up to date after each read.
    pub now: Instant,
}

/// What became of a connection in a call.
#[derive(Debug)]
pub enum Step {
    /// Goes on; may have room for further exchanges.
    Open,
    /// Ended as it should, or by the server's right.
    Ended,
    /// Ended by a trouble.
    Failed(Mishap),
}

/// An exchange under way.
#[derive(Debug)]
struct Exchange {
    /// Offset behind its last byte in the stream sent.
    end: u64,
    /// When it was meant to start: latencies count from here.
    start: Instant,
    /// When it did: the timeout counts from here.
    begun: Instant,
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    /// For the poll.
    pub stream: TcpStream,
    dialled: Instant,
    connected: bool,
    /// When bytes last moved.
    moved: Instant,
    /// Position of the first byte in the noise.
    start_at: u64,
    queued: u64,
    sent: u64,
    received: u64,
    under_way: VecDeque<Exchange>,
    finder: Finder,
    listening: Listening,
    left: Option<u64>,
}

impl Session {
    /// A connection that was just dialled, for so many exchanges.
    pub fn new(stream: TcpStream, dialled: Instant, number: u64, left: Option<u64>, plan: &Plan) -> Session {
        Session {
            stream,
            dialled,
            connected: false,
            moved: dialled,
            start_at: pattern::start_of(number ^ plan.seed << 40),
            queued: 0,
            sent: 0,
            received: 0,
            under_way: VecDeque::new(),
            finder: Finder::default(),
            listening: Listening::default(),
            left,
        }
    }

    /// Whether another exchange may start.
    pub fn has_room(&self, plan: &Plan) -> bool {
        self.left != Some(0) && self.under_way.len() < plan.window && plan.direction != Direction::Down
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Whether the connection stands.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Whether it has done all it was made for.
    pub fn is_finished(&self) -> bool {
        self.left == Some(0) && self.under_way.is_empty()
    }

    /// Since when the connect, or the oldest exchange, is waited for. A stream
    /// has many under way, and may be slow as long as it moves.
    pub fn waiting_since(&self, plan: &Plan) -> Option<Instant> {
        if !self.connected {
            return Some(self.dialled);
        }
        let begun = self.under_way.front()?.begun;
        Some(if plan.pattern == Pattern::Stream { begun.max(self.moved) } else { begun })
    }

    /// Queues one exchange, meant to start at `start`; `flush` sends it.
    pub fn start(&mut self, start: Instant, begun: Instant, plan: &Plan) {
        let length = match &plan.script {
            Script::Echo => plan.size,
            other => other.message().len(),
        };
        self.queued += length as u64;
        self.under_way.push_back(Exchange { end: self.queued, start, begun });
        self.left = self.left.map(|left| left - 1);
    }

    /// Queues what opens a stream that only flows down.
    pub fn start_down(&mut self, plan: &Plan) {
        self.queued += plan.script.message().len() as u64;
    }

    /// Sends what is queued, until the socket would block.
    pub fn flush(&mut self, desk: &mut Desk) -> Step {
        while self.sent < self.queued {
            let left = (self.queued - self.sent).min(LONGEST as u64) as usize;
            let bytes = match &desk.plan.script {
                Script::Echo => desk.noise.piece(self.start_at + self.sent, left),
                other => {
                    let message = other.message();
                    &message[(self.sent % message.len() as u64) as usize..]
                }
            };
            match self.stream.write(bytes) {
                Ok(0) => return Step::Failed(Mishap::new(Trouble::Other, "write returned nothing")),
                Ok(count) => {
                    self.note_connected(desk);
                    self.sent += count as u64;
                    self.moved = desk.now;
                    desk.tally.bytes_sent += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.fail(error, desk),
            }
        }
        if desk.plan.direction == Direction::Up {
            self.complete_sent(desk);
        }
        Step::Open
    }

    /// The poll says that the connect is decided.
    pub fn handle_writable(&mut self, desk: &mut Desk) -> Step {
        if !self.connected && self.sent == self.queued {
            match self.stream.take_error() {
                Ok(None) if self.stream.peer_addr().is_ok() => self.note_connected(desk),
                Ok(None) => return Step::Open,
                Ok(Some(error)) | Err(error) => return self.fail(error, desk),
            }
        }
        self.flush(desk)
    }

    /// Reads what has come. `to_the_end` when the server's end was announced.
    pub fn handle_readable(&mut self, desk: &mut Desk, to_the_end: bool) -> Step {
        loop {
            let scratch = std::mem::take(&mut desk.scratch);
            let outcome = self.stream.read(scratch);
            desk.now = Instant::now();
            let step = match outcome {
                Ok(0) => Some(self.handle_end(desk)),
                Ok(count) => {
                    self.moved = desk.now;
                    desk.tally.bytes_received += count as u64;
                    let step = self.handle_bytes(&scratch[..count], desk);
                    // A short read has emptied the queue; the next bytes are a new edge.
                    let drained = count < scratch.len() && !to_the_end;
                    match step {
                        Step::Open if !drained => None,
                        step => Some(step),
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => Some(Step::Open),
                Err(error) if error.kind() == ErrorKind::Interrupted => None,
                Err(error) => Some(self.fail(error, desk)),
            };
            desk.scratch = scratch;
            if let Some(step) = step {
                return step;
            }
        }
    }

    /// The oldest exchange has waited too long.
    pub fn timed_out(&self, plan: &Plan) -> Mishap {
        if !self.connected {
            return Mishap::new(Trouble::ConnectTimedOut, "no answer to the connect");
        }
        let text = match plan.script {
            Script::Echo => format!("{} of {} bytes came back", self.received_of_answer(plan), plan.size),
            _ => "no complete answer".to_string(),
        };
        Mishap::new(Trouble::TimedOut, text)
    }

    /// Bytes of the oldest answer that an echo has sent back so far.
    fn received_of_answer(&self, plan: &Plan) -> u64 {
        let begin = |exchange: &Exchange| exchange.end - plan.size as u64;
        self.under_way.front().map_or(0, |oldest| self.received.saturating_sub(begin(oldest)))
    }

    fn note_connected(&mut self, desk: &mut Desk) {
        if !self.connected {
            self.connected = true;
            desk.now = Instant::now();
            desk.tally.count_connection(desk.now - self.dialled);
            if desk.plan.pattern != Pattern::Connect {
                // On a connection that is kept, the connect is no part of the first exchange.
                self.under_way.iter_mut().for_each(|exchange| exchange.start = desk.now);
            }
        }
    }

    fn handle_bytes(&mut self, bytes: &[u8], desk: &mut Desk) -> Step {
        if self.finder.is_done() || matches!(desk.plan.script, Script::Http(_)) {
            return self.handle_payload(bytes, desk);
        }
        match self.finder.feed(bytes) {
            Found::More => Step::Open,
            Found::Line(identity, used) => {
                desk.tally.count_identity(&identity);
                match &bytes[used..] {
                    [] => Step::Open,
                    rest => self.handle_payload(rest, desk),
                }
            }
            Found::None(held) if held.is_empty() => self.handle_payload(bytes, desk),
            Found::None(held) => match self.handle_payload(&held, desk) {
                Step::Open => self.handle_payload(bytes, desk),
                step => step,
            },
        }
    }

    fn handle_payload(&mut self, bytes: &[u8], desk: &mut Desk) -> Step {
        match desk.plan.direction {
            Direction::Up => return Step::Open,
            Direction::Down => {
                let before = self.received / desk.plan.size as u64;
                self.received += bytes.len() as u64;
                desk.tally.requests += self.received / desk.plan.size as u64 - before;
                return Step::Open;
            }
            Direction::Both => {}
        }
        match desk.plan.script {
            Script::Echo => self.handle_echo(bytes, desk),
            _ => self.handle_answer(bytes, desk),
        }
    }

    fn handle_echo(&mut self, bytes: &[u8], desk: &mut Desk) -> Step {
        if let Some(at) = desk.noise.first_difference(self.start_at + self.received, bytes) {
            let text = format!("byte {} of the answers is not what was sent", self.received + at as u64);
            return Step::Failed(Mishap::new(Trouble::WrongReply, text));
        }
        self.received += bytes.len() as u64;
        if self.received > self.sent {
            let text = format!("{} bytes came back of {} sent", self.received, self.sent);
            return Step::Failed(Mishap::new(Trouble::WrongReply, text));
        }
        while self.under_way.front().is_some_and(|exchange| exchange.end <= self.received) {
            self.complete(desk);
        }
        self.after_answer(desk)
    }

    fn handle_answer(&mut self, mut bytes: &[u8], desk: &mut Desk) -> Step {
        while !bytes.is_empty() {
            // Of an answer that may be anything, nobody knows where it ends.
            if self.under_way.is_empty() && matches!(desk.plan.script, Script::Any(_)) {
                break;
            }
            if self.under_way.is_empty() {
                let text = format!("{} bytes came that nothing asked for", bytes.len());
                return Step::Failed(Mishap::new(Trouble::WrongReply, text));
            }
            let (used, heard) = self.listening.feed(&desk.plan.script, bytes);
            bytes = &bytes[used..];
            match self.conclude(heard, desk) {
                Step::Open => {}
                step => return step,
            }
        }
        self.after_answer(desk)
    }

    fn conclude(&mut self, heard: Heard, desk: &mut Desk) -> Step {
        match heard {
            Heard::More => Step::Open,
            Heard::Done { keep } => {
                self.complete(desk);
                if keep { Step::Open } else { Step::Ended }
            }
            Heard::Error(code) => {
                Step::Failed(Mishap::new(Trouble::ErrorReply, format!("the answer has status {code}")))
            }
            Heard::Wrong => {
                Step::Failed(Mishap::new(Trouble::WrongReply, "the answer is not of the expected kind"))
            }
        }
    }

    fn handle_end(&mut self, desk: &mut Desk) -> Step {
        match self.listening.handle_end() {
            Heard::More => {}
            heard => return self.conclude(heard, desk),
        }
        if desk.plan.direction == Direction::Down {
            return Step::Ended;
        }
        let echoed = desk.plan.script == Script::Echo && self.received_of_answer(desk.plan) > 0;
        let begun = self.listening.has_begun() || echoed;
        match self.under_way.front() {
            // Servers that are not echoes may close a kept connection.
            None if desk.plan.script != Script::Echo || desk.plan.pattern == Pattern::Connect => Step::Ended,
            None => Step::Failed(Mishap::new(Trouble::Closed, "the server closed an open connection")),
            Some(_) if begun => {
                let text = format!("the server closed after {} bytes", self.received);
                Step::Failed(Mishap::new(Trouble::ShortReply, text))
            }
            Some(_) => Step::Failed(Mishap::new(Trouble::Closed, "the server closed before its answer")),
        }
    }

    fn complete(&mut self, desk: &mut Desk) {
        let exchange = self.under_way.pop_front().expect("the caller saw an exchange under way");
        desk.tally.count_answer(desk.now.saturating_duration_since(exchange.start));
    }

    /// A stream that only flows up: what the kernel took is done.
    fn complete_sent(&mut self, desk: &mut Desk) {
        while self.under_way.front().is_some_and(|exchange| exchange.end <= self.sent) {
            self.under_way.pop_front();
            desk.tally.requests += 1;
        }
    }

    fn after_answer(&self, desk: &Desk) -> Step {
        // A client that connects for one exchange closes after it.
        let over = desk.plan.pattern == Pattern::Connect && self.is_finished();
        if over { Step::Ended } else { Step::Open }
    }

    fn fail(&self, error: io::Error, desk: &Desk) -> Step {
        // After its last answer a server may reset what we are about to close.
        if self.is_finished() && desk.plan.pattern == Pattern::Connect {
            return Step::Ended;
        }
        Step::Failed(error.into())
    }
}
