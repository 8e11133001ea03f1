//! What `status` says of servers, and servers that can be switched.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::daemon::Daemon;
use super::within;

/// No step from a server's fall or rise to its verdict takes longer, on a
/// loaded machine too.
pub const SEEN: Duration = Duration::from_secs(30);

/// The status document of one server of an upstream.
pub fn server(daemon: &Daemon, upstream: &str, address: &str) -> Value {
    let status = daemon.ask("status").unwrap_or_default();
    let upstreams = status["status"]["upstreams"].as_array().cloned().unwrap_or_default();
    let upstream = upstreams.into_iter().find(|own| own["name"] == upstream).unwrap_or_default();
    let servers = upstream["servers"].as_array().cloned().unwrap_or_default();
    servers.into_iter().find(|own| own["address"] == address).unwrap_or_default()
}

/// Waits until a server is in a state.
#[track_caller]
pub fn wait_state(daemon: &Daemon, upstream: &str, address: &str, state: &str) {
    within(SEEN, &format!("server {address} of {upstream} is {state}"), || {
        server(daemon, upstream, address)["state"] == state
    });
}

/// Why the last check of a server was not good.
pub fn reason(daemon: &Daemon, upstream: &str, address: &str) -> String {
    server(daemon, upstream, address)["check"]["reason"].as_str().unwrap_or_default().to_string()
}

/// Lines of the log that have all of these words.
pub fn told(daemon: &Daemon, words: &[&str]) -> usize {
    daemon.log().lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
}

/// A TCP server that answers each connection with its name and closes; while
/// it is off, nothing listens at its address.
pub struct Switched {
    pub address: SocketAddr,
    name: &'static str,
    stop: Arc<AtomicBool>,
    pub served: Arc<AtomicUsize>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Switched {
    pub fn on(address: &str, name: &'static str) -> Switched {
        let mut server = Switched {
            address: address.parse().expect("an address"),
            name,
            stop: Arc::default(),
            served: Arc::default(),
            thread: None,
        };
        server.turn_on();
        server
    }

    pub fn turn_on(&mut self) {
        let listener = TcpListener::bind(self.address).expect("a free address");
        listener.set_nonblocking(true).expect("non-blocking");
        self.stop = Arc::default();
        let (stop, served, name) = (Arc::clone(&self.stop), Arc::clone(&self.served), self.name);
        self.thread = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let served = Arc::clone(&served);
                        std::thread::spawn(move || answer(stream, name, &served));
                    }
                    Err(_) => std::thread::park_timeout(Duration::from_millis(2)),
                }
            }
        }));
    }

    /// What waits in its queue is reset, as where a process is killed.
    pub fn turn_off(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it ends");
        }
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        self.turn_off();
    }
}

/// A check says nothing and is closed; a client asks by one byte.
fn answer(mut stream: TcpStream, name: &str, served: &AtomicUsize) {
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
    if stream.read(&mut [0]).is_ok_and(|count| count == 1) && stream.write_all(name.as_bytes()).is_ok() {
        served.fetch_add(1, Ordering::SeqCst);
    }
}

/// Asks the server behind an address for its name.
pub fn who(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"?")?;
    let mut name = String::new();
    stream.read_to_string(&mut name)?;
    if name.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(name) }
}

/// Asks for a time; how many were answered, and all errors.
pub fn ask_for(address: SocketAddr, time: Duration) -> (usize, Vec<String>) {
    let deadline = Instant::now() + time;
    let (mut answered, mut errors) = (0, Vec::new());
    while Instant::now() < deadline {
        match who(address) {
            Ok(_) => answered += 1,
            Err(error) => errors.push(error.to_string()),
        }
    }
    (answered, errors)
}
