//! Servers with known faults, and the bench run against them.
//!
//! Servers are threads of the test; they end with its process.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

/// The end of a bench run.
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// The JSON that was printed, which must be all of standard output.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.stdout, self.stderr))
    }

    pub fn number(&self, pointer: &str) -> f64 {
        let json = self.json();
        json.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer} in {json:#}"))
    }

    /// Fails unless this is how it ended: the exit code, exchanges, errors.
    #[track_caller]
    pub fn ended(&self, code: i32, requests: u64, errors: u64) {
        let found = (self.code, self.number("/requests"), self.error_count());
        assert_eq!(found, (code, requests as f64, errors), "{}{}", self.stdout, self.stderr);
    }

    /// Errors of a kind; 0 where it is not listed.
    pub fn errors(&self, kind: &str) -> u64 {
        self.json()["errors"][kind].as_u64().unwrap_or(0)
    }

    pub fn error_count(&self) -> u64 {
        let json = self.json();
        json["errors"].as_object().expect("an object").values().filter_map(Value::as_u64).sum()
    }
}

/// Runs `evenkeel bench` with these words.
pub fn bench(words: &str) -> Run {
    bench_words(&words.split_whitespace().collect::<Vec<_>>())
}

pub fn bench_words(words: &[&str]) -> Run {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_evenkeel"))
        .arg("bench")
        .args(words)
        .env_remove("EVENKEEL_SOCKET")
        .env("XDG_RUNTIME_DIR", "/nonexistent")
        .output()
        .expect("the program starts");
    Run {
        code: status.code().expect("it was not killed"),
        stdout: String::from_utf8(stdout).expect("text"),
        stderr: String::from_utf8(stderr).expect("text"),
    }
}

/// What a TCP server does with a connection.
#[derive(Clone, Copy)]
pub enum Tcp {
    Echo,
    /// Says who it is, then echoes. The slot of the n-th connection is `n` modulo this.
    Identify(u64),
    /// Echoes, but changes the byte at this offset of the stream.
    WrongByte(usize),
    /// Sends back only so many bytes, then closes.
    Short(usize),
    /// Reads once, then resets.
    Reset,
    /// Reads once, then closes.
    Close,
    /// Echoes so many bytes, then closes at the next.
    CloseAfter(usize),
    /// Never answers.
    Silent,
    /// Reads and drops.
    Discard,
    /// Sends as much as it can.
    Source,
    /// The first answer of every tenth connection is due after so many milliseconds.
    Slow(u16),
}

/// Starts a TCP server; its address.
pub fn tcp(kind: Tcp) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    // The standard library asks for 128; more clients than that come at once.
    socket2::SockRef::from(&listener).listen(4096).expect("a longer queue");
    let address = listener.local_addr().expect("it is bound");
    thread::spawn(move || serve(&listener, kind, None));
    address
}

fn serve(listener: &TcpListener, kind: Tcp, slot: Option<u64>) {
    for number in 0.. {
        let Ok((stream, _)) = listener.accept() else {
            return;
        };
        thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || drop(converse(stream, kind, slot.unwrap_or(number), number)))
            .expect("a thread");
    }
}

fn converse(mut stream: TcpStream, kind: Tcp, slot: u64, number: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut offset = 0;
    match kind {
        Tcp::Identify(modulus) => {
            let slot = slot % modulus;
            // In two pieces, as a network may deliver it.
            stream.write_all(b"evenkeel lis")?;
            stream.write_all(format!("tener=web slot={slot} pid=7 generation=1\n").as_bytes())?;
        }
        Tcp::Source => loop {
            stream.write_all(&buffer)?;
        },
        _ => {}
    }
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        match kind {
            Tcp::WrongByte(at) if (offset..offset + count).contains(&at) => buffer[at - offset] ^= 0x20,
            Tcp::Short(most) => {
                stream.write_all(&buffer[..most.min(count)])?;
                return Ok(());
            }
            Tcp::Reset => return socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)),
            Tcp::Close => return Ok(()),
            Tcp::CloseAfter(most) if offset >= most => return Ok(()),
            Tcp::Slow(millis) if number.is_multiple_of(10) && offset == 0 => {
                // Nobody waits for the answer once the client is gone.
                let gone = PollFd::new(stream.as_fd(), PollFlags::from_bits_retain(libc::POLLRDHUP));
                poll(&mut [gone], PollTimeout::from(millis))?;
            }
            _ => {}
        }
        offset += count;
        if !matches!(kind, Tcp::Silent | Tcp::Discard) {
            stream.write_all(&buffer[..count])?;
        }
    }
}

/// What a UDP server does with the n-th datagram, from 0.
#[derive(Clone, Copy)]
pub enum Udp {
    Echo,
    /// Says who it is before each answer; the slot is the client's port modulo this.
    Identify(u16),
    /// Drops every n-th.
    Drop(u64),
    /// Answers every n-th twice.
    Twice(u64),
    /// Changes the last byte of every n-th.
    Wrong(u64),
    /// Cuts the last byte off every n-th.
    Short(u64),
    /// Never answers.
    Silent,
}

/// Starts a UDP server; its address.
pub fn udp(kind: Udp) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let address = socket.local_addr().expect("it is bound");
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        for number in 0u64.. {
            let Ok((count, client)) = socket.recv_from(&mut buffer) else {
                return;
            };
            let every = |n: u64| (number + 1).is_multiple_of(n);
            let answer = &mut buffer[..count];
            match kind {
                Udp::Silent => continue,
                Udp::Drop(n) if every(n) => continue,
                Udp::Identify(modulus) => {
                    let slot = client.port() % modulus;
                    let line = format!("evenkeel listener=dns slot={slot} pid=7 generation=1\n");
                    let _ = socket.send_to(&[line.as_bytes(), answer].concat(), client);
                    continue;
                }
                Udp::Wrong(n) if every(n) => answer[count - 1] ^= 1,
                Udp::Short(n) if every(n) => {
                    let _ = socket.send_to(&answer[..count - 1], client);
                    continue;
                }
                Udp::Twice(n) if every(n) => drop(socket.send_to(answer, client)),
                _ => {}
            }
            let _ = socket.send_to(answer, client);
        }
    });
    address
}

/// A group of TCP listeners on one port, as workers have it. Each listener in
/// `listening` is served; the others of the `slot_count` do not exist.
pub struct Group {
    pub address: SocketAddr,
    pub accepted: Arc<Vec<AtomicU64>>,
}

pub fn group(slot_count: usize, listening: &[usize]) -> Group {
    let accepted: Arc<Vec<AtomicU64>> = Arc::new((0..slot_count).map(|_| AtomicU64::new(0)).collect());
    let mut address = SocketAddr::from(([127, 0, 0, 1], 0));
    for slot in listening.iter().copied() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
        socket.set_reuse_port(true).expect("the option exists");
        socket.bind(&address.into()).expect("the group shares a port");
        socket.listen(4096).expect("it is bound");
        let listener: TcpListener = socket.into();
        address = listener.local_addr().expect("it is bound");
        let accepted = Arc::clone(&accepted);
        thread::spawn(move || {
            for number in 0.. {
                let Ok((stream, _)) = listener.accept() else {
                    return;
                };
                accepted[slot].fetch_add(1, Ordering::SeqCst);
                thread::spawn(move || drop(converse(stream, Tcp::Echo, slot as u64, number)));
            }
        });
    }
    Group { address, accepted }
}

/// A control socket that answers like the daemon: one listener at `bind`, with
/// these counters.
pub fn daemon(folder: &Path, bind: &str, steering: &str, accepted: &Arc<Vec<AtomicU64>>) -> PathBuf {
    let (bind, steering) = (bind.to_string(), steering.to_string());
    let accepted = Arc::clone(accepted);
    answer_with(folder, move || {
        let counts: Vec<u64> = accepted.iter().map(|count| count.load(Ordering::SeqCst)).collect();
        let workers: Vec<Value> =
            (0..counts.len()).map(|slot| json!({ "slot": slot, "active": 10 * (slot + 1) })).collect();
        json!({ "status": {
            "workers": workers,
            "listeners": [
                { "name": "other", "mode": "udp", "bind": [bind], "spread": { "per_slot": [1, 2, 3] } },
                { "name": "web", "mode": "tcp", "bind": [bind], "steering_active": steering,
                  "spread": { "per_slot": counts } },
            ],
        }})
    })
}

/// A control socket that gives these answers.
pub fn answer_with(folder: &Path, answer: impl Fn() -> Value + Send + 'static) -> PathBuf {
    let path = folder.join("control.sock");
    let listener = UnixListener::bind(&path).expect("a fresh folder");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut byte = [0];
            let mut line = Vec::new();
            while stream.read(&mut byte).is_ok_and(|count| count == 1) && byte[0] != b'\n' {
                line.push(byte[0]);
            }
            assert_eq!(line, br#"{"command":"status"}"#);
            let _ = stream.write_all(format!("{}\n", answer()).as_bytes());
        }
    });
    path
}
