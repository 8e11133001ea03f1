//! Connections to the admin address, bounded against callers of any kind.
//!
//! ```text
//!   accepted --head read--> answering --keep-alive--> accepted --LIFE over--> closed
//!       \--HEAD_LIMIT over, head too large, rubbish, the oldest of too many--> closed
//! ```
//!
//! At most `MAX_CALLERS` at once: one more, and the oldest is closed, so that
//! callers who sit and wait keep nobody out. Bodies are never read.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::Place;
use super::documents::Documents;
use super::routes;
use crate::steward::Knowledge;

/// Callers at once.
pub const MAX_CALLERS: usize = 64;
/// How long a request's head may take, and a connection may be idle.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// The largest head. hyper takes no smaller bound than this.
const MAX_HEAD: usize = 8 * 1024;
/// The most header fields.
const MAX_FIELDS: usize = 64;
/// How long a connection is used for new requests.
const LIFE: Duration = Duration::from_secs(60);
/// How long the last answer of a connection may take after that.
const LAST_ANSWER: Duration = Duration::from_secs(10);
/// After accept(2) failed: no descriptor, most likely.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves at the last place that came, until no further can come.
pub async fn serve(mut places: UnboundedReceiver<Place>, knowledge: Arc<Knowledge>) {
    let documents = Arc::new(Documents::new(knowledge));
    let mut listener: Option<(SocketAddr, TcpListener)> = None;
    let mut callers: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            place = places.recv() => {
                let Some(place) = place else { return };
                listener = place.and_then(register);
                continue;
            }
            accepted = accept(listener.as_ref()) => accepted,
        };
        match accepted {
            Ok((stream, at)) => {
                callers.retain(|caller| !caller.is_finished());
                if callers.len() >= MAX_CALLERS
                    && let Some(oldest) = callers.pop_front()
                {
                    oldest.abort();
                }
                let task = tokio::spawn(converse(stream, at, Arc::clone(&documents)));
                callers.push_back(task.abort_handle());
            }
            Err(error) => {
                warn!(%error, "the admin address");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Makes the runtime wait for a socket.
fn register((address, listener): (SocketAddr, std::net::TcpListener)) -> Option<(SocketAddr, TcpListener)> {
    let registered = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
    registered
        .map(|listener| (address, listener))
        .inspect_err(|error| warn!(%error, "the admin address"))
        .ok()
}

/// The next caller; never where nothing is listened at.
async fn accept(listener: Option<&(SocketAddr, TcpListener)>) -> std::io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some((address, listener)) => listener.accept().await.map(|(stream, _)| (stream, *address)),
        None => std::future::pending().await,
    }
}

async fn converse(stream: TcpStream, at: SocketAddr, documents: Arc<Documents>) {
    let service = service_fn(move |request| {
        let documents = Arc::clone(&documents);
        async move { Ok::<_, Infallible>(routes::answer(&request, at, &documents).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_FIELDS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    // What goes wrong on a connection is the caller's affair, and not logged:
    // anybody who reaches the address could fill the disk.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = sleep(LIFE) => connection.as_mut().graceful_shutdown(),
    }
    let _ = timeout(LAST_ANSWER, connection).await;
}
