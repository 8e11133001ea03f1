//! A session's state as plain data, to be carried to another process.
//!
//! Readiness is not carried: the new process registers both sockets anew and
//! tries everything once. What was received and not yet sent travels as bytes
//! beside the snapshot.

use serde::{Deserialize, Serialize};

use super::{Half, HalfState, MAX_PIPED, MAX_READ_BITS, MIN_READ_BITS, Session, Side, SideState};
use crate::config::Service;
use crate::keep::{Keep, Owner};

/// One direction of a `Snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HalfSnapshot {
    from: Side,
    to: Option<Side>,
    state: HalfState,
    read_bits: u8,
    received: u64,
    sent: u64,
    /// How many bytes are kept for the receiver.
    kept: u32,
}

/// A session that nobody drives. Only an unbroken one can be taken: what has
/// begun to end ends where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    halves: [HalfSnapshot; 2],
    /// Whether each side is always read until it would block.
    probe: [bool; 2],
}

impl Session {
    /// The state, with the bytes kept for the server and for the client; `None`
    /// where a side has broken. What is in pipes has to be out of them
    /// (`unpipe_all`).
    pub fn snapshot(&self, keep: &Keep) -> Option<(Snapshot, Vec<u8>)> {
        debug_assert!(self.halves.iter().all(|half| half.piped == 0), "a pipe does not travel");
        if self.broken.is_some() {
            return None;
        }
        let mut bytes = Vec::new();
        let halves = self.halves.each_ref().map(|half| {
            let kept = half.residue.as_ref().map_or(&[][..], |residue| keep.rest(residue));
            bytes.extend_from_slice(kept);
            HalfSnapshot {
                from: half.from,
                to: half.to,
                state: half.state,
                read_bits: half.read_bits,
                received: half.received,
                sent: half.sent,
                kept: kept.len() as u32,
            }
        });
        Some((Snapshot { halves, probe: self.sides.each_ref().map(|side| side.probe) }, bytes))
    }

    /// A session from what another process sent, still without the bytes that
    /// were kept; `None` where it is no state that a session can have.
    pub fn restore(snapshot: &Snapshot) -> Option<Session> {
        let mut halves = Vec::with_capacity(2);
        for half in &snapshot.halves {
            // What made the sender probe, urgent data perhaps, still waits.
            let copies = snapshot.probe[half.from as usize];
            halves.push(Half { copies, ..restore_half(half)? });
        }
        let [up, down] = <[Half; 2]>::try_from(halves).ok()?;
        if up.from != Side::Client || down.from != Side::Server {
            return None;
        }
        let side = |probe| SideState { readable: true, writable: true, probe, broken: None };
        Some(Session { sides: snapshot.probe.map(side), halves: [up, down], broken: None })
    }
}

impl Session {
    /// Gives a restored session of this number the bytes that travelled beside
    /// its snapshot; false where there is no room for them.
    #[must_use]
    pub fn take_kept(
        &mut self,
        snapshot: &Snapshot,
        mut bytes: &[u8],
        keep: &mut Keep,
        session: u32,
    ) -> bool {
        for (index, half) in snapshot.halves.iter().enumerate() {
            let Some(kept) = bytes.split_off(..half.kept as usize) else { return false };
            if kept.is_empty() {
                continue;
            }
            let owner = Owner { session, half: index as u8 };
            self.halves[index].residue = keep.keep_bytes(owner, kept, half.sent);
            if self.halves[index].residue.is_none() {
                return false;
            }
        }
        bytes.is_empty()
    }
}

/// How far a direction is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes from its side.
    pub received: u64,
    /// Bytes to the other.
    pub sent: u64,
    /// Bytes that are kept for it.
    pub kept: u32,
    /// Its end was passed on.
    pub has_ended: bool,
}

impl Snapshot {
    /// A session that has only just begun.
    pub fn begin(service: Option<Service>) -> Snapshot {
        Snapshot::resume(service, [Progress::default(); 2])
    }

    /// A session of which only the bytes are known, with both directions of a
    /// relay, or the client's alone.
    pub fn resume(service: Option<Service>, progress: [Progress; 2]) -> Snapshot {
        let session = Session::of_service(service);
        let halves = [0, 1].map(|index| {
            let (half, progress) = (&session.halves[index], progress[index]);
            let has_ended = half.state == HalfState::Ended || progress.has_ended;
            HalfSnapshot {
                from: half.from,
                to: half.to,
                state: if has_ended { HalfState::Ended } else { HalfState::Open },
                read_bits: half.read_bits,
                received: progress.received,
                sent: progress.sent,
                kept: progress.kept,
            }
        });
        Snapshot { halves, probe: [false; 2] }
    }

    /// Which sides have finished.
    pub fn finished(&self) -> [bool; 2] {
        self.halves.each_ref().map(|half| half.to.is_some() && half.state != HalfState::Open)
    }

    /// Bytes of ours in front of what came from the client.
    pub fn preface(&self) -> u64 {
        let up = &self.halves[0];
        let to_someone = up.to.is_some();
        (up.sent + u64::from(up.kept)).saturating_sub(up.received) * u64::from(to_someone)
    }

    /// Bytes that came from the client.
    pub fn received(&self) -> u64 {
        self.halves[0].received
    }

    /// How many bytes travel beside it.
    pub fn kept(&self) -> usize {
        self.halves.iter().map(|half| half.kept as usize).sum()
    }

    /// Whether it has a server's side.
    pub fn is_relay(&self) -> bool {
        self.halves[0].to == Some(Side::Server)
    }
}

fn restore_half(half: &HalfSnapshot) -> Option<Half> {
    let nobody_waits = half.to.is_none() || half.state == HalfState::Ended;
    let sane = (MIN_READ_BITS..=MAX_READ_BITS).contains(&half.read_bits)
        && half.kept as usize <= MAX_PIPED
        && (half.kept == 0 || !nobody_waits);
    sane.then_some(Half {
        from: half.from,
        to: half.to,
        state: half.state,
        read_bits: half.read_bits,
        copies: false,
        pipe: None,
        piped: 0,
        streak: 0,
        residue: None,
        received: half.received,
        sent: half.sent,
    })
}
