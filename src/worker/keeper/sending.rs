//! One hand-over of a keeper: what is left of a dead worker to a living one.
//!
//! The words, the bundles and who has what in between are those of any
//! hand-over (`handover::protocol`); only where the parcels come from differs.
//! What the receiver has no place for ends by a reset, and the rest goes on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::estate::{Estate, Number};
use crate::control::{self, PeerMessage};
use crate::handover::protocol::{self, Answer, Kind, Next, Reaction, Verdict};
use crate::handover::{self, flows};
use crate::sys::channel::Channel;
use crate::sys::clock::Millis;
use crate::sys::shared;

/// One hand-over.
#[derive(Debug)]
pub struct Sending {
    channel: Channel,
    state: protocol::Sender<Number>,
    number: u64,
    moved: usize,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Waiting,
    #[allow(missing_docs)]
    Done {
        moved: usize,
    },
    /// `gone` = the receiver is.
    #[allow(missing_docs)]
    Failed {
        moved: usize,
        gone: bool,
    },
}

impl Sending {
    /// Sends all that is there.
    pub fn new(channel: Channel) -> Sending {
        Sending { channel, state: protocol::Sender::new(true, usize::MAX), number: 0, moved: 0 }
    }

    /// The way to the receiver.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// When `step` is to be called at the latest.
    pub fn next_deadline(&self, now: Millis) -> Millis {
        self.state.next_deadline(now, true).unwrap_or(now)
    }

    /// Takes in what the receiver said, and sends on.
    pub fn step(&mut self, estate: &mut Estate, now: Millis) -> Progress {
        loop {
            let done = match self.state.next(now, true) {
                Next::Wait => return Progress::Waiting,
                Next::Flows => self.send_flows(estate, now),
                Next::FlowsDone => control::send(&self.channel, &PeerMessage::FlowsDone, &[]),
                Next::Sessions(_) => self.send_sessions(estate, now),
                Next::Listen => {
                    let answer = self.listen(estate);
                    match self.state.handle_answer(&answer, now) {
                        Reaction::Wait => return Progress::Waiting,
                        Reaction::Settle(verdict) => self.settle(verdict, estate),
                        Reaction::GiveUp => return self.fail(estate),
                    }
                    Ok(())
                }
                Next::End { .. } => {
                    self.say_done();
                    return Progress::Done { moved: self.moved };
                }
            };
            if let Err(error) = done {
                let gone = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
                let _ = self.state.handle_answer(&Answer::Failed { gone }, now);
                return self.fail(estate);
            }
        }
    }

    /// What the receiver said. What it has no place for nobody else has: to the
    /// protocol that is as good as taken.
    fn listen(&self, estate: &mut Estate) -> Answer {
        match control::receive::<PeerMessage>(&self.channel) {
            Ok(Some((PeerMessage::Taken { number, .. }, _))) if number != 0 && number != self.number => {
                self.listen(estate)
            }
            Ok(Some((PeerMessage::Taken { refused, .. }, _))) => {
                let under_way = self.state.under_way();
                refused.iter().filter_map(|at| under_way.get(*at)).for_each(|at| estate.refuse(*at));
                Answer::Taken(Vec::new())
            }
            Ok(Some((PeerMessage::Refused, _))) => Answer::Refused,
            Ok(Some(_)) => Answer::OutOfTurn,
            Ok(None) => Answer::Gone,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Answer::Nothing,
            Err(error) => Answer::Failed {
                gone: matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset),
            },
        }
    }

    fn send_flows(&mut self, estate: &mut Estate, now: Millis) -> io::Result<()> {
        let (items, records) = estate.next_flows(flows::MAX_RECORDS);
        if items.is_empty() {
            self.state.handle_none_left(Kind::Flows);
            return Ok(());
        }
        self.number += 1;
        let message = PeerMessage::Flows { count: items.len(), number: self.number };
        self.send(Kind::Flows, items, &flows::encode(&records), &message, estate, now)
    }

    fn send_sessions(&mut self, estate: &mut Estate, now: Millis) -> io::Result<()> {
        let (items, parcels) = estate.next_sessions(handover::MAX_SESSIONS);
        if items.is_empty() {
            self.state.handle_none_left(Kind::Sessions);
            return Ok(());
        }
        self.number += 1;
        let message = PeerMessage::Sessions { count: items.len(), number: self.number };
        self.send(Kind::Sessions, items, &handover::encode(&parcels), &message, estate, now)
    }

    fn send(
        &mut self,
        kind: Kind,
        items: Vec<Number>,
        bytes: &[u8],
        message: &PeerMessage,
        estate: &mut Estate,
        now: Millis,
    ) -> io::Result<()> {
        let bundle = shared::sealed("evenkeel-bundle", bytes)?;
        let sockets = items.iter().flat_map(|item| estate.sockets(*item));
        let fds: Vec<BorrowedFd> = std::iter::once(bundle.as_fd()).chain(sockets).collect();
        let sent = control::send(&self.channel, message, &fds);
        drop(fds);
        self.state.begin(kind, items, now);
        match sent {
            Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                self.state.handle_congested(now);
                Ok(())
            }
            result => result,
        }
    }

    fn settle(&mut self, verdict: Verdict<Number>, estate: &mut Estate) {
        self.moved += verdict.moved.into_iter().filter(|item| estate.forget(*item)).count();
    }

    /// As any sender: the receiver's keeper may have to know.
    fn say_done(&self) {
        let heard = self.state.heard(self.number);
        let _ = control::send(&self.channel, &PeerMessage::Done { heard }, &[]);
    }

    /// Nobody takes anything through this channel any more.
    pub fn cut(&mut self, estate: &mut Estate) {
        self.fail(estate);
    }

    fn fail(&mut self, estate: &mut Estate) -> Progress {
        self.channel.hush();
        // An error may stand in front of what was sent.
        let mut errors = 0;
        while errors < 2 {
            let answer = self.listen(estate);
            match answer {
                Answer::Gone => break,
                Answer::Nothing | Answer::Failed { .. } => errors += 1,
                Answer::Taken(_) | Answer::Refused | Answer::OutOfTurn => {}
            }
            let verdict = self.state.handle_late(&answer);
            self.settle(verdict, estate);
        }
        self.say_done();
        let verdict = self.state.give_up();
        self.settle(verdict, estate);
        Progress::Failed { moved: self.moved, gone: self.state.is_receiver_gone() }
    }
}
