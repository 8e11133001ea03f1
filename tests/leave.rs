//! How the daemon leaves: nobody who was let in is reset.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::daemon::{Daemon, signal};
use support::eventually;
use support::servers::{connect, echo, exchange, local, tcp_server};

fn main() {
    support::run(tests![
        term_under_load_resets_nobody,
        term_under_load_resets_nobody_without_privileges needs ["root"],
        what_waits_in_the_queues_is_served_before_the_end,
        a_session_that_does_not_end_is_reset_at_drain_timeout,
        a_second_term_ends_at_once_with_exit_code_one,
        quit_waits_without_a_limit,
        a_worker_that_dies_while_leaving_still_has_its_queue_served,
        drain_and_stop_by_the_control_socket,
        an_idle_daemon_leaves_at_once,
    ])
}

const ECHO: &str =
    "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"echo\"\n";

fn daemon(more: &str) -> Daemon {
    Daemon::ready(&format!("[daemon]\n{more}\n{ECHO}"))
}

fn term_under_load_resets_nobody() {
    leave_under_load("");
}

/// Socket filters on TCP sockets may need CAP_NET_ADMIN, which these workers
/// have given up.
fn term_under_load_resets_nobody_without_privileges() {
    leave_under_load("user = \"nobody\"\n");
}

fn leave_under_load(more: &str) {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let mut daemon = Daemon::ready(&format!(
        "[daemon]\nworkers = 4\n{more}{}[[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{server}\"\n",
        ECHO.replace("service = \"echo\"", "upstream = \"back\"")
    ));
    let leaving = AtomicBool::new(false);
    let (served, late) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    // A handshake that is kept out is tried again by the
                    // kernel and refused once nobody listens: no reset of
                    // anybody who was let in.
                    let mut client = match TcpStream::connect_timeout(&local(8080), Duration::from_secs(10)) {
                        Ok(client) => client,
                        Err(error) => {
                            assert!(leaving.load(Ordering::SeqCst), "refused before the leave: {error}");
                            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
                            return;
                        }
                    };
                    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    let was_leaving = leaving.load(Ordering::SeqCst);
                    for _ in 0..3 {
                        let answer = exchange(&mut client, &[9; 2000]).expect("who is let in is served");
                        assert!(answer == [9; 2000]);
                    }
                    served.fetch_add(1, Ordering::SeqCst);
                    late.fetch_add(u64::from(was_leaving), Ordering::SeqCst);
                }
            });
        }
        let mut long = connect(local(8080));
        exchange(&mut long, b"begin").unwrap();
        eventually("there is load", || served.load(Ordering::SeqCst) > 500);
        leaving.store(true, Ordering::SeqCst);
        daemon.signal(Signal::SIGTERM);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(2) {
            exchange(&mut long, b"on and on").expect("an established session goes on");
        }
        drop(long);
    });
    assert!(daemon.wait(Duration::from_secs(10)).success(), "{}", daemon.log());
    assert!(daemon.notified().iter().any(|text| text.contains("STOPPING=1")));
    assert!(!daemon.log().contains("cannot be kept out"), "{}", daemon.log());
}

fn what_waits_in_the_queues_is_served_before_the_end() {
    let mut daemon = daemon("workers = 2");
    let pids: Vec<u32> = daemon.status().workers.iter().map(|worker| worker.pid).collect();
    for pid in &pids {
        signal(*pid, Signal::SIGSTOP);
    }
    let mut clients: Vec<TcpStream> = (0..200).map(|_| connect(local(8080))).collect();
    for client in &mut clients {
        client.write_all(b"waiting").unwrap();
    }
    daemon.signal(Signal::SIGTERM);
    eventually("it leaves", || daemon.log().contains("leaving"));
    for pid in &pids {
        signal(*pid, Signal::SIGCONT);
    }
    for client in &mut clients {
        let mut answer = [0; 7];
        client.read_exact(&mut answer).expect("who waited is served");
    }
    drop(clients);
    assert!(daemon.wait(Duration::from_secs(10)).success());
}

fn a_session_that_does_not_end_is_reset_at_drain_timeout() {
    let mut daemon = daemon("workers = 1\ndrain_timeout = \"700ms\"");
    let mut client = connect(local(8080));
    exchange(&mut client, b"x").unwrap();
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    let error = client.read(&mut [0; 10]).expect_err("a reset, not an end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(begin.elapsed() >= Duration::from_millis(690), "after {:?}", begin.elapsed());
    assert!(daemon.wait(Duration::from_secs(5)).success());
    daemon.says("drain_timeout is over: 1 sessions are reset");
}

fn a_second_term_ends_at_once_with_exit_code_one() {
    let mut daemon = daemon("workers = 2");
    let mut client = connect(local(8080));
    exchange(&mut client, b"x").unwrap();
    daemon.signal(Signal::SIGTERM);
    eventually("it leaves", || daemon.log().contains("leaving"));
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.wait(Duration::from_secs(2)).code(), Some(1));
}

fn quit_waits_without_a_limit() {
    let mut daemon = daemon("workers = 2\ndrain_timeout = \"100ms\"");
    let mut client = connect(local(8080));
    exchange(&mut client, b"x").unwrap();
    daemon.signal(Signal::SIGQUIT);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1500) {
        exchange(&mut client, b"x").expect("drain_timeout is no limit for QUIT");
    }
    drop(client);
    assert!(daemon.wait(Duration::from_secs(5)).success());
}

fn a_worker_that_dies_while_leaving_still_has_its_queue_served() {
    let mut daemon = daemon("workers = 1");
    let pid = daemon.worker(0).pid;
    signal(pid, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..50).map(|_| connect(local(8080))).collect();
    for client in &mut clients {
        client.write_all(b"waiting").unwrap();
    }
    daemon.signal(Signal::SIGTERM);
    eventually("it leaves", || daemon.log().contains("leaving"));
    signal(pid, Signal::SIGKILL);
    for client in &mut clients {
        let mut answer = [0; 7];
        client.read_exact(&mut answer).expect("who waited is served by the next worker");
    }
    drop(clients);
    assert!(daemon.wait(Duration::from_secs(10)).success());
}

fn drain_and_stop_by_the_control_socket() {
    for (command, exit_code) in [("drain", 0), ("stop", 0)] {
        let mut daemon = daemon("workers = 2");
        let socket = daemon.socket();
        daemon.succeed(&[command]);
        assert_eq!(daemon.wait(Duration::from_secs(10)).code(), Some(exit_code));
        assert!(!socket.exists(), "the control socket is taken away");
    }
}

fn an_idle_daemon_leaves_at_once() {
    let mut daemon = daemon("workers = 4");
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait(Duration::from_secs(10)).success());
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "no half-open handshake, no grace: {:?}",
        begin.elapsed()
    );
}
