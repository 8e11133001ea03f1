//! What processes use: CPU time, wake-ups, memory, read from /proc.
//!
//! CPU time comes from /proc/PID/task/TID/schedstat, in nanoseconds: time on a
//! CPU, time ready and waiting for one, and how often it got one.

use std::fs;

/// What the threads of some processes have used since they began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// Seconds on a CPU.
    pub seconds: f64,
    /// Seconds ready, and waiting for one.
    pub waited: f64,
    /// How often one of them was put on a CPU: its wake-ups, when idle.
    pub turns: f64,
}

impl Used {
    /// What was used since an earlier reading.
    pub fn since(self, earlier: Used) -> Used {
        Used {
            seconds: self.seconds - earlier.seconds,
            waited: self.waited - earlier.waited,
            turns: self.turns - earlier.turns,
        }
    }
}

/// What these processes have used.
pub fn used(pids: &[u32]) -> Used {
    let mut sum = Used::default();
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let mut fields = text.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
            sum.seconds += fields.next().unwrap_or(0.0) / 1e9;
            sum.waited += fields.next().unwrap_or(0.0) / 1e9;
            sum.turns += fields.next().unwrap_or(0.0);
        }
    }
    sum
}

/// What the kernel's own threads used that deliver packets when there are too
/// many for their senders to do it: work that is then charged to nobody.
pub fn kernel_delivery() -> Used {
    let is_one = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.starts_with("ksoftirqd")
    };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    used(&pids.filter(is_one).collect::<Vec<u32>>())
}

/// Bytes of memory that are these processes' own; what they share is divided
/// among those that share it (proportional set size).
pub fn memory(pids: &[u32]) -> f64 {
    let of_one = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:").map(str::to_string));
        let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kilobytes.unwrap_or(0.0) * 1024.0
    };
    pids.iter().map(of_one).sum()
}

/// A process and all that it started, and they in turn.
pub fn family(parent: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pairs: Vec<(u32, u32)> = entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect();
    let mut all = vec![parent];
    let mut next = 0;
    while next < all.len() {
        let parent = all[next];
        all.extend(pairs.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    all
}
