//! The session over pretend streams: every byte, end and reset, in every
//! order that a seeded schedule finds.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;

use proptest::prelude::*;

use super::*;
use crate::keep::Keep;

thread_local! {
    /// Each test has a thread of its own.
    static KEEP: RefCell<Keep> = RefCell::new(Keep::create(4).expect("memory"));
}

fn with_keep<T>(work: impl FnOnce(&mut Keep) -> T) -> T {
    KEEP.with_borrow_mut(work)
}

/// Lends what a session needs.
fn lending<T>(pipes: &mut Pipes<FakePipe>, now: u64, work: impl FnOnce(&mut Lent<'_, FakePipe>) -> T) -> T {
    with_keep(|keep| work(&mut Lent { keep, pipes, session: 1, now }))
}

fn kept_bytes(session: &Session) -> usize {
    with_keep(|keep| session.kept_bytes(keep))
}

/// The session as another process has it.
fn moved(mut session: Session) -> Session {
    with_keep(|keep| {
        let Some((snapshot, bytes)) = session.snapshot(keep) else { return session };
        assert_eq!(snapshot.kept(), bytes.len());
        let json = serde_json::to_string(&snapshot).unwrap();
        let snapshot = serde_json::from_str(&json).unwrap();
        session.abandon(&mut Lent { keep, pipes: &mut pipes(0), session: 1, now: 0 });
        let mut restored = Session::restore(&snapshot).expect("its own state is sane");
        assert!(restored.take_kept(&snapshot, &bytes, keep, 1));
        restored
    })
}

/// A pretend socket: what its peer will send, and room for what it takes.
#[derive(Default)]
struct Fake {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    incoming: VecDeque<u8>,
    ending: Option<Ending>,
    room: usize,
    taken: Vec<u8>,
    finished: bool,
    receives: usize,
    sends: usize,
    fills: usize,
    /// An urgent byte: reads stop before it once, splices cannot pass it.
    urgent: Option<usize>,
    /// It refuses pipes.
    copies: bool,
}

/// A pretend pipe.
struct FakePipe {
    bytes: RefCell<VecDeque<u8>>,
}

/// Small enough that some fillings are short.
const PIPE_ROOM: usize = 150_000;

impl Pipe for FakePipe {
    fn take(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut bytes = self.bytes.borrow_mut();
        // In pieces, as a pipe of pages may.
        let count = into.len().min(bytes.len()).min(40_000);
        into[..count].iter_mut().for_each(|byte| *byte = bytes.pop_front().expect("counted"));
        Ok(count)
    }
    fn number(&self) -> i32 {
        -1
    }
}

fn pipes(most: usize) -> Pipes<FakePipe> {
    Pipes::new(most, || Some(FakePipe { bytes: RefCell::default() }))
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ending {
    Finish,
    Reset,
    /// As Linux does: the first call, a write too, gets the error; after that
    /// reads give an end of file.
    ResetReported,
}

impl Fake {
    fn with_room(room: usize) -> Fake {
        let fake = Fake::default();
        fake.state.borrow_mut().room = room;
        fake
    }
    fn push(&self, bytes: &[u8]) {
        self.state.borrow_mut().incoming.extend(bytes);
    }
    fn end(&self, ending: Ending) {
        self.state.borrow_mut().ending = Some(ending);
    }
    fn taken(&self) -> Vec<u8> {
        self.state.borrow().taken.clone()
    }
}

impl End for Fake {
    type Pipe = FakePipe;

    fn fill(&self, pipe: &FakePipe, most: usize) -> io::Result<usize> {
        let mut bytes = pipe.bytes.borrow_mut();
        assert!(bytes.is_empty(), "filled twice");
        let before_urgent = {
            let mut state = self.state.borrow_mut();
            state.fills += 1;
            if state.copies {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let urgent = state.urgent.unwrap_or(usize::MAX);
            if urgent == 0 {
                return if state.ending.is_some() { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
            }
            urgent
        };
        let mut buffer = vec![0; most.min(PIPE_ROOM).min(before_urgent)];
        let count = self.receive(&mut buffer)?;
        bytes.extend(&buffer[..count]);
        Ok(count)
    }

    fn drain(&self, pipe: &FakePipe, most: usize) -> io::Result<usize> {
        let mut bytes = pipe.bytes.borrow_mut();
        assert_eq!(bytes.len(), most, "the session knows what is in its pipe");
        if self.state.borrow().copies {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let count = self.send(bytes.make_contiguous())?;
        bytes.drain(..count);
        Ok(count)
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        state.receives += 1;
        if state.incoming.is_empty() {
            return match state.ending {
                None => Err(io::ErrorKind::WouldBlock.into()),
                Some(Ending::Finish | Ending::ResetReported) => Ok(0),
                Some(Ending::Reset) => {
                    state.ending = Some(Ending::ResetReported);
                    Err(io::ErrorKind::ConnectionReset.into())
                }
            };
        }
        let mut count = into.len().min(state.incoming.len());
        match state.urgent {
            Some(0) => state.urgent = None,
            Some(before) => {
                count = count.min(before);
                state.urgent = Some(before - count);
            }
            None => {}
        }
        for byte in &mut into[..count] {
            *byte = state.incoming.pop_front().expect("counted");
        }
        Ok(count)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        state.sends += 1;
        assert!(!state.finished, "sent after the end");
        match state.ending {
            Some(Ending::Reset) => {
                state.ending = Some(Ending::ResetReported);
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            Some(Ending::ResetReported) => return Err(io::ErrorKind::BrokenPipe.into()),
            _ => {}
        }
        if state.room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = bytes.len().min(state.room);
        state.room -= count;
        state.taken.extend(&bytes[..count]);
        Ok(count)
    }

    fn finish(&self) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        assert!(!state.finished, "finished twice");
        state.finished = true;
        Ok(())
    }
}

const READ: Readiness = Readiness { readable: true, writable: false, probe: false };
const WRITE: Readiness = Readiness { readable: false, writable: true, probe: false };
const END: Readiness = Readiness { readable: true, writable: false, probe: true };

fn drive(session: &mut Session, client: &Fake, server: &Fake) -> Drive {
    drive_with(session, [client, server], &mut pipes(0), 0, 1 << 20)
}

fn drive_with(
    session: &mut Session,
    ends: [&Fake; 2],
    pipes: &mut Pipes<FakePipe>,
    now: u64,
    budget: usize,
) -> Drive {
    lending(pipes, now, |lent| session.drive(ends, lent, budget))
}

/// A session whose client has sent enough to be in bulk.
fn in_bulk(client: &Fake, server: &Fake, pipes: &mut Pipes<FakePipe>) -> Session {
    let mut session = Session::relay();
    client.push(&[9; 1_000_000]);
    session.handle_ready(Side::Client, READ);
    server.state.borrow_mut().room = 1_000_000;
    while drive_with(&mut session, [client, server], pipes, 0, 1 << 20) == Drive::Again {}
    assert!(client.state.borrow().fills > 0 && server.taken().len() == 1_000_000);
    server.state.borrow_mut().taken.clear();
    session
}

#[test]
fn bytes_pass_and_nothing_is_kept() {
    let (client, server) = (Fake::with_room(100), Fake::with_room(100));
    let mut session = Session::relay();
    client.push(b"question");
    session.handle_ready(Side::Client, READ);
    assert_eq!(drive(&mut session, &client, &server), Drive::Idle);
    assert_eq!(server.taken(), b"question");
    assert_eq!(kept_bytes(&session), 0);
    assert_eq!(session.client_bytes(), [8, 0]);
}

#[test]
fn a_preface_goes_with_what_the_client_has_sent_and_counts_for_nobody() {
    // However little the server takes at a time, and however the client ends.
    for (room, ending) in [(usize::MAX, None), (7, Some(Ending::Finish)), (1, Some(Ending::Reset))] {
        let (client, server) = (Fake::default(), Fake::with_room(0));
        client.push(b"question");
        if let Some(ending) = ending {
            client.end(ending);
        }
        let mut session = Session::relay();
        session.handle_ready(Side::Client, Readiness { readable: true, ..Readiness::default() });
        let before = session.client_bytes()[0];
        let count = with_keep(|keep| session.introduce(b"PREFACE ", &client, keep, 1));
        assert_eq!((before, session.client_bytes()[0]), (0, count as u64));
        // Its state travels like any other.
        if let Some((_, bytes)) = with_keep(|keep| session.snapshot(keep)) {
            assert!(bytes.starts_with(b"PREFACE "));
        }
        session = moved(session);
        for _ in 0..200 {
            server.state.borrow_mut().room = room;
            session.handle_ready(Side::Server, WRITE);
            session.handle_ready(Side::Client, READ);
            if let Drive::Done(_) = drive(&mut session, &client, &server) {
                break;
            }
        }
        assert_eq!(server.taken(), b"PREFACE question", "{room} {ending:?}");
        assert_eq!(server.state.borrow().finished, ending == Some(Ending::Finish));
        assert_eq!(session.client_bytes()[0], 8);
    }
}

#[test]
fn a_short_read_needs_no_second_one() {
    let (client, server) = (Fake::with_room(100), Fake::with_room(100));
    let mut session = Session::relay();
    client.push(b"question");
    session.handle_ready(Side::Client, READ);
    drive(&mut session, &client, &server);
    assert_eq!((client.state.borrow().receives, server.state.borrow().sends), (1, 1));
}

#[test]
fn client_half_close_still_receives_the_reply() {
    let (client, server) = (Fake::with_room(1000), Fake::with_room(1000));
    let mut session = Session::relay();
    client.push(b"all of it");
    client.end(Ending::Finish);
    session.handle_ready(Side::Client, END);
    assert_eq!(drive(&mut session, &client, &server), Drive::Idle);
    assert!(server.state.borrow().finished && session.is_half_closed());
    server.push(b"the answer");
    server.end(Ending::Finish);
    session.handle_ready(Side::Server, END);
    assert_eq!(drive(&mut session, &client, &server), Drive::Done(CloseReason::Finished));
    assert_eq!(client.taken(), b"the answer");
    assert!(!client.state.borrow().finished, "closing it is enough");
}

#[test]
fn what_came_before_a_reset_is_delivered_first() {
    let (client, server) = (Fake::with_room(4), Fake::with_room(0));
    let mut session = Session::relay();
    server.push(b"last words");
    server.end(Ending::Reset);
    session.handle_ready(Side::Server, END);
    assert_eq!(drive(&mut session, &client, &server), Drive::Idle, "six bytes wait for the client");
    client.state.borrow_mut().room = 100;
    session.handle_ready(Side::Client, WRITE);
    assert_eq!(drive(&mut session, &client, &server), Drive::Done(CloseReason::ServerReset));
    assert_eq!(client.taken(), b"last words");
    assert!(!client.state.borrow().finished, "a reset must not look like an end");
}

#[test]
fn a_reset_that_a_write_finds_still_delivers_what_came_before() {
    let (client, server) = (Fake::with_room(100), Fake::with_room(100));
    let mut session = Session::relay();
    client.push(b"too late");
    session.handle_ready(Side::Client, READ);
    server.push(b"last words");
    server.end(Ending::Reset);
    assert_eq!(drive(&mut session, &client, &server), Drive::Done(CloseReason::ServerReset));
    assert_eq!(client.taken(), b"last words");
    assert!(!client.state.borrow().finished);
}

#[test]
fn a_client_that_stops_reading_stops_the_server_from_being_read() {
    let (client, server) = (Fake::with_room(10), Fake::with_room(0));
    let mut session = Session::relay();
    server.push(&[7; 1_000_000]);
    session.handle_ready(Side::Server, READ);
    assert_eq!(drive(&mut session, &client, &server), Drive::Idle);
    session.handle_ready(Side::Server, READ);
    assert_eq!(drive(&mut session, &client, &server), Drive::Idle);
    assert_eq!(server.state.borrow().receives, 1);
    assert!(kept_bytes(&session) <= MAX_READ);
}

#[test]
fn a_session_over_its_budget_asks_to_be_driven_again() {
    let (client, server) = (Fake::with_room(0), Fake::with_room(usize::MAX));
    let mut session = Session::relay();
    client.push(&[1; 600_000]);
    session.handle_ready(Side::Client, READ);
    let mut turns = 0;
    let mut none = pipes(0);
    while drive_with(&mut session, [&client, &server], &mut none, 0, 100_000) == Drive::Again {
        turns += 1;
    }
    assert_eq!((turns, server.taken().len()), (2, 600_000));
}

#[test]
fn echo_sends_the_greeting_and_then_what_it_gets() {
    let client = Fake::with_room(1000);
    let mut session = Session::echo();
    with_keep(|keep| session.greet(b"hello ", keep, 1));
    client.push(b"back");
    client.end(Ending::Finish);
    session.handle_ready(Side::Client, END);
    assert_eq!(drive(&mut session, &client, &client), Drive::Done(CloseReason::Finished));
    assert_eq!(client.taken(), b"hello back");
}

#[test]
fn discard_reads_to_the_end_and_sends_nothing() {
    let client = Fake::with_room(0);
    let mut session = Session::discard();
    client.push(&[1; 100_000]);
    client.end(Ending::Finish);
    session.handle_ready(Side::Client, END);
    assert_eq!(drive(&mut session, &client, &client), Drive::Done(CloseReason::Finished));
    assert_eq!(session.client_bytes(), [100_000, 0]);
    assert!(client.taken().is_empty());
}

#[test]
fn a_finish_reaches_a_side_that_takes_no_bytes() {
    let (client, server) = (Fake::with_room(0), Fake::with_room(10));
    let mut session = Session::relay();
    client.push(&[1; 10]);
    session.handle_ready(Side::Client, READ);
    drive(&mut session, &client, &server);
    client.push(&[1; 5]);
    session.handle_ready(Side::Client, READ);
    assert_eq!(drive(&mut session, &client, &server), Drive::Idle);
    assert_eq!(kept_bytes(&session), 5);
    server.state.borrow_mut().room = 5;
    session.handle_ready(Side::Server, WRITE);
    client.end(Ending::Finish);
    session.handle_ready(Side::Client, END);
    assert_eq!(drive(&mut session, &client, &server), Drive::Idle);
    assert!(server.state.borrow().finished);
}

#[test]
fn bulk_goes_through_a_pipe_that_is_lent_only_while_it_holds_bytes() {
    let (client, server) = (Fake::with_room(0), Fake::with_room(0));
    let mut pipes = pipes(1);
    let mut session = in_bulk(&client, &server, &mut pipes);
    assert_eq!(pipes.lent_count(), 0);
    client.push(&[1; 100_000]);
    session.handle_ready(Side::Client, READ);
    session.handle_ready(Side::Server, WRITE);
    server.state.borrow_mut().room = 40_000;
    assert_eq!(drive_with(&mut session, [&client, &server], &mut pipes, 0, 1 << 20), Drive::Idle);
    assert_eq!((pipes.lent_count(), kept_bytes(&session)), (1, 60_000));
    server.state.borrow_mut().room = 60_000;
    session.handle_ready(Side::Server, WRITE);
    assert_eq!(drive_with(&mut session, [&client, &server], &mut pipes, 0, 1 << 20), Drive::Idle);
    assert_eq!((pipes.lent_count(), server.taken().len()), (0, 100_000));
}

#[test]
fn small_messages_end_the_splicing() {
    let (client, server) = (Fake::with_room(0), Fake::with_room(usize::MAX / 2));
    let mut pipes = pipes(1);
    let mut session = in_bulk(&client, &server, &mut pipes);
    server.state.borrow_mut().room = usize::MAX / 2;
    for round in 0..10 {
        let before = client.state.borrow().fills;
        client.push(&[1; 100]);
        session.handle_ready(Side::Client, READ);
        drive_with(&mut session, [&client, &server], &mut pipes, 0, 1 << 20);
        assert!(round < 4 || client.state.borrow().fills == before, "still spliced after {round}");
    }
    assert_eq!(server.taken().len(), 1000);
}

#[test]
fn without_a_free_pipe_bulk_is_copied_and_a_slow_holder_has_to_give_its_up() {
    let ends = [Fake::with_room(0), Fake::with_room(0)];
    let others = [Fake::with_room(0), Fake::with_room(0)];
    let mut pipes = pipes(1);
    let mut slow = in_bulk(&ends[0], &ends[1], &mut pipes);
    let mut other = in_bulk(&others[0], &others[1], &mut pipes);
    ends[0].push(&[1; 100_000]);
    slow.handle_ready(Side::Client, READ);
    slow.handle_ready(Side::Server, WRITE);
    drive_with(&mut slow, [&ends[0], &ends[1]], &mut pipes, 1_000, 1 << 20);
    others[0].push(&[1; 100_000]);
    others[1].state.borrow_mut().room = 100_000;
    other.handle_ready(Side::Client, READ);
    drive_with(&mut other, [&others[0], &others[1]], &mut pipes, 1_000, 1 << 20);
    assert_eq!(others[1].taken().len(), 100_000, "copied");
    assert_eq!(pipes.take_wish(1_000), None, "nobody is slow yet");
    others[0].push(&[1; 100_000]);
    other.handle_ready(Side::Client, READ);
    drive_with(&mut other, [&others[0], &others[1]], &mut pipes, 2_000, 1 << 20);
    let holder = pipes.take_wish(2_000).expect("one is");
    lending(&mut pipes, 2_000, |lent| slow.unpipe(usize::from(holder.half), lent));
    assert_eq!((pipes.lent_count(), kept_bytes(&slow)), (0, 100_000));
    ends[1].state.borrow_mut().room = 100_000;
    slow.handle_ready(Side::Server, WRITE);
    drive_with(&mut slow, [&ends[0], &ends[1]], &mut pipes, 2_000, 1 << 20);
    assert_eq!(ends[1].taken(), [1; 100_000]);
}

#[test]
fn a_side_that_takes_no_pipe_is_copied_to() {
    let (client, server) = (Fake::with_room(0), Fake::with_room(0));
    let mut pipes = pipes(1);
    let mut session = in_bulk(&client, &server, &mut pipes);
    server.state.borrow_mut().copies = true;
    server.state.borrow_mut().room = 100_000;
    client.push(&[1; 100_000]);
    session.handle_ready(Side::Client, READ);
    drive_with(&mut session, [&client, &server], &mut pipes, 0, 1 << 20);
    assert_eq!((server.taken().len(), pipes.lent_count()), (100_000, 0));
}

#[test]
fn what_a_pipe_holds_when_its_session_ends_goes_to_nobody() {
    let (client, server) = (Fake::with_room(0), Fake::with_room(0));
    let mut pipes = pipes(1);
    let mut session = in_bulk(&client, &server, &mut pipes);
    client.push(&[1; 100_000]);
    session.handle_ready(Side::Client, READ);
    session.handle_ready(Side::Server, WRITE);
    drive_with(&mut session, [&client, &server], &mut pipes, 0, 1 << 20);
    assert_eq!(pipes.lent_count(), 1);
    lending(&mut pipes, 0, |lent| session.abandon(lent));
    assert_eq!(pipes.lent_count(), 0);
    in_bulk(&Fake::with_room(0), &Fake::with_room(0), &mut pipes);
}

/// One step of a schedule.
#[derive(Clone, Debug)]
enum Step {
    Push(Side, usize),
    Room(Side, usize),
    End(Side, Ending),
    Drive(usize),
    /// The session goes to another process.
    Move,
    /// The next byte of a side is urgent.
    Urgent(Side),
    /// Somebody else waits for a pipe.
    TakeAway,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let side = prop_oneof![Just(Side::Client), Just(Side::Server)];
    let ending = prop_oneof![3 => Just(Ending::Finish), 1 => Just(Ending::Reset)];
    let step = prop_oneof![
        4 => (side.clone(), 1usize..100_000).prop_map(|(side, n)| Step::Push(side, n)),
        4 => (side.clone(), 100_000usize..600_000).prop_map(|(side, n)| Step::Push(side, n)),
        6 => (side.clone(), 1usize..500_000).prop_map(|(side, n)| Step::Room(side, n)),
        1 => side.clone().prop_map(Step::Urgent),
        1 => Just(Step::TakeAway),
        1 => (side, ending).prop_map(|(side, ending)| Step::End(side, ending)),
        6 => (1usize..300_000).prop_map(Step::Drive),
        1 => Just(Step::Move),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    /// Whatever the order: what a side took is what the other sent, from its
    /// beginning, in order; ends and resets arrive after all of it; nothing
    /// is left undone once both sides have room.
    #[test]
    fn every_schedule_keeps_every_byte(steps in steps(), pipe_count in 0usize..3) {
        let mut pipes = pipes(pipe_count);
        let fakes = [Fake::with_room(0), Fake::with_room(0)];
        let mut session = Session::relay();
        let mut sent: [Vec<u8>; 2] = Default::default();
        let mut done = None;
        let mut tail = vec![];
        for side in [Side::Client, Side::Server] {
            tail.push(Step::Room(side, 100_000_000));
        }
        tail.push(Step::Drive(usize::MAX));
        for step in steps.into_iter().chain(tail) {
            match step {
                Step::Push(side, count) if fakes[side as usize].state.borrow().ending.is_none() => {
                    let from = sent[side as usize].len();
                    let bytes: Vec<u8> = (from..from + count).map(|i| (i * 7 + i / 251) as u8).collect();
                    fakes[side as usize].push(&bytes);
                    sent[side as usize].extend(bytes);
                    session.handle_ready(side, READ);
                }
                Step::Push(..) => {}
                Step::Room(side, count) => {
                    fakes[side as usize].state.borrow_mut().room += count;
                    session.handle_ready(side, WRITE);
                }
                Step::End(side, ending) => {
                    if fakes[side as usize].state.borrow().ending.is_none() {
                        fakes[side as usize].end(ending);
                        session.handle_ready(side, END);
                    }
                }
                Step::Urgent(side) => {
                    let mut state = fakes[side as usize].state.borrow_mut();
                    if state.ending.is_none() && state.urgent.is_none() {
                        state.urgent = Some(state.incoming.len());
                        state.incoming.push_back(0xFF);
                        sent[side as usize].push(0xFF);
                        session.handle_ready(side, END);
                    }
                }
                Step::TakeAway => lending(&mut pipes, 0, |lent| session.unpipe_all(lent)),
                Step::Move => {
                    lending(&mut pipes, 0, |lent| session.unpipe_all(lent));
                    prop_assert_eq!(pipes.lent_count(), 0);
                    session = moved(session);
                }
                Step::Drive(budget) => {
                    let mut turns = 0;
                    while done.is_none() {
                        match drive_with(&mut session, [&fakes[0], &fakes[1]], &mut pipes, 0, budget) {
                            Drive::Done(reason) => done = Some(reason),
                            Drive::Idle => break,
                            Drive::Again => {}
                        }
                        turns += 1;
                        prop_assert!(turns < 10_000_000 / budget.min(1_000_000) + 10, "drive spins");
                    }
                }
            }
        }
        let endings = [0, 1].map(|i| fakes[i].state.borrow().ending);
        let reset = endings.iter().any(|e| matches!(e, Some(Ending::Reset | Ending::ResetReported)));
        for (from, to) in [(0, 1), (1, 0)] {
            let taken = fakes[to].taken();
            prop_assert!(sent[from].starts_with(&taken), "bytes were changed");
            let to_reset = matches!(endings[to], Some(Ending::Reset | Ending::ResetReported));
            if !to_reset {
                prop_assert_eq!(taken.len(), sent[from].len(), "bytes were lost");
            }
            if !reset {
                let closed = done == Some(CloseReason::Finished);
                prop_assert_eq!(fakes[to].state.borrow().finished || closed, endings[from].is_some());
            }
        }
        match done {
            Some(CloseReason::Finished) => prop_assert!(endings.iter().all(Option::is_some)),
            Some(_) => prop_assert!(reset),
            None => prop_assert!(!reset && endings.iter().any(Option::is_none)),
        }
        lending(&mut pipes, 0, |lent| session.abandon(lent));
        prop_assert_eq!(pipes.lent_count(), 0);
    }
}
