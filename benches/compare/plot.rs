//! The ratios of a run as one drawing: a row for each workload and peer, a bar
//! for the range over the rounds, a mark for the median, a line at "the same".

use std::fmt::Write;

use crate::report::Results;
use crate::workloads::ALL;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 250.0;
const RIGHT: f64 = 90.0;
const ROW: f64 = 22.0;
/// The right end of the scale: the ratio at which a peer is as dear.
const MOST: f64 = 1.5;

/// The drawing; no script, no outside address.
pub fn svg(results: &Results) -> String {
    let mut rows = Vec::new();
    for workload in ALL {
        for peer in workload.ways.iter().filter(|way| !["direct", "nftables", "evenkeel"].contains(way)) {
            if let Some(ratio) = results.ratio(workload.name, "evenkeel", peer, workload.metric) {
                rows.push((workload.name, *peer, ratio));
            }
        }
    }
    let height = 74.0 + ROW * rows.len() as f64;
    let at = |ratio: f64| LEFT + ratio.min(MOST) / MOST * (WIDTH - LEFT - RIGHT);
    let mut text = String::new();
    let _ = write!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\">What evenkeel costs over what a peer costs, in the same round \
         (less is better; bar: range, mark: median)</text>\n"
    );
    for tick in 0..=6 {
        let ratio = f64::from(tick) * 0.25;
        let (x, colour) = (at(ratio), if tick == 4 { "#444" } else { "#ddd" });
        let _ = writeln!(
            text,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"46\" y2=\"{:.1}\" stroke=\"{colour}\"/>\
             <text x=\"{x:.1}\" y=\"40\" text-anchor=\"middle\" fill=\"#555\">{ratio:.2}</text>",
            height - 18.0
        );
    }
    for (index, (workload, peer, ratio)) in rows.iter().enumerate() {
        let y = 62.0 + ROW * index as f64;
        let colour = if ratio.median <= 1.0 { "#1b7f5c" } else { "#b5522b" };
        let (from, to) = (at(ratio.least), at(ratio.most));
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{workload} / {peer}</text>\
             <rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"8\" rx=\"3\" fill=\"{colour}\" opacity=\"0.35\"/>\
             <circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{:.2}</text>",
            LEFT - 10.0,
            y + 4.0,
            y - 4.0,
            (to - from).max(1.0),
            at(ratio.median),
            WIDTH - RIGHT + 12.0,
            y + 4.0,
            ratio.median,
        );
    }
    text + "</svg>\n"
}
