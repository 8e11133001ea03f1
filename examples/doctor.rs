//! `evenkeel doctor` without a configuration, from the library:
//!
//! ```sh
//! cargo run --example doctor -- [ADDRESS [--udp]] [--matrix] [--json]
//! ```

use std::process::ExitCode;

use evenkeel::doctor::{self, Command, Question};
use evenkeel::sys::holders::Protocol;

fn main() -> ExitCode {
    let typed: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| typed.iter().any(|argument| argument == name);
    let address = typed.iter().find(|argument| !argument.starts_with("--")).cloned();
    let protocol = if flag("--udp") { Protocol::Udp } else { Protocol::Tcp };
    let question = match address {
        _ if flag("--matrix") => Question::Matrix,
        Some(address) => Question::Address { address, protocol },
        None => Question::Host,
    };
    let outcome = doctor::run(&Command { question, json: flag("--json") }, None);
    print!("{}", outcome.text);
    ExitCode::from(outcome.exit_code)
}
