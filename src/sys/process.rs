//! Starting our own processes, and what a process says of itself.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::channel::Channel;

/// The program that is running, whatever happens to its file on disk.
#[derive(Debug)]
pub struct Image {
    file: File,
}

impl Image {
    /// This process's own running image.
    pub fn own() -> io::Result<Image> {
        // O_PATH: the file may be executed through it, though not readable.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open("/proc/self/exe")?;
        Ok(Image { file })
    }

    /// The file that lies at a path now.
    pub fn open(path: &Path) -> io::Result<Image> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
        Ok(Image { file })
    }

    /// An image that was opened before.
    pub fn from_fd(fd: OwnedFd) -> Image {
        Image { file: fd.into() }
    }

    /// Whether it begins as a program of Linux does: a text would be run by a
    /// shell. One that may be run and not read is taken at its word.
    pub fn is_program(&self) -> io::Result<bool> {
        let mut head = [0; 4];
        let read = File::open(self.path()).and_then(|mut file| io::Read::read(&mut file, &mut head));
        match read {
            Ok(count) => Ok(count == 4 && head == *b"\x7fELF"),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// A path at which the kernel finds it, for this process alone.
    pub fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    /// Starts this image as a child with `arguments`; the channel becomes the
    /// child's standard input. Nothing else is inherited but standard error.
    pub fn spawn(&self, arguments: &[String], channel: Channel) -> io::Result<Child> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::from(channel.into_fd())).stdout(Stdio::null()).stderr(Stdio::inherit());
        Child::start(&mut command)
    }

    /// Starts this image to say something of itself, into these files.
    pub fn consult(&self, arguments: &[String], out: OwnedFd, err: OwnedFd) -> io::Result<Child> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::from(out)).stderr(Stdio::from(err));
        Child::start(&mut command)
    }

    fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(self.path());
        command.arg0("evenkeel").args(arguments);
        for variable in SUPERVISORS_OWN {
            command.env_remove(variable);
        }
        command
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What the environment tells the supervisor alone.
const SUPERVISORS_OWN: [&str; 7] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    super::exec::VARIABLE,
];

/// A child by its number, which is nobody else's until we reaped it: the
/// library's own type cannot stand for a child that the image before this one
/// started.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    /// It was reaped: the number may be somebody else's by now.
    ended: Option<ExitStatus>,
}

impl Child {
    /// Starts a command.
    pub fn start(command: &mut Command) -> io::Result<Child> {
        let child = command.spawn()?;
        Ok(Child::of_number(child.id()))
    }

    /// A child of this process, whichever image started it.
    pub fn of_number(pid: u32) -> Child {
        Child { pid: Pid::from_raw(pid as i32), ended: None }
    }

    /// Its process number.
    pub fn id(&self) -> u32 {
        self.pid.as_raw() as u32
    }

    /// Ends it at once; nothing to do where it was reaped.
    pub fn kill(&mut self) -> io::Result<()> {
        if self.ended.is_none() {
            kill(self.pid, Signal::SIGKILL)?;
        }
        Ok(())
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.reap(Some(WaitPidFlag::WNOHANG))
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<()> {
        self.reap(None).map(drop)
    }

    fn reap(&mut self, flags: Option<WaitPidFlag>) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = match waitpid(self.pid, flags)? {
                WaitStatus::Exited(_, code) => Some(ExitStatus::from_raw(code << 8)),
                WaitStatus::Signaled(_, signal, _) => Some(ExitStatus::from_raw(signal as i32)),
                _ => None,
            };
        }
        Ok(self.ended)
    }
}

/// The path by which this process was started, absolute and with its symbolic
/// links: a later upgrade follows them anew. Where the shell found it in
/// another way, the path of the file itself.
pub fn own_path() -> io::Result<PathBuf> {
    let file = std::env::current_exe()?;
    let word = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    let candidates: Vec<PathBuf> = if word.components().count() > 1 {
        vec![std::path::absolute(&word)?]
    } else {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths).map(|folder| folder.join(&word)).collect()
    };
    let ours = std::fs::metadata("/proc/self/exe")?;
    let is_ours = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|it| (it.dev(), it.ino()) == (ours.dev(), ours.ino()))
    };
    Ok(candidates.into_iter().find(is_ours).unwrap_or(file))
}

/// The channel that `Image::spawn` gave to this process as standard input;
/// standard input becomes /dev/null.
pub fn inherited_channel() -> io::Result<Channel> {
    let stdin = io::stdin();
    if socket2::SockRef::from(&stdin).r#type().ok() != Some(socket2::Type::SEQPACKET) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "standard input is no channel"));
    }
    let channel: OwnedFd = std::os::fd::AsFd::as_fd(&stdin).try_clone_to_owned()?;
    let null = File::open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    Ok(Channel::from_fd(channel))
}

/// Lets a program that is no part of the daemon start as from a shell: no
/// signal ignored or blocked, and killed should this thread end first.
pub fn start_clean(command: &mut Command) {
    let clean = || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        for signal in Signal::iterator().filter(|signal| !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP))
        {
            // SAFETY: SIG_DFL runs no code, and nothing but the exec follows.
            unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl)? };
        }
        super::signals::unblock_all()
    };
    // SAFETY: needed because what a process ignores survives exec, and only
    // the child itself can change it. The closure runs between fork and exec
    // and makes system calls alone: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(clean) };
}

/// Whether this process is the parent of a process with this number, dead or
/// alive.
pub fn is_child(pid: u32) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    i32::try_from(pid).is_ok_and(|pid| pid > 0 && waitid(Id::Pid(Pid::from_raw(pid)), flags).is_ok())
}

/// Whether a child was stopped or continued by a signal since the last call;
/// `None` where neither is news. Does not take notice of its end.
pub fn try_stop(pid: u32) -> Option<bool> {
    let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WCONTINUED | WaitPidFlag::WNOHANG;
    match waitid(Id::Pid(Pid::from_raw(pid as i32)), flags) {
        Ok(WaitStatus::Stopped(..)) => Some(true),
        Ok(WaitStatus::Continued(_)) => Some(false),
        _ => None,
    }
}

/// The calling thread lets others go first where CPUs are short. It can never
/// take that back without a privilege.
pub fn yield_to_others() {
    const NICE: libc::c_int = 10;
    // SAFETY: needed because nix has no setpriority(2). It takes three numbers;
    // 0 is the calling thread, and a refusal changes nothing.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

/// Sets the name that ps and top show, at most 15 bytes.
pub fn set_name(name: &str) {
    if let Ok(name) = CString::new(name) {
        let _ = prctl::set_name(&name);
    }
}

/// No exec of this process or its children may gain privileges again.
pub fn set_no_new_privileges() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    Ok(())
}

/// Gives up the protection from the kernel's out-of-memory killer that was
/// inherited from a protected parent: if one must die, a child that is
/// replaced. Best effort.
pub fn leave_oom_protection() {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let score = std::fs::read_to_string(SCORE).ok().and_then(|text| text.trim().parse::<i32>().ok());
    if score.is_some_and(|score| score < 0) {
        // Raising one's own score needs no privilege (proc(5)).
        let _ = std::fs::write(SCORE, "0");
    }
}

/// Raises the limit of open files as far as it may go; answers the limit.
pub fn raise_file_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        return Ok(soft);
    }
    Ok(hard)
}

/// The limit of open files of this process.
pub fn file_limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft)
}

/// How many CPUs this process may use.
pub fn usable_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get())
}

/// The numbers of the CPUs that this thread may use; never empty.
pub fn usable_cpu_numbers() -> Vec<usize> {
    // A thread without any CPU would not run.
    sched_getaffinity(Pid::from_raw(0)).map_or_else(
        |_| vec![0],
        |set| (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect(),
    )
}

/// Lets this thread run on one CPU alone, and what it starts.
pub fn pin_to_cpu(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    Ok(())
}
