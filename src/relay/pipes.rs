//! The pipes that a worker lends to directions in bulk.
//!
//! A direction has a pipe only while bytes are in it, so a few serve many
//! sessions. Who keeps one for long has a slow receiver, to whom a pipe is of
//! no use: it gets none for the next bytes, and where another direction waits
//! for a pipe, it has to give up this one (`Session::unpipe`). Bounded by
//! `most`; opened when first needed. Owned by a worker.

/// Somebody who keeps a pipe for so long is slow, in milliseconds: then less
/// than 4 MiB go through it in a second.
const SLOW_AFTER: u64 = 250;
/// How long copying goes on before opening a pipe is tried again, in
/// milliseconds.
const RETRY_AFTER: u64 = 10_000;

/// A pipe that holds bytes of one direction.
pub trait Pipe {
    /// Takes bytes out of it.
    fn take(&self, into: &mut [u8]) -> std::io::Result<usize>;
    /// The descriptor of its reading end.
    fn number(&self) -> i32;
}

/// Pipes by number.
#[derive(Debug)]
pub struct Pipes<P> {
    places: Vec<Place<P>>,
    most: usize,
    open: fn() -> Option<P>,
    /// Opening failed: not before this time again.
    retry_at: u64,
    wanted: bool,
}

#[derive(Debug)]
struct Place<P> {
    /// Opened, and empty unless it is lent.
    pipe: Option<P>,
    holder: Option<Holder>,
}

/// Who has a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The number of the session, as the worker said it.
    pub session: u32,
    /// Its direction.
    pub half: u8,
    since: u64,
}

impl<P> Pipes<P> {
    /// At most so many, each opened when it is first needed; `open` says
    /// `None` where there is to be none.
    pub fn new(most: usize, open: fn() -> Option<P>) -> Pipes<P> {
        let most = most.min(usize::from(u8::MAX));
        Pipes { places: Vec::new(), most, open, retry_at: 0, wanted: false }
    }

    /// Lends an empty pipe, if there is one.
    pub(super) fn lend(&mut self, session: u32, half: u8, now: u64) -> Option<u8> {
        let number = match self.places.iter().position(|place| place.holder.is_none()) {
            Some(free) => free,
            None if self.places.len() < self.most => {
                self.places.push(Place { pipe: None, holder: None });
                self.places.len() - 1
            }
            None => {
                self.wanted = true;
                return None;
            }
        };
        let place = &mut self.places[number];
        if place.pipe.is_none() {
            if now < self.retry_at {
                return None;
            }
            place.pipe = (self.open)();
            if place.pipe.is_none() {
                self.retry_at = now + RETRY_AFTER;
                return None;
            }
        }
        place.holder = Some(Holder { session, half, since: now });
        Some(number as u8)
    }

    /// A lent pipe.
    pub(super) fn get(&self, number: u8) -> &P {
        self.places[usize::from(number)].pipe.as_ref().expect("a lent place has a pipe")
    }

    /// Takes a pipe back, empty; whether its holder was slow.
    pub(super) fn take_back(&mut self, number: u8, now: u64) -> bool {
        let holder = self.places[usize::from(number)].holder.take();
        holder.expect("a lent pipe has a holder").since + SLOW_AFTER <= now
    }

    /// Takes a pipe back with bytes that nobody wants: it is closed with them.
    pub(super) fn discard(&mut self, number: u8) {
        self.places[usize::from(number)] = Place { pipe: None, holder: None };
    }

    /// How many are lent.
    pub fn lent_count(&self) -> usize {
        self.places.iter().filter(|place| place.holder.is_some()).count()
    }

    /// Whose pipe is to be taken away, where somebody went without: of the
    /// slow holders the one that has had it longest.
    pub fn take_wish(&mut self, now: u64) -> Option<Holder> {
        if !std::mem::take(&mut self.wanted) {
            return None;
        }
        let holders = self.places.iter().filter_map(|place| place.holder);
        holders.filter(|holder| holder.since + SLOW_AFTER <= now).min_by_key(|holder| holder.since)
    }
}
