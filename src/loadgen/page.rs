//! The report: one page that needs nothing from anywhere.
//!
//! Pure: HTML out of an `Outcome`. Style and plots are inline, no script, no
//! outside address; readable in light, dark and on paper. Written as
//! well-formed XML, so that a test can check it.

use std::fmt::Write as _;

use super::outcome::{Latency, Outcome, SpreadFound};
use super::plot::{Plot, Scale, escape};
use super::print::{bytes, duration, number};

/// Points of a plot over time.
const BINS: usize = 120;

/// No bin is shorter than this, in seconds: threads report five times a second.
const SHORTEST_BIN: f64 = 0.25;

const STYLE: &str = include_str!("page.css");

/// The whole page.
pub fn page(outcome: &Outcome) -> String {
    let mut out = String::new();
    let title = escape(&format!(
        "{} {} {}",
        outcome.mode, outcome.pattern, outcome.target
    ));
    out.push_str("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    out.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n");
    out.push_str("<meta name=\"color-scheme\" content=\"light dark\"/>\n");
    put(
        &mut out,
        format_args!(
            "<title>evenkeel bench: {title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        ),
    );
    header(&mut out, outcome, &title);
    tiles(&mut out, outcome);
    remarks(&mut out, outcome);
    percentiles(&mut out, outcome);
    course(&mut out, outcome);
    if let Some(found) = &outcome.spread {
        slots(&mut out, outcome, found);
    }
    errors(&mut out, outcome);
    facts(&mut out, outcome);
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn put(out: &mut String, text: std::fmt::Arguments) {
    out.write_fmt(text).expect("writing to a string");
}

fn header(out: &mut String, outcome: &Outcome, title: &str) {
    let (class, word) = if outcome.passed {
        ("good", "passed")
    } else {
        ("bad", "failed")
    };
    let loop_kind = match &outcome.open_loop {
        Some(open_loop) => format!(
            "open loop, {} starts a second wanted",
            number(open_loop.wanted_per_s)
        ),
        None => "closed loop".into(),
    };
    put(
        out,
        format_args!(
            "<header>\n<p class=\"brand\">evenkeel bench</p>\n<h1>{title} <span class=\"badge {class}\">{word}</span></h1>\n<p class=\"lead\">{:.1} s, {} at once, {}, {loop_kind}</p>\n</header>\n",
            outcome.seconds,
            number(outcome.concurrency as f64),
            if outcome.threads == 1 {
                "1 thread".into()
            } else {
                format!("{} threads", outcome.threads)
            },
        ),
    );
}

fn tiles(out: &mut String, outcome: &Outcome) {
    out.push_str("<section class=\"tiles\">\n");
    let rate = &outcome.rate;
    tile(
        out,
        "",
        &number(rate.requests_per_s),
        "exchanges / s",
        &format!("{} in all", number(outcome.requests as f64)),
    );
    if let Some(latency) = &outcome.latency_us {
        tile(
            out,
            "",
            &duration(latency.p50 * 1000),
            "median",
            &format!("p90 {}", duration(latency.p90 * 1000)),
        );
        tile(
            out,
            "",
            &duration(latency.p99 * 1000),
            "p99",
            &format!("max {}", duration(latency.max * 1000)),
        );
    } else {
        tile(
            out,
            "",
            &format!("{}/s", bytes(rate.bytes_per_s)),
            "bytes",
            &bytes(outcome.bytes as f64),
        );
    }
    if let Some(found) = &outcome.spread {
        let class = if found.verdict == "not chance" { "bad" } else { "" };
        tile(
            out,
            class,
            &format!("{:.3}", found.spread.max_over_mean),
            "spread, max / mean",
            found.verdict,
        );
    } else {
        tile(
            out,
            "",
            &number(outcome.connections as f64),
            "connections",
            &format!("{}/s", number(rate.connections_per_s)),
        );
    }
    let error_count = outcome.error_count();
    let class = if error_count == 0 { "good" } else { "bad" };
    let of_all = error_count as f64 / (error_count + outcome.requests).max(1) as f64 * 100.0;
    tile(
        out,
        class,
        &number(error_count as f64),
        "errors",
        &format!("{of_all:.3} %"),
    );
    out.push_str("</section>\n");
}

fn tile(out: &mut String, class: &str, value: &str, name: &str, more: &str) {
    put(
        out,
        format_args!(
            "<div class=\"tile {class}\"><span class=\"name\">{}</span><strong>{}</strong><small>{}</small></div>\n",
            escape(name),
            escape(value),
            escape(more)
        ),
    );
}

fn remarks(out: &mut String, outcome: &Outcome) {
    let lines = [
        ("bad", outcome.failures.iter().collect::<Vec<_>>()),
        ("warn", outcome.bottleneck.iter().chain(&outcome.notes).collect()),
    ];
    for (class, texts) in lines {
        for text in texts {
            put(
                out,
                format_args!("<p class=\"remark {class}\">{}</p>\n", escape(text)),
            );
        }
    }
}

fn percentiles(out: &mut String, outcome: &Outcome) {
    let Some(latency) = outcome.latency_us.as_ref().filter(|_| !outcome.curve.is_empty()) else {
        return;
    };
    let place = |above: f64| -above.log10();
    let x_top = outcome
        .curve
        .iter()
        .map(|(above, _)| place(*above))
        .fold(1.0, f64::max);
    let least = outcome.curve.first().map_or(1, |(_, nanos)| *nanos) as f64;
    let most = outcome.curve.last().map_or(1, |(_, nanos)| *nanos) as f64;
    let y = if most / least > 12.0 {
        Scale::log(least, most)
    } else {
        Scale::linear(most)
    };
    let mut plot = Plot::new("Latency by percentile", x_top, y);
    plot.grid(|nanos| duration(nanos as u64));
    let marks = [
        (1.0, "0 %"),
        (0.5, "50 %"),
        (0.1, "90 %"),
        (0.01, "99 %"),
        (1e-3, "99.9 %"),
        (1e-4, "99.99 %"),
        (1e-5, "99.999 %"),
        (1e-6, "99.9999 %"),
    ];
    let marks: Vec<(f64, String)> = marks
        .iter()
        .map(|(above, text)| (place(*above), text.to_string()))
        .filter(|(at, _)| *at <= x_top)
        .collect();
    plot.x_marks(&marks);
    let points: Vec<(f64, f64)> = outcome
        .curve
        .iter()
        .map(|(above, nanos)| (place(*above), *nanos as f64))
        .collect();
    plot.line("a", &points, true);
    for (above, micros, name) in [
        (0.5, latency.p50, "p50"),
        (0.1, latency.p90, "p90"),
        (0.01, latency.p99, "p99"),
        (1e-3, latency.p999, "p99.9"),
    ] {
        if place(above) <= x_top {
            let text = format!("{name} {}", duration(micros * 1000));
            plot.point("dot a", place(above), (micros * 1000) as f64, &text, &text);
        }
    }
    let how = if outcome.open_loop.is_some() {
        "From the intended start of each exchange, so that a target that stalls is charged for all that had to wait."
    } else if outcome.pattern == "connect" {
        "From the connect to the last byte of the answer. A closed loop: a stalled target is also asked less."
    } else {
        "From the first byte sent to the last byte of the answer. A closed loop: a stalled target is also asked less."
    };
    figure(out, "Latency by percentile", how, plot, "");
    latency_table(out, outcome);
}

fn latency_table(out: &mut String, outcome: &Outcome) {
    let late = outcome
        .open_loop
        .as_ref()
        .and_then(|open_loop| open_loop.late_us.as_ref());
    out.push_str("<div class=\"scroll\"><table>\n<tr><th></th><th>min</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>max</th><th>mean</th></tr>\n");
    let rows = [
        ("latency", outcome.latency_us.as_ref()),
        ("connect", outcome.connect_us.as_ref()),
        ("own delay", late),
    ];
    for (name, latency) in rows {
        if let Some(Latency {
            min,
            p50,
            p90,
            p99,
            p999,
            max,
            mean,
        }) = latency
        {
            put(out, format_args!("<tr><th>{name}</th>"));
            for micros in [min, p50, p90, p99, p999, max] {
                put(out, format_args!("<td>{}</td>", duration(micros * 1000)));
            }
            put(
                out,
                format_args!("<td>{}</td></tr>\n", duration((mean * 1000.0) as u64)),
            );
        }
    }
    out.push_str("</table></div>\n");
}

/// One moment of the plots over time.
#[derive(Clone, Copy, Debug, Default)]
struct Bin {
    requests: f64,
    errors: f64,
    p50: u64,
    p99: u64,
}

/// The pieces of all threads, cut into bins of equal length.
fn bins(outcome: &Outcome) -> (f64, Vec<Bin>) {
    let end = outcome
        .course
        .iter()
        .filter(|piece| piece.requests + piece.errors > 0)
        .map(|piece| piece.to)
        .fold(0.0, f64::max);
    let end = end.max(outcome.measured.1).max(1e-3);
    let count = ((end / SHORTEST_BIN).floor() as usize).clamp(1, BINS);
    let width = end / count as f64;
    let mut bins = vec![Bin::default(); count];
    for piece in &outcome.course {
        let length = (piece.to - piece.from).max(1e-9);
        let first = ((piece.from / width) as usize).min(count - 1);
        let last = ((piece.to / width) as usize).min(count - 1);
        for (index, bin) in bins.iter_mut().enumerate().take(last + 1).skip(first) {
            let (left, right) = (index as f64 * width, (index + 1) as f64 * width);
            let shared = ((piece.to.min(right) - piece.from.max(left)) / length).clamp(0.0, 1.0);
            bin.requests += piece.requests as f64 * shared;
            bin.errors += piece.errors as f64 * shared;
            if shared > 0.0 {
                bin.p50 = bin.p50.max(piece.p50);
                bin.p99 = bin.p99.max(piece.p99);
            }
        }
    }
    (width, bins)
}

fn course(out: &mut String, outcome: &Outcome) {
    let (width, bins) = bins(outcome);
    if bins.len() < 2 {
        return;
    }
    let end = width * bins.len() as f64;
    let middle = |index: usize| (index as f64 + 0.5) * width;
    let wanted = outcome.open_loop.as_ref().map(|open_loop| open_loop.wanted_per_s);
    let most = bins
        .iter()
        .map(|bin| (bin.requests + bin.errors) / width)
        .fold(wanted.unwrap_or(0.0), f64::max);
    let mut plot = Plot::new("Rate over time", end, Scale::linear(most));
    plot.grid(number);
    plot.x_marks(&seconds_marks(end));
    let rates: Vec<(f64, f64)> = bins
        .iter()
        .enumerate()
        .map(|(index, bin)| (middle(index), bin.requests / width))
        .collect();
    plot.line("a", &rates, true);
    for (index, bin) in bins.iter().enumerate().filter(|(_, bin)| bin.errors > 0.0) {
        let title = format!(
            "{} errors after {:.1} s",
            number(bin.errors.ceil()),
            middle(index)
        );
        plot.bar(
            "error",
            (bin.errors / width).max(most * 0.02),
            index as f64 * width,
            (index as f64 + 0.8) * width,
            &title,
        );
    }
    if let Some(wanted) = wanted {
        plot.level("wanted", wanted, 0.0, end);
    }
    mark_measured(&mut plot, outcome, end);
    let mut legend = legend_item("a", "exchanges / s");
    if wanted.is_some() {
        legend.push_str(&legend_item("w", "wanted"));
    }
    if outcome.error_count() > 0 {
        legend.push_str(&legend_item("e", "errors / s"));
    }
    figure(out, "Rate over time", "", plot, &legend);
    latency_over_time(out, outcome, &bins, width);
}

fn latency_over_time(out: &mut String, outcome: &Outcome, bins: &[Bin], width: f64) {
    let series = |pick: fn(&Bin) -> u64| -> Vec<(f64, f64)> {
        let points = bins.iter().enumerate().filter(|(_, bin)| pick(bin) > 0);
        points
            .map(|(index, bin)| ((index as f64 + 0.5) * width, pick(bin) as f64))
            .collect()
    };
    let (p50, p99) = (series(|bin| bin.p50), series(|bin| bin.p99));
    let values = || p50.iter().chain(&p99).map(|(_, nanos)| *nanos);
    if p50.len() < 2 {
        return;
    }
    let (least, most) = (
        values().fold(f64::INFINITY, f64::min),
        values().fold(0.0, f64::max),
    );
    let y = if most / least > 12.0 {
        Scale::log(least, most)
    } else {
        Scale::linear(most)
    };
    let end = width * bins.len() as f64;
    let mut plot = Plot::new("Latency over time", end, y);
    plot.grid(|nanos| duration(nanos as u64));
    plot.x_marks(&seconds_marks(end));
    plot.line("b", &p99, false);
    plot.line("a", &p50, false);
    mark_measured(&mut plot, outcome, end);
    let legend = legend_item("a", "p50") + &legend_item("b", "p99, the worst thread's");
    figure(out, "Latency over time", "", plot, &legend);
}

fn seconds_marks(end: f64) -> Vec<(f64, String)> {
    let rough = end / 7.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let digits = usize::from(step < 1.0);
    (0..=(end / step) as u32)
        .map(|index| f64::from(index) * step)
        .map(|at| (at, format!("{at:.digits$} s")))
        .collect()
}

fn mark_measured(plot: &mut Plot, outcome: &Outcome, end: f64) {
    if outcome.measured.0 > 0.0 {
        plot.upright(outcome.measured.0, "measured from here");
    }
    if end - outcome.measured.1 > 0.3 {
        plot.upright(outcome.measured.1, "nothing new from here");
    }
}

fn slots(out: &mut String, outcome: &Outcome, found: &SpreadFound) {
    let (spread, slot_count) = (&found.spread, found.spread.per_slot.len());
    let (total, most) = (
        spread.total() as f64,
        spread.per_slot.iter().copied().max().unwrap_or(0) as f64,
    );
    let due = |slot: usize| found.due(slot) * total;
    // Three standard deviations of a fair slot's count.
    let slack = |slot: usize| 3.0 * (due(slot) * (1.0 - found.due(slot))).max(0.0).sqrt();
    let highest = (0..slot_count)
        .map(|slot| due(slot) + slack(slot))
        .fold(most * 1.08, f64::max);
    let mut plot = Plot::new(
        "Connections of each slot",
        slot_count as f64,
        Scale::linear(highest),
    );
    plot.grid(number);
    let every = slot_count.div_ceil(20);
    let marks: Vec<(f64, String)> = (0..slot_count)
        .step_by(every)
        .map(|slot| {
            (
                slot as f64 + 0.5,
                if slot_count <= 10 {
                    format!("slot {slot}")
                } else {
                    slot.to_string()
                },
            )
        })
        .collect();
    plot.x_marks(&marks);
    for (slot, count) in spread.per_slot.iter().enumerate() {
        let at = slot as f64;
        let (low, high) = ((due(slot) - slack(slot)).max(0.0), due(slot) + slack(slot));
        let outside = *count as f64 > high || (*count as f64) < low;
        let class = if outside && found.verdict == "not chance" {
            "slot bad"
        } else {
            "slot"
        };
        let title = format!(
            "slot {slot}: {} ({:.2} %)",
            number(*count as f64),
            spread.share(slot) * 100.0
        );
        plot.band("band", low, high, at + 0.04, at + 0.96);
        plot.bar(class, *count as f64, at + 0.18, at + 0.82, &title);
        plot.level("due", due(slot), at + 0.04, at + 0.96);
    }
    if slot_count <= 10 {
        for (slot, count) in spread.per_slot.iter().enumerate() {
            plot.word_above(
                slot as f64 + 0.5,
                *count as f64,
                &format!("{:.1} %", spread.share(slot) * 100.0),
            );
        }
    }
    let noun = if outcome.mode == "udp" {
        "Flows"
    } else {
        "Connections"
    };
    let legend = legend_item("a", &noun.to_lowercase())
        + &legend_item("d", "fair share")
        + &legend_item("n", "within chance (three standard deviations)");
    figure(
        out,
        &format!("{noun} of each slot"),
        &found.sentence,
        plot,
        &legend,
    );
    let steering = found.steering.as_deref().unwrap_or("not told");
    put(
        out,
        format_args!(
            "<div class=\"scroll\"><table>\n<tr><th>max / mean</th><th>cv</th><th>jain</th><th>chi-square</th><th>p-value</th><th>steering</th><th>counted by</th></tr>\n<tr><td>{:.3}</td><td>{:.4}</td><td>{:.4}</td><td>{:.2}</td><td>{:.4}</td><td>{}</td><td>{}</td></tr>\n</table></div>\n",
            spread.max_over_mean,
            spread.cv,
            spread.jain,
            spread.chi_square,
            spread.p_value,
            escape(steering),
            found.source
        ),
    );
    if let Some(active) = &outcome.active {
        put(
            out,
            format_args!(
                "<p class=\"how\">Open at once: most uneven after {:.1} s, max/mean {:.2} ({} looks).</p>\n",
                active.worst_at_s, active.worst_max_over_mean, active.samples
            ),
        );
    }
}

fn errors(out: &mut String, outcome: &Outcome) {
    let Some(first) = &outcome.first_error else { return };
    out.push_str("<section class=\"card\">\n<h2>Errors</h2>\n<table>\n");
    for (kind, count) in &outcome.errors {
        put(
            out,
            format_args!("<tr><th>{kind}</th><td>{}</td></tr>\n", number(*count as f64)),
        );
    }
    put(
        out,
        format_args!(
            "</table>\n<p class=\"how\">The first, after {:.3} s: {}: {}</p>\n</section>\n",
            first.at_s,
            first.kind,
            escape(&first.text)
        ),
    );
}

fn facts(out: &mut String, outcome: &Outcome) {
    let machine = &outcome.machine;
    let command = outcome
        .command
        .iter()
        .map(|word| quote(word))
        .collect::<Vec<_>>()
        .join(" ");
    put(
        out,
        format_args!(
            "<section class=\"card\">\n<h2>How it was made</h2>\n<pre>{}</pre>\n<dl>\n",
            escape(&command)
        ),
    );
    let facts = [
        (
            "Load generator",
            format!(
                "evenkeel {}, busiest thread at {:.0} % of a CPU",
                machine.version,
                outcome.busiest_thread * 100.0
            ),
        ),
        (
            "Its machine",
            format!(
                "{}{}, {}",
                machine.cpu,
                if machine.cpu.is_empty() { "" } else { "," }.to_owned() + &format!(" {} CPUs", machine.cpus),
                bytes(machine.memory_bytes as f64)
            ),
        ),
        ("Kernel", machine.kernel.clone()),
        (
            "Bytes",
            format!(
                "{} sent, {} received",
                bytes(outcome.bytes_sent as f64),
                bytes(outcome.bytes_received as f64)
            ),
        ),
        (
            "Connections",
            format!(
                "{} made, {}/s",
                number(outcome.connections as f64),
                number(outcome.rate.connections_per_s)
            ),
        ),
    ];
    for (name, text) in facts {
        put(out, format_args!("<dt>{name}</dt><dd>{}</dd>\n", escape(&text)));
    }
    out.push_str("</dl>\n</section>\n");
}

/// A word as a shell would take it.
fn quote(word: &str) -> String {
    let plain = |char: char| char.is_ascii_alphanumeric() || "-_./:=,@%+[]".contains(char);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn figure(out: &mut String, title: &str, text: &str, plot: Plot, legend: &str) {
    put(
        out,
        format_args!("<figure class=\"card\">\n<figcaption><h2>{}</h2>", escape(title)),
    );
    if !legend.is_empty() {
        put(out, format_args!("<ul class=\"legend\">{legend}</ul>"));
    }
    out.push_str("</figcaption>\n");
    if !text.is_empty() {
        put(out, format_args!("<p class=\"how\">{}</p>\n", escape(text)));
    }
    put(out, format_args!("{}</figure>\n", plot.finish()));
}

fn legend_item(class: &str, text: &str) -> String {
    format!("<li class=\"{class}\">{}</li>", escape(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_as_a_shell_wants_them() {
        assert_eq!(quote("127.0.0.1:80"), "127.0.0.1:80");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }
}
