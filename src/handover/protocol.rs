//! Who has what during a hand-over, and what comes next: the decisions of both
//! sides, without their sockets.
//!
//! ```text
//!   sender:    Packing --begin--> UnderWay --Taken--> Packing ... End
//!                  ^--congested------/  \--gone, refuses, silent--> cut, late answers, give_up
//!   receiver:  Taking --said--> activate
//!                  \--could not be said--> undo
//! ```
//!
//! Each item, a session or a flow, is the sender's until the receiver's
//! `Taken` has gone out, and the receiver's from then on. The sender polls none
//! of a bundle that is under way, and the receiver none before it has said so.
//! So two never poll the same item, and a death costs what the dead had. What
//! is unclear at a failure is decided by the cut: after it no answer can be
//! sent, and what was sent before it lies there to be read.
//!
//! Owned by a worker, one `Sender` for each way out and one `Awaited` for each
//! way in. One bundle is under way at a time; `PATIENCE` bounds the silence. It
//! ends by `Next::End` or by `give_up`.

/// How long one side waits for a word of the other, in milliseconds.
pub const PATIENCE: u64 = 5_000;
/// When a bundle is tried again for which the kernel had too many descriptors
/// under way (ETOOMANYREFS, unix(7)), in milliseconds.
pub const TRY_AGAIN: u64 = 5;

/// What a bundle holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Flows, and ports that rest.
    Flows,
    /// Sessions.
    Sessions,
}

/// What a sender does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing before `next_deadline`.
    Wait,
    /// Pack flows and send them, or say that there are none (`handle_none_left`).
    Flows,
    /// Tell the receiver that no further flows will come.
    FlowsDone,
    /// The same as with flows for so many sessions at most.
    Sessions(usize),
    /// Listen to the receiver (`handle_answer`).
    Listen,
    /// All that could travel has; `refused` = the receiver would not have some
    /// session.
    #[allow(missing_docs)]
    End { refused: bool },
}

/// What a sender hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The bundle is there but for these, by their place in it.
    Taken(Vec<usize>),
    /// It was not understood, and nothing more is wanted.
    Refused,
    /// Something that is no answer.
    OutOfTurn,
    /// Nothing yet.
    Nothing,
    /// The receiver is gone.
    Gone,
    /// The channel failed; `gone` = because the receiver is.
    #[allow(missing_docs)]
    Failed { gone: bool },
}

/// Where items are from now on.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Verdict<T> {
    /// The receiver has them: nothing of them is left here.
    pub moved: Vec<T>,
    /// They go on here.
    pub kept: Vec<T>,
}

/// What an answer leads to.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Reaction<T> {
    /// The answer is still to come.
    Wait,
    /// The bundle's way is over.
    Settle(Verdict<T>),
    /// Cut the channel, read what lies there (`handle_late`), then `give_up`.
    GiveUp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FlowStage {
    Going,
    Ending,
    Over,
}

/// The sending side.
#[derive(Debug)]
pub struct Sender<T> {
    flow_stage: FlowStage,
    /// Sessions that may still go.
    left: usize,
    under_way: Option<(Kind, Vec<T>)>,
    since: u64,
    try_at: Option<u64>,
    session_refused: bool,
    flows_kept: usize,
    is_parking: bool,
    gone: bool,
}

impl<T> Verdict<T> {
    fn none() -> Verdict<T> {
        Verdict { moved: Vec::new(), kept: Vec::new() }
    }
}

impl<T> Sender<T> {
    /// Sends flows or not, and so many sessions at most.
    pub fn new(has_flows: bool, session_count: usize) -> Sender<T> {
        Sender {
            flow_stage: if has_flows { FlowStage::Going } else { FlowStage::Over },
            left: session_count,
            under_way: None,
            since: 0,
            try_at: None,
            session_refused: false,
            flows_kept: 0,
            is_parking: false,
            gone: false,
        }
    }

    /// Nobody answers: what the channel holds is as good as taken.
    pub fn park(&mut self) {
        self.is_parking = true;
    }

    /// Whether nobody answers.
    pub fn is_parking(&self) -> bool {
        self.is_parking
    }

    /// What to do; sessions go only where they may.
    pub fn next(&mut self, now: u64, sessions_may_go: bool) -> Next {
        if self.under_way.is_some() {
            return Next::Listen;
        }
        if self.try_at.is_some_and(|at| at > now) {
            return Next::Wait;
        }
        self.try_at = None;
        match self.flow_stage {
            FlowStage::Going => return Next::Flows,
            FlowStage::Ending => {
                self.flow_stage = FlowStage::Over;
                return Next::FlowsDone;
            }
            FlowStage::Over => {}
        }
        if self.left > 0 && !sessions_may_go {
            Next::Wait
        } else if self.left == 0 || self.session_refused {
            Next::End { refused: self.session_refused }
        } else {
            Next::Sessions(self.left)
        }
    }

    /// These are packed, lie still here, and are about to be sent.
    pub fn begin(&mut self, kind: Kind, items: Vec<T>, now: u64) {
        debug_assert!(self.under_way.is_none() && !items.is_empty());
        self.since = now;
        self.under_way = Some((kind, items));
    }

    /// The bundle was sent. Who parks has no answer to wait for.
    pub fn handle_sent(&mut self) -> Verdict<T> {
        if self.is_parking { self.handle_taken(&[]) } else { Verdict::none() }
    }

    /// The kernel would not carry the bundle now: it is not under way, and its
    /// items are the caller's to keep for a later one. `None` where it stays,
    /// for a channel that is parked never empties, and the sending has failed.
    pub fn handle_congested(&mut self, now: u64) -> Option<Vec<T>> {
        if self.is_parking {
            return None;
        }
        self.try_at = Some(now + TRY_AGAIN);
        self.under_way.take().map(|(_, items)| items)
    }

    /// There was nothing to pack.
    pub fn handle_none_left(&mut self, kind: Kind) {
        match kind {
            Kind::Flows => self.flow_stage = FlowStage::Ending,
            Kind::Sessions => self.left = 0,
        }
    }

    /// What the receiver said, or did not.
    pub fn handle_answer(&mut self, answer: &Answer, now: u64) -> Reaction<T> {
        match answer {
            Answer::Taken(refused) => Reaction::Settle(self.handle_taken(refused)),
            Answer::Nothing if now.saturating_sub(self.since) <= PATIENCE => Reaction::Wait,
            Answer::Nothing | Answer::Refused | Answer::OutOfTurn => Reaction::GiveUp,
            Answer::Gone => {
                self.gone = true;
                Reaction::GiveUp
            }
            Answer::Failed { gone } => {
                self.gone = *gone;
                Reaction::GiveUp
            }
        }
    }

    /// What lay in the channel when it was cut: an acknowledgement counts.
    pub fn handle_late(&mut self, answer: &Answer) -> Verdict<T> {
        match answer {
            Answer::Taken(refused) => return self.handle_taken(refused),
            // It let go of the channel, but it lives.
            Answer::Refused => self.gone = false,
            Answer::OutOfTurn | Answer::Nothing | Answer::Gone | Answer::Failed { .. } => {}
        }
        Verdict::none()
    }

    /// The channel is cut and read to its end: what was not acknowledged never
    /// will be, and goes on here.
    pub fn give_up(&mut self) -> Verdict<T> {
        let Some((kind, items)) = self.under_way.take() else { return Verdict::none() };
        if kind == Kind::Flows {
            self.flows_kept += items.len();
        }
        Verdict { moved: Vec::new(), kept: items }
    }

    fn handle_taken(&mut self, refused: &[usize]) -> Verdict<T> {
        let Some((kind, items)) = self.under_way.take() else { return Verdict::none() };
        let mut verdict = Verdict::none();
        for (index, item) in items.into_iter().enumerate() {
            let list = if refused.contains(&index) { &mut verdict.kept } else { &mut verdict.moved };
            list.push(item);
        }
        match kind {
            Kind::Flows => self.flows_kept += verdict.kept.len(),
            Kind::Sessions => {
                self.session_refused |= !verdict.kept.is_empty();
                self.left -= verdict.moved.len();
            }
        }
        verdict
    }

    /// When `next` is to be asked again at the latest; `None` where an event or
    /// the caller's leave to send sessions will come.
    pub fn next_deadline(&self, now: u64, sessions_may_go: bool) -> Option<u64> {
        if self.under_way.is_some() {
            return Some(self.since + PATIENCE + 1);
        }
        let waits_for_leave = self.flow_stage == FlowStage::Over && self.left > 0 && !sessions_may_go;
        match self.try_at {
            None if waits_for_leave => None,
            None => Some(now),
            at => at,
        }
    }

    /// The items of the bundle that is under way.
    pub fn under_way(&self) -> &[T] {
        self.under_way.as_ref().map_or(&[], |(_, items)| items)
    }

    /// Up to which number its bundles are known to be taken, the last of them
    /// having this one.
    pub fn heard(&self, last: u64) -> u64 {
        if self.under_way.is_none() { last } else { last - 1 }
    }

    /// Flows of bundles that the receiver would not have.
    pub fn flows_kept(&self) -> usize {
        self.flows_kept
    }

    /// Whether it gave up because the receiver ended.
    pub fn is_receiver_gone(&self) -> bool {
        self.gone
    }
}

/// A bundle that is being taken in: what found a place here lies still.
#[derive(Debug)]
pub struct Taking<T> {
    taken: Vec<T>,
    refused: Vec<usize>,
}

/// What becomes of a bundle that was taken in.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome<T> {
    /// They are this process's: they may be polled.
    Activate(Vec<T>),
    /// The sender will go on with them: here they never were.
    Undo(Vec<T>),
}

impl<T> Taking<T> {
    /// Nothing yet.
    pub fn begin() -> Taking<T> {
        Taking { taken: Vec::new(), refused: Vec::new() }
    }

    /// The next of the bundle; `None` = it has no place here.
    pub fn note(&mut self, item: Option<T>) {
        let index = self.taken.len() + self.refused.len();
        match item {
            Some(item) => self.taken.push(item),
            None => self.refused.push(index),
        }
    }

    /// What is to be counted before it is acknowledged.
    pub fn taken(&self) -> &[T] {
        &self.taken
    }

    /// What the acknowledgement says.
    pub fn refused(&self) -> &[usize] {
        &self.refused
    }

    /// The acknowledgement went out, or could not.
    pub fn handle_said(self, went_out: bool) -> Outcome<T> {
        if went_out { Outcome::Activate(self.taken) } else { Outcome::Undo(self.taken) }
    }
}

/// How long a receiver leaves clients' datagrams unread for one sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Awaited {
    until: Option<u64>,
}

impl Awaited {
    /// A sender was announced, with flows or without.
    pub fn begin(flows: bool, now: u64) -> Awaited {
        Awaited { until: flows.then_some(now + PATIENCE) }
    }

    /// It has said something.
    pub fn handle_word(&mut self, now: u64) {
        self.until = self.until.map(|_| now + PATIENCE);
    }

    /// No further flows will come.
    pub fn handle_flows_done(&mut self) {
        self.until = None;
    }

    /// Whether flows are still to come.
    pub fn holds(&self, now: u64) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// When it holds no longer.
    pub fn deadline(&self) -> Option<u64> {
        self.until
    }

    /// Whether its time has run out; said once.
    pub fn expire(&mut self, now: u64) -> bool {
        self.until.take_if(|until| *until <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sending(kind: Kind) -> Sender<u32> {
        let mut sender = Sender::new(kind == Kind::Flows, 10);
        sender.begin(kind, vec![1, 2, 3], 100);
        assert_eq!(sender.handle_sent(), Verdict::none());
        sender
    }

    #[test]
    fn flows_go_first_and_sessions_when_they_may() {
        let mut sender: Sender<u32> = Sender::new(true, 10);
        assert_eq!(sender.next(0, false), Next::Flows);
        sender.handle_none_left(Kind::Flows);
        assert_eq!(sender.next(0, false), Next::FlowsDone);
        assert_eq!((sender.next(0, false), sender.next_deadline(0, false)), (Next::Wait, None));
        assert_eq!(sender.next(0, true), Next::Sessions(10));
        sender.handle_none_left(Kind::Sessions);
        assert_eq!(sender.next(0, false), Next::End { refused: false });
    }

    #[test]
    fn what_is_refused_is_kept_and_no_further_session_goes() {
        let mut sender = sending(Kind::Sessions);
        let settled = Verdict { moved: vec![1, 3], kept: vec![2] };
        assert_eq!(sender.handle_answer(&Answer::Taken(vec![1, 99]), 100), Reaction::Settle(settled));
        assert_eq!(sender.next(100, true), Next::End { refused: true });
    }

    #[test]
    fn silence_and_every_other_end_keep_what_was_not_acknowledged() {
        for (answer, gone) in [
            (Answer::Nothing, false),
            (Answer::Refused, false),
            (Answer::OutOfTurn, false),
            (Answer::Gone, true),
            (Answer::Failed { gone: true }, true),
            (Answer::Failed { gone: false }, false),
        ] {
            let mut sender = sending(Kind::Flows);
            assert_eq!(sender.handle_answer(&Answer::Nothing, 100 + PATIENCE), Reaction::Wait);
            assert_eq!(sender.handle_answer(&answer, 101 + PATIENCE), Reaction::GiveUp);
            assert_eq!(sender.give_up().kept, [1, 2, 3]);
            assert_eq!((sender.is_receiver_gone(), sender.flows_kept()), (gone, 3));
        }
    }

    #[test]
    fn an_acknowledgement_that_lay_in_the_cut_channel_counts() {
        let mut sender = sending(Kind::Sessions);
        assert_eq!(sender.handle_answer(&Answer::Failed { gone: true }, 100), Reaction::GiveUp);
        assert_eq!(sender.handle_late(&Answer::Taken(vec![0])), Verdict { moved: vec![2, 3], kept: vec![1] });
        assert_eq!(sender.handle_late(&Answer::Refused), Verdict::none());
        assert_eq!(sender.give_up(), Verdict::none());
        assert!(!sender.is_receiver_gone());
    }

    #[test]
    fn a_congested_bundle_is_tried_again_unless_it_is_parked() {
        let mut sender: Sender<u32> = Sender::new(true, 0);
        sender.begin(Kind::Flows, vec![1], 100);
        assert_eq!(sender.handle_congested(100), Some(vec![1]));
        assert_eq!((sender.next(104, true), sender.next_deadline(104, true)), (Next::Wait, Some(105)));
        assert_eq!(sender.next(105, true), Next::Flows);
        sender.park();
        sender.begin(Kind::Flows, vec![1], 105);
        assert_eq!(sender.handle_congested(105), None);
        assert_eq!(sender.give_up().kept, [1]);
        sender.begin(Kind::Flows, vec![2], 105);
        assert_eq!(sender.handle_sent().moved, [2]);
    }
}
