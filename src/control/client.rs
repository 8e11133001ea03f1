//! Asking a running daemon: one JSON object a line over its control socket.
//!
//! ```text
//! -> {"command":"status"}
//! <- {"status":{...}}      or  {"error":"what is wrong"}
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

/// The longest answer that is read.
const MAX_ANSWER: u64 = 64 << 20;
/// How often a question is asked again whose answer did not come.
const ASK_AGAIN: usize = 10;
/// And how long after: a process that ends is gone by then, nearly always.
const PAUSE: Duration = Duration::from_millis(20);

/// The control socket where none is named: `/run` for root, the user's own
/// run-time directory for others.
pub fn default_socket(uid: u32, runtime_dir: Option<&str>) -> PathBuf {
    if uid == 0 {
        return PathBuf::from("/run/evenkeel/control.sock");
    }
    match runtime_dir.filter(|dir| dir.starts_with('/')) {
        Some(dir) => Path::new(dir).join("evenkeel/control.sock"),
        None => PathBuf::from(format!("/tmp/evenkeel-{uid}/control.sock")),
    }
}

/// Sends one command and waits for its answer, at most so long.
///
/// Errors are texts for the operator: no daemon, no permission, no answer, or
/// what the daemon answered under `error`.
pub fn ask(socket: &Path, command: &Value, wait: Duration) -> Result<Value, String> {
    let shown = socket.display();
    let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            format!("no daemon answers: {shown} does not exist\n  start one with `evenkeel run`, or name its socket with --socket")
        }
        io::ErrorKind::ConnectionRefused if !is_socket(socket) => {
            format!("{shown} is not a socket\n  name the daemon's control socket with --socket")
        }
        io::ErrorKind::ConnectionRefused => {
            format!("no daemon answers at {shown}: it has ended\n  start one with `evenkeel run`, or name its socket with --socket")
        }
        io::ErrorKind::PermissionDenied => {
            format!("{shown}: permission denied\n  only the daemon's user and group may ask it: use sudo, or join its group")
        }
        _ => format!("{shown}: {error}"),
    })?;
    let mut answer = exchange(&stream, command, wait);
    // The steward that took the connection was just being replaced: its
    // successor has the same socket. Only what changes nothing is asked twice.
    let is_question = command.get("command").and_then(Value::as_str) == Some("status");
    for _ in 0..ASK_AGAIN {
        if !is_question || !answer.as_ref().is_err_and(was_cut) {
            break;
        }
        std::thread::sleep(PAUSE);
        answer = UnixStream::connect(socket).and_then(|stream| exchange(&stream, command, wait));
    }
    let answer = answer.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("the daemon at {shown} gave no answer within {} s", wait.as_secs())
        }
        _ => format!("{shown}: {error}"),
    })?;
    match answer.get("error").and_then(Value::as_str) {
        Some(text) => Err(text.to_string()),
        None => Ok(answer),
    }
}

/// Whether a permission is what is missing to use this socket.
pub fn is_forbidden(socket: &Path) -> bool {
    UnixStream::connect(socket).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

/// The other side went away before it had answered.
fn was_cut(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn exchange(mut stream: &UnixStream, command: &Value, wait: Duration) -> io::Result<Value> {
    stream.set_read_timeout(Some(wait))?;
    stream.set_write_timeout(Some(wait))?;
    let mut line = serde_json::to_vec(command)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    BufReader::new(stream.take(MAX_ANSWER)).read_until(b'\n', &mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the daemon closed the connection"));
    }
    Ok(serde_json::from_slice(&answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_socket_belongs_to_the_user() {
        assert_eq!(default_socket(0, Some("/run/user/0")), Path::new("/run/evenkeel/control.sock"));
        let own = Path::new("/run/user/1000/evenkeel/control.sock");
        assert_eq!(default_socket(1000, Some("/run/user/1000")), own);
        assert_eq!(default_socket(1000, None), Path::new("/tmp/evenkeel-1000/control.sock"));
    }

    #[test]
    fn no_daemon_is_said_with_a_way_out() {
        let error = ask(Path::new("/nonexistent/x.sock"), &Value::Null, Duration::from_secs(1)).unwrap_err();
        assert!(error.starts_with("no daemon answers: /nonexistent/x.sock does not exist\n"), "{error}");
        let error = ask(Path::new("/proc/version"), &Value::Null, Duration::from_secs(1)).unwrap_err();
        assert!(error.starts_with("/proc/version is not a socket\n"), "{error}");
    }
}
