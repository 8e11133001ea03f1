//! What `top` shows, as tables of cells: pure, from one status and the one
//! before it.

use std::cmp::Ordering;
use std::time::Duration;

use crate::control::status::{Listener, Server, Status};

/// One part of the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pane {
    Listeners,
    Workers,
    Servers,
}

/// A table: what it is called, its columns, its rows.
#[derive(Debug, Default)]
pub struct Table {
    pub columns: &'static [Column],
    pub rows: Vec<Vec<Cell>>,
}

/// A column's title and how wide it is.
#[derive(Debug)]
pub struct Column {
    pub title: &'static str,
    pub width: u16,
    /// It takes what room is left.
    pub grows: bool,
    /// Numbers stand at the right.
    pub right: bool,
}

/// One cell.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Text(String),
    /// A word that says whether all is well.
    State(String),
    Count(u64),
    /// A second.
    Rate(Option<f64>),
    /// Bytes a second.
    ByteRate(Option<f64>),
    Ratio(f64),
    Micros(u64),
    /// One bar a slot, as parts of the largest.
    Bars(Vec<u64>),
}

const fn number(title: &'static str, width: u16) -> Column {
    Column { title, width, grows: false, right: true }
}

const fn word(title: &'static str, width: u16) -> Column {
    Column { title, width, grows: false, right: false }
}

const fn wide(title: &'static str, width: u16) -> Column {
    Column { title, width, grows: true, right: false }
}

const LISTENERS: &[Column] = &[
    wide("LISTENER", 14),
    word("MODE", 4),
    number("NEW/s", 8),
    number("ACTIVE", 8),
    number("TOTAL", 9),
    number("IN/s", 9),
    number("OUT/s", 9),
    number("QUEUE", 6),
    number("DROPS", 8),
    number("MAX/MEAN", 9),
    word("SLOTS", 16),
];

const WORKERS: &[Column] = &[
    number("SLOT", 4),
    number("PID", 8),
    wide("STATE", 9),
    number("NEW/s", 8),
    number("ACTIVE", 8),
    number("TOTAL", 9),
    number("RESTARTS", 9),
    number("LAG", 9),
    number("PAUSES", 7),
];

const SERVERS: &[Column] = &[
    wide("SERVER", 24),
    word("UPSTREAM", 12),
    word("STATE", 9),
    number("WEIGHT", 6),
    number("NEW/s", 8),
    number("ACTIVE", 8),
    number("TOTAL", 9),
    number("FAILURES", 9),
];

impl Pane {
    pub const ALL: [Pane; 3] = [Pane::Listeners, Pane::Workers, Pane::Servers];

    pub fn title(self) -> &'static str {
        match self {
            Pane::Listeners => "Listeners",
            Pane::Workers => "Workers",
            Pane::Servers => "Servers",
        }
    }

    pub fn next(self) -> Pane {
        Pane::ALL[(self as usize + 1) % Pane::ALL.len()]
    }

    pub fn columns(self) -> &'static [Column] {
        match self {
            Pane::Listeners => LISTENERS,
            Pane::Workers => WORKERS,
            Pane::Servers => SERVERS,
        }
    }

    /// The next column to sort by; after the last one the daemon's own order.
    pub fn column_after(self, sort: Option<usize>) -> Option<usize> {
        let next = sort.map_or(0, |column| column + 1);
        (next < self.columns().len()).then_some(next)
    }

    pub fn column_before(self, sort: Option<usize>) -> Option<usize> {
        match sort {
            None => Some(self.columns().len() - 1),
            Some(0) => None,
            Some(column) => Some(column - 1),
        }
    }
}

/// What a pane shows of this status; `older` is an earlier one and how long
/// before it was.
pub fn table(pane: Pane, status: &Status, older: Option<(&Status, Duration)>) -> Table {
    let rows = match pane {
        Pane::Listeners => listeners(status, older),
        Pane::Workers => workers(status, older),
        Pane::Servers => servers(status, older),
    };
    Table { columns: pane.columns(), rows }
}

fn listeners(status: &Status, older: Option<(&Status, Duration)>) -> Vec<Vec<Cell>> {
    let row = |listener: &Listener| {
        let before = older.and_then(|(older, apart)| {
            Some((older.listeners.iter().find(|other| other.name == listener.name)?, apart))
        });
        let rate = |count: fn(&Listener) -> u64| {
            before.and_then(|(before, apart)| rate(count(listener), count(before), apart))
        };
        vec![
            Cell::Text(listener.name.clone()),
            Cell::Text(listener.mode.clone()),
            Cell::Rate(rate(|l| l.connections)),
            Cell::Count(listener.active),
            Cell::Count(listener.connections),
            Cell::ByteRate(rate(|l| l.bytes_in)),
            Cell::ByteRate(rate(|l| l.bytes_out)),
            Cell::Count(listener.accept_queue),
            Cell::Count(listener.dropped.values().sum()),
            Cell::Ratio(listener.spread.max_over_mean),
            Cell::Bars(listener.spread.per_slot.clone()),
        ]
    };
    status.listeners.iter().map(row).collect()
}

fn workers(status: &Status, older: Option<(&Status, Duration)>) -> Vec<Vec<Cell>> {
    let rows = status.workers.iter().map(|worker| {
        let before = older.and_then(|(older, apart)| {
            Some((older.workers.iter().find(|other| other.slot == worker.slot)?, apart))
        });
        vec![
            Cell::Count(worker.slot as u64),
            Cell::Count(u64::from(worker.pid)),
            Cell::State(worker.state.clone()),
            Cell::Rate(before.and_then(|(before, apart)| rate(worker.accepted, before.accepted, apart))),
            Cell::Count(worker.active),
            Cell::Count(worker.accepted),
            Cell::Count(worker.restarts),
            Cell::Micros(worker.loop_lag_us),
            Cell::Count(worker.accept_pauses),
        ]
    });
    rows.collect()
}

fn servers(status: &Status, older: Option<(&Status, Duration)>) -> Vec<Vec<Cell>> {
    let mut rows = Vec::new();
    for upstream in &status.upstreams {
        let before = older.and_then(|(older, apart)| {
            Some((older.upstreams.iter().find(|other| other.name == upstream.name)?, apart))
        });
        for server in &upstream.servers {
            let before = before.and_then(|(before, apart)| {
                Some((before.servers.iter().find(|other| other.address == server.address)?, apart))
            });
            let rate = before.and_then(|(before, apart): (&Server, _)| {
                rate(server.connections, before.connections, apart)
            });
            rows.push(vec![
                Cell::Text(server.address.clone()),
                Cell::Text(upstream.name.clone()),
                Cell::State(server.state.clone()),
                Cell::Count(u64::from(server.weight)),
                Cell::Rate(rate),
                Cell::Count(server.active),
                Cell::Count(server.connections),
                Cell::Count(server.failures),
            ]);
        }
    }
    rows
}

/// Unknown where the count went back: it is of another life.
fn rate(now: u64, before: u64, apart: Duration) -> Option<f64> {
    let seconds = apart.as_secs_f64();
    let more = now.checked_sub(before)?;
    (seconds > 0.0).then(|| more as f64 / seconds)
}

impl Table {
    /// The largest first, unless `ascending`; texts the other way round, as
    /// people expect of each.
    pub fn sort(&mut self, column: usize, ascending: bool) {
        self.rows.sort_by(|a, b| {
            let order = a[column].compare(&b[column]);
            let alphabetic = matches!(a[column], Cell::Text(_) | Cell::State(_));
            if alphabetic != ascending { order } else { order.reverse() }
        });
    }
}

impl Cell {
    fn compare(&self, other: &Cell) -> Ordering {
        match (self, other) {
            (Cell::Text(a), Cell::Text(b)) | (Cell::State(a), Cell::State(b)) => a.cmp(b),
            (Cell::Bars(a), Cell::Bars(b)) => a.iter().sum::<u64>().cmp(&b.iter().sum()),
            _ => self.number().total_cmp(&other.number()),
        }
    }

    fn number(&self) -> f64 {
        match self {
            Cell::Count(count) | Cell::Micros(count) => *count as f64,
            Cell::Rate(rate) | Cell::ByteRate(rate) => rate.unwrap_or(-1.0),
            Cell::Ratio(ratio) => *ratio,
            Cell::Text(_) | Cell::State(_) | Cell::Bars(_) => 0.0,
        }
    }

    /// The cell in at most `width` columns of ASCII and block characters.
    pub fn text(&self, width: usize) -> String {
        match self {
            Cell::Text(text) | Cell::State(text) => shortened(text, width),
            Cell::Count(count) if width >= digits(*count) => count.to_string(),
            Cell::Count(count) => short(*count as f64),
            Cell::Rate(Some(rate)) => short(*rate),
            Cell::ByteRate(Some(rate)) => short_bytes(*rate),
            Cell::Rate(None) | Cell::ByteRate(None) => "-".to_string(),
            Cell::Ratio(ratio) => format!("{ratio:.3}"),
            Cell::Micros(micros) => format!("{:.1} ms", *micros as f64 / 1000.0),
            Cell::Bars(counts) => bars(counts, width),
        }
    }
}

fn digits(count: u64) -> usize {
    count.checked_ilog10().unwrap_or(0) as usize + 1
}

fn shortened(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_string();
    }
    let mut cut: String = text.chars().take(width.saturating_sub(1)).collect();
    cut.push('~');
    cut
}

/// `812`, `1.2k`, `34M`.
fn short(number: f64) -> String {
    scaled(number, 1000.0, &["", "k", "M", "G", "T"])
}

/// `812 B`, `1.2 KiB`.
fn short_bytes(bytes: f64) -> String {
    scaled(bytes, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB"])
}

fn scaled(mut number: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // What would be rounded up to the next unit is written in it.
    while number >= step - 0.5 && unit + 1 < units.len() {
        number /= step;
        unit += 1;
    }
    let decimals = usize::from(number < 10.0 && unit > 0 || number > 0.0 && number < 1.0);
    format!("{number:.decimals$}{}", units[unit])
}

/// One character a slot; where there are more slots than room, the first.
fn bars(counts: &[u64], width: usize) -> String {
    const STEPS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let bar = |count: &u64| match count {
        0 => ' ',
        count => STEPS[((count * 8).div_ceil(most) as usize).clamp(1, 8) - 1],
    };
    counts.iter().take(width).map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_fit_their_columns() {
        for (number, text) in
            [(0.0, "0"), (0.4, "0.4"), (999.4, "999"), (999.6, "1.0k"), (12_345.0, "12k"), (9.99e6, "10.0M")]
        {
            assert_eq!(short(number), text);
        }
        assert_eq!(short_bytes(1536.0), "1.5 KiB");
        assert_eq!(Cell::Count(1_234_567).text(8), "1234567");
        assert_eq!(Cell::Count(1_234_567_890).text(8), "1.2G");
        assert_eq!(Cell::Text("10.0.0.1:80".into()).text(6), "10.0.~");
    }

    #[test]
    fn bars_show_every_slot_that_has_something() {
        assert_eq!(bars(&[0, 1, 800, 400], 16), " ▁█▄");
        assert_eq!(bars(&[5; 20], 16).chars().count(), 16);
    }

    #[test]
    fn counts_are_sorted_downwards_and_names_upwards_and_both_turn_round() {
        let row = |name: &str, count| vec![Cell::Text(name.into()), Cell::Count(count)];
        let mut table = Table { columns: SERVERS, rows: vec![row("b", 1), row("a", 9), row("c", 5)] };
        let names = |table: &Table| table.rows.iter().map(|row| row[0].text(1)).collect::<String>();
        table.sort(1, false);
        assert_eq!(names(&table), "acb");
        table.sort(1, true);
        assert_eq!(names(&table), "bca");
        table.sort(0, false);
        assert_eq!(names(&table), "abc");
        table.sort(0, true);
        assert_eq!(names(&table), "cba");
    }

    #[test]
    fn a_count_that_went_back_has_no_rate() {
        assert_eq!(rate(10, 4, Duration::from_secs(2)), Some(3.0));
        assert_eq!(rate(4, 10, Duration::from_secs(2)), None);
        assert_eq!(rate(4, 4, Duration::ZERO), None);
    }
}
