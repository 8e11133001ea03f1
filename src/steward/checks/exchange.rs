//! The check `exchange`: bytes are sent, and others have to come back.
//!
//! Over a stream the expected bytes may come in any number of pieces, within
//! `MAX_ANSWER`; of datagrams one has to hold all of them.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::dial::{Place, Stream};
use super::probe::{Failure, MAX_ANSWER, printable};

/// Over TCP or a Unix socket.
pub async fn over_stream(mut stream: Stream, send: &[u8], expect: &[u8]) -> Result<(), Failure> {
    stream.write_all(send).await.map_err(|error| Failure::System("send", error))?;
    let mut answer = Vec::new();
    loop {
        if occurs(expect, &answer) {
            return Ok(());
        }
        if answer.len() >= MAX_ANSWER {
            let wanted = printable(expect, 60);
            return Err(Failure::Wrong(format!("\"{wanted}\" is not in the first {MAX_ANSWER} bytes")));
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk).await {
            Ok(0) if answer.is_empty() => return Err(Failure::Wrong("closed without an answer".into())),
            Ok(0) => return Err(unexpected(&answer, expect)),
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
            Err(error) => return Err(Failure::System("receive", error)),
        }
    }
}

/// By a datagram from a port of its own, so that a late answer to an earlier
/// check is not taken for one to this.
pub async fn over_datagrams(place: &Place, send: &[u8], expect: &[u8]) -> Result<(), Failure> {
    let socket = place.datagrams().await?;
    let datagram = [place.header(), send].concat();
    socket.send(&datagram).await.map_err(|error| Failure::System("send", error))?;
    let mut answer = vec![0; MAX_ANSWER];
    let count = socket.recv(&mut answer).await.map_err(|error| Failure::System("receive", error))?;
    if occurs(expect, &answer[..count]) { Ok(()) } else { Err(unexpected(&answer[..count], expect)) }
}

fn occurs(expect: &[u8], answer: &[u8]) -> bool {
    expect.is_empty() || answer.windows(expect.len()).any(|window| window == expect)
}

fn unexpected(answer: &[u8], expect: &[u8]) -> Failure {
    let (got, wanted) = (printable(answer, 60), printable(expect, 60));
    Failure::Wrong(format!("\"{wanted}\" is not in the answer \"{got}\""))
}
