//! Which worker has gone silent: heartbeats, judged without a clock or a
//! process.
//!
//! A worker writes the time of each turn of its loop into shared memory, and
//! marks it when it goes to sleep. One that sleeps may be silent for ever. One
//! that turns and is silent is asked to turn: one that is stuck, or stopped,
//! does not.
//!
//! ```text
//!   silence:   0 ------ 1/3 ------ 2/3 ------ 3/3 of hang_timeout
//!              beat     Ask        (looked)   Hung
//!
//!   asleep:    0 ------ DOZE ------------- REST
//!                       it says when it    nobody looks at it until it does
//!                       wakes from here on
//! ```
//!
//! Whether one that sleeps would wake cannot be seen, so it is doubted when
//! something speaks against it, as when a signal stops it (`doubt`).
//!
//! Only time in which the supervisor itself ran counts. Whenever it looks
//! later than it meant to, the delay is forgiven to everybody: a machine or a
//! tree of processes that was paused finds nobody hung. A pause that fits
//! between two looks is not seen, which is why there is a look between asking
//! and judging: whoever is asked has a third of the time-out to turn.
//!
//! Owned by the supervisor, one entry a slot. It costs an idle daemon nothing:
//! when all sleep for long there is no next look. Where something happens there
//! is one every third of `hang_timeout`, for all slots together.

use crate::counters::ASLEEP;

/// A worker that slept for so long tells when it wakes, in milliseconds.
pub const DOZE: u64 = 1_000;
/// One that sleeps for so long is not looked at until it tells. Longer than
/// `DOZE` by more than a worker needs from its mark in shared memory to its
/// look at the clock: who wakes too early to tell is still being looked at.
const REST: u64 = 2 * DOZE;

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
    /// It turns; the time of the last beat.
    Beat(u64),
    /// It sleeps, since then.
    Asleep(u64),
}

impl Sign {
    /// What a living worker's word in shared memory says.
    pub fn of_beat(word: u64) -> Sign {
        if word & ASLEEP == 0 { Sign::Beat(word) } else { Sign::Asleep(word & !ASLEEP) }
    }
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
    /// It went to sleep after its last beat: silence is no bad sign.
    sleeps: bool,
    /// It sleeps for so long that nobody looks at it.
    rests: bool,
    limit: u64,
}

impl Life {
    fn silence(&self, now: u64) -> u64 {
        if self.sleeps { 0 } else { now.saturating_sub(self.last).saturating_sub(self.forgiven) }
    }

    /// Takes a sign of this time, unless it is older than what is known.
    fn handle_sign(&mut self, at: u64, sleeps: bool, now: u64) {
        // A worker may lie about the time; a beat to come is one of now.
        let at = at.min(now);
        if at > self.last {
            // Nobody looked while it rested: what went before says nothing of
            // how long the supervisor itself ran.
            let forgiven = if self.rests { now - at } else { 0 };
            *self = Life { last: at, forgiven, asked: false, ..*self };
        }
        self.sleeps = sleeps && at >= self.last;
        self.rests = self.sleeps && now - self.last >= REST;
    }

    /// When it is to be looked at again.
    fn next_look(&self, now: u64) -> Option<u64> {
        match (self.rests, self.sleeps) {
            (true, _) => None,
            (false, true) => Some(now + self.third()),
            (false, false) => Some(self.next_third(now)),
        }
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
        let limit = self.timeout.max(BIRTH_PATIENCE);
        let life = Life { last: now, forgiven: 0, asked: false, sleeps: false, rests: false, limit };
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

    /// Something speaks against a worker: only a later sign counts. One that
    /// sleeps is asked, as one that turns would be.
    pub fn doubt(&mut self, slot: usize, now: u64) {
        if let Some(Some(life)) = self.lives.get_mut(slot) {
            let last = life.last.max(now + 1);
            *life = Life { last, forgiven: 0, asked: false, sleeps: false, rests: false, ..*life };
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
                Sign::Beat(at) | Sign::Asleep(at) => {
                    life.limit = self.timeout;
                    life.handle_sign(at, matches!(sign, Sign::Asleep(_)), now);
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
        self.due = self.lives.iter().flatten().filter_map(|life| life.next_look(now)).min();
        verdicts
    }

    /// When one is to be asked, all that are half as silent are asked with it:
    /// they share the supervisor's wake-up from then on.
    fn ask(&mut self, now: u64, signs: &[Sign], verdicts: &mut Vec<Verdict>) {
        let can_answer = |slot: usize| matches!(signs[slot], Sign::Beat(_) | Sign::Asleep(_));
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

    /// Once a look is due: who slept at the last one and is not doubted. Their
    /// silence says nothing of them; what waits for them may.
    pub fn sleepers(&self, now: u64) -> impl Iterator<Item = usize> {
        let is_due = self.due.is_some_and(|due| due <= now);
        let lives = self.lives.iter().enumerate().filter(move |_| is_due);
        lives.filter(|(_, life)| life.is_some_and(|life| life.sleeps)).map(|(slot, _)| slot)
    }

    /// When `look` is due at the latest, in milliseconds.
    pub fn next_deadline(&self) -> Option<u64> {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Sign::{Absent, Asleep, Beat, Starting};
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
    fn workers_that_sleep_come_to_rest_and_are_never_asked() {
        let mut watch = watch(2);
        let signs = [Asleep(10), Asleep(40)];
        let mut now = 50;
        let mut looks = 0;
        assert_eq!(watch.look(now, &signs), []);
        while let Some(due) = watch.next_deadline() {
            (now, looks) = (due, looks + 1);
            assert_eq!(watch.look(now, &signs), []);
        }
        assert!((40 + REST..40 + REST + 100).contains(&now), "rests from {now} on");
        assert!(looks <= REST / 100, "one look a third: {looks}");
    }

    #[test]
    fn a_worker_that_hangs_on_waking_from_its_rest_is_found_in_time() {
        let mut watch = watch(1);
        watch.look(5_000, &[Asleep(10)]);
        assert_eq!(watch.next_deadline(), None);
        // It woke, said so, and is stuck.
        assert_eq!(watch.look(9_000, &[Beat(9_000)]), []);
        assert_eq!(watch.look(9_100, &[Beat(9_000)]), [Ask(0)]);
        assert_eq!(watch.look(9_200, &[Beat(9_000)]), []);
        assert_eq!(watch.look(9_300, &[Beat(9_000)]), [Hung { slot: 0, silence: 300 }]);
    }

    #[test]
    fn a_pause_right_after_a_rest_finds_nobody_hung() {
        let mut watch = watch(1);
        watch.look(5_000, &[Asleep(10)]);
        // It woke at 6,000, and everybody was paused until now.
        assert_eq!(watch.look(9_000, &[Beat(6_000)]), []);
        assert_eq!(watch.next_deadline(), Some(9_100));
        assert_eq!(watch.look(9_010, &[Asleep(9_004)]), []);
    }

    #[test]
    fn a_sleeper_that_is_doubted_is_asked_and_found_hung() {
        let mut watch = watch(1);
        watch.look(5_000, &[Asleep(10)]);
        watch.doubt(0, 7_000);
        assert_eq!(watch.look(7_000, &[Asleep(10)]), []);
        assert_eq!(watch.look(7_101, &[Asleep(10)]), [Ask(0)]);
        assert_eq!(watch.look(7_201, &[Asleep(10)]), []);
        assert_eq!(watch.look(7_301, &[Asleep(10)]), [Hung { slot: 0, silence: 300 }]);
    }

    #[test]
    fn a_sleeper_that_answers_is_doubted_no_more() {
        let mut watch = watch(1);
        watch.look(5_000, &[Asleep(5_000)]);
        // Its mark is as old as the doubt: that says nothing.
        watch.doubt(0, 5_000);
        assert_eq!(watch.look(5_101, &[Asleep(5_000)]), [Ask(0)]);
        assert_eq!(watch.look(5_110, &[Asleep(5_104)]), []);
        assert_eq!(watch.look(5_500, &[Asleep(5_104)]), []);
        assert_eq!(watch.look(5_104 + REST, &[Asleep(5_104)]), []);
        assert_eq!(watch.next_deadline(), None);
    }

    #[test]
    fn the_marks_of_the_last_life_let_nobody_rest() {
        let mut watch = watch(1);
        watch.look(50, &[Absent]);
        watch.begin(0, 1_000);
        assert_eq!(watch.look(1_100, &[Asleep(40)]), [Ask(0)]);
    }

    #[test]
    fn sleepers_are_named_when_a_look_is_due() {
        let mut watch = watch(3);
        watch.look(200, &[Asleep(100), Asleep(190), Beat(200)]);
        assert_eq!(watch.sleepers(250).collect::<Vec<_>>(), [0usize; 0]);
        assert_eq!(watch.sleepers(300).collect::<Vec<_>>(), [0, 1]);
        watch.doubt(0, 300);
        assert_eq!(watch.sleepers(300).collect::<Vec<_>>(), [1]);
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
        /// It marks that it sleeps, and freezes in a turn or by a signal.
        marks: bool,
        by_signal: bool,
        stop_told: bool,
        asleep: bool,
    }

    impl Worker {
        fn sign(&self) -> Sign {
            if self.asleep { Asleep(self.beat) } else { Beat(self.beat) }
        }

        /// Whether the supervisor hears of it.
        fn turn(&mut self, now: u64) -> bool {
            let tells = self.asleep && now - self.beat >= DOZE;
            (self.beat, self.asked_at, self.asleep) = (now, None, self.marks);
            tells
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// A minute in steps of 5 ms: busy and idle workers, pauses of the
        /// whole tree and of the supervisor, and workers that freeze for good.
        /// Nobody who lives is found hung, everybody who froze is, in time.
        #[test]
        fn who_lives_is_spared_and_who_froze_is_found(
            timeout in 120u64..4_000,
            workers in prop::collection::vec(
                (0usize..6, any::<bool>(), any::<bool>(), prop::option::of(1_000u64..50_000)),
                1..6
            ),
            pauses in prop::collection::vec((any::<bool>(), 1u64..8_000), 0..6),
            delay in 0u64..100,
        ) {
            let mut watch = Watch::new(workers.len(), timeout);
            let mut workers: Vec<Worker> = workers
                .into_iter()
                .map(|(kind, marks, by_signal, frozen_at)| {
                    let kinds = [0, timeout / 10, timeout / 2, 2 * timeout, DOZE + 300, 3 * REST];
                    // Who does not mark its sleep, as older workers do, is asked.
                    let rhythm = if marks { kinds[kind] } else { kinds[kind % 3] } / 5 * 5;
                    Worker {
                        beat: 0,
                        rhythm,
                        asked_at: None,
                        frozen_at,
                        marks,
                        by_signal,
                        stop_told: false,
                        asleep: marks,
                    }
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
            let mut doubted = Vec::new();
            // Somebody has told the supervisor something.
            let mut is_told = false;
            for now in (0..=begin + 60_000).step_by(5) {
                let pause = paused.iter().find(|(_, from, to)| (*from..*to).contains(&now));
                if pause.is_none_or(|(whole, ..)| !whole) {
                    for (slot, worker) in workers.iter_mut().enumerate() {
                        if worker.frozen_at.is_some_and(|at| at <= now) {
                            if worker.asleep && worker.by_signal && !worker.stop_told {
                                worker.stop_told = true;
                                doubted.push(slot);
                                is_told = true;
                            }
                            // The turn in which it froze.
                            if worker.asleep && !worker.by_signal {
                                is_told |= worker.turn(now);
                                worker.asleep = false;
                                worker.frozen_at = Some(now);
                            }
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
                            is_told |= worker.turn(now);
                        }
                    }
                }
                if pause.is_none() && (is_told || watch.next_deadline().is_some_and(|due| due <= now)) {
                    is_told = false;
                    doubted.drain(..).for_each(|slot| watch.doubt(slot, now));
                    let signs: Vec<Sign> = (0..workers.len())
                        .map(|slot| if found[slot].is_some() { Absent } else { workers[slot].sign() })
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
