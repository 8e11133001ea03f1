//! What steering brings and costs, on the real daemon in a network of its own.
//!
//! ```text
//! cargo bench --bench steering                 all parts
//! cargo bench --bench steering -- busy_workers one of them
//! ```
//! `busy_workers`: time from connect(2) to the first byte with two of four
//! workers kept busy, `hash` and `load-aware` in turn. `open_connections`: how
//! even 200 long-lived connections lie. `cost_per_accept`: CPU time a
//! connection of the workers and of the whole machine, each way against the
//! kernel's own hash in turn, and the program's own run time. `time_to_load`:
//! maps and program of one address.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use evenkeel::steering::{page, program};
use evenkeel::sys::bpf;
use socket2::SockRef;
use support::daemon::Daemon;
use support::servers::{connect, local};

fn main() {
    // cargo bench says --bench; libtest-mimic knows it.
    support::run(tests![
        busy_workers needs ["ebpf"],
        open_connections needs ["ebpf"],
        cost_per_accept needs ["ebpf"],
        time_to_load needs ["ebpf"],
    ])
}

fn config(steering: &str) -> String {
    format!(
        "[daemon]\nworkers = 4\npin_workers = {}\n[[listener]]\nname = \"front\"\nmode = \"tcp\"\n\
         bind = \"127.0.0.1:8080\"\nservice = \"identify\"\nsteering = \"{steering}\"\n",
        steering == "cpu"
    )
}

fn daemon(steering: &str, environment: &[(&str, &str)]) -> Daemon {
    let mut daemon = Daemon::start_with(&config(steering), |command| {
        command.envs(environment.iter().copied());
    });
    daemon.wait_ready();
    daemon
}

/// One connection to its first byte, to be closed by a reset; who answered.
fn open() -> (TcpStream, usize) {
    let mut stream = connect(local(8080));
    let mut line = [0; 200];
    let count = stream.read(&mut line).expect("an answer");
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
    let line = String::from_utf8_lossy(&line[..count]);
    let slot = line.split(" slot=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    (stream, slot.expect("an identity"))
}

fn median_and_range(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

/// An open loop: connections at a fixed pace, whatever becomes of
/// those before, so that a slow worker cannot slow the clients down.
fn open_loop(count: usize, interval: Duration) -> (Vec<Duration>, Vec<usize>) {
    let (times, slots) = (Mutex::new(Vec::new()), Mutex::new(vec![0; 4]));
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for index in 0..count {
            let due = begin + interval * index as u32;
            while Instant::now() < due {
                // A thread of the scope that ends wakes this one early.
                std::thread::park_timeout(due.saturating_duration_since(Instant::now()));
            }
            let (times, slots) = (&times, &slots);
            scope.spawn(move || {
                let (_stream, slot) = open();
                // From when it should have begun: waiting for a thread counts.
                times.lock().expect("no panic").push(due.elapsed());
                slots.lock().expect("no panic")[slot] += 1;
            });
        }
    });
    (times.into_inner().expect("no panic"), slots.into_inner().expect("no panic"))
}

fn busy_workers() {
    const ROUNDS: usize = 5;
    /// Slow enough that a busy worker with its fair part still keeps up: a
    /// connection is two or three events, 150 milliseconds at the most.
    const INTERVAL: Duration = Duration::from_millis(50);
    let mut all: [Vec<Vec<f64>>; 2] = [vec![Vec::new(); 3], vec![Vec::new(); 3]];
    for round in 0..ROUNDS {
        for (which, steering) in ["hash", "load-aware"].into_iter().enumerate() {
            let daemon = daemon(steering, &[("EVENKEEL_TEST_BUSY_SLOTS", "0,1:50ms")]);
            // What it learns at first is not what is asked here.
            open_loop(60, INTERVAL);
            let (mut times, slots) = open_loop(400, INTERVAL);
            drop(daemon);
            times.sort();
            let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1000.0;
            println!(
                "round {round} {steering:<11} p50 {:8.2} ms  p90 {:8.2} ms  p99 {:8.2} ms  slots {slots:?}",
                at(0.5),
                at(0.9),
                at(0.99)
            );
            for (values, part) in all[which].iter_mut().zip([0.5, 0.9, 0.99]) {
                values.push(at(part));
            }
        }
    }
    for (steering, parts) in ["hash", "load-aware"].iter().zip(&mut all) {
        for (values, name) in parts.iter_mut().zip(["p50", "p90", "p99"]) {
            let (median, least, most) = median_and_range(values);
            println!(
                "{steering:<11} {name}: median {median:.2} ms ({least:.2} to {most:.2}) of {ROUNDS} rounds"
            );
        }
    }
}

fn open_connections() {
    const ROUNDS: usize = 10;
    let mut all = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (which, steering) in ["hash", "load-aware"].into_iter().enumerate() {
            let daemon = daemon(steering, &[]);
            let _open: Vec<TcpStream> = (0..200).map(|_| open().0).collect();
            let active = daemon.listener("front").active_per_slot;
            assert_eq!(active.iter().sum::<u64>(), 200);
            all[which].push(*active.iter().max().expect("four slots") as f64 / 50.0);
        }
    }
    for (steering, values) in ["hash", "load-aware"].iter().zip(&mut all) {
        let (median, least, most) = median_and_range(values);
        println!(
            "{steering:<11} max/mean of 200 open: median {median:.2} ({least:.2} to {most:.2}) of {ROUNDS} rounds"
        );
    }
}

/// CPU time of the daemon's workers in nanoseconds (/proc/PID/schedstat).
fn worker_time(daemon: &Daemon) -> u64 {
    let time = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("a living worker");
        text.split(' ').next().expect("a number").parse::<u64>().expect("a number")
    };
    daemon.status().workers.iter().map(|worker| time(worker.pid)).sum()
}

/// The same of this process: its connects carry the handshake on loopback, and
/// with it the steering.
fn own_time() -> u64 {
    let text = fs::read_to_string("/proc/self/stat").expect("own statistics");
    let fields: Vec<&str> = text.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u64>().expect("ticks");
    // utime and stime in hundredths of a second (proc(5)).
    (ticks(11) + ticks(12)) * 10_000_000
}

fn cost_per_accept() {
    const ROUNDS: usize = 7;
    const EACH: usize = 20_000;
    type Way = (&'static str, &'static str, &'static [(&'static str, &'static str)]);
    let ways: [Way; 6] = [
        ("kernel hash", "hash", &[("EVENKEEL_NO_EBPF", "1")]),
        ("hash", "hash", &[]),
        ("source", "source", &[]),
        ("cpu", "cpu", &[]),
        ("load-aware", "load-aware", &[]),
        ("source, cbpf", "source", &[("EVENKEEL_NO_EBPF", "1")]),
    ];
    let mut worker = vec![Vec::new(); ways.len()];
    let mut client = vec![Vec::new(); ways.len()];
    let mut program = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for (which, (_, steering, environment)) in ways.iter().enumerate() {
            let daemon = daemon(steering, environment);
            let (before, own_before) = (worker_time(&daemon), own_time());
            visits(EACH);
            worker[which].push((worker_time(&daemon) - before) as f64 / EACH as f64 / 1000.0);
            client[which].push((own_time() - own_before) as f64 / EACH as f64 / 1000.0);
            // Apart: to take the time costs time.
            if let Ok(_measuring) = bpf::measure_runs() {
                visits(2000);
                let (runs, time) = bpf::runs_of(daemon.pid()).expect("our child");
                if runs > 0 {
                    program[which].push(time as f64 / runs as f64);
                }
            }
        }
    }
    println!("{ROUNDS} rounds of {EACH} connections each, in turn; median (range)");
    for (which, (name, _, _)) in ways.iter().enumerate() {
        let paired = |values: &[Vec<f64>]| {
            let mut pairs: Vec<f64> = values[which].iter().zip(&values[0]).map(|(a, b)| a - b).collect();
            median_and_range(&mut pairs)
        };
        let (w, w0, w1) = paired(&worker);
        let (c, c0, c1) = paired(&client);
        let (wm, _, _) = median_and_range(&mut worker[which].clone());
        let (cm, _, _) = median_and_range(&mut client[which].clone());
        println!(
            "{name:<13} worker {wm:6.2} us, against the kernel's hash {w:+6.2} ({w0:+.2} to {w1:+.2}); \
             client {cm:6.2} us, {c:+6.2} ({c0:+.2} to {c1:+.2})"
        );
        if !program[which].is_empty() {
            let (p, p0, p1) = median_and_range(&mut program[which]);
            println!("{:<13} program {p:.0} ns a run ({p0:.0} to {p1:.0})", "");
        }
    }
}

fn time_to_load() {
    let mut length = 0;
    let mut times: Vec<f64> = (0..101)
        .map(|_| {
            let begin = Instant::now();
            let sockets = bpf::SocketArray::create(64).expect("an array");
            let page = bpf::Page::create(page::PAGE_BYTES).expect("a page");
            let loads = bpf::Page::create(page::LOADS_BYTES).expect("a page");
            let code = program::program(sockets.as_fd(), page.as_fd(), loads.as_fd());
            length = code.len();
            let _program = bpf::Program::load(&code).expect("the verifier takes it");
            begin.elapsed().as_secs_f64() * 1000.0
        })
        .collect();
    let (median, least, most) = median_and_range(&mut times);
    println!("{length} instructions, made and loaded in {median:.2} ms ({least:.2} to {most:.2})");
}

/// So many connections, from four threads.
fn visits(count: usize) {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..count / 4 {
                    drop(open());
                }
            });
        }
    });
}
