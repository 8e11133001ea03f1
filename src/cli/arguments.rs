//! Every command with its options, as clap reads them.

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use clap_complete::Shell;

/// A layer-4 load balancer: workers that share their ports by SO_REUSEPORT.
#[derive(Debug, Parser)]
#[command(name = "evenkeel", version, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed at run time, 2 usage, 69 an address could not be bound, \
                        77 a permission is missing, 78 the configuration is wrong."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon in the foreground
    ///
    /// Without -c: $EVENKEEL_CONFIG, else /etc/evenkeel/evenkeel.toml if it
    /// exists, else the embedded demo. Signals: TERM and INT leave gracefully
    /// within drain_timeout (a second one: at once, exit 1), QUIT without a
    /// limit, HUP reloads, USR1 opens the access log anew, USR2 upgrades.
    Run {
        /// The configuration file
        #[arg(short, long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
    /// Check a configuration file; binds nothing
    Check {
        /// The configuration file [default: as of `run`]
        #[arg(short, long, value_name = "PATH")]
        config: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the configuration
    Config {
        /// What to do with it.
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Show what runs: workers, listeners, upstreams, spread
    Status {
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what runs, live in the terminal
    Top {
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// From one look to the next: "250ms", "1s", "5s"
        #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
        interval: std::time::Duration,
    },
    /// Bring the configuration file into force; waits until it serves
    ///
    /// On any error in the file the old configuration goes on, nothing is
    /// touched, and the errors are printed. Every worker is replaced, one by
    /// one; sessions are handed over and go on.
    Reload {
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Only say what would change, and what it would cost
        #[arg(long)]
        dry_run: bool,
    },
    /// Change the number of workers, live, losing nothing
    Scale {
        /// How many workers, 1 to 64
        #[arg(value_parser = |text: &str| number(text, 1..=64))]
        workers: u64,
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// Replace the running program by the file now at its path
    ///
    /// The new program checks the configuration and shows that a worker of it
    /// comes up; then it takes everything over, in the same process, and the
    /// workers hand over to new ones. Waits until it serves. Where it is
    /// refused, nothing has changed.
    Upgrade {
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// Move established sessions between workers until all have as many
    Rebalance {
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// Change one server at run time
    ///
    /// Named as UPSTREAM/ADDRESS, the address as the file has it. It holds over
    /// reloads and upgrades until `ready`; `status` shows what differs from the
    /// file.
    Server {
        /// What to do with it.
        #[command(subcommand)]
        command: ServerCommand,
    },
    /// List the sessions, or end some of them
    Sessions(Box<super::sessions::Args>),
    /// Leave gracefully: take nothing new, finish what is here
    Drain {
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// Leave at once
    Stop {
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// Make load, check every byte that comes back, and judge the spread
    Bench(Box<crate::loadgen::Args>),
    /// Who holds an address, the limits of this host, the rules of binding
    ///
    /// With ADDRESS: would a bind work (exit 0, else 69 or 77), and if not, who
    /// holds it and what to do. Without: the limits of this host for the
    /// configuration that `run` would run, each with the line that sets it.
    Doctor {
        /// 127.0.0.1:8080, [::]:80, :8080 or 8080
        #[arg(conflicts_with = "matrix")]
        address: Option<String>,
        /// ADDRESS is a UDP address
        #[arg(long, requires = "address")]
        udp: bool,
        /// The SO_REUSEADDR and SO_REUSEPORT rules as this kernel applies them
        #[arg(long)]
        matrix: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The configuration file [default: as of `run`]
        #[arg(short, long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
    /// Print a shell's completions
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page
    Man,
    /// A worker process; started by `run` alone
    #[command(hide = true)]
    Worker {
        /// The slot, to be seen in ps
        slot: usize,
    },
    /// Tell the daemon what systemd is about to do; for ExecStop= of the unit
    #[command(hide = true)]
    NoteJob {
        /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// What an upgrade asks of the new program; started by `run` alone
    #[command(hide = true)]
    UpgradeProbe {
        /// The configuration file [default: as of `run`]
        #[arg(short, long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
    /// The steward process; started by `run` alone
    #[command(hide = true)]
    Steward,
}

/// The commands of `evenkeel server`.
#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Nothing new goes there; what is there stays
    Drain(ServerTarget),
    /// As the file has it again, state and weight
    Ready(ServerTarget),
    /// Nothing new goes there, and it is not checked
    Disable(ServerTarget),
    /// Give it another weight than the file does
    Weight {
        /// Its weight, 0 to 256
        #[arg(value_parser = |text: &str| number(text, 0..=256))]
        weight: u64,
        #[command(flatten)]
        target: ServerTarget,
    },
}

/// Which server, and whom to ask.
#[derive(Debug, clap::Args)]
pub struct ServerTarget {
    /// UPSTREAM/ADDRESS, the address as the file has it
    #[arg(value_name = "UPSTREAM/ADDRESS", value_parser = server)]
    server: String,
    /// The daemon's control socket [default: $EVENKEEL_SOCKET, or else as `run` without control_socket]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl ServerCommand {
    /// Its word, its weight, and the socket that was named.
    pub fn parts(&self) -> (&'static str, Option<u64>, Option<&Path>) {
        let (name, weight, target) = match self {
            ServerCommand::Drain(target) => ("drain", None, target),
            ServerCommand::Ready(target) => ("ready", None, target),
            ServerCommand::Disable(target) => ("disable", None, target),
            ServerCommand::Weight { weight, target } => ("weight", Some(*weight), target),
        };
        (name, weight, target.socket.as_deref())
    }

    /// UPSTREAM/ADDRESS.
    pub fn target(&self) -> &str {
        match self {
            ServerCommand::Drain(target) | ServerCommand::Ready(target) | ServerCommand::Disable(target) => {
                &target.server
            }
            ServerCommand::Weight { target, .. } => &target.server,
        }
    }
}

/// The commands of `evenkeel config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the effective configuration as TOML, each line with its origin
    Show {
        /// The configuration file [default: as of `run`]
        #[arg(short, long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
}

fn number(text: &str, allowed: std::ops::RangeInclusive<u64>) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| allowed.contains(number));
    number.ok_or_else(|| format!("write a number from {} to {}", allowed.start(), allowed.end()))
}

fn server(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        Some((upstream, address)) if !upstream.is_empty() && !address.is_empty() => Ok(text.to_string()),
        _ => {
            Err("write the upstream, a slash and the address as the file has it, like web/10.0.0.1:80".into())
        }
    }
}

/// From a tenth of a second to an hour.
fn interval(text: &str) -> Result<std::time::Duration, String> {
    let allowed = std::time::Duration::from_millis(100)..=std::time::Duration::from_secs(3600);
    match crate::units::parse_duration(text) {
        Ok(interval) if allowed.contains(&interval) => Ok(interval),
        Ok(_) => Err("write \"100ms\" to \"1h\"".into()),
        Err(_) => Err("write a number with its unit, like \"500ms\" or \"2s\"".into()),
    }
}
