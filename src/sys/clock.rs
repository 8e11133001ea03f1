//! Monotonic time in milliseconds: the only clock that decides anything.
//!
//! The same in every process of one boot, so a deadline may cross a process
//! border. `CLOCK_MONOTONIC_COARSE` is read from a page that the kernel maps,
//! without a system call even where the precise clock needs one; it steps by
//! one to ten milliseconds, which is finer than any timeout here.

use nix::time::{ClockId, clock_gettime};

/// Milliseconds of `CLOCK_MONOTONIC`.
pub type Millis = u64;

/// Now, to within some milliseconds, almost for free.
pub fn coarse() -> Millis {
    millis(ClockId::CLOCK_MONOTONIC_COARSE)
}

/// Now in microseconds, precise: for measuring, not per event.
pub fn precise_micros() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the monotonic clock always works");
    time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1_000
}

/// CPU time of the calling thread in microseconds; a system call.
pub fn thread_micros() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a thread can read its own clock");
    time.tv_sec() as u64 * 1_000_000 + time.tv_nsec() as u64 / 1_000
}

/// The monotonic clock together with the time that the machine slept.
pub fn with_sleep() -> Millis {
    millis(ClockId::CLOCK_BOOTTIME)
}

/// Seconds since 1970: for people alone, it may jump.
pub fn wall_seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs())
}

fn millis(clock: ClockId) -> Millis {
    let time = clock_gettime(clock).expect("the monotonic clock always works");
    time.tv_sec() as u64 * 1_000 + time.tv_nsec() as u64 / 1_000_000
}
