//! Which worker has gone silent: heartbeats, judged without a clock or a
//! process.
//!
//! A worker writes the time of each turn of its loop into shared memory. One
//! that sleeps does not turn, so it is asked to; a worker that is idle answers
//! and one that is stuck, or stopped, does not.
//!
//! ```text
//!   silence:   0 ------ 1/3 ------ 2/3 ------ 3/3 of hang_timeout
//!              beat     Ask        (looked)   Hung
//! ```
//!
//! Only time in which the supervisor itself ran counts. Whenever it looks
//! later than it meant to, the delay is forgiven to everybody: a machine or a
//! tree of processes that was paused finds nobody hung. A pause that fits
//! between two looks is not seen, which is why there is a look between asking
//! and judging: whoever is asked has a third of the time-out to turn.
//!
//! Owned by the supervisor, one entry a slot. It costs an idle daemon one
//! wake-up of each of its processes every third of `hang_timeout`: all slots
//! are asked together.

/// How long a birth may take, in milliseconds: exec, the configuration,
/// binding. A loaded machine is slow at that, and nobody answers meanwhile.
pub const BIRTH_PATIENCE: u64 = 10_000;

/// What a slot shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// No process, or one whose end is awaited.
    Absent,
    /// A process that is being born: it cannot answer yet.
    Starting,
    /// The time of the last beat.
    Beat(u64),
}

/// What is to be done about a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Have its loop turn once.
    Ask(usize),
    /// It gave no sign for so many milliseconds; said once a life.
    #[allow(missing_docs)]
    Hung { slot: usize, silence: u64 },
}

/// All slots.
#[derive(Debug)]
pub struct Watch {
    timeout: u64,
    lives: Vec<Option<Life>>,
    /// When the supervisor means to look again.
    due: Option<u64>,
}

/// What is known of the process in a slot.
#[derive(Clone, Copy, Debug)]
struct Life {
    /// The last sign of it.
    last: u64,
    /// Time since then in which the supervisor did not run.
    forgiven: u64,
    asked: bool,
    limit: u64,
}

impl Life {
    fn silence(&self, now: u64) -> u64 {
        now.saturating_sub(self.last).saturating_sub(self.forgiven)
    }

    /// When its silence reaches the next third of the limit. One that is
    /// almost reached counts as reached: an answer comes a moment after the
    /// question, and must not cost a second wake-up that much later.
    fn next_third(&self, now: u64) -> u64 {
        let third = self.third();
        let thirds = ((self.silence(now) + third / 8) / third + 1).min(3);
        let silence = if thirds == 3 { self.limit } else { thirds * third };
        self.last + self.forgiven + silence
    }

    fn third(&self) -> u64 {
        (self.limit / 3).max(1)
    }

    /// A silence after which it is asked.
    fn ripe(&self) -> u64 {
        self.third() - self.third() / 8
    }
}

impl Watch {
    /// So many slots, all empty; a worker may be silent for so many
    /// milliseconds.
    pub fn new(slot_count: usize, timeout: u64) -> Watch {
        Watch { timeout, lives: vec![None; slot_count], due: None }
    }

    /// There are so many slots from now on; a worker may be silent for so many
    /// milliseconds.
    pub fn resize(&mut self, slot_count: usize, timeout: u64) {
        self.timeout = timeout;
        self.lives.resize(slot_count, None);
    }

    /// A process was started for the slot.
    pub fn begin(&mut self, slot: usize, now: u64) {
        let life = Life { last: now, forgiven: 0, asked: false, limit: self.timeout.max(BIRTH_PATIENCE) };
        self.lives[slot] = Some(life);
        let first = life.next_third(now);
        self.due = Some(self.due.map_or(first, |due| due.min(first)));
    }

    /// The slot's process was there before we were, past its birth.
    pub fn resume(&mut self, slot: usize, now: u64) {
        self.begin(slot, now);
        if let Some(life) = &mut self.lives[slot] {
            life.limit = self.timeout;
            self.due = Some(self.due.map_or(now, |due| due.min(life.next_third(now))));
        }
    }

    /// Looks at every slot. Call it whenever the supervisor woke, and at
    /// `next_deadline` at the latest.
    pub fn look(&mut self, now: u64, signs: &[Sign]) -> Vec<Verdict> {
        let late = self.due.map_or(0, |due| now.saturating_sub(due));
        let mut verdicts = Vec::new();
        for (slot, (place, sign)) in self.lives.iter_mut().zip(signs).enumerate() {
            let Some(life) = place else { continue };
            match *sign {
                Sign::Absent => {
                    *place = None;
                    continue;
                }
                Sign::Starting => {}
                Sign::Beat(at) => {
                    life.limit = self.timeout;
                    // A worker may lie about the time; a beat to come is one of now.
                    if at.min(now) > life.last {
                        *life = Life { last: at.min(now), forgiven: 0, asked: false, ..*life };
                    }
                }
            }
            life.forgiven += late.min(now.saturating_sub(life.last));
            let silence = life.silence(now);
            if silence >= life.limit {
                verdicts.push(Verdict::Hung { slot, silence });
                *place = None;
            }
        }
        self.ask(now, signs, &mut verdicts);
        self.due = self.lives.iter().flatten().map(|life| life.next_third(now)).min();
        verdicts
    }

    /// When one is to be asked, all that are half as silent are asked with it:
    /// they share the supervisor's wake-up from then on.
    fn ask(&mut self, now: u64, signs: &[Sign], verdicts: &mut Vec<Verdict>) {
        let can_answer = |slot: usize| matches!(signs[slot], Sign::Beat(_));
        let silent_for = |life: &Life, span: u64| !life.asked && life.silence(now) >= span;
        let mut lives = self.lives.iter().enumerate().filter(|(slot, _)| can_answer(*slot));
        if !lives.any(|(_, life)| life.is_some_and(|life| silent_for(&life, life.ripe()))) {
            return;
        }
        for (slot, life) in self.lives.iter_mut().enumerate().filter(|(slot, _)| can_answer(*slot)) {
            if let Some(life) = life
                && silent_for(life, life.third().div_ceil(2))
            {
                life.asked = true;
                verdicts.push(Verdict::Ask(slot));
            }
        }
    }

    /// When `look` is due at the latest, in milliseconds.
    pub fn next_deadline(&self) -> Option<u64> {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Sign::{Absent, Beat, Starting};
    use super::Verdict::{Ask, Hung};
    use super::*;

    fn watch(slots: usize) -> Watch {
        let mut watch = Watch::new(slots, 300);
        for slot in 0..slots {
            watch.begin(slot, 0);
        }
        watch
    }

    #[test]
    fn a_silent_worker_is_asked_looked_at_and_found_hung() {
        let mut watch = watch(1);
        assert_eq!(watch.look(10, &[Beat(10)]), []);
        assert_eq!(watch.next_deadline(), Some(110));
        assert_eq!(watch.look(110, &[Beat(10)]), [Ask(0)]);
        assert_eq!(watch.next_deadline(), Some(210));
        assert_eq!(watch.look(210, &[Beat(10)]), [], "asked once");
        assert_eq!(watch.next_deadline(), Some(310));
        assert_eq!(watch.look(310, &[Beat(10)]), [Hung { slot: 0, silence: 300 }]);
        assert_eq!(watch.look(320, &[Beat(10)]), [], "said once");
        assert_eq!(watch.next_deadline(), None);
    }

    #[test]
    fn an_idle_worker_that_answers_is_asked_again_after_another_third() {
        let mut watch = watch(1);
        watch.look(0, &[Beat(0)]);
        // It answers four milliseconds after the question.
        let (mut now, mut last) = (100, 4);
        for _ in 0..100 {
            assert_eq!(watch.look(now, &[Beat(last)]), [Ask(0)]);
            let due = watch.next_deadline().unwrap();
            assert!((now + 100..=now + 104).contains(&due), "one wake-up a third, no more: {due}");
            (last, now) = (now + 4, due);
        }
    }

    #[test]
    fn a_busy_worker_is_never_asked() {
        let mut watch = watch(1);
        for now in (0..10_000).step_by(100) {
            assert_eq!(watch.look(now, &[Beat(now)]), []);
        }
    }

    #[test]
    fn slots_come_to_be_asked_together() {
        let mut watch = watch(2);
        watch.look(40, &[Beat(0), Beat(40)]);
        assert_eq!(watch.look(100, &[Beat(0), Beat(40)]), [Ask(0), Ask(1)]);
        watch.look(101, &[Beat(100), Beat(100)]);
        assert_eq!(watch.next_deadline(), Some(200));
    }

    #[test]
    fn a_supervisor_that_was_paused_finds_nobody_hung() {
        let mut watch = watch(1);
        watch.look(0, &[Beat(0)]);
        assert_eq!(watch.look(100, &[Beat(0)]), [Ask(0)]);
        // Paused with everybody else until long past the time-out.
        assert_eq!(watch.look(5_000, &[Beat(0)]), []);
        assert_eq!(watch.next_deadline(), Some(5_100), "a third is left to answer");
        assert_eq!(watch.look(5_010, &[Beat(5_005)]), []);
        // Who was stuck before the pause is stuck after it.
        assert_eq!(watch.look(5_105, &[Beat(5_005)]), [Ask(0)]);
        watch.look(5_205, &[Beat(5_005)]);
        assert_eq!(watch.look(5_305, &[Beat(5_005)]), [Hung { slot: 0, silence: 300 }]);
    }

    #[test]
    fn an_idle_worker_that_was_there_before_is_asked_in_time() {
        let mut watch = Watch::new(1, 300);
        watch.resume(0, 0);
        assert_eq!(watch.next_deadline(), Some(100));
        assert_eq!(watch.look(100, &[Beat(0)]), [Ask(0)]);
        assert_eq!(watch.look(150, &[Beat(102)]), [], "it has answered");
    }

    #[test]
    fn a_birth_has_more_time_and_cannot_answer() {
        let mut watch = watch(1);
        let mut now = 0;
        while let Some(due) = watch.next_deadline().filter(|&due| due < BIRTH_PATIENCE) {
            now = due;
            assert_eq!(watch.look(now, &[Starting]), []);
        }
        assert!(now >= BIRTH_PATIENCE / 3);
        assert_eq!(watch.look(BIRTH_PATIENCE, &[Starting]), [Hung { slot: 0, silence: BIRTH_PATIENCE }]);
    }

    #[test]
    fn the_beats_of_the_last_life_say_nothing_of_the_next() {
        let mut watch = watch(1);
        assert_eq!(watch.look(50, &[Absent]), []);
        watch.begin(0, 1_000);
        assert_eq!(watch.look(1_000, &[Beat(40)]), []);
        assert_eq!(watch.look(1_100, &[Beat(40)]), [Ask(0)]);
    }

    #[test]
    fn a_beat_from_the_future_is_one_of_now() {
        let mut watch = watch(1);
        watch.look(0, &[Beat(u64::MAX)]);
        watch.look(100, &[Beat(0)]);
        watch.look(200, &[Beat(0)]);
        assert_eq!(watch.look(300, &[Beat(0)]), [Hung { slot: 0, silence: 300 }]);
    }

    /// One worker of the simulation.
    #[derive(Clone, Copy, Debug)]
    struct Worker {
        beat: u64,
        /// Turns by itself that often; 0 = only when it is asked.
        rhythm: u64,
        asked_at: Option<u64>,
        frozen_at: Option<u64>,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// A minute in steps of 5 ms: busy and idle workers, pauses of the
        /// whole tree and of the supervisor, and workers that freeze for good.
        /// Nobody who lives is found hung, everybody who froze is, in time.
        #[test]
        fn who_lives_is_spared_and_who_froze_is_found(
            timeout in 120u64..4_000,
            workers in prop::collection::vec((0u64..3, prop::option::of(1_000u64..50_000)), 1..6),
            pauses in prop::collection::vec((any::<bool>(), 1u64..8_000), 0..6),
            delay in 0u64..100,
        ) {
            let mut watch = Watch::new(workers.len(), timeout);
            let mut workers: Vec<Worker> = workers
                .into_iter()
                .map(|(kind, frozen_at)| {
                    let rhythm = [0, timeout / 10, timeout / 2][kind as usize] / 5 * 5;
                    Worker { beat: 0, rhythm, asked_at: None, frozen_at }
                })
                .collect();
            (0..workers.len()).for_each(|slot| watch.begin(slot, 0));
            // Ready: the message wakes the supervisor.
            watch.look(0, &vec![Beat(0); workers.len()]);
            // Apart by more than it takes to answer.
            let mut begin = 500;
            let mut paused = Vec::new();
            for (whole, length) in pauses {
                paused.push((whole, begin, begin + length));
                begin += length + 2 * timeout;
            }
            let answer_after = timeout * delay / 400;
            let mut found: Vec<Option<u64>> = vec![None; workers.len()];
            for now in (0..=begin + 60_000).step_by(5) {
                let pause = paused.iter().find(|(_, from, to)| (*from..*to).contains(&now));
                if pause.is_none_or(|(whole, ..)| !whole) {
                    for worker in &mut workers {
                        if worker.frozen_at.is_some_and(|at| at <= now) {
                            continue;
                        }
                        let turns = worker.rhythm > 0 && now % worker.rhythm.max(5) == 0;
                        // An answer takes running time; a pause is not told
                        // from it by who waits, so it counts from its end.
                        let resumed = paused.iter().filter(|(whole, _, to)| *whole && *to <= now).map(|p| p.2).max();
                        let answers = worker
                            .asked_at
                            .is_some_and(|at| at.max(resumed.unwrap_or(0)) + answer_after <= now);
                        if turns || answers {
                            worker.beat = now;
                            worker.asked_at = None;
                        }
                    }
                }
                if pause.is_none() && watch.next_deadline().is_none_or(|due| due <= now) {
                    let signs: Vec<Sign> = (0..workers.len())
                        .map(|slot| if found[slot].is_some() { Absent } else { Beat(workers[slot].beat) })
                        .collect();
                    for verdict in watch.look(now, &signs) {
                        match verdict {
                            Ask(slot) => workers[slot].asked_at = Some(now),
                            Hung { slot, .. } => {
                                let frozen = workers[slot].frozen_at.filter(|&at| at <= now);
                                prop_assert!(frozen.is_some(), "slot {slot} lives and was found hung at {now}");
                                found[slot] = Some(now);
                            }
                        }
                    }
                }
            }
            let all_paused: u64 = paused.iter().map(|(_, from, to)| to - from).sum();
            for (slot, worker) in workers.iter().enumerate() {
                if let Some(at) = worker.frozen_at {
                    let found = found[slot];
                    prop_assert!(
                        // Each look may be 5 ms late, and forgives it.
                        found.is_some_and(|found| found <= at + timeout + all_paused + 60),
                        "slot {slot} froze at {at}: {found:?}, timeout {timeout}, paused {all_paused}"
                    );
                }
            }
        }
    }
}
