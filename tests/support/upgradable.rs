//! A daemon whose program a test may replace while it runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::daemon::{Daemon, program};
use super::eventually;

/// A daemon that runs from a file of its own, which a test may replace.
pub struct Upgradable {
    pub daemon: Daemon,
    pub path: PathBuf,
    /// Says at which step the next image is to fail.
    pub hook: PathBuf,
}

impl Upgradable {
    /// Starts it and waits until it says that it is ready.
    #[track_caller]
    pub fn ready(config: &str) -> Upgradable {
        let mut paths = None;
        let mut daemon = Daemon::start_with(config, |command| {
            let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
            let folder = Path::new(&arguments[2]).parent().expect("a folder").to_path_buf();
            let (path, hook) = (folder.join("evenkeel"), folder.join("hook"));
            fs::copy(program(), &path).expect("a copy");
            let log = fs::File::create(folder.join("log")).expect("a log file");
            let mut own = Command::new(&path);
            own.args(&arguments)
                .env("NOTIFY_SOCKET", folder.join("notify"))
                .env("EVENKEEL_TEST_UPGRADE", &hook);
            own.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(log);
            *command = own;
            paths = Some((path, hook));
        });
        daemon.wait_ready();
        let (path, hook) = paths.expect("set above");
        Upgradable { daemon, path, hook }
    }

    /// As a package upgrade does it: written aside, and renamed.
    pub fn install(&self, bytes: &[u8]) {
        let aside = self.path.with_extension("new");
        fs::write(&aside, bytes).expect("a file");
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)).expect("a mode");
        fs::rename(&aside, &self.path).expect("a rename");
    }

    /// Another file that does the same.
    pub fn install_version(&self, number: usize) {
        let mut bytes = fs::read(program()).expect("the program");
        bytes.extend(format!("version {number}").bytes());
        self.install(&bytes);
    }

    /// The next image fails at this step.
    pub fn misbehave_at(&self, step: &str) {
        fs::write(&self.hook, step).expect("a file");
    }

    /// A command to it: the exit code, and what it said.
    pub fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        self.daemon.run(arguments)
    }

    /// An upgrade that succeeds, and that leaves nothing behind.
    #[track_caller]
    pub fn upgrade(&self) -> String {
        let (code, text) = self.run(&["upgrade"]);
        assert_eq!(code, Some(0), "{text}\n{}", self.daemon.log());
        self.daemon.assert_all_handed_over();
        text
    }

    /// An upgrade that is refused, with this word in what is said.
    #[track_caller]
    pub fn is_refused(&self, word: &str) -> String {
        let (code, text) = self.run(&["upgrade"]);
        assert_eq!(code, Some(1), "{text}\n{}", self.daemon.log());
        assert!(text.contains(word), "{text}\n{}", self.daemon.log());
        text
    }

    /// Which file the supervisor and its children run.
    pub fn images(&self) -> Vec<PathBuf> {
        let pids = [vec![self.daemon.pid()], self.daemon.children()].concat();
        pids.iter().filter_map(|pid| fs::read_link(format!("/proc/{pid}/exe")).ok()).collect()
    }

    /// Only processes of the file that lies at the path now are left.
    #[track_caller]
    pub fn runs_the_file_alone(&self, children: usize) {
        eventually("every process is of the new file", || {
            let images = self.images();
            images.len() == children + 1 && images.iter().all(|image| *image == self.path)
        });
    }
}
