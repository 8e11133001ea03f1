//! How the load generator judges the spread: by a daemon's counters, by
//! identify lines, fair and unfair.

mod bench_support;
mod support;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bench_support::{Run, Tcp, Udp, answer_with, bench, daemon, group, tcp, udp};
use serde_json::json;

fn main() {
    support::run(tests![
        a_group_of_four_is_steered_by_chance_and_called_so,
        a_group_with_a_closed_member_is_not_chance,
        identify_lines_tell_the_spread_without_a_daemon,
        identify_lines_of_datagrams_count_flows,
        the_cause_is_named_by_the_steering_in_force,
        open_sessions_are_watched_while_the_load_runs,
        connections_that_another_program_took_are_missed,
        a_control_socket_that_does_not_help_is_one_clear_sentence,
        a_missing_permission_on_the_control_socket_is_exit_77 needs ["root"],
    ])
}

fn per_slot(run: &Run) -> Vec<u64> {
    let json = run.json();
    let counts = json["spread"]["per_slot"].as_array().unwrap_or_else(|| panic!("{json:#}"));
    counts.iter().map(|count| count.as_u64().expect("a count")).collect()
}

fn a_group_of_four_is_steered_by_chance_and_called_so() {
    // The kernel's hash of 2,000 ports is called unfair once in a thousand
    // runs (the threshold); three runs in a row, once in 10^9.
    let folder = tempfile::tempdir().expect("a folder");
    let group = group(4, &[0, 1, 2, 3]);
    let socket = daemon(folder.path(), &group.address.to_string(), "hash", &group.accepted);
    let words = format!("tcp {} --connections 2000 --socket {} --json", group.address, socket.display());
    let fair = (0..3).any(|_| {
        let run = bench(&words);
        assert_eq!((run.code, run.error_count()), (0, 0), "{}{}", run.stdout, run.stderr);
        assert_eq!((per_slot(&run).len(), per_slot(&run).iter().sum::<u64>()), (4, 2000));
        let spread = run.json()["spread"].clone();
        assert_eq!((&spread["source"], &spread["listener"]), (&json!("control"), &json!("web")));
        spread["verdict"] == "chance"
    });
    assert!(fair);
}

fn a_group_with_a_closed_member_is_not_chance() {
    let folder = tempfile::tempdir().expect("a folder");
    let group = group(4, &[0, 1, 3]);
    let bind = format!("0.0.0.0:{}", group.address.port());
    let socket = daemon(folder.path(), &bind, "hash", &group.accepted);
    let words = format!("tcp {} --connections 1000 --socket {}", group.address, socket.display());
    let run = bench(&format!("{words} --json"));
    assert_eq!((run.code, per_slot(&run)[2], run.error_count()), (0, 0, 0), "{}", run.stdout);
    let spread = run.json()["spread"].clone();
    assert_eq!(spread["verdict"], "not chance", "{spread:#}");
    let sentence = spread["sentence"].as_str().expect("text");
    assert!(sentence.starts_with("slot 2 got none of 1,000 connections: not chance"), "{sentence}");
    // For a person, and as a limit. A third of all on three of four slots is 1.33.
    let run = bench(&format!("{words} --max-spread 1.2"));
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.stdout.contains("slot 2              0    0.0 %"), "{}", run.stdout);
    assert!(run.stdout.contains("--max-spread 1.2"), "{}", run.stdout);
}

fn identify_lines_tell_the_spread_without_a_daemon() {
    let run = bench(&format!("tcp {} --connections 400 --json", tcp(Tcp::Identify(4))));
    assert_eq!((run.code, run.error_count(), per_slot(&run)), (0, 0, vec![100; 4]), "{}", run.stdout);
    let spread = run.json()["spread"].clone();
    assert_eq!((&spread["source"], &spread["p_value"]), (&json!("identify"), &json!(1.0)));
    // A slot that nobody reached can only be told.
    let run = bench(&format!("tcp {} --connections 400 --slots 5 --json", tcp(Tcp::Identify(4))));
    assert_eq!(
        (per_slot(&run)[4], &run.json()["spread"]["verdict"]),
        (0, &json!("not chance")),
        "{}",
        run.stdout
    );
}

fn identify_lines_of_datagrams_count_flows() {
    let run = bench(&format!("udp {} --requests 2000 --concurrency 100 --json", udp(Udp::Identify(2))));
    run.ended(0, 2000, 0);
    assert_eq!(per_slot(&run).iter().sum::<u64>(), 100, "{}", run.stdout);
    assert_eq!(run.number("/spread/slot_changes"), 0.0);
}

fn the_cause_is_named_by_the_steering_in_force() {
    let folder = tempfile::tempdir().expect("a folder");
    let group = group(4, &[1]);
    let socket = daemon(folder.path(), &group.address.to_string(), "source", &group.accepted);
    let run = bench(&format!("tcp {} --connections 200 --socket {}", group.address, socket.display()));
    assert!(run.stdout.contains("1 client address cannot fill 4 slots evenly"), "{}", run.stdout);
}

fn open_sessions_are_watched_while_the_load_runs() {
    let folder = tempfile::tempdir().expect("a folder");
    let group = group(4, &[0, 1, 2, 3]);
    // That daemon shows 10, 20, 30 and 40 open sessions: 1.6 times the mean.
    let socket = daemon(folder.path(), &group.address.to_string(), "hash", &group.accepted);
    let run = bench(&format!(
        "tcp {} --pattern request --concurrency 8 --duration 1s --socket {} --json",
        group.address,
        socket.display()
    ));
    assert_eq!(run.number("/active/worst_max_over_mean"), 1.6, "{}", run.stdout);
    assert!(run.number("/active/samples") >= 1.0);
}

fn connections_that_another_program_took_are_missed() {
    let folder = tempfile::tempdir().expect("a folder");
    let group = group(2, &[0, 1]);
    // A daemon whose counters stand still: somebody else accepts.
    let still = Arc::new(vec![AtomicU64::new(5), AtomicU64::new(5)]);
    let socket = daemon(folder.path(), &group.address.to_string(), "hash", &still);
    let run = bench(&format!("tcp {} --connections 50 --socket {}", group.address, socket.display()));
    assert!(run.stdout.contains("counted 0 of 50 connections"), "{}", run.stdout);
}

fn a_control_socket_that_does_not_help_is_one_clear_sentence() {
    let folder = tempfile::tempdir().expect("a folder");
    let target = tcp(Tcp::Echo);
    let missing = bench(&format!("tcp {target} --socket {}/none", folder.path().display()));
    assert_eq!(missing.code, 1);
    assert!(missing.stderr.contains("start one with `evenkeel run`"), "{}", missing.stderr);
    let refused = answer_with(folder.path(), || json!({ "error": "not now" }));
    let refused = bench(&format!("tcp {target} --socket {}", refused.display()));
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("not now"), "{}", refused.stderr);
    assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
    let other = tempfile::tempdir().expect("a folder");
    let elsewhere = Arc::new(vec![AtomicU64::new(0)]);
    let elsewhere = daemon(other.path(), "10.1.1.1:80", "hash", &elsewhere);
    let elsewhere = bench(&format!("tcp {target} --socket {}", elsewhere.display()));
    assert!(elsewhere.stderr.contains("it listens on 10.1.1.1:80"), "{}", elsewhere.stderr);
    let unknown = bench(&format!("tcp {target} --connections 5 --max-spread 2"));
    assert_eq!(unknown.code, 1);
    assert!(unknown.stdout.contains("the spread is not known"), "{}", unknown.stdout);
}

fn a_missing_permission_on_the_control_socket_is_exit_77() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let folder = tempfile::tempdir().expect("a folder");
    let group = group(1, &[0]);
    let socket = daemon(folder.path(), &group.address.to_string(), "hash", &group.accepted);
    let mode = |path: &std::path::Path, bits| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(bits)).expect("our own file");
    };
    mode(folder.path(), 0o755);
    mode(&socket, 0o660);
    // The program lies below a home that nobody else may enter.
    let program = folder.path().join("evenkeel");
    std::fs::copy(env!("CARGO_BIN_EXE_evenkeel"), &program).expect("a copy");
    let output = std::process::Command::new(&program)
        .args(["bench", "tcp", &group.address.to_string(), "--connections", "5", "--socket"])
        .arg(&socket)
        .uid(65534)
        .gid(65534)
        .output()
        .expect("it starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(77), "{stderr}");
    assert!(stderr.contains("use sudo, or join its group"), "{stderr}");
}
