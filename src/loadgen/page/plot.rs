//! Plots as SVG text, to stand inside an HTML page.
//!
//! Pure. Colours and fonts come from the page's style sheet by class names, so
//! that one plot serves light, dark and paper. Bounded by what is drawn: the
//! callers thin their data first.

use std::fmt::Write as _;

/// Size of a plot in its own units; the page scales it.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 260.0;

/// Around the drawing area: room for the labels.
const LEFT: f64 = 62.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 34.0;

/// How a value becomes a position.
#[derive(Clone, Copy, Debug)]
pub enum Scale {
    /// Evenly from 0 to the top.
    Linear(f64),
    /// Evenly in the logarithm, from bottom to top.
    Log(f64, f64),
}

impl Scale {
    /// From zero to a round number at or above `most`.
    pub fn linear(most: f64) -> Scale {
        let step = round_step(most.max(1e-9) / 4.0);
        Scale::Linear((most.max(1e-9) / step).ceil() * step)
    }

    /// From the power of ten (or twice, or five times one) below to the one above.
    pub fn log(least: f64, most: f64) -> Scale {
        let bottom = log_marks(least / 10.0, least).last().copied().unwrap_or(least);
        let top = log_marks(most, most * 10.0).first().copied().unwrap_or(most);
        Scale::Log(bottom, if top > bottom { top } else { bottom * 10.0 })
    }

    /// 0 at the bottom, 1 at the top.
    fn part(self, value: f64) -> f64 {
        match self {
            Scale::Linear(top) => value / top,
            Scale::Log(bottom, top) => (value.max(bottom) / bottom).ln() / (top / bottom).ln(),
        }
    }

    fn marks(self) -> Vec<f64> {
        match self {
            Scale::Linear(top) => {
                let step = round_step(top / 4.0);
                let count = (top / step).round() as u32;
                (0..=count).map(|index| f64::from(index) * step).collect()
            }
            Scale::Log(bottom, top) => {
                let marks = log_marks(bottom, top);
                let tens: Vec<f64> = marks.iter().copied().filter(|mark| is_power_of_ten(*mark)).collect();
                if tens.len() >= 3 { tens } else { marks }
            }
        }
    }
}

/// 1, 2 or 5 times a power of ten, at least `rough`.
fn round_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough * 0.999_999);
    factor.unwrap_or(10.0) * power
}

/// The numbers 1, 2, 5 times a power of ten within two bounds.
fn log_marks(bottom: f64, top: f64) -> Vec<f64> {
    let mut marks = Vec::new();
    for power in (bottom.log10().floor() as i32)..=(top.log10().ceil() as i32) {
        for factor in [1.0, 2.0, 5.0] {
            let mark = factor * 10f64.powi(power);
            if mark >= bottom * 0.999_999 && mark <= top * 1.000_001 {
                marks.push(mark);
            }
        }
    }
    marks
}

fn is_power_of_ten(value: f64) -> bool {
    (value.log10() - value.log10().round()).abs() < 1e-6
}

/// A plot being drawn.
pub struct Plot {
    body: String,
    label: String,
    x_top: f64,
    y: Scale,
}

impl Plot {
    /// An empty one; `label` is read aloud where the plot cannot be seen.
    /// Positions along x go from 0 to `x_top`.
    pub fn new(label: &str, x_top: f64, y: Scale) -> Plot {
        Plot { body: String::new(), label: label.to_string(), x_top: x_top.max(1e-9), y }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + value / self.x_top * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - self.y.part(value).clamp(0.0, 1.02) * (HEIGHT - TOP - BOTTOM)
    }

    /// Horizontal lines with their values.
    pub fn grid(&mut self, text: impl Fn(f64) -> String) {
        for mark in self.y.marks() {
            let y = self.y(mark);
            self.draw(format_args!(
                r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                WIDTH - RIGHT,
                LEFT - 8.0,
                y + 4.0,
                escape(&text(mark))
            ));
        }
    }

    /// Values along the bottom.
    pub fn x_marks(&mut self, marks: &[(f64, String)]) {
        for (at, text) in marks {
            let x = self.x(*at);
            // The last one must not stick out.
            let anchor = if x > WIDTH - RIGHT - 20.0 { "end" } else { "middle" };
            self.draw(format_args!(
                r#"<text class="tick" x="{x:.1}" y="{:.1}" text-anchor="{anchor}">{}</text>"#,
                HEIGHT - BOTTOM + 18.0,
                escape(text)
            ));
        }
    }

    /// Upright lines with a word at the top.
    pub fn upright(&mut self, at: f64, text: &str) {
        let x = self.x(at);
        self.draw(format_args!(
            r#"<line class="upright" x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{:.1}"/><text class="tick" x="{:.1}" y="{:.1}">{}</text>"#,
            HEIGHT - BOTTOM,
            x + 4.0,
            TOP + 9.0,
            escape(text)
        ));
    }

    /// A line through points, with what is below it filled where `filled`.
    pub fn line(&mut self, class: &str, points: &[(f64, f64)], filled: bool) {
        let Some(((first, _), (last, _))) = points.first().zip(points.last()).map(|(a, b)| (*a, *b)) else {
            return;
        };
        let mut path = String::new();
        for (index, (x, y)) in points.iter().enumerate() {
            let letter = if index == 0 { 'M' } else { 'L' };
            write!(path, "{letter}{:.1} {:.1}", self.x(*x), self.y(*y)).expect("writing to a string");
        }
        if filled {
            let floor = HEIGHT - BOTTOM;
            let (left, right) = (self.x(first), self.x(last));
            self.draw(format_args!(
                r#"<path class="fill {class}" d="{path}L{right:.1} {floor:.1}L{left:.1} {floor:.1}Z"/>"#
            ));
        }
        self.draw(format_args!(r#"<path class="line {class}" d="{path}"/>"#));
    }

    /// A horizontal line from one x to another.
    pub fn level(&mut self, class: &str, value: f64, from: f64, to: f64) {
        let (y, from, to) = (self.y(value), self.x(from), self.x(to));
        self.draw(format_args!(
            r#"<line class="{class}" x1="{from:.1}" x2="{to:.1}" y1="{y:.1}" y2="{y:.1}"/>"#
        ));
    }

    /// A field between two values.
    pub fn band(&mut self, class: &str, low: f64, high: f64, from: f64, to: f64) {
        let (top, floor, left, right) = (self.y(high), self.y(low), self.x(from), self.x(to));
        self.draw(format_args!(
            r#"<rect class="{class}" x="{left:.1}" y="{top:.1}" width="{:.1}" height="{:.1}"/>"#,
            right - left,
            (floor - top).max(0.5)
        ));
    }

    /// A bar with a text that shows when it is pointed at.
    pub fn bar(&mut self, class: &str, value: f64, from: f64, to: f64, title: &str) {
        let (top, left, right) = (self.y(value), self.x(from), self.x(to));
        self.draw(format_args!(
            r#"<rect class="{class}" x="{left:.1}" y="{top:.1}" width="{:.1}" height="{:.1}" rx="2"><title>{}</title></rect>"#,
            right - left,
            HEIGHT - BOTTOM - top,
            escape(title)
        ));
    }

    /// A point of a rising curve, with a text that shows when it is pointed at
    /// and a word beside it.
    pub fn point(&mut self, class: &str, x: f64, y: f64, word: &str, title: &str) {
        let (px, py) = (self.x(x), self.y(y));
        // A curve that rises leaves room above its left side; the leftmost word
        // stands below it, out of the way of the next one.
        let (anchor, dx, dy) = if px > LEFT + 80.0 { ("end", -7.0, -7.0) } else { ("start", 4.0, 18.0) };
        self.draw(format_args!(
            r#"<circle class="{class}" cx="{px:.1}" cy="{py:.1}" r="4"><title>{}</title></circle><text class="word" x="{:.1}" y="{:.1}" text-anchor="{anchor}">{}</text>"#,
            escape(title),
            px + dx,
            py + dy,
            escape(word)
        ));
    }

    /// The plot as text.
    pub fn finish(self) -> String {
        format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">{}</svg>\n",
            escape(&self.label),
            self.body
        )
    }

    fn draw(&mut self, shape: std::fmt::Arguments) {
        self.body.write_fmt(shape).expect("writing to a string");
        self.body.push('\n');
    }
}

/// Text as it may stand in HTML, in an attribute too.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other if other.is_control() && other != '\n' => out.push(char::REPLACEMENT_CHARACTER),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_scales_end_at_round_numbers() {
        for (most, top) in [(97.0, 100.0), (1.0, 1.0), (123_456.0, 150_000.0), (0.3, 0.3)] {
            let Scale::Linear(found) = Scale::linear(most) else { panic!("linear") };
            assert!((found - top).abs() < top * 1e-9, "{most}: {found}");
        }
        assert_eq!(Scale::Linear(100.0).marks(), [0.0, 50.0, 100.0]);
    }

    #[test]
    fn logarithmic_scales_hold_their_values() {
        for (least, most) in [(31.0, 40_000.0), (5.0, 5.0), (1.0, 9.0), (999.0, 1001.0)] {
            let scale = Scale::log(least, most);
            assert!(scale.part(least) >= -1e-9 && scale.part(most) <= 1.0 + 1e-9, "{least} {most} {scale:?}");
            assert!(scale.marks().len() >= 2, "{scale:?}");
        }
    }

    #[test]
    fn text_cannot_break_out_of_the_page() {
        assert_eq!(escape(r#"<a href="x">&'"#), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
        assert_eq!(escape("a\x1b[31mb"), "a\u{fffd}[31mb");
    }
}
