//! The upstream board: which servers may be used, in memory that the steward
//! writes and every worker reads at its next pick.
//!
//! ```text
//! [ generation, size | upstream 0 | upstream 1 | ... ]
//! upstream:  [ epoch | table epoch | keys of both tables
//!            | places | places | table | table ]        tables with source-hash alone
//! ```
//! Everything lies there twice: the epoch's lowest bit says which of the two
//! is in force, and the writer fills the other one before it counts the epoch
//! up. So a reader is never kept waiting, and a writer that is killed half way
//! has changed nothing. One writer at a time: the supervisor before the first
//! process of a generation sees the board, the steward from then on. It lives
//! as long as its generation; while the steward is away the last verdicts
//! stand. Its size is fixed by the configuration (`Numbering`).

mod numbering;
mod overrides;
mod place;
mod standing;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use crate::balance::maglev;
use crate::config::{Balance, Config};

pub use numbering::{Numbering, place_count};
pub use overrides::{Change, Override, Overrides};
pub use place::{Address, Admin, Health, PLACE_WORDS, Place, State};
pub use standing::{PlaceId, Resolved, Server, Standing, Upstream};

const HEAD_WORDS: usize = 2;
const UPSTREAM_WORDS: usize = 4;
const EPOCH: usize = 0;
const TABLE_EPOCH: usize = 1;
const TABLE_KEYS: usize = 2;
/// Four places of a table in a word.
const TABLE_WORDS: usize = maglev::PLACES.div_ceil(4);
/// How often a reader tries again that was overtaken twice.
const TRIES: usize = 8;

/// How a board is laid out for a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    numbering: Numbering,
    upstreams: Vec<Section>,
    word_count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Section {
    at: usize,
    place_count: usize,
    has_table: bool,
}

impl Layout {
    /// The layout that every process of a generation computes alike.
    pub fn of(config: &Config) -> Layout {
        let numbering = Numbering::of(config);
        let mut at = HEAD_WORDS;
        let upstreams = config.upstreams.iter().enumerate().map(|(index, upstream)| {
            let section = Section {
                at,
                place_count: numbering.places_in(index),
                has_table: upstream.balance == Balance::SourceHash,
            };
            at += section.word_count();
            section
        });
        let upstreams = upstreams.collect();
        Layout { numbering, upstreams, word_count: at }
    }

    /// The size of a board.
    pub fn word_count(&self) -> usize {
        self.word_count
    }

    /// How places are numbered.
    pub fn numbering(&self) -> &Numbering {
        &self.numbering
    }
}

impl Section {
    fn word_count(&self) -> usize {
        let tables = if self.has_table { 2 * TABLE_WORDS } else { 0 };
        UPSTREAM_WORDS + 2 * self.place_count * PLACE_WORDS + tables
    }

    fn places(&self, epoch: u64) -> usize {
        let copy = (epoch & 1) as usize;
        self.at + UPSTREAM_WORDS + copy * self.place_count * PLACE_WORDS
    }

    fn table(&self, epoch: u64) -> usize {
        let copy = (epoch & 1) as usize;
        self.at + UPSTREAM_WORDS + 2 * self.place_count * PLACE_WORDS + copy * TABLE_WORDS
    }
}

/// A board, to read, and for its owner to write.
#[derive(Clone, Copy, Debug)]
pub struct Board<'a> {
    words: &'a [AtomicU64],
    layout: &'a Layout,
}

impl<'a> Board<'a> {
    /// A board over shared words; `None` where they are too few.
    pub fn over(words: &'a [AtomicU64], layout: &'a Layout) -> Option<Board<'a>> {
        (words.len() >= layout.word_count).then_some(Board { words, layout })
    }

    /// How it is laid out.
    pub fn layout(&self) -> &'a Layout {
        self.layout
    }

    /// Says which generation it is of. Owner only.
    pub fn begin(&self, generation: u64) {
        self.words[1].store(self.layout.word_count as u64, Relaxed);
        self.words[0].store(generation, Release);
    }

    /// Whether it is this generation's.
    pub fn is_of(&self, generation: u64) -> bool {
        self.words[0].load(Acquire) == generation
            && self.words[1].load(Relaxed) == self.layout.word_count as u64
    }

    /// Grows with every change of an upstream's places.
    pub fn epoch(&self, upstream: usize) -> u64 {
        self.words[self.layout.upstreams[upstream].at + EPOCH].load(Acquire)
    }

    /// The places of an upstream, all of one moment, and their epoch. `None`
    /// where the writer was always faster, which takes several changes within
    /// one call: later, again.
    pub fn read(&self, upstream: usize) -> Option<(u64, Vec<Place>)> {
        let section = &self.layout.upstreams[upstream];
        (0..TRIES).find_map(|_| {
            let epoch = self.epoch(upstream);
            let first = section.places(epoch);
            let words = &self.words[first..first + section.place_count * PLACE_WORDS];
            let places = words.chunks_exact(PLACE_WORDS).map(|words| {
                let words = std::array::from_fn(|at| words[at].load(Relaxed));
                Place::decode(&words)
            });
            let places = places.collect();
            // What was read is older than the next load: the writer counts up
            // before it touches this copy again.
            fence(Acquire);
            let unchanged = self.words[section.at + EPOCH].load(Relaxed) == epoch;
            unchanged.then_some((epoch, places))
        })
    }

    /// Brings an upstream's places into force. Owner only.
    pub fn write(&self, upstream: usize, places: &[Place]) {
        let section = &self.layout.upstreams[upstream];
        debug_assert_eq!(places.len(), section.place_count);
        let epoch = self.words[section.at + EPOCH].load(Relaxed);
        // The last count comes before what is written now, for every reader.
        fence(Release);
        let first = section.places(epoch + 1);
        for (place, words) in places.iter().zip(self.words[first..].chunks_exact(PLACE_WORDS)) {
            place.encode().iter().zip(words).for_each(|(value, word)| word.store(*value, Relaxed));
        }
        self.words[section.at + EPOCH].store(epoch + 1, Release);
    }

    /// What the table in force was made from; 0 where there is none.
    pub fn table_key(&self, upstream: usize) -> u64 {
        let section = &self.layout.upstreams[upstream];
        let epoch = self.words[section.at + TABLE_EPOCH].load(Acquire);
        self.words[section.at + TABLE_KEYS + (epoch & 1) as usize].load(Relaxed)
    }

    /// Brings a table into force. Owner only.
    pub fn write_table(&self, upstream: usize, key: u64, table: &[u16]) {
        let section = &self.layout.upstreams[upstream];
        debug_assert!(section.has_table && table.len() == maglev::PLACES);
        let epoch = self.words[section.at + TABLE_EPOCH].load(Relaxed) + 1;
        fence(Release);
        for (four, word) in table.chunks(4).zip(&self.words[section.table(epoch)..]) {
            let value = four.iter().rev().fold(0, |value, &place| value << 16 | u64::from(place));
            word.store(value, Relaxed);
        }
        self.words[section.at + TABLE_KEYS + (epoch & 1) as usize].store(key, Relaxed);
        self.words[section.at + TABLE_EPOCH].store(epoch, Release);
    }

    /// The table in force for clients' addresses, where there is one.
    ///
    /// It is read in place. Where the writer changes it twice within one look,
    /// that look may find a place of either table: still one that was right
    /// just now, and whoever uses it asks whether the place may be used.
    pub fn table(&self, upstream: usize) -> Option<Table<'a>> {
        let section = &self.layout.upstreams[upstream];
        if !section.has_table {
            return None;
        }
        let epoch = self.words[section.at + TABLE_EPOCH].load(Acquire);
        let first = section.table(epoch);
        (epoch > 0).then(|| Table { words: &self.words[first..first + TABLE_WORDS] })
    }
}

/// A table of places by the hash of a client's address.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    words: &'a [AtomicU64],
}

impl Table<'_> {
    /// The place at a position.
    pub fn get(&self, at: usize) -> usize {
        let word = self.words[at / 4].load(Relaxed);
        usize::from((word >> (16 * (at % 4))) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    fn config(balance: &str, servers: usize) -> Config {
        let mut text = format!(
            "[[listener]]\nname = \"a\"\nmode = \"tcp\"\nbind = \"127.0.0.1:1\"\nupstream = \"u\"\n\
             [[upstream]]\nname = \"u\"\nbalance = \"{balance}\"\n"
        );
        (0..servers)
            .for_each(|i| text += &format!("[[upstream.server]]\naddress = \"127.0.0.1:{}\"\n", 9000 + i));
        crate::config::load("test", &text).expect("a sane configuration").config
    }

    fn words(layout: &Layout) -> Vec<AtomicU64> {
        (0..layout.word_count()).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn what_is_written_is_read_and_counted() {
        let layout = Layout::of(&config("round-robin", 3));
        let words = words(&layout);
        let board = Board::over(&words, &layout).unwrap();
        board.begin(7);
        assert!(board.is_of(7) && !board.is_of(8));
        assert_eq!(board.read(0).unwrap(), (0, vec![Place::default(); 3]));
        for round in 1..5 {
            let places: Vec<Place> =
                (0..3).map(|i| Place { weight: round * 10 + i, ..Place::default() }).collect();
            board.write(0, &places);
            assert_eq!(board.read(0).unwrap(), (u64::from(round), places));
        }
        assert!(board.table(0).is_none());
        assert!(Board::over(&words[1..], &layout).is_none());
    }

    #[test]
    fn a_table_comes_back_place_by_place() {
        let layout = Layout::of(&config("source-hash", 3));
        let words = words(&layout);
        let board = Board::over(&words, &layout).unwrap();
        assert!(board.table(0).is_none());
        for key in 1..4u16 {
            let table: Vec<u16> = (0..maglev::PLACES).map(|at| (at as u16).wrapping_mul(key)).collect();
            board.write_table(0, u64::from(key), &table);
            let read = board.table(0).unwrap();
            assert!((0..maglev::PLACES).all(|at| read.get(at) == usize::from(table[at])));
            assert_eq!(board.table_key(0), u64::from(key));
        }
        // Places and tables do not overlap.
        let place = Place { weight: 5, ..Place::default() };
        board.write(0, &vec![place; 3]);
        board.write(0, &vec![Place::default(); 3]);
        assert_eq!(board.table(0).unwrap().get(1), 3);
    }

    /// A writer that never rests, and readers that must never see a mixture.
    #[test]
    fn a_reader_sees_all_places_of_one_moment() {
        let layout = Layout::of(&config("round-robin", 20));
        let words = words(&layout);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let board = Board::over(&words, &layout).unwrap();
                for round in 0..60_000u32 {
                    let place = Place { weight: round, slow_start: u64::from(round), ..Place::default() };
                    board.write(0, &vec![place; 20]);
                }
                stop.store(true, Relaxed);
            });
            let board = Board::over(&words, &layout).unwrap();
            let mut last = 0;
            while !stop.load(Relaxed) {
                let Some((epoch, places)) = board.read(0) else { continue };
                assert!(epoch >= last);
                last = epoch;
                assert!(places.iter().all(|p| p.weight == places[0].weight && *p == places[0]), "{places:?}");
            }
        });
    }
}
