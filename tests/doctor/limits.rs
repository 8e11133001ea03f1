//! The limits of a host against configurations.

use std::fs;

use evenkeel::config::{Config, Workers};
use evenkeel::doctor::limits::{Finding, Host, Level, Remedy, judge};
use evenkeel::doctor::{self, Command, Question};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::scene::{addr, elsewhere, json};
use crate::support::{Test, skip};
use crate::tests;

pub fn tests() -> Vec<Test> {
    tests![
        a_usual_host_is_enough_for_a_usual_configuration,
        too_few_descriptors_cost_sessions_and_name_the_unit_line,
        a_cut_backlog_and_cut_buffers_name_their_listener_and_line,
        ports_run_out_where_servers_are_few_and_sessions_many,
        a_listening_port_that_may_be_lent_is_to_be_reserved_beside_the_others,
        low_ports_conntrack_migration_and_fast_open_are_judged,
        bpf_may_be_loaded_with_its_capability_or_with_all,
        a_host_that_tells_nothing_is_unknown_and_not_well,
        this_host_is_read_and_a_changed_limit_shows,
        a_hidden_proc_sys_is_said_and_the_rest_still_told,
    ]
}

/// A host with the values that Linux has by default.
fn host() -> Host {
    Host {
        kernel: Some("6.1.0-generic".into()),
        cpus: 4,
        open_files: Some((1024, 4096)),
        nr_open: Some(1_048_576),
        somaxconn: Some(4096),
        port_range: Some(32768..=60999),
        reserved_ports: Vec::new(),
        unprivileged_port_start: Some(1024),
        rmem_max: Some(212_992),
        wmem_max: Some(212_992),
        conntrack_max: None,
        conntrack_count: None,
        migrate_req: Some(0),
        fast_open: Some(1),
        capabilities: Some(0),
        udp_offloads: Some((true, true)),
    }
}

fn config() -> Config {
    let text = "[[listener]]\nname = \"web\"\nmode = \"tcp\"\nbind = \"0.0.0.0:8080\"\nupstream = \"web\"\n\
        [[upstream]]\nname = \"web\"\n[[upstream.server]]\naddress = \"10.0.0.1:80\"\n\
        [[upstream.server]]\naddress = \"10.0.0.2:80\"\n";
    let mut config = evenkeel::config::load("test", text).expect("a sane configuration").config;
    config.daemon.workers = Workers::Count(4);
    config
}

fn one(host: &Host, config: &Config, name: &str) -> Finding {
    let findings = judge(host, Some(config));
    findings.into_iter().find(|finding| finding.name == name).unwrap_or_else(|| panic!("no finding {name}"))
}

fn sysctl(line: &str) -> Remedy {
    Remedy::Sysctl(line.into())
}

fn a_usual_host_is_enough_for_a_usual_configuration() {
    for finding in judge(&host(), Some(&config())) {
        let expected = if finding.name == "BPF" { Level::Note } else { Level::Ok };
        assert_eq!(finding.level, expected, "{finding:?}");
    }
    let files = one(&host(), &config(), "open files");
    assert_eq!(files.cost, "room for about 7936 sessions of 2 sockets");
}

fn too_few_descriptors_cost_sessions_and_name_the_unit_line() {
    let mut config = config();
    config.daemon.max_connections = 100_000;
    let files = one(&host(), &config, "open files");
    // 25,000 a worker, two sockets each, a quarter more, 128 of its own.
    assert_eq!(files.level, Level::Short);
    assert_eq!(files.remedy, [Remedy::Unit("LimitNOFILE=62628".into())]);
    assert!(
        files.cost.contains("max_connections = 100000") && files.cost.contains("about 7936"),
        "{files:?}"
    );
    config.daemon.max_connections = 4_000_000;
    let files = one(&host(), &config, "open files");
    assert!(files.remedy.contains(&sysctl("fs.nr_open = 2500128")), "{files:?}");
}

fn a_cut_backlog_and_cut_buffers_name_their_listener_and_line() {
    let mut config = config();
    let host = Host { somaxconn: Some(128), ..host() };
    let queue = one(&host, &config, "accept queue");
    assert_eq!((queue.level, &queue.remedy[..]), (Level::Short, &[sysctl("net.core.somaxconn = 4096")][..]));
    assert!(queue.cost.contains("of listener \"web\" is cut to 128"), "{queue:?}");
    config.listeners[0].receive_buffer = Some(4 << 20);
    config.listeners[0].send_buffer = Some(1 << 20);
    let buffers = one(&host, &config, "socket buffers");
    let lines = [sysctl("net.core.rmem_max = 4194304"), sysctl("net.core.wmem_max = 1048576")];
    assert_eq!((buffers.level, &buffers.remedy[..]), (Level::Short, &lines[..]));
}

fn ports_run_out_where_servers_are_few_and_sessions_many() {
    let mut config = config();
    let host = Host { open_files: Some((1_000_000, 1_000_000)), ..host() };
    config.daemon.max_connections = 56_464;
    assert_eq!(one(&host, &config, "outgoing ports").level, Level::Ok);
    config.daemon.max_connections = 56_465;
    let ports = one(&host, &config, "outgoing ports");
    assert_eq!(ports.level, Level::Short);
    assert!(ports.cost.contains("upstream \"web\" can have 56464 sessions"), "{ports:?}");
    assert!(ports.remedy.contains(&sysctl("net.ipv4.ip_local_port_range = 1024 65535")));
}

fn a_listening_port_that_may_be_lent_is_to_be_reserved_beside_the_others() {
    let mut config = config();
    config.listeners[0].bind.push(addr("0.0.0.0:40000"));
    let mut host = host();
    host.reserved_ports.push(50000..=50010);
    let ports = one(&host, &config, "listening ports");
    assert_eq!(ports.remedy, [sysctl("net.ipv4.ip_local_reserved_ports = 50000-50010,40000")]);
    host.reserved_ports.push(40000..=40000);
    assert_eq!(one(&host, &config, "listening ports").level, Level::Ok);
}

fn low_ports_conntrack_migration_and_fast_open_are_judged() {
    let mut config = config();
    config.listeners[0].bind[0].set_port(80);
    let low = one(&host(), &config, "low ports");
    assert_eq!(low.level, Level::Short);
    assert!(low.remedy.contains(&Remedy::Unit("AmbientCapabilities=CAP_NET_BIND_SERVICE".into())));
    let able = Host { capabilities: Some(1 << 10), ..host() };
    assert_eq!(one(&able, &config, "low ports").level, Level::Ok);

    let tracked = Host { conntrack_max: Some(1000), conntrack_count: Some(10), ..host() };
    let tracked = one(&tracked, &config, "conntrack");
    assert_eq!(tracked.level, Level::Short);
    assert_eq!(tracked.remedy[0], sysctl("net.netfilter.nf_conntrack_max = 15882"));

    let moving = Host { migrate_req: Some(1), ..host() };
    assert_eq!(one(&moving, &config, "tcp_migrate_req").level, Level::Note);

    config.listeners[0].tcp.fast_open = true;
    let fast = one(&host(), &config, "fast open");
    assert_eq!((fast.level, &fast.remedy[..]), (Level::Short, &[sysctl("net.ipv4.tcp_fastopen = 3")][..]));
}

fn bpf_may_be_loaded_with_its_capability_or_with_all() {
    let level = |capabilities| one(&Host { capabilities, ..host() }, &config(), "BPF").level;
    assert_eq!(level(Some(1 << 39)), Level::Ok);
    assert_eq!(level(Some(1 << 21)), Level::Ok);
    assert_eq!(level(Some(1 << 12)), Level::Note);
    assert_eq!(level(None), Level::Unknown);
}

fn a_host_that_tells_nothing_is_unknown_and_not_well() {
    for finding in judge(&Host::default(), Some(&config())) {
        let expected = if finding.name == "conntrack" { Level::Ok } else { Level::Unknown };
        assert_eq!(finding.level, expected, "{finding:?}");
        assert!(finding.remedy.is_empty());
    }
}

fn this_host_is_read_and_a_changed_limit_shows() {
    let report = |json| doctor::run(&Command { question: Question::Host, json }, Some(&config()));
    assert_eq!(report(false).exit_code, 0);
    if fs::write("/proc/sys/net/core/somaxconn", "100").is_err() {
        skip("the limits of this network cannot be set");
    }
    let text = report(false).text;
    assert!(text.contains("/etc/sysctl.d: net.core.somaxconn = 4096"), "{text}");
    assert!(text.contains("1 limit is short") || text.contains(" limits are short"), "{text}");
    let findings = json(&report(true).text)["findings"].clone();
    let queue = findings.as_array().expect("findings").iter().find(|one| one["name"] == "accept queue");
    assert_eq!(queue.expect("the finding")["level"], "short");
}

fn a_hidden_proc_sys_is_said_and_the_rest_still_told() {
    let text = elsewhere(|| {
        let hide = || -> nix::Result<()> {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            mount(Some("none"), "/proc/sys", Some("tmpfs"), MsFlags::empty(), None::<&str>)
        };
        match hide() {
            Ok(()) => doctor::run(&Command { question: Question::Host, json: false }, None).text,
            Err(e) => format!("skipped {e}"),
        }
    });
    if text.starts_with("skipped") {
        skip(&text);
    }
    assert!(text.contains("/proc/sys/net/core/somaxconn cannot be read here"), "{text}");
    assert!(text.contains("kernel unknown") && text.contains("open files"), "{text}");
}
