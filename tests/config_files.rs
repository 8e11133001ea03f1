//! The configuration as its users meet it: the files in `config/`, the
//! reference, the summary, and that `config show` loses nothing.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use evenkeel::config::{self, Check, Config, Entry, Loaded, Mode, Service, Target, Workers, load};
use proptest::prelude::*;

const REFERENCE: &str = include_str!("../config/reference.toml");
const TCP: &str = include_str!("../config/tcp.toml");
const DEMO: &str = include_str!("../config/demo.toml");

/// A file with nothing to complain about.
const GOOD: &str = r#"
[[listener]]
name = "front"
bind = "127.0.0.1:80"
mode = "tcp"
service = "echo"
"#;

fn right(text: &str) -> Loaded {
    load("a.toml", text).unwrap_or_else(|problems| panic!("{problems}\n{text}"))
}

/// An upstream in use, with one server of this address.
fn server_at(address: &str) -> String {
    format!(
        "[[listener]]\nname = \"front\"\nbind = \"127.0.0.1:80\"\nmode = \"tcp\"\nupstream = \"web\"\n\
         [[upstream]]\nname = \"web\"\n[[upstream.server]]\naddress = \"{address}\"\n"
    )
}

#[test]
fn every_file_in_config_loads_without_a_warning() {
    let mut count = 0;
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/config")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let loaded = load(&path.display().to_string(), &text).unwrap_or_else(|problems| panic!("{problems}"));
        assert!(loaded.warnings.0.is_empty(), "{}", loaded.warnings);
        count += 1;
    }
    assert!(count >= 3);
}

#[test]
fn the_demo_is_a_listener_before_two_servers_of_its_own() {
    let config = right(DEMO).config;
    assert_eq!(config.daemon.workers, Workers::Auto);
    assert_eq!(config.listeners[0].target, Target::Upstream(0));
    for (upstream, mode) in config.upstreams.iter().zip([Mode::Tcp, Mode::Udp]) {
        let servers: Vec<String> = upstream.servers.iter().map(|s| s.address.to_string()).collect();
        let played: Vec<String> = config
            .listeners
            .iter()
            .filter(|listener| listener.mode == mode)
            .filter(|listener| listener.target == Target::Service(Service::Identify))
            .map(|listener| listener.bind[0].to_string())
            .collect();
        assert_eq!(servers, ["127.0.0.1:9001", "127.0.0.1:9002"]);
        assert_eq!(played, servers);
    }
}

/// Every key that was read, by table and name, with its entries.
fn keys(loaded: &Loaded) -> BTreeMap<String, Vec<Entry>> {
    let mut keys: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
    for block in &loaded.blocks {
        let table = block.header.trim_matches(['[', ']']);
        for entry in &block.entries {
            keys.entry(format!("{table}.{}", entry.key)).or_default().push(entry.clone());
        }
    }
    keys
}

/// `#key = value` becomes `key = value`; `# prose` stays.
fn with_unset_keys(text: &str) -> String {
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => rest,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

// A key of the file that the schema does not know is refused by `load`; so
// the other direction is what is left to show.
#[test]
fn the_reference_names_every_key_with_its_default() {
    let as_it_is = keys(&right(REFERENCE));
    let with_unset = keys(&right(&with_unset_keys(REFERENCE)));
    assert!(as_it_is.len() > 30, "only {} keys", as_it_is.len());
    for (key, entries) in &as_it_is {
        let typed: Vec<&Entry> = entries.iter().filter(|entry| entry.line.is_some()).collect();
        for entry in &typed {
            if let Some(default) = &entry.default {
                assert_eq!(entry.value.as_ref(), Some(default), "{key}");
            }
        }
        let has_default = entries[0].default.is_some();
        let named_when_unset = with_unset[key].iter().any(|entry| entry.line.is_some());
        assert!(!typed.is_empty() || (!has_default && named_when_unset), "{key} is not in reference.toml");
    }
}

#[test]
fn what_the_reference_leaves_unset_is_unset() {
    let config = right(REFERENCE).config;
    assert_eq!((config.daemon.user, config.daemon.group, config.daemon.control_socket), (None, None, None));
    assert_eq!(config.listeners[0].interface, None);
    let config = right(&with_unset_keys(REFERENCE)).config;
    assert_eq!(config.daemon.user.as_deref(), Some("evenkeel"));
    assert_eq!(config.listeners[0].interface.as_deref(), Some("eth0"));
}

#[test]
fn defaults_are_those_promised() {
    let config = right(GOOD).config;
    assert_eq!(config.daemon.orphan_timeout, Duration::from_secs(10));
    assert_eq!(config.daemon.drain_timeout, Duration::from_secs(30));
    let listener = &config.listeners[0];
    assert_eq!((listener.backlog, listener.receive_buffer, listener.send_buffer), (4096, None, None));
    assert_eq!(listener.tcp.idle_timeout, Duration::from_secs(3600));
    assert_eq!(listener.tcp.half_close_timeout, Duration::from_secs(60));
    assert_eq!(listener.tcp.keepalive, Duration::from_secs(60));
    assert_eq!((listener.tcp.max_age, listener.tcp.user_timeout), (Duration::ZERO, Duration::ZERO));
    let upstream = &right(&server_at("10.0.0.1:80")).config.upstreams[0];
    assert_eq!((upstream.connect_timeout, upstream.retries), (Duration::from_secs(3), 2));
    assert_eq!((upstream.servers[0].weight, upstream.servers[0].backup), (1, false));
}

#[test]
fn an_upstream_of_datagrams_is_not_checked_unless_the_file_says_so() {
    let config = right(REFERENCE).config;
    assert_eq!(
        config.upstreams.iter().map(|u| u.health.check).collect::<Vec<_>>(),
        [Check::Connect, Check::None]
    );
    let udp = "[[listener]]\nname = \"d\"\nbind = \"127.0.0.1:53\"\nmode = \"udp\"\nupstream = \"dns\"\n\
               [[upstream]]\nname = \"dns\"\n[upstream.health]\ncheck = \"command\"\ncommand = \"/bin/true\"\n\
               [[upstream.server]]\naddress = \"10.0.0.53:53\"\n";
    let health = &right(udp).config.upstreams[0].health;
    assert_eq!((health.check, health.command.as_slice()), (Check::Command, &["/bin/true".to_string()][..]));
}

#[test]
fn bytes_of_an_exchange_are_written_by_escapes() {
    let text = server_at("10.0.0.1:6379")
        .replace("[[upstream.server]]", "[upstream.health]\ncheck = \"exchange\"\nsend = 'PING\\r\\n\\x00\\\\'\nexpect = \"+PONG\"\n[[upstream.server]]");
    let health = &right(&text).config.upstreams[0].health;
    assert_eq!((health.send.as_slice(), health.expect.as_slice()), (&b"PING\r\n\0\\"[..], &b"+PONG"[..]));
}

#[test]
fn networks_and_sources_are_single_texts_or_lists() {
    let text = server_at("10.0.0.1:80")
        .replace("[[upstream]]\n", "[listener.access]\nallow = \"10.0.0.0/8\"\ndeny = [\"10.1.0.0/16\", \"10.2.0.1\", \"fd00::/8\"]\n[[upstream]]\nsource = [\"10.0.0.7\", \"fd00::7\"]\n");
    let config = right(&text).config;
    let shown = |nets: &[ipnet::IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(shown(&config.listeners[0].access.allow), ["10.0.0.0/8"]);
    assert_eq!(shown(&config.listeners[0].access.deny), ["10.1.0.0/16", "10.2.0.1/32", "fd00::/8"]);
    assert_eq!(config.upstreams[0].source.len(), 2);
}

#[test]
fn the_summary_is_short_and_whole() {
    let summary = config::summary(&right(TCP).config);
    assert_eq!(
        summary.to_string(),
        "3 listeners, 4 addresses, 2 upstreams, 5 servers; workers: auto\n  \
         listener web  tcp 0.0.0.0:8080 [::]:8080 -> upstream web\n  \
         listener database  tcp 127.0.0.1:5432 -> upstream database\n  \
         listener alive  tcp 127.0.0.1:8099 -> service identify\n  \
         upstream web  least-connections: 10.0.0.11:80 (weight 2) 10.0.0.12:80 10.0.0.13:80 (backup)\n  \
         upstream database  round-robin: unix:/run/postgresql/.s.PGSQL.5432 10.0.0.21:5432 (backup)"
    );
    let json = serde_json::to_value(&summary).unwrap();
    assert_eq!(json["listeners"][2]["service"], "identify");
    assert_eq!(json["upstreams"][0]["servers"][0]["weight"], 2);
}

#[test]
fn show_names_the_origin_of_every_line() {
    let text = "[daemon]\nworkers = 2\n".to_string() + GOOD;
    let shown = config::show(&right(&text), "/etc/evenkeel/a.toml");
    let head = "[daemon]\n\
                workers = 2               # a.toml:2\n\
                pin_workers = false       # default\n\
                #user is unset            # default\n\
                #group is unset           # default\n\
                #control_socket is unset  # default\n\
                max_connections = 0       # default\n";
    assert!(shown.starts_with(head), "{shown}");
    assert!(shown.contains("bind = \"127.0.0.1:80\"    # a.toml:6\n"), "{shown}");
}

/// What `config show` prints means the same as the file.
fn loads_again(loaded: &Loaded, file_name: &str) {
    let shown = config::show(loaded, file_name);
    let again = load("shown", &shown).unwrap_or_else(|problems| panic!("{problems}\n{shown}"));
    assert_eq!(again.config, loaded.config, "{shown}");
    // As it goes to the workers.
    let json = serde_json::to_string(&loaded.config).expect("a configuration can be JSON");
    assert_eq!(serde_json::from_str::<Config>(&json).expect("and back"), loaded.config);
}

#[test]
fn what_is_shown_loads_again() {
    for text in [DEMO, TCP, REFERENCE, &with_unset_keys(REFERENCE), GOOD] {
        loads_again(&right(text), "a\nb\u{7f}.toml");
    }
}

#[test]
fn a_text_with_odd_characters_is_shown_so_that_it_loads_again() {
    let loaded = right(&server_at(r#"unix:/a\"\\b\u0007\u0085é"#));
    assert_eq!(loaded.config.upstreams[0].servers[0].address.to_string(), "unix:/a\"\\b\u{7}\u{85}é");
    loads_again(&loaded, "a.toml");
}

/// Values that some key takes, and some that none does.
fn values() -> impl Strategy<Value = String> {
    let known = prop::sample::select(vec![
        r#""auto""#,
        "0",
        "1",
        "64",
        "65536",
        "-1",
        r#""0s""#,
        r#""5s""#,
        r#""1m30s""#,
        r#""1h""#,
        "5",
        r#""64KiB""#,
        "true",
        "false",
        r#""tcp""#,
        r#""web""#,
        r#""echo""#,
        r#""round-robin""#,
        r#""error""#,
        r#""least-connections""#,
        r#""127.0.0.1:81""#,
        r#""unix:/a\"\\b\u0007é""#,
        r#""/run/\u0007 é""#,
        r#"["127.0.0.1:81", "[::1]:82"]"#,
        "[]",
        "[[]]",
        "{}",
        "{ a = 1 }",
        "1.5",
        "nan",
        "1979-05-27",
        "0xffffffffffffffff",
        r#""a\u0000b""#,
        r#""""#,
        "'''\nx'''",
        "99999999999999999999999999",
    ]);
    prop_oneof![
        8 => known.prop_map(str::to_string),
        1 => any::<String>().prop_map(|text| format!("{text:?}")),
        1 => any::<String>(),
    ]
}

/// The reference with all keys set and a few lines changed, removed or doubled.
fn mutated() -> impl Strategy<Value = String> {
    let edit = (any::<prop::sample::Index>(), 0..6, values());
    prop::collection::vec(edit, 0..4).prop_map(|edits| {
        let text = with_unset_keys(REFERENCE);
        let mut lines: Vec<String> =
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_string).collect();
        for (index, how, value) in edits {
            let at = index.index(lines.len());
            match (how, lines[at].split_once(" = ")) {
                (0, _) => drop(lines.remove(at)),
                (1, _) => lines.insert(at, lines[at].clone()),
                (_, Some((key, _))) => lines[at] = format!("{key} = {value}"),
                (_, None) => lines[at].push_str(&value),
            }
        }
        lines.join("\n")
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_text_panics(text: String) {
        let _ = load("a.toml", &text);
    }

    #[test]
    fn a_spoilt_file_is_refused_with_places_or_shown_without_loss(text in mutated()) {
        match load("a.toml", &text) {
            Ok(loaded) => loads_again(&loaded, "a.toml"),
            Err(problems) => {
                prop_assert!(!problems.0.is_empty());
                let line_count = text.lines().count() + 1;
                for problem in &problems.0 {
                    prop_assert!((1..=line_count).contains(&problem.line) && problem.column >= 1, "{}", problem);
                    prop_assert!(!problem.message.is_empty() && !problem.help.is_empty(), "{}", problem);
                    prop_assert!(!problem.message.chars().any(char::is_control), "{:?}", problem);
                    prop_assert!(!problem.help.chars().any(char::is_control), "{:?}", problem);
                }
            }
        }
    }

    #[test]
    fn text_put_anywhere_never_panics(from: prop::sample::Index, length in 0..40usize, put: String) {
        let from = from.index(REFERENCE.len());
        let to = (from + length).min(REFERENCE.len());
        let (Some(head), Some(tail)) = (REFERENCE.get(..from), REFERENCE.get(to..)) else { return Ok(()) };
        let _ = load("a.toml", &format!("{head}{put}{tail}"));
    }
}
