//! Clients of which none may notice anything, with every byte checked by its
//! place in the stream, at the client and at the server.
//!
//! Ports: 8080 to a server that sends back what it gets; 8081 the same, with a
//! PROXY header required and passed on; 5300 the same for datagrams.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::datagrams::{self, udp_server};
use super::pattern;
use super::servers::{local, tcp_server};

/// How long anything may take: a slot that is killed again and again, on a
/// loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What clients and servers saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Sessions that were cut short.
    pub broken: AtomicU64,
    /// Bytes out of place, at either end.
    pub wrong: AtomicU64,
    /// Questions without their answer.
    pub unanswered: AtomicU64,
    /// What went well.
    pub exchanges: AtomicU64,
    pub connections: AtomicU64,
    pub bytes: AtomicU64,
    pub questions: AtomicU64,
    first: Mutex<Option<String>>,
}

impl Seen {
    /// Everything that went wrong.
    pub fn losses(&self) -> u64 {
        [&self.broken, &self.wrong, &self.unanswered].iter().map(|count| count.load(Relaxed)).sum()
    }

    fn note(&self, what: &str, result: io::Result<u64>) {
        match result {
            Ok(count) => {
                self.connections.fetch_add(1, Relaxed);
                self.bytes.fetch_add(count, Relaxed);
            }
            Err(error) => {
                let count = if error.kind() == ErrorKind::InvalidData { &self.wrong } else { &self.broken };
                count.fetch_add(1, Relaxed);
                self.first.lock().expect("nobody panics").get_or_insert_with(|| format!("{what}: {error}"));
            }
        }
    }
}

/// The servers behind the daemon.
pub struct Servers {
    plain: SocketAddr,
    proxied: SocketAddr,
    datagrams: SocketAddr,
}

impl Servers {
    pub fn start(seen: &Arc<Seen>) -> Servers {
        let noted = Arc::clone(seen);
        let (plain, _) = tcp_server("127.0.0.1:0", move |stream| verify(stream, &noted));
        let noted = Arc::clone(seen);
        let (proxied, _) = tcp_server("127.0.0.1:0", move |mut stream| {
            let mut header = [0; 28];
            stream.read_exact(&mut header)?;
            // Version 2, TCP over IPv4, of the client that the header names.
            if header[12..14] != [0x21, 0x11] || header[16..20] != [192, 0, 2, 7] {
                noted.wrong.fetch_add(1, Relaxed);
            }
            verify(stream, &noted)
        });
        let (datagrams, _) = udp_server("127.0.0.1:0", |bytes| Some(bytes.to_vec()));
        Servers { plain, proxied, datagrams }
    }

    /// The daemon's configuration; `more` stands in `[daemon]`.
    pub fn config(&self, workers: usize, more: &str) -> String {
        let mut text = format!("[daemon]\nworkers = {workers}\n{more}\n");
        for (name, mode, port, server, of_listener, of_upstream) in [
            ("plain", "tcp", 8080, self.plain, "", ""),
            (
                "proxied",
                "tcp",
                8081,
                self.proxied,
                "[listener.tcp]\naccept_proxy = \"on\"\ntrusted = [\"127.0.0.0/8\"]\n",
                "send_proxy = \"v2\"\n",
            ),
            ("flows", "udp", 5300, self.datagrams, "", ""),
        ] {
            text += &format!(
                "[[listener]]\nname = \"{name}\"\nmode = \"{mode}\"\nbind = \"127.0.0.1:{port}\"\n\
                 upstream = \"{name}\"\n{of_listener}[[upstream]]\nname = \"{name}\"\n{of_upstream}\
                 [[upstream.server]]\naddress = \"{server}\"\n"
            );
        }
        text
    }
}

/// Sends back what it gets, and looks whether it is what it must be there.
fn verify(mut stream: TcpStream, seen: &Seen) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut at = 0;
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        if buffer[..count] != pattern(at, count) {
            seen.wrong.fetch_add(1, Relaxed);
        }
        at += count;
        stream.write_all(&buffer[..count])?;
    }
}

/// Clients at work.
pub struct Load {
    pub seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    /// All kinds of TCP clients; with flows also of UDP.
    pub fn begin(seen: &Arc<Seen>, with_flows: bool) -> Load {
        let mut load = Load { seen: Arc::clone(seen), stop: Arc::default(), threads: Vec::new() };
        load.spawn(4, |seen, stop| seen.note("ping-pong", ping_pong(seen, stop, 20)));
        load.spawn(2, |seen, _| seen.note("short", short()));
        load.spawn(2, |seen, _| seen.note("half-closed", half_closed()));
        load.spawn(2, |seen, _| seen.note("bulk", bulk(4_000_000, Duration::ZERO)));
        load.spawn(2, |seen, _| seen.note("slow reader", bulk(1_500_000, Duration::from_millis(2))));
        load.spawn(2, |seen, _| seen.note("proxied", proxied()));
        if with_flows {
            load.spawn(2, questions);
        }
        load
    }

    fn spawn(&mut self, count: usize, work: fn(&Seen, &AtomicBool)) {
        for _ in 0..count {
            let (seen, stop) = (Arc::clone(&self.seen), Arc::clone(&self.stop));
            self.threads.push(std::thread::spawn(move || {
                while !stop.load(Relaxed) {
                    work(&seen, &stop);
                }
            }));
        }
    }

    /// Stops after what has begun is through.
    pub fn end(self) {
        self.stop.store(true, Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a client"));
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&local(port), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn wrong() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "wrong bytes")
}

/// Reads so many bytes from a place of the stream on.
fn read(stream: &mut TcpStream, at: usize, count: usize) -> io::Result<()> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes)?;
    if bytes == pattern(at, count) { Ok(()) } else { Err(wrong()) }
}

/// Nothing comes after this but the end.
fn read_end(stream: &mut TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0; 16])? {
        0 => Ok(()),
        _ => Err(wrong()),
    }
}

/// 64 bytes and their answer, on so many connections in turn.
fn ping_pong(seen: &Seen, stop: &AtomicBool, connections: usize) -> io::Result<u64> {
    let mut streams = (0..connections).map(|_| connect(8080)).collect::<io::Result<Vec<_>>>()?;
    let mut at = 0;
    while !stop.load(Relaxed) {
        for stream in &mut streams {
            stream.write_all(&pattern(at, 64))?;
            read(stream, at, 64)?;
            seen.exchanges.fetch_add(1, Relaxed);
        }
        at += 64;
    }
    streams.iter_mut().try_for_each(read_end)?;
    Ok(at as u64)
}

fn short() -> io::Result<u64> {
    let mut stream = connect(8080)?;
    stream.write_all(&pattern(0, 300))?;
    read(&mut stream, 0, 300)?;
    read_end(&mut stream)?;
    Ok(300)
}

/// Everything there, then the end; the answer must be whole though it ends in
/// an orderly way.
fn half_closed() -> io::Result<u64> {
    let stream = connect(8080)?;
    let mut writer = stream.try_clone()?;
    let count = 150_000;
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            writer.write_all(&pattern(0, count))?;
            writer.shutdown(Shutdown::Write)
        });
        let mut answer = Vec::new();
        let read = (&stream).read_to_end(&mut answer);
        writing.join().expect("a writer")?;
        read?;
        if answer.len() < count {
            return Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                format!("{} bytes of {count}", answer.len()),
            ));
        }
        if answer == pattern(0, count) { Ok(count as u64) } else { Err(wrong()) }
    })
}

/// Much at once, both ways, read with pauses or without.
fn bulk(count: usize, pause: Duration) -> io::Result<u64> {
    let mut stream = connect(8080)?;
    let mut writer = stream.try_clone()?;
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || writer.write_all(&pattern(0, count)));
        let mut at = 0;
        let mut buffer = vec![0; 16 * 1024];
        while at < count {
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if buffer[..length] != pattern(at, length) {
                return Err(wrong());
            }
            at += length;
            if !pause.is_zero() {
                std::thread::park_timeout(pause);
            }
        }
        writing.join().expect("a writer")
    })?;
    read_end(&mut stream)?;
    Ok(count as u64)
}

/// A PROXY header in pieces, then some exchanges.
fn proxied() -> io::Result<u64> {
    let mut stream = connect(8081)?;
    stream.write_all(b"PROXY TCP4 192.0.2.7 ")?;
    std::thread::park_timeout(Duration::from_millis(1));
    stream.write_all(b"192.0.2.8 4711 80\r\n")?;
    let mut at = 0;
    for length in [10, 2_000, 64, 30_000, 1] {
        stream.write_all(&pattern(at, length))?;
        read(&mut stream, at, length)?;
        at += length;
    }
    read_end(&mut stream)?;
    Ok(at as u64)
}

/// Clients whose questions are asked again a few times, as such clients do: a
/// datagram may be lost, a flow may not.
fn questions(seen: &Seen, stop: &AtomicBool) {
    let clients: Vec<UdpSocket> = (0..10).map(|_| datagrams::client("127.0.0.1:0")).collect();
    let mut number = 0u64;
    while !stop.load(Relaxed) {
        for socket in &clients {
            number += 1;
            let question = number.to_be_bytes();
            let _ = socket.set_read_timeout(Some(Duration::from_secs(1)));
            let answered = (0..30).any(|_| {
                let _ = socket.send_to(&question, local(5300));
                let mut answer = [0; 64];
                loop {
                    match socket.recv(&mut answer) {
                        Ok(8) if answer[..8] == question => break true,
                        // Of an earlier one, which was asked twice.
                        Ok(_) => {}
                        Err(_) => break false,
                    }
                }
            });
            let count = if answered { &seen.questions } else { &seen.unanswered };
            count.fetch_add(1, Relaxed);
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}
