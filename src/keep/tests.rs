//! A worker that is killed at every step of what it does: each store, and
//! before and after each system call. Two model sockets count as the kernel
//! does; what the model's peers get at the end has to be what was sent.

use std::os::fd::{AsFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use proptest::prelude::*;

use super::model::*;
use super::*;
use crate::config::Service;
use crate::handover::{Record, Stage};
use crate::relay::{Drive, End, Lent, Pipes, Readiness, Session, Side};

/// How the modelled worker is set up.
#[derive(Clone, Copy, Debug)]
struct Setup {
    header: bool,
    preface: bool,
    is_unix: bool,
    service: Option<Service>,
}

/// A worker with one session, in the order of stores of `worker::sessions`.
struct Worker {
    keep: Keep,
    pipes: Pipes<FakePipe>,
    session: Session,
    stage: At,
    setup: Setup,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Accepted { header_read: bool },
    Connect,
    Connecting,
    Open,
    Gone(CloseReason),
}

impl Worker {
    fn born(setup: Setup) -> Worker {
        let keep = Keep::create(5).expect("memory");
        let stage = At::Accepted { header_read: false };
        Worker { keep, pipes: pipes(), session: Session::of_service(setup.service), stage, setup }
    }

    fn accept(&mut self) {
        let slot =
            Slot { state: State::Accepted, client: Some(CLIENT), listener: 7, born: 5, ..Slot::default() };
        self.keep.begin(SESSION, &slot);
    }

    /// Takes over what another left.
    fn take(setup: Setup, record: &Record, kept: &[u8], server: Option<RawFd>, client: &Socket) -> Worker {
        let mut worker = Worker::born(setup);
        let (state, stage) = match record.stage {
            Stage::Accepted { header_read, .. } => (State::Accepted, At::Accepted { header_read }),
            Stage::Header { .. } => (State::Header, At::Accepted { header_read: false }),
            Stage::Connecting { .. } if server.is_some() => (State::Connecting, At::Connecting),
            Stage::Connecting { .. } => (State::Connecting, At::Connect),
            Stage::Open => (State::Open, At::Open),
        };
        worker.stage = stage;
        worker.session = Session::restore(&record.relay).expect("a possible state");
        let slot = Slot {
            state,
            client: Some(CLIENT),
            server,
            is_unix: setup.is_unix,
            finished: record.relay.finished(),
            is_arriving: true,
            header: client.consumed.saturating_sub(record.relay.received()) as u16,
            preface: record.relay.preface() as u16,
            ..Slot::default()
        };
        worker.keep.begin(SESSION, &slot);
        assert!(worker.session.take_kept(&record.relay, kept, &mut worker.keep, SESSION));
        worker.keep.settle(SESSION);
        let all = Readiness { readable: true, writable: true, probe: true };
        worker.session.handle_ready(Side::Client, all);
        worker.session.handle_ready(Side::Server, all);
        worker
    }

    /// Goes on until nothing moves.
    fn turn(&mut self, sockets: &[Shared<Socket>; 2], budget: usize) {
        if let At::Accepted { header_read } = self.stage {
            if self.setup.header && !header_read && !self.read_header(&sockets[0]) {
                return;
            }
            self.stage = At::Connect;
        }
        let ends = [Fake(Rc::clone(&sockets[0])), Fake(Rc::clone(&sockets[1]))];
        if self.stage == At::Connect {
            match self.setup.service {
                Some(_) => {
                    let greeting = if self.setup.preface { PREFACE } else { b"" };
                    self.session.greet(greeting, &mut self.keep, SESSION);
                    self.keep.stand(SESSION, State::Open, 9);
                    self.stage = At::Open;
                }
                None => self.connect(&sockets[1]),
            }
        }
        if self.stage == At::Connecting {
            self.session.handle_ready(Side::Server, Readiness { writable: true, ..Readiness::default() });
            if self.setup.preface {
                self.session.introduce(PREFACE, &ends[0], &mut self.keep, SESSION);
            }
            self.keep.stand(SESSION, State::Open, 9);
            self.stage = At::Open;
        }
        let server = if self.setup.service.is_some() { &ends[0] } else { &ends[1] };
        while self.stage == At::Open {
            let mut lent = Lent { keep: &mut self.keep, pipes: &mut self.pipes, session: SESSION, now: 0 };
            match self.session.drive([&ends[0], server], &mut lent, budget) {
                Drive::Idle => break,
                Drive::Again => self.keep.moved(SESSION, 10),
                Drive::Done(reason) => self.close(reason, sockets),
            }
        }
    }

    fn read_header(&mut self, client: &Shared<Socket>) -> bool {
        self.keep.stand(SESSION, State::Header, 77);
        if client.borrow().unread.len() < HEADER.len() {
            return false;
        }
        self.keep.header(SESSION, HEADER.len(), None);
        let mut header = [0; HEADER.len()];
        Fake(Rc::clone(client)).receive(&mut header).expect("looked at");
        assert_eq!(header, HEADER);
        true
    }

    fn connect(&mut self, server: &Shared<Socket>) {
        self.keep.stand(SESSION, State::Connecting, 88);
        step();
        let mut socket = server.borrow_mut();
        (socket.is_closed, socket.connected_by_us, socket.is_unix) = (false, true, self.setup.is_unix);
        drop(socket);
        step();
        self.keep.connect(SESSION, 1, SERVER, self.setup.is_unix);
        self.stage = At::Connecting;
    }

    fn close(&mut self, reason: CloseReason, sockets: &[Shared<Socket>; 2]) {
        self.keep.close(SESSION, reason);
        let mut lent = Lent { keep: &mut self.keep, pipes: &mut self.pipes, session: SESSION, now: 0 };
        self.session.abandon(&mut lent);
        for socket in sockets {
            step();
            socket.borrow_mut().is_closed = true;
        }
        step();
        self.keep.free(SESSION);
        self.stage = At::Gone(reason);
    }

    fn take_pipe_away(&mut self) {
        let mut lent = Lent { keep: &mut self.keep, pipes: &mut self.pipes, session: SESSION, now: 0 };
        self.session.unpipe_all(&mut lent);
    }
}

/// One event of the world around the worker.
#[derive(Clone, Debug)]
enum Event {
    Push(Side, usize),
    Room(Side, usize),
    Finish(Side),
    Reset(Side),
    Turn(usize),
    TakePipeAway,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let side = prop_oneof![Just(Side::Client), Just(Side::Server)];
    let event = prop_oneof![
        4 => (side.clone(), 1usize..200).prop_map(|(side, n)| Event::Push(side, n)),
        3 => (side.clone(), 100_000usize..300_000).prop_map(|(side, n)| Event::Push(side, n)),
        4 => (side.clone(), 1usize..300).prop_map(|(side, n)| Event::Room(side, n)),
        3 => (side.clone(), 10_000usize..500_000).prop_map(|(side, n)| Event::Room(side, n)),
        1 => side.clone().prop_map(Event::Finish),
        7 => (1usize..300_000).prop_map(Event::Turn),
        1 => Just(Event::TakePipeAway),
    ];
    prop::collection::vec(event, 1..40)
}

fn setups() -> impl Strategy<Value = Setup> {
    let service =
        prop_oneof![6 => Just(None), 1 => Just(Some(Service::Identify)), 1 => Just(Some(Service::Discard))];
    (any::<bool>(), any::<bool>(), prop::bool::weighted(0.2), service).prop_map(
        |(header, preface, is_unix, service)| Setup {
            header,
            preface: preface && service != Some(Service::Discard),
            is_unix: is_unix && service.is_none(),
            service,
        },
    )
}

/// What came of a schedule.
#[derive(Debug)]
struct Outcome {
    sent: [Vec<u8>; 2],
    taken: [Vec<u8>; 2],
    was_reset: bool,
    end: Option<CloseReason>,
    kills: usize,
    held: usize,
}

/// Bytes that tell where they are.
fn pattern(from: usize, count: usize, side: Side) -> Vec<u8> {
    const CYCLE: usize = 1 << 16;
    thread_local! {
        static TWICE: Vec<u8> = (0..2 * CYCLE).map(|i| i % CYCLE).map(|i| (i * 7 + i / 251) as u8).collect();
    }
    let mut bytes = Vec::with_capacity(count + CYCLE);
    while bytes.len() < count {
        let at = (from + bytes.len() + 30_011 * side as usize) % CYCLE;
        TWICE.with(|twice| bytes.extend_from_slice(&twice[at..at + CYCLE]));
    }
    bytes.truncate(count);
    bytes
}

/// Lets a worker live through the events, killed after so many steps each
/// time, and another take over.
fn live(setup: Setup, events: &[Event], fuses: &[u32]) -> Outcome {
    SERVICE.set(setup.service);
    FUSE.set(None);
    PIPE_BYTES.with_borrow(|bytes| bytes.borrow_mut().clear());
    let sockets: [Shared<Socket>; 2] = Default::default();
    sockets[1].borrow_mut().is_closed = true;
    let mut sent: [Vec<u8>; 2] = Default::default();
    if setup.header {
        sockets[0].borrow_mut().unread.extend(HEADER);
    }
    let mut fuses = fuses.iter().copied();
    let mut worker = Worker::born(setup);
    worker.accept();
    let (mut kills, mut held) = (0, 0);
    let mut end = None;
    FUSE.set(fuses.next());
    let mut tail = vec![Event::Finish(Side::Client), Event::Finish(Side::Server)];
    for _ in 0..4 {
        tail.push(Event::Room(Side::Client, 100_000_000));
        tail.push(Event::Room(Side::Server, 100_000_000));
        tail.push(Event::Turn(usize::MAX));
    }
    for event in events.iter().chain(&tail) {
        let is_turn = matches!(event, Event::Turn(_) | Event::TakePipeAway);
        let ready = |readable, writable, probe| Readiness { readable, writable, probe };
        match *event {
            Event::Push(side, count) => {
                let mut socket = sockets[side as usize].borrow_mut();
                if !socket.has_peers_fin && !socket.is_reset {
                    let bytes = pattern(sent[side as usize].len(), count, side);
                    socket.unread.extend(&bytes);
                    sent[side as usize].extend(bytes);
                    worker.session.handle_ready(side, ready(true, false, false));
                }
            }
            Event::Room(side, count) => {
                sockets[side as usize].borrow_mut().room += count;
                worker.session.handle_ready(side, ready(false, true, false));
            }
            Event::Finish(side) => {
                sockets[side as usize].borrow_mut().has_peers_fin = true;
                worker.session.handle_ready(side, ready(true, false, true));
            }
            Event::Reset(side) => {
                let mut socket = sockets[side as usize].borrow_mut();
                (socket.is_reset, socket.has_error) = (true, true);
                worker.session.handle_ready(side, ready(true, false, true));
            }
            Event::Turn(_) | Event::TakePipeAway => {}
        }
        while is_turn && end.is_none() {
            let result = catch_unwind(AssertUnwindSafe(|| match event {
                Event::TakePipeAway => worker.take_pipe_away(),
                Event::Turn(budget) => worker.turn(&sockets, *budget),
                _ => unreachable!("looked at above"),
            }));
            match result {
                Ok(()) => break,
                Err(kill) if kill.is::<Kill>() => kills += 1,
                Err(panic) => resume_unwind(panic),
            }
            let fd = worker.keep.as_fd().try_clone_to_owned().expect("a descriptor");
            let remains = Remains::open(fd).expect("ours");
            let model = Model(&sockets);
            let mut heirs: Vec<Heir> = remains.inherit(&model, &model).collect();
            let Some(heir) = heirs.pop() else {
                // Killed after the slot was free.
                end = Some(CloseReason::Finished);
                break;
            };
            assert!(heirs.is_empty() && heir.session == SESSION);
            match heir.fate {
                Fate::Send { record, kept, sockets: fds, .. } => {
                    held += kept.len();
                    let server = fds.get(1).copied();
                    let client = sockets[0].borrow();
                    worker = Worker::take(setup, &record, &kept, server, &client);
                    PIPE_BYTES.with_borrow(|bytes| bytes.borrow_mut().clear());
                    drop(client);
                }
                Fate::Close { reset, owed, reason, is_disagreement, .. } => {
                    assert!(!is_disagreement, "{:?}", remains.slot(SESSION));
                    assert_eq!(reset, reason != CloseReason::Finished);
                    if let Some((fd, bytes)) = owed {
                        sockets[(fd - CLIENT) as usize].borrow_mut().taken.extend(bytes);
                    }
                    end = Some(reason);
                }
            }
            FUSE.set(fuses.next());
        }
        if let At::Gone(reason) = worker.stage {
            end.get_or_insert(reason);
        }
    }
    FUSE.set(None);
    let taken = [0, 1].map(|side| sockets[side].borrow().taken.clone());
    let was_reset = sockets.iter().any(|socket| socket.borrow().is_reset);
    Outcome { sent, taken, was_reset, end, kills, held }
}

/// What each side is to get.
fn owed(setup: Setup, sent: &[Vec<u8>; 2]) -> [Vec<u8>; 2] {
    let mut to_server = if setup.preface { PREFACE.to_vec() } else { Vec::new() };
    to_server.extend(&sent[0]);
    match setup.service {
        None => [sent[1].clone(), to_server],
        Some(Service::Discard) => Default::default(),
        Some(Service::Echo | Service::Identify) => [to_server, Vec::new()],
    }
}

fn check(setup: Setup, outcome: &Outcome) {
    let owed = owed(setup, &outcome.sent);
    for (owed, taken) in owed.iter().zip(&outcome.taken) {
        assert!(owed.starts_with(taken), "a byte was changed, repeated or left out");
    }
    match outcome.end {
        Some(CloseReason::Finished) => {
            assert_eq!(owed.each_ref().map(Vec::len), outcome.taken.each_ref().map(Vec::len), "lost");
        }
        Some(CloseReason::ClientReset | CloseReason::ServerReset) => assert!(outcome.was_reset),
        // A kill in the middle of a call for a server that nobody counts for.
        Some(CloseReason::WorkerLost) => assert!(setup.is_unix),
        other => panic!("{other:?}"),
    }
}

/// `EVENKEEL_SOAK` times as many cases as usual.
fn cases(usual: u32) -> ProptestConfig {
    let soak = std::env::var("EVENKEEL_SOAK").ok().and_then(|n| n.parse().ok());
    ProptestConfig { cases: usual * soak.unwrap_or(1u32), ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(100))]

    /// Wherever the worker is killed, how often it may be: both sides get what
    /// the other sent, and the end of it.
    #[test]
    fn no_kill_changes_what_arrives(
        setup in setups(),
        events in events(),
        fuses in prop::collection::vec(0u32..60, 0..12),
    ) {
        let outcome = live(setup, &events, &fuses);
        check(setup, &outcome);
    }

    /// A side that resets in between loses what it is owed, and nobody takes
    /// the end for a whole stream.
    #[test]
    fn no_kill_makes_a_reset_look_like_an_end(
        setup in setups(),
        mut events in events(),
        resets in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..3),
        fuses in prop::collection::vec(0u32..60, 0..12),
    ) {
        for (at, is_client) in resets {
            let side = if is_client || setup.service.is_some() { Side::Client } else { Side::Server };
            events.insert(at.index(events.len()), Event::Reset(side));
        }
        let outcome = live(setup, &events, &fuses);
        check(setup, &outcome);
    }
}

const PLAIN: Setup = Setup { header: true, preface: true, is_unix: false, service: None };

/// A session of every kind of step: small and large, blocked, through a pipe,
/// out of it again, half-closed.
fn long_life() -> Vec<Event> {
    let mut events = vec![Event::Push(Side::Client, 100), Event::Turn(1 << 20)];
    for (push, room) in [(500, 50), (100, 700), (280_000, 270_000), (60_000, 50_000), (40_000, 30_000)] {
        for side in [Side::Client, Side::Server] {
            events.extend([Event::Push(side, push), Event::Room(side.other(), room), Event::Turn(1 << 20)]);
        }
    }
    events.extend([Event::TakePipeAway, Event::Room(Side::Server, 200_000), Event::Turn(1 << 20)]);
    events.extend([Event::Finish(Side::Client), Event::Room(Side::Server, 5_000_000), Event::Turn(1 << 20)]);
    events
}

#[test]
fn a_kill_at_each_single_step_of_a_long_life_changes_nothing() {
    let events = long_life();
    let (mut kills, mut held, mut uncertain) = (0, 0, 0);
    for setup in [PLAIN, Setup { is_unix: true, ..PLAIN }] {
        for fuse in 0.. {
            let outcome = live(setup, &events, &[fuse]);
            check(setup, &outcome);
            kills += outcome.kills;
            held += usize::from(outcome.held > 0);
            uncertain += usize::from(outcome.end == Some(CloseReason::WorkerLost));
            if outcome.kills == 0 {
                break;
            }
        }
    }
    assert!(kills > 300 && held > 100, "the life is a poor one: {kills} kills, {held} with bytes held");
    // Only within calls, and never where the kernel counts.
    assert!(uncertain * 4 < kills, "{uncertain} of {kills}");
}

/// What a worker leaves that is killed while bytes are held both ways.
fn remains_with_bytes(fuse: u32) -> Option<(Worker, [Shared<Socket>; 2])> {
    SERVICE.set(None);
    PIPE_BYTES.with_borrow(|bytes| bytes.borrow_mut().clear());
    let sockets: [Shared<Socket>; 2] = Default::default();
    sockets[0].borrow_mut().unread.extend(HEADER);
    let mut worker = Worker::born(PLAIN);
    worker.accept();
    for (side, socket) in [Side::Client, Side::Server].into_iter().zip(&sockets) {
        socket.borrow_mut().unread.extend(pattern(0, 5_000, side));
        socket.borrow_mut().room = 1_000;
        worker.session.handle_ready(side, Readiness { readable: true, writable: true, probe: false });
    }
    FUSE.set(Some(fuse));
    let result = catch_unwind(AssertUnwindSafe(|| worker.turn(&sockets, 1 << 20)));
    FUSE.set(None);
    result.err().map(|_| (worker, sockets))
}

proptest! {
    #![proptest_config(cases(300))]

    /// Whatever a dying worker did to its slot and its claims: no byte is sent
    /// on that is not owed, and no panic keeps the others from being saved.
    #[test]
    fn the_check_finds_what_a_dying_worker_has_spoilt(
        fuse in 12u32..50,
        word in 0usize..8,
        bit in 0u32..64,
    ) {
        // Nothing else says how long the header and the preface were.
        if word == 3 && bit >= 40 {
            return Ok(());
        }
        let Some((worker, sockets)) = remains_with_bytes(fuse) else { return Ok(()) };
        let slot = worker.layout_of_slot();
        let chunk = worker.keep.layout.chunk(0);
        let at = [slot, slot + 1, slot + 2, slot + 3, chunk, chunk + 1, layout::SCRATCH_CLAIM, layout::SCRATCH_BASE][word];
        let words = worker.keep.area.words();
        words[at].store(words[at].load(Relaxed) ^ (1 << bit), Release);
        let remains = Remains::open(worker.keep.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let model = Model(&sockets);
        for heir in remains.inherit(&model, &model) {
            let Fate::Send { record, kept, .. } = heir.fate else { continue };
            if record.stage != Stage::Open {
                prop_assert!(kept.is_empty());
                continue;
            }
            let mut expected: Vec<u8> = Vec::new();
            let mut to_server = PREFACE.to_vec();
            to_server.extend(pattern(0, 5_000, Side::Client));
            let read = sockets[0].borrow().consumed as usize - HEADER.len() + PREFACE.len();
            expected.extend(&to_server[sockets[1].borrow().taken.len()..read]);
            let from_server = pattern(0, 5_000, Side::Server);
            expected.extend(&from_server[sockets[0].borrow().taken.len()..sockets[1].borrow().consumed as usize]);
            prop_assert_eq!(kept, expected);
        }
    }
}

impl Worker {
    fn layout_of_slot(&self) -> usize {
        self.keep.slot_at(SESSION).expect("it has one")
    }
}
