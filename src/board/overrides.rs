//! What the operator changed at run time, beside the file.
//!
//! Owned by the supervisor, told to every steward in full. It outlives
//! stewards, reloads and upgrades; what it says of servers that a new file no
//! longer has is dropped. Bounded by the servers of the configuration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Admin;
use crate::config::{Config, did_you_mean, no_such};

/// What a caller asks for one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Nothing new; what is there stays.
    Drain,
    /// Nothing new, and not checked.
    Disable,
    /// As the file has it.
    Ready,
    /// Another weight than the file's.
    Weight(u32),
}

/// How one server differs from the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Override {
    /// Draining or disabled.
    pub is_draining: bool,
    /// Not used and not checked.
    pub is_disabled: bool,
    /// Its weight.
    pub weight: Option<u32>,
}

/// Every server that differs, by the upstream's name and the server's address
/// as the file writes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides(BTreeMap<(String, String), Override>);

impl Override {
    /// What it makes of the server.
    pub fn admin(&self) -> Admin {
        match (self.is_disabled, self.is_draining) {
            (true, _) => Admin::Disabled,
            (false, true) => Admin::Draining,
            (false, false) => Admin::Ready,
        }
    }
}

impl Overrides {
    /// Takes a change in. What to tell the caller, or why not.
    pub fn handle_change(
        &mut self,
        config: &Config,
        upstream: &str,
        server: &str,
        change: Change,
    ) -> Result<String, String> {
        find(config, upstream, server)?;
        let name = (upstream.to_string(), server.to_string());
        let own = self.0.entry(name.clone()).or_default();
        let text = match change {
            Change::Drain => {
                (own.is_draining, own.is_disabled) = (true, false);
                format!("{upstream}/{server} gets nothing new; what it has goes on")
            }
            Change::Disable => {
                (own.is_draining, own.is_disabled) = (false, true);
                format!("{upstream}/{server} gets nothing new and is not checked")
            }
            Change::Ready => {
                *own = Override::default();
                format!("{upstream}/{server} is as the file has it")
            }
            Change::Weight(weight) => {
                own.weight = Some(weight);
                format!("{upstream}/{server} has weight {weight}")
            }
        };
        if *own == Override::default() {
            self.0.remove(&name);
        }
        Ok(text)
    }

    /// How a server differs.
    pub fn get(&self, upstream: &str, server: &str) -> Override {
        self.0.get(&(upstream.to_string(), server.to_string())).copied().unwrap_or_default()
    }

    /// Forgets servers that a configuration does not have, and says which.
    pub fn keep_those_of(&mut self, config: &Config) -> Vec<String> {
        let mut gone = Vec::new();
        self.0.retain(|(upstream, server), _| {
            let stays = find(config, upstream, server).is_ok();
            if !stays {
                gone.push(format!("{upstream}/{server}"));
            }
            stays
        });
        gone
    }

    /// All of them as plain data.
    pub fn list(&self) -> Vec<(String, String, Override)> {
        self.0.iter().map(|((upstream, server), own)| (upstream.clone(), server.clone(), *own)).collect()
    }

    /// Overrides from plain data.
    pub fn from_list(list: Vec<(String, String, Override)>) -> Overrides {
        Overrides(list.into_iter().map(|(upstream, server, own)| ((upstream, server), own)).collect())
    }
}

/// Whether a configuration has this server; the error says what it has.
fn find(config: &Config, upstream: &str, server: &str) -> Result<(), String> {
    let names: Vec<&str> = config.upstreams.iter().map(|upstream| upstream.name.as_str()).collect();
    let Some(found) = config.upstreams.iter().find(|other| other.name == upstream) else {
        return Err(no_such("upstream", upstream, &names));
    };
    let addresses: Vec<String> = found.servers.iter().map(|server| server.address.to_string()).collect();
    if addresses.iter().any(|address| address == server) {
        return Ok(());
    }
    let known: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let otherwise = format!("it has: {}", known.join(", "));
    let text = format!("upstream \"{upstream}\" has no server \"{server}\"");
    Err(format!("{text}\n  {}", did_you_mean(server, &known, &otherwise)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let text = "[[listener]]\nname = \"a\"\nmode = \"tcp\"\nbind = \"127.0.0.1:1\"\nupstream = \"web\"\n\
             [[upstream]]\nname = \"web\"\n[[upstream.server]]\naddress = \"127.0.0.1:9001\"\n\
             [[upstream.server]]\naddress = \"127.0.0.1:9002\"\n";
        crate::config::load("test", text).expect("a sane configuration").config
    }

    #[test]
    fn ready_brings_back_what_the_file_says() {
        let (config, mut overrides) = (config(), Overrides::default());
        let mut change = |change| overrides.handle_change(&config, "web", "127.0.0.1:9001", change).unwrap();
        change(Change::Weight(7));
        change(Change::Drain);
        change(Change::Disable);
        let own = overrides.get("web", "127.0.0.1:9001");
        assert_eq!((own.admin(), own.weight), (Admin::Disabled, Some(7)));
        assert_eq!(overrides, Overrides::from_list(overrides.list()));
        overrides.handle_change(&config, "web", "127.0.0.1:9001", Change::Ready).unwrap();
        assert_eq!(overrides, Overrides::default());
    }

    #[test]
    fn an_unknown_server_is_answered_by_what_there_is() {
        let (config, mut overrides) = (config(), Overrides::default());
        let mut ask =
            |upstream, server| overrides.handle_change(&config, upstream, server, Change::Drain).unwrap_err();
        assert_eq!(ask("wbe", "x"), "no upstream \"wbe\"\n  did you mean \"web\"?");
        assert_eq!(ask("backend", "x"), "no upstream \"backend\"\n  there are: web");
        assert_eq!(
            ask("web", "127.0.0.1:9003"),
            "upstream \"web\" has no server \"127.0.0.1:9003\"\n  did you mean \"127.0.0.1:9001\"?"
        );
        let other = ask("web", "10.0.0.1:80");
        assert!(other.ends_with("it has: 127.0.0.1:9001, 127.0.0.1:9002"), "{other}");
        assert_eq!(overrides, Overrides::default());
    }

    #[test]
    fn a_server_that_is_gone_takes_its_override_with_it() {
        let (mut config, mut overrides) = (config(), Overrides::default());
        overrides.handle_change(&config, "web", "127.0.0.1:9001", Change::Drain).unwrap();
        overrides.handle_change(&config, "web", "127.0.0.1:9002", Change::Drain).unwrap();
        config.upstreams[0].servers.remove(0);
        assert_eq!(overrides.keep_those_of(&config), ["web/127.0.0.1:9001"]);
        assert_eq!(overrides.list().len(), 1);
    }
}
