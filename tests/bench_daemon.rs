//! The load generator against the daemon itself: both ways of counting the
//! spread, and the bytes through an upstream.

mod bench_support;
mod support;

use bench_support::{Tcp, bench, tcp};
use serde_json::Value;
use support::daemon::Daemon;

fn main() {
    support::run(tests![
        the_daemons_counters_and_its_identify_lines_agree,
        every_byte_comes_back_through_a_proxied_listener,
        a_worker_killed_in_an_open_loop_costs_what_is_counted,
    ])
}

fn per_slot(json: &Value) -> Vec<u64> {
    let counts = json["spread"]["per_slot"].as_array().unwrap_or_else(|| panic!("{json:#}"));
    counts.iter().map(|count| count.as_u64().expect("a count")).collect()
}

const IDENTIFY: &str = "workers = 4\n\
    [[listener]]\nname = \"who\"\nbind = \"0.0.0.0:7000\"\nmode = \"tcp\"\nservice = \"identify\"\n";

fn the_daemons_counters_and_its_identify_lines_agree() {
    let daemon = Daemon::ready(IDENTIFY);
    let words = format!("tcp 127.0.0.1:7000 --connections 2000 --socket {}", daemon.socket().display());
    // A fair hash is called unfair once in a thousand runs; three in a row, once in 10^9.
    let fair = (0..3).any(|_| {
        let run = bench(&format!("{words} --json"));
        assert_eq!((run.code, run.error_count()), (0, 0), "{}{}", run.stdout, run.stderr);
        let json = run.json();
        assert_eq!(
            (&json["spread"]["source"], &json["spread"]["listener"]),
            (&"control".into(), &"who".into())
        );
        assert_eq!((per_slot(&json).len(), per_slot(&json).iter().sum::<u64>()), (4, 2000), "{json:#}");
        assert_eq!(json["notes"], Value::Array(Vec::new()), "{json:#}");
        json["spread"]["verdict"] == "chance"
    });
    assert!(fair);
    // Without the socket the lines tell: as many as the daemon counted meanwhile.
    let before = daemon.listener("who").spread.per_slot;
    let run = bench("tcp 127.0.0.1:7000 --connections 2000 --slots 4 --json");
    let after = daemon.listener("who").spread.per_slot;
    let counted: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert_eq!(run.json()["spread"]["source"], "identify");
    assert_eq!(per_slot(&run.json()), counted, "{}", run.stdout);
}

fn every_byte_comes_back_through_a_proxied_listener() {
    let behind = tcp(Tcp::Echo);
    let daemon = Daemon::ready(&format!(
        "workers = 2\n[[listener]]\nname = \"in\"\nbind = \"127.0.0.1:7001\"\nmode = \"tcp\"\nupstream = \"out\"\n\
         [[upstream]]\nname = \"out\"\n[[upstream.server]]\naddress = \"{behind}\"\n"
    ));
    for words in [
        "--connections 500 --size 5000",
        "--pattern request --connections 20 --requests 2000 --size 3000",
        "--pattern stream --connections 4 --requests 2000",
    ] {
        let run = bench(&format!("tcp 127.0.0.1:7001 {words} --socket {} --json", daemon.socket().display()));
        assert_eq!((run.code, run.error_count()), (0, 0), "{words}: {}{}", run.stdout, run.stderr);
    }
}

fn a_worker_killed_in_an_open_loop_costs_what_is_counted() {
    let daemon = Daemon::ready(IDENTIFY);
    let run = std::thread::spawn(|| {
        bench("tcp 127.0.0.1:7000 --rate 500 --requests 1000 --concurrency 500 --json")
    });
    support::eventually("connections come", || daemon.listener("who").connections > 200);
    daemon.kill_worker(1);
    let run = run.join().expect("the bench ends");
    // Whatever was lost is in the books: each start was answered or is an error.
    assert_eq!(run.number("/requests") as u64 + run.error_count(), 1000, "{}", run.stdout);
    assert!(run.number("/requests") > 900.0, "{}", run.stdout);
}
