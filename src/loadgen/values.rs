//! Values of options as a person types them: durations, sizes, escapes.
//!
//! Pure. Finer than the configuration's units: a benchmark's limits are
//! often microseconds.

use std::time::Duration;

/// Reads `500us`, `2.5ms`, `10s`, `1m`, `1h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: &[(&str, f64)] =
        &[("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let (number, unit) = split(text);
    let scale = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, scale)| *scale);
    match (number.parse::<f64>(), scale) {
        (Ok(number), Some(scale)) if number.is_finite() && number * scale < 1e9 => {
            Ok(Duration::from_secs_f64(number * scale))
        }
        _ => Err("a duration is a number with a unit: 500us, 20ms, 10s, 1m".into()),
    }
}

/// Like `duration`; a bare number means seconds, as with other load generators.
pub fn duration_or_seconds(text: &str) -> Result<Duration, String> {
    if text.parse::<u32>().is_ok() { duration(&format!("{text}s")) } else { duration(text) }
}

/// Reads `512`, `512B`, `64KiB`, `1MiB`.
pub fn size(text: &str) -> Result<usize, String> {
    const UNITS: &[(&str, usize)] =
        &[("", 1), ("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];
    let (number, unit) = split(text);
    let scale = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, scale)| *scale);
    match (number.parse::<usize>(), scale) {
        (Ok(number), Some(scale)) if number > 0 => {
            number.checked_mul(scale).ok_or_else(|| "that is too large".into())
        }
        _ => Err("a size is a whole number of bytes, above zero, or with a unit: 512, 64KiB, 1MiB".into()),
    }
}

/// A count of at least one; `10000`, `10_000` and `10k` are the same.
pub fn count(text: &str) -> Result<u64, String> {
    let plain = text.replace('_', "");
    let (number, unit) = split(&plain);
    let scale = match unit {
        "" => Some(1),
        "k" | "K" => Some(1000),
        "m" | "M" => Some(1_000_000),
        _ => None,
    };
    match (number.parse::<u64>(), scale) {
        (Ok(number), Some(scale)) if number > 0 => {
            number.checked_mul(scale).ok_or_else(|| "that is too large".into())
        }
        _ => Err("a whole number of at least 1 is wanted".into()),
    }
}

/// Bytes with the escapes `\n \r \t \\ \0 \xNN`.
pub fn bytes(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        let escape = &rest[at + 1..];
        let (byte, length) = match escape.chars().next() {
            Some('n') => (b'\n', 1),
            Some('r') => (b'\r', 1),
            Some('t') => (b'\t', 1),
            Some('0') => (0, 1),
            Some('\\') => (b'\\', 1),
            Some('x') => match escape.get(1..3).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => (byte, 3),
                None => return Err("\\x needs two hexadecimal digits".into()),
            },
            _ => return Err("known escapes are \\n \\r \\t \\0 \\\\ and \\xNN".into()),
        };
        out.push(byte);
        rest = &escape[length..];
    }
    out.extend_from_slice(rest.as_bytes());
    Ok(out)
}

/// The number in front, what follows it behind.
fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit_except_where_seconds_are_meant() {
        assert_eq!(duration("500us"), Ok(Duration::from_micros(500)));
        assert_eq!(duration("2.5ms"), Ok(Duration::from_micros(2500)));
        assert_eq!(duration("1m"), Ok(Duration::from_secs(60)));
        assert_eq!(duration_or_seconds("3"), Ok(Duration::from_secs(3)));
        for wrong in ["", "5", "s", "-1s", "5 s", "1e99h", "5sec"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_and_counts_are_whole_and_above_zero() {
        assert_eq!(size("512"), Ok(512));
        assert_eq!(size("64KiB"), Ok(65536));
        assert_eq!(count("10k"), Ok(10_000));
        assert_eq!(count("1_000_000"), Ok(1_000_000));
        for wrong in ["", "0", "-1", "1.5", "5kB", "99999999999999999999"] {
            assert!(size(wrong).is_err() && count(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn escapes_become_their_bytes() {
        assert_eq!(bytes(r"PING\r\n\x00\xff\\"), Ok(b"PING\r\n\x00\xff\\".to_vec()));
        for wrong in [r"\", r"\q", r"\x", r"\x1", r"\xzz"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
