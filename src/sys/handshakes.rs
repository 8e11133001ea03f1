//! Whether TCP handshakes are still under way towards some ports.

use std::fs::File;
use std::io::{Read, Take};

/// How much of a socket table is read: some 7,000 rows. Reading more would
/// stall the caller for longer than the answer is worth.
const MAX_TABLE: u64 = 1 << 20;
/// TCP_SYN_RECV as /proc/net/tcp writes it (include/net/tcp_states.h).
const SYN_RECEIVED: &str = "03";

/// Whether a handshake that this host has answered is not complete yet.
/// `None` where that cannot be known: the tables are hidden or too long.
pub fn half_open(ports: &[u16]) -> Option<bool> {
    let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
    let mut found = false;
    for (index, path) in tables.into_iter().enumerate() {
        let Ok(file) = File::open(path) else {
            // Without IPv6 there is no second table.
            if index == 0 {
                return None;
            }
            continue;
        };
        let mut text = String::new();
        let mut table: Take<File> = file.take(MAX_TABLE);
        table.read_to_string(&mut text).ok()?;
        found |= text.lines().skip(1).any(|row| is_half_open(row, ports));
        if table.limit() == 0 {
            return None;
        }
    }
    Some(found)
}

fn is_half_open(row: &str, ports: &[u16]) -> bool {
    let mut columns = row.split_ascii_whitespace().skip(1);
    let local = columns.next().and_then(|local| local.rsplit_once(':'));
    let port = local.and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
    columns.nth(1) == Some(SYN_RECEIVED) && port.is_some_and(|port| ports.contains(&port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_in_syn_recv_at_our_port_counts() {
        let row =
            |state: &str| format!("   1: 0100007F:1F90 0100007F:A0D2 {state} 00000000:00000000 01:00000063");
        assert!(is_half_open(&row("03"), &[80, 8080]));
        assert!(!is_half_open(&row("01"), &[8080]));
        assert!(!is_half_open(&row("03"), &[81]));
        assert!(!is_half_open("rubbish", &[81]));
    }

    #[test]
    fn the_tables_of_this_host_can_be_read() {
        assert_eq!(half_open(&[]), Some(false));
    }
}
