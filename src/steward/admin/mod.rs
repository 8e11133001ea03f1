//! What the daemon shows over HTTP: the status page, its document, metrics,
//! health. Read-only.
//!
//! Owned by the steward; the supervisor bound the socket and passed it on. One
//! thread with one tokio runtime, started when there is an address for the
//! first time and niced, so that no crowd of callers takes the CPU from
//! traffic. It ends with the process. `server` bounds the callers, `documents`
//! bounds what they can make the daemon compute.

mod accept;
mod documents;
mod encoder;
mod metrics;
mod page;
mod routes;
mod server;

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tracing::{error, info};

use super::Knowledge;
use crate::sys::process;

/// A socket to serve at, or none.
type Place = Option<(SocketAddr, TcpListener)>;

/// The admin address's side of the steward.
#[derive(Debug, Default)]
pub struct Admin {
    /// What came before `begin`.
    early: Option<(Place, Arc<Knowledge>)>,
    begun: bool,
    places: Option<UnboundedSender<Place>>,
}

impl Admin {
    /// There is something to tell from now on.
    pub fn begin(&mut self) {
        self.begun = true;
        if let Some((place, knowledge)) = self.early.take() {
            self.serve(place, &knowledge);
        }
    }

    /// From now on it is served here, or nowhere.
    pub fn serve_at(&mut self, place: Option<(SocketAddr, OwnedFd)>, knowledge: &Arc<Knowledge>) {
        let place = place.map(|(address, socket)| (address, TcpListener::from(socket)));
        if self.begun {
            self.serve(place, knowledge);
        } else {
            self.early = Some((place, Arc::clone(knowledge)));
        }
    }

    fn serve(&mut self, place: Place, knowledge: &Arc<Knowledge>) {
        if place.is_none() && self.places.is_none() {
            return;
        }
        if let Some((address, _)) = &place {
            info!("status page, metrics and health at http://{address}/");
        }
        let places = self.places.get_or_insert_with(|| start(Arc::clone(knowledge)));
        if places.send(place).is_err() {
            error!("the admin thread has ended");
        }
    }
}

/// Starts the thread; it is told its sockets by what is returned.
fn start(knowledge: Arc<Knowledge>) -> UnboundedSender<Place> {
    let (sender, places) = unbounded_channel();
    std::thread::spawn(move || {
        process::yield_to_others();
        // A second thread builds documents, which may wait for the supervisor.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(1)
            .build();
        match runtime {
            Ok(runtime) => runtime.block_on(server::serve(places, knowledge)),
            Err(error) => error!(%error, "no runtime for the admin address"),
        }
    });
    sender
}
