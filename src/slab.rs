//! Places that are used again, under keys that are not.
//!
//! A key is an index and a generation. A late event for a session that is
//! gone carries an old generation and finds nothing, instead of the session
//! that has its place now. The number of entries is bounded by the caller;
//! memory is that of the most entries there ever were.

/// Names one entry for as long as it lives, and nothing afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The place.
    pub index: u32,
    /// How often the place was filled before.
    pub generation: u32,
}

/// Entries under generational keys.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<Place<T>>,
    first_free: u32,
    len: usize,
}

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    state: State<T>,
}

#[derive(Debug)]
enum State<T> {
    Free { next: u32 },
    Used(T),
}

const NONE: u32 = u32::MAX;

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { places: Vec::new(), first_free: NONE, len: 0 }
    }
}

impl<T> Slab<T> {
    /// An empty slab.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many entries live.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none does.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts an entry into a place.
    pub fn insert(&mut self, value: T) -> Key {
        self.len += 1;
        if self.first_free == NONE {
            let index = u32::try_from(self.places.len()).expect("fewer than 2^32 sessions in a process");
            self.places.push(Place { generation: 0, state: State::Used(value) });
            return Key { index, generation: 0 };
        }
        let index = self.first_free;
        let place = &mut self.places[index as usize];
        let State::Free { next } = place.state else { unreachable!("the free list holds free places") };
        self.first_free = next;
        place.state = State::Used(value);
        Key { index, generation: place.generation }
    }

    /// Takes the entry out; its key is dead from now on.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        self.get(key)?;
        let place = &mut self.places[key.index as usize];
        // 31 bits: two of a key's 64 bits are the caller's, for a side and
        // for events that are not sessions.
        place.generation = (place.generation + 1) & GENERATION_MASK;
        let state = std::mem::replace(&mut place.state, State::Free { next: self.first_free });
        self.first_free = key.index;
        self.len -= 1;
        match state {
            State::Used(value) => Some(value),
            State::Free { .. } => unreachable!("get found an entry"),
        }
    }

    /// The entry of a living key.
    pub fn get(&self, key: Key) -> Option<&T> {
        match self.places.get(key.index as usize) {
            Some(Place { generation, state: State::Used(value) }) if *generation == key.generation => {
                Some(value)
            }
            _ => None,
        }
    }

    /// The entry of a living key, to change.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        match self.places.get_mut(key.index as usize) {
            Some(Place { generation, state: State::Used(value) }) if *generation == key.generation => {
                Some(value)
            }
            _ => None,
        }
    }

    /// The key of the entry that has this place now.
    pub fn key_at(&self, index: u32) -> Option<Key> {
        match self.places.get(index as usize)? {
            Place { generation, state: State::Used(_) } => Some(Key { index, generation: *generation }),
            _ => None,
        }
    }

    /// The keys of all entries.
    pub fn keys(&self) -> Vec<Key> {
        (0..self.places.len() as u32).filter_map(|index| self.key_at(index)).collect()
    }
}

const GENERATION_MASK: u32 = (1 << 30) - 1;

impl Key {
    /// The key and one bit of the caller's in 63 bits.
    pub fn pack(self, bit: bool) -> u64 {
        (u64::from(self.generation) << 33) | (u64::from(self.index) << 1) | u64::from(bit)
    }

    /// What `pack` packed.
    pub fn unpack(packed: u64) -> (Key, bool) {
        let generation = (packed >> 33) as u32 & GENERATION_MASK;
        (Key { index: (packed >> 1) as u32, generation }, packed & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_finds_its_entry_and_not_the_next_one_in_its_place() {
        let mut slab = Slab::new();
        let old = slab.insert("old");
        assert_eq!(slab.remove(old), Some("old"));
        let new = slab.insert("new");
        assert_eq!(new.index, old.index);
        assert_eq!(slab.get(old), None);
        assert_eq!(slab.remove(old), None);
        assert_eq!(slab.get(new), Some(&"new"));
        assert_eq!(slab.len(), 1);
    }

    #[test]
    fn keys_survive_being_packed() {
        for key in [
            Key { index: 0, generation: 0 },
            Key { index: u32::MAX, generation: GENERATION_MASK },
            Key { index: 7, generation: 12345 },
        ] {
            for bit in [false, true] {
                assert!(key.pack(bit) < 1 << 63);
                assert_eq!(Key::unpack(key.pack(bit)), (key, bit));
            }
        }
    }

    #[test]
    fn places_are_used_again_before_new_ones_are_made() {
        let mut slab = Slab::new();
        let keys: Vec<Key> = (0..100).map(|i| slab.insert(i)).collect();
        for key in &keys[..50] {
            slab.remove(*key);
        }
        for i in 0..50 {
            assert!(slab.insert(i).index < 100);
        }
        assert_eq!((slab.len(), slab.keys().len()), (100, 100));
    }
}
