//! The check `command`: a program whose exit code says whether a server is up.
//!
//! It runs as the steward does, without privileges and without a way to any,
//! in a process group of its own. Where time runs out, or the check is not
//! wanted any more, the whole group is killed. Of what it prints the last
//! `MAX_OUTPUT` bytes are kept, and the last line is the reason that people
//! see.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use super::probe::{Failure, printable};
use crate::sys::process;
use crate::units::format_duration;

/// What is kept of the output.
const MAX_OUTPUT: usize = 4096;
/// How much of the last line is shown.
const MAX_REASON: usize = 200;
/// How long the output is waited for after the end: a grandchild may hold it
/// open.
const LAST_OUTPUT: Duration = Duration::from_millis(50);

/// Runs the program once.
pub async fn run(
    arguments: &[String],
    server: &str,
    upstream: &str,
    timeout: Duration,
) -> Result<(), Failure> {
    let (program, rest) = arguments.split_first().expect("a configuration without a command is refused");
    let mut command = Command::new(program);
    command.args(rest).env("EVENKEEL_SERVER", server).env("EVENKEEL_UPSTREAM", upstream);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.process_group(0);
    process::start_clean(command.as_std_mut());
    let mut group = Group { child: command.spawn().map_err(|error| Failure::System("cannot run", error))? };
    let (mut out, mut err) = (Tail::default(), Tail::default());
    let ended = {
        let (stdout, stderr) = (group.child.stdout.take(), group.child.stderr.take());
        let reading = async {
            tokio::join!(out.read(stdout), err.read(stderr));
        };
        tokio::pin!(reading);
        let ending = async {
            tokio::select! {
                status = group.child.wait() => (status, false),
                () = &mut reading => (group.child.wait().await, true),
            }
        };
        let ended = tokio::time::timeout(timeout, ending).await.ok();
        if let Some((_, false)) = ended {
            let _ = tokio::time::timeout(LAST_OUTPUT, &mut reading).await;
        }
        ended.map(|(status, _)| status)
    };
    let said = [&err, &out].into_iter().find_map(Tail::last_line);
    match ended {
        None => {
            group.kill().await;
            let late = format!("no end within {}, killed", format_duration(timeout));
            Err(Failure::Wrong(with_output(late, said)))
        }
        Some(Err(error)) => Err(Failure::System("cannot wait for the command", error)),
        Some(Ok(status)) if status.success() => Ok(()),
        Some(Ok(status)) => Err(Failure::Wrong(with_output(words(status), said))),
    }
}

fn words(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

fn with_output(what: String, said: Option<String>) -> String {
    match said {
        Some(line) => format!("{what}: {line}"),
        None => what,
    }
}

/// The program and what it started; killed with this value while it lives.
struct Group {
    child: Child,
}

impl Group {
    /// As long as the child was not waited for, its number is no other's.
    fn signal(&self) {
        if let Some(pid) = self.child.id() {
            let _ = killpg(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }

    async fn kill(&mut self) {
        self.signal();
        let _ = self.child.wait().await;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The runtime takes notice of its end.
        self.signal();
    }
}

/// The end of what was printed.
#[derive(Default)]
struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    async fn read(&mut self, stream: Option<impl AsyncRead + Unpin>) {
        let Some(mut stream) = stream else { return };
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut chunk).await {
            self.bytes.extend_from_slice(&chunk[..count]);
            let excess = self.bytes.len().saturating_sub(MAX_OUTPUT);
            self.bytes.drain(..excess);
        }
    }

    fn last_line(&self) -> Option<String> {
        let lines = self.bytes.split(|&byte| byte == b'\n').rev();
        let mut lines = lines.map(|line| line.trim_ascii()).filter(|line| !line.is_empty());
        lines.next().map(|line| printable(line, MAX_REASON))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, timeout: Duration) -> Result<(), String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let arguments = ["/bin/sh", "-c", script].map(String::from);
        let result = runtime.block_on(run(&arguments, "10.0.0.1:80", "web", timeout));
        result.map_err(|failure| match failure {
            Failure::Wrong(reason) => reason,
            Failure::System(what, error) => format!("{what}: {error}"),
        })
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_exit_code_decides_and_the_last_line_is_the_reason() {
        assert_eq!(sh("test $EVENKEEL_SERVER = 10.0.0.1:80 -a $EVENKEEL_UPSTREAM = web", LONG), Ok(()));
        let failed = sh("echo first; echo the disk is full; exit 3", LONG);
        assert_eq!(failed, Err("exit code 3: the disk is full".into()));
        assert_eq!(sh("kill -9 $$", LONG), Err("killed by signal 9".into()));
        let endless = sh("yes | head -c 10000000; echo; echo end; exit 1", LONG);
        assert_eq!(endless, Err("exit code 1: end".into()));
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_all_that_it_started() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; echo waiting; wait", file.display());
        let killed = sh(&script, Duration::from_millis(500));
        assert_eq!(killed, Err("no end within 500ms, killed: waiting".into()));
        let pid = std::fs::read_to_string(&file).expect("it began").trim().to_string();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let runs = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z"))
        };
        while runs() {
            assert!(std::time::Instant::now() < deadline, "its child lives");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_grandchild_that_holds_the_output_is_not_waited_for() {
        let begin = std::time::Instant::now();
        assert_eq!(sh("sleep 20 & exit 0", LONG), Ok(()));
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_program_starts_without_the_stewards_deafness_to_signals() {
        crate::sys::signals::ignore(&[Signal::SIGUSR2]).expect("allowed");
        assert_eq!(sh("kill -USR2 $$; exit 0", LONG), Err("killed by signal 12".into()));
    }
}
