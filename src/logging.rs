//! The log: one line for a change of state, to standard error.
//!
//! Every process of the daemon calls `init` once. Lines are written by a
//! thread behind a bounded queue (`queue`), so that a slow terminal or journal
//! never stalls a worker: what does not fit is dropped. Under systemd a line
//! begins with its priority, as sd-daemon(3) has it.

mod queue;

use std::fmt::{self, Write as _};
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use queue::{Entrance, Queue};

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `level text key=value`
    Text,
    /// One JSON object a line.
    Json,
}

/// Writes out what waits when it is dropped, at the end of the process.
#[derive(Debug)]
pub struct Log {
    queue: Arc<Queue<io::Stderr>>,
}

impl Log {
    /// Writes out what waits: threads do not outlive an exec.
    pub fn flush(&mut self) {
        self.queue.flush();
    }

    /// Does something while no thread writes. The next line begins another
    /// one.
    pub fn without_thread<T>(&mut self, act: impl FnOnce() -> T) -> T {
        self.queue.flush();
        act()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.queue.flush();
    }
}

/// Starts this process's log. `level` is one of error, warn, info, debug,
/// trace; `$EVENKEEL_LOG` overrides it. `role` is in front of every line.
pub fn init(level: &str, shape: Shape, role: &str) -> Log {
    let asked = std::env::var("EVENKEEL_LOG").unwrap_or_else(|_| level.to_string());
    let level = LevelFilter::from_str(&asked).unwrap_or(LevelFilter::INFO);
    let queue = Arc::new(Queue::new(io::stderr()));
    // $JOURNAL_STREAM is set where standard error is systemd's journal.
    let priorities = std::env::var_os("JOURNAL_STREAM").is_some();
    // Libraries speak in their own words, and only where somebody debugs.
    let libraries = level >= LevelFilter::DEBUG;
    let lines = Lines { shape, priorities, libraries, role: role.to_string() };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(Entrance(Arc::clone(&queue)))
        .event_format(lines)
        .finish();
    // A second call, in a test, keeps the first log.
    let _ = tracing::subscriber::set_global_default(subscriber);
    if LevelFilter::from_str(&asked).is_err() && role == "supervisor" {
        tracing::warn!(
            "EVENKEEL_LOG = \"{asked}\" is no level, so info is used\n  write error, warn, info, debug or trace"
        );
    }
    Log { queue }
}

struct Lines {
    shape: Shape,
    priorities: bool,
    libraries: bool,
    role: String,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if !self.libraries && !event.metadata().target().starts_with(env!("CARGO_PKG_NAME")) {
            return Ok(());
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = *event.metadata().level();
        if self.priorities {
            write!(out, "<{}>", priority(level))?;
        }
        match self.shape {
            Shape::Text => {
                write!(out, "{} {}: {}", name(level), self.role, fields.message)?;
                for (key, value) in &fields.others {
                    match value {
                        Value::String(text) => write!(out, " {key}={text}")?,
                        other => write!(out, " {key}={other}")?,
                    }
                }
                writeln!(out)
            }
            Shape::Json => {
                let mut object = serde_json::Map::new();
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                object.insert("ts".into(), now.map_or(0.0, |t| t.as_secs_f64()).into());
                object.insert("level".into(), name(level).into());
                object.insert("process".into(), self.role.as_str().into());
                object.insert("message".into(), fields.message.into());
                for (key, value) in fields.others {
                    object.insert(key.into(), value);
                }
                writeln!(out, "{}", Value::Object(object))
            }
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, Value)>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // A control character in a name must not break the line.
        let mut text = String::new();
        let _ = write!(text, "{value:?}");
        // The way out stands on a line of its own elsewhere.
        let text = text.replace("\n  ", ": ").replace('\n', "; ");
        let text: String = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        match field.name() {
            "message" => self.message = text,
            name => self.others.push((name, text.into())),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.others.push((field.name(), value.into()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.others.push((field.name(), value.into()));
    }
}

fn name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// syslog(3) priorities.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}
