//! Modules import downwards only. The table is the law; a module that is not
//! in it fails the test, so a new one has to be given its place.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Floor of each top-level module. On floor 3 they never import each other;
/// elsewhere a module may use its own floor.
const FLOORS: &[(&str, u8)] = &[
    ("main", 4),
    ("cli", 4),
    ("supervisor", 3),
    ("worker", 3),
    ("steward", 3),
    ("loadgen", 3),
    ("doctor", 3),
    ("control", 2),
    ("config", 1),
    ("balance", 1),
    ("board", 1),
    ("relay", 1),
    ("flow", 1),
    ("supervision", 1),
    ("access_log", 1),
    ("counters", 1),
    ("spread", 1),
    ("steering", 1),
    ("deadline", 1),
    ("slab", 1),
    ("explain", 1),
    ("handover", 1),
    ("keep", 1),
    ("health", 1),
    ("access", 1),
    ("proxy_protocol", 1),
    ("sources", 1),
    ("ports", 1),
    ("sys", 0),
    ("units", 0),
    ("logging", 0),
];

#[test]
fn modules_import_downwards_only() {
    let floors: BTreeMap<&str, u8> = FLOORS.iter().copied().collect();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for path in rust_files(Path::new("src")) {
        let module = module_of(&path);
        if module == "lib" {
            continue;
        }
        let Some(&floor) = floors.get(module.as_str()) else {
            wrong.push(format!("{}: module {module} has no floor", path.display()));
            continue;
        };
        let text = fs::read_to_string(&path).expect("a source file is text");
        for target in crate_paths(&text) {
            seen += 1;
            if target == module {
                continue;
            }
            let Some(&below) = floors.get(target.as_str()) else {
                wrong.push(format!("{}: {target} has no floor", path.display()));
                continue;
            };
            if below > floor || (below == floor && floor == 3) {
                wrong.push(format!("{}: floor {floor} imports {target} of floor {below}", path.display()));
            }
        }
    }
    // Imports of our own modules exist in any tree worth checking.
    println!("{seen} imports seen");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_stands_only_in_sys() {
    for path in rust_files(Path::new("src")) {
        if module_of(&path) == "sys" {
            continue;
        }
        let text = fs::read_to_string(&path).expect("a source file is text");
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            let bad = code.contains("unsafe ")
                || (code.contains("allow(unsafe_code)") && module_of(&path) != "lib");
            assert!(!bad, "{}:{}: {line}", path.display(), number + 1);
        }
    }
}

fn module_of(path: &Path) -> String {
    let inner = path.strip_prefix("src").expect("below src");
    let first = inner.components().next().expect("a file has a name").as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_string()
}

/// The first segments after `crate::` and `evenkeel::`, braces included.
fn crate_paths(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or("");
        for marker in ["crate::", "evenkeel::"] {
            for (at, _) in code.match_indices(marker) {
                let rest = &code[at + marker.len()..];
                let names: Vec<&str> = match rest.strip_prefix('{') {
                    Some(list) => list.split([',', '}']).map(str::trim).collect(),
                    None => vec![rest],
                };
                for name in names {
                    let word: String =
                        name.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                    if !word.is_empty() {
                        found.push(word);
                    }
                }
            }
        }
    }
    found
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("the source folder can be read") {
        let path = entry.expect("a folder entry").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}
