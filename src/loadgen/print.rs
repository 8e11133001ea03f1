//! The result for a person at a terminal: a table and a bar for each slot.
//!
//! Pure: text out of an `Outcome`.

use std::fmt::Write as _;

use super::outcome::{Latency, Outcome};
use crate::units::grouped;

/// Characters of the longest bar.
const BAR: usize = 40;

/// The whole text.
pub fn table(outcome: &Outcome) -> String {
    let mut out = String::new();
    head(&mut out, outcome);
    counts(&mut out, outcome);
    latencies(&mut out, outcome);
    errors(&mut out, outcome);
    slots(&mut out, outcome);
    remarks(&mut out, outcome);
    out
}

fn head(out: &mut String, outcome: &Outcome) {
    let loop_kind = match &outcome.open_loop {
        Some(open_loop) => format!("open loop, {}/s wanted", number(open_loop.wanted_per_s)),
        None => "closed loop".to_string(),
    };
    line(
        out,
        &format!(
            "{} {} {}: {:.1} s, {} at once, {}, {loop_kind}",
            outcome.mode,
            outcome.pattern,
            outcome.target,
            outcome.seconds,
            number(outcome.concurrency as f64),
            plural(outcome.threads, "thread")
        ),
    );
}

fn counts(out: &mut String, outcome: &Outcome) {
    let rate = &outcome.rate;
    line(out, "");
    line(out, &row("connections", outcome.connections as f64, rate.connections_per_s));
    line(out, &row("exchanges", outcome.requests as f64, rate.requests_per_s));
    line(
        out,
        &format!("  {:<12} {:>12}   {:>12}/s", "bytes", bytes(outcome.bytes as f64), bytes(rate.bytes_per_s)),
    );
    line(out, &format!("  {:<12} {:>12}", "errors", number(outcome.error_count() as f64)));
}

fn row(name: &str, count: f64, rate: f64) -> String {
    format!("  {name:<12} {:>12}   {:>12}/s", number(count), number(rate))
}

fn latencies(out: &mut String, outcome: &Outcome) {
    let late = outcome.open_loop.as_ref().and_then(|open_loop| open_loop.late_us.as_ref());
    let rows = [("latency", &outcome.latency_us), ("connect", &outcome.connect_us)];
    if outcome.latency_us.is_none() && outcome.connect_us.is_none() {
        return;
    }
    line(out, "");
    line(
        out,
        &format!(
            "  {:<12} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "", "min", "p50", "p90", "p99", "p99.9", "max"
        ),
    );
    for (name, latency) in rows {
        if let Some(latency) = latency {
            line(out, &latency_row(name, latency));
        }
    }
    if let Some(late) = late {
        line(out, &latency_row("own delay", late));
    }
}

fn latency_row(name: &str, latency: &Latency) -> String {
    let Latency { min, p50, p90, p99, p999, max, .. } = latency;
    let cells: Vec<String> = [min, p50, p90, p99, p999, max]
        .iter()
        .map(|micros| format!("{:>9}", duration(**micros * 1000)))
        .collect();
    format!("  {name:<12} {}", cells.join(" "))
}

fn errors(out: &mut String, outcome: &Outcome) {
    if outcome.errors.is_empty() {
        return;
    }
    line(out, "");
    for (kind, count) in &outcome.errors {
        line(out, &format!("  {kind:<18} {:>10}", number(*count as f64)));
    }
    if let Some(first) = &outcome.first_error {
        line(out, &format!("  the first, after {:.3} s: {}: {}", first.at_s, first.kind, first.text));
    }
}

fn slots(out: &mut String, outcome: &Outcome) {
    let Some(found) = &outcome.spread else { return };
    let spread = &found.spread;
    line(out, "");
    let steering = found.steering.as_ref().map_or(String::new(), |steering| format!(", steering {steering}"));
    line(out, &format!("  spread of listener {} (from {}{steering})", found.listener, found.source));
    let most = spread.per_slot.iter().copied().max().unwrap_or(0).max(1);
    for (slot, count) in spread.per_slot.iter().enumerate() {
        let filled = (*count as f64 / most as f64 * BAR as f64).round() as usize;
        let share = spread.share(slot) * 100.0;
        line(
            out,
            &format!(
                "  slot {slot:<3} {:>12}  {share:>5.1} %  {}",
                number(*count as f64),
                "█".repeat(filled)
            ),
        );
    }
    line(
        out,
        &format!(
            "  max/mean {:.3}  cv {:.3}  jain {:.4}  chi-square {:.2}  p {}",
            spread.max_over_mean,
            spread.cv,
            spread.jain,
            spread.chi_square,
            probability(spread.p_value)
        ),
    );
    line(out, &format!("  {}", found.sentence));
    if let Some(active) = &outcome.active {
        line(
            out,
            &format!(
                "  open at once: most uneven after {:.1} s, max/mean {:.2} ({:?})",
                active.worst_at_s, active.worst_max_over_mean, active.worst_per_slot
            ),
        );
    }
}

fn remarks(out: &mut String, outcome: &Outcome) {
    let bottleneck = outcome.bottleneck.iter().map(|text| format!("  note: {text}"));
    let notes = outcome.notes.iter().map(|text| format!("  note: {text}"));
    let failures = outcome.failures.iter().map(|text| format!("  failed: {text}"));
    let lines: Vec<String> = bottleneck.chain(notes).chain(failures).collect();
    if !lines.is_empty() {
        line(out, "");
        lines.iter().for_each(|text| line(out, text));
    }
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{text}").expect("writing to a string");
}

fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// A count or a rate with its thousands apart; small ones with a digit more.
pub fn number(value: f64) -> String {
    if value < 100.0 && value.fract() > 0.005 {
        return format!("{value:.1}");
    }
    grouped(value.round_ties_even() as u64)
}

/// Nanoseconds with three digits and the unit that suits them.
pub fn duration(nanos: u64) -> String {
    let (value, unit) = match nanos {
        0..1_000_000 => (nanos as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => (nanos as f64 / 1e6, "ms"),
        _ => (nanos as f64 / 1e9, "s"),
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    let digits = if unit == "µs" { 0 } else { digits };
    format!("{value:.digits$} {unit}")
}

/// A p-value, as small as it means anything.
pub fn probability(p_value: f64) -> String {
    if p_value < 0.001 { "< 0.001".into() } else { format!("{p_value:.3}") }
}

/// Bytes with a binary unit.
pub fn bytes(value: f64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (value.max(1.0).log2() / 10.0).floor().clamp(0.0, 4.0) as usize;
    let digits = usize::from(step > 0);
    format!("{:.digits$} {}", value / 1024f64.powi(step as i32), UNITS[step])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_easy_on_the_eye() {
        assert_eq!(number(1_234_567.4), "1,234,567");
        assert_eq!(number(999.0), "999");
        assert_eq!(number(3.25), "3.2");
        assert_eq!(duration(31_400), "31 µs");
        assert_eq!(duration(2_345_000), "2.35 ms");
        assert_eq!(duration(1_500_000_000), "1.50 s");
        assert_eq!(bytes(512.0), "512 B");
        assert_eq!(bytes(1536.0 * 1024.0), "1.5 MiB");
    }
}
