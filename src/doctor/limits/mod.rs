//! The limits of this host, each with what it costs this configuration and
//! the line that sets it.
//!
//! `host` reads, `judge` decides from what was read and is tested without a
//! host. A file that is hidden or not there is reported as such and never
//! takes the rest down.

mod host;
mod judge;

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use crate::config::Config;
use crate::doctor::wrap::wrap;

pub use host::Host;
pub use judge::judge;

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Enough.
    Ok,
    /// Worth knowing; nothing is lost by it.
    Note,
    /// This configuration wants more than the host gives.
    Short,
    /// Could not be read here.
    Unknown,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Short => "short",
            Level::Unknown => "unknown",
        }
    }
}

/// A line that changes a limit, and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "where", content = "line", rename_all = "kebab-case")]
pub enum Remedy {
    /// A line of /etc/sysctl.d/*.conf: `net.core.somaxconn = 4096`.
    Sysctl(String),
    /// A line of the unit's Service section: `LimitNOFILE=65536`.
    Unit(String),
    /// Something else, in words.
    Words(String),
}

impl Remedy {
    fn text(&self) -> String {
        match self {
            Remedy::Sysctl(line) => format!("/etc/sysctl.d: {line}"),
            Remedy::Unit(line) => format!("unit [Service]: {line}"),
            Remedy::Words(words) => words.clone(),
        }
    }
}

/// One limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its short name.
    pub name: &'static str,
    /// How to take it.
    pub level: Level,
    /// What the host has.
    pub found: String,
    /// What that means for this configuration.
    pub cost: String,
    /// What sets it.
    pub remedy: Vec<Remedy>,
}

/// All limits of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The kernel's release, if it tells.
    pub kernel: Option<String>,
    /// Was a configuration given, or are the defaults meant?
    pub configured: bool,
    /// In a fixed order.
    pub findings: Vec<Finding>,
}

/// Reads this host and holds it against the configuration.
pub fn report(config: Option<&Config>) -> Report {
    let host = Host::read(Path::new("/proc"));
    let findings = judge(&host, config);
    Report { kernel: host.kernel, configured: config.is_some(), findings }
}

impl Report {
    /// As a table.
    pub fn text(&self) -> String {
        let mut text = match &self.kernel {
            Some(kernel) => format!("this host, Linux {kernel}"),
            None => "this host, kernel unknown".into(),
        };
        text.push_str(match self.configured {
            true => ", against the configuration\n",
            false => ", against the defaults (no configuration was given)\n",
        });
        for finding in &self.findings {
            let Finding { name, level, found, cost, remedy } = finding;
            let _ = writeln!(text, "  {:8}{name:20}{found}", level.word());
            for line in [cost.clone()].into_iter().chain(remedy.iter().map(Remedy::text)) {
                if !line.is_empty() {
                    let _ = writeln!(text, "{:30}{}", "", wrap(&line, 30));
                }
            }
        }
        let short = self.findings.iter().filter(|finding| finding.level == Level::Short).count();
        let _ = match short {
            0 => writeln!(text, "nothing is short"),
            1 => writeln!(text, "1 limit is short"),
            count => writeln!(text, "{count} limits are short"),
        };
        let _ = writeln!(
            text,
            "limits of a process are those of this shell; under systemd the unit sets them. sysctl --system applies \
             the sysctl lines"
        );
        text
    }
}
