//! The matrix for a reader: a letter a cell, a line a pair of addresses, and
//! below what each letter means.

use std::fmt::Write;

use crate::doctor::wrap::wrap;

use super::{Matrix, Outcome, Pair, Reuse, Trial, Verdict, network_name, rules};

/// Each distinct answer and reason, in order of appearance.
#[derive(Default)]
struct Legend {
    bound: Vec<String>,
    refused: Vec<String>,
    untried: Vec<String>,
}

impl Legend {
    /// Small letters are bound, capitals refused, digits not tried.
    fn letter(&mut self, trial: &Trial, outcome: &Outcome) -> char {
        let why = rules::why(trial, outcome);
        let (list, first, sentence) = match outcome {
            Outcome::Bound => (&mut self.bound, b'a', format!("ok: {why}")),
            Outcome::Refused { errno, .. } => (&mut self.refused, b'A', format!("{errno}: {why}")),
            Outcome::NotTried(_) => (&mut self.untried, b'0', format!("not tried: {why}")),
        };
        let at = list.iter().position(|known| *known == sentence).unwrap_or_else(|| {
            list.push(sentence);
            list.len() - 1
        });
        char::from(first.saturating_add(at as u8))
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (list, first) in [(&self.bound, b'a'), (&self.refused, b'A'), (&self.untried, b'0')] {
            for (at, sentence) in list.iter().enumerate() {
                let _ = writeln!(text, "  {}  {sentence}", char::from(first.saturating_add(at as u8)));
            }
        }
        text
    }
}

pub(super) fn text(matrix: &Matrix) -> String {
    let mut legend = Legend::default();
    let mut tables = String::new();
    for kind in super::Kind::ALL {
        let _ = writeln!(tables, "\n{}", kind.title());
        let _ = writeln!(tables, "{:42}{:26}another user", "first, then second", "same user");
        let _ = writeln!(tables, "{:42}{}  {}", "", heads(), heads());
        for pair in kind.pairs() {
            let of_pair = |(trial, _): &&(Trial, Outcome)| trial.kind == kind && trial.pair == *pair;
            let cells: Vec<&(Trial, Outcome)> = matrix.trials.iter().filter(of_pair).collect();
            let _ = writeln!(tables, "{:42}{}", place(pair), row(&cells, &mut legend));
        }
    }
    format!(
        "the rules of SO_REUSEADDR (RA) and SO_REUSEPORT (RP) on Linux {}, tried in: {}\n\
         a column is what the first socket set; its four letters what the second set: nothing, RA, RP, both\n\
         {}{tables}\nwhat is commonly said\n{}",
        matrix.kernel,
        network_name(matrix.network),
        legend.text(),
        claims(matrix)
    )
}

fn heads() -> String {
    ["none", "RA", "RP", "both"].map(|name| format!("{name:6}")).concat()
}

fn place(pair: &Pair) -> String {
    format!("{}, {}", pair.first, pair.second)
}

fn row(cells: &[&(Trial, Outcome)], legend: &mut Legend) -> String {
    let mut text = String::new();
    for same_uid in [true, false] {
        for first in Reuse::ALL {
            let here = |(trial, _): &&&(Trial, Outcome)| trial.first == first && trial.same_uid == same_uid;
            let letters: String =
                cells.iter().filter(here).map(|(trial, outcome)| legend.letter(trial, outcome)).collect();
            let _ = write!(text, "{letters:6}");
        }
        text.push_str("  ");
    }
    text.trim_end().to_string()
}

fn claims(matrix: &Matrix) -> String {
    const INDENT: usize = 42;
    let mut text = String::new();
    for rule in matrix.rules() {
        let verdict = match rule.verdict {
            Verdict::Holds => "holds",
            Verdict::Differs => "differs",
            Verdict::NotTried => "not tried",
        };
        let _ = writeln!(text, "  {:30}{verdict:10}{}", rule.name, wrap(rule.claim, INDENT));
        let _ = writeln!(text, "{:INDENT$}-> {}", "", wrap(&rule.found, INDENT + 3));
    }
    text
}
