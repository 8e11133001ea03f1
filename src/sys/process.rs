//! Starting our own processes, and what a process says of itself.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
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

    /// Starts this image as a child with `arguments`; the channel becomes the
    /// child's standard input. Nothing else is inherited but standard error.
    pub fn spawn(&self, arguments: &[String], channel: Channel) -> io::Result<Child> {
        Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
            .arg0("evenkeel")
            .args(arguments)
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_USEC")
            .env_remove("WATCHDOG_PID")
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_FDNAMES")
            .env_remove("LISTEN_PID")
            .stdin(Stdio::from(channel.into_fd()))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
    }
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
