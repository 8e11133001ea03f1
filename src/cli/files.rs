//! Which configuration and which control socket a command means.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{EXIT_CONFIG, EXIT_PERMISSION};
use crate::config::{self, Config, Loaded, Problem};
use crate::control::client;
use crate::sys::accounts;

/// The configuration of `evenkeel run` without a file.
const DEMO: &str = include_str!("../../config/demo.toml");
const DEMO_NAME: &str = "config/demo.toml";
const SYSTEM_FILE: &str = "/etc/evenkeel/evenkeel.toml";

/// Where a configuration comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// The demo in the program.
    Demo,
}

impl Source {
    /// What `run` runs: the file that is named, in the environment, of the
    /// system, or the demo.
    pub fn of_run(named: Option<PathBuf>) -> Source {
        let from_environment = || std::env::var_os("EVENKEEL_CONFIG").map(PathBuf::from);
        let from_system = || Some(PathBuf::from(SYSTEM_FILE)).filter(|path| path.exists());
        named.or_else(from_environment).or_else(from_system).map_or(Source::Demo, Source::File)
    }

    /// What `check` and `config show` look at: what `run` would run.
    pub fn of_check(named: Option<PathBuf>) -> Source {
        Source::of_run(named)
    }

    /// Whether it is the embedded demo.
    pub fn is_demo(&self) -> bool {
        matches!(self, Source::Demo)
    }

    /// How it is called towards the operator.
    pub fn shown(&self) -> String {
        match self {
            Source::File(path) => path.display().to_string(),
            Source::Demo => format!("embedded demo ({DEMO_NAME})"),
        }
    }

    /// Its text and the name for messages.
    pub fn read(&self) -> Result<(String, String), Unreadable> {
        let path = match self {
            Source::Demo => return Ok((DEMO.to_string(), DEMO_NAME.to_string())),
            Source::File(path) => path,
        };
        match fs::read_to_string(path) {
            Ok(text) => Ok((text, path.display().to_string())),
            Err(error) => Err(Unreadable::new(path, &error)),
        }
    }

    /// The configuration; what is wrong with it is said.
    pub fn load(&self) -> Result<Loaded, ExitCode> {
        let (text, name) = self.read().map_err(|unreadable| {
            unreadable.tell();
            ExitCode::from(unreadable.exit_code)
        })?;
        config::load(&name, &text).map_err(|problems| {
            eprintln!("{problems}");
            ExitCode::from(EXIT_CONFIG)
        })
    }

    /// The same for a reload: what is wrong comes back as a text.
    pub fn load_quietly(&self) -> Result<Config, String> {
        let (text, name) = self.read().map_err(|unreadable| unreadable.to_string())?;
        config::load(&name, &text).map(|loaded| loaded.config).map_err(|problems| problems.to_string())
    }
}

/// A file that cannot be read.
#[derive(Debug)]
pub struct Unreadable {
    /// For programs; there is no place in it to point at but its beginning.
    pub problem: Problem,
    /// 77 or 78.
    pub exit_code: u8,
}

impl Unreadable {
    fn new(path: &Path, error: &io::Error) -> Unreadable {
        let (help, exit_code) = match error.kind() {
            ErrorKind::PermissionDenied => ("run this as a user who may read it", EXIT_PERMISSION),
            ErrorKind::NotFound => {
                ("is the path right? `evenkeel config show` prints one to begin with", EXIT_CONFIG)
            }
            ErrorKind::InvalidData => ("a configuration is TOML, which is text in UTF-8", EXIT_CONFIG),
            _ => ("name a file", EXIT_CONFIG),
        };
        let (file, message, help) = (path.display().to_string(), error.to_string(), help.into());
        Unreadable { problem: Problem { file, line: 1, column: 1, message, help }, exit_code }
    }

    /// To the operator.
    pub fn tell(&self) {
        eprintln!("evenkeel: {self}");
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Problem { file, message, help, .. } = &self.problem;
        write!(f, "{file}: {message}\n  {help}")
    }
}

/// The control socket of a daemon with this configuration.
pub fn configured_socket(config: &Config) -> PathBuf {
    config.daemon.control_socket.clone().unwrap_or_else(|| socket(None))
}

/// The control socket that a command reaches: what is named, what
/// `$EVENKEEL_SOCKET` says, or this user's default.
pub fn socket(named: Option<&Path>) -> PathBuf {
    let from_environment = || std::env::var_os("EVENKEEL_SOCKET").map(PathBuf::from);
    named.map(Path::to_path_buf).or_else(from_environment).unwrap_or_else(default_socket)
}

/// This user's default; in a unit, the folder that systemd made for it.
pub fn default_socket() -> PathBuf {
    let of_unit = std::env::var("RUNTIME_DIRECTORY").unwrap_or_default();
    // systemd.exec(5): several are joined by colons.
    if let Some(folder) = of_unit.split(':').next().filter(|folder| !folder.is_empty()) {
        return Path::new(folder).join("control.sock");
    }
    client::default_socket(accounts::current_uid(), std::env::var("XDG_RUNTIME_DIR").ok().as_deref())
}
