//! Which address a connection or a flow to a server leaves from: the route's
//! own, one of `source` in turn, or the client's (`transparent`).
//!
//! An address that has no port left, or is not this host's, is passed over for
//! the next one; each time is counted, and told at a bounded rate.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tracing::warn;

use super::complaints::Complaints;
use crate::config::Upstream;
use crate::sys::clock::Millis;
use crate::sys::local_end::LocalEnd;

/// What one worker remembers of its upstreams' addresses.
#[derive(Debug)]
pub struct Departures {
    /// Whose turn it is, by upstream.
    turns: Vec<usize>,
    complaints: Complaints,
}

impl Departures {
    /// The slots begin at different addresses.
    pub fn new(upstreams: usize, slot: usize) -> Departures {
        Departures { turns: vec![slot; upstreams], complaints: Complaints::default() }
    }

    /// Connects by `connect` from the first address that can; the number of
    /// addresses that had no port comes with the result.
    pub fn connect<T>(
        &mut self,
        (number, upstream): (usize, &Upstream),
        client: IpAddr,
        server: SocketAddr,
        now: Millis,
        mut connect: impl FnMut(LocalEnd) -> io::Result<T>,
    ) -> (u64, io::Result<T>) {
        if upstream.transparent {
            let client = client.to_canonical();
            if client.is_ipv4() != server.is_ipv4() {
                self.complain(number, "family", now, || {
                    format!(
                        "upstream {}: {server} cannot be reached from {client}, of another family",
                        upstream.name
                    )
                });
                return (0, Err(io::ErrorKind::Unsupported.into()));
            }
            return self.note(number, upstream, server, now, connect(LocalEnd::Foreign(client)));
        }
        let is_fit = |address: &&IpAddr| address.is_ipv4() == server.is_ipv4();
        let count = upstream.source.iter().filter(is_fit).count();
        if count == 0 {
            return self.note(number, upstream, server, now, connect(LocalEnd::Any));
        }
        let first = self.turns[number];
        self.turns[number] = first.wrapping_add(1);
        let mut shortages = 0;
        loop {
            let at = first.wrapping_add(shortages) % count;
            let address = *upstream.source.iter().filter(is_fit).nth(at).expect("one of those counted");
            let result = connect(LocalEnd::Own(address));
            let Some(error) = result.as_ref().err().filter(|error| is_shortage(error)) else {
                return (shortages as u64, result);
            };
            shortages += 1;
            let is_last = shortages == count;
            // Each address is named, and the want of any apart from that.
            let (about, kind, then) = match is_last {
                true => (number, "every address", "no other is left"),
                false => (number << 16 | at, "one address", "the next of source is tried"),
            };
            self.complain(about, kind, now, || {
                format!(
                    "upstream {}: no connection to {server} can leave from {address} ({error}): its ports towards \
                     there are in use (net.ipv4.ip_local_port_range), or it is no address of this host; {then}",
                    upstream.name
                )
            });
            if is_last {
                return (shortages as u64, result);
            }
        }
    }

    fn note<T>(
        &mut self,
        number: usize,
        upstream: &Upstream,
        server: SocketAddr,
        now: Millis,
        result: io::Result<T>,
    ) -> (u64, io::Result<T>) {
        let Err(error) = &result else { return (0, result) };
        if !is_shortage(error) {
            return (0, result);
        }
        self.complain(number, "every address", now, || {
            format!(
                "upstream {}: no local port is left towards {server} ({error}): widen \
                 net.ipv4.ip_local_port_range, or give the upstream more addresses (source)",
                upstream.name
            )
        });
        (1, result)
    }

    fn complain(&mut self, number: usize, kind: &'static str, now: Millis, text: impl Fn() -> String) {
        if let Some(untold) = self.complaints.note(number, kind, now) {
            warn!("{}; {untold} more since the last such line, counted as port_shortages", text());
        }
    }
}

/// Without a port connect(2) says EADDRNOTAVAIL for TCP and EAGAIN for UDP
/// (net/ipv4/af_inet.c, inet_autobind).
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE | libc::EAGAIN))
}
