//! The command line: what was typed, and which process it starts.
//!
//! One definition yields parsing, help, completions and the man page. Exit
//! codes: 0 done, 1 failed at run time, 2 usage, 69 an address could not be
//! bound, 77 a permission is missing, 78 the configuration is wrong.

mod arguments;
mod ask;
mod files;
mod out;
mod sessions;
mod status;
mod top;

use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};

use crate::control::misbehave;
use crate::supervisor::{self, Refusal, Start};
use crate::sys::accounts;
use crate::sys::holders::Protocol;
use crate::{config, doctor, loadgen, steward, worker};
use arguments::{Cli, Command, ConfigCommand};
use files::Source;

/// Exit code: a permission is missing.
const EXIT_PERMISSION: u8 = 77;
/// Exit code: the configuration is wrong.
const EXIT_CONFIG: u8 = 78;

/// How long `check` waits for names.
const RESOLVE_LIMIT: Duration = Duration::from_secs(5);

/// Runs the command that was typed and returns its exit code.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run { config } => run(&Source::of_run(config)),
        Command::Check { config, json } => check(&Source::of_check(config), json),
        Command::Config { command: ConfigCommand::Show { config } } => show(&Source::of_check(config)),
        Command::Status { socket, json } => status::run(&files::socket(socket.as_deref()), json),
        Command::Top { socket, interval } => top::run(&files::socket(socket.as_deref()), interval),
        Command::Reload { socket, dry_run } => {
            let request = serde_json::json!({"command": "reload", "dry_run": dry_run});
            ask::simple(&files::socket(socket.as_deref()), &request)
        }
        Command::Scale { workers, socket } => {
            let request = serde_json::json!({"command": "scale", "workers": workers});
            ask::simple(&files::socket(socket.as_deref()), &request)
        }
        Command::Upgrade { socket } => ask::command(&files::socket(socket.as_deref()), "upgrade"),
        Command::NoteJob { socket } => match supervisor::pending_job() {
            Some(job) => {
                let request = serde_json::json!({"command": "note_job", "job": job});
                ask::simple(&files::socket(socket.as_deref()), &request)
            }
            None => ExitCode::SUCCESS,
        },
        Command::UpgradeProbe { config } => upgrade_probe(&Source::of_run(config)),
        Command::Rebalance { socket } => ask::command(&files::socket(socket.as_deref()), "rebalance"),
        Command::Server { command } => {
            let (name, weight, socket) = command.parts();
            let server = command.target();
            let request =
                serde_json::json!({"command": "server", "change": name, "server": server, "weight": weight});
            ask::simple(&files::socket(socket), &request)
        }
        Command::Sessions(args) => {
            let socket = files::socket(args.socket.as_deref());
            sessions::run(*args, &socket)
        }
        Command::Drain { socket } => ask::command(&files::socket(socket.as_deref()), "drain"),
        Command::Stop { socket } => ask::command(&files::socket(socket.as_deref()), "stop"),
        Command::Doctor { address, udp, matrix, json, config } => {
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let question = match address {
                _ if matrix => doctor::Question::Matrix,
                Some(address) => doctor::Question::Address { address, protocol },
                None => doctor::Question::Host,
            };
            diagnose(&doctor::Command { question, json }, config)
        }
        Command::Bench(args) => loadgen::run(&args),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "evenkeel", &mut text);
            out::bytes(&text);
            ExitCode::SUCCESS
        }
        Command::Man => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut text).expect("memory takes every byte");
            out::bytes(&text);
            ExitCode::SUCCESS
        }
        Command::Worker { .. } => worker::main(),
        Command::Steward => steward::main(),
    }
}

/// What an upgrade asks of the program that it is about to run.
fn upgrade_probe(source: &Source) -> ExitCode {
    match source.load_quietly() {
        Ok(_) if misbehave::is_told("check") => {
            eprintln!("told to by a test");
            ExitCode::from(EXIT_CONFIG)
        }
        Ok(config) => {
            println!("{}", serde_json::to_string(&supervisor::probe(&config)).expect("plain data"));
            ExitCode::SUCCESS
        }
        Err(problems) => {
            eprintln!("{problems}");
            ExitCode::from(EXIT_CONFIG)
        }
    }
}

fn config_file(source: &Source) -> supervisor::File {
    let again = source.clone();
    let path = match source {
        Source::File(path) => Some(path.clone()),
        Source::Demo => None,
    };
    supervisor::File { path, read_again: Box::new(move || again.load_quietly()) }
}

fn run(source: &Source) -> ExitCode {
    // In place of an image that ran before: the file is its own to judge.
    if let Some(left) = supervisor::left() {
        return exit(supervisor::resume(left, config_file(source)));
    }
    let loaded = match source.load() {
        Ok(loaded) => loaded,
        Err(code) => return code,
    };
    let shown = source.shown();
    eprintln!("evenkeel: configuration: {shown}");
    warn_of(&loaded.warnings);
    let control_socket = files::configured_socket(&loaded.config);
    let greeting = source.is_demo().then(|| greeting(&loaded.config, &control_socket));
    let start = Start {
        config: loaded.config,
        config_path: shown,
        control_socket,
        greeting,
        file: config_file(source),
    };
    exit(supervisor::run(start))
}

fn exit(result: Result<ExitCode, Refusal>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(Refusal { text, advice, exit_code }) => {
            eprintln!("evenkeel: {text}");
            for line in advice.lines() {
                eprintln!("  {line}");
            }
            ExitCode::from(exit_code)
        }
    }
}

/// What a newcomer tries next.
fn greeting(config: &config::Config, socket: &std::path::Path) -> String {
    let mut text = String::from("evenkeel: serving the embedded demo\n");
    for listener in &config.listeners {
        let addresses: Vec<String> = listener.bind.iter().map(ToString::to_string).collect();
        text += &format!(
            "  {:<10} {} on {}\n",
            listener.name,
            config::Word::word(listener.mode),
            addresses.join(", ")
        );
    }
    let first = config.listeners[0].bind[0];
    let option = if std::env::var_os("EVENKEEL_SOCKET").is_some() || *socket == files::default_socket() {
        String::new()
    } else {
        format!(" --socket {}", socket.display())
    };
    text += &format!(
        "try next, in another terminal:\n  curl -s --max-time 1 telnet://{first} </dev/null    # who answered?\n  evenkeel status{option}\n\
         then write your own: evenkeel config show > my.toml, and evenkeel run -c my.toml\n"
    );
    text
}

fn check(source: &Source, json: bool) -> ExitCode {
    let (text, name) = match source.read() {
        Ok(read) => read,
        Err(unreadable) => {
            if json {
                let errors = [&unreadable.problem];
                out::line(&format!(
                    "{:#}",
                    serde_json::json!({"ok": false, "errors": errors, "warnings": []})
                ));
            } else {
                unreadable.tell();
            }
            return ExitCode::from(unreadable.exit_code);
        }
    };
    match config::load(&name, &text) {
        Ok(mut loaded) if json => {
            ask_host(&mut loaded, &name);
            let summary = config::summary(&loaded.config);
            let all = serde_json::json!({"ok": true, "errors": [], "warnings": loaded.warnings, "summary": summary});
            out::line(&format!("{all:#}"));
            ExitCode::SUCCESS
        }
        Ok(mut loaded) => {
            ask_host(&mut loaded, &name);
            warn_of(&loaded.warnings);
            out::line(&config::summary(&loaded.config).to_string());
            ExitCode::SUCCESS
        }
        Err(problems) if json => {
            out::line(&format!("{:#}", serde_json::json!({"ok": false, "errors": problems, "warnings": []})));
            ExitCode::from(EXIT_CONFIG)
        }
        Err(problems) => {
            eprintln!("{problems}");
            ExitCode::from(EXIT_CONFIG)
        }
    }
}

/// Warns of what only this host can tell, which may not be the daemon's: names
/// that do not resolve, and a user or a group that does not exist.
fn ask_host(loaded: &mut config::Loaded, file: &str) {
    let addresses: Vec<_> = loaded.names.iter().map(|named| named.address.clone()).collect();
    let missing = steward::names::unresolved(&addresses, RESOLVE_LIMIT);
    let unresolved = missing.iter().map(|(number, reason)| loaded.names[*number].unresolved(reason));
    let daemon = &loaded.config.daemon;
    let accounts = [("user", daemon.user.as_deref(), None), ("group", None, daemon.group.as_deref())];
    let unknown = accounts.into_iter().filter_map(|(key, user, group)| {
        let message = accounts::lookup(user, group).err()?;
        let help =
            format!("evenkeel run refuses it: create it (useradd --system), or correct {key} in [daemon]");
        let line = loaded.line_of("[daemon]", key).unwrap_or(1);
        Some(config::Problem { file: file.to_string(), line, column: 1, message, help })
    });
    let warnings = unresolved.chain(unknown).collect();
    loaded.warn(warnings);
}

fn show(source: &Source) -> ExitCode {
    match source.load() {
        Ok(loaded) => {
            out::write(&config::show(&loaded, &source.shown()));
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}

/// `evenkeel doctor`; the limits are judged for the configuration that `run`
/// would run.
fn diagnose(command: &doctor::Command, named: Option<std::path::PathBuf>) -> ExitCode {
    let loaded = match command.question {
        doctor::Question::Host => match Source::of_run(named).load() {
            Ok(loaded) => Some(loaded.config),
            Err(code) => return code,
        },
        doctor::Question::Address { .. } | doctor::Question::Matrix => None,
    };
    let outcome = doctor::run(command, loaded.as_ref());
    if matches!(outcome.exit_code, 1 | 2) {
        eprint!("{}", outcome.text);
    } else {
        out::write(&outcome.text);
    }
    ExitCode::from(outcome.exit_code)
}

fn warn_of(warnings: &config::Problems) {
    for warning in &warnings.0 {
        eprintln!("warning: {warning}");
    }
}
