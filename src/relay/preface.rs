//! What the server is told before the client's first byte: a PROXY header.

use std::io;

use super::{End, Half, HalfState, Session, Side};
use crate::keep::{Keep, Owner};

/// As much of the client's as goes with it in one piece.
const FIRST_BYTES: usize = 16 << 10;

impl Session {
    /// Puts bytes of ours in front of what the client sends to the server, and
    /// with them, so that both leave in one piece, what it has sent already.
    /// They count as kept for the server until they are sent, and never as the
    /// client's. Called at most once, before the first `drive`, for the session
    /// of this number; answers how many of the client's go with them.
    pub fn introduce<E: End>(&mut self, preface: &[u8], client: &E, keep: &mut Keep, session: u32) -> usize {
        let up = Side::Client as usize;
        let owner = Owner { session, half: up as u8 };
        let Half { state, .. } = self.halves[up];
        let has_room = keep.scratch().len() >= preface.len() + FIRST_BYTES;
        if !has_room || state != HalfState::Open || !self.sides[up].readable {
            self.greet(preface, keep, session);
            return 0;
        }
        let place = &mut keep.scratch()[..preface.len()];
        place.copy_from_slice(preface);
        keep.claim(owner, 0);
        keep.preface(session, preface.len());
        let received = client.receive(&mut keep.scratch()[preface.len()..preface.len() + FIRST_BYTES]);
        let count = *received.as_ref().unwrap_or(&0);
        self.halves[up].received += count as u64;
        self.keep_from_scratch(owner, 0, preface.len() + count, keep);
        keep.unclaim();
        match received {
            Ok(0) => self.handle_end(up, keep, session),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.sides[up].readable = false,
            Err(error) => {
                self.break_side(Side::Client, &error, keep, session);
                self.halves[up].state = HalfState::Finishing;
            }
        }
        count
    }

    /// Puts bytes of ours in front of the first direction.
    pub fn greet(&mut self, greeting: &[u8], keep: &mut Keep, session: u32) {
        if greeting.is_empty() {
            return;
        }
        let owner = Owner { session, half: 0 };
        match keep.keep_bytes(owner, greeting, 0) {
            Some(residue) => {
                keep.preface(session, greeting.len());
                self.halves[0].residue = Some(residue);
            }
            None => self.break_side(Side::Client, &io::ErrorKind::OutOfMemory.into(), keep, session),
        }
    }
}
