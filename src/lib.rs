//! evenkeel: a layer-4 load balancer of worker processes that share their
//! ports by `SO_REUSEPORT`.
//!
//! The floors, from the top; a module imports only from floors below its own
//! (`tests/floors.rs` holds the table):
//!
//! ```text
//! 4  cli
//! 3  supervisor  worker  steward  loadgen  doctor    never import each other
//! 2  control
//! 1  config  balance  board  relay  flow  health  supervision  counters  spread  steering  deadline  slab  explain    pure
//! 0  sys  units  logging
//! ```

#![deny(unsafe_code)]

pub mod access;
pub mod access_log;
pub mod balance;
pub mod board;
pub mod cli;
pub mod config;
pub mod control;
pub mod counters;
pub mod deadline;
pub mod doctor;
pub mod explain;
pub mod flow;
pub mod handover;
pub mod health;
pub mod keep;
pub mod loadgen;
pub mod logging;
pub mod ports;
pub mod proxy_protocol;
pub mod relay;
pub mod slab;
pub mod sources;
pub mod spread;
pub mod steering;
pub mod steward;
pub mod supervision;
pub mod supervisor;
#[allow(unsafe_code)]
pub mod sys;
pub mod units;
pub mod worker;
