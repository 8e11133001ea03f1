//! CPU time of the daemon for a million 64-byte round trips through UDP,
//! beside nginx's stream module doing the same, in turns.
//!
//!     cargo bench --bench udp_against_nginx [-- ROUNDS SECONDS]
//!
//! In a network of its own: an echo server (threads of this program), the
//! proxy with two workers, and one client thread that keeps 64 questions under
//! way over so many flows, each in its turn. Both proxies are started anew for
//! every sample, and every flow has been used once before a sample begins.
//! What is measured is the time of the proxy's own processes (utime and stime
//! of /proc/PID/stat); what the kernel does for the others is theirs.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use evenkeel::sys::datagram::{self, Arena, Outgoing, Sender};
use evenkeel::sys::{isolated, process};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

const FRONT: &str = "127.0.0.1:5300";
const BACK: &str = "127.0.0.1:5301";
const UNDER_WAY: usize = 64;
const QUESTION: [u8; 64] = [7; 64];

fn main() {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let (rounds, seconds) = (numbers.first().copied().unwrap_or(5), numbers.get(1).copied().unwrap_or(3));
    if Command::new("nginx").arg("-v").stderr(Stdio::null()).status().is_err() {
        return println!("SKIPPED: nginx is not installed");
    }
    let network = isolated::leave_network().expect("a network of its own");
    assert_ne!(network, isolated::Network::Shared, "the host allows no network namespace");
    process::raise_file_limit().expect("a limit of open files");
    serve_echo();
    println!(
        "{rounds} rounds of {seconds} s, two workers, {UNDER_WAY} questions under way; µs of CPU a round trip"
    );
    for flow_count in [100, 10_000] {
        let mut samples = [Vec::new(), Vec::new()];
        let mut ratios = Vec::new();
        for _ in 0..rounds {
            let both = [Proxy::evenkeel as fn() -> Proxy, Proxy::nginx].map(|start| {
                let proxy = start();
                let sample = measure(&proxy, flow_count, Duration::from_secs(seconds));
                drop(proxy);
                sample
            });
            for (of, sample) in samples.iter_mut().zip(both) {
                of.push(sample);
            }
            ratios.push(both[0].micros / both[1].micros);
        }
        for (name, samples) in ["evenkeel", "nginx"].iter().zip(&samples) {
            let micros = summary(samples.iter().map(|sample| sample.micros).collect());
            let rate = summary(samples.iter().map(|sample| sample.per_second / 1000.0).collect());
            let lost: u64 = samples.iter().map(|sample| sample.lost).sum();
            println!("{flow_count:>6} flows  {name:<9} {micros} µs   {rate} thousand a second   lost {lost}");
        }
        println!("{flow_count:>6} flows  ratio     {} (same round, evenkeel / nginx)", summary(ratios));
    }
}

/// Median and range.
fn summary(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (first, last) = (values[0], values[values.len() - 1]);
    format!("{:.2} [{first:.2} to {last:.2}]", values[values.len() / 2])
}

/// Answers at `BACK` for ever.
fn serve_echo() {
    let socket = UdpSocket::bind(BACK).expect("a free port");
    std::thread::spawn(move || {
        let (mut arena, mut sender) = (Arena::new(64, 2048), Sender::default());
        let mut poll =
            [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&socket), nix::poll::PollFlags::POLLIN)];
        loop {
            let _ = nix::poll::poll(&mut poll, nix::poll::PollTimeout::NONE);
            let Ok(count) = arena.receive(&socket, 0, 64) else { continue };
            let items = (0..count).map(|at| {
                let received = arena.get(at);
                Outgoing { head: &[], bytes: received.bytes, to: received.from, from: None, segment: None }
            });
            sender.send(&socket, items, |_, _| {});
        }
    });
}

/// A proxy at `FRONT`, ended with this value.
struct Proxy {
    child: Child,
    _folder: tempfile::TempDir,
}

impl Proxy {
    fn evenkeel() -> Proxy {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("bench.toml");
        let text = format!(
            "[daemon]\nworkers = 2\ncontrol_socket = {:?}\n[log]\nlevel = \"warn\"\n\
             [[listener]]\nname = \"front\"\nmode = \"udp\"\nbind = \"{FRONT}\"\nupstream = \"back\"\n\
             [[upstream]]\nname = \"back\"\n[[upstream.server]]\naddress = \"{BACK}\"\n",
            folder.path().join("control.sock")
        );
        fs::write(&path, text).expect("a configuration");
        let mut command = Command::new(env!("CARGO_BIN_EXE_evenkeel"));
        Proxy::start(command.args(["run", "-c"]).arg(&path), folder)
    }

    fn nginx() -> Proxy {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("nginx.conf");
        let dir = folder.path().display();
        let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
        let load = if fs::exists(module).unwrap_or(false) {
            format!("load_module {module};\n")
        } else {
            String::new()
        };
        let text = format!(
            "{load}daemon off;\nworker_processes 2;\nworker_rlimit_nofile 20000;\npid {dir}/pid;\nerror_log {dir}/error;\n\
             events {{ worker_connections 18000; }}\n\
             stream {{ server {{ listen {FRONT} udp reuseport; proxy_pass {BACK}; proxy_timeout 60s; }} }}\n"
        );
        fs::write(&path, text).expect("a configuration");
        let mut command = Command::new("nginx");
        Proxy::start(command.arg("-c").arg(&path), folder)
    }

    fn start(command: &mut Command, folder: tempfile::TempDir) -> Proxy {
        let child = command.stdout(Stdio::null()).spawn().expect("the proxy starts");
        let proxy = Proxy { child, _folder: folder };
        let probe = UdpSocket::bind("127.0.0.1:0").expect("a port");
        probe.set_read_timeout(Some(Duration::from_millis(50))).expect("a time-out");
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let _ = probe.send_to(&QUESTION, FRONT);
            if probe.recv(&mut [0; 64]).is_ok() {
                return proxy;
            }
            assert!(Instant::now() < deadline, "the proxy does not answer");
        }
    }

    /// Seconds of CPU that its processes have used.
    fn cpu_seconds(&self) -> f64 {
        let parent = self.child.id();
        let mut ticks = 0;
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let Some((_, rest)) = stat.rsplit_once(')') else { continue };
            let fields: Vec<&str> = rest.split_whitespace().collect();
            if pid == parent || fields[1] == parent.to_string() {
                ticks += fields[11].parse::<u64>().unwrap_or(0) + fields[12].parse::<u64>().unwrap_or(0);
            }
        }
        // USER_HZ is 100 on every architecture that matters (proc(5)).
        ticks as f64 / 100.0
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // TERM, so that nginx ends its workers; evenkeel would wait for its
        // flows: a second one ends it at once.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.child.try_wait().expect("our child").is_none() && Instant::now() < deadline {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            std::thread::park_timeout(Duration::from_millis(100));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy)]
struct Sample {
    micros: f64,
    per_second: f64,
    lost: u64,
}

fn measure(proxy: &Proxy, flow_count: usize, time: Duration) -> Sample {
    let mut clients = Clients::new(flow_count);
    let mut warm = 0;
    while warm < flow_count as u64 {
        warm += clients.turn();
    }
    clients.lost = 0;
    let (begin, cpu) = (Instant::now(), proxy.cpu_seconds());
    let mut done = 0;
    while begin.elapsed() < time {
        done += clients.turn();
    }
    let used = proxy.cpu_seconds() - cpu;
    let per_second = done as f64 / begin.elapsed().as_secs_f64();
    Sample { micros: used * 1e6 / done as f64, per_second, lost: clients.lost }
}

/// Client sockets, each a flow, that are asked in turn.
struct Clients {
    sockets: Vec<UdpSocket>,
    waits: Vec<bool>,
    poll: Poll,
    events: Events,
    next: usize,
    begun: bool,
    lost: u64,
}

impl Clients {
    fn new(count: usize) -> Clients {
        let poll = Poll::new().expect("epoll");
        let front: SocketAddr = FRONT.parse().expect("an address");
        let sockets: Vec<UdpSocket> = (0..count)
            .map(|i| {
                // Outside the kernel's own range, which the proxy needs.
                let address = format!("127.0.{}.1:{}", 1 + i / 10_000, 10_000 + i % 10_000);
                let socket = UdpSocket::bind(address).expect("a free port");
                socket.connect(front).expect("connected");
                socket.set_nonblocking(true).expect("non-blocking");
                let fd = socket.as_raw_fd();
                poll.registry()
                    .register(&mut SourceFd(&fd), Token(i), Interest::READABLE)
                    .expect("registered");
                socket
            })
            .collect();
        let waits = vec![false; count];
        Clients { sockets, waits, poll, events: Events::with_capacity(256), next: 0, begun: false, lost: 0 }
    }

    fn ask_next(&mut self) {
        // One that is still waited for is passed over.
        while self.waits[self.next] {
            self.next = (self.next + 1) % self.sockets.len();
        }
        let _ = datagram::send(&self.sockets[self.next], &QUESTION);
        self.waits[self.next] = true;
        self.next = (self.next + 1) % self.sockets.len();
    }

    /// Takes the answers that are there and asks as often; how many there were.
    fn turn(&mut self) -> u64 {
        if !std::mem::replace(&mut self.begun, true) {
            (0..UNDER_WAY).for_each(|_| self.ask_next());
        }
        self.poll.poll(&mut self.events, Some(Duration::from_secs(1))).expect("epoll");
        let answered: Vec<usize> = self.events.iter().map(|event| event.token().0).collect();
        if answered.is_empty() {
            // Everything under way is lost: begin again.
            self.lost += self.waits.iter().filter(|waits| **waits).count() as u64;
            self.waits.fill(false);
            self.begun = false;
        }
        let mut count = 0;
        for client in answered {
            let mut buffer = [0; 128];
            while let Ok(length) = self.sockets[client].recv(&mut buffer) {
                assert_eq!(length, QUESTION.len());
                if std::mem::replace(&mut self.waits[client], false) {
                    count += 1;
                    self.ask_next();
                }
            }
        }
        count
    }
}
