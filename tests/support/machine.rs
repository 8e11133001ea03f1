//! A booted systemd in namespaces of its own: `tests/systemd/boot.sh`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use super::daemon::{children_of, program};
use super::{eventually, within};

/// The machine; it ends with this value.
pub struct Machine {
    /// `unshare`, the parent of the inner systemd.
    child: Child,
    systemd: u32,
    folder: tempfile::TempDir,
}

impl Machine {
    /// Boots with the program at /usr/bin/evenkeel, the units of this
    /// repository, and these files besides. From here on this thread is in the
    /// machine's network.
    #[track_caller]
    pub fn boot(files: &[(&str, &str)]) -> Machine {
        let machine = Machine::try_boot(files).unwrap_or_else(|reason| panic!("{reason}"));
        let network = fs::File::open(format!("/proc/{}/ns/net", machine.systemd)).expect("a living process");
        setns(network, CloneFlags::CLONE_NEWNET).expect("root may enter");
        machine
    }

    fn try_boot(files: &[(&str, &str)]) -> Result<Machine, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let inside = |path: &str| folder.path().join("files").join(path.trim_start_matches('/'));
        let write = |path: &str, text: &str| {
            let path = inside(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        };
        for unit in ["evenkeel.service", "evenkeel.socket"] {
            let text = fs::read_to_string(Path::new("systemd").join(unit)).expect("a unit");
            write(&format!("/etc/systemd/system/{unit}"), &text);
        }
        for (path, text) in files {
            write(path, text);
        }
        fs::create_dir_all(inside("/usr/bin")).expect("a folder");
        fs::copy(program(), inside("/usr/bin/evenkeel")).expect("the program");
        let console = fs::File::create(folder.path().join("console")).expect("a file");
        let child = Command::new("tests/systemd/boot.sh")
            .arg(folder.path())
            .stdin(Stdio::null())
            .stdout(console.try_clone().expect("a file"))
            .stderr(console)
            .spawn()
            .expect("a script");
        let mut machine = Machine { child, systemd: 0, folder };
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = machine.child.try_wait().expect("our child") {
                return Err(format!("no machine ({status}): {}", machine.console()));
            }
            machine.systemd = children_of(machine.child.id()).first().copied().unwrap_or(0);
            if machine.systemd != 0 && machine.shows("is-system-running") == "running" {
                return Ok(machine);
            }
            if Instant::now() > deadline {
                return Err(format!("no boot within a minute: {}", machine.console()));
            }
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// What went wrong, in the script or inside.
    pub fn console(&self) -> String {
        let said = fs::read_to_string(self.folder.path().join("console")).unwrap_or_default();
        said + &self.journal(&["-p", "warning"])
    }

    /// Runs a command inside.
    pub fn run(&self, command: &[&str]) -> Output {
        let pid = self.systemd.to_string();
        Command::new("nsenter")
            .args(["-t", &pid, "-m", "-p", "-n", "-C", "-i", "-u", "--"])
            .args(command)
            .stdin(Stdio::null())
            .output()
            .expect("nsenter of util-linux")
    }

    fn shows(&self, command: &str) -> String {
        String::from_utf8_lossy(&self.run(&["systemctl", command]).stdout).trim().to_string()
    }

    /// Runs systemctl; fails where it does.
    #[track_caller]
    pub fn systemctl(&self, arguments: &[&str]) {
        let done = self.run(&[&["systemctl"], arguments].concat());
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "systemctl {arguments:?}: {text}\n{}\n{}", self.log(), self.console());
    }

    /// A property of evenkeel.service.
    pub fn property(&self, name: &str) -> String {
        let done = self.run(&["systemctl", "show", "-P", name, "evenkeel.service"]);
        String::from_utf8_lossy(&done.stdout).trim().to_string()
    }

    /// The service's main process, as the host numbers it; 0 where there is none.
    pub fn supervisor(&self) -> u32 {
        let inner = self.property("MainPID");
        let wanted = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).map(str::to_string);
            line.is_some_and(|line| line.split_whitespace().last() == Some(&inner))
        };
        children_of(self.systemd).into_iter().find(|&pid| wanted(pid)).unwrap_or(0)
    }

    /// A file inside.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.systemd))
    }

    /// Everything that evenkeel logged.
    pub fn log(&self) -> String {
        self.journal(&["-u", "evenkeel"])
    }

    fn journal(&self, what: &[&str]) -> String {
        let done = self.run(&[&["journalctl", "--no-pager", "-o", "cat"], what].concat());
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    /// `evenkeel status --json`, as root types it.
    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        let mut answer = None;
        eventually("an answer to evenkeel status", || {
            answer = serde_json::from_slice(&self.run(&["evenkeel", "status", "--json"]).stdout).ok();
            answer.is_some()
        });
        answer.expect("waited for")
    }

    /// Waits until a property has a value.
    #[track_caller]
    pub fn wait_for(&self, limit: Duration, name: &str, value: &str) {
        within(limit, &format!("{name}={value}"), || self.property(name) == value);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- evenkeel's log\n{}--- systemd's console\n{}", self.log(), self.console());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Ok(cgroup) = fs::read_to_string(self.folder.path().join("cgroup")) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while !remove_cgroup(Path::new(cgroup.trim())) && Instant::now() < deadline {
                std::thread::park_timeout(Duration::from_millis(20));
            }
        }
    }
}

/// A cgroup is removed from its leaves up, and once it has no process.
fn remove_cgroup(path: &Path) -> bool {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    fs::remove_dir(path).is_ok() || !path.exists()
}

/// Why this host can boot no such machine.
pub fn missing() -> Option<String> {
    static REASON: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    REASON
        .get_or_init(|| Machine::try_boot(&[]).err().map(|reason| reason.trim().replace('\n', "; ")))
        .clone()
}
