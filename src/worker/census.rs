//! How many sessions and flows there are, counted anew.

use std::collections::BTreeMap;

/// By listener, and by place of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    listeners: BTreeMap<usize, u64>,
    places: BTreeMap<usize, u64>,
}

impl Census {
    /// One more.
    pub fn note(&mut self, listener: usize, place: Option<usize>) {
        *self.listeners.entry(listener).or_default() += 1;
        if let Some(place) = place {
            *self.places.entry(place).or_default() += 1;
        }
    }

    /// The sum of two.
    pub fn plus(mut self, other: Census) -> Census {
        for (listener, count) in other.listeners {
            *self.listeners.entry(listener).or_default() += count;
        }
        for (place, count) in other.places {
            *self.places.entry(place).or_default() += count;
        }
        self
    }

    /// Those of a listener.
    pub fn of_listener(&self, listener: usize) -> u64 {
        self.listeners.get(&listener).copied().unwrap_or(0)
    }

    /// Those at a place.
    pub fn of_place(&self, place: usize) -> u64 {
        self.places.get(&place).copied().unwrap_or(0)
    }

    /// All.
    pub fn total(&self) -> u64 {
        self.listeners.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_are_added_up() {
        let (mut one, mut other) = (Census::default(), Census::default());
        one.note(0, Some(3));
        one.note(1, None);
        other.note(1, Some(3));
        let sum = one.plus(other);
        assert_eq!((sum.of_listener(0), sum.of_listener(1), sum.of_place(3), sum.total()), (1, 2, 2, 3));
    }
}
