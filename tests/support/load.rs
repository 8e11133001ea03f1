//! Everything that clients do at once, each thing checked byte by byte, while a
//! test does something to the daemon: what is lost is counted, by kind.
//!
//! The daemon has a TCP listener on 127.0.0.1:8080 with `echo` behind it, one
//! on 8081 with `collect` behind it, and a UDP listener on 5300.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::datagrams::{self, udp_server};
use super::servers::{echo, local, tcp_server};
use super::{eventually, pattern};

/// What went wrong, and how much went right.
#[derive(Debug, Default)]
pub struct Tally {
    pub resets: AtomicU64,
    pub refusals: AtomicU64,
    pub timeouts: AtomicU64,
    pub wrong_bytes: AtomicU64,
    pub lost_replies: AtomicU64,
    /// Exchanges, by kind.
    pub short: AtomicU64,
    pub long: AtomicU64,
    pub half_closed: AtomicU64,
    pub bulk: AtomicU64,
    pub stuck: AtomicU64,
    pub questions: AtomicU64,
    first: Mutex<Option<String>>,
}

impl Tally {
    /// Everything that was lost.
    pub fn losses(&self) -> u64 {
        let kinds = [&self.resets, &self.refusals, &self.timeouts, &self.wrong_bytes, &self.lost_replies];
        kinds.iter().map(|count| count.load(Relaxed)).sum()
    }

    fn note(&self, kind: &AtomicU64, result: io::Result<()>) {
        let Err(error) = result else {
            kind.fetch_add(1, Relaxed);
            return;
        };
        let count = match error.kind() {
            ErrorKind::ConnectionRefused => &self.refusals,
            ErrorKind::WouldBlock | ErrorKind::TimedOut => &self.timeouts,
            ErrorKind::InvalidData => &self.wrong_bytes,
            _ => &self.resets,
        };
        count.fetch_add(1, Relaxed);
        self.first.lock().expect("no thread panics with it").get_or_insert_with(|| error.to_string());
    }
}

/// The servers behind the daemon.
pub struct Servers {
    echo: SocketAddr,
    collect: SocketAddr,
    mirror: SocketAddr,
}

impl Servers {
    pub fn start() -> Servers {
        let (echo, _) = tcp_server("127.0.0.1:0", echo);
        let (collect, _) = tcp_server("127.0.0.1:0", |mut stream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            stream.write_all(&all)
        });
        let (mirror, _) = udp_server("127.0.0.1:0", |bytes| Some(bytes.to_vec()));
        Servers { echo, collect, mirror }
    }

    /// The daemon's configuration; `more` stands in `[daemon]`.
    pub fn config(&self, workers: usize, more: &str) -> String {
        let mut text = format!("[daemon]\nworkers = {workers}\n{more}\n");
        for (name, mode, port, server) in [
            ("echo", "tcp", 8080, self.echo),
            ("collect", "tcp", 8081, self.collect),
            ("flows", "udp", 5300, self.mirror),
        ] {
            // On a slow machine `stuck` stands still for longer than by default.
            let patience = if mode == "tcp" { "[listener.tcp]\nhalf_close_timeout = \"10m\"\n" } else { "" };
            text += &format!(
                "[[listener]]\nname = \"{name}\"\nmode = \"{mode}\"\nbind = \"127.0.0.1:{port}\"\n\
                 upstream = \"{name}\"\n{patience}[[upstream]]\nname = \"{name}\"\n[[upstream.server]]\naddress = \"{server}\"\n"
            );
        }
        text
    }
}

/// Clients at work; they end with `end`.
pub struct Load {
    pub tally: Arc<Tally>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn new() -> Load {
        let (tally, stop) = (Arc::<Tally>::default(), Arc::<AtomicBool>::default());
        Load { tally, stop, threads: Vec::new() }
    }

    /// Clients of the UDP listener alone.
    pub fn of_questions() -> Load {
        let mut load = Load::new();
        load.spawn(2, questions);
        eventually("questions are answered", || load.tally.questions.load(Relaxed) > 5);
        load
    }

    /// All kinds of clients, until `end`.
    pub fn begin() -> Load {
        let mut load = Load::new();
        load.spawn(2, |tally, _| tally.note(&tally.short, short()));
        load.spawn(2, |tally, _| tally.note(&tally.half_closed, half_closed()));
        load.spawn(1, |tally, _| tally.note(&tally.bulk, bulk()));
        load.spawn(6, |tally, stop| tally.note(&tally.long, long(stop)));
        load.spawn(3, |tally, stop| tally.note(&tally.stuck, stuck(stop)));
        load.spawn(2, questions);
        eventually("there is load of every kind", || {
            let tally = &load.tally;
            let kinds = [&tally.short, &tally.half_closed, &tally.questions];
            kinds.iter().all(|count| count.load(Relaxed) > 5)
        });
        load
    }

    fn spawn(&mut self, count: usize, work: fn(&Tally, &AtomicBool)) {
        for _ in 0..count {
            let (tally, stop) = (Arc::clone(&self.tally), Arc::clone(&self.stop));
            self.threads.push(std::thread::spawn(move || {
                while !stop.load(Relaxed) {
                    work(&tally, &stop);
                }
            }));
        }
    }

    /// Stops, after what has begun is through.
    pub fn end(self) -> Arc<Tally> {
        self.stop.store(true, Relaxed);
        for thread in self.threads {
            thread.join().expect("a client");
        }
        self.tally
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&local(port), Duration::from_secs(20))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    Ok(stream)
}

fn same(bytes: &[u8], expected: &[u8]) -> io::Result<()> {
    if bytes == expected { Ok(()) } else { Err(io::Error::new(ErrorKind::InvalidData, "wrong bytes")) }
}

/// A connection for one exchange.
fn short() -> io::Result<()> {
    let mut stream = connect(8080)?;
    let bytes = pattern(7, 700);
    stream.write_all(&bytes)?;
    let mut answer = vec![0; bytes.len()];
    stream.read_exact(&mut answer)?;
    same(&answer, &bytes)
}

/// Both ways at once, so that neither side waits for the other to read.
fn both_ways(stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    let (mut reader, mut writer) = (stream.try_clone()?, stream.try_clone()?);
    let answer = std::thread::scope(|scope| {
        let writing = scope.spawn(move || writer.write_all(bytes));
        let mut answer = vec![0; bytes.len()];
        let read = reader.read_exact(&mut answer);
        writing.join().expect("a writer")?;
        read.map(|()| answer)
    })?;
    same(&answer, bytes)
}

/// One connection for as long as the load lasts; sizes from one byte to more
/// than buffers hold.
fn long(stop: &AtomicBool) -> io::Result<()> {
    let stream = connect(8080)?;
    let mut at = 0;
    while !stop.load(Relaxed) {
        both_ways(&stream, &pattern(at, [1, 64, 1500, 40_000, 300_000][at % 5]))?;
        at += 1;
        std::thread::park_timeout(Duration::from_millis(2));
    }
    Ok(())
}

/// Everything there, then the end, then everything back.
fn half_closed() -> io::Result<()> {
    let mut stream = connect(8081)?;
    let bytes = pattern(3, 50_000);
    stream.write_all(&bytes[..20_000])?;
    std::thread::park_timeout(Duration::from_millis(20));
    stream.write_all(&bytes[20_000..])?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    same(&answer, &bytes)
}

/// Enough for every short way through the kernel that there may be.
fn bulk() -> io::Result<()> {
    both_ways(&connect(8080)?, &pattern(11, 6_000_000))
}

/// Reads nothing until the end: the session stands in back-pressure.
fn stuck(stop: &AtomicBool) -> io::Result<()> {
    let stream = connect(8080)?;
    let bytes = pattern(5, 12_000_000);
    let mut writer = stream.try_clone()?;
    writer.set_write_timeout(Some(Duration::from_secs(170)))?;
    let answer = std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            writer.write_all(&bytes)?;
            writer.shutdown(Shutdown::Write)
        });
        while !stop.load(Relaxed) {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        let mut answer = Vec::new();
        let read = (&stream).read_to_end(&mut answer);
        writing.join().expect("a writer")?;
        read.map(|_| answer)
    })?;
    same(&answer, &bytes)
}

/// Ten clients that ask each question once.
fn questions(tally: &Tally, stop: &AtomicBool) {
    let clients: Vec<UdpSocket> = (0..10).map(|_| datagrams::client("127.0.0.1:0")).collect();
    let mut number = 0u64;
    while !stop.load(Relaxed) {
        for socket in &clients {
            number += 1;
            let question = number.to_be_bytes();
            let _ = socket.send_to(&question, local(5300));
            let mut answer = [0; 64];
            match socket.recv(&mut answer) {
                Ok(8) if answer[..8] == question => tally.questions.fetch_add(1, Relaxed),
                _ => tally.lost_replies.fetch_add(1, Relaxed),
            };
            std::thread::park_timeout(Duration::from_micros(300));
        }
    }
}
