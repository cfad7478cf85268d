//! The pictures of experiments: values with their ends by name, lines over an axis, and pairs of bars.

use cpift_core::format::svg::text_width;

use crate::chart::{Axis, Svg, series};

/// Width of every picture: whole on a telephone.
const WIDTH: f64 = 336.0;
const ROW: f64 = 26.0;
/// Where the scale lies beside names and values.
const SCALE: (f64, f64) = (100.0, WIDTH - 58.0);

/// A value as pictures show it.
pub struct Mark {
    /// What it belongs to.
    pub name: String,
    /// It, in the unit that is shown.
    pub value: f64,
    /// The ends of the line through it.
    pub ends: Option<(f64, f64)>,
    /// It as the tables have it.
    pub text: String,
}

impl Mark {
    fn reach(&self) -> [f64; 3] {
        self.ends.map_or([self.value; 3], |(low, high)| [self.value, low, high])
    }
}

/// The least and largest of `values`; 0 to 0 where there are none.
pub fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let ends = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if ends.0 <= ends.1 { ends } else { (0.0, 0.0) }
}

/// The range of marks with their ends.
pub fn reach<'a>(marks: impl Iterator<Item = &'a Mark>) -> (f64, f64) {
    range(marks.flat_map(Mark::reach))
}

/// The picture's headline, and what its scale measures.
pub struct Heads<'a> {
    /// What is shown, in bold.
    pub head: &'a str,
    /// The unit.
    pub unit: &'a str,
    /// What a screen reader says before the values.
    pub label: String,
}

fn empty(heads: &Heads<'_>, height: f64) -> Svg {
    let mut svg = Svg::new(WIDTH, height);
    let unit = text_width(heads.unit) as f64;
    svg.name(0.0, 14.0, "head", WIDTH - unit - 12.0, heads.head);
    svg.text(WIDTH, 14.0, "small soft end", heads.unit);
    svg
}

/// A scale across, with its marks under `bottom`.
fn across(svg: &mut Svg, (low, high): (f64, f64), (top, bottom): (f64, f64)) -> Axis {
    let axis = Axis::new(low, high, SCALE, 3);
    for (value, text) in axis.marks() {
        svg.line((axis.at(value), top), (axis.at(value), bottom), "grid");
        svg.text(axis.at(value), bottom + 16.0, "small soft middle", &text);
    }
    axis
}

/// Lists marks for a screen reader.
fn list<'a>(marks: impl Iterator<Item = &'a Mark>) -> String {
    marks.map(|mark| format!("{} {}", mark.name, mark.text)).collect::<Vec<_>>().join("; ")
}

/// A line with its ends, through a value.
fn whisker(svg: &mut Svg, ends: Option<((f64, f64), (f64, f64))>, upright: bool) {
    let Some((a, b)) = ends else { return };
    svg.line(a, b, "whisker");
    let (dx, dy) = if upright { (3.5, 0.0) } else { (0.0, 3.5) };
    [a, b].iter().for_each(|(x, y)| svg.line((x - dx, y - dy), (x + dx, y + dy), "whisker"));
}

/// One line a mark, with a dot where it lies; `zero` names what lies at 0.
pub fn dots(heads: &Heads<'_>, marks: &[Mark], range: (f64, f64), zero: Option<&str>) -> String {
    let (top, bottom) = (30.0, 30.0 + ROW * marks.len() as f64);
    let mut svg = empty(heads, bottom + if zero.is_some() { 42.0 } else { 24.0 });
    let range = if zero.is_some() { (range.0.min(0.0), range.1.max(0.0)) } else { range };
    let axis = across(&mut svg, range, (top, bottom));
    if let Some(name) = zero {
        svg.line((axis.at(0.0), top - 3.0), (axis.at(0.0), bottom + 3.0), "zero");
        // Whole wherever zero lies.
        let (half, at) = (text_width(name) as f64 / 2.0, axis.at(0.0));
        svg.name(
            at.clamp(half.min(WIDTH / 2.0), (WIDTH - half).max(WIDTH / 2.0)),
            bottom + 34.0,
            "small soft middle",
            WIDTH,
            name,
        );
    }
    for (i, mark) in marks.iter().enumerate() {
        let middle = top + ROW * (i as f64 + 0.5);
        svg.name(0.0, middle + 4.0, "", 92.0, &mark.name);
        whisker(&mut svg, mark.ends.map(|(low, high)| ((axis.at(low), middle), (axis.at(high), middle))), false);
        svg.dot((axis.at(mark.value), middle), "s0", &format!("{}: {}", mark.name, mark.text));
        svg.text(WIDTH, middle + 4.0, "small end", first_word(&mark.text));
    }
    svg.finish(&format!("{}: {}", heads.label, list(marks.iter())))
}

/// The value of a text that goes on with its doubt.
fn first_word(text: &str) -> &str {
    text.split(' ').next().unwrap_or_default()
}

/// Two bars a line: what the first task lost and what the second gained.
pub fn bars(heads: &Heads<'_>, pairs: &[[Mark; 2]]) -> String {
    let height = 44.0;
    let (top, bottom) = (30.0, 30.0 + height * pairs.len() as f64);
    let mut svg = empty(heads, bottom + 24.0);
    let (low, high) = reach(pairs.iter().flatten());
    let axis = across(&mut svg, (low.min(0.0), high.max(0.0)), (top, bottom));
    for (i, pair) in pairs.iter().enumerate() {
        let middle = top + height * (i as f64 + 0.5);
        svg.name(0.0, middle + 4.0, "", 92.0, &pair[0].name);
        for (j, mark) in pair.iter().enumerate() {
            let y = middle - 15.0 + 16.0 * j as f64;
            let (zero, end) = (axis.at(0.0), axis.at(mark.value));
            let title = format!("{}, {}: {}", mark.name, ["ΔA", "ΔB"][j], mark.text);
            svg.rect((zero.min(end), y, (end - zero).abs().max(0.5), 14.0), &series(j), &title);
            whisker(&mut svg, mark.ends.map(|(low, high)| ((axis.at(low), y + 7.0), (axis.at(high), y + 7.0))), false);
            svg.text(WIDTH, y + 11.0, "small end", first_word(&mark.text));
        }
    }
    svg.line((axis.at(0.0), top - 3.0), (axis.at(0.0), bottom + 3.0), "zero");
    let words = pairs.iter().map(|[a, b]| format!("{} ΔA {}, ΔB {}", a.name, a.text, b.text));
    svg.finish(&format!("{}: {}", heads.label, words.collect::<Vec<_>>().join("; ")))
}

/// A line of a chart: its points by x.
pub struct Line {
    /// The series.
    pub name: String,
    /// x and the value there.
    pub points: Vec<(f64, Mark)>,
}

/// Lines over an axis called `across`, whose equal steps are equal factors where `log` says so.
pub fn lines(heads: &Heads<'_>, across: &str, log: bool, lines: &[Line]) -> String {
    let (left, top, right, bottom) = (44.0, 34.0, WIDTH - 12.0, 190.0);
    let mut svg = empty(heads, bottom + 40.0);
    let all = || lines.iter().flat_map(|line| &line.points);
    let (low, high) = reach(all().map(|(_, mark)| mark));
    let y = Axis::new(low, high, (bottom, top), 4);
    for (value, text) in y.marks() {
        svg.line((left, y.at(value)), (right, y.at(value)), "grid");
        svg.text(left - 6.0, y.at(value) + 4.0, "small soft end", &text);
    }
    let place = |x: f64| if log { x.log10() } else { x };
    let (from, to) = range(all().map(|(x, _)| place(*x)));
    let x = Axis::exact(from, to, (left + 12.0, right - 12.0));
    ticks(&mut svg, all().map(|(at, _)| (x.at(place(*at)), *at)).collect(), bottom);
    svg.name((left + right) / 2.0, bottom + 36.0, "small soft middle", right - left, across);
    for (i, line) in lines.iter().enumerate() {
        // Lines stand a little apart, so that ends at one x do not hide each other.
        let aside = 3.0 * (i as f64 - (lines.len() - 1) as f64 / 2.0);
        let at = |(at, mark): &(f64, Mark)| (x.at(place(*at)) + aside, y.at(mark.value));
        svg.curve(&line.points.iter().map(at).collect::<Vec<_>>(), &series(i), &line.name);
        for point in &line.points {
            let (middle, mark) = (at(point), &point.1);
            whisker(&mut svg, mark.ends.map(|(low, high)| ((middle.0, y.at(low)), (middle.0, y.at(high)))), true);
            svg.dot(middle, &series(i), &format!("{} at {}: {}", mark.name, point.0, mark.text));
        }
    }
    let words = lines.iter().map(|line| {
        let points = line.points.iter().map(|(at, mark)| format!("{} at {at}", mark.text)).collect::<Vec<_>>();
        format!("{}: {}", line.name, points.join(", "))
    });
    svg.finish(&format!("{} by {across}. {}", heads.label, words.collect::<Vec<_>>().join("; ")))
}

/// The x of every point, where there is room for its number.
fn ticks(svg: &mut Svg, mut places: Vec<(f64, f64)>, bottom: f64) {
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = f64::NEG_INFINITY;
    for (at, value) in places {
        let text = value.to_string();
        let half = text_width(&text) as f64 / 2.0;
        if at - half > free {
            svg.text(at, bottom + 17.0, "small soft middle", &text);
            free = at + half + 4.0;
        }
    }
}
