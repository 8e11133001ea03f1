//! Keeps connects cheap where most local ports towards a server are taken.
//!
//! connect(2) tries the ports one after the other, first one half of the range
//! and then the other (net/ipv4/inet_hashtables.c, __inet_hash_connect). Once a
//! half is taken, by connections or by TIME_WAIT, it looks at all of that half
//! each time: measured, 20 µs become 900 with 14,116 connections to one address.
//! So once connects are slow, the kernel is told a few ports to choose from, by
//! chance, and the whole range only where those are taken.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;

use crate::sys::clock;
use crate::sys::local_end::{self, Window};

/// Longer than a connect takes on its own, in microseconds.
const SLOW: u64 = 150;
/// Slow connects in a row: one alone may have lost the CPU.
const IN_A_ROW: u32 = 2;
/// So many connects go through windows before the whole range is tried again.
const NARROWED: u32 = 2_000;
/// Ports of a window: so few that to look at all costs little, so many that one
/// is free: of 64, with nine in ten of the range taken, in all but 1 of 850.
const WINDOW: u16 = 64;
/// Windows for one connect.
const TRIES: u32 = 6;

/// How one worker's connects look for local ports.
#[derive(Debug)]
pub struct Ports {
    /// The host's range, where windows of it are possible.
    range: Option<Window>,
    slow: u32,
    narrowed: u32,
    random: u64,
}

impl Ports {
    /// Of this host.
    pub fn of_host() -> Ports {
        let range = local_end::local_ports().ok().filter(|_| local_end::can_narrow());
        Ports::of_range(range.filter(|(first, last)| last.saturating_sub(*first) >= 4 * WINDOW))
    }

    fn of_range(range: Option<Window>) -> Ports {
        let random = RandomState::new().build_hasher().finish() | 1;
        Ports { range, slow: 0, narrowed: 0, random }
    }

    /// Connects by `connect`, which is told from which ports. Its error is
    /// EADDRNOTAVAIL where the whole range is taken.
    pub fn connect<T>(&mut self, mut connect: impl FnMut(Option<Window>) -> io::Result<T>) -> io::Result<T> {
        let Some(range) = self.range else { return connect(None) };
        if self.narrowed > 0 {
            self.narrowed -= 1;
            for _ in 0..TRIES {
                match connect(Some(self.window(range))) {
                    Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
                    result => return result,
                }
            }
            return connect(None);
        }
        let began = clock::precise_micros();
        let result = connect(None);
        let is_slow = clock::precise_micros().saturating_sub(began) >= SLOW;
        self.slow = if is_slow { self.slow + 1 } else { 0 };
        if self.slow == IN_A_ROW {
            (self.slow, self.narrowed) = (0, NARROWED);
        }
        result
    }

    fn window(&mut self, (first, last): Window) -> Window {
        // xorshift64 (Marsaglia, 2003): where in the window the port lies, the
        // kernel chooses by a secret of its own.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let places = u64::from(last - first - WINDOW) + 2;
        let begin = first + ((self.random >> 32) % places) as u16;
        (begin, begin + (WINDOW - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    const RANGE: Window = (40_000, 40_999);

    /// As the kernel does with a half that is taken.
    fn slowly(window: Option<Window>) -> io::Result<Option<Window>> {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_micros(SLOW + 1) {}
        Ok(window)
    }

    #[test]
    fn slow_connects_are_narrowed_for_a_while_and_then_the_range_is_tried_again() {
        let mut ports = Ports::of_range(Some(RANGE));
        for _ in 0..3 {
            for _ in 0..IN_A_ROW {
                assert_eq!(ports.connect(slowly).unwrap(), None);
            }
            for _ in 0..NARROWED {
                let window = ports.connect(Ok).unwrap().expect("one");
                assert!(window.0 >= RANGE.0 && window.1 <= RANGE.1, "{window:?}");
                assert_eq!(window.1 - window.0 + 1, WINDOW);
            }
        }
    }

    #[test]
    fn windows_cover_the_range() {
        let mut ports = Ports::of_range(Some(RANGE));
        let windows: Vec<Window> = (0..20_000).map(|_| ports.window(RANGE)).collect();
        // Each of 937 places is missed with a probability of e^-21.
        for begin in RANGE.0..=RANGE.1 - WINDOW + 1 {
            assert!(windows.iter().any(|window| window.0 == begin), "{begin}");
        }
    }

    #[test]
    fn where_windows_are_full_the_whole_range_is_asked() {
        let mut ports = Ports::of_range(Some(RANGE));
        ports.narrowed = 1;
        let mut asked = Vec::new();
        let result: io::Result<()> = ports.connect(|window| {
            asked.push(window.is_some());
            Err(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL))
        });
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EADDRNOTAVAIL));
        assert_eq!(asked, [vec![true; TRIES as usize], vec![false]].concat());
        ports.narrowed = 1;
        let mut asked = 0;
        let refused: io::Result<()> = ports.connect(|_| {
            asked += 1;
            Err(io::ErrorKind::ConnectionRefused.into())
        });
        assert!(refused.is_err() && asked == 1, "what is no want of ports is told at once");
    }

    #[test]
    fn without_windows_nothing_changes() {
        let mut ports = Ports::of_range(None);
        for _ in 0..10 {
            assert_eq!(ports.connect(slowly).unwrap(), None);
        }
    }

    #[test]
    fn a_connection_leaves_from_its_window() {
        use crate::sys::local_end::LocalEnd;
        use crate::sys::stream::{Connecting, connect_tcp};
        if !local_end::can_narrow() {
            return println!("SKIPPED: this kernel has no IP_LOCAL_PORT_RANGE (Linux 6.3)");
        }
        let (first, last) = local_end::local_ports().unwrap();
        let window = (last - 99, last);
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(server) = std::net::TcpListener::bind(address) else {
                println!("SKIPPED: {address}: this host has no IPv6");
                continue;
            };
            let target = server.local_addr().unwrap();
            for from in [LocalEnd::Any, LocalEnd::Own(target.ip())] {
                let (Connecting::Done(stream) | Connecting::UnderWay(stream)) =
                    connect_tcp(target, from, Some(window)).unwrap();
                let port = stream.local().unwrap().expect("an address").port();
                assert!((window.0..=window.1).contains(&port), "{port} of {first} to {last}");
            }
        }
    }
}
