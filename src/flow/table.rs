//! The places of all flows, in memory that outlives a killed worker.
//!
//! ```text
//!   head  version and places | places ever used
//!   a place, ten words:
//!   0     last datagram 40 | flags 8 at 40
//!   1     requests 32 | replies 32
//!   2     server 32 | socket 32, plus one
//!   3     older 32 | newer 32             of a free place: the next free one
//!   4-9   name                            and in the last the generation 32
//!   behind all places, three words for each: its story, where it is told
//! ```
//!
//! Under generational keys, as in `crate::slab`. A place is used from its first
//! word's last store on, and free from its first store on; a socket's number is
//! noted after it was opened and forgotten before it is closed. So whoever
//! reads what a killed worker left finds nothing that is another flow's.
//! Bounded at creation; sparse, so what was never used costs nothing.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::name::Name;
use super::{Flow, FlowKey, NONE, Snapshot, Story};
use crate::slab::Key;
use crate::sys::area::Area;
use crate::sys::shared::Region;

const VERSION: u64 = 2;
const HEAD_WORDS: usize = 8;
const WORDS: usize = 10;
/// What a flow takes here.
#[cfg(test)]
pub(super) const PLACE_BYTES: usize = WORDS * 8;
/// When it began, bytes in, bytes out.
const STORY_WORDS: usize = 3;
const NAME: usize = 4;
/// Four words of addresses, and two of what is left.
const NAME_WORDS: usize = 6;
const LAST: u64 = (1 << 40) - 1;
const GENERATION: u32 = 0x3fff_ffff;

const USED: u64 = 1 << 40;
const FAILED: u64 = 1 << 41;
const FROZEN: u64 = 1 << 42;
const ANSWERED: u64 = 1 << 43;
const AWAITS: u64 = 1 << 44;
const CAN_CUT: u64 = 1 << 45;
const ARRIVING: u64 = 1 << 46;
const TOLD: u64 = 1 << 47;

/// All flows of a worker, by place.
#[derive(Debug)]
pub(super) struct Table {
    area: Area,
    capacity: u32,
    used: u32,
    first_free: u32,
    len: usize,
}

impl Table {
    /// For at most so many.
    pub(super) fn create(capacity: u32) -> io::Result<Table> {
        let capacity = capacity.clamp(1, 1 << 27);
        let area = Area::create("evenkeel-flows", word_count(capacity), 0)?;
        area.words()[0].store(VERSION << 32 | u64::from(capacity), Release);
        Ok(Table { area, capacity, used: 0, first_free: NONE, len: 0 })
    }

    pub(super) fn memory(&self) -> BorrowedFd<'_> {
        self.area.as_fd()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn is_full(&self) -> bool {
        self.first_free == NONE && self.used == self.capacity
    }

    fn place(&self, index: u32) -> &[AtomicU64; WORDS] {
        place(self.area.words(), index)
    }

    /// Puts a flow into a free place; there is one.
    pub(super) fn insert(&mut self, flow: &Flow) -> Key {
        let index = if self.first_free == NONE {
            assert!(self.used < self.capacity, "whoever opens a flow has looked for room");
            self.used += 1;
            self.area.words()[1].store(u64::from(self.used), Release);
            self.used - 1
        } else {
            let index = self.first_free;
            self.first_free = self.place(index)[3].load(Relaxed) as u32;
            index
        };
        self.len += 1;
        let place = self.place(index);
        let generation = (place[9].load(Relaxed) >> 32) as u32;
        write_name(place, &flow.name, generation);
        write(place, flow);
        Key { index, generation }
    }

    /// Takes a flow out; its key is dead from now on.
    pub(super) fn remove(&mut self, key: Key) -> Option<Flow> {
        let flow = self.get(key)?;
        let next = u64::from(self.first_free);
        let place = self.place(key.index);
        place[0].store(0, Release);
        place[3].store(next, Relaxed);
        let generation = u64::from((key.generation + 1) & GENERATION) << 32;
        place[9].store(generation, Release);
        self.first_free = key.index;
        self.len -= 1;
        Some(flow)
    }

    /// The flow of a living key.
    pub(super) fn get(&self, key: Key) -> Option<Flow> {
        self.is_living(key).then(|| read(self.place(key.index)))
    }

    fn is_living(&self, key: Key) -> bool {
        key.index < self.used && {
            let place = self.place(key.index);
            place[0].load(Relaxed) & USED != 0 && (place[9].load(Relaxed) >> 32) as u32 == key.generation
        }
    }

    /// Changes a living flow, all but its name.
    pub(super) fn change<T>(&mut self, key: Key, change: impl FnOnce(&mut Flow) -> T) -> Option<T> {
        let mut flow = self.get(key)?;
        let result = change(&mut flow);
        write(self.place(key.index), &flow);
        Some(result)
    }

    /// The key of the flow that has this place now.
    pub(super) fn key_at(&self, index: u32) -> Option<Key> {
        if index >= self.used {
            return None;
        }
        let place = self.place(index);
        let is_used = place[0].load(Relaxed) & USED != 0;
        is_used.then(|| Key { index, generation: (place[9].load(Relaxed) >> 32) as u32 })
    }

    /// The keys of all.
    pub(super) fn keys(&self) -> Vec<Key> {
        (0..self.used).filter_map(|index| self.key_at(index)).collect()
    }

    /// The name at a place that is used.
    pub(super) fn name_at(&self, index: u32) -> Name {
        read_name(self.place(index))
    }

    /// Notes a flow's socket, or that it has none.
    pub(super) fn set_socket(&mut self, key: Key, socket: Option<i32>, can_cut: bool) {
        self.change(key, |flow| (flow.socket, flow.can_cut) = (socket, can_cut));
    }

    /// From here on a flow has a story. Of flows without one nothing is
    /// touched, and their memory costs nothing.
    pub(super) fn tell(&mut self, key: Key, story: Story) {
        if self.is_living(key) {
            write_story(self.story_words(key.index), story);
            self.change(key, |flow| flow.has_story = true);
        }
    }

    /// More bytes of a flow that has a story.
    pub(super) fn note_bytes(&mut self, key: Key, bytes_in: u64, bytes_out: u64) {
        if self.is_living(key) && self.place(key.index)[0].load(Relaxed) & TOLD != 0 {
            let words = self.story_words(key.index);
            // Nobody else writes here.
            words[1].store(words[1].load(Relaxed) + bytes_in, Relaxed);
            words[2].store(words[2].load(Relaxed) + bytes_out, Relaxed);
        }
    }

    /// The story at a place, of the flow that has it, or that had it last.
    pub(super) fn story_at(&self, index: u32, flow: &Flow) -> Option<Story> {
        flow.has_story.then(|| read_story(self.story_words(index)))
    }

    fn story_words(&self, index: u32) -> &[AtomicU64; STORY_WORDS] {
        story_words(self.area.words(), self.capacity, index)
    }

    #[cfg(test)]
    fn words(&self) -> &[AtomicU64] {
        self.area.words()
    }
}

fn place(words: &[AtomicU64], index: u32) -> &[AtomicU64; WORDS] {
    let at = HEAD_WORDS + index as usize * WORDS;
    words[at..at + WORDS].try_into().expect("ten words")
}

fn word_count(capacity: u32) -> usize {
    HEAD_WORDS + capacity as usize * (WORDS + STORY_WORDS)
}

fn story_words(words: &[AtomicU64], capacity: u32, index: u32) -> &[AtomicU64; STORY_WORDS] {
    let at = HEAD_WORDS + capacity as usize * WORDS + index as usize * STORY_WORDS;
    words[at..at + STORY_WORDS].try_into().expect("three words")
}

fn write_story(words: &[AtomicU64; STORY_WORDS], story: Story) {
    for (word, value) in words.iter().zip([story.born, story.bytes_in, story.bytes_out]) {
        word.store(value, Relaxed);
    }
}

fn read_story(words: &[AtomicU64; STORY_WORDS]) -> Story {
    let [born, bytes_in, bytes_out] = [0, 1, 2].map(|word| words[word].load(Relaxed));
    Story { born, bytes_in, bytes_out }
}

fn write(place: &[AtomicU64; WORDS], flow: &Flow) {
    let both = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    place[1].store(both(flow.requests, flow.replies), Relaxed);
    place[2].store(both(flow.server, flow.socket.map_or(0, |socket| socket as u32 + 1)), Relaxed);
    place[3].store(both(flow.older, flow.newer), Relaxed);
    let flag = |is: bool, bit: u64| if is { bit } else { 0 };
    let flags = USED
        | flag(flow.failed, FAILED)
        | flag(flow.frozen, FROZEN)
        | flag(flow.answered, ANSWERED)
        | flag(flow.awaits, AWAITS)
        | flag(flow.can_cut, CAN_CUT)
        | flag(flow.arriving, ARRIVING)
        | flag(flow.has_story, TOLD);
    place[0].store(flow.last.min(LAST) | flags, Release);
}

fn read(place: &[AtomicU64; WORDS]) -> Flow {
    let [state, counts, ends, list] = [0, 1, 2, 3].map(|word| place[word].load(Relaxed));
    let is = |bit: u64| state & bit != 0;
    Flow {
        name: read_name(place),
        server: ends as u32,
        socket: ((ends >> 32) as u32).checked_sub(1).map(|socket| socket as i32),
        can_cut: is(CAN_CUT),
        failed: is(FAILED),
        frozen: is(FROZEN),
        arriving: is(ARRIVING),
        has_story: is(TOLD),
        answered: is(ANSWERED),
        awaits: is(AWAITS),
        requests: counts as u32,
        replies: (counts >> 32) as u32,
        last: state & LAST,
        older: list as u32,
        newer: (list >> 32) as u32,
    }
}

fn write_name(place: &[AtomicU64; WORDS], name: &Name, generation: u32) {
    let mut words = name.to_words();
    words[NAME_WORDS - 1] |= u64::from(generation) << 32;
    for (at, word) in words.into_iter().enumerate() {
        place[NAME + at].store(word, Relaxed);
    }
}

fn read_name(place: &[AtomicU64; WORDS]) -> Name {
    Name::from_words(std::array::from_fn(|at| place[NAME + at].load(Relaxed)))
}

/// What a killed worker left of its flows.
#[derive(Debug)]
pub struct Remains {
    region: Region,
}

/// A flow that a killed worker had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heir {
    /// Its place.
    pub index: u32,
    /// Its name.
    pub key: FlowKey,
    /// Its server's number, `NO_SERVER` or `GONE_SERVER`.
    pub server: u32,
    /// Its socket.
    pub socket: Option<i32>,
    /// The kernel cuts joined datagrams on it.
    pub can_cut: bool,
    /// It came from another process that may have it still.
    pub is_arriving: bool,
    /// How far it is.
    pub state: Snapshot,
    /// What the access log will say of it.
    pub story: Option<Story>,
}

impl Remains {
    /// A worker's table, by its descriptor. An error where it is none.
    pub fn open(memory: OwnedFd) -> io::Result<Remains> {
        let region = Region::open(memory)?;
        let head = region.words().first().map_or(0, |word| word.load(Acquire));
        if head >> 32 != VERSION || region.words().len() < word_count(head as u32) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no table of flows of this version"));
        }
        Ok(Remains { region })
    }

    /// All flows that can be.
    pub fn flows(&self) -> impl Iterator<Item = Heir> + '_ {
        let words = self.region.words();
        let capacity = words[0].load(Acquire) as u32;
        let used = words[1].load(Acquire).min(capacity.into()) as u32;
        (0..used).filter_map(move |index| {
            let place = place(words, index);
            if place[0].load(Acquire) & USED == 0 {
                return None;
            }
            let flow = read(place);
            // Killed between the stores of one reply.
            let answered = flow.replies > 0;
            let state = Snapshot {
                failed: flow.failed,
                answered,
                awaits: flow.awaits,
                requests: flow.requests,
                replies: flow.replies,
                last: flow.last,
            };
            let key = flow.key();
            let is_possible =
                state.is_possible() && matches!(key.client, SocketAddr::V4(_)) == key.local.is_ipv4();
            is_possible.then_some(Heir {
                index,
                key,
                server: flow.server,
                socket: flow.socket,
                can_cut: flow.can_cut,
                is_arriving: flow.arriving,
                state,
                story: flow.has_story.then(|| read_story(story_words(words, capacity, index))),
            })
        })
    }

    /// It is somebody else's now, or over.
    pub fn forget(&self, index: u32) {
        place(self.region.words(), index)[0].store(0, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Flows, Limits, NO_SERVER, Reply};

    fn key(client: &str, local: &str) -> FlowKey {
        FlowKey { client: client.parse().unwrap(), local: local.parse().unwrap(), listener: 3, address: 1 }
    }

    #[test]
    fn what_a_killed_worker_had_is_found_with_its_sockets() {
        let limits = Limits { idle_timeout: 1_000, replies: 0, max_flows: 10, has_sockets: true };
        let mut flows = Flows::new(vec![limits; 4], 100, 1, 0);
        let names = [
            key("192.0.2.1:4000", "127.0.0.1"),
            key("[2001:db8::1]:5000", "::1"),
            key("[fe80::1%3]:5001", "fe80::2"),
        ];
        let keys = names.map(|name| flows.open(name, 5, 10));
        let ended = flows.open(key("192.0.2.2:1", "127.0.0.1"), NO_SERVER, 10);
        flows.set_socket(keys[1], Some(77), true);
        assert_eq!(flows.handle_reply(keys[0], 25), Reply::Pass);
        flows.handle_client(&names[0], 26);
        flows.end(ended);
        let story = Story { born: 10, bytes_in: 700, bytes_out: 0 };
        flows.tell(keys[1], story);
        flows.note_bytes(keys[1], 30, 400);
        flows.note_bytes(keys[0], 1, 1);
        let remains = Remains::open(flows.memory().try_clone_to_owned().unwrap()).unwrap();
        let found: Vec<Heir> = remains.flows().collect();
        assert_eq!(found.iter().map(|heir| heir.key).collect::<Vec<_>>(), names);
        let state =
            Snapshot { answered: true, awaits: true, requests: 2, replies: 1, last: 26, failed: false };
        assert_eq!(found[0].state, state);
        assert_eq!((found[1].socket, found[1].can_cut, found[1].server), (Some(77), true, 5));
        let told = Story { bytes_in: 730, bytes_out: 400, ..story };
        assert_eq!((found[0].story, found[1].story), (None, Some(told)));
        remains.forget(found[1].index);
        assert_eq!(remains.flows().count(), 2);
    }

    #[test]
    fn a_place_is_used_again_under_another_key() {
        let mut table = Table::create(2).unwrap();
        let flow = Flow::begin(&key("192.0.2.1:1", "127.0.0.1"), 0, 0);
        let [first, second] = [(); 2].map(|()| table.insert(&flow));
        assert!(table.is_full());
        assert!(table.remove(first).is_some() && table.remove(first).is_none());
        let third = table.insert(&flow);
        assert_eq!(third.index, first.index);
        assert!(table.get(first).is_none() && table.get(third).is_some());
        assert_eq!((table.keys(), table.len()), (vec![third, second], 2));
        assert!(table.words().len() >= HEAD_WORDS + 2 * WORDS);
    }

    #[test]
    fn no_words_make_it_panic() {
        let mut table = Table::create(4).unwrap();
        let flow = Flow::begin(&key("192.0.2.1:1", "127.0.0.1"), 0, 0);
        table.insert(&flow);
        for word in 1..HEAD_WORDS + WORDS {
            for value in [u64::MAX, 0, 1 << 40, 0xffff_ffff] {
                let old = table.words()[word].swap(value, Relaxed);
                let remains = Remains::open(table.memory().try_clone_to_owned().unwrap()).unwrap();
                let _ = remains.flows().count();
                table.words()[word].store(old, Relaxed);
            }
        }
    }
}
