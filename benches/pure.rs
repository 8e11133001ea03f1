//! The pure parts, without sockets: what they cost as they grow.
//!
//!     cargo bench --bench pure [-- FILTER]
//!
//! Run as a test (without `--bench`) each is done once over a small size.

use std::cell::Cell;
use std::hint::black_box;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use evenkeel::access::Access;
use evenkeel::balance::maglev;
use evenkeel::config;
use evenkeel::deadline::Deadlines;
use evenkeel::flow::{Arrival, FlowKey, Flows, Limits};
use evenkeel::keep::Keep;
use evenkeel::relay::{End, Lent, MAX_READ, Pipe, Pipes, Readiness, Session, Side};
use evenkeel::slab::Key;
use evenkeel::spread::{Spread, Verdict};

/// A size, or a small one where only a test was asked for.
fn size(full: u32) -> u32 {
    if std::env::args().any(|word| word == "--bench") { full } else { full.min(1_000) }
}

fn maglev_tables(c: &mut Criterion) {
    let mut group = c.benchmark_group("maglev");
    for count in [5, 100, 1_000] {
        let names: Vec<String> = (0..count).map(|i| format!("10.0.{}.{}:80", i / 250, i % 250)).collect();
        let fill = || maglev::fill(names.iter().enumerate().map(|(at, name)| (at, name.as_str(), 1)));
        group.bench_function(BenchmarkId::new("build", count), |b| b.iter(fill));
        let table = fill().expect("servers with weight");
        let mut client = 0u32;
        group.bench_function(BenchmarkId::new("look-up", count), |b| {
            b.iter(|| {
                client = client.wrapping_add(1);
                let address = IpAddr::V4(Ipv4Addr::from_bits(client));
                table[maglev::positions(address).next().expect("a table has places")]
            });
        });
    }
    group.finish();
}

fn name(number: u32) -> FlowKey {
    FlowKey {
        client: SocketAddr::new(Ipv4Addr::from_bits(number >> 8).into(), 1_024 + (number & 255) as u16),
        local: Ipv4Addr::LOCALHOST.into(),
        listener: 0,
        address: 0,
    }
}

fn flow_table(count: u32) -> Flows {
    let limits = Limits { idle_timeout: 60_000, replies: 0, max_flows: u32::MAX, has_sockets: true };
    let mut flows = Flows::new(vec![limits], u32::MAX, 7, 0);
    for number in 0..count {
        let key = flows.open(name(number), 0, u64::from(number / 1_000));
        flows.handle_reply(key, u64::from(number / 1_000));
    }
    flows
}

fn flows(c: &mut Criterion) {
    let mut group = c.benchmark_group("flows");
    for count in [100_000, 1_000_000].map(size) {
        let mut flows = flow_table(count);
        // In an order that no cache foresees.
        let mut number = 0u32;
        let mut next = move || {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((u64::from(number) * u64::from(count)) >> 32) as u32
        };
        group.bench_function(BenchmarkId::new("a datagram there and back", count), |b| {
            b.iter(|| match flows.handle_client(&name(next()), 1_000) {
                Arrival::Known(key) => flows.handle_reply(key, 1_000),
                other => panic!("every client is known: {other:?}"),
            });
        });
        group.bench_function(BenchmarkId::new("open and end", count), |b| {
            b.iter(|| {
                let key = flows.open(name(count), 0, 1_000);
                flows.end(key)
            });
        });
        group.bench_function(BenchmarkId::new("a stranger where no flow may open", count), |b| {
            flows.begin_leave();
            b.iter(|| flows.handle_client(&name(count + next()), 1_000));
        });
    }
    group.finish();
}

/// A socket that always has one message and takes all.
struct Endless {
    bytes: Vec<u8>,
    waits: Cell<bool>,
}

impl Endless {
    fn new(length: usize) -> Endless {
        Endless { bytes: vec![7; length], waits: Cell::new(false) }
    }
}

/// There is none: messages are copied.
struct NoPipe;

impl Pipe for NoPipe {
    fn take(&self, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
    fn number(&self) -> i32 {
        -1
    }
}

impl End for Endless {
    type Pipe = NoPipe;

    fn fill(&self, _: &NoPipe, _: usize) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn drain(&self, _: &NoPipe, _: usize) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        if !self.waits.replace(false) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = self.bytes.len().min(into.len());
        into[..count].copy_from_slice(&self.bytes[..count]);
        Ok(count)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(black_box(bytes).len())
    }

    fn finish(&self) -> io::Result<()> {
        Ok(())
    }
}

fn relay(c: &mut Criterion) {
    let mut group = c.benchmark_group("relay");
    let ready = Readiness { readable: true, writable: false, probe: false };
    let mut keep = Keep::create(1).expect("memory");
    let mut pipes = Pipes::new(0, || None);
    for length in [64, 16 * 1024] {
        let (client, server) = (Endless::new(length), Endless::new(length));
        let mut session = Session::relay();
        group.throughput(Throughput::Bytes(2 * length as u64));
        group.bench_function(BenchmarkId::new("a message there and back", length), |b| {
            b.iter(|| {
                for (side, end) in [(Side::Client, &client), (Side::Server, &server)] {
                    end.waits.set(true);
                    session.handle_ready(side, ready);
                    let mut lent = Lent { keep: &mut keep, pipes: &mut pipes, session: 0, now: 0 };
                    black_box(session.drive([&client, &server], &mut lent, MAX_READ));
                }
            });
        });
    }
    group.finish();
}

fn deadlines(c: &mut Criterion) {
    let mut group = c.benchmark_group("deadlines");
    let count = size(1_000_000);
    let full = || {
        let mut deadlines = Deadlines::new(0);
        (0..count).for_each(|index| deadlines.set(index, 1_000 + u64::from(index) % 3_600_000));
        deadlines
    };
    let mut deadlines = full();
    let mut at = 0u32;
    group.bench_function(BenchmarkId::new("move one", count), |b| {
        b.iter(|| {
            at = (at + 7_919) % count;
            deadlines.set(at, 1_000 + u64::from(at) * 3);
        });
    });
    group.bench_function(BenchmarkId::new("when is the next", count), |b| b.iter(|| deadlines.next()));
    group.sample_size(10);
    group.bench_function(BenchmarkId::new("let an hour of all pass", count), |b| {
        let hour = |mut deadlines: Deadlines| {
            let mut fired = Vec::new();
            for second in 0..=3_601 {
                deadlines.advance(second * 1_000, &mut fired);
                fired.clear();
            }
            deadlines
        };
        b.iter_batched(full, hour, BatchSize::PerIteration);
    });
    group.finish();
}

fn configurations(c: &mut Criterion) {
    let mut group = c.benchmark_group("config");
    let reference = include_str!("../config/reference.toml");
    group.bench_function("the reference", |b| b.iter(|| config::load("bench", black_box(reference))));
    let mut large = String::new();
    for number in 0..200 {
        large += &format!(
            "[[listener]]\nname = \"l{number}\"\nmode = \"tcp\"\nbind = \"127.0.0.1:{}\"\nupstream = \"u{number}\"\n\
             [[upstream]]\nname = \"u{number}\"\n",
            10_000 + number
        );
        for server in 0..20 {
            large += &format!("[[upstream.server]]\naddress = \"10.0.{number}.{server}:80\"\n");
        }
    }
    assert!(config::load("bench", &large).is_ok());
    group.bench_function("200 listeners, 4,000 servers", |b| {
        b.iter(|| config::load("bench", black_box(&large)));
    });
    group.finish();
}

fn spread(c: &mut Criterion) {
    let mut group = c.benchmark_group("spread");
    for slots in [4, 64] {
        let counts: Vec<u64> = (0..slots).map(|slot| 10_000 + slot * 37 % 211).collect();
        group.bench_function(BenchmarkId::new("judge", slots), |b| {
            b.iter(|| Verdict::of(&Spread::equal(black_box(&counts))));
        });
    }
    group.finish();
}

/// May a client come? Every other address of the lists' range is in them.
fn access(c: &mut Criterion) {
    let mut group = c.benchmark_group("access");
    for count in [0, 5, 5_000] {
        let prefix = |number: u32| {
            let first = Ipv4Addr::from_bits((10 << 24) | (number << 9));
            format!("{first}/24").parse().expect("a prefix")
        };
        let allow: Vec<_> = (0..count).map(prefix).collect();
        let access = Access::new(&allow, &allow[..allow.len() / 2]);
        let mut client = 0u32;
        group.bench_function(BenchmarkId::new("permits", count), |b| {
            b.iter(|| {
                client = client.wrapping_add(0x9E37_79B9) & 0x003F_FFFF;
                access.permits(IpAddr::V4(Ipv4Addr::from_bits((10 << 24) | client)))
            });
        });
    }
    group.finish();
}

fn keys(c: &mut Criterion) {
    let key = Key { index: 77, generation: 5 };
    c.bench_function("slab key to token and back", |b| b.iter(|| Key::unpack(black_box(key).pack(true))));
}

criterion_group! {
    name = all;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30);
    targets = maglev_tables, flows, relay, deadlines, configurations, spread, access, keys
}
criterion_main!(all);
