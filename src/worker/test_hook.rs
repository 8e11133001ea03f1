//! A hook for tests and benches: a worker that is kept busy.
//!
//! `EVENKEEL_TEST_BUSY_SLOTS=0,1:50ms` in the environment of `evenkeel run`
//! makes the workers of slots 0 and 1 burn 50 milliseconds of CPU time before
//! each event. Not for operation; without the variable nothing happens.

use std::time::Duration;

use tracing::warn;

use crate::sys::clock;
use crate::units::parse_duration;

/// How long this worker burns, if at all.
#[derive(Debug)]
pub struct Busy(Option<Duration>);

impl Busy {
    /// What the environment says of a slot.
    pub fn of_slot(slot: usize) -> Busy {
        let text = std::env::var("EVENKEEL_TEST_BUSY_SLOTS").unwrap_or_default();
        let time = parse(&text).filter(|(slots, _)| slots.contains(&slot)).map(|(_, time)| time);
        if let Some(time) = time {
            warn!("EVENKEEL_TEST_BUSY_SLOTS: this worker burns {time:?} before each event");
        }
        Busy(time)
    }

    /// Burns.
    pub fn burn(&self) {
        let Some(time) = self.0 else { return };
        let end = clock::precise_micros() + time.as_micros() as u64;
        while clock::precise_micros() < end {
            std::hint::spin_loop();
        }
    }
}

fn parse(text: &str) -> Option<(Vec<usize>, Duration)> {
    let (slots, time) = text.split_once(':')?;
    let slots = slots.split(',').map(|slot| slot.parse().ok()).collect::<Option<Vec<usize>>>()?;
    Some((slots, parse_duration(time).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_names_slots_and_a_time() {
        assert_eq!(parse("0,3:50ms"), Some((vec![0, 3], Duration::from_millis(50))));
        assert_eq!((parse(""), parse("0"), parse("x:5ms"), parse("0:5")), (None, None, None, None));
    }
}
