//! A configuration that another version wrote.
//!
//! Between images of one daemon it travels as the JSON of `Config`. Keys that
//! the writer did not know get the values that a file without them would have
//! had; what it knew and we do not is passed over. Only where a key has come to
//! mean something else can it not be read.

use serde_json::Value;

use super::Config;

/// A file in which nearly everything is left to the defaults.
const LEAST: &str = "[[listener]]\nname = \"a\"\nmode = \"tcp\"\nbind = \"127.0.0.1:1\"\nupstream = \"u\"\n\
    [[upstream]]\nname = \"u\"\n[[upstream.server]]\naddress = \"127.0.0.1:2\"\n";

/// Reads it.
pub fn read_older(json: &[u8]) -> Result<Config, serde_json::Error> {
    let mut value: Value = serde_json::from_slice(json)?;
    let defaults = super::load("defaults", LEAST).expect("a good file").config;
    complete(&mut value, &serde_json::to_value(defaults).expect("plain data"));
    serde_json::from_value(value)
}

/// Puts in what is missing; every entry of a list is like the first one of the
/// defaults.
fn complete(value: &mut Value, defaults: &Value) {
    match (value, defaults) {
        (Value::Object(own), Value::Object(defaults)) => {
            for (key, default) in defaults {
                // A capital is a variant's name: one is there, and is enough.
                if key.starts_with(char::is_uppercase) {
                    continue;
                }
                match own.get_mut(key) {
                    Some(value) => complete(value, default),
                    None => drop(own.insert(key.clone(), default.clone())),
                }
            }
        }
        (Value::Array(own), Value::Array(defaults)) => {
            let Some(first) = defaults.first() else { return };
            own.iter_mut().for_each(|value| complete(value, first));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes every key away once, wherever it is, and asks whether the rest is
    /// still read.
    fn without_each(value: &Value, path: &mut Vec<String>, visit: &mut impl FnMut(&[String])) {
        match value {
            Value::Object(entries) => {
                for (key, inner) in entries.iter().filter(|(key, _)| !key.starts_with(char::is_uppercase)) {
                    path.push(key.clone());
                    visit(path);
                    without_each(inner, path, visit);
                    path.pop();
                }
            }
            Value::Array(entries) => {
                for (index, inner) in entries.iter().enumerate() {
                    path.push(index.to_string());
                    without_each(inner, path, visit);
                    path.pop();
                }
            }
            _ => {}
        }
    }

    fn remove(value: &mut Value, path: &[String]) {
        match (value, path) {
            (Value::Object(entries), [key]) => drop(entries.remove(key)),
            (Value::Object(entries), [key, rest @ ..]) => remove(&mut entries[key], rest),
            (Value::Array(entries), [index, rest @ ..]) => {
                remove(&mut entries[index.parse::<usize>().unwrap()], rest);
            }
            _ => unreachable!("a path of this value"),
        }
    }

    #[test]
    fn a_configuration_without_any_one_key_is_read() {
        let text = LEAST.to_string()
            + "[[listener]]\nname = \"b\"\nmode = \"udp\"\nbind = [\"127.0.0.1:3\"]\nservice = \"echo\"\n";
        let config = super::super::load("test", &text).unwrap().config;
        let whole = serde_json::to_value(&config).unwrap();
        let mut count = 0;
        without_each(&whole, &mut Vec::new(), &mut |path| {
            let mut less = whole.clone();
            remove(&mut less, path);
            let read = read_older(&serde_json::to_vec(&less).unwrap());
            assert!(read.is_ok(), "without {path:?}: {}", read.unwrap_err());
            count += 1;
        });
        assert!(count > 50, "{count} keys");
        assert_eq!(read_older(&serde_json::to_vec(&whole).unwrap()).unwrap(), config);
    }

    #[test]
    fn what_is_unknown_is_passed_over() {
        let config = super::super::load("test", LEAST).unwrap().config;
        let mut more = serde_json::to_value(&config).unwrap();
        more["daemon"]["of_a_later_version"] = Value::Bool(true);
        more["listeners"][0]["also"] = Value::Null;
        assert_eq!(read_older(&serde_json::to_vec(&more).unwrap()).unwrap(), config);
        assert!(read_older(b"{\"daemon\":7}").is_err());
    }
}
