//! The slots' processes: how they come, what they say, how they end.

use std::os::fd::OwnedFd;
use std::process::{ExitCode, ExitStatus};
use std::rc::Rc;

use mio::Token;
use tracing::{error, info, warn};

use super::leave::Leave;
use super::slot::{Role, Slot};
use super::{Refusal, Supervisor};
use crate::control::{FromWorker, ToWorker};
use crate::supervision::{Action, Event};
use crate::sys::clock;

impl Supervisor {
    /// Lets supervision decide, and does what it says.
    pub(super) fn step(&mut self, event: Event) -> Result<(), Refusal> {
        for action in self.supervision.step(event, clock::coarse()) {
            match action {
                Action::Spawn(slot) => self.spawn(slot)?,
                Action::Lend { slot, to } => self.lend(slot, to),
                Action::Recall { slot, from } => {
                    self.slots[from].tell(&ToWorker::Recall { slot });
                    self.to_give_back.push((from, slot));
                }
                Action::Drain(slot) => self.drain(slot),
                Action::Kill(slot) => {
                    if let Some(process) = &mut self.slots[slot].current {
                        process.kill();
                    }
                }
                Action::Announce => self.announce(),
                Action::Finish => self.finishing = true,
            }
        }
        Ok(())
    }

    pub(super) fn spawn(&mut self, slot: usize) -> Result<(), Refusal> {
        // The daemon is over: a worker that was killed for that is no crash,
        // and nobody would end a new one.
        if self.end.is_some() {
            return Ok(());
        }
        if self.take_proved(slot) {
            return Ok(());
        }
        let token = self.new_token();
        let generation = Rc::clone(&self.generation);
        match self.slots[slot].spawn(&self.prepared, &generation, self.poll.registry(), token) {
            Ok(process) => {
                self.slots[slot].current = Some(process);
                if self.owes_flows_to(slot) {
                    self.slots[slot].tell(&ToWorker::Hold);
                }
                self.hand_over_again(slot);
                self.slots[slot].tell(&ToWorker::Serve);
                self.watch.begin(slot, clock::coarse());
                Ok(())
            }
            Err(error) if self.announced => {
                error!(slot, %error, "no worker could be started");
                self.step(Event::Exited { slot, clean: false })
            }
            Err(error) => {
                self.kill_all();
                Err(Refusal::new(1, format!("worker {slot} could not be started: {error}"), ""))
            }
        }
    }

    pub(super) fn lend(&mut self, slot: usize, to: usize) {
        warn!("slot {slot} stays empty: slot {to} accepts for it");
        // Duplicates first: two slots cannot be borrowed at once.
        let Some(generation) = self.slots[to].current.as_ref().map(|process| Rc::clone(&process.generation))
        else {
            return;
        };
        let sockets = self.slots[slot].duplicates(&generation);
        self.slots[to].lend(slot, &sockets);
    }

    pub(super) fn drain(&mut self, slot: usize) {
        let limit = self.leave.as_ref().and_then(|leave| leave.left(clock::coarse()));
        if self.is_parking {
            self.park(slot, limit);
        } else {
            self.slots[slot].drain(limit);
        }
    }

    pub(super) fn announce(&mut self) {
        // Before anybody is told to come: what comes has to find its slot at once.
        self.update_steering();
        self.announced = true;
        let listeners: Vec<String> =
            self.generation.config.listeners.iter().map(|l| l.name.clone()).collect();
        info!("ready: {} workers accept on {}", self.slots.len(), listeners.join(", "));
        // Whoever hears that all is ready and asks is not told otherwise.
        self.tell_steward();
        self.notify.announce(clock::coarse(), &self.facts());
        if let Some(greeting) = self.start.greeting.take() {
            eprint!("{greeting}");
        }
    }

    /// Ends the daemon when the last process of the last slot has left.
    pub(super) fn check_finished(&mut self) {
        let finishes = self.slots.iter().chain(&self.retiring).any(|slot| !slot.old.is_empty());
        if self.finishing && !finishes && self.end.is_none() {
            info!("every worker has left");
            if self.is_parking {
                self.store_lots();
            }
            self.end = Some(self.leave.as_ref().map_or(ExitCode::SUCCESS, Leave::exit_code));
        }
    }

    /// The slot, retiring or not, of the process with this token.
    pub(super) fn locate(&mut self, token: Token) -> Option<(usize, bool, Role)> {
        for (retiring, slots) in [(false, &mut self.slots), (true, &mut self.retiring)] {
            for (index, slot) in slots.iter_mut().enumerate() {
                if let Some((role, _)) = slot.find(token) {
                    return Some((index, retiring, role));
                }
            }
        }
        None
    }

    pub(super) fn slot_mut(&mut self, index: usize, retiring: bool) -> &mut Slot {
        if retiring { &mut self.retiring[index] } else { &mut self.slots[index] }
    }

    pub(super) fn read_process(&mut self, token: Token) -> Result<(), Refusal> {
        if self.read_trial(token) {
            return Ok(());
        }
        // Looked up each time: a message may change the slots.
        while let Some((index, retiring, role)) = self.locate(token) {
            let slots = if retiring { &mut self.retiring } else { &mut self.slots };
            let Some((_, process)) = slots[index].find(token) else { return Ok(()) };
            let Some((message, fds)) = process.receive(self.poll.registry()) else { return Ok(()) };
            self.handle_worker(token, (index, retiring, role), message, fds)?;
        }
        Ok(())
    }

    pub(super) fn handle_worker(
        &mut self,
        token: Token,
        (slot, retiring, role): (usize, bool, Role),
        message: FromWorker,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        match message {
            FromWorker::Sockets(places) => {
                let Some((_, process)) = self.slot_mut(slot, retiring).find(token) else { return Ok(()) };
                let generation = Rc::clone(&process.generation);
                if let Err(error) = self.slot_mut(slot, retiring).hold(&generation, places, fds) {
                    warn!(slot, %error, "the worker's sockets were refused");
                }
            }
            FromWorker::Opened if role == Role::Next => self.handle_proved(slot),
            FromWorker::Opened if role == Role::Current => self.step(Event::Opened(slot))?,
            FromWorker::Ready if role == Role::Current => {
                info!(slot, pid = self.slots[slot].pid(), "worker ready");
                self.step(Event::Ready(slot))?;
                self.unpark(slot);
            }
            FromWorker::Opened | FromWorker::Ready => {}
            FromWorker::Keeper { pid, why } => self.handle_keeper(token, pid, why),
            FromWorker::Recovered(kept) => self.handle_recovered(slot, &kept),
            FromWorker::Unparked => self.handle_unparked(slot),
            FromWorker::QueuesClosed if retiring => self.retiring[slot].release_sockets(),
            FromWorker::QueuesClosed if role == Role::Old => {
                let generation = Rc::clone(&self.generation);
                self.slots[slot].release_all_but(&generation);
            }
            FromWorker::QueuesClosed => self.slots[slot].release_sockets(),
            FromWorker::HandedOver { moved, left, gone } => {
                info!(slot, "{moved} sessions handed over, {left} left");
                let is_keeper = self.slot_mut(slot, retiring).find(token).is_some_and(|(_, p)| p.is_keeper);
                if is_keeper && left > 0 && (retiring || !gone) {
                    // Its receiver was silent, not dead, or hands over itself.
                    self.pair_old_keeper(slot, retiring, token);
                } else if role == Role::Old && gone && !retiring {
                    // The rest goes to whoever comes next in that place.
                    info!(slot, "the worker that was to have them is being replaced");
                } else if role == Role::Old {
                    if let Some((_, old)) = self.slot_mut(slot, retiring).find(token) {
                        old.handed_over = true;
                    }
                    self.handle_handed_over(slot, retiring);
                } else {
                    self.handle_shared(slot);
                }
            }
            FromWorker::Held if role == Role::Current && !retiring => self.handle_held(slot),
            FromWorker::FlowsPassed { moved, left } if role == Role::Current && !retiring => {
                self.handle_flows_passed(slot, moved, left);
            }
            FromWorker::Held | FromWorker::FlowsPassed { .. } => {}
            // That it woke the supervisor is all: every turn looks at the workers.
            FromWorker::Awake => {}
            FromWorker::Found { id } => self.handle_found(token, id, fds),
            FromWorker::Failed { text, advice, .. } if role == Role::Next => {
                self.abort_reload(&format!("{text}\n{advice}"));
            }
            FromWorker::Failed { text, advice, exit_code } if !self.announced => {
                self.kill_all();
                return Err(Refusal { text, advice, exit_code });
            }
            FromWorker::Failed { text, .. } => error!(slot, "{text}"),
        }
        Ok(())
    }

    pub(super) fn reap(&mut self) -> Result<(), Refusal> {
        for (number, slot) in self.slots.iter().enumerate() {
            if let Some(is_stopped) = slot.try_stop() {
                let what = if is_stopped { "stopped: it gets nothing new" } else { "continued" };
                warn!(slot = number, "worker {what}");
                self.steering.handle_stop(number, is_stopped);
                // One that sleeps does not show it.
                self.watch.doubt(number, clock::coarse());
            }
        }
        let all = self.slots.iter_mut().chain(&mut self.retiring);
        let ended: Vec<(Token, ExitStatus)> = all
            .flat_map(Slot::processes)
            .filter_map(|process| Some((process.token, process.try_wait()?)))
            .collect();
        for (token, status) in ended {
            // Its last words came before its end.
            self.read_process(token)?;
            self.handle_ended(token, status)?;
        }
        self.reap_keepers();
        self.reap_upgrade();
        if self.steward.reap(self.poll.registry(), clock::coarse()) {
            self.start_steward();
        }
        Ok(())
    }

    pub(super) fn handle_ended(&mut self, token: Token, status: ExitStatus) -> Result<(), Refusal> {
        self.forget_in_inquiries(token);
        let Some((index, retiring, role)) = self.locate(token) else { return Ok(()) };
        let is_kept = self.bequeath(token, status);
        let slot = if retiring { &mut self.retiring[index] } else { &mut self.slots[index] };
        if let Some((_, process)) = slot.find(token).filter(|_| !is_kept) {
            process.close_channel(self.poll.registry());
        }
        match role {
            Role::Current => {
                // What they have not passed on goes to the next one.
                slot.set_handed_over(false);
                let dead = slot.current.take();
                if is_kept {
                    slot.old.extend(dead);
                } else if let Some(dead) = dead {
                    // At once, not only when a successor says so.
                    slot.forget_gauges(&dead);
                }
                if status.success() && self.leave.is_some() {
                    info!(slot = index, "worker has left");
                } else {
                    warn!(slot = index, "worker ended: {status}");
                    self.count_end(index, status);
                }
                if cfg!(debug_assertions) && std::env::var_os("EVENKEEL_TEST_HASTE").is_some() {
                    self.supervision.forgive(index);
                }
                self.note_shift_end_of(index);
                self.step(Event::Exited { slot: index, clean: status.success() })?;
                self.handle_shared(index);
            }
            Role::Next => {
                slot.next = None;
                self.abort_reload(&format!("worker {index} ended: {status}"));
            }
            Role::Old if is_kept => {
                warn!(slot = index, "an old worker ended: {status}");
                self.pair_old_keeper(index, retiring, token);
            }
            Role::Old => {
                if let Some(at) = slot.old.iter().position(|process| process.token == token) {
                    let dead = slot.old.remove(at);
                    slot.forget_gauges(&dead);
                }
                if !status.success() {
                    warn!(slot = index, "an old worker ended: {status}");
                }
                self.fold_ledgers();
                self.handle_handed_over(index, retiring);
            }
        }
        self.retiring.retain(|slot| !slot.old.is_empty());
        Ok(())
    }
}
