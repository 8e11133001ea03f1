//! `evenkeel config show`: the configuration in force as TOML, each line with
//! its origin.
//!
//! What is printed is what was read, key by key, so that it loads again to the
//! same `Config`. Keys that are unset stand there as comments.

use super::load::Loaded;
use super::reader::Entry;

/// The whole text; `file_name` is what origins call the file.
pub fn show(loaded: &Loaded, file_name: &str) -> String {
    let base = file_name.rsplit('/').next().unwrap_or(file_name);
    // A line break in the name would end the comment.
    let base: String = base.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let mut text = String::new();
    for block in &loaded.blocks {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&block.header);
        text.push('\n');
        let lines: Vec<String> = block.entries.iter().map(assignment).collect();
        let width = lines.iter().map(|line| line.chars().count()).max().unwrap_or(0).min(48);
        for (line, entry) in lines.iter().zip(&block.entries) {
            let origin = match entry.line {
                Some(line) => format!("{base}:{line}"),
                None => "default".to_string(),
            };
            text.push_str(&format!("{line:width$}  # {origin}\n"));
        }
    }
    text
}

fn assignment(entry: &Entry) -> String {
    match &entry.value {
        Some(value) => format!("{} = {value}", entry.key),
        None => format!("#{} is unset", entry.key),
    }
}
