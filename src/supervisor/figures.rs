//! What waits at the slots' sockets and what the kernel dropped there, for
//! whoever asks the steward.
//!
//! Looked at only when the steward asks, which does so a few times a second at
//! most, whoever asks it: two short system calls a socket. Owned by the
//! supervisor, because it holds every socket, also that of a slot whose worker
//! is dead or hung. A socket's count goes with the socket; what those had
//! counted that are gone is kept here, so that no sum ever goes back. Bounded
//! by the slots and the listeners of the present configuration.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};

use super::generation::Generation;
use crate::config::{Listener, Mode, Multicast};
use crate::control::{ListenerFigures, SlotFigures, SocketId};
use crate::sys::listen;
use crate::sys::queues::{self, Queue};

/// What is remembered between two looks.
#[derive(Debug, Default)]
pub struct Figures {
    /// By the socket's inode.
    known: HashMap<u64, Known>,
    /// By listener and slot: what sockets had dropped that are gone.
    gone: BTreeMap<(String, usize), u64>,
}

#[derive(Debug)]
struct Known {
    listener: String,
    slot: usize,
    dropped: u64,
}

impl Figures {
    /// What is to be remembered where the sockets themselves are passed on.
    pub fn gone(&self) -> Vec<(String, usize, u64)> {
        self.gone.iter().map(|((listener, slot), &count)| (listener.clone(), *slot, count)).collect()
    }

    /// One that remembers this.
    pub fn with_gone(gone: Vec<(String, usize, u64)>) -> Figures {
        let gone = gone.into_iter().map(|(listener, slot, count)| ((listener, slot), count)).collect();
        Figures { gone, ..Figures::default() }
    }

    /// Looks at the sockets of each slot now.
    pub fn look<'a>(
        &mut self,
        slots: impl Iterator<Item = (usize, &'a [(SocketId, OwnedFd)])>,
        generation: &Generation,
    ) -> Vec<ListenerFigures> {
        let places: HashMap<SocketId, usize> =
            generation.places().into_iter().map(|(place, id)| (id, place.listener)).collect();
        let listeners = &generation.config.listeners;
        let last = generation.slot_count() - 1;
        let mut sums = vec![vec![Queue::default(); last + 1]; listeners.len()];
        let mut earlier = std::mem::take(&mut self.known);
        for (slot, sockets) in slots {
            for (id, socket) in sockets {
                let Some(&index) = places.get(id) else { continue };
                let listener = &listeners[index];
                let Some((inode, queue)) = read(listener, id, socket) else { continue };
                earlier.remove(&inode);
                let (name, dropped) = (listener.name.clone(), queue.dropped);
                self.known.insert(inode, Known { listener: name, slot, dropped });
                let sum = &mut sums[index][slot.min(last)];
                sum.waiting += queue.waiting;
                sum.limit += queue.limit;
            }
        }
        for known in earlier.into_values() {
            *self.gone.entry((known.listener, known.slot)).or_default() += known.dropped;
        }
        self.gone.retain(|(name, _), _| listeners.iter().any(|listener| listener.name == *name));
        let known = self.known.values().map(|known| (known.listener.as_str(), known.slot, known.dropped));
        let gone = self.gone.iter().map(|((name, slot), &dropped)| (name.as_str(), *slot, dropped));
        for (name, slot, dropped) in known.chain(gone) {
            if let Some(index) = listeners.iter().position(|listener| listener.name == name) {
                sums[index][slot.min(last)].dropped += dropped;
            }
        }
        let figures = listeners.iter().zip(sums).map(|(listener, sums)| {
            let slot = |Queue { waiting, limit, dropped }| SlotFigures { waiting, limit, dropped };
            ListenerFigures { listener: listener.name.clone(), slots: sums.into_iter().map(slot).collect() }
        });
        figures.collect()
    }
}

fn read(listener: &Listener, id: &SocketId, socket: &OwnedFd) -> Option<(u64, Queue)> {
    let inode = nix::sys::stat::fstat(socket.as_fd()).ok()?.st_ino;
    let mut queue = if id.udp { queues::of_udp(socket) } else { queues::of_tcp(socket) }.ok()?;
    // There the kernel counts what the filter leaves to other slots as well.
    let is_divided = listener.mode == Mode::Udp
        && listen::is_group(id.address)
        && listener.udp.multicast == Multicast::Partition;
    if is_divided {
        queue.dropped = 0;
    }
    Some((inode, queue))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, UdpSocket};

    fn generation(name: &str, slot_count: usize) -> Generation {
        let text = format!(
            "[[listener]]\nname = \"{name}\"\nmode = \"udp\"\nbind = \"127.0.0.1:5353\"\nservice = \"discard\"\n"
        );
        let config = crate::config::load("test", &text).expect("a sane configuration").config;
        Generation::new(1, config, slot_count).expect("memory")
    }

    /// A socket that has dropped something.
    fn flooded() -> (SocketId, OwnedFd) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket2::SockRef::from(&socket).set_recv_buffer_size(4096).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..50 {
            client.send_to(&[0; 512], socket.local_addr().unwrap()).unwrap();
        }
        let address: SocketAddr = "127.0.0.1:5353".parse().unwrap();
        (SocketId { address, udp: true, interface: None }, socket.into())
    }

    #[test]
    fn what_a_socket_dropped_stays_in_the_sum_when_it_is_gone() {
        let (mut figures, two) = (Figures::default(), generation("a", 2));
        let sockets = [[flooded()], [flooded()]];
        let slots = || sockets.iter().enumerate().map(|(slot, own)| (slot, &own[..]));
        let all = figures.look(slots(), &two);
        let dropped: Vec<u64> = all[0].slots.iter().map(|slot| slot.dropped).collect();
        assert!(dropped.iter().all(|&count| count > 0) && all[0].slots[0].waiting > 0, "{all:?}");
        // The second slot is given up: what it counted is the last one's now.
        let left = figures.look(slots().take(1), &generation("a", 1));
        assert_eq!(left[0].slots.len(), 1);
        assert_eq!(left[0].slots[0].dropped, dropped.iter().sum::<u64>());
        // Another listener has nothing of it, and nothing is kept for ever.
        let other = figures.look(std::iter::empty(), &generation("b", 1));
        assert_eq!(other[0].slots[0].dropped, 0);
        assert!(figures.known.is_empty() && figures.gone.is_empty());
    }
}
