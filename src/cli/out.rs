//! What a command has to say, to standard output.
//!
//! A pipe that the reader has closed (`| head`) is no failure: what it wanted
//! it has, and the exit code speaks of the command. Whatever else keeps the text
//! from being written ends the program with exit code 1.

use std::io::{self, Write};

/// Writes a text.
pub fn write(text: &str) {
    bytes(text.as_bytes());
}

/// Writes a text and ends its line.
pub fn line(text: &str) {
    bytes(format!("{text}\n").as_bytes());
}

/// Writes as it is.
pub fn bytes(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("evenkeel: standard output: {error}");
            std::process::exit(1);
        }
        _ => {}
    }
}
