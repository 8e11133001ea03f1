//! On what the load was made: facts for the report.
//!
//! Read once from /proc; what cannot be read is left out.

use std::fs;

use serde::Serialize;

/// The host of the load generator.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Kernel name and release.
    pub kernel: String,
    /// Processor model, where the kernel tells it.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// This program's version.
    pub version: String,
}

impl Machine {
    /// This host.
    pub fn read() -> Machine {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let info = text("/proc/cpuinfo");
        let cpu = field(&info, "model name").or_else(|| field(&info, "Model")).unwrap_or_default();
        let info_of_memory = text("/proc/meminfo");
        let memory = field(&info_of_memory, "MemTotal").unwrap_or_default();
        let kilobytes: u64 = memory.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0);
        Machine {
            kernel: format!("Linux {} {}", text("/proc/sys/kernel/osrelease").trim(), std::env::consts::ARCH),
            cpu: cpu.to_string(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kilobytes * 1024,
            version: env!("CARGO_PKG_VERSION").to_string(),
        }
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':').map(str::trim))
}
