//! `/metrics` and the figures in it: names, formats, and that each counts what
//! it says.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::daemon::{Daemon, signal};
use support::http::{get, get_with};
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::{eventually, schema, within};

fn main() {
    support::run(tests![
        promtool_finds_nothing_to_complain_about needs ["promtool"],
        prometheus_reads_the_openmetrics_text needs ["promtool"],
        the_openmetrics_text_is_strictly_right_and_has_every_name,
        the_strict_reader_sees_what_is_wrong,
        the_status_document_fits_its_schema_wherever_it_comes_from,
        who_waits_to_be_accepted_and_who_found_no_room_is_counted,
        datagrams_that_a_stopped_worker_did_not_read_are_counted,
        why_workers_were_replaced_is_counted,
        every_connect_is_in_the_histogram,
        a_refused_reload_is_seen,
    ])
}

const ADMIN: u16 = 9180;

/// TCP with two servers, UDP, and a name that needs no escaping but looks odd.
fn daemon(workers: usize) -> Daemon {
    let (one, _) = tcp_server("127.0.0.1:0", echo);
    let (two, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&format!(
        "[daemon]\nworkers = {workers}\nadmin = \"127.0.0.1:9180\"\nhang_timeout = \"1h\"\n\
        [[listener]]\nname = \"front-1.a_b\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nbacklog = 4\nupstream = \"back\"\n\
        [[listener]]\nname = \"dns\"\nmode = \"udp\"\nbind = \"127.0.0.1:8053\"\nreceive_buffer = \"8KiB\"\nservice = \"echo\"\n\
        [[upstream]]\nname = \"back\"\n[upstream.health]\ncheck = \"none\"\n\
        [[upstream.server]]\naddress = \"{one}\"\n[[upstream.server]]\naddress = \"{two}\"\n"
    ));
    eventually("the admin address answers", || TcpStream::connect(local(ADMIN)).is_ok());
    daemon
}

/// Some of everything.
fn traffic() {
    for _ in 0..40 {
        let mut client = connect(local(8080));
        exchange(&mut client, b"hello").unwrap();
    }
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.send_to(b"hello", local(8053)).unwrap();
    client.recv_from(&mut [0; 16]).unwrap();
}

fn openmetrics() -> String {
    get_with(local(ADMIN), "/metrics", "Accept: application/openmetrics-text; version=1.0.0\r\n").body
}

/// The value of a sample, by its name and labels as they are written.
fn value(text: &str, sample: &str) -> Option<f64> {
    let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    lines.find(|(name, _)| *name == sample).map(|(_, value)| value.parse().expect("a number"))
}

fn promtool_finds_nothing_to_complain_about() {
    let _daemon = daemon(3);
    traffic();
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it was there a moment ago");
    let text = get(local(ADMIN), "/metrics").body;
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let done = promtool.wait_with_output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty() && done.stdout.is_empty(), "{done:?}\n{text}");
}

/// Its own parser of the format, by way of a command that turns such a text
/// into a data base. That wants a time with each sample.
fn prometheus_reads_the_openmetrics_text() {
    let daemon = daemon(2);
    traffic();
    let text = openmetrics();
    let timed: String = text
        .lines()
        .map(|line| if line.starts_with('#') { format!("{line}\n") } else { format!("{line} 1700000000\n") })
        .collect();
    let (file, base) = (daemon.folder().join("metrics.om"), daemon.folder().join("base"));
    fs::write(&file, timed).unwrap();
    let done = Command::new("promtool")
        .args(["tsdb", "create-blocks-from", "openmetrics"])
        .args([&file, &base])
        .output()
        .expect("it was there a moment ago");
    assert!(done.status.success(), "{done:?}\n{text}");
    let listed = Command::new("promtool").args(["tsdb", "list"]).arg(&base).output().unwrap();
    let samples = text.lines().filter(|line| !line.starts_with('#')).count();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.split_whitespace().any(|word| word == samples.to_string()), "{samples}: {listed}");
}

/// What is wrong with a text by the OpenMetrics 1.0 standard, as far as we use
/// it. Written against the standard and not against the encoder.
fn complaints(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if !text.ends_with("\n# EOF\n") || text.matches("# EOF").count() != 1 {
        wrong.push("no single # EOF at the end".to_string());
    }
    let (mut family, mut kind) = (String::new(), String::new());
    let (mut families, mut samples) = (BTreeSet::new(), BTreeSet::new());
    // By labels: the last cumulative count, the infinite one, and _count.
    let mut buckets: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    let name_is_good = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    for line in text.lines().filter(|line| *line != "# EOF") {
        let mut complain = |what: &str| wrong.push(format!("{what}: {line}"));
        if let Some(meta) = line.strip_prefix("# ") {
            let mut words = meta.splitn(3, ' ');
            let (word, name, rest) = (words.next(), words.next().unwrap_or(""), words.next().unwrap_or(""));
            match word {
                Some("TYPE") => {
                    (family, kind) = (name.to_string(), rest.to_string());
                    if !families.insert(family.clone()) {
                        complain("a family twice");
                    }
                    if !["counter", "gauge", "histogram", "info"].contains(&rest) {
                        complain("an unknown type");
                    }
                    if kind == "counter" && family.ends_with("_total") {
                        complain("a counter's family ends with _total");
                    }
                }
                Some("UNIT") if name == family && family.ends_with(&format!("_{rest}")) => {}
                Some("HELP") if name == family && !rest.is_empty() => {}
                _ => complain("a line that does not belong here"),
            }
            continue;
        }
        let Some((series, number)) = line.rsplit_once(' ') else {
            complain("no value");
            continue;
        };
        if !number.parse::<f64>().is_ok_and(f64::is_finite) {
            complain("no number");
        }
        if !samples.insert(series.to_string()) {
            complain("a sample twice");
        }
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, rest.strip_suffix('}').unwrap_or("?")),
            None => (series, ""),
        };
        let suffix = name.strip_prefix(family.as_str());
        let fits = match kind.as_str() {
            "counter" => suffix == Some("_total"),
            "info" => suffix == Some("_info") && number == "1",
            "histogram" => matches!(suffix, Some("_bucket" | "_count" | "_sum")),
            _ => suffix == Some(""),
        };
        if !fits || !name_is_good(name) {
            complain("a sample of no family");
        }
        let Some(labels) = split_labels(labels) else {
            complain("labels that cannot be read");
            continue;
        };
        let names: BTreeSet<&String> = labels.iter().map(|(name, _)| name).collect();
        if names.len() != labels.len() || !labels.iter().all(|(name, _)| name_is_good(name)) {
            complain("label names");
        }
        let value: f64 = number.parse().unwrap_or(-1.0);
        if kind == "counter" && value < 0.0 {
            complain("a counter below zero");
        }
        if kind == "histogram" {
            let le = labels.iter().find(|(name, _)| name == "le").map(|(_, le)| le.clone());
            let others: Vec<String> = labels
                .iter()
                .filter(|(name, _)| name != "le")
                .map(|(name, text)| format!("{name}={text}"))
                .collect();
            let (bound, total) = buckets.entry(others.join(",")).or_insert((f64::NEG_INFINITY, 0.0));
            match (suffix, le) {
                (Some("_bucket"), Some(le)) => {
                    let upper = if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap_or(f64::NAN) };
                    let canonical = le == "+Inf" || le.contains('.');
                    if upper <= *bound || value < *total || !canonical || upper.is_nan() {
                        complain("a bucket out of order");
                    }
                    (*bound, *total) = (upper, value);
                }
                (Some("_count"), None) if *bound == f64::INFINITY && value == *total => {}
                (Some("_sum"), None) if value >= 0.0 => {}
                _ => complain("a histogram that does not add up"),
            }
        }
    }
    wrong
}

/// Labels as pairs, unescaped; `None` where they are malformed.
fn split_labels(text: &str) -> Option<Vec<(String, String)>> {
    let (mut labels, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"")?;
        let (mut value, mut end) = (String::new(), None);
        let mut chars = after.char_indices();
        while let Some((at, char)) = chars.next() {
            match char {
                '"' => {
                    end = Some(at);
                    break;
                }
                '\\' => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    escaped @ ('"' | '\\') => value.push(escaped),
                    _ => return None,
                },
                other => value.push(other),
            }
        }
        labels.push((name.to_string(), value));
        let after = &after[end? + 1..];
        rest = match after.strip_prefix(',') {
            Some(next) if !next.is_empty() => next,
            None if after.is_empty() => after,
            _ => return None,
        };
    }
    Some(labels)
}

fn the_openmetrics_text_is_strictly_right_and_has_every_name() {
    let _daemon = daemon(3);
    traffic();
    let text = openmetrics();
    assert_eq!(complaints(&text), Vec::<String>::new(), "{text}");
    let promised = [
        "evenkeel_build_info{version=",
        "evenkeel_listener_connections_total{listener=\"front-1.a_b\",slot=\"0\"}",
        "evenkeel_listener_active{listener=\"front-1.a_b\",slot=\"2\"}",
        "evenkeel_listener_bytes_total{listener=\"front-1.a_b\",direction=\"in\"}",
        "evenkeel_listener_bytes_total{listener=\"dns\",direction=\"out\"}",
        "evenkeel_listener_accept_queue{listener=\"front-1.a_b\",slot=\"1\"}",
        "evenkeel_listener_accept_overflows_total{listener=\"front-1.a_b\"}",
        "evenkeel_udp_datagrams_total{listener=\"dns\",direction=\"in\"}",
        "evenkeel_udp_dropped_total{listener=\"dns\",reason=\"receive_buffer\"}",
        "evenkeel_session_end_total{listener=\"front-1.a_b\",reason=\"finished\"}",
        "evenkeel_server_up{upstream=\"back\",server=\"127.0.0.1:",
        "evenkeel_server_active{upstream=\"back\",server=",
        "evenkeel_server_connect_seconds_bucket{upstream=\"back\",server=",
        "evenkeel_worker_restarts_total{slot=\"0\",reason=\"hang\"}",
        "evenkeel_keeper_up{slot=\"0\"}",
        "evenkeel_keeper_takeovers_total{slot=\"1\"}",
        "evenkeel_keeper_sessions_total{slot=\"2\",fate=\"self_check\"}",
        "evenkeel_keeper_recovered_bytes_total{slot=\"2\"}",
        "evenkeel_worker_spread_ratio{listener=\"dns\"}",
        "evenkeel_generation 1",
        "evenkeel_reload_success 1",
    ];
    for name in promised {
        assert!(text.contains(&format!("\n{name}")), "{name} in {text}");
    }
    let connections: f64 = (0..3)
        .map(|slot| {
            value(
                &text,
                &format!("evenkeel_listener_connections_total{{listener=\"front-1.a_b\",slot=\"{slot}\"}}"),
            )
        })
        .map(|count| count.expect("every slot"))
        .sum();
    assert_eq!(connections, 40.0);
    assert_eq!(value(&text, "evenkeel_udp_datagrams_total{listener=\"dns\",direction=\"in\"}"), Some(1.0));
    assert_eq!(
        value(&text, "evenkeel_listener_bytes_total{listener=\"front-1.a_b\",direction=\"in\"}"),
        Some(200.0)
    );
}

fn the_strict_reader_sees_what_is_wrong() {
    let good = "# TYPE a counter\n# HELP a Text.\na_total{x=\"1\"} 1\n# EOF\n";
    assert_eq!(complaints(good), Vec::<String>::new());
    let bad = [
        good.replace("# EOF\n", ""),
        good.replace("a_total{", "a{"),
        good.replace("} 1", "} one"),
        good.replace("x=\"1\"", "x=\"1"),
        good.replace("x=\"1\"", "x=\"\\q\""),
        good.replace("a_total{x=\"1\"} 1\n", "a_total{x=\"1\"} 1\na_total{x=\"1\"} 1\n"),
        good.replace("# TYPE a counter", "# TYPE a_total counter"),
        good.replace("# HELP a", "# HELP b"),
        "# TYPE h histogram\n# HELP h T.\nh_bucket{le=\"1.0\"} 2\nh_bucket{le=\"+Inf\"} 1\nh_count 1\nh_sum 1\n# EOF\n".into(),
        "# TYPE h histogram\n# HELP h T.\nh_bucket{le=\"+Inf\"} 1\nh_count 2\nh_sum 1\n# EOF\n".into(),
    ];
    for text in bad {
        assert!(!complaints(&text).is_empty(), "{text}");
    }
}

fn problems(document: &Value) -> Vec<String> {
    let text = fs::read_to_string("docs/status.schema.json").expect("part of the repository");
    let schema: Value = serde_json::from_str(&text).expect("the schema is JSON");
    let mut wrong = Vec::new();
    schema::check(&schema, &schema, document, "", &mut wrong);
    wrong
}

fn the_status_document_fits_its_schema_wherever_it_comes_from() {
    let daemon = daemon(2);
    traffic();
    let over_http = get(local(ADMIN), "/status.json").json();
    let mut over_socket = daemon.ask("status").unwrap()["status"].take();
    let command = daemon.command(&["status", "--json"]);
    let printed: Value = serde_json::from_slice(&command.stdout).unwrap();
    for document in [&over_http, &over_socket, &printed] {
        assert_eq!(problems(document), Vec::<String>::new(), "{document:#}");
    }
    // The checker would see it.
    over_socket["listeners"][0]["mode"] = "sctp".into();
    over_socket["workers"][0].as_object_mut().unwrap().remove("restarts");
    assert_eq!(problems(&over_socket).len(), 2);
}

fn who_waits_to_be_accepted_and_who_found_no_room_is_counted() {
    let daemon = daemon(1);
    signal(daemon.worker(0).pid, Signal::SIGSTOP);
    // The handshakes of 20 against a queue of 4: the kernel lets one more in
    // than the backlog says.
    let clients: Vec<_> = (0..20)
        .map(|_| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&local(8080).into());
            socket
        })
        .collect();
    let mut text = String::new();
    eventually("the queue is full and said so", || {
        text = get(local(ADMIN), "/metrics").body;
        value(&text, "evenkeel_listener_accept_queue{listener=\"front-1.a_b\",slot=\"0\"}") == Some(5.0)
            && value(&text, "evenkeel_listener_accept_overflows_total{listener=\"front-1.a_b\"}") > Some(0.0)
    });
    assert_eq!(
        value(&text, "evenkeel_listener_accept_queue_limit{listener=\"front-1.a_b\",slot=\"0\"}"),
        Some(4.0)
    );
    let listener = daemon.listener("front-1.a_b");
    assert_eq!((listener.accept_queue, listener.queues[0].waiting), (5, 5));
    let overflows = listener.accept_overflows;
    assert!(overflows > 0);
    signal(daemon.worker(0).pid, Signal::SIGCONT);
    eventually("the queue is empty again", || daemon.listener("front-1.a_b").accept_queue == 0);
    assert!(daemon.listener("front-1.a_b").accept_overflows >= overflows);
    drop(clients);
}

fn datagrams_that_a_stopped_worker_did_not_read_are_counted() {
    let daemon = daemon(1);
    signal(daemon.worker(0).pid, Signal::SIGSTOP);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..200 {
        client.send_to(&[7; 500], local(8053)).unwrap();
    }
    // Nobody but the supervisor can look while the worker is stopped.
    eventually("the drops are seen", || {
        let listener = daemon.listener("dns");
        listener.dropped.get("receive_buffer").is_some_and(|&count| count > 100)
            && listener.queues[0].waiting > 0
    });
    let dropped = daemon.listener("dns").dropped["receive_buffer"];
    let text = get(local(ADMIN), "/metrics").body;
    assert_eq!(
        value(&text, "evenkeel_udp_dropped_total{listener=\"dns\",reason=\"receive_buffer\"}"),
        Some(dropped as f64)
    );
    signal(daemon.worker(0).pid, Signal::SIGCONT);
    eventually("the rest is read", || daemon.listener("dns").queues[0].waiting == 0);
    // A new worker takes up the socket: its count goes on.
    daemon.kill_worker(0);
    eventually("another worker", || daemon.worker(0).state == "ready");
    assert!(daemon.listener("dns").dropped["receive_buffer"] >= dropped);
}

fn why_workers_were_replaced_is_counted() {
    let daemon = daemon(2);
    for (times, which) in [(1, Signal::SIGKILL), (2, Signal::SIGABRT)] {
        signal(daemon.worker(1).pid, which);
        within(Duration::from_secs(20), "another worker", || {
            let worker = daemon.worker(1);
            worker.restarts == times && worker.state == "ready"
        });
    }
    let reasons = daemon.worker(1).restart_reasons;
    assert_eq!(reasons, BTreeMap::from([("crash".to_string(), 1), ("killed".to_string(), 1)]));
    let text = openmetrics();
    assert_eq!(complaints(&text), Vec::<String>::new());
    for (slot, reason, count) in [(1, "killed", 1.0), (1, "crash", 1.0), (1, "hang", 0.0), (0, "crash", 0.0)]
    {
        let sample = format!("evenkeel_worker_restarts_total{{slot=\"{slot}\",reason=\"{reason}\"}}");
        assert_eq!(value(&text, &sample), Some(count), "{sample}");
    }
}

fn every_connect_is_in_the_histogram() {
    let daemon = daemon(2);
    traffic();
    let sum = |daemon: &Daemon| -> u64 {
        let status = daemon.status();
        status.upstreams[0].servers.iter().map(|server| server.connect.count).sum()
    };
    eventually("every connect is counted", || sum(&daemon) == 40);
    let servers = daemon.status().upstreams[0].servers.clone();
    for server in &servers {
        let connect = &server.connect;
        assert_eq!(
            (connect.count, connect.buckets.iter().sum::<u64>()),
            (server.connections, server.connections)
        );
        // Loopback connects at once, but never in no time.
        assert!(connect.sum_us > 0 && connect.p50_us > 0 && connect.p99_us >= connect.p50_us, "{connect:?}");
    }
    let text = openmetrics();
    let name = format!(
        "evenkeel_server_connect_seconds_count{{upstream=\"back\",server=\"{}\"}}",
        servers[0].address
    );
    assert_eq!(value(&text, &name), Some(servers[0].connect.count as f64));
    // A new worker and a new generation go on from there.
    daemon.kill_worker(0);
    daemon.ask("reload").unwrap();
    assert_eq!(sum(&daemon), 40);
}

fn a_refused_reload_is_seen() {
    let daemon = daemon(2);
    let path = daemon.folder().join("evenkeel.toml");
    let good = fs::read_to_string(&path).unwrap();
    fs::write(&path, good.replace("mode = \"udp\"", "mode = \"upd\"")).unwrap();
    assert!(daemon.ask("reload").is_err());
    let figures = || {
        let text = openmetrics();
        (value(&text, "evenkeel_reload_success"), value(&text, "evenkeel_generation"))
    };
    eventually("the refusal is seen", || figures() == (Some(0.0), Some(1.0)));
    fs::write(&path, good).unwrap();
    daemon.signal(Signal::SIGHUP);
    eventually("the reload is seen", || figures() == (Some(1.0), Some(2.0)));
}
