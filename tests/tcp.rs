//! TCP through the daemon: bytes, ends, resets, servers, time-outs.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use socket2::SockRef;
use support::daemon::Daemon;
use support::servers::{connect, echo, exchange, local, tcp_server};
use support::{eventually, pattern, within};

fn main() {
    support::run(tests![
        a_gibibyte_passes_both_ways_through_four_workers_unchanged,
        client_half_close_still_receives_the_reply,
        server_half_close_still_takes_the_upload,
        a_servers_reset_reaches_the_client_after_what_was_sent_before,
        a_clients_reset_reaches_the_server_after_what_was_sent_before,
        a_reader_that_stops_stops_the_sender,
        the_next_server_is_tried_when_one_refuses,
        a_server_that_does_not_answer_is_given_up_after_connect_timeout,
        a_client_without_any_server_is_reset,
        an_idle_session_is_ended_and_a_busy_one_is_not,
        a_half_closed_session_has_its_own_timeout,
        a_session_ends_at_its_max_age,
        ipv6_and_ipv4_are_separate_listeners,
        a_unix_server_is_served,
        backups_serve_only_when_the_others_fail,
        least_connections_fills_the_emptier_server,
        services_answer_by_themselves,
        ten_thousand_connections_spread_by_chance_alone,
        a_busy_session_does_not_starve_the_others,
        urgent_data_stays_in_the_stream,
    ])
}

const LISTENER: &str =
    "[[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nupstream = \"back\"\n";

/// Servers that count connections see those of clients alone.
const UNCHECKED: &str = "[upstream.health]\ncheck = \"none\"\npassive = false\n";

/// A daemon on 127.0.0.1:8080 in front of these servers.
fn forward(workers: usize, more: &str, servers: &[String]) -> Daemon {
    let mut text = format!(
        "[daemon]\nworkers = {workers}\n{LISTENER}{more}\n[[upstream]]\nname = \"back\"\n{UNCHECKED}"
    );
    for server in servers {
        text += &format!("[[upstream.server]]\naddress = \"{server}\"\n");
    }
    Daemon::ready(&text)
}

fn front() -> TcpStream {
    connect(local(8080))
}

fn a_gibibyte_passes_both_ways_through_four_workers_unchanged() {
    const EACH: usize = 128 << 20;
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = forward(4, "", &[server.to_string()]);
    let block = pattern(0, 1 << 20);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let stream = front();
                let mut writer = stream.try_clone().unwrap();
                let block = &block;
                scope.spawn(move || {
                    for _ in 0..EACH / block.len() {
                        writer.write_all(block).unwrap();
                    }
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let (mut reader, mut got, mut buffer) = (stream, 0, vec![0; 1 << 20]);
                loop {
                    let count = reader.read(&mut buffer).unwrap();
                    if count == 0 {
                        break;
                    }
                    let mut at = 0;
                    while at < count {
                        let offset = (got + at) % block.len();
                        let step = (count - at).min(block.len() - offset);
                        assert!(buffer[at..at + step] == block[offset..offset + step], "a byte changed");
                        at += step;
                    }
                    got += count;
                }
                assert_eq!(got, EACH);
            });
        }
    });
    let listener = daemon.listener("front");
    assert_eq!((listener.bytes_in, listener.bytes_out), (8 * EACH as u64, 8 * EACH as u64));
}

fn client_half_close_still_receives_the_reply() {
    let (server, _) = tcp_server("127.0.0.1:0", |mut stream| {
        let mut question = Vec::new();
        stream.read_to_end(&mut question)?;
        stream.write_all(&pattern(question.len(), 1_000_000))
    });
    let _daemon = forward(2, "", &[server.to_string()]);
    let mut client = front();
    client.write_all(&[1; 5000]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert!(answer == pattern(5000, 1_000_000), "{} bytes came", answer.len());
}

fn server_half_close_still_takes_the_upload() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let (server, _) = tcp_server("127.0.0.1:0", move |mut stream| {
        stream.write_all(b"go on")?;
        stream.shutdown(Shutdown::Write)?;
        let mut upload = Vec::new();
        stream.read_to_end(&mut upload)?;
        sender.lock().unwrap().send(upload).unwrap();
        Ok(())
    });
    let _daemon = forward(2, "", &[server.to_string()]);
    let mut client = front();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"go on");
    client.write_all(&pattern(0, 1_000_000)).unwrap();
    drop(client);
    assert!(receiver.recv_timeout(Duration::from_secs(10)).unwrap() == pattern(0, 1_000_000));
}

/// Reads to the end; whether it was a reset.
fn read_all(stream: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => (bytes, false),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (bytes, true),
        Err(error) => panic!("{error}"),
    }
}

fn reset(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

fn a_servers_reset_reaches_the_client_after_what_was_sent_before() {
    // Enough that it cannot all be in the client's hands when the reset comes.
    const BEFORE: usize = 3_000_000;
    let (server, _) = tcp_server("127.0.0.1:0", |mut stream| {
        stream.write_all(&pattern(0, BEFORE))?;
        // Let the peer take it all: its own reset would throw it away.
        within(Duration::from_secs(10), "all is acknowledged", || {
            evenkeel::sys::stream::Stream::from(std::os::fd::OwnedFd::from(stream.try_clone().unwrap()))
                .unsent()
                .unwrap()
                == 0
        });
        reset(&stream);
        Ok(())
    });
    let _daemon = forward(1, "", &[server.to_string()]);
    let mut client = front();
    std::thread::park_timeout(Duration::from_millis(300)); // a client that is slow to begin
    let (bytes, was_reset) = read_all(&mut client);
    assert!(was_reset, "a reset must not look like an end");
    assert!(bytes == pattern(0, BEFORE), "{} of {BEFORE} bytes came", bytes.len());
}

fn a_clients_reset_reaches_the_server_after_what_was_sent_before() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let sender = std::sync::Mutex::new(sender);
    let (server, _) = tcp_server("127.0.0.1:0", move |mut stream| {
        sender.lock().unwrap().send(read_all(&mut stream)).unwrap();
        Ok(())
    });
    let _daemon = forward(1, "", &[server.to_string()]);
    let mut client = front();
    client.write_all(b"last words").unwrap();
    eventually("the daemon took it", || {
        evenkeel::sys::stream::Stream::from(std::os::fd::OwnedFd::from(client.try_clone().unwrap()))
            .unsent()
            .unwrap()
            == 0
    });
    reset(&client);
    drop(client);
    let (bytes, was_reset) = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!((bytes.as_slice(), was_reset), (b"last words".as_slice(), true));
}

fn a_reader_that_stops_stops_the_sender() {
    let (server, _) = tcp_server("127.0.0.1:0", |stream| {
        // Never reads.
        std::thread::park_timeout(Duration::from_secs(60));
        drop(stream);
        Ok(())
    });
    let daemon = forward(1, "", &[server.to_string()]);
    let mut client = front();
    client.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut sent = 0;
    while let Ok(count) = client.write(&[0; 65536]) {
        sent += count;
        assert!(sent < 100 << 20, "nothing held the sender back");
    }
    let worker = daemon.worker(0).pid;
    let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
    let kib = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib: u64 = kib.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 64 << 10, "the worker keeps {kib} KiB");
}

/// An address where nobody listens.
fn refusing() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn the_next_server_is_tried_when_one_refuses() {
    let (server, count) = tcp_server("127.0.0.1:0", echo);
    // One refuses at once, one when the answer comes back.
    let daemon = forward(2, "", &["unix:/nonexistent/x.sock".into(), refusing(), server.to_string()]);
    for i in 0..20 {
        assert_eq!(exchange(&mut front(), b"hello").unwrap(), b"hello", "connection {i}");
    }
    assert_eq!(count.load(Ordering::SeqCst), 20);
    let servers = &daemon.status().upstreams[0].servers;
    assert!(servers[0].failures > 0 && servers[2].connections == 20, "{servers:?}");
}

/// An address that answers no handshake: its queue is full.
fn silent() -> (TcpListener, Vec<TcpStream>, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let mut fill = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        fill.push(stream);
        assert!(fill.len() < 50, "the queue never fills");
    }
    (listener, fill, address.to_string())
}

fn a_server_that_does_not_answer_is_given_up_after_connect_timeout() {
    let (_listener, _fill, dead) = silent();
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let text = format!(
        "[daemon]\nworkers = 1\n{LISTENER}[[upstream]]\nname = \"back\"\nconnect_timeout = \"300ms\"\n\
         [[upstream.server]]\naddress = \"{dead}\"\n[[upstream.server]]\naddress = \"{server}\"\n"
    );
    let daemon = Daemon::ready(&text);
    for _ in 0..2 {
        assert_eq!(exchange(&mut front(), b"hello").unwrap(), b"hello");
    }
    assert_eq!(daemon.status().upstreams[0].servers[0].failures, 1);
}

fn a_client_without_any_server_is_reset() {
    let daemon = forward(1, "", &[refusing()]);
    // The reset may come before connect(2) has returned.
    match TcpStream::connect(local(8080)) {
        Ok(mut client) => assert_eq!(read_all(&mut client), (Vec::new(), true)),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    eventually("the end is counted", || daemon.listener("front").ended.get("connect_failed") == Some(&1));
}

fn an_idle_session_is_ended_and_a_busy_one_is_not() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = forward(1, "[listener.tcp]\nidle_timeout = \"400ms\"", &[server.to_string()]);
    let (mut busy, mut idle) = (front(), front());
    exchange(&mut idle, b"x").unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1500) {
        exchange(&mut busy, b"x").expect("a busy session goes on");
        std::thread::park_timeout(Duration::from_millis(50));
    }
    assert!(read_all(&mut idle).1, "the idle one is reset");
    assert_eq!(daemon.listener("front").ended.get("idle_timeout"), Some(&1));
}

fn a_half_closed_session_has_its_own_timeout() {
    let (server, _) = tcp_server("127.0.0.1:0", |mut stream| {
        // Takes the end and never answers.
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        std::thread::park_timeout(Duration::from_secs(60));
        Ok(())
    });
    let daemon = forward(1, "[listener.tcp]\nhalf_close_timeout = \"300ms\"", &[server.to_string()]);
    let mut client = front();
    client.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut client).1);
    eventually("the end is counted", || daemon.listener("front").ended.get("half_close_timeout") == Some(&1));
}

fn a_session_ends_at_its_max_age() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = forward(1, "[listener.tcp]\nmax_age = \"1s\"", &[server.to_string()]);
    let mut client = front();
    let begin = Instant::now();
    while exchange(&mut client, b"x").is_ok() {
        assert!(begin.elapsed() < Duration::from_secs(5), "it grows older than its age");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    assert!(begin.elapsed() >= Duration::from_millis(850), "at most a tenth early: {:?}", begin.elapsed());
    eventually("the end is counted", || daemon.listener("front").ended.get("max_age") == Some(&1));
}

fn ipv6_and_ipv4_are_separate_listeners() {
    let text = "[daemon]\nworkers = 2\n\
        [[listener]]\nname = \"four\"\nmode = \"tcp\"\nbind = [\"0.0.0.0:8080\", \"127.0.0.1:8082\"]\nservice = \"identify\"\n\
        [[listener]]\nname = \"six\"\nmode = \"tcp\"\nbind = [\"[::]:8080\", \"[::1]:8081\"]\nservice = \"identify\"\n";
    let _daemon = Daemon::ready(text);
    for (address, name) in
        [("127.0.0.1:8080", "four"), ("127.0.0.1:8082", "four"), ("[::1]:8080", "six"), ("[::1]:8081", "six")]
    {
        let mut line = [0; 200];
        let count = connect(address.parse::<std::net::SocketAddr>().unwrap()).read(&mut line).unwrap();
        let line = String::from_utf8_lossy(&line[..count]).into_owned();
        assert!(line.starts_with(&format!("evenkeel listener={name} slot=")), "{address}: {line}");
    }
}

fn a_unix_server_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).unwrap();
                stream.write_all(&all).unwrap();
            });
        }
    });
    let _daemon = forward(2, "", &[format!("unix:{}", path.display())]);
    for _ in 0..20 {
        let mut client = front();
        client.write_all(&pattern(0, 500_000)).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert!(read_all(&mut client) == (pattern(0, 500_000), false));
    }
}

fn backups_serve_only_when_the_others_fail() {
    let (main, main_count) = tcp_server("127.0.0.1:0", echo);
    let (backup, backup_count) = tcp_server("127.0.0.1:0", echo);
    let config = |first: &str| {
        format!(
            "[daemon]\nworkers = 1\n{LISTENER}[[upstream]]\nname = \"back\"\n{UNCHECKED}[[upstream.server]]\naddress = \"{first}\"\n\
             [[upstream.server]]\naddress = \"{backup}\"\nbackup = true\n"
        )
    };
    {
        let _daemon = Daemon::ready(&config(&main.to_string()));
        (0..10).for_each(|_| drop(exchange(&mut front(), b"x").unwrap()));
        assert_eq!((main_count.load(Ordering::SeqCst), backup_count.load(Ordering::SeqCst)), (10, 0));
    }
    let _daemon = Daemon::ready(&config(&refusing()));
    (0..10).for_each(|_| drop(exchange(&mut front(), b"x").unwrap()));
    assert_eq!(backup_count.load(Ordering::SeqCst), 10);
}

fn least_connections_fills_the_emptier_server() {
    let (one, _) = tcp_server("127.0.0.1:0", echo);
    let (two, _) = tcp_server("127.0.0.1:0", echo);
    let text = format!(
        "[daemon]\nworkers = 4\n{LISTENER}[[upstream]]\nname = \"back\"\nbalance = \"least-connections\"\n\
         [[upstream.server]]\naddress = \"{one}\"\n[[upstream.server]]\naddress = \"{two}\"\nweight = 3\n"
    );
    let daemon = Daemon::ready(&text);
    let mut sessions = Vec::new();
    for _ in 0..80 {
        let mut client = front();
        exchange(&mut client, b"x").unwrap();
        sessions.push(client);
    }
    let active: Vec<u64> = daemon.status().upstreams[0].servers.iter().map(|server| server.active).collect();
    // One after the other, counted over all four workers: exact.
    assert_eq!(active, [20, 60]);
}

fn services_answer_by_themselves() {
    let text = "[daemon]\nworkers = 1\n\
        [[listener]]\nname = \"e\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8081\"\nservice = \"echo\"\n\
        [[listener]]\nname = \"d\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8082\"\nservice = \"discard\"\n\
        [[listener]]\nname = \"i\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8083\"\nservice = \"identify\"\n";
    let daemon = Daemon::ready(text);
    let talk = |port: u16| {
        let mut client = connect(local(port));
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (bytes, was_reset) = read_all(&mut client);
        assert!(!was_reset);
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(talk(8081), "hello");
    assert_eq!(talk(8082), "");
    let pid = daemon.worker(0).pid;
    assert_eq!(talk(8083), format!("evenkeel listener=i slot=0 pid={pid} generation=1\nhello"));
}

/// A chi-square test at p = 0.0001: it fails by chance once in ten thousand
/// runs, where the kernel's hash is fair.
fn ten_thousand_connections_spread_by_chance_alone() {
    let text = "[daemon]\nworkers = 4\n\
        [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"identify\"\n";
    let daemon = Daemon::ready(text);
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                for _ in 0..1000 {
                    let mut byte = [0; 1];
                    let mut client = front();
                    client.read_exact(&mut byte).unwrap();
                    reset(&client);
                }
            });
        }
    });
    eventually("all sessions have ended", || daemon.listener("front").active == 0);
    let listener = daemon.listener("front");
    assert_eq!(listener.connections, 10_000);
    assert_eq!(listener.spread.per_slot.iter().sum::<u64>(), 10_000);
    assert!(listener.spread.p_value > 0.0001, "{:?}", listener.spread);
}

fn a_busy_session_does_not_starve_the_others() {
    let text = "[daemon]\nworkers = 1\n\
        [[listener]]\nname = \"front\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8080\"\nservice = \"echo\"\n\
        [[listener]]\nname = \"sink\"\nmode = \"tcp\"\nbind = \"127.0.0.1:8081\"\nservice = \"discard\"\n";
    let _daemon = Daemon::ready(text);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut stream = connect(local(8081));
                let block = vec![0; 1 << 20];
                while !stop.load(Ordering::Relaxed) {
                    stream.write_all(&block).unwrap();
                }
            });
        }
        let mut client = front();
        for _ in 0..200 {
            exchange(&mut client, b"still there?").expect("an answer within the time-out");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

fn urgent_data_stays_in_the_stream() {
    let (server, _) = tcp_server("127.0.0.1:0", |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        stream.write_all(&all)
    });
    let _daemon = forward(1, "", &[server.to_string()]);
    let mut client = front();
    for _ in 0..50 {
        client.write_all(b"before").unwrap();
        SockRef::from(&client).send_out_of_band(b"!").unwrap();
        client.write_all(b"after").unwrap();
    }
    client.shutdown(Shutdown::Write).unwrap();
    let (bytes, _) = read_all(&mut client);
    assert_eq!(String::from_utf8(bytes).unwrap(), "before!after".repeat(50));
}
