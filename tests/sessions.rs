//! `evenkeel sessions`: what it lists, how it filters, whom it ends.

mod support;

use std::io::{ErrorKind, Read};
use std::net::TcpStream;

use evenkeel::control::sessions::Found;
use nix::sys::signal::Signal;
use support::daemon::{Daemon, signal};
use support::eventually;
use support::servers::{connect, echo, exchange, local, tcp_server};

fn main() {
    support::run(tests![
        sessions_of_all_workers_are_listed_with_their_figures,
        filters_take_what_they_name,
        ended_sessions_see_a_reset_and_the_others_nothing,
        a_worker_that_does_not_answer_is_said_and_the_others_are_listed,
        what_was_mistyped_is_told,
    ])
}

fn config(first: std::net::SocketAddr, second: std::net::SocketAddr) -> String {
    format!(
        "[daemon]\nworkers = 3\nhang_timeout = \"1h\"\n\
         [[listener]]\nname = \"one\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"both\"\n\
         [[listener]]\nname = \"two\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8081\"\nservice = \"echo\"\n\
         [[upstream]]\nname = \"both\"\n[[upstream.server]]\naddress = \"{first}\"\n\
         [[upstream.server]]\naddress = \"{second}\"\n"
    )
}

struct Scene {
    daemon: Daemon,
    one: Vec<TcpStream>,
    two: Vec<TcpStream>,
    server: String,
}

/// Twelve sessions with servers, five with the worker itself, a byte moved.
fn scene() -> Scene {
    let (first, _) = tcp_server("127.0.0.1:0", echo);
    let (second, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(first, second));
    let mut one: Vec<TcpStream> = (0..12).map(|_| connect(local(8080))).collect();
    let mut two: Vec<TcpStream> = (0..5).map(|_| connect(local(8081))).collect();
    for client in one.iter_mut().chain(&mut two) {
        exchange(client, b"x").unwrap();
    }
    Scene { daemon, one, two, server: first.to_string() }
}

fn sessions(daemon: &Daemon, arguments: &[&str]) -> Found {
    let output = daemon.command(&[&["sessions", "--json"], arguments].concat());
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn sessions_of_all_workers_are_listed_with_their_figures() {
    let scene = scene();
    let found = sessions(&scene.daemon, &[]);
    assert_eq!((found.matched, found.sessions.len(), found.ended), (17, 17, 0));
    for client in &scene.one {
        let address = client.local_addr().unwrap();
        let line =
            found.sessions.iter().find(|line| line.client == Some(address)).expect("every client is there");
        assert_eq!((line.listener.as_str(), line.upstream.as_deref()), ("one", Some("both")));
        assert!(line.server.is_some());
        assert_eq!((line.state.as_str(), line.bytes_in, line.bytes_out), ("open", 1, 1));
        assert_eq!(line.pid, scene.daemon.worker(line.slot).pid);
    }
    let ages: Vec<u64> = found.sessions.iter().map(|line| line.age_ms).collect();
    assert!(ages.is_sorted_by(|a, b| a >= b), "{ages:?}");
    // A list has its limit, the count has none.
    let found = sessions(&scene.daemon, &["--limit", "4"]);
    assert_eq!((found.matched, found.sessions.len()), (17, 4));
}

fn filters_take_what_they_name() {
    let scene = scene();
    let count = |arguments: &[&str]| sessions(&scene.daemon, arguments).matched;
    assert_eq!(count(&["--listener", "two"]), 5);
    assert_eq!(count(&["--upstream", "both"]), 12);
    // Three workers in turn from different places: about half of twelve.
    let of_first = count(&["--server", &scene.server]);
    assert!((4..=8).contains(&of_first), "{of_first}");
    assert_eq!(count(&["--client", "127.0.0.0/8"]), 17);
    assert_eq!(count(&["--client", "10.0.0.0/8"]), 0);
    let client = scene.two[3].local_addr().unwrap().to_string();
    assert_eq!(count(&["--client", &client]), 1);
    assert_eq!(count(&["--client", &client, "--listener", "one"]), 0);
}

fn ended_sessions_see_a_reset_and_the_others_nothing() {
    let mut scene = scene();
    let victim = scene.one[7].local_addr().unwrap().to_string();
    let found = sessions(&scene.daemon, &["--kill", "--client", &victim]);
    assert_eq!((found.matched, found.ended), (1, 1));
    let error = scene.one[7].read(&mut [0; 8]).expect_err("a reset is no end of file");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(sessions(&scene.daemon, &["--kill", "--listener", "two"]).ended, 5);
    scene.one.remove(7);
    for client in &mut scene.one {
        exchange(client, b"still here").unwrap();
    }
    let ended = scene.daemon.listener("two").ended;
    assert_eq!(ended.get("killed"), Some(&5), "{ended:?}");
    assert_eq!(sessions(&scene.daemon, &[]).matched, 11);
    assert_eq!(sessions(&scene.daemon, &["--kill", "--all"]).ended, 11);
    eventually("none is counted any more", || scene.daemon.listener("one").active == 0);
}

fn a_worker_that_does_not_answer_is_said_and_the_others_are_listed() {
    let scene = scene();
    let stopped = scene.daemon.worker(1);
    signal(stopped.pid, Signal::SIGSTOP);
    let output = scene.daemon.command(&["sessions"]);
    signal(stopped.pid, Signal::SIGCONT);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("1 worker(s) gave no answer"), "{error}");
    let listed = String::from_utf8_lossy(&output.stdout);
    assert!(listed.contains(&format!("{} sessions", 17 - stopped.active)), "{listed}");
}

fn what_was_mistyped_is_told() {
    let scene = scene();
    let refused = |arguments: &[&str], text: &str| {
        let output = scene.daemon.command(&[&["sessions"], arguments].concat());
        let error = String::from_utf8_lossy(&output.stderr).to_string();
        assert!(output.status.code() == Some(2) && error.contains(text), "{error}");
    };
    refused(&["--kill"], "--kill alone would end every session");
    refused(&["--client", "10.0.0"], "write an address");
    refused(&["--all"], "--kill");
    let unknown = |arguments: &[&str], text: &str| {
        let (code, said) = scene.daemon.run(&[&["sessions"], arguments].concat());
        assert!(code == Some(1) && said.contains(text), "{code:?} {said}");
    };
    unknown(&["--listener", "oen"], "no listener \"oen\"\n  did you mean \"one\"?");
    unknown(&["--listener", "web", "--kill"], "no listener \"web\"\n  there are: one, two");
    unknown(&["--upstream", "nothing"], "no upstream \"nothing\"\n  there are: both");
    unknown(&["--server", "10.9.9.9:1"], "no server \"10.9.9.9:1\"\n  there are: ");
    assert_eq!(sessions(&scene.daemon, &["--client", "192.0.2.1"]).matched, 0);
    let rubbish = serde_json::json!({"command": "sessions", "query": {"filter": {"lisener": "one"}}});
    let limit = std::time::Duration::from_secs(5);
    let error = evenkeel::control::client::ask(&scene.daemon.socket(), &rubbish, limit).unwrap_err();
    assert!(error.contains("unknown field `lisener`"), "{error}");
    assert_eq!(sessions(&scene.daemon, &[]).matched, 17);
}
