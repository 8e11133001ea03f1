//! The operating system: the only place with `unsafe`, and where every
//! socket option is set.

pub mod holders;
pub mod host;
pub mod isolated;
pub mod listen;
