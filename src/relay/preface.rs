//! What the server is told before the client's first byte: a PROXY header.

use std::io;

use super::{End, Half, HalfState, Session, Side};

/// As much of the client's as goes with it in one piece.
const FIRST_BYTES: usize = 16 << 10;

impl Session {
    /// Puts bytes of ours in front of what the client sends to the server, and
    /// with them, so that both leave in one piece, what it has sent already.
    /// They count as kept for the server until they are sent, and never as the
    /// client's. Called at most once, before the first `drive`; answers how many
    /// of the client's go with them.
    pub fn introduce<E: End>(&mut self, preface: &[u8], client: &E, scratch: &mut [u8]) -> usize {
        let up = Side::Client as usize;
        let Half { state, .. } = self.halves[up];
        let place = scratch.get_mut(..preface.len() + FIRST_BYTES);
        let Some(place) = place.filter(|_| state == HalfState::Open && self.sides[up].readable) else {
            self.halves[up].keep(preface);
            return 0;
        };
        let (head, rest) = place.split_at_mut(preface.len());
        head.copy_from_slice(preface);
        let received = client.receive(rest);
        let count = *received.as_ref().unwrap_or(&0);
        self.halves[up].received += count as u64;
        self.halves[up].keep(&place[..preface.len() + count]);
        match received {
            Ok(0) => self.halves[up].state = HalfState::Finishing,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.sides[up].readable = false,
            Err(error) => {
                self.break_side(Side::Client, &error);
                self.halves[up].state = HalfState::Finishing;
            }
        }
        count
    }
}
