//! The pretend world: processes that hold items, and the channels between
//! them. One call of `step` is one thing that one process does; whatever
//! another one could see of it is a step of its own.

use std::collections::BTreeMap;

use evenkeel::handover::protocol::{
    Answer, Kind, Next, Outcome, PATIENCE, Reaction, Sender, Taking, Verdict,
};

use super::channel::{Channel, Heard, Item, Message, RECEIVER, SENDER};
use super::dice::Dice;

/// The largest bundle of this world.
const MOST: u64 = 4;
/// Even items are flows.
fn kind_of(item: Item) -> Kind {
    if item.is_multiple_of(2) { Kind::Flows } else { Kind::Sessions }
}

/// What is done wrongly on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    None,
    ForgetsBeforeTaken,
    PollsBeforeTaken,
    PollsWhatCouldNotBeSaid,
    DoesNotCut,
    IgnoresLateAnswers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Polled,
    Still,
}

#[derive(Default)]
struct Process {
    dead: bool,
    items: BTreeMap<Item, Hold>,
    /// What its counters say that it has.
    gauge: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Sending,
    Failing,
    Cut { errors: u32 },
    Keeping,
    Ended,
}

/// One sender's way out.
struct Way {
    process: usize,
    channel: usize,
    state: Sender<Item>,
    flows: Vec<Item>,
    stage: Stage,
}

enum Doing {
    Listening,
    Answering(Taking<Item>),
    Acting(Outcome<Item>),
    Ended,
}

/// One receiver's way in.
struct Intake {
    process: usize,
    channel: usize,
    doing: Doing,
    asleep_until: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scenario {
    /// A successor gets all; if it dies, the next one does.
    HandOver,
    /// A neighbour gets some sessions.
    Share,
    /// Two neighbours get the flows that are theirs.
    Passing,
}

pub struct World {
    dice: Dice,
    flaw: Flaw,
    scenario: Scenario,
    now: u64,
    sessions_may_go_at: u64,
    processes: Vec<Process>,
    channels: Vec<Channel>,
    ways: Vec<Way>,
    intakes: Vec<Intake>,
    /// Who gets; the sender is process 0.
    pub getters: Vec<usize>,
    /// Whose each item is; the truth, which no process sees.
    owners: BTreeMap<Item, usize>,
    accepted: u32,
    ended: usize,
    lost: usize,
    booked_as_lost: usize,
    deaths: usize,
    odds_of_refusal: u64,
    odds_of_nonsense: u64,
    odds_of_congestion: u64,
    odds_of_failure: u64,
    odds_of_sleep: u64,
}

impl World {
    pub fn new(seed: u64, flaw: Flaw) -> World {
        let mut dice = Dice(seed);
        let scenarios = [Scenario::HandOver, Scenario::HandOver, Scenario::Share, Scenario::Passing];
        let scenario = scenarios[dice.roll(4) as usize];
        let mut odds = |most: u64| if dice.roll(2) == 0 { 0 } else { most };
        let mut world = World {
            odds_of_refusal: odds(4),
            odds_of_nonsense: odds(1),
            odds_of_congestion: odds(4),
            odds_of_failure: odds(1),
            odds_of_sleep: odds(2),
            sessions_may_go_at: odds(3_000),
            dice,
            flaw,
            scenario,
            now: 0,
            processes: vec![Process::default()],
            channels: Vec::new(),
            ways: Vec::new(),
            intakes: Vec::new(),
            getters: Vec::new(),
            owners: BTreeMap::new(),
            accepted: 0,
            ended: 0,
            lost: 0,
            booked_as_lost: 0,
            deaths: 0,
        };
        for _ in 0..4 + world.dice.roll(12) {
            world.accept(0);
        }
        for getter in 0..if scenario == Scenario::Passing { 2 } else { 1 } {
            world.processes.push(Process::default());
            world.getters.push(getter + 1);
            world.join(getter);
        }
        world
    }

    fn accept(&mut self, process: usize) {
        let item = self.accepted;
        self.accepted += 1;
        self.owners.insert(item, process);
        self.processes[process].items.insert(item, Hold::Polled);
        self.processes[process].gauge += 1;
    }

    fn polled(&self, process: usize, kind: Kind) -> Vec<Item> {
        let items = self.processes[process].items.iter();
        items
            .filter(|(item, hold)| **hold == Hold::Polled && kind_of(**item) == kind)
            .map(|(item, _)| *item)
            .collect()
    }

    /// The sender begins to send to one that gets.
    fn join(&mut self, getter: usize) {
        let flows = self.polled(0, Kind::Flows);
        let (flows, mut state) = match self.scenario {
            Scenario::HandOver => (flows, Sender::new(true, usize::MAX)),
            Scenario::Share => (Vec::new(), Sender::new(false, 1 + self.dice.roll(6) as usize)),
            Scenario::Passing => {
                (flows.into_iter().filter(|item| *item as usize / 2 % 2 == getter).collect(), {
                    Sender::new(true, 0)
                })
            }
        };
        if self.flaw == Flaw::ForgetsBeforeTaken {
            state.park();
        }
        let channel = self.channels.len();
        self.channels.push(Channel::default());
        self.ways.push(Way { process: 0, channel, state, flows, stage: Stage::Sending });
        let process = self.getters[getter];
        self.intakes.push(Intake { process, channel, doing: Doing::Listening, asleep_until: 0 });
    }

    pub fn kill(&mut self, process: usize) {
        if std::mem::replace(&mut self.processes[process].dead, true) {
            return;
        }
        self.deaths += 1;
        self.processes[process].items.clear();
        self.booked_as_lost += std::mem::take(&mut self.processes[process].gauge);
        let before = self.owners.len();
        self.owners.retain(|_, owner| *owner != process);
        self.lost += before - self.owners.len();
        for way in self.ways.iter_mut().filter(|way| way.process == process) {
            way.stage = Stage::Ended;
            self.channels[way.channel].close(SENDER);
        }
        for intake in self.intakes.iter_mut().filter(|intake| intake.process == process) {
            intake.doing = Doing::Ended;
            self.channels[intake.channel].close(RECEIVER);
        }
    }

    /// A successor that died has a successor, and what is left goes there.
    fn supervise(&mut self) -> bool {
        let is_due = self.scenario == Scenario::HandOver && self.processes[self.getters[0]].dead;
        if is_due {
            self.processes.push(Process::default());
            self.getters[0] = self.processes.len() - 1;
            if !self.processes[0].dead {
                for way in 0..self.ways.len() {
                    if self.ways[way].stage == Stage::Sending {
                        self.ways[way].stage = Stage::Failing;
                    }
                    while self.ways[way].stage != Stage::Ended {
                        self.step_way(way);
                    }
                }
                self.join(0);
            }
        }
        is_due
    }

    fn step_way(&mut self, index: usize) {
        let now = self.now;
        let (process, channel, stage) = {
            let way = &self.ways[index];
            (way.process, way.channel, way.stage)
        };
        match stage {
            Stage::Sending => {
                let may_go = now >= self.sessions_may_go_at;
                match self.ways[index].state.next(now, may_go) {
                    Next::Wait => {}
                    Next::Flows => {
                        let known = self.polled(process, Kind::Flows);
                        let mut items = std::mem::take(&mut self.ways[index].flows);
                        items.retain(|item| known.contains(item));
                        let rest = items.split_off(items.len().min(1 + self.dice.roll(MOST) as usize));
                        self.ways[index].flows = rest;
                        self.send(index, Kind::Flows, items);
                    }
                    Next::Sessions(most) => {
                        let mut items = self.polled(process, Kind::Sessions);
                        items.truncate(most.min(1 + self.dice.roll(MOST) as usize));
                        self.send(index, Kind::Sessions, items);
                    }
                    Next::FlowsDone => {
                        let sent = self.channels[channel].send(SENDER, Message::FlowsDone);
                        self.note_sending(index, sent);
                    }
                    Next::Listen => {
                        let answer = self.listen(channel);
                        match self.ways[index].state.handle_answer(&answer, now) {
                            Reaction::Wait => {}
                            Reaction::Settle(verdict) => self.settle(process, verdict),
                            Reaction::GiveUp => self.ways[index].stage = Stage::Failing,
                        }
                    }
                    Next::End { .. } => {
                        self.channels[channel].send(SENDER, Message::Done);
                        self.end_way(index);
                    }
                }
            }
            Stage::Failing => {
                self.channels[channel].shut = self.flaw != Flaw::DoesNotCut;
                self.ways[index].stage = Stage::Cut { errors: 0 };
            }
            Stage::Cut { errors } => {
                let answer = match self.flaw {
                    Flaw::IgnoresLateAnswers => Answer::Gone,
                    _ => self.listen(channel),
                };
                let errors = errors + u32::from(matches!(answer, Answer::Nothing | Answer::Failed { .. }));
                if answer == Answer::Gone || errors == 2 {
                    self.ways[index].stage = Stage::Keeping;
                    return;
                }
                let verdict = self.ways[index].state.handle_late(&answer);
                self.settle(process, verdict);
                self.ways[index].stage = Stage::Cut { errors };
            }
            Stage::Keeping => {
                let verdict = self.ways[index].state.give_up();
                self.settle(process, verdict);
                self.end_way(index);
            }
            Stage::Ended => {}
        }
    }

    fn send(&mut self, index: usize, kind: Kind, items: Vec<Item>) {
        let way = &mut self.ways[index];
        if items.is_empty() {
            return way.state.handle_none_left(kind);
        }
        let process = way.process;
        for item in &items {
            self.processes[process].items.insert(*item, Hold::Still);
        }
        way.state.begin(kind, items.clone(), self.now);
        if kind == Kind::Flows && self.dice.is(self.odds_of_congestion) {
            if let Some(items) = way.state.handle_congested(self.now) {
                way.flows.extend(&items);
                self.settle(process, Verdict { moved: Vec::new(), kept: items });
            }
            return;
        }
        let fails = self.dice.is(self.odds_of_failure);
        let sent = !fails && self.channels[way.channel].send(SENDER, Message::Bundle(items));
        self.note_sending(index, sent);
        if sent {
            let verdict = self.ways[index].state.handle_sent();
            self.settle(process, verdict);
        }
    }

    fn note_sending(&mut self, index: usize, sent: bool) {
        if !sent {
            let way = &mut self.ways[index];
            let gone = self.channels[way.channel].closed[RECEIVER];
            let _ = way.state.handle_answer(&Answer::Failed { gone }, self.now);
            way.stage = Stage::Failing;
        }
    }

    fn listen(&mut self, channel: usize) -> Answer {
        match self.channels[channel].receive(SENDER) {
            Heard::Message(Message::Taken(refused)) => Answer::Taken(refused),
            Heard::Message(Message::Refused) => Answer::Refused,
            Heard::Message(_) => Answer::OutOfTurn,
            Heard::Nothing => Answer::Nothing,
            Heard::End => Answer::Gone,
            Heard::Error => Answer::Failed { gone: true },
        }
    }

    fn settle(&mut self, process: usize, verdict: Verdict<Item>) {
        let process = &mut self.processes[process];
        for item in verdict.moved {
            process.items.remove(&item);
            process.gauge -= 1;
        }
        process.items.extend(verdict.kept.into_iter().map(|item| (item, Hold::Polled)));
    }

    fn end_way(&mut self, index: usize) {
        self.ways[index].stage = Stage::Ended;
        self.channels[self.ways[index].channel].close(SENDER);
    }

    fn step_intake(&mut self, index: usize) {
        if self.intakes[index].asleep_until > self.now {
            return;
        }
        if self.dice.is(self.odds_of_sleep) {
            self.intakes[index].asleep_until = self.now + self.dice.roll(2 * PATIENCE);
            return;
        }
        let (process, channel) = (self.intakes[index].process, self.intakes[index].channel);
        let doing = std::mem::replace(&mut self.intakes[index].doing, Doing::Ended);
        self.intakes[index].doing = match doing {
            Doing::Listening => match self.channels[channel].receive(RECEIVER) {
                Heard::Message(Message::Bundle(_)) if self.dice.is(self.odds_of_nonsense) => {
                    self.refuse(channel)
                }
                Heard::Message(Message::Bundle(items)) => Doing::Answering(self.take(process, items)),
                Heard::Message(Message::FlowsDone) | Heard::Nothing => Doing::Listening,
                Heard::Message(_) | Heard::End => self.end_intake(channel),
                Heard::Error => self.refuse(channel),
            },
            Doing::Answering(taking) => {
                let taken = taking.taken().to_vec();
                self.processes[process].gauge += taken.len();
                let answer = Message::Taken(taking.refused().to_vec());
                let fails = self.dice.is(self.odds_of_failure);
                let said = !fails && self.channels[channel].send(RECEIVER, answer);
                if said {
                    // Here, and at no other moment, they change hands.
                    self.owners.extend(taken.into_iter().map(|item| (item, process)));
                }
                Doing::Acting(taking.handle_said(said))
            }
            Doing::Acting(outcome) => {
                let here = &mut self.processes[process];
                match outcome {
                    Outcome::Activate(items) => {
                        here.items.extend(items.into_iter().map(|item| (item, Hold::Polled)));
                        Doing::Listening
                    }
                    Outcome::Undo(items) if self.flaw == Flaw::PollsWhatCouldNotBeSaid => {
                        here.items.extend(items.into_iter().map(|item| (item, Hold::Polled)));
                        Doing::Listening
                    }
                    Outcome::Undo(items) => {
                        here.gauge -= items.len();
                        here.items.retain(|item, _| !items.contains(item));
                        self.refuse(channel)
                    }
                }
            }
            Doing::Ended => Doing::Ended,
        };
    }

    fn take(&mut self, process: usize, items: Vec<Item>) -> Taking<Item> {
        let mut taking = Taking::begin();
        let hold = if self.flaw == Flaw::PollsBeforeTaken { Hold::Polled } else { Hold::Still };
        for item in items {
            let fits = !self.dice.is(self.odds_of_refusal);
            if fits {
                self.processes[process].items.insert(item, hold);
            }
            taking.note(fits.then_some(item));
        }
        taking
    }

    fn refuse(&mut self, channel: usize) -> Doing {
        self.channels[channel].send(RECEIVER, Message::Refused);
        self.end_intake(channel)
    }

    fn end_intake(&mut self, channel: usize) -> Doing {
        self.channels[channel].close(RECEIVER);
        Doing::Ended
    }

    /// Somebody comes or goes.
    fn live(&mut self) {
        let process = self.dice.roll(self.processes.len() as u64) as usize;
        if self.processes[process].dead || !self.dice.is(4) {
            return;
        }
        if process > 0 && self.dice.is(10) {
            return self.accept(process);
        }
        let kind = if self.dice.is(10) { Kind::Flows } else { Kind::Sessions };
        if let Some(item) = self.polled(process, kind).first() {
            self.processes[process].items.remove(item);
            self.processes[process].gauge -= 1;
            self.owners.remove(item);
            self.ended += 1;
        }
    }

    pub fn is_over(&self) -> bool {
        self.ways.iter().all(|way| way.stage == Stage::Ended)
            && self.intakes.iter().all(|intake| matches!(intake.doing, Doing::Ended))
            && !(self.scenario == Scenario::HandOver && self.processes[self.getters[0]].dead)
    }

    /// One of all who could do something does it.
    pub fn step(&mut self) {
        let (ways, intakes) = (self.ways.len(), self.intakes.len());
        let chosen = self.dice.roll((ways + intakes + 3) as u64) as usize;
        if chosen < ways {
            self.step_way(chosen);
        } else if chosen < ways + intakes {
            self.step_intake(chosen - ways);
        } else {
            match chosen - ways - intakes {
                0 => self.now += self.dice.roll(PATIENCE / 4),
                1 => self.live(),
                _ => drop(self.supervise()),
            }
        }
    }

    /// What holds at every moment.
    pub fn check(&self) -> Result<(), String> {
        for (number, process) in self.processes.iter().enumerate() {
            for item in process.items.iter().filter(|(_, hold)| **hold == Hold::Polled).map(|(item, _)| item)
            {
                match self.owners.get(item) {
                    Some(owner) if *owner == number => {}
                    owner => return Err(format!("{number} polls {item}, whose owner is {owner:?}")),
                }
            }
        }
        for (item, owner) in &self.owners {
            let process = &self.processes[*owner];
            if process.dead || !process.items.contains_key(item) {
                return Err(format!("{item} is of {owner}, who does not have it"));
            }
        }
        match self.owners.len() + self.ended + self.lost == self.accepted as usize {
            true => Ok(()),
            false => Err("accepted is not live, ended and lost".into()),
        }
    }

    /// What holds when all is quiet.
    pub fn check_end(&self) -> Result<(), String> {
        for (number, process) in self.processes.iter().enumerate() {
            for (item, hold) in &process.items {
                if self.owners.get(item) != Some(&number) || *hold != Hold::Polled {
                    return Err(format!("{number} is left with {item}, {hold:?}"));
                }
            }
        }
        let gauges: usize = self.processes.iter().map(|process| process.gauge).sum();
        if gauges != self.owners.len() {
            return Err(format!("{gauges} are counted where {} live", self.owners.len()));
        }
        // A sender that dies between its receiver's word and its own reading
        // of it still counts the one bundle: too many lost, never too few.
        let bundles = self.deaths * self.getters.len() * MOST as usize;
        if self.booked_as_lost < self.lost || self.booked_as_lost > self.lost + bundles {
            return Err(format!("{} are booked as lost, {} are", self.booked_as_lost, self.lost));
        }
        match self.deaths == 0 && self.lost > 0 {
            true => Err("something is lost, and nobody died".into()),
            false => Ok(()),
        }
    }
}
