//! The plots of the report: latency by percentile and over time, the rate, the
//! spread.
//!
//! Pure. Each is left out where its data is missing. Bounded by `BINS`.

use super::super::outcome::{Active, Latency, Outcome, SpreadFound};
use super::super::print::{duration, number, probability};
use super::plot::{Plot, Scale, escape};
use super::put;

/// Points of a plot over time.
const BINS: usize = 120;

/// No bin is shorter than this, in seconds: threads report five times a second.
const SHORTEST_BIN: f64 = 0.25;

/// All that the run has data for.
pub fn all(out: &mut String, outcome: &Outcome) {
    percentiles(out, outcome);
    course(out, outcome);
    if let Some(found) = &outcome.spread {
        slots(out, outcome, found);
    }
}

fn percentiles(out: &mut String, outcome: &Outcome) {
    let Some(latency) = outcome.latency_us.as_ref().filter(|_| !outcome.curve.is_empty()) else {
        return;
    };
    let place = |above: f64| -above.log10();
    let x_top = outcome.curve.iter().map(|(above, _)| place(*above)).fold(1.0, f64::max);
    let least = outcome.curve.first().map_or(1, |(_, nanos)| *nanos) as f64;
    let most = outcome.curve.last().map_or(1, |(_, nanos)| *nanos) as f64;
    let y = if most / least > 12.0 { Scale::log(least, most) } else { Scale::linear(most) };
    let mut plot = Plot::new("Latency by percentile", x_top, y);
    plot.grid(mark_of);
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
    let points: Vec<(f64, f64)> =
        outcome.curve.iter().map(|(above, nanos)| (place(*above), *nanos as f64)).collect();
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
    figure(out, "Latency by percentile", how, plot, "", &latency_table(outcome));
}

fn latency_table(outcome: &Outcome) -> String {
    let mut table = String::new();
    let out = &mut table;
    let late = outcome.open_loop.as_ref().and_then(|open_loop| open_loop.late_us.as_ref());
    out.push_str("<div class=\"scroll\"><table>\n<tr><th></th><th>min</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>max</th><th>mean</th></tr>\n");
    let rows = [
        ("latency", outcome.latency_us.as_ref()),
        ("connect", outcome.connect_us.as_ref()),
        ("own delay", late),
    ];
    for (name, latency) in rows {
        if let Some(Latency { min, p50, p90, p99, p999, max, mean }) = latency {
            put(out, format_args!("<tr><th>{name}</th>"));
            for micros in [min, p50, p90, p99, p999, max] {
                put(out, format_args!("<td>{}</td>", duration(micros * 1000)));
            }
            put(out, format_args!("<td>{}</td></tr>\n", duration((mean * 1000.0) as u64)));
        }
    }
    out.push_str("</table></div>\n");
    table
}

/// A duration at a scale's mark: no digits that say nothing.
fn mark_of(nanos: f64) -> String {
    let text = duration(nanos as u64);
    match text.split_once(' ') {
        Some((number, unit)) if number.contains('.') => {
            format!("{} {unit}", number.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text,
    }
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
            // The scrap before a change of phase has too few exchanges to speak for its bin.
            if shared > 0.0 && length > 0.05 {
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
    let most =
        bins.iter().map(|bin| (bin.requests + bin.errors) / width).fold(wanted.unwrap_or(0.0), f64::max);
    let mut plot = Plot::new("Rate over time", end, Scale::linear(most));
    plot.grid(number);
    plot.x_marks(&seconds_marks(end));
    let rates: Vec<(f64, f64)> =
        bins.iter().enumerate().map(|(index, bin)| (middle(index), bin.requests / width)).collect();
    plot.line("a", &rates, true);
    for (index, bin) in bins.iter().enumerate().filter(|(_, bin)| bin.errors > 0.0) {
        let title = format!("{} errors after {:.1} s", number(bin.errors.ceil()), middle(index));
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
    figure(out, "Rate over time", "", plot, &legend, "");
    latency_over_time(out, outcome, &bins, width);
}

fn latency_over_time(out: &mut String, outcome: &Outcome, bins: &[Bin], width: f64) {
    let series = |pick: fn(&Bin) -> u64| -> Vec<(f64, f64)> {
        let points = bins.iter().enumerate().filter(|(_, bin)| pick(bin) > 0);
        points.map(|(index, bin)| ((index as f64 + 0.5) * width, pick(bin) as f64)).collect()
    };
    let (p50, p99) = (series(|bin| bin.p50), series(|bin| bin.p99));
    let values = || p50.iter().chain(&p99).map(|(_, nanos)| *nanos);
    if p50.len() < 2 {
        return;
    }
    let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    let y = if most / least > 12.0 { Scale::log(least, most) } else { Scale::linear(most) };
    let end = width * bins.len() as f64;
    let mut plot = Plot::new("Latency over time", end, y);
    plot.grid(mark_of);
    plot.x_marks(&seconds_marks(end));
    plot.line("b", &p99, false);
    plot.line("a", &p50, false);
    mark_measured(&mut plot, outcome, end);
    let legend = legend_item("a", "p50") + &legend_item("b", "p99, the worst thread's");
    figure(out, "Latency over time", "", plot, &legend, "");
}

fn seconds_marks(end: f64) -> Vec<(f64, String)> {
    let rough = end / 7.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= rough);
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
    let total = spread.total() as f64;
    let due = |slot: usize| found.due(slot) * total;
    // Three standard deviations of a fair slot's count.
    let slack = |slot: usize| 3.0 * (due(slot) * (1.0 - found.due(slot))).max(0.0).sqrt();
    let most = spread.per_slot.iter().copied().max().unwrap_or(0) as f64;
    let highest = (0..slot_count).map(|slot| due(slot) + slack(slot)).fold(most, f64::max);
    let mut plot = Plot::new("Connections of each slot", slot_count as f64, Scale::linear(highest));
    plot.grid(number);
    plot.x_marks(&slot_marks(found));
    for (slot, count) in spread.per_slot.iter().enumerate() {
        let (at, count) = (slot as f64, *count as f64);
        let (low, high) = ((due(slot) - slack(slot)).max(0.0), due(slot) + slack(slot));
        let unfair = found.verdict == "not chance" && !(low..=high).contains(&count);
        let class = if unfair { "slot bad" } else { "slot" };
        let title = format!("slot {slot}: {} ({:.2} %)", number(count), spread.share(slot) * 100.0);
        plot.band("band", low, high, at + 0.04, at + 0.96);
        plot.bar(class, count, at + 0.18, at + 0.82, &title);
        plot.level("due", due(slot), at + 0.04, at + 0.96);
    }
    let noun = if outcome.mode == "udp" { "Flows" } else { "Connections" };
    let legend = legend_item("a", &noun.to_lowercase())
        + &legend_item("d", "fair share")
        + &legend_item("n", "within chance (three standard deviations)");
    let title = format!("{noun} of each slot");
    figure(out, &title, &found.sentence, plot, &legend, &spread_table(outcome, found));
}

/// Every slot's name and share where there is room for it, else some numbers.
fn slot_marks(found: &SpreadFound) -> Vec<(f64, String)> {
    let slot_count = found.spread.per_slot.len();
    let text = |slot: usize| match slot_count {
        0..=6 => format!("slot {slot}: {:.1} %", found.spread.share(slot) * 100.0),
        _ => slot.to_string(),
    };
    (0..slot_count).step_by(slot_count.div_ceil(22)).map(|slot| (slot as f64 + 0.5, text(slot))).collect()
}

fn spread_table(outcome: &Outcome, found: &SpreadFound) -> String {
    let (spread, mut out) = (&found.spread, String::new());
    let cells = [
        ("max / mean", format!("{:.3}", spread.max_over_mean)),
        ("cv", format!("{:.4}", spread.cv)),
        ("jain", format!("{:.4}", spread.jain)),
        ("chi-square", format!("{:.2}", spread.chi_square)),
        ("p-value", probability(spread.p_value)),
        ("steering", found.steering.clone().unwrap_or("not told".into())),
        ("counted by", found.source.to_string()),
    ];
    out.push_str("<div class=\"scroll\"><table>\n<tr>");
    cells.iter().for_each(|(name, _)| put(&mut out, format_args!("<th>{name}</th>")));
    out.push_str("</tr>\n<tr>");
    cells.iter().for_each(|(_, value)| put(&mut out, format_args!("<td>{}</td>", escape(value))));
    out.push_str("</tr>\n</table></div>\n");
    if let Some(Active { samples, worst_max_over_mean, worst_at_s, .. }) = &outcome.active {
        put(
            &mut out,
            format_args!(
                "<p class=\"how\">Open at once: most uneven after {worst_at_s:.1} s, \
                 max/mean {worst_max_over_mean:.2} ({samples} looks).</p>\n"
            ),
        );
    }
    out
}

/// A plot with its title, a sentence, a legend, and what stands below it.
fn figure(out: &mut String, title: &str, text: &str, plot: Plot, legend: &str, below: &str) {
    put(out, format_args!("<figure class=\"card\">\n<figcaption><h2>{}</h2>", escape(title)));
    if !legend.is_empty() {
        put(out, format_args!("<ul class=\"legend\">{legend}</ul>"));
    }
    out.push_str("</figcaption>\n");
    if !text.is_empty() {
        put(out, format_args!("<p class=\"how\">{}</p>\n", escape(text)));
    }
    put(out, format_args!("{}{below}</figure>\n", plot.finish()));
}

fn legend_item(class: &str, text: &str) -> String {
    format!("<li class=\"{class}\">{}</li>", escape(text))
}
