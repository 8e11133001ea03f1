//! Every command with its options, as clap reads them.

use std::path::PathBuf;

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
    /// limit.
    Run {
        /// The configuration file
        #[arg(short, long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
    /// Check a configuration file; binds nothing
    Check {
        /// The configuration file
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
        /// The daemon's control socket
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Leave gracefully: take nothing new, finish what is here
    Drain {
        /// The daemon's control socket
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// Leave at once
    Stop {
        /// The daemon's control socket
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
    },
    /// Make load, check every byte that comes back, and judge the spread
    Bench(Box<crate::loadgen::Args>),
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
    /// The steward process; started by `run` alone
    #[command(hide = true)]
    Steward,
}

/// The commands of `evenkeel config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the effective configuration as TOML, each line with its origin
    Show {
        /// The configuration file
        #[arg(short, long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
}
