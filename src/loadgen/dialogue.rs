//! What is said to a target that does not simply echo, and what counts as its
//! answer.
//!
//! Pure. `Script` is one for the whole run; a `Listening` follows one answer
//! on one connection and holds a few bytes at most.

use super::args::Payload;

/// The longest head of an HTTP answer that is read.
const LONGEST_HEAD: usize = 64 * 1024;
/// The longest that is remembered, for each connection.
const LONGEST_KNOWN: usize = 1024;

/// What is sent and what is expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Script {
    /// Noise, to be echoed.
    Echo,
    /// A GET, answered by HTTP/1.1.
    Http(Vec<u8>),
    /// A DNS query; the first two bytes are replaced by its number.
    Dns(Vec<u8>),
    /// These bytes; any answer will do.
    Any(Vec<u8>),
    /// These bytes; an answer is complete once it has the others in it.
    Containing(Vec<u8>, Vec<u8>),
}

impl Script {
    /// The bytes of one message, where they are always the same.
    pub fn message(&self) -> &[u8] {
        match self {
            Script::Echo => &[],
            Script::Http(text) | Script::Dns(text) | Script::Any(text) | Script::Containing(text, _) => text,
        }
    }
}

/// A GET for this path. `last` asks the server to close.
pub fn http_get(host: &str, path: &str, last: bool) -> Vec<u8> {
    let connection = if last { "Connection: close\r\n" } else { "" };
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: evenkeel-bench\r\n{connection}\r\n")
        .into_bytes()
}

/// A query for the A record of a name.
pub fn dns_query(name: &str) -> Result<Vec<u8>, String> {
    // Number (filled in later), recursion desired, one question.
    let mut out = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err(format!("{name:?} is not a domain name: labels have 1 to 63 bytes"));
        }
        out.push(label.len() as u8);
        out.extend_from_slice(label.as_bytes());
    }
    // The root, type A, class IN.
    out.extend_from_slice(&[0, 0, 1, 0, 1]);
    if out.len() > 12 + 255 + 4 {
        return Err(format!("{name:?} is longer than a domain name may be"));
    }
    Ok(out)
}

/// Chooses the script.
pub fn script(
    payload: Payload,
    host: &str,
    path: &str,
    query: &str,
    last: bool,
    send: Option<Vec<u8>>,
    expect: Option<Vec<u8>>,
) -> Result<Script, String> {
    match (payload, send, expect) {
        (Payload::Http, None, None) => Ok(Script::Http(http_get(host, path, last))),
        (Payload::Dns, None, None) => dns_query(query).map(Script::Dns),
        (Payload::Pattern, None, None) => Ok(Script::Echo),
        (Payload::Pattern, send, None) => Ok(Script::Any(send.unwrap_or_default())),
        (Payload::Pattern, send, Some(expect)) if expect == b"any" => {
            Ok(Script::Any(send.unwrap_or_else(|| b"\r\n".to_vec())))
        }
        (Payload::Pattern, _, Some(expect)) if expect.is_empty() => {
            Err("--expect needs at least one byte to look for".into())
        }
        (Payload::Pattern, send, Some(expect)) => {
            Ok(Script::Containing(send.unwrap_or_else(|| b"\r\n".to_vec()), expect))
        }
        (Payload::Http | Payload::Dns, _, _) => {
            Err("--send and --expect are instead of --payload, not with it".into())
        }
    }
}

/// How far an answer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Not complete.
    More,
    /// Complete; the connection may be used again or not.
    Done {
        /// Whether the server keeps the connection open.
        keep: bool,
    },
    /// Complete, but it reports an error; the text is for a person.
    Error(u16),
    /// Not an answer at all.
    Wrong,
}

/// Follows one answer after the other on one TCP connection.
#[derive(Debug, Default)]
pub struct Listening {
    head: Vec<u8>,
    body: Option<Body>,
    any: bool,
    /// The last answer's head and what it meant: servers say the same again
    /// and again, and comparing is cheaper than reading.
    known: Option<Box<Known>>,
}

#[derive(Debug)]
struct Known {
    head: Vec<u8>,
    body: Body,
}

#[derive(Clone, Copy, Debug)]
struct Body {
    status: u16,
    keep: bool,
    length: Length,
}

#[derive(Clone, Copy, Debug)]
enum Length {
    Left(u64),
    Chunked(Chunk),
    UntilEnd,
}

/// Where in a chunked body we are.
#[derive(Clone, Copy, Debug)]
enum Chunk {
    /// In a size line; digits so far.
    Size(u64),
    /// Behind the digits of a size line.
    Rest(u64),
    /// In the data and the line end behind it.
    Data(u64),
    /// In the trailer: bytes of the current line.
    Trailer(u64),
}

impl Listening {
    /// Whether part of an answer was heard.
    pub fn has_begun(&self) -> bool {
        self.any
    }

    /// Takes bytes; returns how many belong to this answer and how far it is.
    pub fn feed(&mut self, script: &Script, bytes: &[u8]) -> (usize, Heard) {
        self.any |= !bytes.is_empty();
        let (used, heard) = match script {
            Script::Http(_) => self.feed_http(bytes),
            Script::Any(_) => (bytes.len(), Heard::Done { keep: true }),
            Script::Containing(_, wanted) => self.feed_until(wanted, bytes),
            // Echoes are compared, datagrams are whole: neither comes here.
            Script::Echo | Script::Dns(_) => (bytes.len(), Heard::Wrong),
        };
        if heard != Heard::More {
            self.head.clear();
            (self.body, self.any) = (None, false);
        }
        (used, heard)
    }

    /// The server closed: does that complete the answer?
    pub fn handle_end(&mut self) -> Heard {
        match self.body {
            Some(Body { length: Length::UntilEnd, status, .. }) => finished(status, false),
            _ => Heard::More,
        }
    }

    fn feed_until(&mut self, wanted: &[u8], bytes: &[u8]) -> (usize, Heard) {
        self.head.extend_from_slice(bytes);
        if contains(&self.head, wanted) {
            return (bytes.len(), Heard::Done { keep: true });
        }
        let spare = self.head.len().saturating_sub(wanted.len() - 1);
        self.head.drain(..spare);
        (bytes.len(), Heard::More)
    }

    fn feed_http(&mut self, bytes: &[u8]) -> (usize, Heard) {
        let mut used = 0;
        if let Some(known) = &self.known
            && self.body.is_none()
            && self.head.is_empty()
            && bytes.starts_with(&known.head)
        {
            self.body = Some(known.body);
            used = known.head.len();
        } else if self.body.is_none() {
            let before = self.head.len();
            // The whole head nearly always comes at once: then nothing is copied.
            let end = if before == 0 {
                head_end(bytes)
            } else {
                self.head.extend_from_slice(bytes);
                head_end(&self.head)
            };
            let Some(end) = end else {
                if before == 0 {
                    self.head.extend_from_slice(bytes);
                }
                let wrong = !b"HTTP/1."[..self.head.len().min(7)].eq(&self.head[..self.head.len().min(7)]);
                let too_long = self.head.len() > LONGEST_HEAD;
                return (bytes.len(), if wrong || too_long { Heard::Wrong } else { Heard::More });
            };
            let head = if before == 0 { &bytes[..end] } else { &self.head[..end] };
            let Some(body) = parse_head(head) else {
                return (bytes.len(), Heard::Wrong);
            };
            used = end - before;
            if (100..200).contains(&body.status) {
                self.head.clear();
                let (more, heard) = self.feed_http(&bytes[used..]);
                return (used + more, heard);
            }
            if head.len() <= LONGEST_KNOWN {
                self.known = Some(Box::new(Known { head: head.to_vec(), body }));
            }
            self.body = Some(body);
        }
        let body = self.body.as_mut().expect("the head was read above");
        let (more, complete) = body.length.feed(&bytes[used..]);
        (used + more, if complete { finished(body.status, body.keep) } else { Heard::More })
    }
}

fn finished(status: u16, keep: bool) -> Heard {
    if status < 400 { Heard::Done { keep } } else { Heard::Error(status) }
}

impl Length {
    /// Takes bytes of the body; how many, and whether it is complete.
    fn feed(&mut self, bytes: &[u8]) -> (usize, bool) {
        match self {
            Length::Left(left) => {
                let used = (bytes.len() as u64).min(*left);
                *left -= used;
                (used as usize, *left == 0)
            }
            Length::UntilEnd => (bytes.len(), false),
            Length::Chunked(chunk) => {
                let mut at = 0;
                while at < bytes.len() {
                    let (used, complete) = chunk.feed(&bytes[at..]);
                    at += used;
                    if complete {
                        return (at, true);
                    }
                }
                (at, false)
            }
        }
    }
}

impl Chunk {
    fn feed(&mut self, bytes: &[u8]) -> (usize, bool) {
        let first = bytes[0];
        match *self {
            Chunk::Size(size) if first.is_ascii_hexdigit() => {
                let digit = (first as char).to_digit(16).expect("a hexadecimal digit");
                *self = Chunk::Size(size.saturating_mul(16).saturating_add(u64::from(digit)));
                (1, false)
            }
            Chunk::Size(size) | Chunk::Rest(size) => {
                *self = match (first, size) {
                    (b'\n', 0) => Chunk::Trailer(0),
                    // Two more: the line end behind the data.
                    (b'\n', _) => Chunk::Data(size.saturating_add(2)),
                    _ => Chunk::Rest(size),
                };
                (1, false)
            }
            Chunk::Data(left) => {
                let used = (bytes.len() as u64).min(left);
                *self = if used == left { Chunk::Size(0) } else { Chunk::Data(left - used) };
                (used as usize, false)
            }
            Chunk::Trailer(length) => match first {
                b'\n' if length == 0 => (1, true),
                b'\n' => {
                    *self = Chunk::Trailer(0);
                    (1, false)
                }
                b'\r' => (1, false),
                _ => {
                    *self = Chunk::Trailer(length + 1);
                    (1, false)
                }
            },
        }
    }
}

/// Behind the empty line, if it is there.
fn head_end(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == b'\n') {
        let next = from + at + 1;
        if bytes[next..].starts_with(b"\r\n") {
            return Some(next + 2);
        }
        from = next;
    }
    None
}

fn parse_head(head: &[u8]) -> Option<Body> {
    let mut lines = head.split(|byte| *byte == b'\n');
    let first = lines.next()?;
    let minor = first.strip_prefix(b"HTTP/1.")?.first()?;
    let status: u16 = std::str::from_utf8(first.get(9..12)?).ok()?.parse().ok()?;
    let mut body = Body { status, keep: *minor != b'0', length: Length::UntilEnd };
    if status == 204 || status == 304 {
        body.length = Length::Left(0);
    }
    for line in lines {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            continue;
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            body.length = Length::Left(std::str::from_utf8(value).ok()?.parse().ok()?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            body.length = Length::Chunked(Chunk::Size(0));
        } else if name.eq_ignore_ascii_case(b"connection") {
            body.keep = !value.eq_ignore_ascii_case(b"close");
        }
    }
    Some(body)
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Judges a datagram that answers `number` under a script that is no echo.
pub fn judge_datagram(script: &Script, number: u32, datagram: &[u8]) -> Heard {
    match script {
        Script::Dns(query) => judge_dns(query, number, datagram),
        Script::Containing(_, wanted) if !contains(datagram, wanted) => Heard::Wrong,
        Script::Any(_) | Script::Containing(..) | Script::Http(_) => Heard::Done { keep: true },
        Script::Echo => Heard::Wrong,
    }
}

fn judge_dns(query: &[u8], number: u32, answer: &[u8]) -> Heard {
    let question = &query[12..];
    let same_number = answer.get(..2) == Some(&(number as u16).to_be_bytes());
    // Servers may change the case of nothing: the question comes back as it was.
    let same_question = answer.get(12..12 + question.len()) == Some(question);
    let is_answer = answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
    match answer.get(3).map(|flags| flags & 0x0F) {
        Some(0 | 3) if same_number && is_answer && same_question => Heard::Done { keep: true },
        Some(code) if same_number && is_answer => Heard::Error(u16::from(code)),
        _ => Heard::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http() -> Script {
        Script::Http(Vec::new())
    }

    /// Feeds an answer in pieces of every length and wants the same end.
    fn heard_in_pieces(answer: &[u8]) -> Heard {
        let mut whole = Listening::default();
        let (used, last) = whole.feed(&http(), answer);
        assert_eq!(used, answer.len());
        for piece in 1..answer.len() {
            let mut listening = Listening::default();
            let mut heard = Heard::More;
            for bytes in answer.chunks(piece) {
                assert_eq!(heard, Heard::More, "pieces of {piece}");
                heard = listening.feed(&http(), bytes).1;
            }
            assert_eq!(heard, last, "pieces of {piece}");
        }
        last
    }

    #[test]
    fn http_answers_are_complete_where_their_length_says() {
        let keep = Heard::Done { keep: true };
        assert_eq!(heard_in_pieces(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"), keep);
        assert_eq!(heard_in_pieces(b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n"), keep);
        assert_eq!(
            heard_in_pieces(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;x=1\r\nhello\r\nA\r\n0123456789\r\n0\r\nT: 1\r\n\r\n"
            ),
            keep
        );
        assert_eq!(
            heard_in_pieces(b"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"),
            Heard::Done { keep: false }
        );
        assert_eq!(heard_in_pieces(b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno"), Heard::Error(503));
        assert_eq!(
            heard_in_pieces(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"),
            keep
        );
    }

    #[test]
    fn an_answer_without_a_length_ends_with_the_connection() {
        let mut listening = Listening::default();
        assert_eq!(listening.feed(&http(), b"HTTP/1.0 200 OK\r\n\r\nabc").1, Heard::More);
        assert_eq!(listening.handle_end(), Heard::Done { keep: false });
    }

    #[test]
    fn what_is_not_http_is_wrong() {
        assert_eq!(Listening::default().feed(&http(), b"SSH-2.0-x\r\n").1, Heard::Wrong);
        assert_eq!(Listening::default().feed(&http(), b"HTTP/1.1 abc\r\n\r\n").1, Heard::Wrong);
    }

    #[test]
    fn two_answers_in_one_read_are_two() {
        let mut listening = Listening::default();
        let one = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx";
        let both = [&one[..], &one[..]].concat();
        let (used, heard) = listening.feed(&http(), &both);
        assert_eq!((used, heard), (one.len(), Heard::Done { keep: true }));
        assert_eq!(listening.feed(&http(), &both[used..]).0, one.len());
    }

    #[test]
    fn a_head_like_the_last_one_counts_as_much_and_no_more() {
        let mut listening = Listening::default();
        let keep = Heard::Done { keep: true };
        let answers: [(&[u8], Heard); 6] = [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", keep),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\ncd", keep),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", keep),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
                Heard::Done { keep: false },
            ),
            (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", Heard::Error(503)),
            (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", Heard::Error(503)),
        ];
        for (answer, heard) in answers {
            assert_eq!(listening.feed(&http(), answer), (answer.len(), heard));
        }
        // The body of a known head may come later, and the head in pieces.
        let (head, body) = answers[0].0.split_at(38);
        assert_eq!(listening.feed(&http(), answers[0].0).1, keep);
        assert_eq!(listening.feed(&http(), head), (head.len(), Heard::More));
        assert_eq!(listening.feed(&http(), body).1, keep);
        assert_eq!(listening.feed(&http(), &head[..20]).1, Heard::More);
        assert_eq!(listening.feed(&http(), &answers[0].0[20..]).1, keep);
    }

    #[test]
    fn expected_bytes_are_found_across_pieces() {
        let script = Script::Containing(Vec::new(), b"PONG".to_vec());
        let mut listening = Listening::default();
        assert_eq!(listening.feed(&script, b"xxPO").1, Heard::More);
        assert_eq!(listening.feed(&script, b"N").1, Heard::More);
        assert_eq!(listening.feed(&script, b"Gyy").1, Heard::Done { keep: true });
    }

    #[test]
    fn dns_answers_must_carry_number_and_question() {
        let query = dns_query("a.example").expect("a name");
        let script = Script::Dns(query.clone());
        let mut answer = query.clone();
        answer[..2].copy_from_slice(&7u16.to_be_bytes());
        answer[2] = 0x81;
        assert_eq!(judge_datagram(&script, 7, &answer), Heard::Done { keep: true });
        assert_eq!(judge_datagram(&script, 8, &answer), Heard::Wrong);
        answer[3] = 2;
        assert_eq!(judge_datagram(&script, 7, &answer), Heard::Error(2));
        answer[3] = 3;
        answer[14] ^= 1;
        assert_eq!(judge_datagram(&script, 7, &answer[..20]), Heard::Error(3));
        assert_eq!(judge_datagram(&script, 7, b""), Heard::Wrong);
        assert!(dns_query("a..b").is_err());
    }
}
