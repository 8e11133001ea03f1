//! How a worker waits for a CPU, and what makes one busy.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::servers::{connect, exchange};
use super::within;

/// A process's scheduling policy, by the kernel's number (sched(7)).
pub fn policy(pid: u32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a living process");
    // Behind the name, which may have spaces, comes the third field; this is the 41st.
    let rest = stat.rsplit_once(')').expect("a name").1;
    rest.split_whitespace().nth(41 - 3).expect("so many fields").parse().expect("a number")
}

/// The workers behind an echo get much to do until one has another policy, then
/// little until none has.
#[track_caller]
pub fn goes_with_the_load(workers: &[u32], echo: SocketAddr) {
    for pid in workers {
        // Beside other tests it may get too little of a CPU to be busy.
        let _ = Command::new("renice").args(["-n", "-15", "-p", &pid.to_string()]).output();
        assert_eq!(policy(*pid), libc::SCHED_OTHER);
    }
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = connect(echo);
                while !is_over.load(Ordering::Relaxed) {
                    exchange(&mut client, &[7; 1 << 16]).expect("an answer");
                }
            });
        }
        let result = std::panic::catch_unwind(|| {
            within(Duration::from_secs(60), "a busy worker waits for its turn", || {
                workers.iter().any(|pid| policy(*pid) == libc::SCHED_BATCH)
            });
        });
        is_over.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    within(Duration::from_secs(60), "one with little to do does not", || {
        exchange(&mut connect(echo), b"now and then").expect("an answer");
        workers.iter().all(|pid| policy(*pid) == libc::SCHED_OTHER)
    });
}
