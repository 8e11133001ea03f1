//! The check `http`: one request, and the status of its answer.
//!
//! HTTP/1.1 by hand: a request line, three headers, and of the answer the
//! status line alone, after interim answers (1xx). The rest is read and
//! dropped within `MAX_ANSWER`, in a task of its own, so that a server is not
//! reset while it still writes; it ends with `LINGER`.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::dial::Stream;
use super::probe::{Failure, MAX_ANSWER, printable};
use crate::config::StatusRange;

/// How long the rest of an answer is taken.
const LINGER: Duration = Duration::from_secs(1);

/// The bytes of a request.
pub fn request(method: &str, path: &str, host: &str) -> Vec<u8> {
    let agent = concat!("evenkeel/", env!("CARGO_PKG_VERSION"));
    format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {agent} (health check)\r\nAccept: */*\r\nConnection: close\r\n\r\n")
        .into_bytes()
}

/// Asks and judges the answer.
pub async fn ask(mut stream: Stream, request: &[u8], expected: &[StatusRange]) -> Result<(), Failure> {
    stream.write_all(request).await.map_err(|error| Failure::System("send", error))?;
    let mut answer = Vec::new();
    let status = loop {
        match status_of(&answer) {
            Status::Is(code) => break code,
            Status::Not => {
                let begin = printable(answer.split(|&b| b == b'\n').next().unwrap_or_default(), 60);
                return Err(Failure::Wrong(format!("the answer is not HTTP: \"{begin}\"")));
            }
            Status::More if answer.len() >= MAX_ANSWER => {
                return Err(Failure::Wrong(format!("no status within {MAX_ANSWER} bytes")));
            }
            Status::More => {}
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk).await {
            Ok(0) if answer.is_empty() => return Err(Failure::Wrong("closed without an answer".into())),
            Ok(0) => return Err(Failure::Wrong("closed before the status was complete".into())),
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
            Err(error) => return Err(Failure::System("receive", error)),
        }
    };
    let left = MAX_ANSWER.saturating_sub(answer.len());
    tokio::task::spawn_local(tokio::time::timeout(LINGER, take_rest(stream, left)));
    if expected.iter().any(|range| range.contains(status)) {
        return Ok(());
    }
    Err(Failure::Wrong(format!("status {status}, not {}", ranges(expected))))
}

async fn take_rest(mut stream: Stream, mut left: usize) {
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut chunk).await {
        left = left.saturating_sub(count);
        if left == 0 {
            return;
        }
    }
}

fn ranges(expected: &[StatusRange]) -> String {
    let words = expected.iter().map(|range| match (range.first, range.last) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    });
    words.collect::<Vec<_>>().join(", ")
}

/// What the first bytes of an answer say.
#[derive(Debug, PartialEq, Eq)]
enum Status {
    Is(u16),
    Not,
    More,
}

/// The status of the first answer that is not an interim one.
fn status_of(mut bytes: &[u8]) -> Status {
    loop {
        let end = bytes.iter().position(|&byte| byte == b'\n');
        let line = &bytes[..end.unwrap_or(bytes.len())];
        let known = line.len().min(7);
        if !b"HTTP/1."[..known].eq_ignore_ascii_case(&line[..known]) {
            return Status::Not;
        }
        if end.is_none() {
            return if line.len() > 1024 { Status::Not } else { Status::More };
        }
        let Some(code) = code_of(line) else { return Status::Not };
        if !(100..200).contains(&code) {
            return Status::Is(code);
        }
        // An interim answer ends with an empty line.
        let Some(next) = head_length(bytes) else { return Status::More };
        bytes = &bytes[next..];
    }
}

fn code_of(line: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(line).ok()?;
    let code = text.split_ascii_whitespace().nth(1)?;
    (code.len() == 3).then(|| code.parse().ok()).flatten().filter(|code| *code >= 100)
}

/// Up to and with the empty line.
fn head_length(bytes: &[u8]) -> Option<usize> {
    let ends = [&b"\r\n\r\n"[..], b"\n\n"];
    let found = ends.iter().filter_map(|end| {
        bytes.windows(end.len()).position(|window| window == *end).map(|at| at + end.len())
    });
    found.min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_status_is_that_of_the_first_final_answer() {
        let cases: &[(&[u8], Status)] = &[
            (b"", Status::More),
            (b"HTTP/1.1 20", Status::More),
            (b"HTTP/1.1 200 OK\r\n", Status::Is(200)),
            (b"http/1.0 503\n", Status::Is(503)),
            (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 404 Not Found\r\n", Status::Is(404)),
            (b"HTTP/1.1 100 Continue\r\n\r", Status::More),
            (b"SSH-2.0-OpenSSH\r\n", Status::Not),
            (b"HTTP/1.1 OK\r\n", Status::Not),
            (b"HTTP/1.1 042 x\r\n", Status::Not),
            (b"HTTP/2 200\r\n", Status::Not),
        ];
        for (bytes, expected) in cases {
            assert_eq!(status_of(bytes), *expected, "{}", String::from_utf8_lossy(bytes));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), cut: bool) {
            let mut answer = if cut { b"HTTP/1.1 100 C\r\n".to_vec() } else { Vec::new() };
            answer.extend(bytes);
            status_of(&answer);
        }

        /// However an answer is split, the same comes of it.
        #[test]
        fn a_split_answer_is_only_incomplete(at in 0usize..60) {
            let whole = b"HTTP/1.1 102 P\r\nA: b\r\n\r\nHTTP/1.1 204 No Content\r\nA: b\r\n\r\n";
            let status = status_of(&whole[..at.min(whole.len())]);
            prop_assert!(matches!(status, Status::More | Status::Is(204)), "{status:?}");
        }
    }
}
