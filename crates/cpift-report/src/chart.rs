//! Inline SVG whose colours are the page's: every shape has a class, so that light, dark and print are the style sheet's business.

use std::fmt::Write as _;

use cpift_core::format::svg::{shortened, text_width};

use crate::html::escape;

/// Steps of a colour scale; the style sheet has as many classes `q0`… (sequential) and `d0`… (diverging).
pub const STEPS: usize = 9;

/// The sequential class of `value` between 0 and `max`.
pub fn sequential(value: f64, max: f64) -> String {
    format!("q{}", step(if max > 0.0 { value / max } else { 0.0 }))
}

/// The diverging class of `value` between `-reach` and `reach`.
pub fn diverging(value: f64, reach: f64) -> String {
    format!("d{}", step(0.5 + if reach > 0.0 { value / reach / 2.0 } else { 0.0 }))
}

fn step(share: f64) -> usize {
    (share.clamp(0.0, 1.0) * (STEPS - 1) as f64).round() as usize
}

/// A picture being drawn, in pixels.
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

impl Svg {
    /// An empty picture.
    pub fn new(width: f64, height: f64) -> Self {
        Self { width, height, body: String::new() }
    }

    /// Text with its baseline at `y`; classes `head`, `small`, `middle`, `end`, and `bold` style it.
    pub fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let _ = writeln!(self.body, "<text class=\"{class}\" x=\"{}\" y=\"{}\">{}</text>", n(x), n(y), escape(text));
    }

    /// A name of at most `width` pixels, cut where it is longer.
    pub fn name(&mut self, x: f64, y: f64, class: &str, width: f64, name: &str) {
        let fits = (1..=name.chars().count()).rev().find(|&k| text_width(&shortened(name, k)) as f64 <= width);
        let short = shortened(name, fits.unwrap_or(1));
        let title = if short == name { String::new() } else { format!("<title>{}</title>", escape(name)) };
        let (x, y, short) = (n(x), n(y), escape(&short));
        let _ = writeln!(self.body, "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{title}{short}</text>");
    }

    /// A rectangle; `title` shows when the pointer rests on it.
    pub fn rect(&mut self, (x, y, width, height): (f64, f64, f64, f64), class: &str, title: &str) {
        let (x, y, width, height, title) = (n(x), n(y), n(width), n(height), escape(title));
        let title = if title.is_empty() { title } else { format!("<title>{title}</title>") };
        let _ = writeln!(
            self.body,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\">{title}</rect>"
        );
    }

    /// A straight line.
    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), class: &str) {
        let _ = writeln!(self.body, "<path class=\"{class}\" d=\"M{} {}L{} {}\"/>", n(x1), n(y1), n(x2), n(y2));
    }

    /// A line through points.
    pub fn curve(&mut self, points: &[(f64, f64)], class: &str, title: &str) {
        let d: String = points
            .iter()
            .enumerate()
            .map(|(i, (x, y))| format!("{}{} {}", if i == 0 { "M" } else { "L" }, n(*x), n(*y)))
            .collect();
        let _ = writeln!(self.body, "<path class=\"{class}\" d=\"{d}\"><title>{}</title></path>", escape(title));
    }

    /// A point.
    pub fn dot(&mut self, (x, y): (f64, f64), class: &str, title: &str) {
        let (x, y, title) = (n(x), n(y), escape(title));
        let _ = writeln!(
            self.body,
            "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"3.5\"><title>{title}</title></circle>"
        );
    }

    /// As [`Svg::finish`], for a picture that scrolls in a box of its own (by keyboard too) instead of shrinking.
    pub fn finish_scrolling(self, label: &str) -> String {
        let svg = self.finish(label).replacen(" aria-label", " class=\"whole\" aria-label", 1);
        let label = escape(label);
        format!("<div class=\"scroll\" role=\"region\" aria-label=\"{label}\" tabindex=\"0\">{svg}</div>")
    }

    /// The picture as an element; `label` is what a screen reader says of it.
    pub fn finish(self, label: &str) -> String {
        let (width, height) = (n(self.width), n(self.height));
        format!(
            "<svg role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">\n{}</svg>",
            escape(label),
            self.body
        )
    }
}

/// A coordinate, to a tenth of a pixel.
fn n(value: f64) -> String {
    let text = format!("{:.1}", value + 0.0);
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// A straight scale with round marks.
#[derive(Debug, Clone)]
pub struct Axis {
    /// The least value shown.
    pub low: f64,
    /// The largest value shown.
    pub high: f64,
    /// Where those lie, in pixels.
    pub ends: (f64, f64),
    step: f64,
}

impl Axis {
    /// A scale that holds `low` and `high`, widened to round numbers with about `marks` of them.
    pub fn new(low: f64, high: f64, ends: (f64, f64), marks: usize) -> Self {
        let span = if high - low > 0.0 { high - low } else { low.abs().max(1.0) };
        let rough = span / marks as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * power).find(|s| *s >= rough * 0.999).unwrap_or(rough);
        let (from, to) = ((low / step + 1e-9).floor() * step, (high / step - 1e-9).ceil() * step);
        Self { low: from, high: if to > from { to } else { from + step }, ends, step }
    }

    /// A scale from `low` to `high` as they are.
    pub fn exact(low: f64, high: f64, ends: (f64, f64)) -> Self {
        Self { low, high: if high > low { high } else { low + 1.0 }, ends, step: high - low }
    }

    /// The pixel of a value.
    pub fn at(&self, value: f64) -> f64 {
        let share = (value - self.low) / (self.high - self.low);
        self.ends.0 + share.clamp(0.0, 1.0) * (self.ends.1 - self.ends.0)
    }

    /// The round numbers on the scale, with their text.
    pub fn marks(&self) -> Vec<(f64, String)> {
        let count = ((self.high - self.low) / self.step).round() as usize;
        let digits = (-self.step.log10().floor()).clamp(0.0, 9.0) as usize;
        let mark = |i: usize| self.low + i as f64 * self.step;
        (0..=count).map(|i| (mark(i), format!("{:.digits$}", mark(i) + 0.0).replace('-', "−"))).collect()
    }
}

/// A row of the colours of a scale, `prefix` 0 to 8, with what its ends and middle mean.
pub fn legend(prefix: char, labels: [&str; 3]) -> String {
    let swatches: String = (0..STEPS).map(|i| format!("<i class=\"{prefix}{i}\"></i>")).collect();
    let [low, middle, high] = labels.map(escape);
    format!(
        "<span class=\"legend\"><span>{low}</span><span class=\"ramp\" aria-hidden=\"true\">{swatches}</span>\
         <span>{high}</span>{}</span>",
        if middle.is_empty() { String::new() } else { format!("<span class=\"note\">{middle}</span>") }
    )
}

/// Which series a colour stands for: a class `s0`… each.
pub fn series_legend<'a>(names: impl Iterator<Item = (String, &'a str)>) -> String {
    let items: String = names
        .map(|(class, name)| format!("<li><i class=\"{class}\" aria-hidden=\"true\"></i>{}</li>", escape(name)))
        .collect();
    format!("<ul class=\"series\">{items}</ul>")
}

/// The class of the series at `index`; colours repeat after eight, with another dash.
pub fn series(index: usize) -> String {
    format!("s{} k{}", index % 8, index / 8 % 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_marks_and_hold_their_values() {
        let axis = Axis::new(-3.0, 76.0, (0.0, 100.0), 4);
        let texts: Vec<String> = axis.marks().into_iter().map(|(_, text)| text).collect();
        assert_eq!(texts, ["−20", "0", "20", "40", "60", "80"]);
        assert_eq!((axis.at(-20.0), axis.at(80.0), axis.at(30.0)), (0.0, 100.0, 50.0));
        let texts: Vec<String> = Axis::new(0.0, 0.25, (0.0, 1.0), 3).marks().into_iter().map(|(_, t)| t).collect();
        assert_eq!(texts, ["0.0", "0.1", "0.2", "0.3"]);
        // One value: still an axis.
        assert!(Axis::new(0.0, 0.0, (0.0, 1.0), 4).at(0.0).is_finite());
    }

    #[test]
    fn scales_run_from_end_to_end() {
        assert_eq!([0.0, 1.0, 2.0, 9.0].map(|v| sequential(v, 2.0)), ["q0", "q4", "q8", "q8"]);
        assert_eq!([-9.0, 0.0, 2.0].map(|v| diverging(v, 2.0)), ["d0", "d4", "d8"]);
        assert_eq!((sequential(0.0, 0.0), diverging(0.0, 0.0)), ("q0".into(), "d4".into()));
        for i in 0..STEPS {
            let style = include_str!("style.css");
            assert!(style.contains(&format!(".q{i} ")) && style.contains(&format!(".d{i} ")), "step {i} has no colour");
        }
    }

    #[test]
    fn long_names_are_cut_and_keep_their_whole_name_as_a_title() {
        let mut svg = Svg::new(10.0, 10.0);
        svg.name(0.0, 0.0, "end", 60.0, "a-name-that-is-far-too-long");
        let svg = svg.finish("x");
        assert!(svg.contains("<title>a-name-that-is-far-too-long</title>a-nam…</text>"), "{svg}");
    }
}
