//! From a file's text to a `Config`, or to everything that is wrong with it.
//!
//! Reading goes on after an error, so that one run tells all of them. The one
//! exception is text that is not TOML: what could be read of such a file is
//! guesswork, and complaints about guesses would hide the cause.

use toml::de::DeTable;

use super::checks::check;
use super::file::{File, file};
use super::problem::{Problem, Problems, Source, quote};
use super::reader::{Block, Reader};
use super::{Config, ServerAddress};

/// A configuration that can be run, and what else there is to say about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// What the file means.
    pub config: Config,
    /// What works but is hardly meant.
    pub warnings: Problems,
    /// What is in force and where it comes from, for `config show`.
    pub blocks: Vec<Block>,
    /// The servers whose names only the network can resolve.
    pub names: Vec<NamedServer>,
}

/// A server with a name, and what to say where it does not resolve.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedServer {
    /// `Name` or `Srv`.
    pub address: ServerAddress,
    unresolved: Problem,
}

impl NamedServer {
    /// The warning that it does not resolve, for this reason.
    pub fn unresolved(&self, reason: &str) -> Problem {
        let mut problem = self.unresolved.clone();
        problem.message = format!("{}: {reason}", problem.message);
        problem
    }
}

impl Loaded {
    /// The line of the file that sets a key of a table.
    pub fn line_of(&self, header: &str, key: &str) -> Option<usize> {
        let block = self.blocks.iter().find(|block| block.header == header)?;
        block.entries.iter().find(|entry| entry.key == key)?.line
    }

    /// Adds warnings, each in its place.
    pub fn warn(&mut self, more: Vec<Problem>) {
        let known = std::mem::take(&mut self.warnings.0);
        self.warnings = Problems::sorted(known.into_iter().chain(more).collect());
    }
}

/// Reads a configuration. `file_name` is only what messages call it.
///
/// # Errors
/// All that is wrong with the text, in its order.
pub fn load(file_name: &str, text: &str) -> Result<Loaded, Problems> {
    let source = Source::new(file_name, text);
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        return Err(Problems::sorted(errors.iter().map(|error| syntax_problem(error, &source)).collect()));
    }
    let mut reader = Reader::new(&source);
    let read = reader.root(&table, file);
    let Reader { mut problems, mut blocks, .. } = reader;
    let found = check(&read, &source);
    problems.extend(found.errors);
    if !problems.is_empty() {
        return Err(Problems::sorted(problems));
    }
    // The top level has tables alone, and nothing to show of its own.
    blocks.retain(|block| !block.header.is_empty());
    // Upstreams are read first and shown last, as people write them.
    blocks.sort_by_key(|block| block.header.contains("[upstream"));
    let names = named_servers(&read, &source);
    Ok(Loaded { config: config(read), warnings: Problems::sorted(found.warnings), blocks, names })
}

fn named_servers(read: &File, source: &Source) -> Vec<NamedServer> {
    let servers = read.upstreams.iter().flat_map(|read| read.upstream.servers.iter().zip(&read.server_at));
    let named = servers.filter_map(|(server, at)| match &server.address {
        ServerAddress::Ip(_) | ServerAddress::Unix(_) => None,
        ServerAddress::Name { .. } | ServerAddress::Srv(_) => {
            let message = format!("{} does not resolve", quote(&server.address.to_string()));
            let help = "the server is not used until it does; is it spelled right, and is /etc/resolv.conf?";
            let unresolved = source.problem(*at, message, help);
            Some(NamedServer { address: server.address.clone(), unresolved })
        }
    });
    named.collect()
}

fn config(read: File) -> Config {
    Config {
        daemon: read.daemon,
        log: read.log,
        listeners: read.listeners.into_iter().map(|read| read.listener).collect(),
        upstreams: read.upstreams.into_iter().map(|read| read.upstream).collect(),
    }
}

fn syntax_problem(error: &toml::de::Error, source: &Source) -> Problem {
    let span = error.span().unwrap_or(source.text.len()..source.text.len());
    let at = span.start;
    if error.message() == "duplicate key" {
        let key = source.text.get(span).unwrap_or("");
        let help =
            "take one of the two out; a table that may occur several times has two brackets: [[listener]]";
        return source.problem(at, format!("key {} is there twice", quote(key)), help);
    }
    let help = "texts stand in double quotes, a table's name in [brackets], a key and its value on one line";
    source.problem(at, format!("not TOML: {}", error.message()), help)
}
