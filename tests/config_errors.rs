//! What is told of a configuration that is wrong: the exact words, the place,
//! and everything at once.

use std::time::Duration;

use evenkeel::config::{Loaded, load};

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

fn complaints(text: &str) -> String {
    load("a.toml", text).expect_err("the file is wrong").to_string()
}

fn warnings(text: &str) -> String {
    right(text).warnings.to_string()
}

/// A listener with these lines, in a file that is right without them.
fn listener_with(lines: &str) -> String {
    format!("[[listener]]\nname = \"front\"\nmode = \"tcp\"\nservice = \"echo\"\n{lines}\n")
}

/// An upstream in use, with one server of this address.
fn server_at(address: &str) -> String {
    format!(
        "[[listener]]\nname = \"front\"\nbind = \"127.0.0.1:80\"\nmode = \"tcp\"\nupstream = \"web\"\n\
         [[upstream]]\nname = \"web\"\n[[upstream.server]]\naddress = \"{address}\"\n"
    )
}

#[test]
fn all_errors_of_a_file_are_told_at_once() {
    let text = r#"
[daemon]
worker = 4
drain_timeout = 30

[[listener]]
name = "front"
bind = ["0.0.0.0:80", "127.0.0.1:80"]
mode = "tpc"
upstream = "wbe"

[listener.tcp]
idle_timeout = "5x"

[[upstream]]
name = "web"
"#;
    assert_eq!(
        complaints(text),
        r#"a.toml:3:1: unknown key "worker" in [daemon]
  did you mean "workers"?
a.toml:4:17: drain_timeout = 30 has no unit
  say which unit, in quotes: "30s" or "30ms"
a.toml:8:23: 127.0.0.1:80 overlaps 0.0.0.0:80 of line 8
  the kernel gives all traffic for 127.0.0.1:80 to the socket of that very address: bind either all or single addresses on port 80
a.toml:9:8: mode = "tpc" is not known
  did you mean "tcp"?
a.toml:10:12: upstream = "wbe" is not an upstream
  did you mean "web"?
a.toml:13:16: idle_timeout = "5x" is not a duration
  write whole numbers with ms, s, m, h or d: "250ms", "5s", "1m30s"
a.toml:16:8: upstream "web" has no servers
  add a [[upstream.server]] table, or take the upstream out"#
    );
}

#[test]
fn problems_are_json_with_their_place() {
    let problems = load("a.toml", "[daemon]\nworkers = 0\n").unwrap_err();
    assert_eq!(
        serde_json::to_value(&problems).unwrap(),
        serde_json::json!([
            { "file": "a.toml", "line": 1, "column": 1, "message": "there is no listener",
              "help": "add a [[listener]] with name, bind, mode and upstream" },
            { "file": "a.toml", "line": 2, "column": 11, "message": "workers = 0 is out of range",
              "help": "write \"auto\" or a number from 1 to 64" },
        ])
    );
}

#[test]
fn an_upstream_without_servers_names_who_uses_it() {
    let text = "[[listener]]\nname = \"front\"\nbind = \"127.0.0.1:80\"\nmode = \"tcp\"\nupstream = \"web\"\n\
                [[upstream]]\nname = \"web\"\n";
    assert_eq!(
        complaints(text),
        "a.toml:7:8: upstream \"web\" has no servers\n  \
         add a [[upstream.server]] table, or point listener \"front\" elsewhere"
    );
}

#[test]
fn a_listener_that_lacks_everything_is_told_so() {
    assert_eq!(
        complaints("[[listener]]\n"),
        r#"a.toml:1:1: [[listener]] has no name
  add: name = "web"
a.toml:1:1: [[listener]] has no bind
  add: bind = "0.0.0.0:8080"
a.toml:1:1: [[listener]] has no mode
  add: mode = "tcp"
a.toml:1:1: [[listener]] has neither upstream nor service
  add upstream = "NAME", or service = "echo""#
    );
}

#[test]
fn every_mistake_in_toml_itself_is_told_by_place() {
    let help =
        "  texts stand in double quotes, a table's name in [brackets], a key and its value on one line";
    assert_eq!(
        complaints("[daemon]\nworkers = \n[log]\nlevel = info\n"),
        format!(
            "a.toml:2:11: not TOML: string values must be quoted, expected literal string\n{help}\n\
             a.toml:4:9: not TOML: invalid float, expected `inf`\n{help}"
        )
    );
    assert_eq!(
        complaints("[daemon]\nworkers = 1\nworkers = 2\n"),
        "a.toml:3:1: key \"workers\" is there twice\n  \
         take one of the two out; a table that may occur several times has two brackets: [[listener]]"
    );
}

/// A file whose upstream and listener have these lines more.
fn with_lines(listener: &str, upstream: &str) -> String {
    server_at("10.0.0.1:80")
        .replace("[[upstream]]\n", &format!("{listener}[[upstream]]\n"))
        .replace("[[upstream.server]]\n", &format!("{upstream}[[upstream.server]]\n"))
}

#[test]
fn what_stands_at_the_edges_of_a_session_is_judged() {
    for (listener, upstream, complaint) in [
        (
            "[listener.tcp]\naccept_proxy = \"on\"\n",
            "",
            "a.toml:2:8: listener \"front\" has accept_proxy = \"on\" and trusts nobody\n  \
             name the load balancers in front: trusted = [\"10.0.0.0/8\"]",
        ),
        (
            "[listener.access]\ndeny = [\"10.0.0.1/8\"]\n",
            "",
            "a.toml:7:9: deny = \"10.0.0.1/8\" has bits set that its prefix does not cover\n  \
             this network is written \"10.0.0.0/8\"",
        ),
        (
            "",
            "[upstream.health]\ncheck = \"command\"\n",
            "a.toml:7:8: upstream \"web\" has check = \"command\" and no command\n  \
             write command = [\"/path/of/program\"]",
        ),
        (
            "",
            "[upstream.health]\ncheck = \"exchange\"\n",
            "a.toml:7:8: upstream \"web\" has check = \"exchange\" without send and expect\n  \
             write send, expect or both; to connect alone is check = \"connect\"",
        ),
        (
            "",
            "[upstream.health]\nexpect_status = [\"200-99\"]\n",
            "a.toml:9:18: expect_status = \"200-99\" is not a range of status codes\n  \
             write \"200\" or \"200-399\"",
        ),
        (
            "",
            "[upstream.health]\nsend = 'a\\q'\n",
            "a.toml:9:8: send = \"a\\\\q\" has an escape that is not known\n  \
             write bytes as \\xNN, and \\r, \\n, \\t or \\\\; in TOML a text in single quotes keeps its backslashes",
        ),
        (
            "",
            "source = \"10.0.0.7:80\"\n",
            "a.toml:8:10: source = \"10.0.0.7:80\" is not an IP address\n  write it without a port, like \"10.0.0.7\"",
        ),
    ] {
        assert_eq!(complaints(&with_lines(listener, upstream)), complaint);
    }
}

#[test]
fn a_server_address_that_is_none_says_what_it_is() {
    for (address, complaint) in [
        (
            "web.example",
            "has no port\n  write \"web.example:PORT\", or \"srv:_service._tcp.web.example\" where SRV records tell it",
        ),
        ("web.example:http", "has a wrong port\n  a port is a number from 1 to 65535"),
        (
            "srv:web.example",
            "is not the name of SRV records\n  write \"srv:_http._tcp.example.net\" (RFC 2782)",
        ),
        ("10.0.0.256:80", "is not an address\n  write it as \"10.0.0.1:80\" or \"[::1]:80\""),
        ("10.0.0.1", "has no port\n  write \"10.0.0.1:PORT\""),
        ("::1", "has no port\n  write \"[::1]:PORT\""),
        ("10.0.0.1:70000", "has a wrong port\n  a port is a number from 1 to 65535"),
        ("10.0.0.1:0", "has port 0\n  write the server's port, 1 to 65535"),
        ("0.0.0.0:80", "is not the address of one host\n  write the server's own address"),
        ("unix:run/web", "is not an absolute path\n  start it with \"/\""),
        ("/run/web", "is a path\n  put \"unix:\" in front of it"),
        (":80", "has no host\n  write the address in front of the port: \"10.0.0.1:80\""),
        ("", "is not an address\n  write it as \"10.0.0.1:80\" or \"[::1]:80\""),
    ] {
        assert_eq!(
            complaints(&server_at(address)),
            format!("a.toml:9:11: address = \"{address}\" {complaint}")
        );
    }
    for address in [
        "10.0.0.1:80",
        "[::1]:80",
        "[fe80::1%2]:80",
        "unix:/run/web",
        "web.example:80",
        "srv:_http._tcp.web.example",
    ] {
        let config = right(&server_at(address)).config;
        assert_eq!(config.upstreams[0].servers[0].address.to_string(), address);
    }
}

#[test]
fn a_socket_path_ends_where_the_kernel_does() {
    let path = |bytes: usize| format!("unix:/{}", "x".repeat(bytes - 1));
    right(&server_at(&path(107)));
    let problems = load("a.toml", &server_at(&path(108))).unwrap_err();
    assert_eq!(problems.0[0].help, "the path of a socket has at most 107 bytes");
}

#[test]
fn addresses_that_overlap_are_refused_and_others_are_not() {
    let two = |first: &str, second: &str| listener_with(&format!("bind = [\"{first}\", \"{second}\"]"));
    assert_eq!(
        complaints(&two("127.0.0.1:80", "127.0.0.1:80")),
        "a.toml:5:25: 127.0.0.1:80 is bound twice\n  it is in line 5 already: take one of them out"
    );
    for (first, second) in [("127.0.0.1:80", "0.0.0.0:80"), ("[::]:80", "[::1]:80")] {
        assert!(complaints(&two(first, second)).contains("overlaps"), "{first} {second}");
    }
    for (first, second) in [
        ("0.0.0.0:80", "[::]:80"),
        ("0.0.0.0:80", "[::1]:80"),
        ("127.0.0.1:80", "127.0.0.2:80"),
        ("0.0.0.0:80", "127.0.0.1:81"),
    ] {
        right(&two(first, second));
    }
}

#[test]
fn two_listeners_share_an_address_only_on_two_interfaces() {
    let second = |interface: &str| {
        let first = listener_with("bind = \"0.0.0.0:80\"\ninterface = \"eth0\"");
        first + &listener_with(&format!("bind = \"0.0.0.0:80\"\n{interface}")).replace("front", "other")
    };
    right(&second("interface = \"eth1\""));
    assert!(complaints(&second("interface = \"eth0\"")).contains("0.0.0.0:80 is bound twice"));
    assert!(complaints(&second("")).contains("0.0.0.0:80 is bound twice"));
}

#[test]
fn names_are_unique_and_fit_to_be_labels() {
    let twice = format!("{GOOD}{}", listener_with("bind = \"127.0.0.1:81\""));
    assert_eq!(
        complaints(&twice),
        "a.toml:8:8: listener \"front\" is there twice\n  \
         the first is in line 3: give one of them another name"
    );
    for name in ["", "a b", "a\\\"", "é", "a/b", &"x".repeat(65)] {
        let text = GOOD.replace("front", name);
        assert!(complaints(&text).contains("is not a name"), "{name}");
    }
    right(&GOOD.replace("front", &"x".repeat(64)));
}

#[test]
fn a_target_is_an_upstream_or_a_service() {
    assert_eq!(
        complaints(&GOOD.replace("service = \"echo\"", "")),
        "a.toml:3:8: listener \"front\" has neither upstream nor service\n  \
         add upstream = \"NAME\", or service = \"echo\""
    );
    let both =
        server_at("10.0.0.1:80").replace("upstream = \"web\"", "upstream = \"web\"\nservice = \"echo\"");
    assert_eq!(
        complaints(&both),
        "a.toml:2:8: listener \"front\" has both upstream and service\n  keep one of the two"
    );
}

#[test]
fn one_address_to_leave_from_not_two() {
    let both = server_at("10.0.0.1:80")
        .replace("name = \"web\"\n", "name = \"web\"\ntransparent = true\nsource = \"10.0.0.9\"\n");
    let told = complaints(&both);
    assert!(told.contains("upstream \"web\" has both transparent = true and source\n"), "{told}");
}

#[test]
fn servers_that_can_never_be_picked_are_refused() {
    let idle = server_at("10.0.0.1:80") + "weight = 0\n";
    assert_eq!(
        complaints(&idle),
        "a.toml:7:8: all servers of upstream \"web\" have weight 0\n  \
         nothing would ever be sent: give at least one a weight of 1 or more"
    );
    right(&(server_at("10.0.0.1:80") + "backup = true\n"));
    let twice = server_at("10.0.0.1:80") + "[[upstream.server]]\naddress = \"10.0.0.1:80\"\n";
    assert_eq!(
        complaints(&twice),
        "a.toml:11:11: upstream \"web\" has the server 10.0.0.1:80 twice\n  \
         it is in line 9 already: for a larger share give it a weight"
    );
}

#[test]
fn what_is_hardly_meant_is_a_warning() {
    let unused =
        format!("{GOOD}[[upstream]]\nname = \"web\"\n[[upstream.server]]\naddress = \"10.0.0.1:80\"\n");
    assert_eq!(
        warnings(&unused),
        "a.toml:8:8: upstream \"web\" is used by no listener\n  name it in a listener, or take it out"
    );
    let circle = "a.toml:9:11: server 127.0.0.1:80 is listener \"front\" itself\n  \
                  every connection would go round in circles: write the server's own address";
    assert_eq!(warnings(&server_at("127.0.0.1:80")), circle);
    assert_eq!(warnings(&server_at("127.0.0.1:80").replacen("127.0.0.1", "0.0.0.0", 1)), circle);
    assert_eq!(warnings(&server_at("127.0.0.2:80")), "");
}

#[test]
fn values_out_of_range_name_the_range() {
    for (lines, complaint) in [
        ("backlog = 0", "backlog = 0 is out of range\n  write a number from 1 to 65535"),
        ("backlog = \"9\"", "backlog = \"9\" is a text\n  write it without quotes: 9"),
        ("backlog = 1.5", "backlog = 1.5 is not a whole number\n  write a number from 1 to 65535"),
        (
            "receive_buffer = 64",
            "receive_buffer = 64 has no unit\n  say which unit, in quotes: \"64B\" or \"64KiB\"",
        ),
        (
            "send_buffer = \"1B\"",
            "send_buffer = \"1B\" is too small\n  write \"auto\", or \"4KiB\" to \"512MiB\"",
        ),
        (
            "send_buffer = \"64kB\"",
            "send_buffer = \"64kB\" is not a size\n  \
             write \"auto\", or a whole number with B, KiB, MiB or GiB: \"64KiB\"",
        ),
        (
            "interface = \"sixteen-letters-\"",
            "interface = \"sixteen-letters-\" is not an interface\n  \
             write its name of 1 to 15 bytes as `ip link` shows it, like \"eth0\"",
        ),
        ("freebind = \"true\"", "freebind = \"true\" is a text\n  write it without quotes: true"),
        (
            "tcp.keepalive = \"500ms\"",
            "keepalive = \"500ms\" has a fraction of a second\n  the kernel takes whole seconds here",
        ),
        (
            "tcp.user_timeout = \"30d\"",
            "user_timeout = \"30d\" is too long\n  write \"0s\" to \"24d20h31m23s647ms\"",
        ),
        ("services = \"x\"", "unknown key \"services\" in [[listener]]\n  did you mean \"service\"?"),
    ] {
        let told = complaints(&listener_with(&format!("bind = \"127.0.0.1:80\"\n{lines}")));
        let (_, message) = told.split_once(": ").unwrap();
        assert_eq!(message, complaint);
    }
}

#[test]
fn a_connect_timeout_of_zero_is_refused_and_a_drain_timeout_is_not() {
    let text = server_at("10.0.0.1:80")
        .replace("[[upstream.server]]", "connect_timeout = \"0s\"\n[[upstream.server]]");
    assert_eq!(
        complaints(&text),
        "a.toml:8:19: connect_timeout = \"0s\" is too short\n  write \"1ms\" to \"365d\""
    );
    let config = right(&format!("daemon.drain_timeout = \"0s\"\n{GOOD}")).config;
    assert_eq!(config.daemon.drain_timeout, Duration::ZERO);
}

#[test]
fn unknown_tables_are_refused_like_unknown_keys() {
    assert_eq!(
        complaints(&format!("[deamon]\nworkers = 2\n[limits]\n{GOOD}[listener.quic]\n")),
        "a.toml:1:2: unknown key \"deamon\" at the top level\n  did you mean \"daemon\"?\n\
         a.toml:3:2: unknown key \"limits\" at the top level\n  a file takes daemon, log, upstream, listener\n\
         a.toml:10:11: unknown key \"quic\" in [[listener]]\n  \
         [[listener]] takes name, bind, mode, upstream, service, steering, backlog, receive_buffer, send_buffer, \
         interface, transparent, freebind, tcp, udp, limits, access"
    );
}

#[test]
fn a_key_below_the_wrong_header_is_told_where_it_belongs() {
    let help =
        |table: &str| format!("it belongs in {table}: write it below that header, before the next one");
    let first_help = |text: &str| load("a.toml", text).unwrap_err().0[0].help.clone();
    assert_eq!(first_help(&format!("workers = 2\n{GOOD}")), help("[daemon]"));
    assert_eq!(first_help(&format!("{GOOD}idle_timeout = \"5s\"\n")), help("[listener.tcp]"));
    assert_eq!(first_help(&format!("{GOOD}[listener.tcp]\nbacklog = 9\n")), help("[[listener]]"));
    assert_eq!(first_help(&(server_at("10.0.0.1:80") + "retries = 1\n")), help("[[upstream]]"));
    // Another table's key altogether is no more than unknown.
    assert!(first_help(&format!("{GOOD}[log]\nretries = 1\n")).starts_with("[log] takes level"));
}

#[test]
fn a_table_of_the_wrong_sort_says_which_brackets() {
    assert_eq!(
        complaints(&GOOD.replace("[[listener]]", "[listener]")),
        "a.toml:2:1: listener is a single table\n  there may be several: write [[listener]]"
    );
    assert_eq!(
        complaints(&format!("[[daemon]]\n{GOOD}")),
        "a.toml:1:1: daemon is a list\n  there is only one: write [daemon]"
    );
}

#[test]
fn steering_is_judged_by_the_listeners_mode_and_the_pinning() {
    let with = |line: &str| listener_with(&format!("bind = \"127.0.0.1:80\"\n{line}"));
    let text = complaints(&with("steering = \"random\""));
    assert!(text.contains("steering = \"random\" is for udp listeners\n  a connection stays"), "{text}");
    let text = complaints(&with("steering = \"hsah\""));
    assert!(text.contains("did you mean \"hash\"?"), "{text}");
    for word in ["hash", "source", "load-aware"] {
        assert!(right(&with(&format!("steering = \"{word}\""))).warnings.0.is_empty());
    }
    let warnings = right(&with("steering = \"cpu\"")).warnings;
    assert!(warnings.to_string().contains("listener \"front\" steers by cpu, but workers"), "{warnings}");
    let pinned = format!("[daemon]\npin_workers = true\n{}", with("steering = \"cpu\""));
    assert!(right(&pinned).warnings.0.is_empty());
}

/// Each with its place, in a file with a UDP listener and an upstream.
#[test]
fn what_does_not_go_together_in_udp_is_refused_with_a_way_out() {
    let file = |bind: &str, listener: &str, upstream: &str, server: &str| {
        format!(
            "[[listener]]\nname = \"dns\"\nmode = \"udp\"\nbind = \"{bind}\"\nupstream = \"up\"\n{listener}\n\
             [[upstream]]\nname = \"up\"\n{upstream}\n[[upstream.server]]\naddress = \"{server}\"\n"
        )
    };
    let (bind, server) = ("127.0.0.1:53", "10.0.0.1:53");
    for (text, told) in [
        (
            file(bind, "[listener.tcp]\nidle_timeout = \"1h\"", "", server),
            "6:1: [listener.tcp] stands in listener \"dns\", which has mode \"udp\"\n  take it out, or change the mode",
        ),
        (
            file(bind, "[listener.udp]\nmulticast_interface = \"lo\"", "", server),
            "2:8: listener \"dns\" has a multicast_interface and binds no group\n  take it out, or bind a group like \
             \"239.1.1.1:5000\"; for other addresses there is `interface`",
        ),
        (
            file("[ff15::1]:53", "[listener.udp]\nmulticast_interface = \"10.0.0.1\"", "", server),
            "2:8: listener \"dns\" cannot join [ff15::1]:53 on the interface of 10.0.0.1\n  IPv6 groups are joined by \
             an interface's name: write it, like \"eth0\"",
        ),
        (
            file("239.1.1.1:53", "[listener.udp]\nmulticast_interface = \"::1\"", "", server),
            "7:23: multicast_interface = \"::1\" is an IPv6 address\n  name the interface, like \"eth0\"",
        ),
        (
            file(bind, "[listener.udp]\nidle_timeout = \"0s\"", "", server),
            "7:16: idle_timeout = \"0s\" is too short\n  write \"1ms\" to \"365d\"",
        ),
        (
            file(bind, "", "send_proxy = \"v1\"", server),
            "8:8: upstream \"up\" has send_proxy = \"v1\", and listener \"dns\" is of mode udp\n  version 1 of the \
             PROXY protocol knows TCP alone: write \"v2\"",
        ),
        (
            file(bind, "", "", "unix:/run/x"),
            "11:11: upstream \"up\" has a Unix socket, and listener \"dns\" is of mode udp\n  datagrams go to servers \
             with an IP address: write \"10.0.0.1:53\"",
        ),
        (
            file("239.1.1.1:53", "", "", server).replace("\"udp\"", "\"tcp\""),
            "4:8: bind = \"239.1.1.1:53\" is a group address\n  a TCP listener takes an address of this host; groups \
             are for mode \"udp\"",
        ),
    ] {
        assert_eq!(complaints(&text), format!("a.toml:{told}"));
    }
    right(&file(
        "239.1.1.1:53",
        "[listener.udp]\nmulticast_interface = \"10.0.0.1\"",
        "send_proxy = \"v2\"",
        server,
    ));
    // The same port is another one in the other mode.
    right(&format!("{}{GOOD}", file("127.0.0.1:80", "", "", server)));
}
