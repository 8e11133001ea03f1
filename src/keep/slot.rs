//! A session in four words.
//!
//! ```text
//!   0  state 4 | end of file 2 | reason 5 | flags | crashes 4 at 16 | generation 8 at 24 | listener 16 at 32
//!   1  client's descriptor 32 | server's descriptor 32, each plus one
//!   2  time 40 | server's place 24, plus one
//!   3  born 40 | length of the PROXY header read 13 | length of the preface 11
//! ```

use std::os::fd::RawFd;

use crate::relay::CloseReason;

pub(super) const SLOT_WORDS: usize = 4;

const STATE: u64 = 0xf;
const EOF_AT: u32 = 4;
const REASON_AT: u32 = 6;
const REASON: u64 = 0x1f << REASON_AT;
const UNIX: u64 = 1 << 11;
pub(super) const HAS_ORIGIN: u64 = 1 << 12;
pub(super) const HAS_STORY: u64 = 1 << 13;
pub(super) const ARRIVING: u64 = 1 << 14;
const CRASHES_AT: u32 = 16;
const CRASHES: u64 = 0xf << CRASHES_AT;
const GENERATION_AT: u32 = 24;
const GENERATION: u64 = 0xff << GENERATION_AT;
const LISTENER_AT: u32 = 32;

/// Milliseconds of the monotonic clock: 34 years.
const TIME: u64 = (1 << 40) - 1;
const PLACE_AT: u32 = 40;
const HEADER_AT: u32 = 40;
const HEADER: u64 = 0x1fff << HEADER_AT;
const PREFACE_AT: u32 = 53;
const PREFACE: u64 = 0x7ff << PREFACE_AT;

/// How far a session is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// The slot is nobody's.
    #[default]
    Free,
    /// Accepted; whether it may come in was not asked yet.
    Accepted,
    /// Its PROXY header is awaited, until the slot's time.
    Header,
    /// On its way to a server until the slot's time, with a socket or without.
    Connecting,
    /// It waits for a place at a server since the slot's time.
    Queued,
    /// Bytes flow; the last at the slot's time.
    Open,
    /// It is over; its sockets are being closed.
    Closing,
}

impl State {
    const ALL: [State; 7] = [
        State::Free,
        State::Accepted,
        State::Header,
        State::Connecting,
        State::Queued,
        State::Open,
        State::Closing,
    ];
}

/// What a slot says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// How far it is.
    pub state: State,
    /// The listener's number.
    pub listener: u16,
    /// The client's socket.
    pub client: Option<RawFd>,
    /// The server's.
    pub server: Option<RawFd>,
    /// The server's place in its upstream.
    pub place: Option<u32>,
    /// The server is reached by a Unix socket, of which the kernel keeps no
    /// counts.
    pub is_unix: bool,
    /// The sides, client and server, that have finished.
    pub finished: [bool; 2],
    /// Why it ends, once that is known.
    pub reason: Option<CloseReason>,
    /// The sender has it still.
    pub is_arriving: bool,
    /// How often its worker died while it had to do with it, up to 15.
    pub crashes: u8,
    /// When it was accepted.
    pub born: u64,
    /// What the state says.
    pub time: u64,
    /// Bytes read from the client that are no part of the stream.
    pub header: u16,
    /// Bytes of ours in front of what goes to the server, or to the client of a
    /// service.
    pub preface: u16,
    /// Its extra says what a PROXY header said.
    pub has_origin: bool,
    /// Its extra has what the access log will say.
    pub has_story: bool,
}

impl Slot {
    pub(super) fn to_words(self, generation: u8) -> [u64; SLOT_WORDS] {
        let flag = |is: bool, bit: u64| if is { bit } else { 0 };
        let mut state = self.state as u64
            | flag(self.finished[0], eof(0))
            | flag(self.finished[1], eof(1))
            | flag(self.is_unix, UNIX)
            | flag(self.has_origin, HAS_ORIGIN)
            | flag(self.has_story, HAS_STORY)
            | flag(self.is_arriving, ARRIVING)
            | u64::from(generation) << GENERATION_AT
            | u64::from(self.listener) << LISTENER_AT;
        state = with_crashes(state, self.crashes);
        if let Some(reason) = self.reason {
            state = with_reason(state, reason);
        }
        let sockets = with_server(u64::from(number_of(self.client)), self.server);
        let place = with_place(self.time & TIME, self.place);
        let lengths = with_preface(with_header(self.born & TIME, self.header.into()), self.preface.into());
        [state, sockets, place, lengths]
    }

    pub(super) fn of_words(words: [u64; SLOT_WORDS]) -> Slot {
        let [state, sockets, place, lengths] = words;
        let reason = (state & REASON) >> REASON_AT;
        Slot {
            // What is no state at all is taken for one that ends.
            state: State::ALL.get((state & STATE) as usize).copied().unwrap_or(State::Closing),
            listener: (state >> LISTENER_AT) as u16,
            client: descriptor(sockets as u32),
            server: descriptor((sockets >> 32) as u32),
            place: ((place >> PLACE_AT) as u32).checked_sub(1),
            is_unix: state & UNIX != 0,
            finished: [0, 1].map(|half| state & eof(half) != 0),
            reason: (reason as usize).checked_sub(1).and_then(|at| CloseReason::ALL.get(at).copied()),
            is_arriving: state & ARRIVING != 0,
            crashes: ((state & CRASHES) >> CRASHES_AT) as u8,
            born: lengths & TIME,
            time: place & TIME,
            header: ((lengths & HEADER) >> HEADER_AT) as u16,
            preface: ((lengths & PREFACE) >> PREFACE_AT) as u16,
            has_origin: state & HAS_ORIGIN != 0,
            has_story: state & HAS_STORY != 0,
        }
    }
}

fn number_of(fd: Option<RawFd>) -> u32 {
    fd.map_or(0, |fd| fd as u32 + 1)
}

fn descriptor(number: u32) -> Option<RawFd> {
    number.checked_sub(1).and_then(|number| RawFd::try_from(number).ok())
}

/// The mark of the side that a direction comes from.
pub(super) fn eof(half: u8) -> u64 {
    1 << (EOF_AT + u32::from(half & 1))
}

pub(super) fn generation(word: u64) -> u8 {
    ((word & GENERATION) >> GENERATION_AT) as u8
}

pub(super) fn with_state(word: u64, state: State) -> u64 {
    word & !STATE | state as u64
}

/// The first reason stays: what follows is its doing.
pub(super) fn with_reason(word: u64, reason: CloseReason) -> u64 {
    word & !REASON | (reason as u64 + 1) << REASON_AT
}

pub(super) fn with_crashes(word: u64, crashes: u8) -> u64 {
    word & !CRASHES | u64::from(crashes.min(15)) << CRASHES_AT
}

pub(super) fn with_unix(word: u64, is_unix: bool) -> u64 {
    if is_unix { word | UNIX } else { word & !UNIX }
}

pub(super) fn with_server(word: u64, server: Option<RawFd>) -> u64 {
    word & u64::from(u32::MAX) | u64::from(number_of(server)) << 32
}

pub(super) fn with_time(word: u64, time: u64) -> u64 {
    word & !TIME | time.min(TIME)
}

pub(super) fn with_place(word: u64, place: Option<u32>) -> u64 {
    word & TIME | u64::from(place.map_or(0, |place| place + 1)) << PLACE_AT
}

pub(super) fn with_header(word: u64, length: usize) -> u64 {
    word & !HEADER | (length as u64) << HEADER_AT & HEADER
}

pub(super) fn with_preface(word: u64, length: usize) -> u64 {
    word & !PREFACE | (length as u64) << PREFACE_AT & PREFACE
}

pub(super) fn freed(word: u64) -> u64 {
    u64::from(generation(word).wrapping_add(1)) << GENERATION_AT
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot() -> impl Strategy<Value = Slot> {
        let numbers = (any::<u16>(), any::<Option<u16>>(), any::<Option<u16>>(), 0u32..=65_535);
        let flags = any::<[bool; 6]>();
        let times = (0..=TIME, 0..=TIME, 0u16..8192, 0u16..2048, 0u8..16);
        let kinds = (0..State::ALL.len(), prop::option::of(0..CloseReason::ALL.len()));
        (numbers, flags, times, kinds).prop_map(|(numbers, flags, times, kinds)| Slot {
            state: State::ALL[kinds.0],
            listener: numbers.0,
            client: numbers.1.map(RawFd::from),
            server: numbers.2.map(RawFd::from),
            place: (numbers.3 > 0).then_some(numbers.3 - numbers.3.min(1)),
            is_unix: flags[0],
            finished: [flags[1], flags[2]],
            reason: kinds.1.map(|at| CloseReason::ALL[at]),
            is_arriving: flags[3],
            crashes: times.4,
            born: times.0,
            time: times.1,
            header: times.2,
            preface: times.3,
            has_origin: flags[4],
            has_story: flags[5],
        })
    }

    proptest! {
        #[test]
        fn four_words_say_all_of_a_slot(slot in slot(), generation in any::<u8>()) {
            let words = slot.to_words(generation);
            prop_assert_eq!(Slot::of_words(words), slot);
            prop_assert_eq!(super::generation(words[0]), generation);
        }

        #[test]
        fn no_words_make_it_panic(words in any::<[u64; 4]>()) {
            let _ = Slot::of_words(words);
        }
    }
}
