//! The sockets of one address, and what steers them now.
//!
//! Owned by `Steering`, from the first socket until no listener has the
//! address any more; the program goes on as long as the sockets do.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::Plan;
use crate::control::SocketId;
use crate::steering::policy::Traffic;
use crate::steering::{MAX_SLOTS, Pick, Table, classic, page, program};
use crate::supervisor::slot::Slot;
use crate::supervisor::upgrade::{Packer, Unpacker};
use crate::sys::bpf::{self, Page, Program, SocketArray};

/// How a group is steered.
#[derive(Debug)]
pub enum Group {
    /// By a table in the kernel.
    Table(Kernel),
    /// By classic BPF where that is needed, else by the kernel's hash.
    Classic {
        /// How many slots have a socket here.
        socket_count: usize,
        /// Whether a program is attached now.
        is_attached: bool,
    },
}

/// What the kernel has of a group.
#[derive(Debug)]
pub struct Kernel {
    page: Page,
    sockets: SocketArray,
    program: Program,
    is_attached: bool,
    /// The socket of each slot that stands in the array.
    places: Vec<Option<RawFd>>,
}

/// What the next image of the supervisor finds of a group.
#[derive(Debug, Serialize, Deserialize)]
pub enum State {
    /// Descriptors of the page, the array and the program; for each slot
    /// whether its socket stands in the array.
    #[allow(missing_docs)]
    Table { page: RawFd, sockets: RawFd, program: RawFd, is_attached: bool, places: Vec<bool> },
    #[allow(missing_docs)]
    Classic { socket_count: usize, is_attached: bool },
}

/// A page that the image before this one made.
pub fn open_page(unpacker: &mut Unpacker, number: RawFd, bytes: usize) -> Result<Page, String> {
    Page::open(unpacker.take(number)?, bytes).map_err(|error| format!("a page of the kernel's: {error}"))
}

/// Whether eBPF can be used: makes and loads all that it takes, once; the page
/// of loads.
pub fn try_all(forbidden: Option<&str>) -> io::Result<Page> {
    if let Some(by) = forbidden {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{by} is set")));
    }
    let loads = Page::create(page::LOADS_BYTES)?;
    Kernel::new(&loads)?;
    Ok(loads)
}

impl Group {
    /// Nobody is in it yet.
    pub fn new(loads: Option<&Page>) -> Group {
        let kernel = loads.map(Kernel::new);
        match kernel {
            Some(Ok(kernel)) => Group::Table(kernel),
            Some(Err(error)) => {
                warn!(%error, "no further table could be made: steering without it");
                Group::classic()
            }
            None => Group::classic(),
        }
    }

    /// As the next image of the supervisor is to find it.
    pub fn pack<'a>(&'a self, packer: &mut Packer<'a>) -> State {
        match self {
            Group::Table(kernel) => State::Table {
                page: packer.keep(&kernel.page),
                sockets: packer.keep(&kernel.sockets),
                program: packer.keep(&kernel.program),
                is_attached: kernel.is_attached,
                places: kernel.places.iter().map(Option::is_some).collect(),
            },
            Group::Classic { socket_count, is_attached } => {
                State::Classic { socket_count: *socket_count, is_attached: *is_attached }
            }
        }
    }

    /// As the image before this one left it, with its sockets in their places.
    pub fn unpack(
        state: State,
        unpacker: &mut Unpacker,
        id: &SocketId,
        slots: &[Slot],
    ) -> Result<Group, String> {
        Ok(match state {
            State::Classic { socket_count, is_attached } => Group::Classic { socket_count, is_attached },
            State::Table { page, sockets, program, is_attached, places } => Group::Table(Kernel {
                page: open_page(unpacker, page, page::PAGE_BYTES)?,
                sockets: SocketArray::from_fd(unpacker.take(sockets)?),
                program: Program::from_fd(unpacker.take(program)?),
                is_attached,
                // A socket that is in an array cannot be put there again.
                places: slots
                    .iter()
                    .enumerate()
                    .map(|(at, slot)| {
                        let was_there = places.get(at) == Some(&true);
                        slot.socket(id).filter(|_| was_there).map(|socket| socket.as_raw_fd())
                    })
                    .collect(),
            }),
        })
    }

    fn classic() -> Group {
        Group::Classic { socket_count: 0, is_attached: false }
    }

    /// What `status` calls it.
    pub fn active(&self) -> &'static str {
        match self {
            Group::Table(_) => "ebpf-table",
            Group::Classic { is_attached: true, .. } => "cbpf",
            Group::Classic { is_attached: false, .. } => "hash",
        }
    }

    /// Takes in the sockets that slots have now; whether there are new ones.
    pub fn take_in(&mut self, id: &SocketId, slots: &[Slot]) -> bool {
        match self {
            Group::Table(kernel) => match kernel.take_in(id, slots) {
                Ok(changed) => changed,
                Err(error) => {
                    warn!(%error, "the table of {} cannot be used: steering without it", id.address);
                    *self = Group::classic();
                    true
                }
            },
            Group::Classic { socket_count, .. } => {
                let count = slots.iter().filter(|slot| slot.socket(id).is_some()).count();
                std::mem::replace(socket_count, count) != count
            }
        }
    }

    /// Has the kernel steer by this table, or as near to it as can be.
    pub fn write(
        &mut self,
        id: &SocketId,
        plan: &Plan,
        table: &Table,
        weights: &[u32],
        slots: &[Slot],
    ) -> io::Result<()> {
        match self {
            Group::Table(kernel) => kernel.write(plan, table),
            Group::Classic { is_attached, .. } => {
                let Some(socket) = slots.iter().find_map(|slot| slot.socket(id)) else { return Ok(()) };
                *is_attached = attach_classic(socket, id, plan, weights)?;
            }
        }
        Ok(())
    }
}

impl Kernel {
    fn new(loads: &Page) -> io::Result<Kernel> {
        let page = Page::create(page::PAGE_BYTES)?;
        let sockets = SocketArray::create(MAX_SLOTS as u32)?;
        let code = program::program(sockets.as_fd(), page.as_fd(), loads.as_fd());
        let program = Program::load(&code)?;
        Ok(Kernel { page, sockets, program, is_attached: false, places: Vec::new() })
    }

    fn take_in(&mut self, id: &SocketId, slots: &[Slot]) -> io::Result<bool> {
        // A slot that was given up took its socket along, and its place in the
        // array emptied by itself.
        self.places.resize(slots.len(), None);
        let mut changed = false;
        for (slot, place) in slots.iter().zip(&mut self.places) {
            let socket = slot.socket(id);
            let raw = socket.map(|socket| socket.as_raw_fd());
            if *place == raw {
                continue;
            }
            if let Some(socket) = socket {
                self.sockets.put(slot.number as u32, socket)?;
                if !self.is_attached {
                    self.program.attach(socket)?;
                    self.is_attached = true;
                }
            }
            *place = raw;
            changed = true;
        }
        Ok(changed)
    }

    fn write(&self, plan: &Plan, table: &Table) {
        let row_shift = plan.row_shift();
        self.page.word(page::SEED).store(plan.seed, Relaxed);
        self.page.word(page::ROW_SHIFT).store(row_shift, Relaxed);
        self.page.word(page::ROW_MASK).store((1 << row_shift) - 1, Relaxed);
        for (at, slot) in table.bytes().iter().enumerate() {
            self.page.byte(page::TABLE + at).store(*slot, Relaxed);
        }
        self.page.word(page::PICK).store(plan.pick as u32, Relaxed);
    }
}

/// Attaches what fits these weights; false where the kernel's hash does as
/// well.
fn attach_classic(socket: BorrowedFd, id: &SocketId, plan: &Plan, weights: &[u32]) -> io::Result<bool> {
    let live: Vec<bool> = weights.iter().map(|weight| *weight > 0).collect();
    let by_hash = matches!(plan.pick, Pick::Connection | Pick::TwoChoices);
    let everyone_or_nobody = live.iter().all(|is| *is == live[0]);
    if by_hash && plan.traffic == Traffic::Connections && everyone_or_nobody {
        bpf::classic::detach(socket)?;
        return Ok(false);
    }
    let is_ipv6 = id.address.is_ipv6();
    let request =
        classic::Request { pick: plan.pick, is_ipv6, seed: plan.seed, live: &live, cpus: &plan.cpus };
    // Where nobody is there, what is attached stays.
    if let Some(program) = classic::program(&request) {
        bpf::classic::attach(socket, &program)?;
    }
    Ok(true)
}
