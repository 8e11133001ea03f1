//! The line that moves while the load is made.
//!
//! On standard error, and only where that is a terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::plan::Plan;
use super::print::{duration, number};
use super::tally::Tally;

/// The line, or nothing.
pub struct Progress {
    bar: Option<ProgressBar>,
    began: Instant,
    whole: Option<Whole>,
    last: (Instant, u64),
    rate: f64,
}

/// What makes up 100 %.
enum Whole {
    Time(Duration),
    Requests(u64),
    Connections(u64),
}

impl Progress {
    /// For this run.
    pub fn new(plan: &Plan, began: Instant) -> Progress {
        let whole = match (plan.requests, plan.duration, plan.connections) {
            (Some(requests), _, _) => Some(Whole::Requests(requests)),
            (None, Some(duration), _) => Some(Whole::Time(plan.warmup + duration)),
            (None, None, Some(connections)) => Some(Whole::Connections(connections)),
            (None, None, None) => None,
        };
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(1000);
            let style = ProgressStyle::with_template("{spinner} [{bar:28}] {msg}");
            bar.set_style(style.expect("a constant template").progress_chars("━╸─"));
            bar
        });
        Progress { bar, began, whole, last: (began, 0), rate: 0.0 }
    }

    /// Shows where the run is.
    pub fn show(&mut self, total: &Tally) {
        let Some(bar) = &self.bar else { return };
        let now = Instant::now();
        let since = (now - self.last.0).as_secs_f64();
        if since >= 0.5 {
            self.rate = total.requests.saturating_sub(self.last.1) as f64 / since;
            self.last = (now, total.requests);
        }
        let p99 = if total.latency.is_empty() { 0 } else { total.latency.value_at_quantile(0.99) };
        bar.set_position((self.done(total) * 1000.0) as u64);
        bar.set_message(format!(
            "{:.0} s  {}/s  p99 {}  errors {}",
            self.began.elapsed().as_secs_f64(),
            number(self.rate),
            duration(p99),
            total.error_count()
        ));
    }

    /// Takes the line away.
    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn done(&self, total: &Tally) -> f64 {
        match &self.whole {
            None => 0.0,
            Some(Whole::Time(whole)) => self.began.elapsed().as_secs_f64() / whole.as_secs_f64(),
            Some(Whole::Requests(whole)) => total.requests as f64 / *whole as f64,
            Some(Whole::Connections(whole)) => total.connections as f64 / *whole as f64,
        }
        .min(1.0)
    }
}
