//! The real program, started with a configuration and watched from outside.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use evenkeel::control::client;
use evenkeel::control::status::{self, Status};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{eventually, within};

/// A running daemon. It and every process of its are killed with this value.
pub struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
    manager: Arc<Manager>,
    pub ready: bool,
}

/// Where it is heard as by a service manager: at once, since a socket that it
/// asks to keep is open for as long as the message lies unread.
struct Manager {
    socket: UnixDatagram,
    /// Read from there, and not asked for yet.
    heard: Mutex<Vec<String>>,
    is_over: AtomicBool,
}

impl Manager {
    fn start(path: &Path) -> Arc<Manager> {
        let socket = UnixDatagram::bind(path).expect("a notify socket");
        socket.set_nonblocking(true).expect("non-blocking");
        let manager = Arc::new(Manager { socket, heard: Mutex::default(), is_over: AtomicBool::default() });
        let own = Arc::clone(&manager);
        std::thread::spawn(move || {
            while !own.is_over.load(Relaxed) {
                let mut readable = [PollFd::new(own.socket.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut readable, 100u8);
                drop(own.hear());
            }
        });
        manager
    }

    fn hear(&self) -> MutexGuard<'_, Vec<String>> {
        let mut heard = self.heard.lock().expect("no thread panics with it");
        let mut buffer = [0; 4096];
        while let Ok(count) = self.socket.recv(&mut buffer) {
            heard.push(String::from_utf8_lossy(&buffer[..count]).into_owned());
        }
        heard
    }
}

/// The program under test.
pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_evenkeel")
}

impl Daemon {
    /// Starts a daemon and waits until it says that it is ready.
    #[track_caller]
    pub fn ready(config: &str) -> Daemon {
        let mut daemon = Daemon::start(config);
        daemon.wait_ready();
        daemon
    }

    /// Starts a daemon with a configuration; `[daemon]` must be its first
    /// table, or be missing.
    pub fn start(config: &str) -> Daemon {
        Daemon::start_with(config, |_| {})
    }

    /// The same, with something changed about its command.
    pub fn start_with(config: &str, change: impl FnOnce(&mut Command)) -> Daemon {
        Daemon::start_under(config, &[], change)
    }

    /// The same, started by another program as `wrapper PROGRAM run ...`.
    pub fn start_under(config: &str, wrapper: &[&str], change: impl FnOnce(&mut Command)) -> Daemon {
        let folder = tempfile::tempdir().expect("a folder for a test");
        // Workers that are another user must reach it.
        let _ = fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755));
        let path = write_config(folder.path(), config);
        let manager = Manager::start(&folder.path().join("notify"));
        let log = fs::File::create(folder.path().join("log")).expect("a log file");
        let mut words = wrapper.iter().copied().chain([program()]);
        let mut command = Command::new(words.next().expect("the program at least"));
        command.args(words).args(["run", "-c"]).arg(&path).env("NOTIFY_SOCKET", folder.path().join("notify"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        change(&mut command);
        let child = command.spawn().expect("the program starts");
        Daemon { child, folder, manager, ready: false }
    }

    /// Waits for READY=1.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        let mut exited = None;
        within(Duration::from_secs(20), "READY=1", || {
            exited = self.child.try_wait().expect("our child");
            exited.is_some() || self.notified().iter().any(|text| text.contains("READY=1"))
        });
        assert!(exited.is_none(), "the daemon ended: {exited:?}\n{}", self.log());
        self.ready = true;
    }

    /// What was sent to the notify socket since the last call.
    pub fn notified(&self) -> Vec<String> {
        std::mem::take(&mut *self.manager.hear())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    /// Writes another configuration, made as for `start`, for the next reload.
    pub fn rewrite(&self, config: &str) {
        write_config(self.folder(), config);
    }

    /// Runs the program with these arguments against this daemon.
    pub fn command(&self, arguments: &[&str]) -> Output {
        let socket = self.socket();
        evenkeel(&[arguments, &["--socket", socket.to_str().expect("a plain path")]].concat())
    }

    /// The same: the exit code, and all that was said.
    pub fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let Output { status, stdout, stderr } = self.command(arguments);
        (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
    }

    /// A command that must succeed; what it said.
    #[track_caller]
    pub fn succeed(&self, arguments: &[&str]) -> String {
        let (code, text) = self.run(arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {text}\n{}", self.log());
        text
    }

    /// The same, once no other change is under way: workers that were replaced
    /// before may be about to leave.
    #[track_caller]
    pub fn change(&self, arguments: &[&str]) -> String {
        let mut said = String::new();
        within(Duration::from_secs(60), "no other change is under way", || {
            let (code, text) = self.run(arguments);
            let busy = text.contains("another change is under way");
            assert!(busy || code == Some(0), "{arguments:?}: {text}\n{}", self.log());
            said = text;
            !busy
        });
        said
    }

    /// Fails where something was not handed over but finished where it was:
    /// no loss, and no hand-over either.
    #[track_caller]
    pub fn assert_all_handed_over(&self) {
        let log = self.log();
        for failure in ["a hand-over stopped", "a hand-over was", "left to drain"] {
            assert!(!log.contains(failure), "{log}");
        }
    }

    /// Everything it logged.
    pub fn log(&self) -> String {
        let mut text = String::new();
        let mut file = fs::File::open(self.folder.path().join("log")).expect("the log");
        let _ = file.read_to_string(&mut text);
        text
    }

    /// Waits until the log says this: a line is written a moment after what it
    /// tells of.
    #[track_caller]
    pub fn says(&self, text: &str) {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !self.log().contains(text) {
            assert!(std::time::Instant::now() < deadline, "{text:?} is not in\n{}", self.log());
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// Its status; a steward that is just being replaced, or was not told of
    /// the workers yet, is waited for.
    #[track_caller]
    pub fn status(&self) -> Status {
        let mut answer = None;
        eventually("an answer to status", || {
            answer = self.ask("status").ok();
            answer.as_ref().is_some_and(|answer| answer["status"]["workers"] != json!([]))
        });
        serde_json::from_value(answer.expect("waited for")["status"].take()).expect("a status document")
    }

    /// Sends one command to the control socket.
    pub fn ask(&self, command: &str) -> Result<serde_json::Value, String> {
        client::ask(&self.socket(), &json!({"command": command}), Duration::from_secs(5))
    }

    pub fn worker(&self, slot: usize) -> status::Worker {
        self.status().workers[slot].clone()
    }

    pub fn listener(&self, name: &str) -> status::Listener {
        let status = self.status();
        status.listeners.into_iter().find(|listener| listener.name == name).expect("a listener of that name")
    }

    /// Kills a worker; it is dead when this returns, though perhaps not yet
    /// noticed.
    pub fn kill_worker(&self, slot: usize) -> u32 {
        let pid = self.worker(slot).pid;
        assert_ne!(pid, 0, "slot {slot} is empty");
        signal(pid, Signal::SIGKILL);
        eventually("the worker is dead", || !runs(pid));
        pid
    }

    pub fn signal(&self, which: Signal) {
        signal(self.pid(), which);
    }

    /// Waits for the daemon's end.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let mut status = None;
        within(limit, "the daemon's end", || {
            status = self.child.try_wait().expect("our child");
            status.is_some()
        });
        // The last words are heard, too.
        drop(self.manager.hear());
        status.expect("waited for")
    }

    /// The daemon's processes besides the supervisor and the workers' keepers.
    pub fn children(&self) -> Vec<u32> {
        let is_keeper = |pid: &u32| name_of(*pid).starts_with("ek-keeper");
        children_of(self.pid()).into_iter().filter(|pid| !is_keeper(pid)).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let children = children_of(self.pid());
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.manager.is_over.store(true, Relaxed);
        for pid in &children {
            let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
        }
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while children.iter().any(|&pid| runs(pid)) && std::time::Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(2));
        }
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
    }
}

/// Writes a configuration whose control socket lies beside it; its path.
fn write_config(folder: &Path, config: &str) -> PathBuf {
    let line = format!("control_socket = {:?}\n", folder.join("control.sock"));
    let text = match config.split_once("[daemon]\n") {
        Some((before, after)) => format!("{before}[daemon]\n{line}{after}"),
        None => format!("[daemon]\n{line}{config}"),
    };
    let path = folder.join("evenkeel.toml");
    fs::write(&path, text).expect("a configuration is written");
    path
}

/// Runs the program to its end.
pub fn evenkeel(arguments: &[&str]) -> Output {
    Command::new(program()).args(arguments).stdin(Stdio::null()).output().expect("the program runs")
}

/// Sends a signal to a process that a test started.
pub fn signal(pid: u32, which: Signal) {
    kill(Pid::from_raw(pid as i32), which).expect("a process of ours");
}

/// Whether a process lives: a zombie does not.
pub fn runs(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
    })
}

/// What a process is called; empty where there is none.
pub fn name_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_string()
}

/// The processes that this one started.
pub fn children_of(parent: u32) -> Vec<u32> {
    let Ok(folder) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = folder.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().map(str::to_string));
        fields.and_then(|mut fields| fields.nth(1)).is_some_and(|ppid| ppid == parent.to_string())
    })
    .collect()
}
