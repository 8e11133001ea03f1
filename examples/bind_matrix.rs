//! The rules of SO_REUSEADDR and SO_REUSEPORT as this kernel applies them.
//!
//! ```sh
//! cargo run --example bind_matrix            # as a table
//! cargo run --example bind_matrix -- --json  # for programs
//! ```

use evenkeel::doctor::matrix::Matrix;

fn main() -> std::io::Result<()> {
    let matrix = Matrix::measure()?;
    let json = std::env::args().any(|argument| argument == "--json");
    println!("{}", if json { matrix.json() } else { matrix.text() });
    Ok(())
}
