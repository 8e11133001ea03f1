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
//! 1  config  balance  relay  supervision  counters  spread  deadline  slab    pure
//! 0  sys  units  logging
//! ```

#![deny(unsafe_code)]

pub mod cli;
pub mod config;
pub mod loadgen;
pub mod spread;
#[allow(unsafe_code)]
pub mod sys;
pub mod units;
