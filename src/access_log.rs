//! One line a session or flow: its fields, as text or JSON.
//!
//! ```text
//! 2026-03-01T12:00:00.123Z listener=web slot=1 client=192.0.2.7:40000 upstream=web
//! server=10.0.0.1:80 wait_ms=0 connect_ms=1 total_ms=57 in=64 out=4096 retries=0 end=finished
//! ```
//! (on one line). `wait_ms` is the time until the connect that succeeded began,
//! `connect_ms` what that took, `total_ms` the whole life: HAProxy's Tw, Tc and
//! Tt. Pure: the time comes in, bytes go out.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::SystemTime;

use crate::config::Format;

/// What there is to say of a session or flow that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// When it ended.
    pub ended_at: SystemTime,
    /// The listener's name.
    pub listener: &'a str,
    /// The slot where it ended.
    pub slot: usize,
    /// Who came; as a PROXY header said it, where there was one.
    pub client: Option<SocketAddr>,
    /// The upstream's name; `None` where the worker answered itself.
    pub upstream: Option<&'a str>,
    /// The server's address; `None` where it got none.
    pub server: Option<&'a str>,
    /// Milliseconds until the connect that succeeded began.
    pub wait_ms: Option<u64>,
    /// Milliseconds that it took.
    pub connect_ms: Option<u64>,
    /// Milliseconds from the beginning to the end.
    pub total_ms: u64,
    /// Bytes from the client.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
    /// Servers that were tried in vain.
    pub retries: u32,
    /// Why it ended, as `status` calls it.
    pub end: &'a str,
}

impl Record<'_> {
    /// Appends the line with its end.
    pub fn write(&self, format: Format, out: &mut Vec<u8>) {
        let line = match format {
            Format::Text => self.text(),
            Format::Json => self.json(),
        };
        out.extend_from_slice(line.as_bytes());
        out.push(b'\n');
    }

    /// Names come from the configuration and hold neither blanks nor quotes;
    /// a server's address may be a path that does.
    fn text(&self) -> String {
        let mut line = String::with_capacity(256);
        let or_dash = |ms: Option<u64>| ms.map_or("-".to_string(), |ms| ms.to_string());
        let server = self
            .server
            .map_or("-".into(), |server| server.replace(|c: char| c.is_whitespace() || c.is_control(), "_"));
        let _ = write!(
            line,
            "{} listener={} slot={} client={} upstream={} server={server} wait_ms={} connect_ms={} total_ms={} in={} out={} retries={} end={}",
            humantime::format_rfc3339_millis(self.ended_at),
            self.listener,
            self.slot,
            self.client.map_or("-".to_string(), |client| client.to_string()),
            self.upstream.unwrap_or("-"),
            or_dash(self.wait_ms),
            or_dash(self.connect_ms),
            self.total_ms,
            self.bytes_in,
            self.bytes_out,
            self.retries,
            self.end,
        );
        line
    }

    fn json(&self) -> String {
        serde_json::json!({
            "time": humantime::format_rfc3339_millis(self.ended_at).to_string(),
            "listener": self.listener,
            "slot": self.slot,
            "client": self.client,
            "upstream": self.upstream,
            "server": self.server,
            "wait_ms": self.wait_ms,
            "connect_ms": self.connect_ms,
            "total_ms": self.total_ms,
            "in": self.bytes_in,
            "out": self.bytes_out,
            "retries": self.retries,
            "end": self.end,
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn record() -> Record<'static> {
        Record {
            ended_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_772_366_400_123),
            listener: "web",
            slot: 1,
            client: Some("192.0.2.7:40000".parse().unwrap()),
            upstream: Some("web"),
            server: Some("10.0.0.1:80"),
            wait_ms: Some(0),
            connect_ms: Some(1),
            total_ms: 57,
            bytes_in: 64,
            bytes_out: 4096,
            retries: 0,
            end: "finished",
        }
    }

    fn line(record: &Record, format: Format) -> String {
        let mut out = Vec::new();
        record.write(format, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_line_of_text_has_every_field() {
        assert_eq!(
            line(&record(), Format::Text),
            "2026-03-01T12:00:00.123Z listener=web slot=1 client=192.0.2.7:40000 upstream=web server=10.0.0.1:80 \
             wait_ms=0 connect_ms=1 total_ms=57 in=64 out=4096 retries=0 end=finished\n"
        );
    }

    #[test]
    fn what_is_missing_is_a_dash_or_null_and_never_shifts_a_column() {
        let bare = Record {
            client: None,
            upstream: None,
            server: None,
            wait_ms: None,
            connect_ms: None,
            ..record()
        };
        let text = line(&bare, Format::Text);
        assert_eq!(text.split(' ').count(), line(&record(), Format::Text).split(' ').count());
        assert!(text.contains("client=- upstream=- server=- wait_ms=- connect_ms=-"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&line(&bare, Format::Json)).unwrap();
        assert!(json["server"].is_null() && json["in"] == 64 && json["end"] == "finished", "{json}");
    }

    #[test]
    fn a_path_with_blanks_or_line_breaks_stays_one_field_on_one_line() {
        let odd = Record { server: Some("unix:/a b\nend=forged"), ..record() };
        let text = line(&odd, Format::Text);
        assert!(text.contains("server=unix:/a_b_end=forged wait_ms"), "{text}");
        assert_eq!(text.matches('\n').count(), 1);
        assert_eq!(line(&odd, Format::Json).matches('\n').count(), 1);
    }
}
