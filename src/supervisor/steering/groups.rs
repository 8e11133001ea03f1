//! The groups of sockets of one listener, one an address, and what steers
//! them now.
//!
//! Owned by the listener's `Steered`; ends with it, while programs go on as
//! long as their group's sockets.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;

use super::Plan;
use crate::control::Place;
use crate::steering::policy::Traffic;
use crate::steering::{MAX_SLOTS, Pick, Table, classic, page, program};
use crate::supervisor::slot::Slot;
use crate::sys::bpf::{self, Page, Program, SocketArray};

/// How the groups are steered.
#[derive(Debug)]
pub enum Groups {
    /// By a table in the kernel.
    Table(Tables),
    /// By classic BPF where that is needed, else by the kernel's hash.
    Classic {
        /// Whether a program is attached now.
        is_attached: bool,
    },
}

/// A page for the listener, and a program and sockets for each address.
#[derive(Debug)]
pub struct Tables {
    page: Page,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    sockets: SocketArray,
    program: Program,
    is_attached: bool,
}

impl Groups {
    /// Maps and programs for so many addresses.
    pub fn with_table(address_count: usize, plan: &Plan, loads: &Page) -> io::Result<Groups> {
        let page = Page::create(page::PAGE_BYTES)?;
        page.word(page::PICK).store(plan.pick as u32, Relaxed);
        page.word(page::SEED).store(plan.seed, Relaxed);
        page.word(page::ROW_SHIFT).store(plan.row_shift(), Relaxed);
        page.word(page::ROW_MASK).store((1 << plan.row_shift()) - 1, Relaxed);
        let group = |_| {
            let sockets = SocketArray::create(MAX_SLOTS as u32)?;
            let code = program::program(sockets.as_fd(), page.as_fd(), loads.as_fd());
            Ok(Group { sockets, program: Program::load(&code)?, is_attached: false })
        };
        let groups = (0..address_count).map(group).collect::<io::Result<Vec<_>>>()?;
        Ok(Groups::Table(Tables { page, groups }))
    }

    /// No maps.
    pub fn classic() -> Groups {
        Groups::Classic { is_attached: false }
    }

    /// What `status` calls it.
    pub fn active(&self) -> &'static str {
        match self {
            Groups::Table(_) => "ebpf-table",
            Groups::Classic { is_attached: true } => "cbpf",
            Groups::Classic { is_attached: false } => "hash",
        }
    }

    /// A slot's socket takes its place.
    pub fn put(&mut self, address: usize, slot: usize, socket: BorrowedFd) -> io::Result<()> {
        let Groups::Table(tables) = self else { return Ok(()) };
        let group = tables.groups.get_mut(address).ok_or(io::ErrorKind::InvalidInput)?;
        group.sockets.put(slot as u32, socket)?;
        if !group.is_attached {
            group.program.attach(socket)?;
            group.is_attached = true;
        }
        Ok(())
    }

    /// Has the kernel steer by this table, or as near to it as can be.
    pub fn write(
        &mut self,
        listener: usize,
        plan: &Plan,
        table: &Table,
        weights: &[u32],
        slots: &[Slot],
    ) -> io::Result<()> {
        match self {
            Groups::Table(tables) => {
                for (at, slot) in table.bytes().iter().enumerate() {
                    tables.page.byte(page::TABLE + at).store(*slot, Relaxed);
                }
                Ok(())
            }
            Groups::Classic { is_attached } => {
                *is_attached = attach_classic(listener, plan, weights, slots)?;
                Ok(())
            }
        }
    }
}

/// Attaches what fits these weights to every group of the listener; false
/// where the kernel's hash does as well.
fn attach_classic(listener: usize, plan: &Plan, weights: &[u32], slots: &[Slot]) -> io::Result<bool> {
    let live: Vec<bool> = weights.iter().map(|weight| *weight > 0).collect();
    let by_hash = matches!(plan.pick, Pick::Connection | Pick::TwoChoices);
    let everyone_or_nobody = live.iter().all(|is| *is == live[0]);
    let wanted = !(by_hash && plan.traffic == Traffic::Connections && everyone_or_nobody);
    let mut is_attached = false;
    for socket in one_socket_each(listener, slots) {
        let request = classic::Request {
            pick: plan.pick,
            is_ipv6: is_ipv6(socket),
            seed: plan.seed,
            live: &live,
            cpus: &plan.cpus,
        };
        match classic::program(&request).filter(|_| wanted) {
            Some(program) => {
                bpf::classic::attach(socket, &program)?;
                is_attached = true;
            }
            None if wanted => is_attached = true,
            None => bpf::classic::detach(socket)?,
        }
    }
    Ok(is_attached)
}

/// A socket of each of the listener's groups.
fn one_socket_each(listener: usize, slots: &[Slot]) -> impl Iterator<Item = BorrowedFd<'_>> {
    let mut found: Vec<(usize, BorrowedFd)> = Vec::new();
    for (Place { address, .. }, socket) in
        slots.iter().flat_map(Slot::sockets).filter(|(place, _)| place.listener == listener)
    {
        if found.iter().all(|(other, _)| *other != address) {
            found.push((address, socket));
        }
    }
    found.into_iter().map(|(_, socket)| socket)
}

fn is_ipv6(socket: BorrowedFd) -> bool {
    socket2::SockRef::from(&socket).local_addr().is_ok_and(|address| address.is_ipv6())
}
