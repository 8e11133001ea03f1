//! One configuration in force: what every process of it is started with.
//!
//! Shared by the slots and processes that belong to it, and gone with the last
//! of them. A reload makes the next one.

use std::hash::{BuildHasher, RandomState};
use std::os::fd::OwnedFd;

use super::Refusal;
use crate::board::{self, Board, Overrides, Standing};
use crate::config::{Config, Mode};
use crate::control::{Place, SocketId};
use crate::counters::{Counters, Layout, Process, process_cell};
use crate::sys::shared::{self, Region};

/// A configuration with its number and its counters.
#[derive(Debug)]
pub struct Generation {
    /// Counted from 1.
    pub number: u64,
    pub config: Config,
    pub layout: Layout,
    /// The configuration as sealed JSON.
    pub sealed: OwnedFd,
    /// Each slot's counters.
    pub regions: Vec<Region>,
    /// The same, to be read alone.
    pub readable: Vec<OwnedFd>,
    board_layout: board::Layout,
    /// How its servers stand; written by the steward.
    pub board: Region,
    /// The same, to be read alone.
    pub readable_board: OwnedFd,
}

impl Generation {
    /// A generation of so many slots, all counters zero.
    pub fn new(number: u64, config: Config, slot_count: usize) -> Result<Generation, Refusal> {
        let layout = Layout::of(&config);
        let regions = (0..slot_count)
            .map(|_| Region::create("evenkeel-counters", layout.word_count()))
            .collect::<std::io::Result<Vec<Region>>>()
            .map_err(Refusal::of_system)?;
        // Whoever knew it could choose addresses that are counted together.
        let seed = RandomState::new().hash_one(number);
        for region in &regions {
            if let Some(cell) = process_cell(region.words(), Process::SourceSeed) {
                cell.set(seed);
            }
        }
        let readable = regions.iter().map(Region::read_only_fd).collect::<std::io::Result<Vec<OwnedFd>>>();
        let board_layout = board::Layout::of(&config);
        let board =
            Region::create("evenkeel-board", board_layout.word_count()).map_err(Refusal::of_system)?;
        let json = serde_json::to_vec(&config).expect("a configuration is plain data");
        Ok(Generation {
            number,
            layout,
            sealed: shared::sealed("evenkeel-config", &json).map_err(Refusal::of_system)?,
            readable: readable.map_err(Refusal::of_system)?,
            regions,
            config,
            board_layout,
            readable_board: board.read_only_fd().map_err(Refusal::of_system)?,
            board,
        })
    }

    /// Fills its board before anybody sees it: as the file and the operator
    /// have it, and as the servers stood that another generation had too.
    pub fn fill_board(&self, overrides: &Overrides, before: Option<&Generation>) {
        let mut standing = Standing::new(&self.config, overrides);
        if let Some(before) = before {
            let mut old = Standing::new(&before.config, overrides);
            old.take_up(&before.board());
            standing.carry_over(&old);
        }
        self.board().begin(self.number);
        standing.publish(&self.board());
    }

    fn board(&self) -> Board<'_> {
        Board::over(self.board.words(), &self.board_layout).expect("made for this layout")
    }

    /// How many slots it has.
    pub fn slot_count(&self) -> usize {
        self.regions.len()
    }

    /// A slot's counters.
    pub fn counters(&self, slot: usize) -> Counters<'_> {
        Counters::over(self.regions[slot].words(), &self.layout).expect("made for this layout")
    }

    /// Every socket that a slot has, in the order in which they are opened.
    pub fn places(&self) -> Vec<(Place, SocketId)> {
        let listeners = self.config.listeners.iter().enumerate();
        let places = listeners.flat_map(|(listener, config)| {
            config.bind.iter().enumerate().map(move |(address, &bound)| {
                let udp = config.mode == Mode::Udp;
                let id = SocketId { address: bound, udp, interface: config.interface.clone() };
                (Place { listener, address }, id)
            })
        });
        places.collect()
    }
}
