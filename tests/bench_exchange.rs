//! The load generator against servers with known answers and known faults.

mod bench_support;
mod support;

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bench_support::{Tcp, Udp, bench, group, tcp, udp};

fn main() {
    support::run(tests![
        every_connection_is_made_once_and_every_byte_is_counted,
        requests_share_the_connections_that_stay_open,
        a_stream_comes_back_whole,
        a_stream_may_flow_one_way_only,
        a_single_wrong_byte_is_a_wrong_reply,
        an_answer_that_ends_early_is_a_short_reply,
        a_kept_connection_that_is_closed_between_answers_is_closed_not_short,
        a_reset_and_a_refusal_are_told_apart,
        a_closed_loop_does_not_hammer_a_dead_target,
        a_server_that_never_answers_costs_one_timeout,
        some_errors_alone_do_not_fail_a_run_unless_told_so,
        a_slow_answer_fails_a_p99_limit,
        datagrams_are_answered_or_accounted_for_by_kind,
        a_datagram_stream_keeps_several_under_way,
        udp_connect_opens_a_flow_for_each_exchange,
        an_open_loop_keeps_its_rate_and_charges_a_stall_to_all_who_waited,
        new_connections_of_an_open_loop_are_charged_for_a_stall_too,
        a_target_too_slow_for_the_rate_is_said_to_be,
        a_warm_up_is_left_out_of_the_rates,
        more_connections_than_one_address_has_ports_take_other_addresses,
        control_c_ends_the_run_and_still_shows_what_was_measured,
    ])
}

fn every_connection_is_made_once_and_every_byte_is_counted() {
    let target = tcp(Tcp::Echo);
    let run = bench(&format!("tcp {target} --connections 500 --size 1000 --threads 2 --json"));
    assert_eq!((run.code, run.error_count()), (0, 0), "{}{}", run.stdout, run.stderr);
    assert_eq!(run.number("/connections"), 500.0);
    assert_eq!(run.number("/requests"), 500.0);
    assert_eq!(run.number("/bytes"), 2.0 * 500.0 * 1000.0);
}

fn requests_share_the_connections_that_stay_open() {
    let target = tcp(Tcp::Echo);
    let run =
        bench(&format!("tcp {target} --pattern request --connections 7 --requests 1001 --threads 2 --json"));
    assert_eq!((run.code, run.error_count()), (0, 0), "{}{}", run.stdout, run.stderr);
    assert_eq!((run.number("/connections"), run.number("/requests")), (7.0, 1001.0));
    let latency = run.json()["latency_us"].clone();
    let at = |name: &str| latency[name].as_f64().expect(name);
    assert!(at("min") <= at("p50") && at("p50") <= at("p99") && at("p99") <= at("p999"), "{latency}");
    assert!(at("p999") <= at("max") * 1.01 && at("mean") > 0.0, "{latency}");
}

fn a_stream_comes_back_whole() {
    let target = tcp(Tcp::Echo);
    let run =
        bench(&format!("tcp {target} --pattern stream --connections 3 --requests 300 --size 100000 --json"));
    assert_eq!((run.code, run.error_count()), (0, 0), "{}{}", run.stdout, run.stderr);
    assert_eq!(run.number("/bytes_received"), 300.0 * 100_000.0);
}

fn a_stream_may_flow_one_way_only() {
    let up = bench(&format!(
        "tcp {} --pattern stream --direction up --concurrency 2 --duration 300ms --json",
        tcp(Tcp::Discard)
    ));
    assert_eq!((up.code, up.error_count()), (0, 0), "{}{}", up.stdout, up.stderr);
    assert!(up.number("/bytes_sent") > 1e5 && up.number("/bytes_received") == 0.0, "{}", up.stdout);
    let down = bench(&format!(
        "tcp {} --pattern stream --direction down --concurrency 2 --duration 300ms --json",
        tcp(Tcp::Source)
    ));
    assert_eq!((down.code, down.error_count()), (0, 0), "{}{}", down.stdout, down.stderr);
    assert!(down.number("/bytes_received") > 1e5 && down.number("/bytes_sent") == 0.0, "{}", down.stdout);
}

fn a_single_wrong_byte_is_a_wrong_reply() {
    let run = bench(&format!("tcp {} --connections 20 --size 3000 --json", tcp(Tcp::WrongByte(2999))));
    assert_eq!((run.code, run.errors("wrong_reply"), run.error_count()), (1, 20, 20), "{}", run.stdout);
    assert_eq!(run.json()["first_error"]["text"], "byte 2999 of the answers is not what was sent");
    // Further down a kept connection, too.
    let target = tcp(Tcp::WrongByte(64 * 50 + 1));
    let run = bench(&format!("tcp {target} --pattern request --connections 1 --requests 60 --json"));
    assert_eq!(
        (run.code, run.errors("wrong_reply"), run.number("/requests")),
        (0, 1, 50.0),
        "{}",
        run.stdout
    );
}

fn an_answer_that_ends_early_is_a_short_reply() {
    let run = bench(&format!("tcp {} --connections 20 --size 3000 --json", tcp(Tcp::Short(2999))));
    assert_eq!((run.code, run.errors("short_reply"), run.error_count()), (1, 20, 20), "{}", run.stdout);
    let run = bench(&format!("tcp {} --connections 20 --json", tcp(Tcp::Close)));
    assert_eq!((run.code, run.errors("closed"), run.error_count()), (1, 20, 20), "{}", run.stdout);
}

fn a_kept_connection_that_is_closed_between_answers_is_closed_not_short() {
    let run = bench(&format!(
        "tcp {} --pattern request --connections 4 --requests 400 --json",
        tcp(Tcp::CloseAfter(640))
    ));
    assert_eq!((run.code, run.errors("closed"), run.error_count()), (0, 4, 4), "{}", run.stdout);
    assert_eq!(run.number("/requests"), 40.0);
}

fn a_reset_and_a_refusal_are_told_apart() {
    let run = bench(&format!("tcp {} --connections 20 --json", tcp(Tcp::Reset)));
    assert_eq!((run.code, run.errors("reset"), run.error_count()), (1, 20, 20), "{}", run.stdout);
    let run = bench("tcp 127.0.0.1:9 --connections 20 --json");
    assert_eq!((run.code, run.errors("refused"), run.error_count()), (1, 20, 20), "{}", run.stdout);
    assert!(run.stderr.contains("nothing was answered"), "{}", run.stderr);
    let run = bench("udp 127.0.0.1:9 --requests 20 --concurrency 2 --json");
    assert_eq!((run.code, run.errors("refused"), run.error_count()), (1, 20, 20), "{}", run.stdout);
}

fn a_closed_loop_does_not_hammer_a_dead_target() {
    // Each failure is followed by a rest of 10 ms.
    for mode in ["tcp", "udp"] {
        let run = bench(&format!("{mode} 127.0.0.1:9 --concurrency 1 --duration 300ms --json"));
        assert!((1..=31).contains(&run.errors("refused")), "{}", run.stdout);
    }
}

fn a_server_that_never_answers_costs_one_timeout() {
    let run = bench(&format!("tcp {} --connections 20 --timeout 200ms --json", tcp(Tcp::Silent)));
    assert_eq!((run.code, run.errors("timed_out"), run.error_count()), (1, 20, 20), "{}", run.stdout);
    assert!(run.number("/seconds") < 3.0);
    let run = bench(&format!("tcp {} --duration 1h --timeout 100ms --json", tcp(Tcp::Silent)));
    assert_eq!(run.code, 1);
    assert!(run.stdout.contains("gave up: nothing was answered within 1.1 s"), "{}", run.stdout);
}

fn some_errors_alone_do_not_fail_a_run_unless_told_so() {
    let run =
        bench(&format!("udp {} --requests 100 --concurrency 1 --timeout 500ms --json", udp(Udp::Drop(50))));
    assert_eq!(
        (run.code, run.errors("lost_datagram"), run.number("/requests")),
        (0, 2, 98.0),
        "{}",
        run.stdout
    );
    let limits = "--max-errors 1 --json";
    let run =
        bench(&format!("udp {} --requests 100 --concurrency 1 --timeout 500ms {limits}", udp(Udp::Drop(50))));
    assert_eq!((run.code, &run.json()["passed"]), (1, &false.into()), "{}", run.stdout);
    assert!(run.stderr.contains("2 errors, --max-errors 1"), "{}", run.stderr);
}

fn a_slow_answer_fails_a_p99_limit() {
    let target = tcp(Tcp::Slow(1500));
    let run = bench(&format!("tcp {target} --connections 100 --max-p99 1s --json"));
    assert_eq!((run.code, run.number("/requests")), (1, 100.0), "{}", run.stdout);
    assert!(
        run.number("/latency_us/p99") >= 1_500_000.0 && run.number("/latency_us/p50") < 1_500_000.0,
        "{}",
        run.stdout
    );
    assert!(run.stderr.contains("--max-p99"), "{}", run.stderr);
}

fn datagrams_are_answered_or_accounted_for_by_kind() {
    let run = bench(&format!("udp {} --requests 1000 --concurrency 5 --size 1400 --json", udp(Udp::Echo)));
    assert_eq!((run.code, run.error_count()), (0, 0), "{}", run.stdout);
    assert_eq!((run.number("/connections"), run.number("/requests")), (5.0, 1000.0));
    assert_eq!(run.number("/bytes"), 2.0 * 1000.0 * 1400.0);
    let one_flow = "--requests 100 --concurrency 1 --timeout 500ms --json";
    let run = bench(&format!("udp {} {one_flow}", udp(Udp::Wrong(25))));
    assert_eq!((run.errors("wrong_reply"), run.error_count()), (4, 4), "{}", run.stdout);
    let run = bench(&format!("udp {} {one_flow}", udp(Udp::Short(25))));
    assert_eq!((run.errors("short_reply"), run.error_count()), (4, 4), "{}", run.stdout);
    // The second copy of the last answer may come after the end.
    let run = bench(&format!("udp {} {one_flow}", udp(Udp::Twice(30))));
    assert_eq!((run.errors("duplicate_datagram"), run.error_count()), (3, 3), "{}", run.stdout);
    let run = bench(&format!("udp {} --requests 10 --timeout 100ms --json", udp(Udp::Silent)));
    assert_eq!((run.code, run.errors("lost_datagram"), run.error_count()), (1, 10, 10), "{}", run.stdout);
}

fn a_datagram_stream_keeps_several_under_way() {
    let run =
        bench(&format!("udp {} --pattern stream --requests 5000 --concurrency 3 --json", udp(Udp::Echo)));
    run.ended(0, 5000, 0);
    let run = bench(&format!(
        "udp {} --pattern stream --requests 1000 --concurrency 1 --timeout 500ms --json",
        udp(Udp::Drop(250))
    ));
    assert_eq!((run.errors("lost_datagram"), run.number("/requests")), (4, 996.0), "{}", run.stdout);
}

fn udp_connect_opens_a_flow_for_each_exchange() {
    let run = bench(&format!("udp {} --pattern connect --connections 300 --json", udp(Udp::Echo)));
    assert_eq!(
        (run.code, run.number("/connections"), run.number("/requests")),
        (0, 300.0, 300.0),
        "{}",
        run.stdout
    );
}

fn an_open_loop_keeps_its_rate_and_charges_a_stall_to_all_who_waited() {
    // The last of 500 starts is due after 998 ms, not sooner, and all are made.
    let run = bench(&format!("tcp {} --rate 500 --arrivals fixed --requests 500 --json", tcp(Tcp::Echo)));
    run.ended(0, 500, 0);
    assert!(run.number("/seconds") >= 0.998, "{}", run.stdout);
    // One connection, 100 starts a second, and the first answer takes 500 ms:
    // about fifty starts fall into the stall, and wait for what is left of it.
    // Without the intended start only one latency in a hundred would show it.
    let run = bench(&format!(
        "tcp {} --pattern request --concurrency 1 --rate 100 --arrivals fixed --requests 100 --json",
        tcp(Tcp::Slow(500))
    ));
    assert_eq!((run.code, run.number("/requests")), (0, 100.0), "{}", run.stdout);
    assert!(run.number("/latency_us/p90") > 300_000.0, "{}", run.stdout);
    assert!(run.number("/open_loop/waited") >= 40.0, "{}", run.stdout);
}

fn new_connections_of_an_open_loop_are_charged_for_a_stall_too() {
    // Ten connections due within 100 ms, one at once; the first takes 400 ms,
    // so the last begins 300 ms late.
    let run = bench(&format!(
        "tcp {} --concurrency 1 --rate 100 --arrivals fixed --connections 10 --json",
        tcp(Tcp::Slow(400))
    ));
    assert_eq!((run.code, run.number("/requests")), (0, 10.0), "{}", run.stdout);
    assert!(run.number("/latency_us/min") > 290_000.0, "{}", run.stdout);
}

fn a_target_too_slow_for_the_rate_is_said_to_be() {
    let run = bench(&format!(
        "tcp {} --concurrency 1 --rate 1000 --duration 1s --timeout 1s --json",
        tcp(Tcp::Slow(600))
    ));
    assert!(run.number("/open_loop/not_started") > 100.0, "{}", run.stdout);
    assert!(run.stdout.contains("starts were due and never made"), "{}", run.stdout);
}

fn a_warm_up_is_left_out_of_the_rates() {
    // One exchange a connection; those of the first half are not counted.
    let run = bench(&format!("tcp {} --warmup 500ms --duration 500ms --json", tcp(Tcp::Echo)));
    let (connections, requests) = (run.number("/connections"), run.number("/requests"));
    assert!(requests > 0.0 && requests < connections, "{}", run.stdout);
    assert_eq!(run.number("/seconds"), 0.5);
}

fn more_connections_than_one_address_has_ports_take_other_addresses() {
    let (target, other) = (tcp(Tcp::Echo), tcp(Tcp::Echo));
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40099").expect("our own namespace");
    let words = "--pattern request --connections 250 --requests 250 --json";
    let run = bench(&format!("tcp {target} {words}"));
    assert_eq!((run.code, run.error_count(), run.number("/connections")), (0, 0, 250.0), "{}", run.stdout);
    assert!(run.stdout.contains("3 addresses were used"), "{}", run.stdout);
    let run = bench(&format!("tcp {other} --source 127.0.0.1 {words}"));
    assert!(run.errors("no_port") >= 50, "{}", run.stdout);
    assert!(run.stdout.contains("add client addresses with --source"), "{}", run.stdout);
}

fn control_c_ends_the_run_and_still_shows_what_was_measured() {
    let group = group(1, &[0]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_evenkeel"))
        .args(["bench", "tcp", &group.address.to_string(), "--duration", "1h", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    support::within(Duration::from_secs(20), "connections come", || {
        group.accepted[0].load(Ordering::SeqCst) >= 200
    });
    let id = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGINT).expect("our child");
    let mut text = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut text).expect("text");
    assert_eq!(child.wait().expect("our child").code(), Some(0), "{text}");
    let json: serde_json::Value = serde_json::from_str(&text).expect("all of the result");
    assert!(json["requests"].as_u64() > Some(100) && json["seconds"].as_f64() < Some(30.0), "{text}");
    assert_eq!(json["notes"][0], "interrupted before its time");
}
