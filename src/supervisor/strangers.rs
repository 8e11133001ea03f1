//! Sockets of other programs on our addresses, which joined while we run.
//!
//! SO_REUSEPORT lets every program of our own user bind beside us, and the
//! kernel gives it a part of our clients. Nobody is told of that; so it is
//! looked for: after each reload, and every half minute, which is as often as
//! an idle daemon may be woken for it. One netlink dump an address; who owns
//! a socket is looked up only where there is a strange one. With `share_ports`
//! it is wanted, and a group is everybody's.

use std::collections::{BTreeMap, HashSet};

use tracing::{info, warn};

use super::Supervisor;
use super::slot::Slot;
use crate::control::ToSteward;
use crate::sys::clock::{self, Millis};
use crate::sys::holders::{self, Holder, Protocol};

/// How often it is looked, in milliseconds.
const LOOK_EVERY: Millis = 30_000;

/// By listener, what each strange socket is.
pub type Found = BTreeMap<String, Vec<String>>;

/// What was found, and when the next look is due.
#[derive(Debug, Default)]
pub struct Strangers {
    look_at: Millis,
    found: Found,
    is_told: bool,
}

impl Strangers {
    /// When the next look is due.
    pub fn due_at(&self) -> Millis {
        self.look_at
    }

    /// A look is worth it now.
    pub fn expect(&mut self) {
        self.look_at = 0;
    }

    /// A new steward knows nothing.
    pub fn forget_told(&mut self) {
        self.is_told = self.found.is_empty();
    }

    /// Tells the steward; `send` answers whether it heard.
    pub fn tell(&mut self, send: impl FnOnce(&ToSteward) -> bool) {
        if !self.is_told {
            self.is_told = send(&ToSteward::Strangers(self.found.clone()));
        }
    }
}

impl Supervisor {
    /// Looks, where it is time to; whether there is anything new to tell.
    pub(super) fn look_for_strangers(&mut self) -> bool {
        let now = clock::coarse();
        if self.strangers.look_at > now || !self.announced || self.reload.is_some() || self.leave.is_some() {
            return false;
        }
        self.strangers.look_at = now + LOOK_EVERY;
        let found = if self.generation.config.daemon.share_ports { Found::new() } else { self.strangers() };
        if found == self.strangers.found {
            return false;
        }
        for (listener, sockets) in &found {
            for socket in sockets {
                warn!("listener {listener}: {socket} takes a part of its clients");
            }
        }
        if found.is_empty() {
            info!("nobody else has sockets on our addresses any more");
        }
        self.strangers.found = found;
        self.strangers.is_told = false;
        true
    }

    fn strangers(&self) -> Found {
        let slots = || self.slots.iter().chain(&self.retiring);
        let ours: HashSet<u64> = slots().flat_map(Slot::inodes).collect();
        let mut found = Found::new();
        for (place, id) in self.generation.places() {
            if id.address.ip().is_multicast() {
                continue;
            }
            let protocol = if id.udp { Protocol::Udp } else { Protocol::Tcp };
            let strange = holders::strangers(id.address, protocol, id.interface.as_deref(), &ours);
            if !strange.is_empty() {
                let name = self.generation.config.listeners[place.listener].name.clone();
                found.entry(name).or_default().extend(strange.iter().map(describe));
            }
        }
        found
    }
}

fn describe(holder: &Holder) -> String {
    let owners: Vec<String> =
        holder.processes.iter().map(|owner| format!("pid {} ({})", owner.pid, owner.command)).collect();
    let owners =
        if owners.is_empty() { "a process that is not visible from here".into() } else { owners.join(", ") };
    let sockets =
        if holder.socket_count == 1 { "a socket".into() } else { format!("{} sockets", holder.socket_count) };
    format!("{sockets} on {}/{} of {owners}", holder.local, holder.protocol.name())
}
