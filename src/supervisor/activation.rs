//! Socket activation: which slot gets which of the sockets that systemd
//! opened for us.
//!
//! A `.socket` unit with ReusePort=yes and one ListenStream line a worker
//! passes a whole group. The sockets are told apart by their address alone;
//! the first of an address is slot 0's, the next slot 1's, and so on. What is
//! left over goes round again: systemd keeps every socket open, so one that
//! nobody serves would be a queue without a reader. They are held by their
//! slots like sockets that a worker opened, and outlive the daemon.

use std::os::fd::OwnedFd;

use super::generation::Generation;
use super::slot::Slot;
use super::store::{self, Returned};
use super::{Refusal, Start};
use crate::config::{Config, Listener, Mode};
use crate::control::{Place, SocketId};
use crate::sys::accounts;
use crate::sys::activation::{self, Bound, Kind, Passed};
use crate::sys::bpf;
use crate::sys::listen::{self, OpenError, Options};
use crate::sys::stream::TcpOptions;

/// Who gets what, and what the operator should know.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Assignment {
    /// For each slot its places, each with the number of a socket.
    slots: Vec<Vec<(Place, usize)>>,
    /// To be logged once there is a log.
    pub notes: Vec<String>,
}

impl Assignment {
    /// Whether systemd listens at this place already.
    pub fn has(&self, listener: usize, address: usize) -> bool {
        let wanted = Place { listener, address };
        self.slots.iter().flatten().any(|(place, _)| *place == wanted)
    }
}

/// Matches what was passed with the listeners.
pub fn assign(start: &Start, slot_count: usize, passed: &[Passed]) -> Result<Assignment, Refusal> {
    let kinds: Vec<Kind> = passed.iter().map(|passed| passed.kind).collect();
    let mut assignment = match_up(&start.config, slot_count, &kinds, accounts::current_uid())?;
    for (index, passed) in passed.iter().enumerate() {
        if !assignment.slots.iter().flatten().any(|(_, socket)| *socket == index) {
            assignment.notes.push(unused(passed));
        }
    }
    Ok(assignment)
}

/// Gives the slots what is theirs; what is nobody's is closed.
pub fn give(
    generation: &Generation,
    assignment: &Assignment,
    passed: Vec<Passed>,
    slots: &mut [Slot],
) -> Result<(), Refusal> {
    let mut sockets: Vec<Option<OwnedFd>> = passed.into_iter().map(|passed| Some(passed.fd)).collect();
    for (slot, places) in slots.iter_mut().zip(&assignment.slots) {
        let mut own = Vec::new();
        for (place, index) in places {
            let socket = sockets[*index].take().expect("a socket is assigned once");
            adopt(&generation.config.listeners[place.listener], place.address, &socket)?;
            own.push((*place, socket));
        }
        slot.adopt(generation, own);
    }
    Ok(())
}

/// Gives the slots what they had before a restart (`store`); what is of no use
/// any more is closed. What the operator should know.
pub fn take_back(generation: &Generation, returned: &mut Returned, slots: &mut [Slot]) -> Vec<String> {
    let mut notes = Vec::new();
    let (places, uid, slot_count) = (generation.places(), accounts::current_uid(), slots.len());
    for (number, passed) in std::mem::take(&mut returned.sockets) {
        let place = places.iter().find(|(_, id)| store::is_for(&passed, id));
        let bound = match passed.kind {
            Kind::Tcp(bound) | Kind::Udp(bound) => Some(bound),
            Kind::Other => None,
        };
        let why = match (place, bound) {
            (Some(_), Some(bound)) if bound.uid != uid => "it belongs to another user than this process",
            (Some((_, id)), _) if number >= slot_count && id.udp => "its slot is no more",
            (Some(_), Some(_)) => "",
            _ => "no listener wants it",
        };
        let adopted = place.filter(|_| why.is_empty()).map(|(place, id)| {
            // It would be steered by the daemon before, into an array in which
            // it stands.
            let _ = bpf::classic::detach(&passed.fd);
            let listener = &generation.config.listeners[place.listener];
            let is_group = listen::is_group(id.address);
            if is_group {
                Ok(id.clone())
            } else {
                adopt(listener, place.address, &passed.fd).map(|()| id.clone())
            }
        });
        match adopted {
            Some(Ok(id)) => {
                // Who waits at a slot that is no more is served by another one.
                slots[number % slot_count].take_back(id, passed.fd);
            }
            Some(Err(refusal)) => {
                notes.push(format!("{} from the store is closed: {}", passed.name, refusal.text));
                returned.useless.push(passed.name);
            }
            None => {
                notes.push(format!("{} from the store is closed, with who waits there: {why}", passed.name));
                returned.useless.push(passed.name);
            }
        }
    }
    notes
}

/// Refuses a change of the running daemon after which nobody would serve a
/// socket of systemd's: it stays open, and whoever is steered to it waits.
pub fn check_change(slots: &[Slot], config: &Config, slot_count: usize) -> Result<(), Refusal> {
    let is_wanted = |id: &SocketId| {
        let mut listeners = config.listeners.iter();
        listeners.any(|own| (own.mode == Mode::Udp) == id.udp && own.bind.contains(&id.address))
    };
    for slot in slots {
        let lost = slot.outliving().iter().find(|id| slot.number >= slot_count || !is_wanted(id));
        if let Some(id) = lost {
            let (number, address) = (slot.number, id.address);
            return Err(Refusal::new(
                78,
                format!(
                    "nobody would serve the socket at {address} that systemd opened for slot {number} and keeps open"
                ),
                "change the .socket unit and evenkeel.toml together, and restart both units",
            ));
        }
    }
    let fixed = slots.iter().flat_map(Slot::held).find(|(id, fd)| {
        slots.iter().any(|slot| slot.outliving().contains(id)) && !activation::can_be_joined(fd)
    });
    if let Some((id, _)) = fixed
        && slot_count > slots.len()
    {
        let (address, count) = (id.address, slots.len());
        let line = if id.udp { "ListenDatagram" } else { "ListenStream" };
        return Err(Refusal::new(
            78,
            format!(
                "systemd opened {address} for {count} workers, and this process cannot add a socket to its"
            ),
            format!(
                "write {line}={address} {slot_count} times in the .socket unit, set workers = {slot_count}, and restart both units"
            ),
        ));
    }
    Ok(())
}

fn match_up(config: &Config, slot_count: usize, kinds: &[Kind], uid: u32) -> Result<Assignment, Refusal> {
    let mut assignment = Assignment { slots: vec![Vec::new(); slot_count], notes: Vec::new() };
    for (listener_index, listener) in config.listeners.iter().enumerate() {
        for address in 0..listener.bind.len() {
            let place = Place { listener: listener_index, address };
            let fitting: Vec<(usize, Bound)> = kinds
                .iter()
                .enumerate()
                .filter_map(|(index, kind)| Some((index, fits(listener, address, *kind)?)))
                .collect();
            for (turn, (index, _)) in fitting.iter().enumerate() {
                assignment.slots[turn % slot_count].push((place, *index));
            }
            let Some((_, bound)) = fitting.first() else { continue };
            let note = judge(listener, address, fitting.len(), slot_count, bound, uid)?;
            assignment.notes.extend(note);
            if bound.dual {
                assignment.notes.push(format!(
                    "listener \"{}\": systemd's socket at {} takes IPv4 as well; set BindIPv6Only=ipv6-only in the .socket unit",
                    listener.name, listener.bind[address]
                ));
            }
        }
    }
    Ok(assignment)
}

/// The socket, if it is one for this address of the listener.
fn fits(listener: &Listener, address: usize, kind: Kind) -> Option<Bound> {
    let bound = match (listener.mode, kind) {
        (Mode::Tcp, Kind::Tcp(bound)) => bound,
        // A group's members are evenkeel's own: each needs its share.
        (Mode::Udp, Kind::Udp(bound)) if !listen::is_group(bound.address) => bound,
        (Mode::Tcp | Mode::Udp, _) => return None,
    };
    let wanted = listener.bind[address];
    // Not the whole SocketAddr: a scope is the kernel's to fill in.
    ((bound.address.ip(), bound.address.port()) == (wanted.ip(), wanted.port())).then_some(bound)
}

/// What is to be said of so many sockets for so many slots.
fn judge(
    listener: &Listener,
    address: usize,
    count: usize,
    slot_count: usize,
    bound: &Bound,
    uid: u32,
) -> Result<Option<String>, Refusal> {
    let (name, address) = (&listener.name, listener.bind[address]);
    if count == slot_count {
        return Ok(None);
    }
    let sockets = if count == 1 { "socket" } else { "sockets" };
    if count > slot_count {
        let each = count.div_ceil(slot_count);
        return Ok(Some(format!(
            "listener \"{name}\": systemd passed {count} {sockets} for {address} to {slot_count} workers, so that \
             some serve {each} and get more; even is one ListenStream line a worker"
        )));
    }
    // sk_uid of a group is one (net/core/sock_reuseport.c): beside sockets
    // that systemd opened as root nobody else's can be bound.
    if bound.uid == uid && bound.shared {
        let first = count;
        return Ok(Some(format!(
            "listener \"{name}\": systemd passed {count} {sockets} for {address}; slots {first} to {} open their own",
            slot_count - 1
        )));
    }
    let why = if bound.shared {
        format!(
            "they belong to uid {}, so that this process, uid {uid}, cannot add to them; write",
            bound.uid
        )
    } else {
        "it was not opened to be shared; write ReusePort=yes and".to_string()
    };
    Err(Refusal::new(
        78,
        format!(
            "listener \"{name}\": systemd passed {count} {sockets} for {address}, and {slot_count} workers need one each"
        ),
        format!(
            "{why} ListenStream={address} {slot_count} times in the .socket unit, or set workers = {count}"
        ),
    ))
}

fn unused(passed: &Passed) -> String {
    let (number, name) = (activation::number(passed), &passed.name);
    let what = match passed.kind {
        Kind::Tcp(bound) => format!("{}/tcp", bound.address),
        Kind::Udp(bound) => format!("{}/udp", bound.address),
        Kind::Other => "no socket that a listener could use".to_string(),
    };
    format!(
        "descriptor {number} from systemd ({name}: {what}) belongs to no listener: closed; systemd keeps it open, \
         and who connects there waits for ever: take it out of the .socket unit, or add a listener"
    )
}

/// Sets what the configuration says of the listener and can still be set.
fn adopt(listener: &Listener, address: usize, socket: &OwnedFd) -> Result<(), Refusal> {
    let options = Options {
        backlog: listener.backlog,
        receive_buffer: listener.receive_buffer,
        send_buffer: listener.send_buffer,
        fast_open: listener.tcp.fast_open,
        defer_accept: listener.tcp.defer_accept,
        ..Options::default()
    };
    let refused = |text: String| Refusal::new(1, format!("listener \"{}\": {text}", listener.name), "");
    let adopted = match listener.mode {
        Mode::Tcp => listen::adopt_tcp(socket, listener.bind[address], &options),
        Mode::Udp => listen::adopt_udp(socket, listener.bind[address], &options),
    };
    adopted.map_err(|error: OpenError| refused(error.to_string()))?;
    if listener.mode == Mode::Udp {
        return Ok(());
    }
    let tcp = TcpOptions { keepalive: listener.tcp.keepalive, user_timeout: listener.tcp.user_timeout };
    tcp.apply(socket).map_err(|error| refused(format!("{}: {error}", listener.bind[address])))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[[listener]]\nname = \"a\"\nmode = \"tcp\"\nbind = [\"127.0.0.1:80\", \"[::1]:80\"]\nservice = \"echo\"\n\
        [[listener]]\nname = \"b\"\nmode = \"tcp\"\nbind = \"127.0.0.1:81\"\nservice = \"echo\"\n";

    fn config() -> Config {
        crate::config::load("test", TEXT).expect("a good configuration").config
    }

    fn tcp(address: &str) -> Kind {
        Kind::Tcp(Bound { address: address.parse().unwrap(), uid: 0, shared: true, dual: false })
    }

    fn place(listener: usize, address: usize) -> Place {
        Place { listener, address }
    }

    #[test]
    fn sockets_go_to_the_slots_in_order_by_address() {
        let kinds = [tcp("127.0.0.1:81"), tcp("127.0.0.1:80"), tcp("127.0.0.1:80"), tcp("127.0.0.1:81")];
        let assignment = match_up(&config(), 2, &kinds, 1000).unwrap();
        assert_eq!(
            assignment.slots,
            [[(place(0, 0), 1), (place(1, 0), 0)], [(place(0, 0), 2), (place(1, 0), 3)]]
        );
        assert_eq!(assignment.notes, Vec::<String>::new());
        assert!(assignment.has(1, 0) && !assignment.has(0, 1));
    }

    #[test]
    fn what_is_left_over_goes_round_again_and_is_said() {
        let kinds = [tcp("127.0.0.1:80"); 3];
        let assignment = match_up(&config(), 2, &kinds, 1000).unwrap();
        assert_eq!(assignment.slots[0], [(place(0, 0), 0), (place(0, 0), 2)]);
        assert_eq!(assignment.slots[1], [(place(0, 0), 1)]);
        assert!(
            assignment.notes[0].contains("3 sockets for 127.0.0.1:80 to 2 workers"),
            "{:?}",
            assignment.notes
        );
    }

    #[test]
    fn too_few_are_completed_by_the_same_user_and_refused_to_another() {
        let kinds = [tcp("127.0.0.1:81"); 2];
        let assignment = match_up(&config(), 4, &kinds, 0).unwrap();
        assert!(assignment.notes[0].contains("slots 2 to 3 open their own"), "{:?}", assignment.notes);
        let refusal = match_up(&config(), 4, &kinds, 1000).unwrap_err();
        assert_eq!(refusal.exit_code, 78);
        assert!(
            refusal.text.contains("2 sockets for 127.0.0.1:81, and 4 workers need one each"),
            "{refusal:?}"
        );
        assert!(refusal.advice.contains("ListenStream=127.0.0.1:81 4 times"), "{refusal:?}");
    }

    #[test]
    fn one_that_cannot_be_shared_is_enough_for_one_worker_alone() {
        let address = "127.0.0.1:81".parse().unwrap();
        let kinds = [Kind::Tcp(Bound { address, uid: 0, shared: false, dual: false })];
        assert!(match_up(&config(), 1, &kinds, 0).is_ok());
        let refusal = match_up(&config(), 2, &kinds, 0).unwrap_err();
        assert!(refusal.advice.contains("ReusePort=yes"), "{refusal:?}");
    }

    #[test]
    fn a_dual_socket_and_sockets_of_nobody_are_said() {
        let address = "[::1]:80".parse().unwrap();
        let kinds =
            [Kind::Tcp(Bound { address, uid: 0, shared: true, dual: true }), tcp("127.0.0.1:9"), Kind::Other];
        let assignment = match_up(&config(), 1, &kinds, 0).unwrap();
        assert!(assignment.notes[0].contains("BindIPv6Only=ipv6-only"), "{:?}", assignment.notes);
        assert_eq!(assignment.slots[0], [(place(0, 1), 0)]);
    }
}
