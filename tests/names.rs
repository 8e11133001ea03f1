//! Servers with names, by a real DNS server whose answers change.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use support::daemon::{Daemon, evenkeel};
use support::health::{SEEN, Switched, server, told, who};
use support::resolver::{Dns, Files};
use support::servers::local;
use support::within;

fn main() {
    support::run(tests![
        a_name_is_followed_to_its_new_address needs ["dnsmasq"],
        all_addresses_of_a_name_are_used needs ["dnsmasq"],
        srv_records_bring_ports_weights_and_priorities needs ["dnsmasq"],
        a_name_that_does_not_resolve_at_first_stops_nothing_and_comes needs ["dnsmasq"],
        the_last_answer_stays_while_dns_is_dead needs ["dnsmasq"],
        the_hosts_file_is_read_and_read_again,
        check_warns_of_names_that_do_not_resolve_and_does_not_hang needs ["dnsmasq"],
    ])
}

fn config(more: &str, server: &str) -> String {
    format!(
        "[daemon]\nworkers = 1\n\
         [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"back\"\n\
         [[upstream]]\nname = \"back\"\n{more}\n\
         [upstream.health]\ninterval = \"100ms\"\ntimeout = \"5s\"\nrise = 1\nfall = 2\n\
         [[upstream.server]]\naddress = \"{server}\"\n"
    )
}

fn front() -> SocketAddr {
    local(8080)
}

#[track_caller]
fn wait_served_by(name: &str) {
    within(SEEN, &format!("{name} serves"), || who(front()).is_ok_and(|served| served == name));
}

fn a_name_is_followed_to_its_new_address() {
    let _files = Files::own();
    let dns = Dns::start(&["127.0.1.1 web.test"]);
    let _one = Switched::on("127.0.1.1:9000", "one");
    let _two = Switched::on("127.0.1.2:9000", "two");
    let daemon = Daemon::ready(&config("", "web.test:9000"));
    wait_served_by("one");
    dns.change(&["127.0.1.2 web.test"]);
    wait_served_by("two");
    for _ in 0..20 {
        assert_eq!(who(front()).expect("served"), "two");
    }
    assert_eq!(told(&daemon, &["web.test:9000 is 127.0.1.2:9000"]), 1, "{}", daemon.log());
}

fn all_addresses_of_a_name_are_used() {
    let _files = Files::own();
    let dns = Dns::start(&["127.0.1.1 web.test", "127.0.1.2 web.test", "::1 web.test"]);
    let _servers = [
        Switched::on("127.0.1.1:9000", "one"),
        Switched::on("127.0.1.2:9000", "two"),
        Switched::on("[::1]:9000", "six"),
    ];
    let _daemon = Daemon::ready(&config("", "web.test:9000"));
    within(SEEN, "three of three serve in turn", || {
        let mut seen: Vec<String> = (0..3).filter_map(|_| who(front()).ok()).collect();
        seen.sort();
        seen == ["one", "six", "two"]
    });
    dns.change(&["127.0.1.2 web.test"]);
    within(SEEN, "one of three is left", || (0..6).all(|_| who(front()).is_ok_and(|name| name == "two")));
}

fn srv_records_bring_ports_weights_and_priorities() {
    let _files = Files::own();
    let services = [
        "_http._tcp.web.test,a.test,9001,10,30",
        "_http._tcp.web.test,b.test,9002,10,10",
        "_http._tcp.web.test,b.test,9003,20,1",
    ];
    let _dns = Dns::with_services(&["127.0.1.1 a.test", "127.0.1.2 b.test"], &services);
    let mut one = Switched::on("127.0.1.1:9001", "one");
    let mut two = Switched::on("127.0.1.2:9002", "two");
    let _backup = Switched::on("127.0.1.2:9003", "backup");
    let _daemon = Daemon::ready(&config("", "srv:_http._tcp.web.test"));
    within(SEEN, "it serves", || who(front()).is_ok());
    let count = |times: usize| {
        let mut served = BTreeMap::new();
        for _ in 0..times {
            *served.entry(who(front()).expect("served")).or_insert(0) += 1;
        }
        served
    };
    // Round robin by weight is exact over whole rotations.
    assert_eq!(count(80), BTreeMap::from([("one".to_string(), 60), ("two".to_string(), 20)]));
    one.turn_off();
    two.turn_off();
    wait_served_by("backup");
    one.turn_on();
    wait_served_by("one");
}

fn a_name_that_does_not_resolve_at_first_stops_nothing_and_comes() {
    let _files = Files::own();
    let dns = Dns::start(&["127.0.1.9 other.test"]);
    let _one = Switched::on("127.0.1.1:9000", "one");
    let daemon = Daemon::ready(&config("", "web.test:9000"));
    within(SEEN, "the reason is there", || {
        told(&daemon, &["web.test:9000 does not resolve: no such name"]) == 1
    });
    let shown = server(&daemon, "back", "web.test:9000");
    assert_ne!(shown["state"], "up", "{shown}");
    assert!(shown.to_string().contains("no such name"), "{shown}");
    assert!(who(front()).is_err());
    dns.change(&["127.0.1.1 web.test"]);
    wait_served_by("one");
    within(SEEN, "it is told", || told(&daemon, &["web.test:9000 is 127.0.1.1:9000"]) == 1);
}

fn the_last_answer_stays_while_dns_is_dead() {
    let _files = Files::own();
    let mut dns = Dns::start(&["127.0.1.1 web.test"]);
    let _one = Switched::on("127.0.1.1:9000", "one");
    let _two = Switched::on("127.0.1.2:9000", "two");
    let daemon = Daemon::ready(&config("", "web.test:9000"));
    wait_served_by("one");
    dns.kill();
    // In part where it dies between the question for IPv4 and that for IPv6.
    let trouble = || {
        told(&daemon, &["web.test:9000 does not resolve"])
            + told(&daemon, &["web.test:9000 resolves in part"])
    };
    within(SEEN, "it is told", || trouble() == 1);
    // Over several tries.
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        assert_eq!(who(front()).expect("served"), "one");
    }
    assert_eq!(trouble(), 1, "{}", daemon.log());
    dns.change_while_dead(&["127.0.1.2 web.test"]);
    dns.run();
    within(Duration::from_secs(60), "the new address", || who(front()).is_ok_and(|name| name == "two"));
    assert_eq!(told(&daemon, &["resolves again"]), 1, "{}", daemon.log());
    // A name that is taken out of the DNS keeps its servers as well.
    dns.change(&["127.0.1.9 other.test"]);
    within(SEEN, "it is told", || told(&daemon, &["web.test:9000 does not resolve: no such name"]) == 1);
    assert_eq!(who(front()).expect("served"), "two");
}

fn the_hosts_file_is_read_and_read_again() {
    let files = Files::own();
    files.write("hosts", "127.0.0.1 localhost\n127.0.1.1 db1 db.local\n");
    let _one = Switched::on("127.0.1.1:9000", "one");
    let _two = Switched::on("127.0.1.2:9000", "two");
    // Nobody is asked: there is no DNS server.
    let _daemon = Daemon::ready(&config("", "db1:9000"));
    wait_served_by("one");
    files.write("hosts", "127.0.0.1 localhost\n127.0.1.2 db1\n");
    wait_served_by("two");
}

fn check_warns_of_names_that_do_not_resolve_and_does_not_hang() {
    let files = Files::own();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("evenkeel.toml");
    let text = config("", "web.test:9000") + "[[upstream.server]]\naddress = \"gone.test:9000\"\n";
    fs::write(&path, &text).expect("a configuration");
    let path = path.to_str().expect("a path");
    let dns = Dns::start(&["127.0.1.1 web.test"]);
    let output = evenkeel(&["check", "-c", path]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = 1 + text.lines().position(|line| line.contains("gone.test")).expect("it is there");
    assert!(
        said.contains(&format!("evenkeel.toml:{line}:11: \"gone.test:9000\" does not resolve: no such name")),
        "{said}"
    );
    assert!(!said.contains("web.test"), "{said}");
    let json = evenkeel(&["check", "--json", "-c", path]);
    assert!(String::from_utf8_lossy(&json.stdout).contains("does not resolve"), "{json:?}");
    drop(dns);
    // One that never answers.
    let _silent = UdpSocket::bind("127.0.0.1:53").expect("the port");
    files.write("resolv.conf", "nameserver 127.0.0.1\noptions timeout:30 attempts:5\n");
    let begin = Instant::now();
    let output = evenkeel(&["check", "-c", path]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr).matches("does not resolve").count(), 2, "{output:?}");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}
