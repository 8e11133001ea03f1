//! Durations and sizes as a person writes them: `"1m30s"`, `"64KiB"`.
//!
//! Whole numbers with a unit, nothing else: no sign, no fraction, no space.
//! A bare number is refused because nobody can see whether 30 means seconds or
//! milliseconds, and `kB` because half of its readers think of 1000 bytes.

use std::time::Duration;

/// Why a text is not a duration or a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Digits alone.
    #[error("a unit is missing")]
    NoUnit,
    /// A unit that is not in the table, or none of its numbers.
    #[error("it is not a whole number with a unit")]
    Malformed,
    /// `"30s1m"`, `"1s1s"`.
    #[error("larger units come first, each once")]
    Order,
    /// More than 64 bits hold.
    #[error("it is too large")]
    TooLarge,
}

/// Units of time in milliseconds, the largest first.
const TIME: &[(&str, u64)] = &[("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Units of size in bytes, the largest first.
const SIZE: &[(&str, u64)] = &[("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Reads `"250ms"`, `"5s"`, `"1m30s"`, `"1h"`, `"7d"`.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    parse(text, TIME).map(Duration::from_millis)
}

/// Reads `"512B"`, `"64KiB"`, `"1MiB"`, `"2GiB"`.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    parse(text, SIZE)
}

/// Writes a duration so that `parse_duration` gives it back, whole
/// milliseconds and up; what is below a millisecond is cut off.
pub fn format_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 { "0s".to_string() } else { format(millis, TIME) }
}

/// Writes a size so that `parse_size` gives it back.
pub fn format_size(bytes: u64) -> String {
    if bytes == 0 { "0B".to_string() } else { format(bytes, SIZE) }
}

fn parse(text: &str, units: &[(&str, u64)]) -> Result<u64, UnitError> {
    let mut rest = text;
    let mut total: u64 = 0;
    let mut smallest = u64::MAX;
    while !rest.is_empty() || smallest == u64::MAX {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let unit_length = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_length);
        if number.is_empty() {
            return Err(UnitError::Malformed);
        }
        if unit.is_empty() {
            return Err(UnitError::NoUnit);
        }
        let (_, scale) = units.iter().find(|(name, _)| *name == unit).ok_or(UnitError::Malformed)?;
        if *scale >= smallest {
            return Err(UnitError::Order);
        }
        smallest = *scale;
        // Only an overflow can fail here: the text is nothing but digits.
        let number: u64 = number.parse().map_err(|_| UnitError::TooLarge)?;
        total = number.checked_mul(*scale).and_then(|n| total.checked_add(n)).ok_or(UnitError::TooLarge)?;
        rest = tail;
    }
    Ok(total)
}

fn format(mut rest: u64, units: &[(&str, u64)]) -> String {
    let mut text = String::new();
    for (name, scale) in units {
        let count = rest / scale;
        if count > 0 {
            text.push_str(&format!("{count}{name}"));
            rest %= scale;
        }
    }
    text
}

/// 1234567 as 1,234,567.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_whole_numbers_with_units() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        assert_eq!(parse_duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1d2h3m4s5ms"), Ok(Duration::from_millis(93_784_005)));
    }

    #[test]
    fn what_is_no_duration_says_why() {
        assert_eq!(parse_duration("30"), Err(UnitError::NoUnit));
        assert_eq!(parse_duration("1m30"), Err(UnitError::NoUnit));
        for text in ["", "s", "-5s", "1.5s", "5 s", " 5s", "5S", "5sec", "٣s", "5s\0"] {
            assert_eq!(parse_duration(text), Err(UnitError::Malformed), "{text:?}");
        }
        assert_eq!(parse_duration("30s1m"), Err(UnitError::Order));
        assert_eq!(parse_duration("1s1s"), Err(UnitError::Order));
        assert_eq!(parse_duration("99999999999999999999s"), Err(UnitError::TooLarge));
        assert_eq!(parse_duration("18446744073709551615d"), Err(UnitError::TooLarge));
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(parse_size("512B"), Ok(512));
        assert_eq!(parse_size("64KiB"), Ok(65_536));
        assert_eq!(parse_size("1MiB512KiB"), Ok(1_572_864));
        assert_eq!(parse_size("64kB"), Err(UnitError::Malformed));
        assert_eq!(parse_size("64"), Err(UnitError::NoUnit));
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(number: u64) {
            prop_assert_eq!(parse_duration(&format_duration(Duration::from_millis(number))), Ok(Duration::from_millis(number)));
            prop_assert_eq!(parse_size(&format_size(number)), Ok(number));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = parse_duration(&text);
            let _ = parse_size(&text);
        }
    }
}
