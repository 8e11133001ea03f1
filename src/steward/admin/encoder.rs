//! The text formats of metrics: OpenMetrics 1.0 and the older one of
//! Prometheus (0.0.4).
//!
//! Pure: families in, text out. The two differ in how a family is announced
//! (`x` or `x_total` for a counter), in units, and in types; the samples are
//! the same. Both end with `# EOF`, a comment in the older format.

use std::fmt::{Display, Write as _};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Format {
    OpenMetrics,
    Prometheus,
}

impl Format {
    /// What it is called in `Content-Type`.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// What kind of thing a family measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only goes up; its samples are called `NAME_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// How often which values occurred.
    Histogram,
    /// Texts as labels of a 1; its sample is called `NAME_info`.
    Info,
}

/// A text that grows.
#[derive(Debug)]
pub struct Encoder {
    format: Format,
    out: String,
    name: String,
    kind: Kind,
}

impl Encoder {
    /// Nothing yet.
    pub fn new(format: Format) -> Encoder {
        Encoder { format, out: String::new(), name: String::new(), kind: Kind::Gauge }
    }

    /// The following samples are of this family; its name ends with its unit,
    /// if it has one.
    pub fn family(&mut self, name: &str, kind: Kind, unit: &str, help: &str) {
        debug_assert!(name.ends_with(unit));
        self.name = name.to_string();
        self.kind = kind;
        let (kind_name, announced) = match (self.format, kind) {
            (Format::OpenMetrics, Kind::Info) => ("info", name.to_string()),
            (Format::Prometheus, Kind::Info) => ("gauge", format!("{name}_info")),
            (Format::OpenMetrics, Kind::Counter) => ("counter", name.to_string()),
            (Format::Prometheus, Kind::Counter) => ("counter", format!("{name}_total")),
            (_, Kind::Gauge) => ("gauge", name.to_string()),
            (_, Kind::Histogram) => ("histogram", name.to_string()),
        };
        self.line(format_args!("# TYPE {announced} {kind_name}"));
        if self.format == Format::OpenMetrics && !unit.is_empty() {
            self.line(format_args!("# UNIT {announced} {unit}"));
        }
        self.line(format_args!("# HELP {announced} {help}"));
    }

    /// One sample of the present family.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        let suffix = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        self.write(suffix, labels, None, &value);
    }

    /// One histogram of the present family: counts of single buckets, with the
    /// upper bounds of all but the last.
    pub fn histogram(&mut self, labels: &[(&str, &str)], bounds: &[f64], counts: &[u64], sum: f64) {
        let mut total = 0;
        for (index, count) in counts.iter().enumerate() {
            total += count;
            // Always with a point, as OpenMetrics wants bounds to be written.
            let bound = bounds.get(index).map_or("+Inf".into(), |bound| format!("{bound:?}"));
            self.write("_bucket", labels, Some(&bound), &total);
        }
        self.write("_count", labels, None, &total);
        self.write("_sum", labels, None, &sum);
    }

    /// The whole text.
    pub fn finish(mut self) -> String {
        self.out.push_str("# EOF\n");
        self.out
    }

    fn write(&mut self, suffix: &str, labels: &[(&str, &str)], bound: Option<&str>, value: &dyn Display) {
        self.out.push_str(&self.name);
        self.out.push_str(suffix);
        let bound = bound.map(|bound| ("le", bound));
        let mut separator = '{';
        for (name, text) in labels.iter().copied().chain(bound) {
            let _ = write!(self.out, "{separator}{name}=\"");
            escape(&mut self.out, text);
            self.out.push('"');
            separator = ',';
        }
        if separator == ',' {
            self.out.push('}');
        }
        self.line(format_args!(" {value}"));
    }

    fn line(&mut self, text: std::fmt::Arguments) {
        self.out.write_fmt(text).expect("writing to a string");
        self.out.push('\n');
    }
}

/// A label's value; everything else may stand as it is.
fn escape(out: &mut String, text: &str) {
    for char in text.chars() {
        match char {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(format: Format) -> String {
        let mut encoder = Encoder::new(format);
        encoder.family("a_bytes", Kind::Counter, "bytes", "What came.");
        encoder.sample(&[("from", "a\"b\\c\nd"), ("x", "")], 7);
        encoder.family("b", Kind::Info, "", "Texts.");
        encoder.sample(&[("version", "1")], 1);
        encoder.family("c_seconds", Kind::Histogram, "seconds", "How long.");
        encoder.histogram(&[("to", "s")], &[0.5, 1.0], &[2, 0, 1], 3.25);
        encoder.finish()
    }

    #[test]
    fn openmetrics_is_written_as_its_standard_has_it() {
        let expected = "# TYPE a_bytes counter\n# UNIT a_bytes bytes\n# HELP a_bytes What came.\n\
            a_bytes_total{from=\"a\\\"b\\\\c\\nd\",x=\"\"} 7\n\
            # TYPE b info\n# HELP b Texts.\nb_info{version=\"1\"} 1\n\
            # TYPE c_seconds histogram\n# UNIT c_seconds seconds\n# HELP c_seconds How long.\n\
            c_seconds_bucket{to=\"s\",le=\"0.5\"} 2\nc_seconds_bucket{to=\"s\",le=\"1.0\"} 2\n\
            c_seconds_bucket{to=\"s\",le=\"+Inf\"} 3\nc_seconds_count{to=\"s\"} 3\nc_seconds_sum{to=\"s\"} 3.25\n\
            # EOF\n";
        assert_eq!(sample(Format::OpenMetrics), expected);
    }

    #[test]
    fn the_older_format_has_the_same_samples() {
        let samples = |format| {
            let text = sample(format);
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_string).collect::<Vec<_>>()
        };
        assert_eq!(samples(Format::Prometheus), samples(Format::OpenMetrics));
        let text = sample(Format::Prometheus);
        assert!(text.contains("# TYPE a_bytes_total counter\n") && text.contains("# TYPE b_info gauge\n"));
        assert!(!text.contains("# UNIT"));
    }
}
