//! `doctor`, and what it shares with the supervisor: listeners that can be
//! stood beside, who holds an address, the words for it. Real sockets and
//! processes, each test in a network of its own.

mod holders;
mod limits;
mod listen;
mod matrix;
mod refusals;
mod scene;
#[path = "../support/mod.rs"]
mod support;

fn main() {
    let areas = [holders::tests(), limits::tests(), listen::tests(), matrix::tests(), refusals::tests()];
    support::run(areas.into_iter().flatten().collect())
}
