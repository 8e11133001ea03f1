//! The client's side of UDP: flows that are asked in turn, with so many
//! questions under way, each a datagram or a burst.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use evenkeel::sys::datagram::{self, Arena, Outgoing, Sender};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use crate::streams::Outcome;

/// Datagrams of a burst, and their length.
pub const BURST: (usize, usize) = (16, 1200);
const QUESTION_BYTES: usize = 64;

/// Client sockets, each a flow.
pub struct Askers {
    sockets: Vec<UdpSocket>,
    /// When each was asked, and how many answers it waits for.
    asked: Vec<Option<(Instant, usize)>>,
    burst: bool,
    under_way: usize,
    poll: Poll,
    events: Events,
    next: usize,
    begun: bool,
    bytes: Vec<u8>,
    arena: Arena,
    sender: Sender,
}

impl Askers {
    /// So many flows, of which so many are asked at once; `burst` = by
    /// `BURST.0` datagrams of `BURST.1` bytes at a time, else by one of 64.
    pub fn begin(target: SocketAddr, count: usize, under_way: usize, burst: bool) -> io::Result<Askers> {
        let poll = Poll::new()?;
        let mut sockets = Vec::new();
        for at in 0..count {
            // Outside the kernel's own range, which the proxies need.
            let address = format!("127.0.{}.1:{}", 1 + at / 5_000, 3_000 + at % 5_000);
            let socket = UdpSocket::bind(address)?;
            socket.connect(target)?;
            socket.set_nonblocking(true)?;
            if burst {
                nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::UdpGroSegment, &true)?;
            }
            let fd = socket.as_raw_fd();
            poll.registry().register(&mut SourceFd(&fd), Token(at), Interest::READABLE)?;
            sockets.push(socket);
        }
        Ok(Askers {
            asked: vec![None; sockets.len()],
            sockets,
            burst,
            under_way,
            poll,
            events: Events::with_capacity(256),
            next: 0,
            begun: false,
            bytes: vec![7; if burst { BURST.0 * BURST.1 } else { QUESTION_BYTES }],
            arena: Arena::new(16, 1 << 16),
            sender: Sender::default(),
        })
    }

    /// Asks every flow once.
    pub fn warm_up(&mut self) -> io::Result<()> {
        let mut outcome = Outcome::new();
        let per_question = if self.burst { BURST.0 } else { 1 };
        while (outcome.done as usize) < self.sockets.len() * per_question {
            self.turn(&mut outcome)?;
        }
        Ok(())
    }

    /// Asks for so long; `done` is datagrams that came back.
    pub fn run(&mut self, time: Duration) -> io::Result<Outcome> {
        let mut outcome = Outcome::new();
        let begin = Instant::now();
        while begin.elapsed() < time {
            self.turn(&mut outcome)?;
        }
        outcome.seconds = begin.elapsed().as_secs_f64();
        Ok(outcome)
    }

    /// Lets what is under way come in, and asks no more.
    pub fn settle(&mut self) -> io::Result<()> {
        self.under_way = 0;
        while self.asked.iter().any(Option::is_some) {
            self.poll.poll(&mut self.events, Some(Duration::from_millis(500)))?;
            if self.events.is_empty() {
                break;
            }
            let ready: Vec<usize> = self.events.iter().map(|event| event.token().0).collect();
            for at in ready {
                self.take(at, &mut Outcome::new());
            }
        }
        Ok(())
    }

    fn ask_next(&mut self) {
        // One that is still waited for is passed over.
        while self.asked[self.next].is_some() {
            self.next = (self.next + 1) % self.sockets.len();
        }
        let socket = &self.sockets[self.next];
        self.asked[self.next] = Some((Instant::now(), if self.burst { BURST.0 } else { 1 }));
        self.next = (self.next + 1) % self.sockets.len();
        if self.burst {
            let item =
                Outgoing { head: &[], bytes: &self.bytes, to: None, from: None, segment: Some(BURST.1) };
            self.sender.send(socket, [item], |_, _| {});
        } else {
            let _ = datagram::send(socket, &self.bytes);
        }
    }

    /// Takes the answers that are there and asks as often.
    fn turn(&mut self, outcome: &mut Outcome) -> io::Result<()> {
        if !std::mem::replace(&mut self.begun, true) {
            (0..self.under_way).for_each(|_| self.ask_next());
        }
        match self.poll.poll(&mut self.events, Some(Duration::from_secs(1))) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        }
        let ready: Vec<usize> = self.events.iter().map(|event| event.token().0).collect();
        if ready.is_empty() {
            // Everything under way is lost: begin again.
            outcome.failures += self.asked.iter().flatten().map(|(_, missing)| *missing as u64).sum::<u64>();
            self.asked.fill(None);
            self.begun = false;
            return match outcome.failures {
                ..100_000 => Ok(()),
                _ => Err(io::Error::other("no answers")),
            };
        }
        for at in ready {
            if self.take(at, outcome) {
                self.ask_next();
            }
        }
        Ok(())
    }

    /// Reads one flow; whether its question is answered now.
    fn take(&mut self, at: usize, outcome: &mut Outcome) -> bool {
        let mut got = 0;
        if self.burst {
            while let Ok(count) = self.arena.receive_connected(&self.sockets[at], 0, 16) {
                got += (0..count).map(|place| self.arena.get(place).count() as usize).sum::<usize>();
                if count < 16 {
                    break;
                }
            }
        } else {
            let mut buffer = [0; 128];
            // One question, one answer; a later one brings an event of its own.
            got += usize::from(self.sockets[at].recv(&mut buffer).is_ok());
        }
        outcome.done += got as u64;
        let Some((since, missing)) = &mut self.asked[at] else { return false };
        *missing = missing.saturating_sub(got);
        if *missing > 0 {
            return false;
        }
        let micros = since.elapsed().as_micros() as u64;
        outcome.latencies.saturating_record(micros.max(1));
        self.asked[at] = None;
        true
    }
}
