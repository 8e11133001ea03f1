//! Walks the tables of a file, collects what is wrong, and notes what it reads.
//!
//! Asking a `Table` for a key is all it takes to make that key exist: the name
//! becomes known, its default stands in where the file is silent, and the
//! value goes into the notes that `config show` prints. Keys that nobody asked
//! for are refused at the end. What a value must look like is said by
//! a function of `kinds`.
//!
//! A wrong value is noted as a problem and its default (or nothing) is handed
//! on, so that reading goes on; whoever reads throws the result away if there
//! was any problem.

use std::borrow::Borrow;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Problem, Source, quote};
use super::suggest::did_you_mean;
use super::value::{At, Value, Wrong, value_of};

/// A table as it is in force, for `config show`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// `[daemon]`, `[[listener]]`, `[listener.tcp]`
    pub header: String,
    /// Its keys in the order of the schema.
    pub entries: Vec<Entry>,
}

/// A key as it is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name within the table.
    pub key: &'static str,
    /// Its value as TOML; `None` = unset.
    pub value: Option<String>,
    /// Its default as TOML; `None` = it has none.
    pub default: Option<String>,
    /// The line of the file that says so; `None` = nothing does.
    pub line: Option<usize>,
}

/// What reading a file gathers.
pub(super) struct Reader<'f> {
    pub(super) source: &'f Source<'f>,
    pub(super) problems: Vec<Problem>,
    pub(super) blocks: Vec<Block>,
    unknown: Vec<UnknownKey>,
}

/// A key that nobody asked for. It is judged once the whole file was read,
/// when it is known in which other table it would have been right.
struct UnknownKey {
    typed: String,
    at: usize,
    header: String,
    known: Vec<&'static str>,
}

impl<'f> Reader<'f> {
    pub(super) fn new(source: &'f Source<'f>) -> Self {
        Self { source, problems: Vec::new(), blocks: Vec::new(), unknown: Vec::new() }
    }

    /// Reads the whole file.
    pub(super) fn root<T>(
        &mut self,
        data: &Spanned<DeTable<'_>>,
        read: impl FnOnce(&mut Table<'_, '_, 'f>) -> T,
    ) -> T {
        let value = read_table(self, Some(data.get_ref()), 0, "", String::new(), read);
        for unknown in std::mem::take(&mut self.unknown) {
            self.refuse(&unknown);
        }
        value
    }

    fn refuse(&mut self, unknown: &UnknownKey) {
        let UnknownKey { typed, at, header, known } = unknown;
        let (place, taker) = match header.as_str() {
            "" => ("at the top level".to_string(), "a file"),
            header => (format!("in {header}"), header),
        };
        let help = match self.right_table(typed, header) {
            // In TOML a key belongs to the last header above it.
            Some(right) => format!("it belongs in {right}: write it below that header, before the next one"),
            None => did_you_mean(typed, known, &format!("{taker} takes {}", known.join(", "))),
        };
        self.problem(*at, format!("unknown key {} {place}", quote(typed)), help);
    }

    /// The table around or within the one with this header that has the key.
    fn right_table(&self, key: &str, header: &str) -> Option<&str> {
        let related = |other: &str| {
            let (one, other) = (path(header), path(other));
            one.starts_with(other) || other.starts_with(one)
        };
        let has_key = |block: &&Block| block.entries.iter().any(|entry| entry.key == key);
        let right = self.blocks.iter().filter(|block| related(&block.header)).find(has_key)?;
        Some(&right.header)
    }

    pub(super) fn problem(&mut self, at: usize, message: impl Into<String>, help: impl Into<String>) {
        let problem = self.source.problem(at, message, help);
        self.problems.push(problem);
    }
}

/// One table while it is read.
pub(super) struct Table<'r, 'd, 'f> {
    reader: &'r mut Reader<'f>,
    /// `None` where the file has no such table: everything is as by default.
    data: Option<&'d DeTable<'d>>,
    at: usize,
    path: String,
    header: String,
    block: usize,
    known: Vec<&'static str>,
}

impl<'d, 'f> Table<'_, 'd, 'f> {
    /// Where the table begins.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Does the file have this key here?
    pub(super) fn has(&self, key: &str) -> bool {
        self.data.is_some_and(|data| data.contains_key(key))
    }

    /// Where the file has this key here.
    pub(super) fn place_of(&self, key: &str) -> Option<usize> {
        self.data?.get(key).map(|raw| raw.span().start)
    }

    /// Notes a problem that is more than one value's.
    pub(super) fn problem(&mut self, at: usize, message: impl Into<String>, help: impl Into<String>) {
        self.reader.problem(at, message, help);
    }

    /// A key with a default.
    pub(super) fn read<T>(
        &mut self,
        key: &'static str,
        default: impl Into<Value<'static>>,
        kind: impl Fn(&Value) -> Result<T, Wrong>,
    ) -> T {
        let default = default.into();
        let typed = self.typed(key);
        self.note(key, typed.as_ref(), Some(&default));
        typed
            .and_then(|typed| self.judge(key, &typed, &kind))
            .unwrap_or_else(|| kind(&default).expect("a default is a value that its key takes"))
    }

    /// A key that is unset where the file does not have it.
    pub(super) fn optional<T>(
        &mut self,
        key: &'static str,
        kind: impl Fn(&Value) -> Result<T, Wrong>,
    ) -> Option<At<T>> {
        let typed = self.typed(key);
        self.note(key, typed.as_ref(), None);
        let typed = typed?;
        let value = self.judge(key, &typed, &kind)?;
        Some(At { value, at: typed.at })
    }

    /// A key that the file must have; `example` is what the complaint advises.
    /// `None` once the complaint is noted.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        example: &str,
        kind: impl Fn(&Value) -> Result<T, Wrong>,
    ) -> Option<At<T>> {
        let value = self.optional(key, kind);
        self.complain_if_missing(key, example);
        value
    }

    /// A key that the file must have, with one value or a list of them.
    /// Elements that will not do are left out.
    pub(super) fn required_list<T>(
        &mut self,
        key: &'static str,
        example: &str,
        kind: impl Fn(&Value) -> Result<T, Wrong>,
    ) -> Vec<At<T>> {
        let typed = self.typed(key);
        self.note(key, typed.as_ref(), None);
        self.complain_if_missing(key, example);
        let elements = match typed {
            None => Vec::new(),
            Some(At { value: Value::List(elements), at }) => {
                if elements.is_empty() {
                    self.problem(at, format!("{key} is an empty list"), format!("write {key} = {example}"));
                }
                elements
            }
            Some(one) => vec![one],
        };
        let judged = elements.iter().filter_map(|element| {
            let value = self.judge(key, element, &kind)?;
            Some(At { value, at: element.at })
        });
        judged.collect()
    }

    /// A key with a list, whose default is a list of texts; one value will do.
    /// Elements that will not do are left out.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        default: &[&'static str],
        kind: impl Fn(&Value) -> Result<T, Wrong>,
    ) -> Vec<T> {
        let default = Value::from(default);
        let typed = self.typed(key);
        self.note(key, typed.as_ref(), Some(&default));
        let elements = match typed.unwrap_or(At { value: default, at: self.at }) {
            At { value: Value::List(elements), .. } => elements,
            one => vec![one],
        };
        elements.iter().filter_map(|element| self.judge(key, element, &kind)).collect()
    }

    /// The same, but unset by default.
    pub(super) fn optional_list<T>(
        &mut self,
        key: &'static str,
        kind: impl Fn(&Value) -> Result<T, Wrong>,
    ) -> Vec<T> {
        let typed = self.typed(key);
        self.note(key, typed.as_ref(), None);
        let elements = match typed {
            None => Vec::new(),
            Some(At { value: Value::List(elements), .. }) => elements,
            Some(one) => vec![one],
        };
        elements.iter().filter_map(|element| self.judge(key, element, &kind)).collect()
    }

    /// What the tables of a list have as texts for two keys, before they are
    /// read: what is read first may depend on it.
    pub(super) fn glance(&self, tables: &str, keys: [&str; 2]) -> Vec<[Option<&'d str>; 2]> {
        let Some(DeValue::Array(elements)) =
            self.data.and_then(|data| data.get(tables)).map(Spanned::get_ref)
        else {
            return Vec::new();
        };
        let tables = elements.iter().filter_map(|element| match element.get_ref() {
            DeValue::Table(table) => Some(table),
            _ => None,
        });
        let text = |table: &'d DeTable<'d>, key: &str| match table.get(key)?.get_ref() {
            DeValue::String(text) => Some(text.as_ref()),
            _ => None,
        };
        tables.map(|table| keys.map(|key| text(table, key))).collect()
    }

    /// A table within this one, or its defaults.
    pub(super) fn table<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Table<'_, 'd, 'f>) -> T,
    ) -> T {
        let path = self.path_of(key);
        let header = format!("[{path}]");
        let (data, at) = match self.raw(key) {
            None => (None, self.at),
            Some(raw) => match raw.get_ref() {
                DeValue::Table(table) => (Some(table), raw.span().start),
                DeValue::Array(_) => {
                    self.problem(
                        raw.span().start,
                        format!("{key} is a list"),
                        format!("there is only one: write {header}"),
                    );
                    (None, self.at)
                }
                _ => {
                    self.problem(
                        raw.span().start,
                        format!("{key} is not a table"),
                        format!("write {header} and its keys below"),
                    );
                    (None, self.at)
                }
            },
        };
        read_table(self.reader, data, at, &path, header, read)
    }

    /// The same, noted for `config show` only where it has an effect.
    pub(super) fn table_where<T>(
        &mut self,
        has_effect: bool,
        key: &'static str,
        read: impl FnOnce(&mut Table<'_, 'd, 'f>) -> T,
    ) -> T {
        let before = self.reader.blocks.len();
        let value = self.table(key, read);
        if !has_effect {
            self.reader.blocks.truncate(before);
        }
        value
    }

    /// The tables of a list within this one.
    pub(super) fn tables<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Table<'_, 'd, 'f>) -> T,
    ) -> Vec<T> {
        let path = self.path_of(key);
        let header = format!("[[{path}]]");
        let Some(raw) = self.raw(key) else {
            return Vec::new();
        };
        let single = std::slice::from_ref(raw);
        let elements: &[_] = match raw.get_ref() {
            DeValue::Array(elements) => elements,
            DeValue::Table(_) => {
                self.problem(
                    raw.span().start,
                    format!("{key} is a single table"),
                    format!("there may be several: write {header}"),
                );
                single
            }
            _ => single,
        };
        let mut all = Vec::new();
        for element in elements {
            let at = element.span().start;
            match element.get_ref() {
                DeValue::Table(table) => {
                    all.push(read_table(self.reader, Some(table), at, &path, header.clone(), &mut read));
                }
                _ => self.problem(
                    at,
                    format!("{key} is not a table"),
                    format!("write {header} and its keys below"),
                ),
            }
        }
        all
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }

    /// What the file has for a key, which is known from now on.
    fn raw(&mut self, key: &'static str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.known.push(key);
        self.data?.get(key)
    }

    fn typed(&mut self, key: &'static str) -> Option<At<Value<'d>>> {
        self.raw(key).map(value_of)
    }

    fn note(&mut self, key: &'static str, typed: Option<&At<Value>>, default: Option<&Value>) {
        let entry = Entry {
            key,
            value: typed.map(|typed| &typed.value).or(default).map(Value::to_toml),
            default: default.map(Value::to_toml),
            line: typed.map(|typed| self.reader.source.line(typed.at)),
        };
        self.reader.blocks[self.block].entries.push(entry);
    }

    fn judge<T>(
        &mut self,
        key: &str,
        typed: &At<Value>,
        kind: &impl Fn(&Value) -> Result<T, Wrong>,
    ) -> Option<T> {
        match kind(&typed.value) {
            Ok(value) => Some(value),
            Err(wrong) => {
                let message = format!("{key} = {} {}", typed.value.found(), wrong.message);
                self.problem(typed.at, message, wrong.help);
                None
            }
        }
    }

    fn complain_if_missing(&mut self, key: &'static str, example: &str) {
        if !self.has(key) {
            let message = format!("{} has no {key}", self.header);
            self.problem(self.at, message, format!("add: {key} = {example}"));
        }
    }

    fn note_unknown_keys(&mut self) {
        let Some(data) = self.data else { return };
        for key in data.keys() {
            let typed: &str = key.borrow();
            if !self.known.contains(&typed) {
                self.reader.unknown.push(UnknownKey {
                    typed: typed.to_string(),
                    at: key.span().start,
                    header: self.header.clone(),
                    known: self.known.clone(),
                });
            }
        }
    }
}

/// Opens a table, has it read, and refuses what was not asked for.
fn read_table<'d, 'f, T>(
    reader: &mut Reader<'f>,
    data: Option<&'d DeTable<'d>>,
    at: usize,
    path: &str,
    header: String,
    read: impl FnOnce(&mut Table<'_, 'd, 'f>) -> T,
) -> T {
    let block = reader.blocks.len();
    reader.blocks.push(Block { header: header.clone(), entries: Vec::new() });
    let mut table = Table { reader, data, at, path: path.to_string(), header, block, known: Vec::new() };
    let value = read(&mut table);
    table.note_unknown_keys();
    value
}

/// A header without its brackets.
fn path(header: &str) -> &str {
    header.trim_matches(['[', ']'])
}
