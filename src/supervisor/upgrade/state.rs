//! What one image of the supervisor leaves to the next: the state blob.
//!
//! JSON in a sealed memfd. Descriptors stand in it by their numbers, which
//! stay what they are over exec(2). Fields may be added, each with
//! `#[serde(default)]`; an image passes over what it does not know. `FORMAT`
//! grows where that is not enough: where a field comes to mean something else,
//! or what supervisor and worker say to each other (`control`) does, or the
//! order of counters. Images of different formats do not follow each other:
//! the upgrade is refused, and a restart is what is left.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::board::{self, Override};
use crate::config::{Config, Workers};
use crate::control::SocketId;
use crate::counters::{self, Layout};
use crate::supervision::Supervision;
use crate::supervisor::generation::Generation;
use crate::supervisor::keep::Tally;
use crate::supervisor::seen::SeenState;
use crate::supervisor::{Supervisor, steering};
use crate::sys::accounts::Account;
use crate::sys::clock::Millis;
use crate::sys::exec;

/// The version of all that an image must share with the one before it.
pub const FORMAT: u32 = 1;
/// What a program must call itself.
pub const PROGRAM: &str = "evenkeel";

/// What an image says of itself before it is tried.
#[derive(Debug, Serialize, Deserialize)]
pub struct Probe {
    pub program: String,
    pub version: String,
    pub format: u32,
    /// How counters are laid out.
    pub shape: Vec<usize>,
    /// The words of a slot's counters.
    pub words: usize,
    /// And those of a board.
    pub board_words: usize,
    /// The file as it reads it, for its own trial worker.
    pub config: Value,
}

/// All that is left.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    pub format: u32,
    pub version: String,
    pub shape: Vec<usize>,
    /// The image that wrote this.
    pub image: RawFd,
    /// The path from which the daemon runs.
    pub program: PathBuf,
    pub config_path: String,
    pub socket: PathBuf,
    pub started_at: u64,
    pub account: Option<Account>,
    pub control: RawFd,
    pub lock: RawFd,
    /// The board's, then the failures'.
    pub bells: [RawFd; 2],
    pub access_log: AccessLogState,
    #[serde(default)]
    pub admin: Option<(SocketAddr, RawFd)>,
    /// When the daemon started, in milliseconds of the monotonic clock.
    #[serde(default)]
    pub started: Millis,
    #[serde(default)]
    pub seen: SeenState,
    /// The present one first.
    pub generations: Vec<GenerationState>,
    /// What nobody counts in any more.
    pub past: Option<GenerationState>,
    pub slots: Vec<SlotState>,
    pub retiring: Vec<SlotState>,
    pub supervision: Supervision,
    #[serde(default)]
    pub steering: Option<steering::State>,
    #[serde(default)]
    pub steward: Option<ChildState>,
    #[serde(default)]
    pub overrides: Vec<(String, String, Override)>,
    #[serde(default)]
    pub scaled: Option<(usize, Workers)>,
    #[serde(default)]
    pub to_give_back: Vec<(usize, usize)>,
    /// What keepers did, and those that are to be reaped.
    #[serde(default)]
    pub keepers: (Vec<Tally>, Vec<u32>),
    /// Who asked for the upgrade, as the steward knows it.
    #[serde(default)]
    pub requester: Option<u64>,
}

/// One configuration and its counters.
#[derive(Debug, Serialize, Deserialize)]
pub struct GenerationState {
    pub number: u64,
    pub config: RawFd,
    pub regions: Vec<RawFd>,
    pub board: RawFd,
}

/// One slot.
#[derive(Debug, Serialize, Deserialize)]
pub struct SlotState {
    pub number: usize,
    pub held: Vec<(SocketId, RawFd)>,
    #[serde(default)]
    pub outliving: Vec<SocketId>,
    pub current: Option<ChildState>,
    pub old: Vec<ChildState>,
    /// By their place in `generations`.
    pub ledgers: Vec<usize>,
}

/// The access log's ends, and its file.
#[derive(Debug, Serialize, Deserialize)]
pub struct AccessLogState {
    pub workers_end: RawFd,
    pub stewards_end: RawFd,
    pub file: Option<RawFd>,
}

/// One process.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChildState {
    pub pid: u32,
    pub channel: Option<RawFd>,
    /// By its place in `generations`.
    pub generation: usize,
    #[serde(default)]
    pub keeper: Option<u32>,
    #[serde(default)]
    pub is_keeper: bool,
    #[serde(default)]
    pub is_fault: bool,
}

/// What this image says of itself.
pub fn probe(config: &Config) -> Probe {
    Probe {
        program: PROGRAM.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        format: FORMAT,
        shape: counters::SHAPE.to_vec(),
        words: Layout::of(config).word_count(),
        board_words: board::Layout::of(config).word_count(),
        config: serde_json::to_value(config).expect("a configuration is plain data"),
    }
}

/// Collects what the next image is to find open.
#[derive(Debug, Default)]
pub struct Packer<'a> {
    fds: Vec<BorrowedFd<'a>>,
    generations: Vec<&'a Rc<Generation>>,
}

impl<'a> Packer<'a> {
    /// Keeps a descriptor; its number.
    pub fn keep(&mut self, fd: &'a impl AsFd) -> RawFd {
        self.fds.push(fd.as_fd());
        fd.as_fd().as_raw_fd()
    }

    /// The place of a generation among those that are kept.
    pub fn place(&mut self, generation: &'a Rc<Generation>) -> usize {
        let known = self.generations.iter().position(|known| Rc::ptr_eq(known, generation));
        known.unwrap_or_else(|| {
            self.generations.push(generation);
            self.generations.len() - 1
        })
    }

    fn generation(&mut self, generation: &'a Generation) -> GenerationState {
        GenerationState {
            number: generation.number,
            config: self.keep(&generation.sealed),
            regions: generation.regions.iter().map(|region| self.keep(region)).collect(),
            board: self.keep(&generation.board),
        }
    }
}

impl Supervisor {
    /// Everything for the next image, and the descriptors that it names.
    pub(super) fn pack(&self, requester: Option<u64>) -> (State, Vec<BorrowedFd<'_>>) {
        let mut packer = Packer::default();
        packer.place(&self.generation);
        let slots = self.slots.iter().map(|slot| slot.pack(&mut packer)).collect();
        let retiring = self.retiring.iter().map(|slot| slot.pack(&mut packer)).collect();
        let generations = packer.generations.clone();
        let state = State {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            shape: counters::SHAPE.to_vec(),
            image: packer.keep(&self.prepared.image),
            program: self.prepared.program.clone(),
            config_path: self.start.config_path.clone(),
            socket: self.prepared.socket.clone(),
            started_at: self.prepared.started_at,
            account: self.prepared.account,
            control: packer.keep(&self.prepared.control),
            lock: packer.keep(&*self.prepared.lock),
            bells: [packer.keep(&self.prepared.board_bell), packer.keep(&self.prepared.failure_bell)],
            access_log: self.prepared.access_log.pack(&mut packer),
            admin: self.prepared.admin.as_ref().map(|admin| (admin.address, packer.keep(&admin.listener))),
            started: self.prepared.started,
            seen: self.seen.pack(),
            generations: generations.into_iter().map(|generation| packer.generation(generation)).collect(),
            past: self.past.as_ref().map(|past| packer.generation(past)),
            slots,
            retiring,
            supervision: self.supervision.clone(),
            steering: Some(self.steering.pack(&mut packer)),
            steward: self.steward.pack(&mut packer),
            overrides: self.overrides.list(),
            scaled: self.scaled,
            to_give_back: self.to_give_back.clone(),
            keepers: self.keepers.pack(),
            requester,
        };
        (state, packer.fds)
    }
}

/// Takes up descriptors by their numbers. Until `finish` they stay open as
/// they are, so that another image may find them still.
#[derive(Debug, Default)]
pub struct Unpacker {
    numbers: Vec<RawFd>,
}

impl Unpacker {
    /// A duplicate of a descriptor that was left.
    pub fn take(&mut self, number: RawFd) -> Result<OwnedFd, String> {
        let fd = exec::duplicate(number).map_err(|error| format!("descriptor {number}: {error}"))?;
        self.numbers.push(number);
        Ok(fd)
    }

    /// All that is to be taken up has been: what was left is closed.
    pub fn finish(mut self, more: &[RawFd]) {
        self.numbers.extend(more);
        self.numbers.sort_unstable();
        self.numbers.dedup();
        self.numbers.into_iter().for_each(exec::close);
    }
}
