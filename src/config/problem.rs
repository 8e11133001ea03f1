//! What is wrong with a configuration, said to the operator.
//!
//! A `Problem` names the place, the value found and a way out. `Problems` is
//! everything that one file has to complain about, in the file's order; it is
//! an error and can be written as JSON.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One error or one warning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file's name as it was given.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, message, help } = self;
        write!(f, "{file}:{line}:{column}: {message}\n  {help}")
    }
}

/// All that is wrong with a file, in the file's order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// Sorts by place; two at one place keep the order they were found in.
    pub(super) fn sorted(mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|p| (p.line, p.column));
        Self(problems)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let gap = if index == 0 { "" } else { "\n" };
            write!(f, "{gap}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A file's name and text, and where its lines begin.
pub(super) struct Source<'f> {
    pub(super) file: &'f str,
    pub(super) text: &'f str,
    line_starts: Vec<usize>,
}

impl<'f> Source<'f> {
    pub(super) fn new(file: &'f str, text: &'f str) -> Self {
        let after_newlines = text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at + 1);
        let line_starts = std::iter::once(0).chain(after_newlines).collect();
        Self { file, text, line_starts }
    }

    /// The line, from 1, that holds the byte `at`.
    pub(super) fn line(&self, at: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= at)
    }

    /// The column, from 1, of the byte `at`, counted in characters.
    fn column(&self, at: usize) -> usize {
        let start = self.line_starts[self.line(at) - 1];
        let end = at.min(self.text.len());
        let before = &self.text.as_bytes()[start..end];
        // Bytes that start a character; `at` itself may stand inside one.
        1 + before.iter().filter(|byte| (**byte & 0xC0) != 0x80).count()
    }

    pub(super) fn problem(&self, at: usize, message: impl Into<String>, help: impl Into<String>) -> Problem {
        Problem {
            file: self.file.to_string(),
            line: self.line(at),
            column: self.column(at),
            message: message.into(),
            help: help.into(),
        }
    }
}

/// `listener "web"`, or `[[listener]]` where its name was wrong or missing.
pub(super) fn called(what: &str, name: &str) -> String {
    if name.is_empty() { format!("[[{what}]]") } else { format!("{what} \"{name}\"") }
}

/// A text of the file between quotes: on one line, harmless to a terminal,
/// and cut where it gets long.
pub(super) fn quote(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    // escape_debug turns ' into \', which only confuses between double quotes.
    shown = shown.replace("\\'", "'");
    let more = if text.chars().nth(SHOWN).is_some() { "..." } else { "" };
    format!("\"{shown}{more}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_count_characters() {
        let source = Source::new("a.toml", "é = 1\nnäme = 2\n");
        let problem = source.problem(source.text.find('2').unwrap(), "wrong", "do right");
        assert_eq!(problem.to_string(), "a.toml:2:8: wrong\n  do right");
    }

    #[test]
    fn a_place_past_the_end_is_the_end() {
        let source = Source::new("a.toml", "ab");
        assert_eq!((source.line(99), source.column(99)), (1, 3));
    }
}
