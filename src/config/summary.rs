//! What `evenkeel check` says about a configuration that is right.

use std::fmt;

use serde::Serialize;

use super::words::Word;
use super::{Config, Server, Target, Workers};

/// A configuration in short, as text by `Display` and as JSON by serde.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// `"auto"` or the number, as a text.
    pub workers: String,
    /// In the file's order.
    pub listeners: Vec<ListenerSummary>,
    /// In the file's order.
    pub upstreams: Vec<UpstreamSummary>,
}

/// A listener in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ListenerSummary {
    /// Its name.
    pub name: String,
    /// Its mode's word.
    pub mode: &'static str,
    /// Its addresses.
    pub bind: Vec<String>,
    /// The upstream's name, where its traffic goes to one.
    pub upstream: Option<String>,
    /// The service's word, where the worker answers itself.
    pub service: Option<&'static str>,
}

/// An upstream in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UpstreamSummary {
    /// Its name.
    pub name: String,
    /// Its balance's word.
    pub balance: &'static str,
    /// Its servers.
    pub servers: Vec<ServerSummary>,
}

/// A server in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServerSummary {
    /// As the file writes it.
    pub address: String,
    /// Its share.
    pub weight: u32,
    /// Used only when no other can be.
    pub backup: bool,
}

/// Sums a configuration up.
pub fn summary(config: &Config) -> Summary {
    let listeners = config.listeners.iter().map(|listener| {
        let (upstream, service) = match listener.target {
            Target::Upstream(index) => (Some(config.upstreams[index].name.clone()), None),
            Target::Service(service) => (None, Some(service.word())),
        };
        ListenerSummary {
            name: listener.name.clone(),
            mode: listener.mode.word(),
            bind: listener.bind.iter().map(ToString::to_string).collect(),
            upstream,
            service,
        }
    });
    let upstreams = config.upstreams.iter().map(|upstream| UpstreamSummary {
        name: upstream.name.clone(),
        balance: upstream.balance.word(),
        servers: upstream.servers.iter().map(server).collect(),
    });
    Summary {
        workers: match config.daemon.workers {
            Workers::Auto => "auto".to_string(),
            Workers::Count(count) => count.to_string(),
        },
        listeners: listeners.collect(),
        upstreams: upstreams.collect(),
    }
}

fn server(server: &Server) -> ServerSummary {
    ServerSummary { address: server.address.to_string(), weight: server.weight, backup: server.backup }
}

/// No line break at the end.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address_count = self.listeners.iter().map(|listener| listener.bind.len()).sum();
        let server_count = self.upstreams.iter().map(|upstream| upstream.servers.len()).sum();
        let counts = [
            counted(self.listeners.len(), "listener"),
            counted(address_count, "address"),
            counted(self.upstreams.len(), "upstream"),
            counted(server_count, "server"),
        ];
        write!(f, "{}; workers: {}", counts.join(", "), self.workers)?;
        for listener in &self.listeners {
            let ListenerSummary { name, mode, bind, upstream, service } = listener;
            write!(f, "\n  listener {name}  {mode} {}", bind.join(" "))?;
            if let Some(upstream) = upstream {
                write!(f, " -> upstream {upstream}")?;
            }
            if let Some(service) = service {
                write!(f, " -> service {service}")?;
            }
        }
        for upstream in &self.upstreams {
            write!(f, "\n  upstream {}  {}:", upstream.name, upstream.balance)?;
            for server in &upstream.servers {
                write!(f, " {server}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ServerSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)?;
        match (self.weight, self.backup) {
            (1, false) => Ok(()),
            (1, true) => f.write_str(" (backup)"),
            (weight, false) => write!(f, " (weight {weight})"),
            (weight, true) => write!(f, " (weight {weight}, backup)"),
        }
    }
}

fn counted(count: usize, what: &str) -> String {
    let ending = match (count, what.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{count} {what}{ending}")
}
