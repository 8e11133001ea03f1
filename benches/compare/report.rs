//! What the samples come to: medians and ranges, ratios taken within a round,
//! goals met and missed; as a table and as JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::workloads::{ALL, METRICS, Sample, Workload};

/// The samples of a run: workload, way, round.
#[derive(Default)]
pub struct Results {
    samples: BTreeMap<(String, String), Vec<(usize, Sample)>>,
    /// What was left out, and why.
    pub skipped: Vec<String>,
}

/// Median, least and greatest of some values.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    pub median: f64,
    pub least: f64,
    pub most: f64,
    pub count: usize,
}

impl Summary {
    pub fn of(mut values: Vec<f64>) -> Option<Summary> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Summary { median, least, most, count: values.len() })
    }

    pub fn show(&self, digits: usize) -> String {
        let number = |value: f64| with_commas(value, digits);
        match self.count {
            1 => number(self.median),
            _ => format!("{} [{} to {}]", number(self.median), number(self.least), number(self.most)),
        }
    }
}

fn with_commas(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, part) = text.split_once('.').map_or((text.as_str(), None), |(a, b)| (a, Some(b)));
    let mut shown = String::new();
    for (at, letter) in whole.chars().enumerate() {
        let left = whole.len() - at;
        if at > 0 && left.is_multiple_of(3) && !shown.ends_with('-') {
            shown.push(',');
        }
        shown.push(letter);
    }
    part.map_or(shown.clone(), |part| format!("{shown}.{part}"))
}

/// With what evenkeel is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    /// The peer that does best in this run.
    Best,
    Way(&'static str),
    /// Nothing: the figure itself is the goal.
    Nothing,
}

/// A figure to reach: what must be, and what is aimed at. `more` = more is
/// better.
struct Goal {
    workload: &'static str,
    metric: &'static str,
    beside: Beside,
    must: f64,
    aim: f64,
    more: bool,
}

const fn goal(workload: &'static str, metric: &'static str, beside: Beside, must: f64, aim: f64) -> Goal {
    Goal { workload, metric, beside, must, aim, more: false }
}

const GOALS: &[Goal] = &[
    goal("connect", "proxy_us", Beside::Best, 1.00, 0.90),
    goal("exchange", "proxy_us", Beside::Best, 0.95, 0.85),
    goal("exchange", "p99_us", Beside::Best, 1.0, 0.9),
    goal("exchange-9500", "proxy_us", Beside::Best, 0.95, 0.85),
    goal("connect", "proxy_us", Beside::Way("evenkeel-unkept"), 1.03, 1.01),
    goal("exchange", "proxy_us", Beside::Way("evenkeel-unkept"), 1.03, 1.01),
    goal("udp-100", "proxy_us", Beside::Way("evenkeel-unkept"), 1.03, 1.01),
    goal("http", "proxy_us", Beside::Way("nginx"), 0.97, 0.90),
    goal("bulk-1", "proxy_s_per_gb", Beside::Way("haproxy"), 0.20, 0.15),
    goal("bulk-1", "proxy_s_per_gb", Beside::Way("haproxy-splice"), 1.05, 0.95),
    goal("bulk-16", "proxy_s_per_gb", Beside::Way("haproxy"), 0.20, 0.15),
    goal("bulk-16", "proxy_s_per_gb", Beside::Way("haproxy-splice"), 1.05, 0.95),
    Goal {
        workload: "bulk-16",
        metric: "gb_per_s",
        beside: Beside::Way("nftables"),
        must: 0.65,
        aim: 0.80,
        more: true,
    },
    goal("udp-100", "proxy_us", Beside::Way("nginx"), 0.72, 0.60),
    goal("udp-10000", "proxy_us", Beside::Way("nginx"), 0.62, 0.50),
    goal("udp-burst", "proxy_us", Beside::Way("nginx"), 0.50, 0.42),
    goal("sessions", "bytes_each", Beside::Nothing, 350.0, 256.0),
    goal("flows", "bytes_each", Beside::Nothing, 160.0, 128.0),
    goal("idle", "serving_wakeups", Beside::Nothing, 0.0, 0.0),
];

impl Goal {
    fn verdict(&self, value: f64) -> &'static str {
        let reaches = |bound: f64| if self.more { value >= bound } else { value <= bound };
        match (reaches(self.aim), reaches(self.must)) {
            (true, _) => "aim",
            (false, true) => "must",
            (false, false) => "missed",
        }
    }

    fn digits(&self) -> usize {
        if self.beside == Beside::Nothing { 0 } else { 2 }
    }
}

/// How one build of evenkeel fared with a goal.
struct Judged {
    goal: &'static Goal,
    evenkeel: String,
    beside: String,
    value: Summary,
}

impl Results {
    pub fn add(&mut self, workload: &str, way: &str, round: usize, sample: Sample) {
        self.samples.entry((workload.to_string(), way.to_string())).or_default().push((round, sample));
    }

    fn ways(&self, workload: &str) -> Vec<String> {
        self.samples.keys().filter(|(of, _)| of == workload).map(|(_, way)| way.clone()).collect()
    }

    fn of(&self, workload: &str, way: &str) -> &[(usize, Sample)] {
        self.samples.get(&(workload.to_string(), way.to_string())).map_or(&[], Vec::as_slice)
    }

    pub fn summary(&self, workload: &str, way: &str, metric: &str) -> Option<Summary> {
        let samples = self.of(workload, way);
        Summary::of(samples.iter().filter_map(|(_, sample)| sample.get(metric).copied()).collect())
    }

    /// One way's figure over another's, taken within each round.
    pub fn ratio(&self, workload: &str, way: &str, beside: &str, metric: &str) -> Option<Summary> {
        let others: BTreeMap<usize, f64> = self
            .of(workload, beside)
            .iter()
            .filter_map(|(round, sample)| Some((*round, *sample.get(metric)?)))
            .collect();
        let ratios = self.of(workload, way).iter().filter_map(|(round, sample)| {
            let other = others.get(round).filter(|other| **other > 0.0)?;
            Some(sample.get(metric)? / other)
        });
        Summary::of(ratios.collect())
    }

    fn peers(&self, workload: &str) -> Vec<String> {
        let mut ways = self.ways(workload);
        ways.retain(|way| way.starts_with("haproxy") || way.starts_with("nginx"));
        ways
    }

    fn builds(&self, workload: &str) -> Vec<String> {
        let mut ways = self.ways(workload);
        ways.retain(|way| !["direct", "nftables"].contains(&way.as_str()));
        ways.retain(|way| !way.starts_with("haproxy") && !way.starts_with("nginx"));
        ways
    }

    /// The peer with the lowest median.
    fn best_peer(&self, workload: &str, metric: &str) -> Option<String> {
        let median = |way: &String| self.summary(workload, way, metric).map_or(f64::MAX, |s| s.median);
        self.peers(workload).into_iter().min_by(|a, b| median(a).total_cmp(&median(b)))
    }

    fn judged(&self) -> Vec<Judged> {
        let mut all = Vec::new();
        for goal in GOALS {
            for evenkeel in self.builds(goal.workload) {
                let (beside, value) = match goal.beside {
                    Beside::Nothing => ("".to_string(), self.summary(goal.workload, &evenkeel, goal.metric)),
                    Beside::Best => match self.best_peer(goal.workload, goal.metric) {
                        Some(best) => {
                            let ratio = self.ratio(goal.workload, &evenkeel, &best, goal.metric);
                            (best, ratio)
                        }
                        None => continue,
                    },
                    Beside::Way(way) if way == evenkeel => continue,
                    Beside::Way(way) => {
                        (way.to_string(), self.ratio(goal.workload, &evenkeel, way, goal.metric))
                    }
                };
                let Some(value) = value else { continue };
                all.push(Judged { goal, evenkeel, beside, value });
            }
        }
        all
    }

    /// Tables for people, in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = self.goals_table();
        for workload in ALL {
            text += &self.table_of(workload);
        }
        for line in &self.skipped {
            text += &format!("\nSkipped: {line}.\n");
        }
        text
    }

    fn goals_table(&self) -> String {
        let judged = self.judged();
        if judged.is_empty() {
            return String::new();
        }
        let mut text =
            "| workload | figure | beside | evenkeel / that, same round | must | aim | reached |\n\
                        |---|---|---|---|---|---|---|\n"
                .to_string();
        for Judged { goal, evenkeel, beside, value } in judged {
            let name = if evenkeel == "evenkeel" { String::new() } else { format!(" ({evenkeel})") };
            let digits = goal.digits();
            let sign = if goal.more { "≥" } else { "≤" };
            text += &format!(
                "| {}{name} | {} | {} | {} | {sign} {:.digits$} | {sign} {:.digits$} | {} |\n",
                goal.workload,
                heading(goal.metric).0,
                if beside.is_empty() { "–" } else { &beside },
                value.show(digits),
                goal.must,
                goal.aim,
                goal.verdict(value.median),
            );
        }
        text
    }

    fn table_of(&self, workload: &Workload) -> String {
        let present = self.ways(workload.name);
        let in_order = workload.ways.iter().map(|way| way.to_string()).filter(|way| present.contains(way));
        let others = present.iter().filter(|way| !workload.ways.contains(&way.as_str())).cloned();
        let ways: Vec<String> = in_order.chain(others).collect();
        if ways.is_empty() {
            return String::new();
        }
        let metrics: Vec<_> = METRICS
            .iter()
            .filter(|(name, _, _)| {
                let is_shown = |way: &String| {
                    let summary = self.summary(workload.name, way, name);
                    summary.is_some_and(|summary| *name != "failures" || summary.most > 0.0)
                };
                ways.iter().any(is_shown)
            })
            .collect();
        let mut text = format!("\n**{}**: {}\n\n| |", workload.name, workload.title);
        metrics.iter().for_each(|(_, heading, _)| text += &format!(" {heading} |"));
        text += "\n|---|";
        metrics.iter().for_each(|_| text += "---|");
        text.push('\n');
        for way in ways {
            text += &format!("| {way} |");
            for (metric, _, digits) in &metrics {
                let shown = self.summary(workload.name, &way, metric).map(|summary| summary.show(*digits));
                text += &format!(" {} |", shown.unwrap_or("–".to_string()));
            }
            text.push('\n');
        }
        text
    }

    /// Everything, for programs.
    pub fn json(&self, about: Value) -> Value {
        let mut workloads = serde_json::Map::new();
        for workload in ALL {
            let mut ways = serde_json::Map::new();
            for way in self.ways(workload.name) {
                let samples: Vec<Value> = self
                    .of(workload.name, &way)
                    .iter()
                    .map(|(round, sample)| json!({ "round": round, "figures": sample }))
                    .collect();
                ways.insert(way, json!(samples));
            }
            if !ways.is_empty() {
                workloads.insert(workload.name.into(), json!({ "title": workload.title, "samples": ways }));
            }
        }
        let goals: Vec<Value> = self
            .judged()
            .iter()
            .map(|Judged { goal, evenkeel, beside, value }| {
                json!({
                    "workload": goal.workload, "metric": goal.metric, "evenkeel": evenkeel, "beside": beside,
                    "median": value.median, "least": value.least, "most": value.most, "rounds": value.count,
                    "must": goal.must, "aim": goal.aim, "reached": goal.verdict(value.median),
                })
            })
            .collect();
        json!({ "about": about, "goals": goals, "skipped": self.skipped, "workloads": workloads })
    }
}

/// A metric's heading and digits.
pub fn heading(metric: &str) -> (&'static str, usize) {
    let found = METRICS.iter().find(|(name, _, _)| *name == metric);
    found.map_or(("", 2), |(_, heading, digits)| (heading, *digits))
}
