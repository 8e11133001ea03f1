//! The client's side of TCP: questions and answers, and bulk. One thread, a
//! closed loop; the clock is read at each question and answer.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::socket::MsgFlags;

/// What a client asks, and how.
#[derive(Clone, Debug)]
pub struct Dialogue {
    /// Each question.
    pub question: Vec<u8>,
    /// The length of each answer.
    pub answer_bytes: usize,
    /// Connections at once.
    pub open: usize,
    /// Questions under way at once, each on a connection of its own; they are
    /// asked in turn.
    pub under_way: usize,
    /// A connection of its own for each question.
    pub reconnects: bool,
}

/// What came of a while.
#[derive(Debug)]
pub struct Outcome {
    /// Answers, or bytes, or datagrams.
    pub done: u64,
    pub seconds: f64,
    /// Of answers, in microseconds.
    pub latencies: Histogram<u64>,
    /// What broke, or was lost.
    pub failures: u64,
}

impl Outcome {
    pub fn new() -> Outcome {
        // A minute at most, to a thousandth.
        let latencies = Histogram::new_with_bounds(1, 60_000_000, 3).expect("sane bounds");
        Outcome { done: 0, seconds: 0.0, latencies, failures: 0 }
    }
}

struct Talk {
    stream: TcpStream,
    asked: Instant,
    got: usize,
}

/// Connections that ask.
pub struct Talkers {
    dialogue: Dialogue,
    target: SocketAddr,
    talks: Vec<Talk>,
    /// Connections that wait to ask, the one that waits longest in front.
    resting: VecDeque<usize>,
    poll: Poll,
    events: Events,
    buffer: Vec<u8>,
}

impl Talkers {
    /// Connects all of them and asks as many questions as may be under way.
    pub fn begin(target: SocketAddr, dialogue: Dialogue) -> io::Result<Talkers> {
        let mut talkers = Talkers {
            target,
            talks: Vec::new(),
            resting: VecDeque::new(),
            poll: Poll::new()?,
            events: Events::with_capacity(256),
            buffer: vec![0; 64 * 1024],
            dialogue,
        };
        for at in 0..talkers.dialogue.open {
            let rests = at >= talkers.dialogue.under_way;
            let talk = if rests { talkers.connect(at)? } else { talkers.ask_anew(at)? };
            talkers.talks.push(talk);
            talkers.resting.extend(rests.then_some(at));
        }
        Ok(talkers)
    }

    fn ask_anew(&self, at: usize) -> io::Result<Talk> {
        let mut talk = self.connect(at)?;
        talk.stream.write_all(&self.dialogue.question)?;
        Ok(talk)
    }

    fn connect(&self, at: usize) -> io::Result<Talk> {
        let asked = Instant::now();
        // Waits for the handshake, which on loopback is over at once.
        let stream = TcpStream::connect(self.target)?;
        stream.set_nonblocking(true)?;
        if !self.dialogue.reconnects {
            stream.set_nodelay(true)?;
        }
        let fd = stream.as_raw_fd();
        self.poll.registry().register(&mut SourceFd(&fd), Token(at), Interest::READABLE)?;
        Ok(Talk { stream, asked, got: 0 })
    }

    /// Lets the answers come in, and asks no more.
    pub fn settle(&mut self) -> io::Result<()> {
        while self.talks.iter().any(|talk| talk.got < self.dialogue.answer_bytes) {
            self.poll.poll(&mut self.events, Some(Duration::from_secs(5)))?;
            if self.events.is_empty() {
                return Err(io::Error::other("no answer for five seconds"));
            }
            for at in self.events.iter().map(|event| event.token().0) {
                let talk = &mut self.talks[at];
                talk.got += talk.stream.read(&mut self.buffer)?;
            }
        }
        Ok(())
    }

    /// Talks for so long, and on until all could have been asked once.
    pub fn warm_up(&mut self, time: Duration) -> io::Result<()> {
        let mut done = 0;
        while done < self.dialogue.open as u64 {
            done += self.run(time)?.done;
        }
        Ok(())
    }

    /// Talks for so long.
    pub fn run(&mut self, time: Duration) -> io::Result<Outcome> {
        let mut outcome = Outcome::new();
        let begin = Instant::now();
        while begin.elapsed() < time {
            match self.poll.poll(&mut self.events, Some(Duration::from_secs(2))) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            if self.events.is_empty() {
                return Err(io::Error::other("no answer for two seconds"));
            }
            let ready: Vec<usize> = self.events.iter().map(|event| event.token().0).collect();
            for at in ready {
                self.read(at, &mut outcome)?;
            }
        }
        outcome.seconds = begin.elapsed().as_secs_f64();
        Ok(outcome)
    }

    fn read(&mut self, at: usize, outcome: &mut Outcome) -> io::Result<()> {
        let talk = &mut self.talks[at];
        match talk.stream.read(&mut self.buffer) {
            Ok(0) => return self.fail(at, outcome),
            Ok(count) => talk.got += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(_) => return self.fail(at, outcome),
        }
        if talk.got < self.dialogue.answer_bytes {
            return Ok(());
        }
        let now = Instant::now();
        let micros = now.duration_since(talk.asked).as_micros() as u64;
        outcome.latencies.saturating_record(micros.max(1));
        outcome.done += 1;
        if self.dialogue.reconnects {
            // The old one is closed by this, after the new one is open.
            self.talks[at] = self.ask_anew(at)?;
        } else {
            self.resting.push_back(at);
            let next = self.resting.pop_front().expect("just put there");
            let talk = &mut self.talks[next];
            (talk.asked, talk.got) = (now, 0);
            talk.stream.write_all(&self.dialogue.question)?;
        }
        Ok(())
    }

    fn fail(&mut self, at: usize, outcome: &mut Outcome) -> io::Result<()> {
        outcome.failures += 1;
        if outcome.failures > 1_000 {
            return Err(io::Error::other("connections break, one after the other"));
        }
        self.talks[at] = self.ask_anew(at)?;
        Ok(())
    }
}

/// Asks once and answers how many bytes came within a moment: the length of
/// an answer that is always the same.
pub fn answer_bytes(target: SocketAddr, question: &[u8]) -> io::Result<usize> {
    let mut stream = TcpStream::connect(target)?;
    stream.write_all(question)?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (mut sum, mut buffer) = (0, [0; 4096]);
    while let Ok(count) = stream.read(&mut buffer) {
        sum += count;
        if count == 0 {
            break;
        }
    }
    Ok(sum)
}

/// Connections that only read; what they read is thrown away in the kernel, so
/// that the client costs little.
pub struct Drains {
    streams: Vec<TcpStream>,
    poll: Poll,
    events: Events,
    busy: Vec<usize>,
    buffer: Vec<u8>,
}

impl Drains {
    /// Connects so many.
    pub fn begin(target: SocketAddr, count: usize) -> io::Result<Drains> {
        let poll = Poll::new()?;
        let mut streams = Vec::new();
        for at in 0..count {
            let stream = TcpStream::connect(target)?;
            stream.set_nonblocking(true)?;
            let fd = stream.as_raw_fd();
            poll.registry().register(&mut SourceFd(&fd), Token(at), Interest::READABLE)?;
            streams.push(stream);
        }
        let (events, busy) = (Events::with_capacity(64), (0..count).collect());
        Ok(Drains { streams, poll, events, busy, buffer: vec![0; 1 << 20] })
    }

    /// Reads for so long; `done` is bytes.
    pub fn run(&mut self, time: Duration) -> io::Result<Outcome> {
        let mut outcome = Outcome::new();
        let begin = Instant::now();
        while begin.elapsed() < time {
            let timeout = if self.busy.is_empty() { Duration::from_secs(2) } else { Duration::ZERO };
            match self.poll.poll(&mut self.events, Some(timeout)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            let mut ready = std::mem::take(&mut self.busy);
            for at in self.events.iter().map(|event| event.token().0) {
                if !ready.contains(&at) {
                    ready.push(at);
                }
            }
            if ready.is_empty() {
                return Err(io::Error::other("no byte for two seconds"));
            }
            for at in ready {
                outcome.done += self.drain(at)?;
            }
        }
        outcome.seconds = begin.elapsed().as_secs_f64();
        Ok(outcome)
    }

    fn drain(&mut self, at: usize) -> io::Result<u64> {
        let fd = self.streams[at].as_raw_fd();
        let mut sum = 0;
        for _ in 0..8 {
            // With MSG_TRUNC, TCP drops the bytes instead of copying them.
            match nix::sys::socket::recv(fd, &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Ok(0) => return Err(io::Error::other("the source ended")),
                Ok(count) => sum += count as u64,
                Err(nix::errno::Errno::EAGAIN) => return Ok(sum),
                Err(errno) => return Err(errno.into()),
            }
        }
        self.busy.push(at);
        Ok(sum)
    }
}
