//! From a file's text to a `Config`, or to everything that is wrong with it.
//!
//! Reading goes on after an error, so that one run tells all of them. The one
//! exception is text that is not TOML: what could be read of such a file is
//! guesswork, and complaints about guesses would hide the cause.

use toml::de::DeTable;

use super::Config;
use super::checks::check;
use super::file::{File, file};
use super::problem::{Problem, Problems, Source, quote};
use super::reader::{Block, Reader};

/// A configuration that can be run, and what else there is to say about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// What the file means.
    pub config: Config,
    /// What works but is hardly meant.
    pub warnings: Problems,
    /// What is in force and where it comes from, for `config show`.
    pub blocks: Vec<Block>,
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
    Ok(Loaded { config: config(read), warnings: Problems::sorted(found.warnings), blocks })
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
