//! Multicast.
mod support;
fn main() {}
