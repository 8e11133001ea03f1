//! A session's state as plain data, to be carried to another process.
//!
//! Readiness is not carried: the new process registers both sockets anew and
//! tries everything once. What was received and not yet sent travels as bytes
//! beside the snapshot.

use serde::{Deserialize, Serialize};

use super::{Half, HalfState, MAX_PIPED, MAX_READ_BITS, MIN_READ_BITS, Residue, Session, Side, SideState};

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
    pub fn snapshot(&self) -> Option<(Snapshot, Vec<u8>)> {
        debug_assert!(self.halves.iter().all(|half| half.piped == 0), "a pipe does not travel");
        if self.broken.is_some() {
            return None;
        }
        let mut bytes = Vec::new();
        let halves = self.halves.each_ref().map(|half| {
            let kept = half.residue.as_ref().map_or(&[][..], |residue| &residue.bytes[residue.sent..]);
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

    /// A session from what another process sent; `None` where it is no state
    /// that a session can have.
    pub fn restore(snapshot: &Snapshot, mut bytes: &[u8]) -> Option<Session> {
        let mut halves = Vec::with_capacity(2);
        for half in &snapshot.halves {
            let kept = bytes.split_off(..half.kept as usize)?;
            // What made the sender probe, urgent data perhaps, still waits.
            let copies = snapshot.probe[half.from as usize];
            halves.push(Half { copies, ..restore_half(half, kept)? });
        }
        let [up, down] = <[Half; 2]>::try_from(halves).ok()?;
        if !bytes.is_empty() || up.from != Side::Client || down.from != Side::Server {
            return None;
        }
        let side = |probe| SideState { readable: true, writable: true, probe, broken: None };
        Some(Session { sides: snapshot.probe.map(side), halves: [up, down], broken: None })
    }
}

impl Snapshot {
    /// How many bytes travel beside it.
    pub fn kept(&self) -> usize {
        self.halves.iter().map(|half| half.kept as usize).sum()
    }

    /// Whether it has a server's side.
    pub fn is_relay(&self) -> bool {
        self.halves[0].to == Some(Side::Server)
    }
}

fn restore_half(half: &HalfSnapshot, kept: &[u8]) -> Option<Half> {
    let nobody_waits = half.to.is_none() || half.state == HalfState::Ended;
    let sane = (MIN_READ_BITS..=MAX_READ_BITS).contains(&half.read_bits)
        && kept.len() <= MAX_PIPED
        && (kept.is_empty() || !nobody_waits);
    sane.then(|| Half {
        from: half.from,
        to: half.to,
        state: half.state,
        read_bits: half.read_bits,
        copies: false,
        pipe: None,
        piped: 0,
        streak: 0,
        residue: (!kept.is_empty()).then(|| Box::new(Residue { bytes: kept.into(), sent: 0 })),
        received: half.received,
        sent: half.sent,
    })
}
