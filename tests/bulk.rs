//! Bulk through the worker's pipes: every byte, in every way that it can end.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use socket2::SockRef;
use support::daemon::Daemon;
use support::servers::{connect, echo, local, tcp_server};
use support::{eventually, pattern, within};

fn main() {
    support::run(tests![
        both_ways_past_slow_readers_every_byte_arrives,
        a_half_close_in_the_middle_arrives_after_the_last_byte,
        a_reload_in_the_middle_loses_no_byte,
        a_reset_in_the_middle_arrives_and_spoils_nobody_elses_bytes,
        urgent_bytes_stay_in_their_place,
        many_streams_share_few_pipes,
        without_a_pipe_of_a_megabyte_bulk_is_copied needs ["root", "python3"],
    ])
}

fn config(workers: usize, server: &str) -> String {
    format!(
        "[daemon]\nworkers = {workers}\n[log]\nlevel = \"debug\"\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\n\
         bind = \"127.0.0.1:8080\"\nupstream = \"back\"\n[[upstream]]\nname = \"back\"\n\
         [[upstream.server]]\naddress = \"{server}\"\n"
    )
}

/// The pipes that the workers have: both ends, so none that they inherited.
fn pipe_count(daemon: &Daemon) -> usize {
    let workers = daemon.status().workers.into_iter().filter(|worker| worker.pid != 0);
    let pipes = |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut ends: Vec<_> = fds.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
        ends.retain(|end| end.to_string_lossy().starts_with("pipe:"));
        ends.sort();
        ends.windows(2).filter(|pair| pair[0] == pair[1]).count()
    };
    workers.map(|worker| pipes(worker.pid)).sum()
}

/// Waits until a sender has come to a halt, because everything between it and
/// its reader is full.
fn until_stuck(written: &AtomicUsize, whole: usize) {
    let mut last = usize::MAX;
    while written.load(Ordering::Relaxed) < whole {
        let now = written.load(Ordering::Relaxed);
        if now == last && now > 0 {
            return;
        }
        last = now;
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

fn write_counted(mut stream: &TcpStream, bytes: &[u8], written: &AtomicUsize) {
    for piece in bytes.chunks(200_000) {
        stream.write_all(piece).expect("it is taken in the end");
        written.fetch_add(piece.len(), Ordering::Relaxed);
    }
}

const WHOLE: usize = 40_000_000;

fn both_ways_past_slow_readers_every_byte_arrives() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(1, &server.to_string()));
    let client = connect(local(8080));
    let bytes = pattern(0, WHOLE);
    let written = AtomicUsize::new(0);
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            write_counted(&client, &bytes, &written);
            client.shutdown(Shutdown::Write).unwrap();
        });
        // Reads only when nothing moves any more, and then some: pipes and
        // buffers are full again and again.
        let mut reader = &client;
        while back.len() < WHOLE {
            until_stuck(&written, WHOLE);
            let piece = (WHOLE - back.len()).min(5_000_000);
            reader.take(piece as u64).read_to_end(&mut back).expect("the rest");
        }
        assert_eq!(reader.read(&mut [0]).expect("an end"), 0);
    });
    assert!(back == bytes, "other bytes came back");
    assert!(pipe_count(&daemon) > 0, "nothing went through a pipe");
    eventually("it has ended", || daemon.listener("front").ended.get("finished") == Some(&1));
    let listener = daemon.listener("front");
    assert_eq!((listener.bytes_in, listener.bytes_out), (WHOLE as u64, WHOLE as u64));
}

fn a_half_close_in_the_middle_arrives_after_the_last_byte() {
    let (server, _) = tcp_server("127.0.0.1:0", |mut stream| {
        // All of it in, to its end; then the answer.
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        stream.write_all(&all)
    });
    let daemon = Daemon::ready(&config(1, &server.to_string()));
    let mut client = connect(local(8080));
    let bytes = pattern(7, WHOLE);
    client.write_all(&bytes).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    client.read_to_end(&mut back).unwrap();
    assert!(back == bytes, "{} bytes came back", back.len());
    assert!(pipe_count(&daemon) > 0, "nothing went through a pipe");
    eventually("it has ended", || daemon.listener("front").ended.get("finished") == Some(&1));
}

fn a_reload_in_the_middle_loses_no_byte() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(2, &server.to_string()));
    let clients: Vec<TcpStream> = (0..6).map(|_| connect(local(8080))).collect();
    let written: Vec<AtomicUsize> = clients.iter().map(|_| AtomicUsize::new(0)).collect();
    let bytes = pattern(3, WHOLE);
    std::thread::scope(|scope| {
        for (client, written) in clients.iter().zip(&written) {
            scope.spawn(|| write_counted(client, &bytes, written));
        }
        // Stuck with full pipes: they travel with the sessions.
        written.iter().for_each(|written| until_stuck(written, WHOLE));
        assert!(pipe_count(&daemon) > 0, "nothing is in a pipe");
        for _ in 0..2 {
            reload(&daemon);
        }
        let readers: Vec<_> = clients
            .iter()
            .map(|client| {
                let (mut client, bytes) = (client, &bytes);
                scope.spawn(move || {
                    let mut back = vec![0; WHOLE];
                    client.read_exact(&mut back).expect("a session that moved goes on");
                    back == *bytes
                })
            })
            .collect();
        // And while they are under way.
        for _ in 0..3 {
            reload(&daemon);
        }
        assert!(readers.into_iter().all(|reader| reader.join().unwrap()), "other bytes came back");
    });
    assert_eq!(daemon.listener("front").active, 6);
}

#[track_caller]
fn reload(daemon: &Daemon) {
    daemon.succeed(&["reload"]);
    daemon.assert_all_handed_over();
}

fn a_reset_in_the_middle_arrives_and_spoils_nobody_elses_bytes() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    // The server does not take what the client had sent before: it waits for
    // its own bytes to be taken. Only the time-out ends that.
    let text = config(1, &server.to_string());
    let tcp = "upstream = \"back\"\n[listener.tcp]\nhalf_close_timeout = \"1s\"\n";
    let daemon = Daemon::ready(&text.replacen("upstream = \"back\"\n", tcp, 1));
    let bytes = pattern(11, WHOLE);
    for round in 1..=5 {
        // Its pipe is full when it goes.
        let client = connect(local(8080));
        let written = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for piece in bytes.chunks(200_000) {
                    if (&client).write_all(piece).is_err() {
                        break;
                    }
                    written.fetch_add(piece.len(), Ordering::Relaxed);
                }
            });
            until_stuck(&written, WHOLE);
            SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            // Wakes the writer; closing below resets.
            client.shutdown(Shutdown::Both).unwrap();
        });
        drop(client);
        within(Duration::from_secs(30), "it is gone", || daemon.listener("front").active == 0);
        let ended = daemon.listener("front").ended;
        assert_eq!(ended.values().sum::<u64>(), 2 * round - 1, "{ended:?}");
        // Who comes next finds no byte of it in the pipes.
        let client = connect(local(8080));
        let mut back = vec![0; WHOLE];
        std::thread::scope(|scope| {
            scope.spawn(|| (&client).write_all(&bytes).unwrap());
            (&client).read_exact(&mut back).unwrap();
        });
        assert!(back == bytes, "other bytes came back");
        drop(client);
        eventually("it is gone", || daemon.listener("front").active == 0);
    }
}

fn urgent_bytes_stay_in_their_place() {
    let (server, _) = tcp_server("127.0.0.1:0", |stream| {
        // As much as it sends to the client has an urgent byte in it too.
        let bytes = pattern(5, 10_000_000);
        let mut got = vec![0; bytes.len()];
        (&stream).read_exact(&mut got)?;
        assert!(got == bytes, "other bytes came up");
        send_with_urgent(&stream, &bytes);
        stream.shutdown(Shutdown::Write)
    });
    let _daemon = Daemon::ready(&config(1, &server.to_string()));
    let bytes = pattern(5, 10_000_000);
    for _ in 0..5 {
        let client = connect(local(8080));
        let mut back = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| send_with_urgent(&client, &bytes));
            (&client).read_to_end(&mut back).unwrap();
        });
        assert!(back == bytes, "{} bytes came back", back.len());
    }
}

/// In the middle, where the rest is in bulk, one byte is urgent.
fn send_with_urgent(mut stream: &TcpStream, bytes: &[u8]) {
    let middle = bytes.len() / 2;
    stream.write_all(&bytes[..middle]).unwrap();
    while let Err(error) = SockRef::from(stream).send_out_of_band(&bytes[middle..=middle]) {
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
    stream.write_all(&bytes[middle + 1..]).unwrap();
}

fn many_streams_share_few_pipes() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    let daemon = Daemon::ready(&config(1, &server.to_string()));
    let bytes = pattern(1, 6_000_000);
    let rounds = |clients: &[TcpStream]| {
        std::thread::scope(|scope| {
            for client in clients {
                let bytes = &bytes;
                scope.spawn(move || {
                    std::thread::scope(|inner| {
                        inner.spawn(|| (&*client).write_all(bytes).unwrap());
                        let mut back = vec![0; bytes.len()];
                        (&*client).read_exact(&mut back).unwrap();
                        assert!(back == *bytes, "other bytes came back");
                    })
                });
            }
        });
    };
    let clients: Vec<TcpStream> = (0..40).map(|_| connect(local(8080))).collect();
    rounds(&clients);
    let pipes = pipe_count(&daemon);
    assert!((1..=16).contains(&pipes), "{pipes} pipes");
}

/// Holds as many pipes as this user may have large.
const HOARD: &str = "
import fcntl, os, sys
held = []
try:
    while True:
        held.append(os.pipe())
        fcntl.fcntl(held[-1][0], 1031, 1 << 20)
except PermissionError:
    pass
print('full', flush=True)
sys.stdin.read()
";

fn without_a_pipe_of_a_megabyte_bulk_is_copied() {
    let (server, _) = tcp_server("127.0.0.1:0", echo);
    // The limit is the user's, over all its processes.
    let mut hoard = Command::new("python3")
        .args(["-c", HOARD])
        .uid(1)
        .gid(1)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = [0; 4];
    hoard.stdout.as_mut().unwrap().read_exact(&mut word).expect("the user's pipes are used up");
    let text = config(1, &server.to_string());
    let daemon = Daemon::ready(&text.replacen("[daemon]\n", "[daemon]\nuser = \"daemon\"\n", 1));
    let client = connect(local(8080));
    let bytes = pattern(0, WHOLE);
    let mut back = vec![0; WHOLE];
    std::thread::scope(|scope| {
        scope.spawn(|| (&client).write_all(&bytes).unwrap());
        (&client).read_exact(&mut back).unwrap();
    });
    assert!(back == bytes, "other bytes came back");
    assert_eq!(pipe_count(&daemon), 0);
    assert_eq!(daemon.log().matches("no pipe of 1 MiB").count(), 1, "{}", daemon.log());
    let _ = hoard.kill();
    let _ = hoard.wait();
}
