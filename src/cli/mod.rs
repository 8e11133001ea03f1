//! The command line: what was typed, and which process it starts.

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "evenkeel")]
enum Command {
    /// Make load and check it
    Bench(Box<crate::loadgen::Args>),
}

/// Runs the command that was typed and returns its exit code.
pub fn main() -> ExitCode {
    match Command::parse() {
        Command::Bench(args) => crate::loadgen::run(&args),
    }
}
