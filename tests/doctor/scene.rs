//! What the tests of this folder stand on: processes that hold a socket, other
//! users, and `doctor` itself.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use evenkeel::doctor::{self, Outcome, Question};
use evenkeel::explain::{self, BindFailure, Explanation};
use evenkeel::sys::holders::{self, Protocol};
use evenkeel::sys::isolated::in_child;
use evenkeel::sys::listen::{self, OpenError, Options};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, fchown, setgroups, setresgid, setresuid};
use socket2::{Domain, Socket, Type};

use crate::support::{eventually, other_users};

pub const NOBODY: u32 = 65534;
pub const SOMEBODY: u32 = 65533;
/// Nothing here takes longer than a few seconds.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Gives up everything for this user. In a child only.
pub fn become_user(uid: u32) {
    setgroups(&[]).expect("root gives up its groups");
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setresgid(group, group, group).expect("root takes any group");
    setresuid(user, user, user).expect("root takes any user");
}

/// Becomes this user without any right over this network, even where there is
/// only one user: then as that user of a user namespace below. In a child only.
pub fn lose_rights(uid: u32) {
    if other_users() {
        return become_user(uid);
    }
    unshare(CloneFlags::CLONE_NEWUSER).expect("a user namespace in a user namespace");
    std::fs::write("/proc/self/uid_map", format!("{uid} 0 1")).expect("a user may name itself");
    setresuid(Uid::from_raw(uid), Uid::from_raw(uid), Uid::from_raw(uid)).expect("the name it has");
}

/// What `work` says in a child process, where it may change anything.
pub fn elsewhere(work: impl FnOnce() -> String) -> String {
    let bytes = in_child(LIMIT, || work().into_bytes()).expect("the child answers");
    String::from_utf8(bytes).expect("the child writes text")
}

/// A process that holds a socket as its standard input and sleeps.
pub struct Holder(Child);

impl Holder {
    pub fn of(socket: Socket) -> Holder {
        Holder::start(socket, Command::new("sleep"))
    }

    /// Of a command that becomes `sleep` at once.
    pub fn start(socket: Socket, command: Command) -> Holder {
        let holder = Holder::spawn(socket, command);
        // Until it has begun, the process bears the name of this test.
        let line = format!("/proc/{}/cmdline", holder.pid());
        eventually("the holder runs", || std::fs::read(&line).is_ok_and(|line| line == b"sleep\x00600\x00"));
        holder
    }

    /// Of any command that takes the seconds as its last argument.
    pub fn spawn(socket: Socket, mut command: Command) -> Holder {
        // Whatever ends this test ends it, and no pipe of ours outlives us.
        // SAFETY: one system call between fork and exec.
        unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
        let input = Stdio::from(OwnedFd::from(socket));
        let command = command.arg("600").stdin(input).stdout(Stdio::null()).stderr(Stdio::null());
        Holder(command.spawn().expect("the holder can be started"))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The options of a socket that a test makes.
#[derive(Clone, Copy, Default)]
pub struct Made {
    pub address: bool,
    pub port: bool,
    pub owner: Option<u32>,
    pub dual: bool,
}

/// A TCP socket bound there, listening or not.
pub fn tcp(address: &str, made: Made, listening: bool) -> Socket {
    let socket = bound(address, Type::STREAM, made);
    if listening {
        socket.listen(8).expect("the socket listens");
    }
    socket
}

pub fn udp(address: &str, made: Made) -> Socket {
    bound(address, Type::DGRAM, made)
}

fn bound(address: &str, kind: Type, made: Made) -> Socket {
    let address = addr(address);
    let socket = Socket::new(Domain::for_address(address), kind.cloexec(), None).expect("a socket");
    if address.is_ipv6() {
        socket.set_only_v6(!made.dual).expect("IPV6_V6ONLY");
    }
    socket.set_reuse_address(made.address).expect("SO_REUSEADDR");
    socket.set_reuse_port(made.port).expect("SO_REUSEPORT");
    if let Some(owner) = made.owner {
        // As if that user had made it.
        fchown(&socket, Some(Uid::from_raw(owner)), None).expect("root gives a socket away");
    }
    socket.bind(&address.into()).expect("the address is free");
    socket
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().expect("a test's address")
}

/// `evenkeel doctor ADDRESS`
pub fn doctor(address: &str) -> Outcome {
    ask(address, Protocol::Tcp, false)
}

pub fn ask(address: &str, protocol: Protocol, json: bool) -> Outcome {
    let question = Question::Address { address: address.into(), protocol };
    doctor::run(&doctor::Command { question, json }, None)
}

pub fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e} in {text}"))
}

/// Runs `ip` with these arguments; false where it cannot do it.
pub fn ip(arguments: &str) -> bool {
    let mut command = Command::new("ip");
    command.args(arguments.split(' ')).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// As the supervisor does it: open, and on failure gather and explain.
pub fn opened(address: &str, options: &Options) -> Explanation {
    let error = listen::tcp(addr(address), options).expect_err("this bind fails");
    told(&error, Protocol::Tcp, options)
}

pub fn told(error: &OpenError, mode: Protocol, options: &Options) -> Explanation {
    let facts = holders::gather(error.address, mode, options);
    explain::bind_failure(&BindFailure::new(error, mode, options, facts))
}
