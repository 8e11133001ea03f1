//! One value of the file: what a key was given, and where.
//!
//! A small mirror of TOML's own values, so that defaults, which stand in no
//! file, are judged by the same functions as what was typed.

use toml::Spanned;
use toml::de::DeValue;

use super::problem::quote;

/// Something and the byte of the file where it stands.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) at: usize,
}

impl<T> At<T> {
    pub(super) fn into_value(self) -> T {
        self.value
    }
}

/// A value of the file, or a default.
#[derive(Clone, Debug)]
pub(super) enum Value<'t> {
    Text(&'t str),
    Integer(i64),
    Boolean(bool),
    List(Vec<At<Value<'t>>>),
    /// What no key takes, as a message shows it.
    Other(String),
}

/// Why a value will not do: "is not a duration", and the way out.
#[derive(Debug)]
pub(super) struct Wrong {
    pub(super) message: &'static str,
    pub(super) help: String,
}

impl Wrong {
    pub(super) fn new(message: &'static str, help: impl Into<String>) -> Self {
        Self { message, help: help.into() }
    }
}

impl Value<'_> {
    /// The value on one line, as a message shows it.
    pub(super) fn found(&self) -> String {
        match self {
            Self::Text(text) => quote(text),
            Self::Integer(number) => number.to_string(),
            Self::Boolean(yes) => yes.to_string(),
            Self::List(_) => "[...]".to_string(),
            Self::Other(shown) => shown.clone(),
        }
    }

    /// The value on one line, as TOML that reads back.
    pub(super) fn to_toml(&self) -> String {
        match self {
            Self::Text(text) => toml_string(text),
            Self::Integer(number) => number.to_string(),
            Self::Boolean(yes) => yes.to_string(),
            Self::List(elements) => {
                let elements: Vec<String> = elements.iter().map(|element| element.value.to_toml()).collect();
                format!("[{}]", elements.join(", "))
            }
            // Never printed: no key takes one, so the file was refused.
            Self::Other(_) => "\"\"".to_string(),
        }
    }
}

impl<'t> From<&'t str> for Value<'t> {
    fn from(text: &'t str) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for Value<'_> {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl From<&[&'static str]> for Value<'_> {
    fn from(texts: &[&'static str]) -> Self {
        Self::List(texts.iter().map(|text| At { value: Self::Text(text), at: 0 }).collect())
    }
}

impl From<bool> for Value<'_> {
    fn from(yes: bool) -> Self {
        Self::Boolean(yes)
    }
}

/// Takes a value from the parser.
pub(super) fn value_of<'d>(raw: &'d Spanned<DeValue<'d>>) -> At<Value<'d>> {
    let value = match raw.get_ref() {
        DeValue::String(text) => Value::Text(text),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::Other(shortened(number.as_str())),
        },
        DeValue::Boolean(yes) => Value::Boolean(*yes),
        DeValue::Array(elements) => Value::List(elements.iter().map(value_of).collect()),
        DeValue::Float(number) => Value::Other(shortened(number.as_str())),
        DeValue::Datetime(date) => Value::Other(date.to_string()),
        DeValue::Table(_) => Value::Other("{...}".to_string()),
    };
    At { value, at: raw.span().start }
}

/// A number too long to be one, cut.
fn shortened(digits: &str) -> String {
    const SHOWN: usize = 24;
    match digits.get(..SHOWN) {
        Some(head) if digits.len() > SHOWN => format!("{head}..."),
        _ => digits.to_string(),
    }
}

fn toml_string(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
