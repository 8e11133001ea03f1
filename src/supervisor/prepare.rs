//! Everything that can refuse a start, before a process is forked.
//!
//! Limits, accounts, the lock, other programs on our addresses, the control
//! socket. Each refusal says what is the case and what to do.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{Read, Seek, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::access_log::AccessLog;
use super::activation::{self, Assignment};
use super::admin::Admin;
use super::generation::Generation;
use super::slot::Slot;
use super::store::Returned;
use super::{Refusal, Start};
use crate::board::Overrides;
use crate::config::{Config, Listener, Mode, Steering, Workers};
use crate::control::SocketId;
use crate::explain::{self, BindFailure};
use crate::sys::accounts::{self, Account};
use crate::sys::activation::Passed;
use crate::sys::bell::Bell;
use crate::sys::clock::{self, Millis};
use crate::sys::holders::{self, Protocol};
use crate::sys::listen::{self, Options};
use crate::sys::process::{self, Image};

/// The generation of the configuration that a daemon starts with.
pub const FIRST_GENERATION: u64 = 1;
/// Descriptors of a worker that are no session's, roughly.
const RESERVED_FILES: u64 = 128;

/// How often an address in use is tried again, and how long after.
const PROBES: usize = 10;
const PROBE_AGAIN: std::time::Duration = std::time::Duration::from_millis(50);

/// What every process is started with, whatever its generation.
#[derive(Debug)]
pub struct Prepared {
    pub image: Image,
    pub account: Option<Account>,
    /// Where workers tell their loads, where that can be.
    pub loads: Option<OwnedFd>,
    pub access_log: AccessLog,
    pub control: UnixListener,
    /// Where the steward answers over HTTP.
    pub admin: Option<Admin>,
    /// Rung by the steward when a board has changed.
    pub board_bell: Bell,
    /// Rung by workers when traffic fails.
    pub failure_bell: Bell,
    pub started_at: u64,
    /// The same, by the monotonic clock.
    pub started: Millis,
    /// What the operator should know, once there is a log.
    pub notes: Vec<String>,
    /// The path from which the daemon runs, for an upgrade.
    pub program: PathBuf,
    pub socket: PathBuf,
    /// Held for life.
    pub lock: Flock<File>,
}

impl Prepared {
    /// The page of loads, where a generation is steered by it.
    pub fn loads_for(&self, generation: &Generation) -> Option<&OwnedFd> {
        let by_load = |listener: &Listener| listener.steering == Steering::LoadAware;
        self.loads.as_ref().filter(|_| generation.config.listeners.iter().any(by_load))
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}

/// Does all that a start needs, and nothing that a refusal would have to undo;
/// `passed` is what systemd opened for us.
pub fn prepare(
    start: &Start,
    passed: Vec<Passed>,
    returned: &mut Returned,
) -> Result<(Prepared, Generation, Vec<Slot>), Refusal> {
    let config = &start.config;
    let slot_count = slot_count(config.daemon.workers);
    check_descriptors(config, slot_count)?;
    let account = account(config)?;
    let lock = lock(&start.control_socket)?;
    let assignment = activation::assign(start, slot_count, &passed)?;
    // Whoever shares its ports on purpose finds somebody there.
    let probed = if config.daemon.share_ports { &[][..] } else { &config.listeners[..] };
    for (index, listener) in probed.iter().enumerate() {
        let udp = listener.mode == Mode::Udp;
        let id = |address| SocketId { address, udp, interface: listener.interface.clone() };
        probe(listener, |address| {
            !is_passed(listener, index, address, &assignment) && !returned.has(&id(address))
        })?;
    }
    let admin = Admin::bind(config.daemon.admin, None)?;
    let control = bind_control(&start.control_socket, account)?;
    let generation = Generation::new(FIRST_GENERATION, config.clone(), slot_count)?;
    generation.fill_board(&Overrides::default(), None);
    let mut slots: Vec<Slot> = (0..slot_count).map(Slot::new).collect();
    activation::give(&generation, &assignment, passed, &mut slots)?;
    let mut notes = assignment.notes;
    notes.extend(activation::take_back(&generation, returned, &mut slots));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let prepared = Prepared {
        image: Image::own().map_err(Refusal::of_system)?,
        account,
        loads: None,
        access_log: AccessLog::new(config)?,
        control,
        admin,
        started: clock::coarse(),
        board_bell: Bell::new().map_err(Refusal::of_system)?,
        failure_bell: Bell::new().map_err(Refusal::of_system)?,
        started_at: now.map_or(0, |time| time.as_secs()),
        notes,
        program: process::own_path().map_err(Refusal::of_system)?,
        socket: start.control_socket.clone(),
        lock,
    };
    Ok((prepared, generation, slots))
}

/// Whether systemd listens at an address already, for us.
fn is_passed(listener: &Listener, index: usize, address: SocketAddr, assignment: &Assignment) -> bool {
    let number = listener.bind.iter().position(|&bound| bound == address);
    number.is_some_and(|number| assignment.has(index, number))
}

/// How many slots `workers` means on this host.
pub fn slot_count(workers: Workers) -> usize {
    match workers {
        Workers::Auto => process::usable_cpus().min(64),
        Workers::Count(count) => count,
    }
}

/// More connections than descriptors allow cannot be promised.
pub fn check_descriptors(config: &Config, slot_count: usize) -> Result<(), Refusal> {
    let limit = process::raise_file_limit().map_err(Refusal::of_system)?;
    let possible = limit.saturating_sub(RESERVED_FILES) / 2 * slot_count as u64;
    let wanted = config.daemon.max_connections;
    if wanted <= possible {
        return Ok(());
    }
    let needed = wanted.div_ceil(slot_count as u64) * 2 + RESERVED_FILES;
    Err(Refusal::new(
        78,
        format!(
            "max_connections = {wanted}, but {limit} open files a process allow {possible} with {slot_count} workers"
        ),
        format!(
            "raise the limit (LimitNOFILE={needed} in the unit, or ulimit -n {needed}), or lower max_connections"
        ),
    ))
}

fn account(config: &Config) -> Result<Option<Account>, Refusal> {
    let daemon = &config.daemon;
    let account = accounts::lookup(daemon.user.as_deref(), daemon.group.as_deref());
    let account = account.map_err(|text| {
        Refusal::new(78, text, "create it (useradd --system), or correct user and group in [daemon]")
    })?;
    match account {
        Some(account) if !accounts::is_current(account) && accounts::current_uid() != 0 => Err(Refusal::new(
            77,
            format!(
                "user {} needs CAP_SETUID and CAP_SETGID, and this is uid {}",
                daemon.user.as_deref().unwrap_or("unchanged"),
                accounts::current_uid()
            ),
            "start evenkeel as root, or leave out user and group",
        )),
        other => Ok(other),
    }
}

/// One daemon a control socket: the lock is held for life, and let go by the
/// kernel whatever the end.
fn lock(socket: &Path) -> Result<Flock<File>, Refusal> {
    let path = socket.with_extension("lock");
    if let Some(folder) = socket.parent() {
        make_folder(folder)?;
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let mut file = file.map_err(|error| no_socket(&path, &error))?;
    let mut holder = String::new();
    let _ = file.read_to_string(&mut holder);
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => Refusal::new(
            69,
            format!("another evenkeel (pid {}) runs with control socket {}", holder.trim(), socket.display()),
            "end it (evenkeel stop), or give this one its own control_socket",
        ),
        other => no_socket(&path, &other.into()),
    })?;
    let written = lock.set_len(0).and_then(|()| lock.rewind());
    written
        .and_then(|()| writeln!(lock, "{}", std::process::id()))
        .map_err(|error| no_socket(&path, &error))?;
    Ok(lock)
}

fn make_folder(folder: &Path) -> Result<(), Refusal> {
    if folder.exists() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(|error| no_socket(folder, &error))
}

fn no_socket(path: &Path, error: &std::io::Error) -> Refusal {
    let exit_code = if error.kind() == std::io::ErrorKind::PermissionDenied { 77 } else { 1 };
    Refusal::new(
        exit_code,
        format!("the control socket needs {}: {error}", path.display()),
        "set control_socket in [daemon] to a place that this user may write, or RuntimeDirectory=evenkeel in the unit",
    )
}

/// The socket that commands reach, for the daemon's user and group alone.
fn bind_control(path: &Path, account: Option<Account>) -> Result<UnixListener, Refusal> {
    let is_other = |found: fs::Metadata| !found.file_type().is_socket();
    if fs::symlink_metadata(path).is_ok_and(is_other) {
        return Err(no_socket(path, &std::io::Error::other("something lies there that is not a socket")));
    }
    // Under the lock: a socket that lies here is nobody's any more.
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(no_socket(path, &error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(|error| no_socket(path, &error))?;
    fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(|error| no_socket(path, &error))?;
    if let Some(account) = account {
        chown(path, Some(account.uid), Some(account.gid)).map_err(|error| no_socket(path, &error))?;
    }
    Ok(listener)
}

/// Whether somebody else listens already at those of its addresses that are
/// of concern. A bind with SO_REUSEPORT would
/// succeed beside our own user's sockets and share the port silently.
pub fn probe(listener: &Listener, concerns: impl Fn(SocketAddr) -> bool) -> Result<(), Refusal> {
    let options = Options {
        interface: listener.interface.clone(),
        transparent: listener.transparent,
        freebind: listener.freebind,
        ..Options::default()
    };
    for &address in listener.bind.iter().filter(|&&address| concerns(address)) {
        let (protocol, probed) = match listener.mode {
            Mode::Tcp => (Protocol::Tcp, patiently(|| listen::probe_tcp(address, &options))),
            // A group is everybody's: each socket gets its copy.
            Mode::Udp if listen::is_group(address) => continue,
            Mode::Udp => (Protocol::Udp, patiently(|| listen::probe_udp(address, &options))),
        };
        let Err(error) = probed else { continue };
        let facts = holders::gather(address, protocol, &options);
        let errno = error.raw_os_error().unwrap_or(0);
        let failure = BindFailure::probe(address, errno, protocol, &options, facts);
        let told = explain::bind_failure(&failure);
        let text = format!("listener \"{}\": {}", listener.name, told.text);
        return Err(Refusal { text, advice: told.advice, exit_code: told.exit_code });
    }
    Ok(())
}

/// Tries again for a while: whoever held the address may be just ending.
pub fn patiently(probe: impl Fn() -> std::io::Result<()>) -> std::io::Result<()> {
    for _ in 0..PROBES {
        match probe() {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => std::thread::sleep(PROBE_AGAIN),
            decided => return decided,
        }
    }
    probe()
}
