//! What a new configuration would change, before it is brought into force.
//!
//! Pure: two configurations in, lines for the operator or a refusal out.

use super::Refusal;
use crate::config::{Config, Target};

/// What changes, a line each; empty where nothing does.
pub fn changes(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    if old.daemon != new.daemon {
        lines.push("[daemon] changes".to_string());
    }
    if old.log != new.log {
        lines.push("[log] changes".to_string());
    }
    let listeners = |config: &Config| {
        let entries = config.listeners.iter().map(|listener| {
            // An upstream's number says nothing: it may only have moved.
            let target = match listener.target {
                Target::Upstream(index) => config.upstreams[index].name.clone(),
                Target::Service(service) => format!("{service:?}"),
            };
            let mut plain = listener.clone();
            plain.target = Target::Upstream(0);
            (listener.name.clone(), format!("{target} {plain:?}"))
        });
        entries.collect::<Vec<_>>()
    };
    compare("listener", &listeners(old), &listeners(new), &mut lines);
    let upstreams = |config: &Config| {
        let entries =
            config.upstreams.iter().map(|upstream| (upstream.name.clone(), format!("{upstream:?}")));
        entries.collect::<Vec<_>>()
    };
    compare("upstream", &upstreams(old), &upstreams(new), &mut lines);
    lines
}

fn compare(kind: &str, old: &[(String, String)], new: &[(String, String)], lines: &mut Vec<String>) {
    for (name, content) in new {
        match old.iter().find(|(old, _)| old == name) {
            None => lines.push(format!("{kind} {name} is new")),
            Some((_, before)) if before != content => lines.push(format!("{kind} {name} changes")),
            Some(_) => {}
        }
    }
    for (name, _) in old {
        if !new.iter().any(|(new, _)| new == name) {
            lines.push(format!("{kind} {name} goes"));
        }
    }
}

/// Refuses what only a restart can change.
pub fn check(old: &Config, new: &Config) -> Result<(), Refusal> {
    let (before, after) = (&old.daemon, &new.daemon);
    let fixed = [
        ("control_socket", before.control_socket != after.control_socket),
        ("user", before.user != after.user),
        ("group", before.group != after.group),
    ];
    match fixed.into_iter().find(|(_, changed)| *changed) {
        None => Ok(()),
        Some((key, _)) => Err(Refusal::new(
            78,
            format!("{key} cannot change while the daemon runs"),
            "put the old value back, or restart",
        )),
    }
}

/// Keeps what still has sessions: a listener that is gone from the file stays
/// without an address, with its upstream, until its last session has ended.
pub fn carry_over(old: &Config, new: &mut Config, has_sessions: impl Fn(&str) -> bool) {
    for listener in &old.listeners {
        if new.listeners.iter().any(|other| other.name == listener.name) || !has_sessions(&listener.name) {
            continue;
        }
        let mut kept = listener.clone();
        kept.bind.clear();
        if let Target::Upstream(index) = listener.target {
            let upstream = &old.upstreams[index];
            let known = new.upstreams.iter().position(|other| other.name == upstream.name);
            kept.target = Target::Upstream(known.unwrap_or_else(|| {
                new.upstreams.push(upstream.clone());
                new.upstreams.len() - 1
            }));
        }
        new.listeners.push(kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "[[listener]]\nname = \"a\"\nmode = \"tcp\"\nbind = \"127.0.0.1:1\"\nupstream = \"u\"\n\
        [[upstream]]\nname = \"u\"\n[[upstream.server]]\naddress = \"127.0.0.1:9\"\n";

    fn config(text: &str) -> Config {
        crate::config::load("test", text).expect("a sane configuration").config
    }

    #[test]
    fn each_difference_is_named() {
        let old = config(ONE);
        let more = ONE.replace("127.0.0.1:9", "127.0.0.1:8")
            + "[[listener]]\nname = \"b\"\nmode = \"tcp\"\nbind = \"127.0.0.1:2\"\nservice = \"echo\"\n";
        assert_eq!(changes(&old, &old), Vec::<String>::new());
        assert_eq!(changes(&old, &config(&more)), ["listener b is new", "upstream u changes"]);
        assert_eq!(changes(&config(&more), &old), ["listener b goes", "upstream u changes"]);
    }

    #[test]
    fn a_listener_with_sessions_stays_without_an_address() {
        let old = config(ONE);
        let new = "[[listener]]\nname = \"b\"\nmode = \"tcp\"\nbind = \"127.0.0.1:2\"\nservice = \"echo\"\n";
        let mut kept = config(new);
        carry_over(&old, &mut kept, |name| name == "a");
        assert_eq!((kept.listeners[1].name.as_str(), kept.listeners[1].bind.len()), ("a", 0));
        assert_eq!(kept.listeners[1].target, Target::Upstream(0));
        assert_eq!(kept.upstreams[0].name, "u");
        let mut gone = config(new);
        carry_over(&old, &mut gone, |_| false);
        assert_eq!(gone, config(new));
    }

    #[test]
    fn what_needs_a_restart_is_refused() {
        let old = config(ONE);
        let new = config(&format!("[daemon]\nuser = \"nobody\"\n{ONE}"));
        assert_eq!(check(&old, &new).unwrap_err().text, "user cannot change while the daemon runs");
    }
}
