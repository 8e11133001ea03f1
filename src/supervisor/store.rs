//! systemd's fd store: what outlives the supervisor, and what comes back.
//!
//! ```text
//!   each listening socket, as soon as it is held ----------> FDSTORE=1 FDNAME=evenkeel-slot-0-tcp-...
//!   a leave that is a restart: each worker's sessions and
//!   flows, in flight inside a socket pair (`park`) --------> FDSTORE=1 FDNAME=evenkeel-lot-0-a, -b
//! ```
//!
//! systemd passes all of it to the next start, like sockets of a socket unit;
//! the names tell them apart. What the configuration has no use for any more is
//! closed, taken out of the store and said. Owned by the supervisor. Bounded by
//! its sockets and two entries a slot; the unit's FileDescriptorStoreMax= has
//! to allow as many. Without $NOTIFY_SOCKET nothing of this happens.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use tracing::{debug, warn};

use super::slot::Slot;
use crate::control::SocketId;
use crate::sys::activation::{Bound, Kind, Passed};
use crate::sys::clock::Millis;
use crate::sys::notify;

const SLOT: &str = "evenkeel-slot-";
const LOT: &str = "evenkeel-lot-";
/// How flows that are parked were steered.
const STEERING: &str = "evenkeel-steering";
/// When a message is tried again for which systemd had no room, in
/// milliseconds.
const TRY_AGAIN: Millis = 100;

/// What systemd keeps for us.
#[derive(Debug, Default)]
pub struct Store {
    heard: bool,
    /// The listening sockets that it has: name and number.
    stored: Vec<(String, RawFd)>,
    /// The slots' sockets when they were last compared.
    seen: Vec<(usize, RawFd)>,
    try_at: Option<Millis>,
}

/// What came back from it.
#[derive(Debug, Default)]
pub struct Returned {
    /// Listening sockets, with the slot that had them.
    pub sockets: Vec<(usize, Passed)>,
    /// Parked sessions: the slot that had them, and both ends.
    pub lots: Vec<(usize, OwnedFd, OwnedFd)>,
    /// How they were steered: sealed JSON.
    pub steering: Option<OwnedFd>,
    /// Names of what is of no use any more, to be taken out.
    pub useless: Vec<String>,
}

/// Parts what was passed: sockets of a socket unit, and what was stored.
pub fn part(passed: Vec<Passed>) -> (Vec<Passed>, Returned) {
    let (mut others, mut returned) = (Vec::new(), Returned::default());
    let mut ends: Vec<(usize, bool, Passed)> = Vec::new();
    for passed in passed {
        if let Some(rest) = passed.name.strip_prefix(SLOT) {
            match rest.split('-').next().and_then(|number| number.parse().ok()) {
                Some(slot) => returned.sockets.push((slot, passed)),
                None => returned.useless.push(passed.name),
            }
        } else if let Some(rest) = passed.name.strip_prefix(LOT) {
            let end = rest.split_once('-').and_then(|(slot, end)| Some((slot.parse().ok()?, end == "a")));
            match end {
                Some((slot, is_ours)) => ends.push((slot, is_ours, passed)),
                None => returned.useless.push(passed.name),
            }
        } else if passed.name == STEERING {
            returned.useless.push(passed.name);
            returned.steering = Some(passed.fd);
        } else {
            others.push(passed);
        }
    }
    while let Some((slot, is_ours, one)) = ends.pop() {
        match ends.iter().position(|(other, is_other, _)| *other == slot && *is_other != is_ours) {
            Some(at) => {
                let (_, _, two) = ends.swap_remove(at);
                let (a, b) = if is_ours { (one, two) } else { (two, one) };
                returned.lots.push((slot, a.fd, b.fd));
            }
            None => returned.useless.push(one.name),
        }
    }
    (others, returned)
}

impl Returned {
    /// Whether a socket for this address came back.
    pub fn has(&self, id: &SocketId) -> bool {
        self.sockets.iter().any(|(_, passed)| is_for(passed, id))
    }
}

/// Whether a socket is the one that an address of the configuration wants.
pub fn is_for(passed: &Passed, id: &SocketId) -> bool {
    let (bound, udp): (Bound, bool) = match passed.kind {
        Kind::Tcp(bound) => (bound, false),
        Kind::Udp(bound) => (bound, true),
        Kind::Other => return false,
    };
    let same = (bound.address.ip(), bound.address.port()) == (id.address.ip(), id.address.port());
    // The name carries the interface, which the address does not.
    let interface = id.interface.as_deref().map_or(String::new(), |name| format!("-{name}"));
    same && udp == id.udp && passed.name.ends_with(&format!("{}{interface}", plain(id)))
}

/// The name of a slot's socket: printable, without colons (sd_notify(3)).
fn name(slot: usize, id: &SocketId) -> String {
    let interface = id.interface.as_deref().map_or(String::new(), |name| format!("-{name}"));
    format!("{SLOT}{slot}-{}{interface}", plain(id))
}

fn plain(id: &SocketId) -> String {
    format!("{}-{}", if id.udp { "udp" } else { "tcp" }, id.address).replace(':', "_")
}

impl Store {
    /// A store that has what came back already.
    pub fn of_environment(returned: &Returned) -> Store {
        let stored = returned.sockets.iter().map(|(_, passed)| (passed.name.clone(), passed.fd.as_raw_fd()));
        Store { heard: notify::is_heard(), stored: stored.collect(), ..Store::default() }
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.heard
    }

    /// Has systemd keep the slots' sockets, and no others.
    pub fn update(&mut self, now: Millis, slots: &[Slot]) {
        if !self.heard {
            return;
        }
        let held = || slots.iter().flat_map(|slot| slot.held().iter().map(move |held| (slot, held)));
        let seen: Vec<(usize, RawFd)> = held().map(|(slot, (_, fd))| (slot.number, fd.as_raw_fd())).collect();
        if seen == self.seen && self.try_at.is_none_or(|at| at > now) {
            return;
        }
        let wanted: Vec<(String, BorrowedFd)> = held()
            // systemd holds these by itself.
            .filter(|(slot, (id, _))| !slot.outliving().contains(id))
            .map(|(slot, (id, fd))| (name(slot.number, id), fd.as_fd()))
            .collect();
        self.try_at = None;
        let kept = |stored: &(String, RawFd)| {
            wanted.iter().any(|(name, fd)| *name == stored.0 && fd.as_raw_fd() == stored.1)
        };
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.stored).into_iter().partition(kept);
        self.stored = kept;
        for entry in gone {
            if !self.told(now, &format!("FDSTOREREMOVE=1\nFDNAME={}", entry.0), &[]) {
                self.stored.push(entry);
            }
        }
        for (name, fd) in wanted {
            let entry = (name, fd.as_raw_fd());
            if self.stored.contains(&entry) {
                continue;
            }
            // Not taken out when its other side hangs up: FDPOLL=0.
            if self.told(now, &format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", entry.0), &[fd]) {
                self.stored.push(entry);
            }
        }
        self.seen = seen;
    }

    /// The daemon leaves for good: nothing is to be kept open.
    pub fn clear(&mut self, now: Millis) {
        for (name, _) in std::mem::take(&mut self.stored) {
            self.told(now, &format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
        }
        self.heard = false;
        self.try_at = None;
    }

    /// When `update` is due at the latest.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.try_at
    }

    /// Keeps a slot's parked sessions; whether systemd was told.
    pub fn keep_lot(&self, slot: usize, a: BorrowedFd, b: BorrowedFd) -> bool {
        let keep = |end: &str, fd| {
            let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={LOT}{slot}-{end}");
            notify::send_patiently(&text, &[fd]).inspect_err(|error| warn!(%error, "the store")).is_ok()
        };
        keep("a", a) && keep("b", b)
    }

    /// Keeps how the parked flows were steered.
    pub fn keep_steering(&self, memory: BorrowedFd) {
        let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={STEERING}");
        if let Err(error) = notify::send_patiently(&text, &[memory]) {
            warn!(%error, "the store");
        }
    }

    /// A lot is empty.
    pub fn remove_lot(&mut self, slot: usize) {
        for end in ["a", "b"] {
            let text = format!("FDSTOREREMOVE=1\nFDNAME={LOT}{slot}-{end}");
            if let Err(error) = notify::send_patiently(&text, &[]) {
                warn!(%error, "the store");
            }
        }
    }

    /// Takes out what came back and is of no use.
    pub fn remove(&mut self, names: &[String]) {
        for name in names {
            self.stored.retain(|(stored, _)| stored != name);
            if let Err(error) = notify::send_patiently(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]) {
                warn!(%error, "the store");
            }
        }
    }

    fn told(&mut self, now: Millis, state: &str, fds: &[BorrowedFd]) -> bool {
        match notify::send_with(state, fds) {
            Ok(()) => true,
            Err(error) => {
                debug!(%error, "systemd is told of a descriptor later");
                self.try_at = Some(now + TRY_AGAIN);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn names_are_printable_and_come_back_to_their_slot() {
        let id =
            SocketId { address: "[::1]:80".parse().unwrap(), udp: false, interface: Some("eth0".into()) };
        assert_eq!(name(12, &id), "evenkeel-slot-12-tcp-[__1]_80-eth0");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let id = SocketId { address, udp: false, interface: None };
        let bound = Bound { address, uid: 0, shared: true, dual: false };
        let passed =
            |name: &str, kind| Passed { fd: listener.try_clone().unwrap().into(), name: name.into(), kind };
        let all = vec![
            passed(&name(3, &id), Kind::Tcp(bound)),
            passed("web", Kind::Tcp(bound)),
            passed("evenkeel-lot-1-b", Kind::Other),
            passed("evenkeel-lot-1-a", Kind::Other),
            passed("evenkeel-lot-2-a", Kind::Other),
            passed("evenkeel-slot-x", Kind::Other),
        ];
        let (others, returned) = part(all);
        assert_eq!(others.len(), 1);
        assert_eq!(returned.sockets[0].0, 3);
        assert!(returned.has(&id) && !returned.has(&SocketId { udp: true, ..id }));
        assert_eq!(returned.lots.iter().map(|(slot, ..)| *slot).collect::<Vec<_>>(), [1]);
        assert_eq!(returned.useless, ["evenkeel-slot-x", "evenkeel-lot-2-a"]);
    }
}
