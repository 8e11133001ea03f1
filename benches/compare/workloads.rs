//! What is measured: each workload runs against one way and gives one sample.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::time::Duration;

use crate::account::{self, Used};
use crate::flows::Askers;
use crate::proxies::{Open, Service, Setting, Way};
use crate::server::Server;
use crate::streams::{self, Dialogue, Drains, Outcome, Talkers};

/// What one sample says, by name; see `METRICS`.
pub type Sample = BTreeMap<&'static str, f64>;

/// Metrics in the order of the tables: name, heading, digits behind the point.
pub const METRICS: [(&str, &str, usize); 14] = [
    ("proxy_us", "proxy CPU, µs each", 2),
    ("proxy_s_per_gb", "proxy CPU, s/GB", 3),
    ("others_us", "client and server CPU, µs each", 2),
    ("ksoftirqd_us", "ksoftirqd, µs each", 2),
    ("per_second", "each second", 0),
    ("gb_per_s", "GB/s", 2),
    ("p50_us", "p50 µs", 0),
    ("p99_us", "p99 µs", 0),
    ("bytes_each", "bytes of memory each", 0),
    ("serving_wakeups", "wake-ups/s of what serves", 2),
    ("wakeups", "wake-ups/s in all", 2),
    ("idle_ms", "CPU, ms/s", 3),
    ("waited", "waited for a CPU, share", 2),
    ("failures", "broken or lost", 0),
];

/// Where samples are taken.
pub struct Lab {
    pub server: Server,
    pub web: Open,
    /// How long a sample lasts.
    pub time: Duration,
}

/// One of the workloads.
pub struct Workload {
    pub name: &'static str,
    pub title: &'static str,
    pub ways: &'static [&'static str],
    /// The metric that is compared first.
    pub metric: &'static str,
    pub run: fn(&Lab, &Way) -> io::Result<Sample>,
}

const TCP: &[&str] = &["direct", "nftables", "haproxy", "nginx", "evenkeel"];
const WEB: &[&str] = &["direct", "haproxy", "nginx", "evenkeel"];
const BULK: &[&str] =
    &["direct", "nftables", "haproxy", "haproxy-splice", "nginx", "nginx-buffers", "evenkeel"];
const UDP: &[&str] = &["direct", "nginx", "evenkeel"];
const STREAM_PROXIES: &[&str] = &["haproxy", "nginx", "evenkeel"];
const DATAGRAM_PROXIES: &[&str] = &["nginx", "evenkeel"];

/// All of them.
pub const ALL: &[Workload] = &[
    Workload {
        name: "connect",
        title: "connect, 64 bytes there and back, close; 64 at a time",
        ways: TCP,
        metric: "proxy_us",
        run: |lab, way| talk(lab, way, Service::Echo, plain(64, true)),
    },
    Workload {
        name: "exchange",
        title: "64 bytes there and back on 100 open connections",
        ways: TCP,
        metric: "proxy_us",
        run: |lab, way| talk(lab, way, Service::Echo, plain(100, false)),
    },
    Workload {
        name: "exchange-9500",
        title: "64 bytes there and back on 9,500 open connections, 100 under way",
        ways: TCP,
        metric: "proxy_us",
        run: |lab, way| talk(lab, way, Service::Echo, Dialogue { under_way: 100, ..plain(9_500, false) }),
    },
    Workload {
        name: "http",
        title: "HTTP keep-alive, 1 KiB, 64 connections",
        ways: WEB,
        metric: "proxy_us",
        run: http,
    },
    Workload {
        name: "bulk-1",
        title: "bulk, one stream",
        ways: BULK,
        metric: "proxy_s_per_gb",
        run: |lab, way| bulk(lab, way, 1),
    },
    Workload {
        name: "bulk-16",
        title: "bulk, 16 streams",
        ways: BULK,
        metric: "proxy_s_per_gb",
        run: |lab, way| bulk(lab, way, 16),
    },
    Workload {
        name: "udp-100",
        title: "UDP, 64 bytes there and back, 100 flows, 64 under way",
        ways: UDP,
        metric: "proxy_us",
        run: |lab, way| datagrams(lab, way, 100, 64, false),
    },
    Workload {
        name: "udp-10000",
        title: "UDP, 64 bytes there and back, 10,000 flows, 64 under way",
        ways: UDP,
        metric: "proxy_us",
        run: |lab, way| datagrams(lab, way, 10_000, 64, false),
    },
    Workload {
        name: "udp-burst",
        title: "UDP, bursts of 16 datagrams of 1,200 bytes, 100 flows, 8 bursts under way; per datagram",
        ways: UDP,
        metric: "proxy_us",
        run: |lab, way| datagrams(lab, way, 100, 8, true),
    },
    Workload {
        name: "sessions",
        title: "memory of 9,500 idle TCP sessions",
        ways: STREAM_PROXIES,
        metric: "bytes_each",
        run: sessions,
    },
    Workload {
        name: "flows",
        title: "memory of 9,000 idle UDP flows",
        ways: DATAGRAM_PROXIES,
        metric: "bytes_each",
        run: flows,
    },
    Workload {
        name: "idle",
        title: "100 open sessions on which nothing moves",
        ways: STREAM_PROXIES,
        metric: "wakeups",
        run: idle,
    },
];

impl Workload {
    /// Whether it is run with that: an access log where sessions end, and no
    /// keepers where much is done for few bytes.
    pub fn has(&self, setting: Setting) -> bool {
        match setting {
            Setting::Default => true,
            Setting::AccessLog => self.name == "connect",
            Setting::NoKeepers => ["connect", "exchange", "udp-100"].contains(&self.name),
        }
    }
}

fn plain(open: usize, reconnects: bool) -> Dialogue {
    Dialogue { question: vec![7; 64], answer_bytes: 64, open, under_way: open, reconnects }
}

fn http(lab: &Lab, way: &Way) -> io::Result<Sample> {
    let question = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec();
    let answer_bytes = streams::answer_bytes(Open::begin(&Way::Direct).address(Service::Web), &question)?;
    talk(
        lab,
        way,
        Service::Web,
        Dialogue { question, answer_bytes, open: 64, under_way: 64, reconnects: false },
    )
}

fn talk(lab: &Lab, way: &Way, service: Service, dialogue: Dialogue) -> io::Result<Sample> {
    let open = Open::begin(way);
    let mut talkers = Talkers::begin(open.address(service), dialogue)?;
    talkers.warm_up(lab.time / 4)?;
    measure(lab, &open, || talkers.run(lab.time))
}

fn bulk(lab: &Lab, way: &Way, count: usize) -> io::Result<Sample> {
    let open = Open::begin(way);
    let mut drains = Drains::begin(open.address(Service::Bulk), count)?;
    drains.run(lab.time / 4)?;
    let mut sample = measure(lab, &open, || drains.run(lab.time))?;
    // Counted by the byte until here.
    let rename = |sample: &mut Sample, from, to, factor: f64| {
        if let Some(value) = sample.remove(from) {
            sample.insert(to, value * factor);
        }
    };
    rename(&mut sample, "proxy_us", "proxy_s_per_gb", 1e3);
    rename(&mut sample, "per_second", "gb_per_s", 1e-9);
    for name in ["p50_us", "p99_us", "others_us", "ksoftirqd_us"] {
        sample.remove(name);
    }
    Ok(sample)
}

fn datagrams(lab: &Lab, way: &Way, count: usize, under_way: usize, burst: bool) -> io::Result<Sample> {
    let open = Open::begin(way);
    let mut askers = Askers::begin(open.address(Service::Datagrams), count, under_way, burst)?;
    askers.warm_up()?;
    measure(lab, &open, || askers.run(lab.time))
}

/// Rates, latencies and CPU times of a while.
fn measure(lab: &Lab, open: &Open, run: impl FnOnce() -> io::Result<Outcome>) -> io::Result<Sample> {
    let others = [std::process::id(), lab.server.pid(), lab.web.pids()[0]];
    let read = || (account::used(open.pids()), account::used(&others), account::kernel_delivery());
    let before = read();
    let outcome = run()?;
    let after = read();
    let (proxy, others): (Used, Used) = (after.0.since(before.0), after.1.since(before.1));
    let kernel = after.2.since(before.2);
    if outcome.done == 0 {
        return Err(io::Error::other("nothing was answered"));
    }
    let each = 1e6 / outcome.done as f64;
    let mut sample = Sample::from([
        ("per_second", outcome.done as f64 / outcome.seconds),
        ("others_us", others.seconds * each),
        ("ksoftirqd_us", kernel.seconds * each),
        ("p50_us", outcome.latencies.value_at_quantile(0.5) as f64),
        ("p99_us", outcome.latencies.value_at_quantile(0.99) as f64),
        ("failures", outcome.failures as f64),
    ]);
    if !open.pids().is_empty() {
        sample.insert("proxy_us", proxy.seconds * each);
        sample.insert("waited", proxy.waited / (proxy.waited + proxy.seconds).max(1e-9));
    }
    Ok(sample)
}

/// Memory that the last of many sessions take: what the first ones make a
/// program allocate for good is not theirs, and its start leaves free memory
/// behind which the first ones fill.
fn sessions(_lab: &Lab, way: &Way) -> io::Result<Sample> {
    const FIRST: usize = 2_000;
    const MORE: usize = 7_500;
    let open = Open::begin(way);
    let hold = |count| {
        let mut talkers = Talkers::begin(open.address(Service::Echo), plain(count, false))?;
        talkers.settle()?;
        settle(&open);
        io::Result::Ok(talkers)
    };
    let _first = hold(FIRST)?;
    let before = account::memory(open.pids());
    let _more = hold(MORE)?;
    Ok(Sample::from([("bytes_each", (account::memory(open.pids()) - before) / MORE as f64)]))
}

/// The same for flows.
fn flows(_lab: &Lab, way: &Way) -> io::Result<Sample> {
    const FIRST: usize = 2_000;
    const ALL: usize = 9_000;
    let open = Open::begin(way);
    let hold = |count, under_way| {
        let mut askers = Askers::begin(open.address(Service::Datagrams), count, under_way, false)?;
        askers.warm_up()?;
        askers.settle()?;
        io::Result::Ok(askers)
    };
    // These come back among the others, from the same ports. So many at once
    // that buffers are as full as they ever will be: those are no flow's.
    drop(hold(FIRST, 512)?);
    settle(&open);
    let before = account::memory(open.pids());
    let _all = hold(ALL, 64)?;
    settle(&open);
    Ok(Sample::from([("bytes_each", (account::memory(open.pids()) - before) / (ALL - FIRST) as f64)]))
}

/// Waits until these processes sleep: two looks a tenth of a second apart
/// between which they used less than 0.1 ms.
fn settle(open: &Open) {
    let mut last = account::used(open.pids());
    for _ in 0..50 {
        std::thread::park_timeout(Duration::from_millis(100));
        let now = account::used(open.pids());
        if now.since(last).seconds < 1e-4 {
            return;
        }
        last = now;
    }
}

fn idle(lab: &Lab, way: &Way) -> io::Result<Sample> {
    let open = Open::begin(way);
    let address = open.address(Service::Echo);
    let _streams = (0..100).map(|_| TcpStream::connect(address)).collect::<io::Result<Vec<_>>>()?;
    settle(&open);
    std::thread::park_timeout(Duration::from_secs(1));
    let serving: Vec<u32> = open.pids().iter().copied().filter(|pid| serves(way, *pid)).collect();
    let time = 3 * lab.time;
    let before = (account::used(open.pids()), account::used(&serving));
    std::thread::park_timeout(time);
    let all = account::used(open.pids()).since(before.0);
    let serving = account::used(&serving).since(before.1);
    let seconds = time.as_secs_f64();
    Ok(Sample::from([
        ("wakeups", all.turns / seconds),
        ("serving_wakeups", serving.turns / seconds),
        ("idle_ms", all.seconds * 1e3 / seconds),
    ]))
}

/// Whether a process moves bytes; the others of evenkeel only look after those.
fn serves(way: &Way, pid: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    !matches!(way, Way::Evenkeel { .. }) || name.contains("worker")
}
