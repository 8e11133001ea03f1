//! Steering: how the kernel chooses the slot of a connection or datagram.
//!
//! ```text
//!   packet --bucket--> 0..1024 --Table--> slot --sock array--> the slot's socket
//! ```
//!
//! Pure. `bucket` is where a client falls, in the kernel and in user space
//! alike; `table` says which slot has which bucket, and changes by as few
//! buckets as can be; `policy` says how large a part each slot is due;
//! `program` and `classic` are the same for the kernel's two machines, as
//! instructions; `page` is the memory that the program reads, `slowness` what a worker says
//! there of itself; `expected` is
//! what the slots should have got, for judging the spread. The supervisor owns
//! one table a listener; docs/STEERING.md has the promises.

pub mod bucket;
pub mod classic;
pub mod expected;
pub mod page;
pub mod policy;
pub mod program;
pub mod route;
pub mod slowness;
pub mod table;

pub use bucket::{bucket, source_bucket};
pub use expected::Expected;
pub use route::Route;
pub use table::{BUCKET_COUNT, Move, Table};

/// The most slots that there can be: a load's place in the page is a slot's
/// number of six bits.
pub const MAX_SLOTS: usize = 64;

/// What falls into a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Pick {
    /// A connection, by the kernel's own hash of its two ends.
    Connection = 0,
    /// Everything of a client's address, by our own hash.
    Source = 1,
    /// Everything of a client's address and port, by our own hash.
    Flow = 2,
    /// Every packet by itself, at random.
    Random = 3,
    /// What the same CPU received; among its slots as `Connection`.
    Cpu = 4,
    /// A connection, in the better of two buckets by the slots' loads.
    TwoChoices = 5,
}
