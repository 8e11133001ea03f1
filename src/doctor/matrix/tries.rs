//! The sockets of the matrix: makes the first, tries the second, tells what
//! the kernel said.
//!
//! Runs in the child of `Matrix::measure` and nowhere else: it changes the
//! effective user of its process. The options are set bare here and not by
//! `sys::listen`, whose choice of them is what the matrix is to justify.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::{Uid, geteuid, seteuid};
use socket2::{Domain, Socket, Type};

use crate::sys::holders::{Protocol, State, states};
use crate::sys::isolated::{Network, in_child};

use super::{Extras, Harvest, Kind, ONE, Outcome, Place, Reuse, TWO, Trial, trials};

/// Whoever makes the second socket where it is not to be us: nobody, as most
/// systems number it, or its neighbour where we are nobody.
const OTHER_USERS: [u32; 2] = [65534, 65533];

/// A connection's end takes microseconds on loopback.
const PATIENCE: Duration = Duration::from_secs(1);

/// Datagrams of the theft.
const DATAGRAMS: usize = 100;

/// Another user, or why there is none.
type Other = Result<Uid, String>;

pub(super) fn harvest(network: Network) -> Harvest {
    let other = other_user();
    let outcomes = trials().iter().map(|trial| attempt(trial, &other)).collect();
    let extras = Extras {
        two_processes: [two_processes(Kind::TcpListening), two_processes(Kind::Udp)],
        theft: theft(&other),
        theft_refused: attempt(&joined_by_address(Reuse::PORT), &other),
    };
    Harvest { network, outcomes, extras }
}

fn other_user() -> Other {
    let us = geteuid();
    let other = OTHER_USERS.map(Uid::from_raw).into_iter().find(|uid| *uid != us);
    let other = other.ok_or("no other user is known")?;
    as_user(other, || ()).map(|()| other).map_err(|errno| {
        format!("a socket of another user needs CAP_SETUID over a second user ({errno:?} here)")
    })
}

/// Runs `work` with this effective user. Everything a bind looks at comes
/// from it: the socket's owner is the effective user of socket(2).
fn as_user<T>(user: Uid, work: impl FnOnce() -> T) -> Result<T, Errno> {
    let us = geteuid();
    seteuid(user)?;
    let result = work();
    seteuid(us).expect("the real user is still us, so it can be taken back");
    Ok(result)
}

fn attempt(trial: &Trial, other: &Other) -> Outcome {
    let user = match (trial.same_uid, other) {
        (true, _) => None,
        (false, Ok(user)) => Some(*user),
        (false, Err(reason)) => return Outcome::NotTried(reason.clone()),
    };
    let port = match free_port(trial.kind) {
        Ok(port) => port,
        Err(e) => return Outcome::NotTried(format!("no free port was found: {e}")),
    };
    let kept = match arrange(trial, port) {
        Ok(kept) => kept,
        Err(e) => return Outcome::NotTried(format!("the first socket could not be made: {e}")),
    };
    let second = || second(trial.kind, trial.pair.second, trial.second, port);
    let outcome = match user {
        None => second(),
        Some(user) => as_user(user, second)
            .unwrap_or_else(|errno| Outcome::NotTried(format!("seteuid was refused: {errno:?}"))),
    };
    drop(kept);
    outcome
}

/// A port that nothing uses in either family: the kernel finds one that a
/// dual socket without any option may have.
fn free_port(kind: Kind) -> io::Result<u16> {
    let place = |ip: IpAddr| Place { ip, v6_only: false };
    bound(kind, place(Ipv6Addr::UNSPECIFIED.into()), Reuse::NONE, 0)
        .or_else(|_| bound(kind, place(Ipv4Addr::UNSPECIFIED.into()), Reuse::NONE, 0))
        .and_then(|socket| port_of(&socket))
}

fn port_of(socket: &Socket) -> io::Result<u16> {
    let address = socket.local_addr()?.as_socket();
    address.map(|address| address.port()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn made(kind: Kind, place: Place, reuse: Reuse) -> io::Result<Socket> {
    let shape = if kind.is_udp() { Type::DGRAM } else { Type::STREAM };
    let socket = Socket::new(Domain::for_address(SocketAddr::new(place.ip, 0)), shape.cloexec(), None)?;
    if place.ip.is_ipv6() {
        socket.set_only_v6(place.v6_only)?;
    }
    // Only what is asked for: setting an option to 0 is left out as well.
    if reuse.address {
        socket.set_reuse_address(true)?;
    }
    if reuse.port {
        socket.set_reuse_port(true)?;
    }
    Ok(socket)
}

fn bound(kind: Kind, place: Place, reuse: Reuse, port: u16) -> io::Result<Socket> {
    let socket = made(kind, place, reuse)?;
    socket.bind(&SocketAddr::new(place.ip, port).into())?;
    Ok(socket)
}

/// Makes the first socket and brings it into its state. What is returned has
/// to stay open for the state to last.
fn arrange(trial: &Trial, port: u16) -> io::Result<Vec<Socket>> {
    let place = trial.pair.first;
    let first = bound(trial.kind, place, trial.first, port)?;
    match trial.kind {
        Kind::TcpBound | Kind::Udp | Kind::UdpMulticast => return Ok(vec![first]),
        Kind::TcpListening | Kind::TcpConnection | Kind::TcpTimeWait => first.listen(8)?,
    }
    if trial.kind == Kind::TcpListening {
        return Ok(vec![first]);
    }
    let address = reached_at(place, port);
    let client = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), None)?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.connect_timeout(&address.into(), PATIENCE)?;
    // The connection stands, so it is in the queue.
    let (accepted, _) = first.accept()?;
    drop(first);
    if trial.kind == Kind::TcpConnection {
        return Ok(vec![accepted, client]);
    }
    // The side that closes first is the one that lingers.
    drop(accepted);
    client.recv(&mut [MaybeUninit::uninit(); 1])?;
    drop(client);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let states = states(SocketAddr::new(place.ip, port), Protocol::Tcp);
        if !states.is_empty() && states.iter().all(|state| *state == State::TimeWait) {
            return Ok(Vec::new());
        }
        if Instant::now() > deadline {
            return Err(io::Error::other("the connection did not come to TIME_WAIT"));
        }
        std::thread::yield_now();
    }
}

fn reached_at(place: Place, port: u16) -> SocketAddr {
    let ip = match (place.ip.is_unspecified(), place.ip.is_ipv6() && place.v6_only) {
        (false, _) => place.ip,
        (true, true) => Ipv6Addr::LOCALHOST.into(),
        (true, false) => Ipv4Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, port)
}

fn second(kind: Kind, place: Place, reuse: Reuse, port: u16) -> Outcome {
    let socket = match made(kind, place, reuse) {
        Ok(socket) => socket,
        Err(e) => return Outcome::NotTried(format!("the second socket could not be made: {e}")),
    };
    if let Err(e) = socket.bind(&SocketAddr::new(place.ip, port).into()) {
        return refused("bind", &e);
    }
    match kind.is_udp() {
        true => Outcome::Bound,
        false => socket.listen(8).map_or_else(|e| refused("listen", &e), |()| Outcome::Bound),
    }
}

fn refused(call: &str, error: &io::Error) -> Outcome {
    let errno = error.raw_os_error().map_or("unknown".into(), |raw| format!("{:?}", Errno::from_raw(raw)));
    Outcome::Refused { errno, call: call.into() }
}

/// 127.0.0.1 here and 127.0.0.2 in another process, without any option.
fn two_processes(kind: Kind) -> Outcome {
    let attempt = || -> io::Result<Outcome> {
        let port = free_port(kind)?;
        let first = bound(kind, ONE, Reuse::NONE, port)?;
        if !kind.is_udp() {
            first.listen(8)?;
        }
        let bytes = in_child(PATIENCE, || {
            serde_json::to_vec(&second(kind, TWO, Reuse::NONE, port)).unwrap_or_default()
        })?;
        drop(first);
        Ok(serde_json::from_slice(&bytes)?)
    };
    attempt().unwrap_or_else(|e| Outcome::NotTried(e.to_string()))
}

/// A second UDP socket with SO_REUSEADDR alone, of another user, on the
/// address of one with these options.
fn joined_by_address(first: Reuse) -> Trial {
    let pair = Kind::Udp.pairs()[0];
    Trial { kind: Kind::Udp, pair, first, second: Reuse::ADDRESS, same_uid: false }
}

/// Our server sets SO_REUSEADDR; another user binds the same port later. Who
/// gets what clients send from then on?
fn theft(other: &Other) -> Result<(usize, usize), String> {
    let user = other.clone()?;
    let told = |e: io::Error| e.to_string();
    let port = free_port(Kind::Udp).map_err(told)?;
    let ours = bound(Kind::Udp, ONE, Reuse::ADDRESS, port).map_err(told)?;
    let theirs = as_user(user, || bound(Kind::Udp, ONE, Reuse::ADDRESS, port))
        .map_err(|errno| format!("{errno:?}"))?
        .map_err(|e| format!("the second bind was refused: {e}"))?;
    for _ in 0..DATAGRAMS {
        let client = made(Kind::Udp, ONE, Reuse::NONE).map_err(told)?;
        client.send_to(b"x", &SocketAddr::new(ONE.ip, port).into()).map_err(told)?;
    }
    Ok((waiting(&ours), waiting(&theirs)))
}

/// How many datagrams wait; loopback has delivered by the time of the send.
fn waiting(socket: &Socket) -> usize {
    if socket.set_nonblocking(true).is_err() {
        return 0;
    }
    std::iter::from_fn(|| socket.recv(&mut [MaybeUninit::uninit(); 1]).ok()).count()
}
