//! The admin address: bound here, served by the steward.
//!
//! The supervisor keeps the socket, so that whoever connects while a steward is
//! being replaced waits a moment instead of being refused, and so that a low
//! port needs no privilege of the steward's. A reload binds the new address
//! before it touches anything, and lets the old one go when it is in force.

use std::net::{SocketAddr, TcpListener};

use super::Refusal;
use super::prepare::patiently;
use crate::explain::{self, BindFailure};
use crate::sys::holders::{self, Protocol};
use crate::sys::listen::{self, Options};

/// Callers that may wait while no steward accepts.
const BACKLOG: u32 = 128;

/// The socket where `/metrics` and the status page are.
#[derive(Debug)]
pub struct Admin {
    pub address: SocketAddr,
    pub listener: TcpListener,
}

impl Admin {
    /// Binds the address, if there is one. `ours` is where we listen already:
    /// on its port we would only find ourselves.
    pub fn bind(address: Option<SocketAddr>, ours: Option<&Admin>) -> Result<Option<Admin>, Refusal> {
        let Some(address) = address else { return Ok(None) };
        let options = Options { backlog: BACKLOG, ..Options::default() };
        let refusal = |failure: &dyn Fn(holders::Facts) -> BindFailure| {
            let told = explain::bind_failure(&failure(holders::gather(address, Protocol::Tcp, &options)));
            let text = format!("admin: {}", told.text);
            Refusal { text, advice: told.advice, exit_code: told.exit_code }
        };
        if ours.is_none_or(|ours| ours.address.port() != address.port()) {
            patiently(|| listen::probe_tcp(address, &options)).map_err(|error| {
                let errno = error.raw_os_error().unwrap_or(0);
                refusal(&|facts| BindFailure::probe(address, errno, Protocol::Tcp, &options, facts))
            })?;
        }
        let socket = listen::tcp(address, &options)
            .map_err(|error| refusal(&|facts| BindFailure::new(&error, Protocol::Tcp, &options, facts)))?;
        Ok(Some(Admin { address, listener: socket.into() }))
    }
}
