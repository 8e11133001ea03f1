//! What stands in the way on this host: its limits, an address, the rules of
//! its kernel.
//!
//! Started by `evenkeel doctor` and by nothing else; it changes nothing,
//! holds nothing and ends with its answer. `cli` parses what was typed,
//! prints `text` and ends with `exit_code`.

pub mod address;
pub mod limits;
pub mod matrix;
mod wrap;

use crate::config::Config;
use crate::sys::holders::Protocol;

/// Exit code: failed at run time.
const EXIT_FAILED: u8 = 1;
/// Exit code: not understood.
const EXIT_USAGE: u8 = 2;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// The limits of this host, for the configuration if there is one.
    Host,
    /// Would a bind work, and who holds it? TCP unless `--udp` was given.
    Address {
        /// As typed: `127.0.0.1:8080`, `[::]:80`, `:8080`, `8080`.
        address: String,
        /// Which port space.
        protocol: Protocol,
    },
    /// The reuse rules as this kernel applies them.
    Matrix,
}

/// What was typed after `evenkeel doctor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// What is asked.
    pub question: Question,
    /// For programs rather than for readers.
    pub json: bool,
}

/// What to print and how to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// For stdout if `exit_code` is 0, 69 or 77: the answer. For stderr else.
    pub text: String,
    /// 0 fine, 69 an address could not be bound, 77 a permission is missing,
    /// 2 not understood, 1 failed.
    pub exit_code: u8,
}

/// Answers.
pub fn run(command: &Command, config: Option<&Config>) -> Outcome {
    let json = command.json;
    let pick = |text: &dyn Fn() -> String, value: &dyn Fn() -> String| if json { value() } else { text() };
    let (text, exit_code) = match &command.question {
        Question::Host => {
            let report = limits::report(config);
            let value = || serde_json::json!(report).to_string();
            (pick(&|| report.text(), &value), 0)
        }
        Question::Matrix => match matrix::Matrix::measure() {
            Ok(matrix) => (pick(&|| matrix.text(), &|| matrix.json()), 0),
            Err(e) => (format!("the matrix could not be tried: {e}"), EXIT_FAILED),
        },
        Question::Address { address, protocol } => match address::parse(address) {
            Ok(addresses) => {
                let answer = address::check(address, &addresses, *protocol);
                (pick(&|| answer.text(), &|| answer.json()), answer.exit_code())
            }
            Err(wrong) => (wrong, EXIT_USAGE),
        },
    };
    Outcome { text: text.trim_end().to_string() + "\n", exit_code }
}
