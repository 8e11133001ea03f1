//! x
mod support;
fn main() {
    support::run(tests![])
}
