//! The report: one page that needs nothing from anywhere.
//!
//! Pure: HTML out of an `Outcome`. Style and plots are inline, no script, no
//! outside address; readable in light, dark and on paper. Written as
//! well-formed XML, so that a test can check it.

mod figures;
mod plot;

use std::fmt::Write as _;

use super::outcome::Outcome;
use super::print::{bytes, duration, number};
use plot::escape;

const STYLE: &str = include_str!("style.css");

/// The whole page.
pub fn page(outcome: &Outcome) -> String {
    let mut out = String::new();
    let title = escape(&format!("{} {} {}", outcome.mode, outcome.pattern, outcome.target));
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
    figures::all(&mut out, outcome);
    errors(&mut out, outcome);
    facts(&mut out, outcome);
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn put(out: &mut String, text: std::fmt::Arguments) {
    out.write_fmt(text).expect("writing to a string");
}

fn header(out: &mut String, outcome: &Outcome, title: &str) {
    let (class, word) = if outcome.passed { ("good", "passed") } else { ("bad", "failed") };
    let loop_kind = match &outcome.open_loop {
        Some(open_loop) => format!("open loop, {} starts a second wanted", number(open_loop.wanted_per_s)),
        None => "closed loop".into(),
    };
    put(
        out,
        format_args!(
            "<header>\n<p class=\"brand\">evenkeel bench</p>\n<h1>{title} <span class=\"badge {class}\">{word}</span></h1>\n<p class=\"lead\">{:.1} s, {} at once, {}, {loop_kind}</p>\n</header>\n",
            outcome.seconds,
            number(outcome.concurrency as f64),
            if outcome.threads == 1 { "1 thread".into() } else { format!("{} threads", outcome.threads) },
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
        tile(out, "", &duration(latency.p99 * 1000), "p99", &format!("max {}", duration(latency.max * 1000)));
    } else {
        tile(out, "", &format!("{}/s", bytes(rate.bytes_per_s)), "bytes", &bytes(outcome.bytes as f64));
    }
    if let Some(found) = &outcome.spread {
        let class = if found.verdict == "not chance" { "bad" } else { "" };
        tile(
            out,
            class,
            &format!("{:.3}", found.spread.max_over_mean),
            "spread",
            &format!("max/mean: {}", found.verdict),
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
    tile(out, class, &number(error_count as f64), "errors", &format!("{of_all:.3} %"));
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
            put(out, format_args!("<p class=\"remark {class}\">{}</p>\n", escape(text)));
        }
    }
}

fn errors(out: &mut String, outcome: &Outcome) {
    let Some(first) = &outcome.first_error else { return };
    out.push_str("<section class=\"card\">\n<h2>Errors</h2>\n<table>\n");
    for (kind, count) in &outcome.errors {
        put(out, format_args!("<tr><th>{kind}</th><td>{}</td></tr>\n", number(*count as f64)));
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
    let command = outcome.command.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
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
