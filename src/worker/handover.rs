//! Live flows and sessions from one worker to another, over a channel of their
//! own.
//!
//! ```text
//!   sender:    pack, freeze --Flows--> wait --Taken--> forget, next bundle ... FlowsDone
//!              pack, freeze --Sessions--> wait --Taken--> forget, next bundle ... Done
//!                                           \--gone, or silent--> thaw all, keep them
//!   receiver:  decode, take --Taken--> activate
//! ```
//!
//! The sender keeps what it sends until the receiver has said that it has it;
//! the receiver moves no byte before it has said so. So a death on either side
//! at any moment leaves each session with at most one of them, whole. One
//! bundle is under way at a time. Flows go first: their clients' datagrams
//! wait unread at the receiver until then. What comes next and who has what is
//! decided by `handover::protocol`; here are the sockets for it.

mod death;
mod passing;
mod receiver;

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::rc::Rc;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::warn;

use super::datagrams::{Datagrams, Item};
use super::sessions::Sessions;
use crate::control::{self, PeerMessage};
use crate::handover::protocol::{self, Answer, Kind, Next, Reaction, Verdict};
use crate::handover::{self, MAX_SESSIONS, flows};
use crate::keep;
use crate::slab::Key;
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::shared;

pub use passing::Passing;
pub use receiver::Receivers;

/// What a sender passes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// All there is.
    Everything,
    /// So many sessions.
    Sessions(usize),
    /// The flows whose datagrams come to this slot.
    FlowsOf(usize),
}

/// How a sender stands after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A bundle is under way, or may not go yet.
    Waiting,
    /// Everything that could travel has.
    #[allow(missing_docs)]
    Done { moved: usize },
    /// The receiver is gone or refuses; what it did not take is kept.
    #[allow(missing_docs)]
    Failed { moved: usize },
}

/// Something that is being sent.
#[derive(Debug)]
enum Freight {
    Datagrams(Item),
    Session(Key),
}

/// The sending side.
#[derive(Debug)]
pub struct Sender {
    channel: Rc<Channel>,
    load: Load,
    state: protocol::Sender<Freight>,
    /// Flows that are still to go.
    flows: Vec<Key>,
    moved: usize,
    /// Of the bundle that was sent last; the answer says it again.
    number: u64,
}

/// What a sender takes from.
pub struct Cargo<'c, 's> {
    pub sessions: &'c mut Sessions<'s>,
    pub datagrams: &'c mut Datagrams<'s>,
    pub registry: &'c Registry,
    pub now: Millis,
}

impl Sender {
    /// Sends this; the flows are those that live now.
    pub fn new(
        channel: Channel,
        registry: &Registry,
        token: Token,
        load: Load,
        datagrams: &Datagrams,
    ) -> io::Result<Sender> {
        channel.set_nonblocking()?;
        registry.register(&mut SourceFd(&channel.as_fd().as_raw_fd()), token, Interest::READABLE)?;
        let (flows, state) = match load {
            Load::Everything => (datagrams.leaving_for(None), protocol::Sender::new(true, usize::MAX)),
            Load::Sessions(count) => (Vec::new(), protocol::Sender::new(false, count)),
            Load::FlowsOf(slot) => (datagrams.leaving_for(Some(slot)), protocol::Sender::new(true, 0)),
        };
        Ok(Sender { channel: Rc::new(channel), load, state, flows, moved: 0, number: 0 })
    }

    /// What is sent waits in the channel for another day.
    pub fn park(&mut self) {
        self.state.park();
    }

    /// The way to the receiver.
    pub fn channel(&self) -> &Rc<Channel> {
        &self.channel
    }

    /// Flows that the receiver would not take, or that were not sent.
    pub fn flows_left(&self) -> usize {
        self.state.flows_kept() + self.flows.len()
    }

    /// Whether it failed because the receiver ended.
    pub fn is_receiver_gone(&self) -> bool {
        self.state.is_receiver_gone()
    }

    /// When `step` is to be called at the latest; `None` where an event or the
    /// caller's leave to send sessions will come.
    pub fn next_deadline(&self, now: Millis, sessions_may_go: bool) -> Option<Millis> {
        self.state.next_deadline(now, sessions_may_go)
    }

    /// Takes in what the receiver said, and sends on; sessions only where they
    /// may go.
    pub fn step(&mut self, cargo: &mut Cargo, sessions_may_go: bool) -> Progress {
        loop {
            let sent = match self.state.next(cargo.now, sessions_may_go) {
                Next::Wait => return Progress::Waiting,
                Next::Flows => self.send_flows(cargo),
                Next::FlowsDone => control::send(&self.channel, &PeerMessage::FlowsDone, &[]),
                Next::Sessions(most) => self.send_sessions(most, cargo),
                Next::Listen => {
                    let (answer, why) = self.listen();
                    if let Answer::Taken(_) = answer {
                        death::die_if_told(death::ACKNOWLEDGED);
                    }
                    match self.state.handle_answer(&answer, cargo.now) {
                        Reaction::Wait => return Progress::Waiting,
                        Reaction::Settle(verdict) => self.settle(verdict, cargo),
                        Reaction::GiveUp => return self.fail(&why, cargo),
                    }
                    self.pass_over();
                    Ok(())
                }
                Next::End { refused } => return self.end(refused, cargo.registry),
            };
            if let Err(error) = sent {
                let _ = self.state.handle_answer(&failure(&error), cargo.now);
                return self.fail(&error.to_string(), cargo);
            }
        }
    }

    /// What the receiver said, and what is wrong with that. It lies there until
    /// `pass_over`: who dies after it was acted upon leaves a keeper that reads
    /// it again, and who dies before too.
    fn listen(&self) -> (Answer, Cow<'static, str>) {
        match control::peek::<PeerMessage>(&self.channel) {
            // Said twice: by a worker, and by its keeper.
            Ok(Some(PeerMessage::Taken { number, .. })) if number != 0 && number != self.number => {
                self.pass_over();
                self.listen()
            }
            Ok(Some(PeerMessage::Taken { refused, .. })) => (Answer::Taken(refused), "".into()),
            Ok(Some(PeerMessage::Refused)) => (Answer::Refused, "the receiver refuses".into()),
            Ok(Some(_)) => (Answer::OutOfTurn, "an answer out of turn".into()),
            Ok(None) => (Answer::Gone, "the receiver is gone".into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (Answer::Nothing, "no answer".into()),
            Err(error) => (failure(&error), error.to_string().into()),
        }
    }

    fn pass_over(&self) {
        let _ = self.channel.receive();
    }

    /// Sends the next flows.
    fn send_flows(&mut self, cargo: &mut Cargo) -> io::Result<()> {
        let (mut items, mut records) = (Vec::new(), Vec::new());
        while items.len() < flows::MAX_RECORDS {
            let Some(key) = self.flows.pop() else { break };
            if let Some(record) = cargo.datagrams.pack(cargo.registry, key) {
                items.push(Freight::Datagrams(Item::Flow(key)));
                records.push(record);
            }
        }
        while items.len() < flows::MAX_RECORDS && self.load == Load::Everything {
            let Some((item, record)) = cargo.datagrams.pack_resting() else { break };
            items.push(Freight::Datagrams(item));
            records.push(record);
        }
        if items.is_empty() {
            self.state.handle_none_left(Kind::Flows);
            return Ok(());
        }
        self.number += 1;
        let message = PeerMessage::Flows { count: items.len(), number: self.number };
        self.state.begin(Kind::Flows, items, cargo.now);
        match self.send("evenkeel-flows", &flows::encode(&records), &message, cargo) {
            Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                let Some(items) = self.state.handle_congested(cargo.now) else { return Err(error) };
                self.keep_for_later(items, cargo);
                Ok(())
            }
            result => result,
        }
    }

    /// They stay here for now, and go with a later bundle.
    fn keep_for_later(&mut self, items: Vec<Freight>, cargo: &mut Cargo) {
        for item in items {
            if let Freight::Datagrams(Item::Flow(key)) = item {
                self.flows.push(key);
            }
            keep(item, cargo);
        }
    }

    /// Sends the next sessions, so many at most.
    fn send_sessions(&mut self, most: usize, cargo: &mut Cargo) -> io::Result<()> {
        let parcels = cargo.sessions.pack(cargo.registry, most.min(MAX_SESSIONS), cargo.now);
        if parcels.is_empty() {
            self.state.handle_none_left(Kind::Sessions);
            return Ok(());
        }
        let items = parcels.iter().map(|parcel| Freight::Session(parcel.key)).collect();
        self.number += 1;
        let message = PeerMessage::Sessions { count: parcels.len(), number: self.number };
        let records: Vec<_> = parcels.into_iter().map(|parcel| (parcel.record, parcel.kept)).collect();
        self.state.begin(Kind::Sessions, items, cargo.now);
        self.send("evenkeel-bundle", &handover::encode(&records), &message, cargo)
    }

    /// Sends the bundle that has begun, with the sockets of its items.
    fn send(&mut self, name: &str, bytes: &[u8], message: &PeerMessage, cargo: &mut Cargo) -> io::Result<()> {
        let bundle = shared::sealed(name, bytes)?;
        self.note_bundle(cargo);
        let mut fds: Vec<BorrowedFd> = vec![bundle.as_fd()];
        for item in self.state.under_way() {
            match item {
                Freight::Datagrams(item) => fds.extend(cargo.datagrams.socket(item)),
                Freight::Session(key) => fds.extend(cargo.sessions.sockets(*key)),
            }
        }
        control::send(&self.channel, message, &fds)?;
        death::die_if_told(death::SENT);
        let verdict = self.state.handle_sent();
        self.settle(verdict, cargo);
        Ok(())
    }

    /// Should this process die before it knows the answer, its keeper asks for
    /// it. What is parked nobody answers: it is as good as gone.
    fn note_bundle(&self, cargo: &mut Cargo) {
        let channel = if self.state.is_parking() { RawFd::MAX } else { self.channel.as_fd().as_raw_fd() };
        let items = self.state.under_way().iter().map(|item| match item {
            Freight::Session(key) => keep::Item::Session(key.index),
            Freight::Datagrams(Item::Flow(key)) => keep::Item::Flow(key.index),
            Freight::Datagrams(Item::Resting { .. }) => keep::Item::Other,
        });
        cargo.sessions.keep().send(channel, self.number, items);
    }

    fn settle(&mut self, verdict: Verdict<Freight>, cargo: &mut Cargo) {
        let is_over = !verdict.moved.is_empty() || !verdict.kept.is_empty();
        for item in verdict.moved {
            // A port that rests is nothing that moves.
            self.moved += usize::from(!matches!(item, Freight::Datagrams(Item::Resting { .. })));
            match item {
                Freight::Datagrams(item) => cargo.datagrams.forget(item),
                Freight::Session(key) => cargo.sessions.forget(key),
            }
        }
        if is_over {
            cargo.sessions.keep().sent();
        }
        verdict.kept.into_iter().for_each(|item| keep(item, cargo));
    }

    /// Gives the hand-over up; what was not acknowledged goes on here. An
    /// acknowledgement that crosses with this either lies here already, and
    /// counts, or can be sent no more, and the receiver lets go: never do both
    /// have a session.
    pub fn fail(&mut self, why: &str, cargo: &mut Cargo) -> Progress {
        self.channel.hush();
        // An error may stand in front of what was sent.
        let mut errors = 0;
        while errors < 2 {
            let (answer, _) = self.listen();
            match answer {
                Answer::Gone => break,
                Answer::Nothing | Answer::Failed { .. } => errors += 1,
                Answer::Taken(_) | Answer::Refused | Answer::OutOfTurn => {}
            }
            let verdict = self.state.handle_late(&answer);
            self.settle(verdict, cargo);
            if !matches!(answer, Answer::Nothing | Answer::Failed { .. }) {
                self.pass_over();
            }
        }
        warn!("a hand-over stopped after {} sessions and flows: {why}", self.moved);
        self.say_done();
        let verdict = self.state.give_up();
        self.settle(verdict, cargo);
        self.unregister(cargo.registry);
        Progress::Failed { moved: self.moved }
    }

    /// Should the receiver die now, its keeper is not to wonder whether its last
    /// word was heard.
    fn say_done(&self) {
        let heard = self.state.heard(self.number);
        let _ = control::send(&self.channel, &PeerMessage::Done { heard }, &[]);
    }

    fn end(&mut self, refused: bool, registry: &Registry) -> Progress {
        if refused || !matches!(self.load, Load::FlowsOf(_)) {
            self.unregister(registry);
            self.say_done();
        }
        if refused {
            return Progress::Failed { moved: self.moved };
        }
        Progress::Done { moved: self.moved }
    }

    /// Listens no more.
    pub fn unregister(&self, registry: &Registry) {
        let _ = registry.deregister(&mut SourceFd(&self.channel.as_fd().as_raw_fd()));
    }
}

/// It goes on here.
fn keep(item: Freight, cargo: &mut Cargo) {
    match item {
        Freight::Datagrams(item) => cargo.datagrams.thaw(cargo.registry, item, cargo.now),
        Freight::Session(key) => cargo.sessions.thaw(cargo.registry, key, cargo.now),
    }
}

/// An error of the channel.
fn failure(error: &io::Error) -> Answer {
    let gone = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
    Answer::Failed { gone }
}
