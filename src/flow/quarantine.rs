//! Upstream ports that nobody may use yet.
//!
//! A reply that comes late for a flow that ended must not reach the client of
//! the next flow with that port: so the port rests for a while, with whatever
//! holds it (a worker: the socket). Bounded by the caller, who takes the
//! oldest where ports run short. Times in milliseconds.

use std::collections::VecDeque;

/// What rests, a queue for each listener: each has a duration of its own, so
/// within a queue the order of arrival is the order of release.
#[derive(Debug)]
pub struct Quarantine<T> {
    lanes: Vec<Lane<T>>,
    len: usize,
}

#[derive(Debug)]
struct Lane<T> {
    duration: u64,
    queue: VecDeque<(u64, T)>,
}

impl<T> Quarantine<T> {
    /// Nothing rests; one duration for each listener.
    pub fn new(durations: impl Iterator<Item = u64>) -> Quarantine<T> {
        Quarantine {
            lanes: durations.map(|duration| Lane { duration, queue: VecDeque::new() }).collect(),
            len: 0,
        }
    }

    /// Something rests from now on; it comes back where it need not.
    pub fn put(&mut self, listener: usize, item: T, now: u64) -> Option<T> {
        let lane = &mut self.lanes[listener];
        if lane.duration == 0 {
            return Some(item);
        }
        lane.queue.push_back((now, item));
        self.len += 1;
        None
    }

    /// Something has rested since then in another process; it comes back where
    /// it need not any more.
    pub fn adopt(&mut self, listener: usize, item: T, since: u64) -> Option<T> {
        let lane = &mut self.lanes[listener];
        if lane.duration == 0 {
            return Some(item);
        }
        let at = lane.queue.partition_point(|(other, _)| *other <= since);
        lane.queue.insert(at, (since, item));
        self.len += 1;
        None
    }

    /// One that rests, since when, and whose it was, whether it has rested for
    /// long enough or not; the oldest of the first listener that has any.
    pub fn take_any(&mut self) -> Option<(usize, u64, T)> {
        let listener = self.lanes.iter().position(|lane| !lane.queue.is_empty())?;
        self.len -= 1;
        self.lanes[listener].queue.pop_front().map(|(since, item)| (listener, since, item))
    }

    /// One that has rested for long enough.
    pub fn release(&mut self, now: u64) -> Option<T> {
        let lane = self.lanes.iter_mut().find(|lane| lane.release_at().is_some_and(|at| at <= now))?;
        self.len -= 1;
        lane.queue.pop_front().map(|(_, item)| item)
    }

    /// The one that has rested the longest, whether that is enough or not.
    pub fn take_oldest(&mut self) -> Option<T> {
        let waiting = self.lanes.iter_mut().filter(|lane| !lane.queue.is_empty());
        let lane = waiting.min_by_key(|lane| lane.queue[0].0)?;
        self.len -= 1;
        lane.queue.pop_front().map(|(_, item)| item)
    }

    /// When the next one has rested for long enough.
    pub fn next_release(&self) -> Option<u64> {
        self.lanes.iter().filter_map(Lane::release_at).min()
    }

    /// How many rest.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many rest that were a listener's.
    pub fn len_of(&self, listener: usize) -> usize {
        self.lanes[listener].queue.len()
    }

    /// Whether none rests.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<T> Lane<T> {
    fn release_at(&self) -> Option<u64> {
        self.queue.front().map(|(since, _)| since.saturating_add(self.duration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_oldest_is_taken_across_listeners() {
        let mut quarantine = Quarantine::new([10, 1000].into_iter());
        quarantine.put(1, "first", 0);
        quarantine.put(0, "second", 5);
        assert_eq!((quarantine.next_release(), quarantine.len()), (Some(15), 2));
        assert_eq!(quarantine.take_oldest(), Some("first"));
        assert_eq!(quarantine.release(14), None);
        assert_eq!(quarantine.release(15), Some("second"));
        assert!(quarantine.is_empty() && quarantine.take_oldest().is_none());
    }

    #[test]
    fn a_duration_of_zero_holds_nothing() {
        assert_eq!(Quarantine::new([0].into_iter()).put(0, 7, 0), Some(7));
    }

    #[test]
    fn what_rested_elsewhere_takes_its_place_by_age() {
        let mut quarantine = Quarantine::new([10].into_iter());
        quarantine.put(0, "own", 5);
        assert_eq!(quarantine.adopt(0, "older", 1), None);
        assert_eq!(quarantine.adopt(0, "younger", 8), None);
        assert_eq!(quarantine.release(11), Some("older"));
        assert_eq!(quarantine.take_any(), Some((0, 5, "own")));
        assert_eq!((quarantine.len(), quarantine.release(18)), (1, Some("younger")));
    }

    proptest! {
        #[test]
        fn nothing_is_released_early_or_forgotten(
            durations in prop::collection::vec(1u64..50, 1..4),
            steps in prop::collection::vec((0usize..4, 0u64..20), 0..200),
        ) {
            let mut quarantine = Quarantine::new(durations.iter().copied());
            let mut model: Vec<(u64, usize)> = Vec::new();
            let mut now = 0;
            for (id, (lane, wait)) in steps.into_iter().enumerate() {
                now += wait;
                let lane = lane % durations.len();
                while let Some(got) = quarantine.release(now) {
                    let at = model.iter().position(|(_, id)| *id == got).expect("it was put in once");
                    prop_assert!(model.remove(at).0 <= now, "released early");
                }
                prop_assert!(model.iter().all(|(due, _)| *due > now), "kept too long");
                quarantine.put(lane, id, now);
                model.push((now + durations[lane], id));
                prop_assert_eq!(quarantine.len(), model.len());
            }
        }
    }
}
