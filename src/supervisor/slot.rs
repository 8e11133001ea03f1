//! One slot: its sockets, and the processes that fill it.
//!
//! Sockets belong to the slot, not to a process: they are here from the slot's
//! first worker until it is given up. During a reload a slot has up to three
//! kinds of process: the current one, the next one that has not begun, and old
//! ones that hand over or finish.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;
use std::rc::Rc;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tracing::warn;

use super::generation::Generation;
use super::prepare::Prepared;
use super::upgrade::{ChildState, Packer, SlotState, Unpacker};
use crate::control::{self, FromWorker, Place, SocketId, ToWorker};
use crate::counters::Process as Counter;
use crate::sys::channel::Channel;
use crate::sys::clock::{self, Millis};
use crate::sys::process::{self, Child, Image};
use crate::sys::queues;

/// How long an old worker may live past its limit, in milliseconds: the grace
/// for removed listeners and the sessions' move come before it.
const STUCK_AFTER: Millis = 30_000;

/// A worker's place.
#[derive(Debug)]
pub struct Slot {
    pub number: usize,
    pub current: Option<Process>,
    pub next: Option<Process>,
    pub old: Vec<Process>,
    held: Vec<(SocketId, OwnedFd)>,
    /// Generations whose counters for this slot are not in the past yet.
    pub ledgers: Vec<Rc<Generation>>,
    /// Those that systemd holds as well, beyond our end.
    outliving: Vec<SocketId>,
}

/// One worker process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    channel: Option<Channel>,
    pub token: Token,
    pub generation: Rc<Generation>,
    /// An old one that lives then is stuck.
    pub kill_at: Option<Millis>,
    /// Who stands in its place should it die.
    pub keeper: Option<Child>,
    /// An old one that has passed on what could be passed.
    pub handed_over: bool,
    /// The worker is dead, and this is its keeper.
    pub is_keeper: bool,
    /// It died by its own doing.
    pub is_fault: bool,
}

/// Which of a slot's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Current,
    Next,
    Old,
}

impl Slot {
    pub fn new(number: usize) -> Slot {
        Slot {
            number,
            current: None,
            next: None,
            old: Vec::new(),
            held: Vec::new(),
            ledgers: Vec::new(),
            outliving: Vec::new(),
        }
    }

    /// Every old process has passed on what could be passed.
    pub fn has_handed_over(&self) -> bool {
        self.old.iter().all(|old| old.handed_over)
    }

    /// All that the old ones have is, or is not, passed on.
    pub fn set_handed_over(&mut self, handed_over: bool) {
        self.old.iter_mut().for_each(|old| old.handed_over = handed_over);
    }

    /// As the next image of the supervisor is to find it.
    pub fn pack<'a>(&'a self, packer: &mut Packer<'a>) -> SlotState {
        SlotState {
            number: self.number,
            held: self.held.iter().map(|(id, fd)| (id.clone(), packer.keep(fd))).collect(),
            outliving: self.outliving.clone(),
            current: self.current.as_ref().map(|process| process.pack(packer)),
            old: self.old.iter().chain(&self.next).map(|process| process.pack(packer)).collect(),
            ledgers: self.ledgers.iter().map(|ledger| packer.place(ledger)).collect(),
        }
    }

    /// As the image before this one left it.
    pub fn unpack(
        state: SlotState,
        unpacker: &mut Unpacker,
        generations: &[Rc<Generation>],
        registry: &Registry,
        last_token: &mut usize,
    ) -> Result<Slot, String> {
        let held = state.held.into_iter().map(|(id, number)| Ok((id, unpacker.take(number)?)));
        let held = held.collect::<Result<Vec<_>, String>>()?;
        let mut process = |state: &ChildState| {
            *last_token += 1;
            Process::unpack(state, unpacker, generations, registry, Token(*last_token))
        };
        let known = |place: &usize| generations.get(*place).cloned().ok_or("a generation is missing");
        let current = state.current.as_ref().map(&mut process).transpose()?;
        let mut old = state.old.iter().map(&mut process).collect::<Result<Vec<Process>, _>>()?;
        for process in &mut old {
            let limit = process.generation.config.daemon.drain_timeout;
            process.set_bound(limit.as_millis() as u64);
            process.handed_over = true;
        }
        Ok(Slot {
            current,
            next: None,
            old,
            held,
            ledgers: state.ledgers.iter().map(known).collect::<Result<_, _>>()?,
            outliving: state.outliving,
            number: state.number,
        })
    }

    /// A socket that is held for it.
    pub fn socket(&self, id: &SocketId) -> Option<BorrowedFd<'_>> {
        self.held.iter().find(|(held, _)| held == id).map(|(_, socket)| socket.as_fd())
    }

    /// Whether its current process was stopped (SIGSTOP) or went on since the
    /// last call.
    pub fn try_stop(&self) -> Option<bool> {
        self.current.as_ref().and_then(|worker| process::try_stop(worker.pid()))
    }

    /// The pid of its current process, 0 where it is empty.
    pub fn pid(&self) -> u32 {
        self.current.as_ref().map_or(0, Process::pid)
    }

    /// What its present worker counts of itself.
    pub fn count(&self, which: Counter) -> u64 {
        self.current
            .as_ref()
            .map_or(0, |process| process.generation.counters(self.number).process(which).get())
    }

    /// Keeps what systemd opened for it, before its first worker.
    pub fn adopt(&mut self, generation: &Generation, sockets: Vec<(Place, OwnedFd)>) {
        let known = generation.places();
        for (place, fd) in sockets {
            if let Some((_, id)) = known.iter().find(|(known, _)| *known == place) {
                self.outliving.push(id.clone());
                self.held.push((id.clone(), fd));
            }
        }
    }

    /// Keeps what it had before a restart.
    pub fn take_back(&mut self, id: SocketId, fd: OwnedFd) {
        self.held.push((id, fd));
    }

    /// The process with this token.
    pub fn find(&mut self, token: Token) -> Option<(Role, &mut Process)> {
        let current = self.current.as_mut().map(|process| (Role::Current, process));
        let next = self.next.as_mut().map(|process| (Role::Next, process));
        let old = self.old.iter_mut().map(|process| (Role::Old, process));
        current.into_iter().chain(next).chain(old).find(|(_, process)| process.token == token)
    }

    /// A process was dead and is none of the slot's any more: what it held is
    /// nobody's, unless another one counts in the same generation.
    pub fn forget_gauges(&mut self, dead: &Process) {
        let generation = &dead.generation;
        let is_same = |process: &mut Process| process.generation.number == generation.number;
        if !self.processes().any(is_same) && self.number < generation.slot_count() {
            generation.counters(self.number).begin_life(&generation.layout);
        }
    }

    /// Every process of the slot.
    pub fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        self.current.iter_mut().chain(self.next.iter_mut()).chain(self.old.iter_mut())
    }

    /// Starts a worker of a generation, with the sockets that the slot has.
    pub fn spawn(
        &self,
        prepared: &Prepared,
        generation: &Rc<Generation>,
        registry: &Registry,
        token: Token,
    ) -> io::Result<Process> {
        self.spawn_as(&prepared.image, prepared, generation, registry, token, false)
    }

    /// The same from another image. One that is on `trial` has no sockets and
    /// opens none, says that it is ready and ends.
    pub fn spawn_as(
        &self,
        image: &Image,
        prepared: &Prepared,
        generation: &Rc<Generation>,
        registry: &Registry,
        token: Token,
        trial: bool,
    ) -> io::Result<Process> {
        let (ours, theirs) = Channel::pair()?;
        ours.set_nonblocking()?;
        let arguments = ["worker".to_string(), self.number.to_string()];
        let child = image.spawn(&arguments, theirs)?;
        let fd = ours.as_fd().as_raw_fd();
        let mut process = Process {
            child,
            channel: Some(ours),
            token,
            generation: Rc::clone(generation),
            kill_at: None,
            keeper: None,
            handed_over: false,
            is_keeper: false,
            is_fault: false,
        };
        let born = registry
            .register(&mut SourceFd(&fd), token, Interest::READABLE)
            .and_then(|()| self.tell_birth(&process, prepared, trial));
        if let Err(error) = born {
            process.kill();
            let _ = process.child.wait();
            return Err(error);
        }
        Ok(process)
    }

    /// Whether a dead worker's keeper has what the gauges of these counters say.
    fn has_keeper_of(&self, generation: &Generation) -> bool {
        self.old.iter().any(|old| old.is_keeper && old.generation.number == generation.number)
    }

    fn tell_birth(&self, process: &Process, prepared: &Prepared, trial: bool) -> io::Result<()> {
        let channel = process.channel.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let generation = &process.generation;
        let log = prepared.access_log.workers_end(&generation.config);
        let before = generation.before.upgrade();
        let birth = ToWorker::Birth {
            slot: self.number,
            slot_count: generation.slot_count(),
            generation: generation.number,
            account: prepared.account,
            outliving: self.outliving_in(generation),
            tells_load: prepared.loads_for(generation).is_some(),
            trial,
            logs_access: log.is_some(),
            before: before.as_ref().map_or(0, |before| before.slot_count()),
            recovers: self.has_keeper_of(generation),
        };
        let own = generation.regions[self.number].as_fd();
        let readable = generation.readable.iter().map(AsFd::as_fd);
        let bells = [&prepared.board_bell, &prepared.failure_bell].map(AsFd::as_fd);
        let board = [generation.readable_board.as_fd()].into_iter().chain(bells);
        let loads = prepared.loads_for(generation).into_iter().map(AsFd::as_fd);
        let fds: Vec<BorrowedFd> = [generation.sealed.as_fd(), own]
            .into_iter()
            .chain(board)
            .chain(loads)
            .chain(log)
            .chain(before.iter().map(|before| before.sealed.as_fd()))
            .chain(before.iter().flat_map(|before| before.readable.iter().map(AsFd::as_fd)))
            .chain(readable)
            .collect();
        control::send(channel, &birth, &fds)?;
        control::send_sockets(channel, &self.held_of(generation), ToWorker::Sockets)?;
        control::send(channel, &ToWorker::Begin, &[])
    }

    /// The slot's sockets with their places in a generation; systemd may have
    /// passed more than one for a place.
    fn held_of(&self, generation: &Generation) -> Vec<(Place, BorrowedFd<'_>)> {
        let places = generation.places().into_iter();
        let sockets = places.flat_map(|(place, id)| {
            let own = self.held.iter().filter(move |(held, _)| *held == id);
            own.map(move |(_, fd)| (place, fd.as_fd()))
        });
        sockets.collect()
    }

    fn outliving_in(&self, generation: &Generation) -> Vec<Place> {
        let places = generation.places().into_iter();
        places.filter(|(_, id)| self.outliving.contains(id)).map(|(place, _)| place).collect()
    }

    /// Its sockets by inode, as the kernel's tables name them.
    pub fn inodes(&self) -> impl Iterator<Item = u64> {
        self.held.iter().filter_map(|(_, fd)| nix::sys::stat::fstat(fd).ok()).map(|stat| stat.st_ino)
    }

    /// All its sockets.
    pub fn held(&self) -> &[(SocketId, OwnedFd)] {
        &self.held
    }

    /// Whether somebody waits at one of its sockets.
    pub fn is_waited_for(&self) -> bool {
        self.held.iter().any(|(id, socket)| {
            let queue = if id.udp { queues::of_udp(socket) } else { queues::of_tcp(socket) };
            queue.is_ok_and(|queue| queue.waiting > 0)
        })
    }

    /// The sockets that systemd holds as well.
    pub fn outliving(&self) -> &[SocketId] {
        &self.outliving
    }

    /// Keeps what a process of its opened.
    pub fn hold(&mut self, generation: &Generation, places: Vec<Place>, fds: Vec<OwnedFd>) -> io::Result<()> {
        let known = generation.places();
        for (place, fd) in control::pair_up(places, fds)? {
            let id = known.iter().find(|(known, _)| *known == place).map(|(_, id)| id.clone());
            self.held.push((id.ok_or(io::ErrorKind::InvalidData)?, fd));
        }
        Ok(())
    }

    /// The places, as a generation numbers them, of sockets that another
    /// generation has no use for.
    pub fn removed_places(&self, from: &Generation, to: &Generation) -> Vec<Place> {
        let kept: Vec<SocketId> = to.places().into_iter().map(|(_, id)| id).collect();
        from.places().into_iter().filter(|(_, id)| !kept.contains(id)).map(|(place, _)| place).collect()
    }

    /// Closes what a generation has no use for.
    pub fn release_all_but(&mut self, generation: &Generation) {
        let kept: Vec<SocketId> = generation.places().into_iter().map(|(_, id)| id).collect();
        self.held.retain(|(id, _)| kept.contains(id));
    }

    /// The daemon leaves and the queues are served: nobody needs them more.
    /// Those of UDP stay until the end: a socket less in the kernel's group,
    /// and flows of the workers that are still finishing would move.
    pub fn release_sockets(&mut self) {
        self.held.retain(|(id, _)| id.udp);
    }

    /// Further descriptors of its sockets.
    pub fn duplicates(&self, generation: &Generation) -> Vec<(Place, OwnedFd)> {
        let held = self.held_of(generation).into_iter();
        held.filter_map(|(place, fd)| Some((place, fd.try_clone_to_owned().ok()?))).collect()
    }

    /// Its worker polls another slot's sockets as well.
    pub fn lend(&mut self, slot: usize, sockets: &[(Place, OwnedFd)]) {
        let Some(process) = &mut self.current else { return };
        let Some(channel) = &process.channel else { return };
        let sockets: Vec<(Place, BorrowedFd)> =
            sockets.iter().map(|(place, fd)| (*place, fd.as_fd())).collect();
        if let Err(error) = control::send_sockets(channel, &sockets, |places| ToWorker::Lend { slot, places })
        {
            warn!(slot = self.number, %error, "the worker takes no loan: killed");
            process.kill();
        }
    }

    /// Tells its worker something.
    pub fn tell(&mut self, message: &ToWorker) {
        if let Some(process) = &mut self.current {
            process.tell(message, &[]);
        }
    }

    /// Its worker is to leave within so many milliseconds.
    pub fn drain(&mut self, limit: Option<Millis>) {
        self.tell(&ToWorker::Drain { limit });
    }

    /// Ends all its processes at once.
    pub fn kill(&mut self) {
        self.processes().for_each(Process::end);
    }
}

impl Process {
    fn pack<'a>(&'a self, packer: &mut Packer<'a>) -> ChildState {
        ChildState {
            pid: self.pid(),
            channel: self.channel.as_ref().map(|channel| packer.keep(channel)),
            generation: packer.place(&self.generation),
            keeper: self.keeper.as_ref().map(Child::id),
            is_keeper: self.is_keeper,
            is_fault: self.is_fault,
        }
    }

    fn unpack(
        state: &ChildState,
        unpacker: &mut Unpacker,
        generations: &[Rc<Generation>],
        registry: &Registry,
        token: Token,
    ) -> Result<Process, String> {
        let channel = state.channel.map(|number| unpacker.take(number).map(Channel::from_fd)).transpose()?;
        if let Some(channel) = &channel {
            let fd = channel.as_fd().as_raw_fd();
            registry
                .register(&mut SourceFd(&fd), token, Interest::READABLE)
                .map_err(|error| format!("a worker's channel: {error}"))?;
        }
        let generation = generations.get(state.generation).cloned().ok_or("a generation is missing")?;
        Ok(Process {
            child: Child::of_number(state.pid),
            channel,
            token,
            generation,
            kill_at: None,
            keeper: state.keeper.map(Child::of_number),
            handed_over: false,
            is_keeper: state.is_keeper,
            is_fault: state.is_fault,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends something. A worker that takes no messages is stuck: its end
    /// brings a new one. One that has closed its end is about to be gone, and
    /// says by its exit code how.
    pub fn tell(&mut self, message: &ToWorker, fds: &[BorrowedFd]) {
        let Some(channel) = &self.channel else { return };
        match control::send(channel, message, fds).map_err(|error| (error.kind(), error)) {
            Ok(()) | Err((io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset, _)) => {}
            Err((_, error)) => {
                warn!(pid = self.pid(), %error, "the worker takes no messages: killed");
                self.kill();
            }
        }
    }

    /// What it says next, if it says anything.
    pub fn receive(&mut self, registry: &Registry) -> Option<(FromWorker, Vec<OwnedFd>)> {
        match control::receive(self.channel.as_ref()?) {
            Ok(Some(message)) => return Some(message),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Ok(None) => {}
            Err(error) => {
                warn!(pid = self.pid(), %error, "the worker's message was not understood: killed");
                self.kill();
            }
        }
        self.close_channel(registry);
        None
    }

    /// It is gone: nothing more is heard of it.
    pub fn close_channel(&mut self, registry: &Registry) {
        if let Some(channel) = self.channel.take() {
            let _ = registry.deregister(&mut SourceFd(&channel.as_fd().as_raw_fd()));
        }
    }

    /// It is an old one from here on: it finishes within the limit, and one
    /// that does not is stuck, since nobody asks it for a sign of life.
    pub fn set_bound(&mut self, limit: Millis) {
        self.kill_at = Some(clock::coarse().saturating_add(limit).saturating_add(STUCK_AFTER));
    }

    /// The worker is dead: its keeper is the process from here on.
    pub fn become_keeper(&mut self, keeper: Child, is_fault: bool) {
        self.child = keeper;
        self.is_keeper = true;
        self.is_fault = is_fault;
        self.handed_over = false;
    }

    /// Ends it at once; what it has is its keeper's.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Ends it with all that it has.
    pub fn end(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            let _ = keeper.kill();
        }
        self.kill();
    }

    /// Waits for its end.
    pub fn wait(&mut self) {
        let _ = self.child.wait();
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }
}
