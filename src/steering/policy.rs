//! How large a part of the new connections or flows each slot is due.
//!
//! A connection that is steered is done with: a slot without a worker gives up
//! its part soon and takes it back as soon as it can. A flow is steered with
//! every datagram, so its slot keeps it over a worker's restart, and gives it
//! up only when it is gone for long or leaves for good.

/// What a listener's table steers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// TCP: once at its beginning.
    Connections,
    /// UDP: every datagram of it.
    Flows,
}

/// What is known of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotView {
    /// For how many milliseconds nobody has accepted there.
    pub away_for: Option<u64>,
    /// Its process lives and cannot run (SIGSTOP).
    pub is_stopped: bool,
    /// It finishes what it has and takes nothing new.
    pub is_leaving: bool,
    /// How long it keeps its clients waiting; only with `load-aware`.
    pub slow_level: u32,
}

/// A slot without a worker keeps its part of the connections for so many
/// milliseconds: a first restart takes less, and what comes meanwhile waits in
/// the queue, which the next worker takes over.
pub const FENCE_AFTER: u64 = 50;
/// And its flows for so long.
pub const GIVE_UP_FLOWS_AFTER: u64 = 10_000;

/// What a slot is due.
pub const FULL: u32 = 32;
/// What a slow one is due: little enough not to matter, enough to go on.
pub const EASED: u32 = 1;

/// The weights of all slots; all zero where nobody is there.
pub fn weights(traffic: Traffic, slots: &[SlotView]) -> Vec<u32> {
    let present: Vec<bool> = slots.iter().map(|slot| is_present(traffic, slot)).collect();
    // Slower than the middle one: never more than half. Where most are slow it
    // is the daemon that has too much to do, and to take work from one would
    // only hand it to the next.
    let here = slots.iter().zip(&present).filter(|(_, is)| **is);
    let mut levels: Vec<u32> = here.map(|(slot, _)| slot.slow_level).collect();
    levels.sort_unstable();
    let middle = levels.get(levels.len().saturating_sub(1) / 2).copied().unwrap_or(0);
    let weight = |(slot, is): (&SlotView, &bool)| match (*is, slot.slow_level > middle) {
        (false, _) => 0,
        (true, true) => EASED,
        (true, false) => FULL,
    };
    slots.iter().zip(&present).map(weight).collect()
}

fn is_present(traffic: Traffic, slot: &SlotView) -> bool {
    if slot.is_leaving {
        return false;
    }
    match traffic {
        Traffic::Connections => !slot.is_stopped && slot.away_for.is_none_or(|away| away < FENCE_AFTER),
        Traffic::Flows => slot.away_for.is_none_or(|away| away < GIVE_UP_FLOWS_AFTER),
    }
}

/// When `weights` has to be asked again for a slot that is away, counted from
/// when it went.
pub fn patience(traffic: Traffic) -> u64 {
    match traffic {
        Traffic::Connections => FENCE_AFTER,
        Traffic::Flows => GIVE_UP_FLOWS_AFTER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: SlotView = SlotView { away_for: None, is_stopped: false, is_leaving: false, slow_level: 0 };

    #[test]
    fn a_crashed_slot_keeps_its_flows_and_soon_loses_its_connections() {
        let away = |away_for| [HERE, SlotView { away_for: Some(away_for), ..HERE }];
        assert_eq!(weights(Traffic::Connections, &away(10)), [FULL, FULL]);
        assert_eq!(weights(Traffic::Connections, &away(FENCE_AFTER)), [FULL, 0]);
        assert_eq!(weights(Traffic::Flows, &away(FENCE_AFTER)), [FULL, FULL]);
        assert_eq!(weights(Traffic::Flows, &away(GIVE_UP_FLOWS_AFTER)), [FULL, 0]);
    }

    #[test]
    fn a_stopped_or_leaving_slot_gets_no_connection() {
        let stopped = SlotView { is_stopped: true, ..HERE };
        let leaving = SlotView { is_leaving: true, ..HERE };
        assert_eq!(weights(Traffic::Connections, &[stopped, leaving, HERE]), [0, 0, FULL]);
        assert_eq!(weights(Traffic::Flows, &[stopped, leaving, HERE]), [FULL, 0, FULL]);
    }

    #[test]
    fn slow_slots_are_eased_unless_most_are_slow() {
        let slow = SlotView { slow_level: 3, ..HERE };
        assert_eq!(weights(Traffic::Connections, &[slow, slow, HERE, HERE]), [EASED, EASED, FULL, FULL]);
        assert_eq!(weights(Traffic::Connections, &[slow, slow, slow, HERE]), [FULL; 4]);
        // A hiccup of one of the others does not make it as bad as these.
        let hiccup = SlotView { slow_level: 1, ..HERE };
        assert_eq!(weights(Traffic::Connections, &[slow, slow, hiccup, HERE]), [EASED, EASED, FULL, FULL]);
        let gone = SlotView { away_for: Some(1000), slow_level: 9, ..HERE };
        assert_eq!(weights(Traffic::Connections, &[gone, slow, HERE, HERE]), [0, EASED, FULL, FULL]);
    }
}
