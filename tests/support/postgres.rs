//! A PostgreSQL of a test's own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::daemon::signal;
use super::within;

/// Where PostgreSQL's own programs are; `None` where it is not installed.
pub fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let folders = versions.flatten().map(|version| version.path().join("bin"));
    folders.filter(|folder| folder.join("initdb").exists()).max()
}

/// A server; it ends with this value, or earlier by `kill`.
pub struct Postgres {
    pub address: SocketAddr,
    folder: tempfile::TempDir,
    child: Option<Child>,
    programs: PathBuf,
}

impl Postgres {
    /// One with pgbench's tables in it.
    #[track_caller]
    pub fn start(port: u16, programs: PathBuf) -> Postgres {
        let folder = tempfile::tempdir().expect("a folder");
        // The server is another user.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(folder.path(), open).expect("our folder");
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut postgres = Postgres { address, folder, child: None, programs };
        let mut initdb = postgres.command("initdb");
        initdb.args(["-A", "trust", "-U", "bench", "--no-sync", "-D"]).arg(postgres.data());
        let output = initdb.output().expect("initdb");
        assert!(output.status.success(), "{output:?}");
        postgres.run();
        let filled = pgbench(address, &["-i", "-s", "1", "-q"]).output().expect("pgbench");
        assert!(filled.status.success(), "{filled:?}");
        postgres
    }

    /// Starts the server, for the first time or after `kill`.
    #[track_caller]
    pub fn run(&mut self) {
        let port = self.address.port().to_string();
        let mut command = self.command("postgres");
        command.args(["-p", &port, "-h", "127.0.0.1", "-k", "", "-F"]);
        command.args(["-c", "max_connections=60", "-D"]).arg(self.data());
        self.child = Some(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("postgres"));
        within(Duration::from_secs(60), "postgres answers", || {
            let mut ready = self.command("pg_isready");
            ready.args(["-q", "-h", "127.0.0.1", "-p", &port]).status().expect("pg_isready").success()
        });
    }

    /// As a crash: without a word to its sessions.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // QUIT: "immediate shutdown", of the sessions' processes too.
            signal(child.id(), Signal::SIGQUIT);
            let _ = child.wait();
        }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// PostgreSQL does not run as root.
    fn command(&self, name: &str) -> Command {
        let program = self.programs.join(name);
        let mut command = match nix::unistd::geteuid().is_root() {
            true => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]).arg(program);
                command
            }
            false => Command::new(program),
        };
        command.stdin(Stdio::null()).current_dir("/");
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill();
    }
}

/// pgbench at an address.
pub fn pgbench(address: SocketAddr, arguments: &[&str]) -> Command {
    let mut command = Command::new("pgbench");
    command.args(arguments).args(["-h", "127.0.0.1", "-p", &address.port().to_string(), "-U", "bench"]);
    command.arg("postgres").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}
