//! Who holds an address, and would a bind there work?
//!
//! ```sh
//! cargo run --example who_holds -- 127.0.0.1:8080
//! ```

use std::error::Error;

use evenkeel::explain::{self, BindFailure};
use evenkeel::sys::holders::{self, Protocol};
use evenkeel::sys::listen::{self, Options};

fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).ok_or("usage: who_holds ADDRESS:PORT")?.parse()?;
    let options = Options::default();
    match listen::tcp(address, &options) {
        Ok(_) => println!("{address}/tcp can be bound"),
        Err(error) => {
            let facts = holders::gather(address, Protocol::Tcp, &options);
            let told = explain::bind_failure(&BindFailure::new(&error, Protocol::Tcp, &options, facts));
            println!("{}\n  {}", told.text, told.advice);
        }
    }
    Ok(())
}
