//! How a worker comes to be: who it is, its sockets, and no more privileges.
//!
//! A slot's first worker opens the sockets itself, while it still may, and
//! gives the supervisor a duplicate of each; whoever fills the slot later gets
//! those, with what waits in their queues.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tracing::{debug, warn};

use super::Failure;
use super::access_log::AccessLog;
use super::elsewhere::Elsewhere;
use super::gate::Gate;
use super::load::Load;
use super::sessions::Context;
use crate::board::{self, Board};
use crate::config::{self, Config, Listener, Mode, Multicast};
use crate::control::misbehave;
use crate::control::{self, FromWorker, Place, ToWorker};
use crate::counters::{Counters, Layout};
use crate::explain::{self, BindFailure};
use crate::logging;
use crate::sys::accounts::{self, Account, Keep};
use crate::sys::bell::Bell;
use crate::sys::channel::Channel;
use crate::sys::filter;
use crate::sys::holders::{self, Protocol};
use crate::sys::listen::{self, MulticastInterface, Options, Share};
use crate::sys::local_end;
use crate::sys::process;
use crate::sys::shared::{self, Region};
use crate::sys::stream::TcpOptions;

/// A worker that is ready to serve.
#[derive(Debug)]
pub struct Born {
    pub slot: usize,
    pub slot_count: usize,
    pub generation: u64,
    pub config: Config,
    pub layout: Layout,
    /// This slot's counters, to write.
    pub own: Region,
    /// How the servers stand.
    pub board: Region,
    pub board_layout: board::Layout,
    /// Heard when the board has changed.
    pub board_bell: Bell,
    /// Rung when traffic fails.
    pub failure_bell: Bell,
    /// Where it tells its load, if anything is steered by it.
    pub load: Option<Load>,
    /// Where it says which sessions ended, if that is wanted.
    pub access_log: Option<RefCell<AccessLog>>,
    /// Those of the generation before, where it still has workers.
    pub earlier: Option<Elsewhere>,
    /// Those of the generation after, once it begins to take its place.
    pub later: OnceCell<Elsewhere>,
    /// Every slot's counters, to read.
    pub all: Vec<Region>,
    pub sockets: Vec<(Place, OwnedFd)>,
    /// Those of them that another process had before.
    pub kept: Vec<Place>,
    /// Places whose sockets outlive the daemon.
    pub outliving: Vec<Place>,
    /// It only shows that it could work.
    pub on_trial: bool,
    /// What the gauges say is its predecessor's, and on its way here.
    pub recovers: bool,
    pub log: RefCell<logging::Log>,
}

impl Born {
    /// Listens to the supervisor until it says `Begin`, and does it. `None`
    /// where the supervisor is gone.
    pub fn be(channel: &Channel) -> Result<Option<Born>, Failure> {
        let Some((birth, fds)) = receive(channel)? else { return Ok(None) };
        let ToWorker::Birth {
            slot,
            slot_count,
            generation,
            account,
            outliving,
            tells_load,
            trial,
            logs_access,
            before,
            recovers,
        } = birth
        else {
            return Err(Failure::new("the supervisor did not begin with a birth"));
        };
        process::set_name(&format!("ek-worker-{slot}"));
        process::leave_oom_protection();
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(|| Failure::new("the birth came with too few descriptors"));
        let config = read_config(next()?)?;
        let own = Region::open(next()?).map_err(|e| Failure::new(format!("the counters: {e}")))?;
        let board = Region::open_read_only(next()?).map_err(|e| Failure::new(format!("the board: {e}")))?;
        let (board_bell, failure_bell) = (Bell::from_fd(next()?), Bell::from_fd(next()?));
        let load = match tells_load {
            true => Some(Load::open(next()?, slot).map_err(|e| Failure::new(format!("the loads: {e}")))?),
            false => None,
        };
        let access_log = match logs_access {
            true => Some(RefCell::new(AccessLog::new(next()?, config.log.format))),
            false => None,
        };
        let earlier = match before {
            0 => None,
            // Its configuration, and then its slots.
            count => Some(Elsewhere::open(&config, fds.by_ref().take(1 + count)).map_err(Failure::new)?),
        };
        let all = fds.map(Region::open_read_only).collect::<Result<Vec<_>, _>>();
        let all = all.map_err(|e| Failure::new(format!("the counters: {e}")))?;
        let log = control::start_log(&config.log, &format!("slot={slot} gen={generation}"));
        let mut given: HashMap<Place, Vec<OwnedFd>> = HashMap::new();
        loop {
            match receive(channel)? {
                None => return Ok(None),
                Some((ToWorker::Sockets(places), fds)) => {
                    let pairs = control::pair_up(places, fds).map_err(|e| Failure::new(e.to_string()))?;
                    for (place, socket) in pairs {
                        given.entry(place).or_default().push(socket);
                    }
                }
                Some((ToWorker::Begin, _)) => break,
                Some((message, _)) => return Err(Failure::new(format!("before Begin came {message:?}"))),
            }
        }
        if !trial && misbehave::is_told("proving") {
            return Err(Failure::new("told to by a test"));
        }
        let kept = given.keys().copied().collect();
        let share = Share { index: slot as u32, count: slot_count as u32 };
        let sockets = if trial { Vec::new() } else { complete(&config, given, share, channel)? };
        if config.daemon.pin_workers {
            pin(slot);
        }
        give_up_privileges(account, &config)?;
        let layout = Layout::of(&config);
        let board_layout = board::Layout::of(&config);
        Ok(Some(Born {
            slot,
            slot_count,
            generation,
            config,
            layout,
            own,
            board,
            board_layout,
            board_bell,
            failure_bell,
            load,
            access_log,
            earlier,
            later: OnceCell::new(),
            all,
            sockets,
            kept,
            outliving,
            on_trial: trial,
            recovers,
            log: RefCell::new(log),
        }))
    }

    /// What every session and flow needs; `None` where what came with the birth
    /// does not belong together.
    pub fn context(&self) -> Option<Context<'_>> {
        let over = |region| of_region(region, &self.layout);
        Some(Context {
            slot: self.slot,
            generation: self.generation,
            config: &self.config,
            layout: &self.layout,
            counters: over(&self.own)?,
            access_log: self.access_log.as_ref(),
            all: self.all.iter().map(over).collect::<Option<Vec<_>>>()?,
            gates: self.config.listeners.iter().map(Gate::of).collect(),
            board: Board::over(self.board.words(), &self.board_layout)?,
            failure_bell: &self.failure_bell,
            earlier: self.earlier.as_ref(),
            later: &self.later,
        })
    }
}

fn of_region<'a>(region: &'a Region, layout: &Layout) -> Option<Counters<'a>> {
    Counters::over(region.words(), layout)
}

/// Where the host refuses, the worker serves on any CPU.
fn pin(slot: usize) {
    let cpus = process::usable_cpu_numbers();
    let cpu = cpus[slot % cpus.len()];
    if let Err(error) = process::pin_to_cpu(cpu) {
        warn!(cpu, %error, "pin_workers: the worker cannot be kept on its CPU");
    }
}

fn receive(channel: &Channel) -> Result<Option<(ToWorker, Vec<OwnedFd>)>, Failure> {
    control::receive(channel).map_err(|e| Failure::new(format!("the supervisor's message: {e}")))
}

fn read_config(fd: OwnedFd) -> Result<Config, Failure> {
    let bytes = shared::read_sealed(fd).map_err(|e| Failure::new(format!("the configuration: {e}")))?;
    serde_json::from_slice(&bytes).map_err(|e| Failure::new(format!("the configuration: {e}")))
}

/// A socket for every address of every listener: those that were given, and
/// new ones, of which the supervisor gets a duplicate.
fn complete(
    config: &Config,
    mut given: HashMap<Place, Vec<OwnedFd>>,
    share: Share,
    channel: &Channel,
) -> Result<Vec<(Place, OwnedFd)>, Failure> {
    let mut sockets = Vec::new();
    let mut opened = Vec::new();
    for (listener_index, listener) in config.listeners.iter().enumerate() {
        for address in 0..listener.bind.len() {
            let place = Place { listener: listener_index, address };
            match given.remove(&place) {
                // Mostly one; systemd may have passed more.
                Some(held) => {
                    for socket in held {
                        adopt(listener, address, share, &socket)?;
                        sockets.push((place, socket));
                    }
                }
                None => {
                    opened.push(sockets.len());
                    sockets.push((place, open(listener, address, share)?));
                }
            }
        }
    }
    debug!("{} sockets opened, {} taken over", opened.len(), sockets.len() - opened.len());
    let duplicates: Vec<(Place, BorrowedFd)> =
        opened.iter().map(|&i| (sockets[i].0, sockets[i].1.as_fd())).collect();
    control::send_sockets(channel, &duplicates, FromWorker::Sockets)
        .and_then(|()| control::send(channel, &FromWorker::Opened, &[]))
        .map_err(|e| Failure::new(format!("the supervisor took no sockets: {e}")))?;
    Ok(sockets)
}

fn open(listener: &Listener, address: usize, share: Share) -> Result<OwnedFd, Failure> {
    let options = listen_options(listener);
    let bind = listener.bind[address];
    let (protocol, socket) = match listener.mode {
        Mode::Tcp => (Protocol::Tcp, listen::tcp(bind, &options)),
        Mode::Udp if listen::is_group(bind) => {
            let share = (listener.udp.multicast == Multicast::Partition).then_some(share);
            let interface = join_on(listener.udp.multicast_interface.as_ref());
            (Protocol::Udp, listen::multicast(bind, &interface, share, &options))
        }
        Mode::Udp => (Protocol::Udp, listen::udp(bind, &options)),
    };
    let socket = socket.map_err(|error| {
        let facts = holders::gather(error.address, protocol, &options);
        let told = explain::bind_failure(&BindFailure::new(&error, protocol, &options, facts));
        let text = format!("listener \"{}\": {}", listener.name, told.text);
        Failure { text, advice: told.advice, exit_code: told.exit_code }
    })?;
    if listener.mode == Mode::Tcp {
        set_tcp_options(listener, &socket)?;
    }
    Ok(socket)
}

fn join_on(interface: Option<&config::MulticastInterface>) -> MulticastInterface {
    match interface {
        None => MulticastInterface::Any,
        Some(config::MulticastInterface::Name(name)) => MulticastInterface::Name(name.clone()),
        Some(config::MulticastInterface::Address(address)) => MulticastInterface::Address(*address),
    }
}

/// A socket of an earlier worker: its options may be those of an earlier
/// configuration.
fn adopt(listener: &Listener, address: usize, share: Share, socket: &OwnedFd) -> Result<(), Failure> {
    let failure = |what: &str, error: std::io::Error| {
        Failure::new(format!("listener \"{}\": a kept socket {what}: {error}", listener.name))
    };
    let bind = listener.bind[address];
    match listener.mode {
        Mode::Tcp => {
            let backlog = i32::try_from(listener.backlog).unwrap_or(i32::MAX);
            let socket = socket2::SockRef::from(socket);
            socket.listen(backlog).map_err(|error| failure("does not listen", error))?;
        }
        // Another number of slots makes another share of the group.
        Mode::Udp if listen::is_group(bind) && listener.udp.multicast == Multicast::Partition => {
            filter::take_share(socket, bind.is_ipv6(), share.index, share.count)
                .map_err(|error| failure("takes no share of its group", error))?;
        }
        Mode::Udp if listen::is_group(bind) => {
            filter::take_all(socket).map_err(|error| failure("keeps its share of its group", error))?;
        }
        Mode::Udp => {}
    }
    if listener.mode == Mode::Tcp { set_tcp_options(listener, socket) } else { Ok(()) }
}

/// Set once on the listener, inherited by every connection that it accepts.
fn set_tcp_options(listener: &Listener, socket: &OwnedFd) -> Result<(), Failure> {
    let tcp = TcpOptions { keepalive: listener.tcp.keepalive, user_timeout: listener.tcp.user_timeout };
    tcp.apply(socket).map_err(|e| Failure::new(format!("listener \"{}\": {e}", listener.name)))
}

/// What `sys::listen` is to be told for a listener.
pub fn listen_options(listener: &Listener) -> Options {
    Options {
        backlog: listener.backlog,
        receive_buffer: listener.receive_buffer,
        send_buffer: listener.send_buffer,
        interface: listener.interface.clone(),
        transparent: listener.transparent,
        freebind: listener.freebind,
        fast_open: listener.tcp.fast_open,
        defer_accept: listener.tcp.defer_accept,
    }
}

fn give_up_privileges(account: Option<Account>, config: &Config) -> Result<(), Failure> {
    let transparent = config.upstreams.iter().find(|upstream| upstream.transparent);
    let keep = if transparent.is_some() { Keep::ForeignAddresses } else { Keep::Nothing };
    if let Some(account) = account {
        accounts::become_account(account, keep).map_err(|e| Failure {
            text: format!("cannot become uid {} gid {}: {e}", account.uid, account.gid),
            advice: "start evenkeel as root, or leave out user and group".into(),
            exit_code: 77,
        })?;
    }
    // What a unit's AmbientCapabilities= gave for binding. Root without `user`
    // stays what it is: the operator asked for no change.
    if accounts::current_uid() != 0 {
        accounts::drop_capabilities(keep).map_err(|e| Failure::new(format!("capabilities: {e}")))?;
    }
    if let Some(upstream) = transparent
        && let Err(error) = local_end::may_be_foreign()
    {
        return Err(Failure {
            text: format!(
                "upstream \"{}\" has transparent = true, and this process may not leave from the addresses of \
                 its clients: {error}",
                upstream.name
            ),
            advice: "AmbientCapabilities=CAP_NET_RAW in the unit, or start as root, or leave transparent out"
                .into(),
            exit_code: 77,
        });
    }
    process::set_no_new_privileges().map_err(|e| Failure::new(format!("no_new_privs: {e}")))
}
