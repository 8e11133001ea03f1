//! Supervision as a table, and against random lives and deaths.

use proptest::prelude::*;

use super::Action::{Announce, Drain, Finish, Kill, Lend, Recall, Spawn};
use super::*;

/// All slots ready at time 0.
fn running(count: usize) -> Supervision {
    let mut supervision = Supervision::new(count);
    supervision.step(Event::Begin, 0);
    for slot in 0..count {
        supervision.step(Event::Opened(slot), 0);
    }
    for slot in 0..count {
        supervision.step(Event::Ready(slot), 0);
    }
    supervision
}

const fn crash(slot: usize) -> Event {
    Event::Exited { slot, clean: false }
}

#[test]
fn slots_open_one_after_the_other_and_are_announced_together() {
    let mut supervision = Supervision::new(2);
    assert_eq!(supervision.step(Event::Begin, 0), [Spawn(0)]);
    assert_eq!(supervision.step(Event::Opened(0), 0), [Spawn(1)]);
    assert_eq!(supervision.step(Event::Ready(0), 0), []);
    assert_eq!(supervision.step(Event::Opened(1), 0), []);
    assert_eq!(supervision.step(Event::Ready(1), 0), [Announce]);
}

#[test]
fn a_dead_worker_is_replaced_at_once_and_announced_no_second_time() {
    let mut supervision = running(2);
    assert_eq!(supervision.step(crash(1), 5), [Spawn(1)]);
    assert_eq!(supervision.step(Event::Ready(1), 6), []);
    assert_eq!(supervision.restarts(1), 1);
}

#[test]
fn a_slot_that_stays_empty_is_lent_to_a_neighbour_until_it_is_filled() {
    let mut supervision = running(3);
    supervision.step(crash(2), 0);
    assert_eq!(supervision.step(crash(2), 10), [], "the second death waits");
    assert_eq!(supervision.next_deadline(), Some(110));
    assert_eq!(supervision.step(Event::Tick, 110), [Spawn(2)]);
    supervision.step(crash(2), 120);
    supervision.step(Event::Tick, 320);
    supervision.step(crash(2), 330);
    supervision.step(Event::Tick, 730);
    supervision.step(crash(2), 740);
    assert_eq!(supervision.next_deadline(), Some(1000));
    assert_eq!(supervision.step(Event::Tick, 1000), [Lend { slot: 2, to: 0 }]);
    assert_eq!(supervision.step(crash(0), 1001), [Spawn(0), Lend { slot: 2, to: 1 }]);
    assert_eq!(supervision.step(Event::Tick, 1540), [Spawn(2)]);
    assert_eq!(supervision.step(Event::Ready(2), 1550), [Recall { slot: 2, from: 1 }]);
}

#[test]
fn a_leave_drains_the_living_and_fills_the_empty_once_more() {
    let mut supervision = running(2);
    supervision.step(crash(1), 0);
    supervision.step(crash(1), 1);
    assert_eq!(supervision.step(Event::Leave, 2), [Drain(0), Spawn(1)]);
    assert_eq!(supervision.step(Event::Ready(1), 3), [Drain(1)]);
    assert_eq!(supervision.step(Event::Exited { slot: 0, clean: true }, 4), []);
    assert_eq!(supervision.step(Event::Exited { slot: 1, clean: true }, 5), [Finish]);
}

#[test]
fn a_worker_that_dies_while_draining_is_replaced_to_serve_its_queue() {
    let mut supervision = running(1);
    supervision.step(Event::Leave, 0);
    assert_eq!(supervision.step(crash(0), 1), [Spawn(0)]);
    assert_eq!(supervision.step(Event::Ready(0), 2), [Drain(0)]);
    assert_eq!(supervision.step(Event::Exited { slot: 0, clean: true }, 3), [Finish]);
}

#[test]
fn a_leave_before_anything_opened_just_ends() {
    let mut supervision = Supervision::new(2);
    supervision.step(Event::Begin, 0);
    assert_eq!(supervision.step(Event::Leave, 1), []);
    assert_eq!(supervision.step(crash(0), 2), [Finish]);
}

#[test]
fn a_hung_worker_is_killed_and_replaced_when_it_is_gone() {
    let mut supervision = running(2);
    assert_eq!(supervision.step(Event::Hung(1), 100), [Kill(1)]);
    assert_eq!(supervision.step(Event::Hung(1), 101), [], "said twice");
    assert_eq!(supervision.phase(1), Phase::Hung { since: 100, ready_for: 100 });
    assert_eq!(supervision.step(crash(1), 102), [Spawn(1)]);
    assert_eq!(supervision.restarts(1), 1);
}

#[test]
fn a_hung_worker_that_does_not_die_is_helped_and_helps_nobody() {
    let mut supervision = running(3);
    supervision.step(Event::Hung(1), 0);
    assert_eq!(supervision.next_deadline(), Some(LEND_AFTER));
    assert_eq!(supervision.step(Event::Tick, LEND_AFTER), [Lend { slot: 1, to: 2 }]);
    assert_eq!(supervision.step(Event::Hung(2), 1_100), [Kill(2), Lend { slot: 1, to: 0 }]);
    assert_eq!(supervision.step(Event::Tick, 2_100), [Lend { slot: 2, to: 0 }]);
    assert_eq!(supervision.step(crash(1), 2_200), [Spawn(1)]);
    assert_eq!(supervision.step(Event::Ready(1), 2_210), [Recall { slot: 1, from: 0 }]);
}

#[test]
fn a_slot_is_untended_when_its_process_does_not_end_and_nobody_helps() {
    let mut alone = running(1);
    alone.step(Event::Hung(0), 0);
    assert!(alone.is_tended(0, END_PATIENCE - 1));
    assert!(!alone.is_tended(0, END_PATIENCE));
    let mut helped = running(2);
    helped.step(Event::Hung(0), 0);
    helped.step(Event::Tick, LEND_AFTER);
    assert!(helped.is_tended(0, END_PATIENCE));
}

#[test]
fn a_worker_that_hangs_while_draining_is_replaced_to_serve_its_queue() {
    let mut supervision = running(1);
    supervision.step(Event::Leave, 0);
    assert_eq!(supervision.step(Event::Hung(0), 1), [Kill(0)]);
    assert_eq!(supervision.step(crash(0), 2), [Spawn(0)]);
    assert_eq!(supervision.step(Event::Ready(0), 3), [Drain(0)]);
}

proptest! {
    /// Random crashes, readiness and leaps of time: a slot never has two
    /// processes, a loan goes to a worker that accepts and is called back,
    /// and in the end everything leaves.
    #[test]
    fn no_order_of_events_breaks_the_slots(
        count in 1usize..6,
        steps in prop::collection::vec((0u8..7, 0usize..6, 1u64..40_000), 1..200),
    ) {
        let mut supervision = Supervision::new(count);
        let mut now = 0;
        // Per slot: lives, is open, is ready; and who polls it as well.
        let mut lives = vec![false; count];
        let mut open = vec![false; count];
        let mut lent = vec![None; count];
        let mut pending = supervision.step(Event::Begin, now);
        let mut finished = false;
        let leave = steps.len();
        for (index, (kind, slot, span)) in steps.into_iter().chain(vec![(9, 0, 1); 1]).enumerate() {
            let slot = slot % count;
            for action in pending.drain(..) {
                match action {
                    Spawn(slot) => {
                        prop_assert!(!lives[slot], "two processes in one slot");
                        prop_assert!(open.iter().take(slot).all(|&o| o), "out of order");
                        lives[slot] = true;
                    }
                    Lend { slot, to } => {
                        prop_assert!(slot != to && lives[to] && lent[slot].is_none());
                        lent[slot] = Some(to);
                    }
                    Recall { slot, from } => prop_assert_eq!(lent[slot].take(), Some(from)),
                    Drain(slot) => prop_assert!(lives[slot]),
                    Kill(slot) => {
                        prop_assert!(lives[slot]);
                        lent.iter_mut().for_each(|to| if *to == Some(slot) { *to = None });
                    }
                    Announce => {}
                    Finish => finished = true,
                }
            }
            now += span;
            let event = match kind {
                0 if lives[slot] && matches!(supervision.phase(slot), Phase::Starting) => {
                    if open[slot] { Event::Ready(slot) } else { open[slot] = true; Event::Opened(slot) }
                }
                1 if lives[slot] => {
                    lives[slot] = false;
                    lent.iter_mut().for_each(|to| if *to == Some(slot) { *to = None });
                    crash(slot)
                }
                2 => {
                    let accepts = !matches!(supervision.phase(slot), Phase::Hung { .. });
                    if lives[slot] && accepts {
                        lent.iter_mut().for_each(|to| if *to == Some(slot) { *to = None });
                    }
                    Event::Hung(slot)
                }
                _ if index == leave => Event::Leave,
                _ => Event::Tick,
            };
            pending = supervision.step(event, now);
        }
        for _ in 0..1000 {
            for action in pending.drain(..) {
                match action {
                    Spawn(slot) => lives[slot] = true,
                    Finish => finished = true,
                    _ => {}
                }
            }
            if finished { break; }
            now += 100;
            let busy = (0..count).find(|&slot| lives[slot]);
            pending = match busy {
                Some(slot) if supervision.phase(slot) == Phase::Starting => {
                    if !open[slot] { open[slot] = true; pending.extend(supervision.step(Event::Opened(slot), now)); }
                    let mut more = std::mem::take(&mut pending);
                    more.extend(supervision.step(Event::Ready(slot), now));
                    more
                }
                Some(slot) => { lives[slot] = false; supervision.step(Event::Exited { slot, clean: true }, now) }
                None => supervision.step(Event::Tick, now),
            };
        }
        prop_assert!(finished, "the daemon never left");
    }
}
