//! What the host says about itself: files below /proc, two system calls.
//! Everything is optional, because containers hide what they like.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;
use std::str::FromStr;
use std::thread::available_parallelism;

use crate::sys::host::{open_file_limits, udp_offloads};

/// Readings; `None` = hidden or not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Release of the kernel.
    pub kernel: Option<String>,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// RLIMIT_NOFILE, soft and hard.
    pub open_files: Option<(u64, u64)>,
    /// fs.nr_open, the most that RLIMIT_NOFILE can be set to.
    pub nr_open: Option<u64>,
    /// net.core.somaxconn
    pub somaxconn: Option<u64>,
    /// net.ipv4.ip_local_port_range
    pub port_range: Option<RangeInclusive<u16>>,
    /// net.ipv4.ip_local_reserved_ports
    pub reserved_ports: Vec<RangeInclusive<u16>>,
    /// net.ipv4.ip_unprivileged_port_start
    pub unprivileged_port_start: Option<u64>,
    /// net.core.rmem_max
    pub rmem_max: Option<u64>,
    /// net.core.wmem_max
    pub wmem_max: Option<u64>,
    /// net.netfilter.nf_conntrack_max; `None` = not loaded (or hidden).
    pub conntrack_max: Option<u64>,
    /// net.netfilter.nf_conntrack_count
    pub conntrack_count: Option<u64>,
    /// net.ipv4.tcp_migrate_req
    pub migrate_req: Option<u64>,
    /// net.ipv4.tcp_fastopen
    pub fast_open: Option<u64>,
    /// Effective capabilities.
    pub capabilities: Option<u64>,
    /// UDP_SEGMENT, UDP_GRO
    pub udp_offloads: Option<(bool, bool)>,
}

impl Host {
    /// Reads everything, below this /proc.
    pub fn read(proc: &Path) -> Host {
        let sysctl = |name: &str| fs::read_to_string(proc.join("sys").join(name)).ok();
        let number = |name: &str| sysctl(name)?.trim().parse().ok();
        Host {
            kernel: sysctl("kernel/osrelease").map(|text| text.trim().to_string()),
            cpus: available_parallelism().map_or(1, |count| count.get()),
            open_files: open_file_limits().ok(),
            nr_open: number("fs/nr_open"),
            somaxconn: number("net/core/somaxconn"),
            port_range: sysctl("net/ipv4/ip_local_port_range").and_then(|text| port_range(&text)),
            reserved_ports: sysctl("net/ipv4/ip_local_reserved_ports")
                .map(|text| port_list(&text))
                .unwrap_or_default(),
            unprivileged_port_start: number("net/ipv4/ip_unprivileged_port_start"),
            rmem_max: number("net/core/rmem_max"),
            wmem_max: number("net/core/wmem_max"),
            conntrack_max: number("net/netfilter/nf_conntrack_max"),
            conntrack_count: number("net/netfilter/nf_conntrack_count"),
            migrate_req: number("net/ipv4/tcp_migrate_req"),
            fast_open: number("net/ipv4/tcp_fastopen"),
            capabilities: fs::read_to_string(proc.join("self/status")).ok().and_then(|t| effective(&t)),
            udp_offloads: udp_offloads().ok(),
        }
    }

    /// Does this process have the capability of this number? `None` = the
    /// host does not tell.
    pub fn capable(&self, number: u32) -> Option<bool> {
        self.capabilities.map(|set| set & (1 << number) != 0)
    }

    /// Major and minor number of the kernel.
    pub fn version(&self) -> Option<(u32, u32)> {
        let mut parts = self.kernel.as_deref()?.split(['.', '-']);
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    }
}

fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut ends = text.split_whitespace().map(u16::from_str);
    Some(ends.next()?.ok()?..=ends.next()?.ok()?)
}

/// `8080,9000-9010`
fn port_list(text: &str) -> Vec<RangeInclusive<u16>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    text.trim().split(',').filter_map(range).collect()
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_capabilities_are_read_as_the_kernel_writes_them() {
        assert_eq!(port_range("32768\t60999\n"), Some(32768..=60999));
        assert_eq!(port_range("none"), None);
        assert_eq!(port_list("8080,9000-9010\n"), [8080..=8080, 9000..=9010]);
        assert!(port_list("\n").is_empty());
        assert_eq!(effective("Name:\tx\nCapEff:\t0000000000000400\n"), Some(0x400));
    }

    #[test]
    fn a_hidden_proc_leaves_readings_out_and_nothing_fails() {
        let empty = tempfile::tempdir().expect("a temporary folder");
        let host = Host::read(empty.path());
        assert_eq!((host.kernel.clone(), host.somaxconn, host.capabilities), (None, None, None));
        assert_eq!(host.version(), None);
    }
}
