//! One thread of the load generator: a mio loop over its part of the
//! connections.
//!
//!   Warmup --over--> Measure --time or work is over--> After --nothing under way--> done
//!
//! Owned by its thread; shares with the others only the plan, the noise and
//! two flags. Bounded by its part of the concurrency: a place is a connection
//! or empty. Reports to the collector a few times a second and at its end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::args::{Direction, Pattern, Transport};
use super::arrivals::Arrivals;
use super::client::Client;
use super::flow::Flow;
use super::message::{Ending, Interval, Message, Phase, REPORT_EVERY, Shared};
use super::pattern::LONGEST;
use super::session::{Desk, Session, Step};
use super::sockets::{self, Sources};
use super::tally::{Tally, Trouble, nanos};
use crate::ports::Ports;

/// A place whose connection failed rests for so long in a closed loop, so that
/// a dead target is not hammered.
const REST: Duration = Duration::from_millis(10);

/// Connects under way in one thread for patterns that keep connections.
const DIALS_UNDER_WAY: usize = 128;

/// The poll's token of the timer of an open loop.
const TIMER: Token = Token(usize::MAX);

struct Place {
    client: Option<Client>,
    /// In `ready` already.
    listed: bool,
}

/// One thread's loop.
pub struct Engine {
    shared: Arc<Shared>,
    sender: Sender<Message>,
    poll: Poll,
    timer: Option<TimerFd>,
    places: Vec<Place>,
    free: Vec<usize>,
    /// Open places that may have room, for an open loop.
    ready: VecDeque<usize>,
    resting: VecDeque<(Instant, usize)>,
    dialling: usize,
    open: usize,
    connections_left: Option<u64>,
    requests_left: Option<u64>,
    per_connection: Option<u64>,
    arrivals: Option<Arrivals>,
    /// Due starts are waiting for a free connection.
    held_up: bool,
    phase: Phase,
    sources: Sources,
    ports: Ports,
    scratch: Vec<u8>,
    tally: Box<Tally>,
    number: u64,
    reported: Instant,
    now: Instant,
    ending: Ending,
}

impl Engine {
    /// The engine of thread `index`.
    pub fn new(shared: Arc<Shared>, sender: Sender<Message>, index: usize) -> io::Result<Engine> {
        let plan = &shared.plan;
        let poll = Poll::new()?;
        let mut timer = None;
        let arrivals =
            plan.rate.map(|rate| Arrivals::new(plan.arrivals, rate, index, plan.threads, plan.seed));
        if arrivals.is_some() {
            // epoll counts in milliseconds; an open loop wants to be finer.
            let fd =
                TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
            poll.registry().register(&mut SourceFd(&fd.as_fd().as_raw_fd()), TIMER, Interest::READABLE)?;
            timer = Some(fd);
        }
        let place_count = plan.part(plan.concurrency, index) as usize;
        let now = shared.began;
        Ok(Engine {
            sender,
            poll,
            timer,
            places: (0..place_count).map(|_| Place { client: None, listed: false }).collect(),
            free: (0..place_count).rev().collect(),
            ready: VecDeque::new(),
            resting: VecDeque::new(),
            dialling: 0,
            open: 0,
            connections_left: plan.connections.map(|total| plan.part(total, index)),
            requests_left: plan.part_of_requests(index),
            per_connection: plan.per_connection(index),
            arrivals,
            held_up: false,
            phase: Phase::Warmup,
            sources: Sources::new(&plan.sources, plan.target.ip(), index),
            ports: Ports::of_host(),
            scratch: vec![0; LONGEST],
            tally: Box::default(),
            number: (index as u64) << 32,
            reported: now,
            now,
            ending: Ending {
                busy: 0.0,
                last_answer: None,
                not_started: 0,
                waited: 0,
                addresses: 1,
                gave_up: false,
                interrupted: false,
            },
            shared,
        })
    }

    /// Runs to the end, and tells the collector. Errors are those of the poll itself.
    pub fn run(mut self) -> io::Result<()> {
        let (cpu_before, began) = (thread_cpu(), Instant::now());
        let outcome = self.turn(began);
        self.report();
        let wall = began.elapsed().as_secs_f64().max(1e-9);
        self.ending.busy = (thread_cpu() - cpu_before).as_secs_f64() / wall;
        self.ending.addresses = self.sources.used();
        let _ = self.sender.send(Message::Done(self.ending));
        outcome
    }

    fn turn(&mut self, began: Instant) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut next_report = began + REPORT_EVERY;
        let sweep_every =
            (self.shared.plan.timeout / 8).clamp(Duration::from_millis(2), Duration::from_millis(100));
        let mut next_sweep = began + sweep_every;
        loop {
            self.now = Instant::now();
            self.change_phase();
            if self.now >= next_sweep {
                self.sweep();
                next_sweep = self.now + sweep_every;
            }
            if self.now >= next_report {
                self.report();
                next_report = self.now + REPORT_EVERY;
            }
            self.start_what_is_due();
            if self.is_over() {
                break;
            }
            self.arm_timer();
            let wake = self.wake_at(next_report.min(next_sweep));
            match self.poll.poll(&mut events, Some(wake.saturating_duration_since(Instant::now()))) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                outcome => outcome?,
            }
            self.now = Instant::now();
            for event in &events {
                if event.token() != TIMER {
                    let end = event.is_read_closed() || event.is_error();
                    self.handle_event(event.token().0, event.is_readable(), event.is_writable(), end);
                }
            }
        }
        Ok(())
    }

    fn change_phase(&mut self) {
        let plan = &self.shared.plan;
        let measure_from = self.shared.began + plan.warmup;
        if self.phase == Phase::Warmup && self.now >= measure_from {
            self.report();
            self.phase = Phase::Measure;
        }
        let plan = &self.shared.plan;
        let stop_at = plan.duration.map(|duration| measure_from + duration);
        // A target that never answers is given up once that is clear.
        let patience = plan.timeout + Duration::from_secs(1);
        let hopeless =
            !self.shared.answered.load(Ordering::Relaxed) && self.now > self.shared.began + patience;
        let interrupted = self.shared.interrupted.load(Ordering::Relaxed);
        let over = hopeless || interrupted || stop_at.is_some_and(|stop| self.now >= stop);
        if self.phase != Phase::After && over {
            self.report();
            self.ending.gave_up = hopeless;
            self.ending.interrupted = interrupted;
            self.phase = Phase::After;
            if let (Some(arrivals), Some(stop), None) =
                (&self.arrivals, stop_at.filter(|_| !interrupted), self.requests_left)
            {
                self.ending.not_started = arrivals.clone().count_before(stop - self.shared.began);
            }
        }
        if !self.has_work() {
            self.close_idle();
        }
    }

    /// Whether anything new may still be started.
    fn has_work(&self) -> bool {
        self.phase != Phase::After && self.requests_left != Some(0)
    }

    fn is_over(&self) -> bool {
        let no_more = !self.has_work() || self.connections_left == Some(0);
        no_more && self.open == 0
    }

    fn close_idle(&mut self) {
        let down = self.shared.plan.direction == Direction::Down;
        for at in 0..self.places.len() {
            if self.places[at].client.as_ref().is_some_and(|client| down || client.is_idle()) {
                self.close(at);
            }
        }
    }

    fn start_what_is_due(&mut self) {
        while self.resting.front().is_some_and(|(until, _)| *until <= self.now) {
            let (_, at) = self.resting.pop_front().expect("the front was seen");
            self.free.push(at);
        }
        let dials_are_starts = self.shared.plan.pattern == Pattern::Connect;
        if !(dials_are_starts && self.arrivals.is_some()) {
            let most = if dials_are_starts { usize::MAX } else { DIALS_UNDER_WAY };
            while self.may_dial() && self.dialling < most {
                let at = self.free.pop().expect("may_dial saw a free place");
                self.dial(at, None);
            }
        }
        if self.arrivals.is_some() {
            self.start_arrivals(dials_are_starts);
        }
    }

    fn may_dial(&self) -> bool {
        self.has_work() && self.connections_left != Some(0) && !self.free.is_empty()
    }

    /// Makes the starts of an open loop that are due.
    fn start_arrivals(&mut self, dials_are_starts: bool) {
        while self.has_work() {
            let arrivals = self.arrivals.as_ref().expect("only called for an open loop");
            let due = self.shared.began + arrivals.due();
            if due > self.now {
                self.held_up = false;
                return;
            }
            let place = if dials_are_starts {
                if self.connections_left == Some(0) {
                    return;
                }
                self.free.pop()
            } else {
                self.next_ready()
            };
            let Some(at) = place else {
                self.held_up = true;
                return;
            };
            if self.held_up {
                self.ending.waited += 1;
            } else {
                self.now = Instant::now();
                self.tally.late.saturating_record(nanos(self.now.saturating_duration_since(due)));
            }
            self.arrivals.as_mut().expect("seen above").advance();
            if dials_are_starts {
                self.dial(at, Some(due));
            } else {
                self.take_request();
                self.start_on(at, due);
            }
        }
    }

    /// An open connection with room.
    fn next_ready(&mut self) -> Option<usize> {
        while let Some(at) = self.ready.pop_front() {
            self.places[at].listed = false;
            if self.has_room(at) {
                return Some(at);
            }
        }
        None
    }

    fn has_room(&self, at: usize) -> bool {
        self.places[at].client.as_ref().is_some_and(|client| client.has_room(&self.shared.plan))
    }

    fn take_request(&mut self) -> bool {
        match &mut self.requests_left {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }

    /// Opens a connection at a free place. `due` is its intended start.
    fn dial(&mut self, at: usize, due: Option<Instant>) {
        self.connections_left = self.connections_left.map(|left| left - 1);
        self.number += 1;
        let dialled = Instant::now();
        self.now = dialled;
        let client = match self.open_client(at, dialled) {
            Ok(client) => client,
            Err(error) => {
                // The exchange that it was for is lost with it.
                if self.shared.plan.pattern == Pattern::Connect {
                    self.take_request();
                }
                self.tally.count_mishap(dialled, error.into());
                return self.give_back(at, true);
            }
        };
        self.open += 1;
        self.dialling += usize::from(matches!(client, Client::Tcp(_)));
        self.places[at].client = Some(client);
        if self.shared.plan.pattern == Pattern::Connect {
            if self.take_request() {
                self.start_on(at, due.unwrap_or(dialled));
            } else {
                self.close(at);
            }
        } else if self.arrivals.is_none() {
            self.fill(at);
        } else {
            self.list(at);
        }
    }

    fn open_client(&mut self, at: usize, dialled: Instant) -> io::Result<Client> {
        let shared = Arc::clone(&self.shared);
        let plan = &shared.plan;
        let nodelay = plan.pattern != Pattern::Connect || plan.size > 1024;
        let mut tried = 0;
        loop {
            let source = self.sources.pick();
            let dial = |window| sockets::dial_tcp(plan.target, source, window, nodelay);
            let opened = match plan.transport {
                Transport::Tcp => self.ports.connect(dial).and_then(|mut stream| {
                    let both = Interest::READABLE | Interest::WRITABLE;
                    self.poll.registry().register(&mut stream, Token(at), both)?;
                    let mut session = Session::new(stream, dialled, self.number, self.per_connection, plan);
                    if plan.direction == Direction::Down {
                        session.start_down(plan);
                    }
                    Ok(Client::Tcp(session))
                }),
                Transport::Udp => sockets::open_udp(plan.target, source).and_then(|mut socket| {
                    let both = Interest::READABLE | Interest::WRITABLE;
                    self.poll.registry().register(&mut socket, Token(at), both)?;
                    self.tally.connections += 1;
                    self.tally.connections_measured += 1;
                    Ok(Client::Udp(Flow::new(socket, self.number, self.per_connection, plan)))
                }),
            };
            match opened {
                Err(error) if Trouble::of(&error) == Trouble::NoPort && self.sources.exhaust(tried) => {
                    tried += 1
                }
                outcome => return outcome,
            }
        }
    }

    /// Starts as many exchanges as a closed loop has room and work for.
    fn fill(&mut self, at: usize) {
        // Datagrams go out one by one, each with its own start.
        let one_by_one = self.shared.plan.transport == Transport::Udp;
        while self.has_work() && self.may_start(at) && self.take_request() {
            self.start_at(at, self.now);
            if one_by_one {
                self.with_client(at, Client::flush);
            }
        }
        self.with_client(at, Client::flush);
    }

    fn may_start(&self, at: usize) -> bool {
        self.places[at].client.as_ref().is_some_and(|client| client.may_start(&self.shared.plan))
    }

    fn start_at(&mut self, at: usize, due: Instant) {
        if let Some(client) = self.places[at].client.as_mut() {
            client.start(due, self.now, &self.shared.plan);
        }
    }

    /// Starts one exchange, meant to start at `due`.
    fn start_on(&mut self, at: usize, due: Instant) {
        self.start_at(at, due);
        self.with_client(at, Client::flush);
        self.list(at);
    }

    fn list(&mut self, at: usize) {
        if self.arrivals.is_some() && !self.places[at].listed && self.has_room(at) {
            self.places[at].listed = true;
            self.ready.push_back(at);
        }
    }

    fn handle_event(&mut self, at: usize, readable: bool, writable: bool, end: bool) {
        // An event of a connection that this place has had before finds
        // nothing, or a socket that would block.
        if self.places.get(at).is_none_or(|place| place.client.is_none()) {
            return;
        }
        let before = self.tally.requests;
        if writable {
            self.with_client(at, Client::handle_writable);
        }
        if readable || end {
            self.with_client(at, |client, desk| client.handle_readable(desk, end));
        }
        self.go_on(at);
        if self.tally.requests > before {
            self.ending.last_answer = Some(self.now);
            if !self.shared.answered.load(Ordering::Relaxed) {
                self.shared.answered.store(true, Ordering::Relaxed);
            }
        }
    }

    /// After whatever happened to a connection: its next exchange, or its end.
    fn go_on(&mut self, at: usize) {
        let Some(client) = &self.places[at].client else {
            return;
        };
        if client.is_finished() || (!self.has_work() && client.is_idle()) {
            self.close(at);
        } else if self.arrivals.is_none() {
            self.fill(at);
        } else {
            self.list(at);
        }
    }

    /// Lends the desk to a connection and acts on what became of it.
    fn with_client(&mut self, at: usize, act: impl FnOnce(&mut Client, &mut Desk) -> Step) {
        let Some(client) = self.places[at].client.as_mut() else {
            return;
        };
        let mut desk = Desk {
            plan: &self.shared.plan,
            noise: &self.shared.noise,
            tally: &mut self.tally,
            scratch: &mut self.scratch,
            now: self.now,
        };
        let was_dialling = client.is_dialling();
        let step = act(client, &mut desk);
        self.now = desk.now;
        if was_dialling && !client.is_dialling() {
            self.dialling -= 1;
        }
        match step {
            Step::Open => {}
            Step::Ended => self.close(at),
            Step::Failed(mishap) => {
                self.tally.count_mishap(self.now, mishap);
                self.drop_client(at);
                self.give_back(at, true);
            }
        }
    }

    fn close(&mut self, at: usize) {
        self.drop_client(at);
        self.give_back(at, false);
    }

    fn drop_client(&mut self, at: usize) {
        if let Some(client) = self.places[at].client.take() {
            self.dialling -= usize::from(client.is_dialling());
            self.open -= 1;
        }
    }

    /// The place is free again: at once, or after a rest where a closed loop
    /// met trouble.
    fn give_back(&mut self, at: usize, trouble: bool) {
        if trouble && self.arrivals.is_none() {
            self.resting.push_back((self.now + REST, at));
        } else {
            self.free.push(at);
        }
    }

    /// Ends what has waited too long.
    fn sweep(&mut self) {
        for at in 0..self.places.len() {
            let mut made_room = false;
            self.with_client(at, |client, desk| {
                let (step, room) = client.expire(desk);
                made_room = room;
                step
            });
            if made_room {
                self.go_on(at);
            }
        }
    }

    fn report(&mut self) {
        let (from, to) = (self.reported, Instant::now());
        self.reported = to;
        let tally = std::mem::take(&mut self.tally);
        // A collector that is gone has nobody to tell; the run then ends by itself.
        let _ = self.sender.send(Message::Interval(Interval { phase: self.phase, from, to, tally }));
    }

    fn wake_at(&self, latest: Instant) -> Instant {
        let plan = &self.shared.plan;
        let stop = plan.duration.map(|duration| self.shared.began + plan.warmup + duration);
        let stop = stop.filter(|_| self.phase != Phase::After);
        let rest = self.resting.front().map(|(until, _)| *until);
        [stop, rest].into_iter().flatten().fold(latest, Instant::min)
    }

    fn arm_timer(&self) {
        let (Some(timer), Some(arrivals)) = (&self.timer, &self.arrivals) else {
            return;
        };
        let no_dial = self.shared.plan.pattern == Pattern::Connect && self.connections_left == Some(0);
        if self.held_up || no_dial || !self.has_work() {
            return;
        }
        let due = self.shared.began + arrivals.due();
        let gap = due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        // Failing to set it costs only accuracy: the poll has its own timeout.
        let _ = timer.set(Expiration::OneShot(TimeSpec::from_duration(gap)), TimerSetTimeFlags::empty());
    }
}

/// CPU time of this thread.
fn thread_cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(Duration::ZERO, Duration::from)
}
