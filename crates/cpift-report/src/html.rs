//! Building blocks of a page that is one file: it loads nothing and runs nothing. Plots are inline
//! SVG, with colours as classes of the page's style sheet, which has them for light, dark and
//! print.

use cpift_core::format::svg::{Canvas, text_width};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::sheet::symbols;

/// Content security policy: no script runs and nothing is fetched, whatever a model's output
/// contains.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";
const STYLE: &str = include_str!("style.css");

/// A whole page. Control characters anywhere on it are replaced by [`symbols`].
pub(crate) fn page(title: &str, body: &Markup) -> String {
    let page = html! {
        (DOCTYPE) "\n"
        html lang="en" {
            "\n"
            head {
                "\n"
                meta charset="utf-8"; "\n"
                meta http-equiv="Content-Security-Policy" content=(POLICY); "\n"
                meta name="viewport" content="width=device-width, initial-scale=1"; "\n"
                meta name="color-scheme" content="light dark"; "\n"
                title { (title) } "\n"
                style { "\n" (PreEscaped(STYLE)) } "\n"
            }
            "\n"
            body { "\n" (body) } "\n"
        }
        "\n"
    };
    symbols(&page.into_string())
}

/// A section of a page, under a heading that is its name for screen readers and the target of
/// links.
pub(crate) fn section(id: &str, title: &str, body: &Markup) -> Markup {
    html! { section aria-labelledby=(id) { "\n" h2 id=(id) { (title) } "\n" (body) } "\n" }
}

/// A paragraph of text.
pub(crate) fn paragraph(text: &str) -> Markup {
    html! { p { (text) } "\n" }
}

/// A paragraph that says what is missing.
pub(crate) fn missing(text: &str) -> Markup {
    html! { p.missing { (text) } "\n" }
}

/// A list of notes in small print.
pub(crate) fn notes(class: &str, notes: impl IntoIterator<Item = impl AsRef<str>>) -> Markup {
    html! { ul class=(class) { "\n" @for note in notes { li { (note.as_ref()) } "\n" } } "\n" }
}

/// Text of several lines, with its own spaces.
pub(crate) fn verbatim(text: &str) -> Markup {
    // Parsers drop a line break right after <pre>. This one is for them, so that the text's own
    // stays.
    html! { pre { "\n" (text) } }
}

/// A part of the page that is closed until the reader opens it.
pub(crate) fn details(summary: &str, body: &Markup) -> Markup {
    html! { details { "\n" summary { (summary) } "\n" (body) } "\n" }
}

/// A box that scrolls by itself, by keyboard too, where the window is narrow.
pub(crate) fn scrolling(label: &str, content: &Markup) -> Markup {
    html! { div.scroll role="region" aria-label=(label) tabindex="0" { (content) } }
}

/// A drawing in a box that scrolls, for one that must not shrink; `label` is what a screen reader
/// says of it.
pub(crate) fn scrolling_picture(canvas: Canvas, size: (f64, f64), label: &str) -> Markup {
    scrolling(label, &PreEscaped(canvas.finish(size, "whole", label)))
}

/// A table with a caption; the first column names the rows.
pub(crate) struct Table {
    header: Vec<String>,
    rows: Vec<Vec<Markup>>,
    caption: String,
    text_columns: Vec<usize>,
    name_columns: Vec<usize>,
}

impl Table {
    /// A table with these column names; the part of one after a line break is set small. Columns
    /// hold numbers unless [`Table::text_column`] or [`Table::name_column`] says otherwise.
    pub(crate) fn new(caption: &str, header: &[String]) -> Self {
        let (header, caption) = (header.to_vec(), caption.to_owned());
        Self { header, rows: Vec::new(), caption, text_columns: Vec::new(), name_columns: Vec::new() }
    }

    /// Makes a column flush left.
    pub(crate) fn text_column(mut self, column: usize) -> Self {
        self.text_columns.push(column);
        self
    }

    /// Makes a column of short names flush left.
    pub(crate) fn name_column(mut self, column: usize) -> Self {
        self.name_columns.push(column);
        self
    }

    fn class(&self, column: usize) -> Option<&'static str> {
        match () {
            () if self.text_columns.contains(&column) => Some("text"),
            () if self.name_columns.contains(&column) => Some("name"),
            () => None,
        }
    }

    /// Adds a row of plain text.
    pub(crate) fn row(&mut self, cells: &[String]) {
        self.markup_row(cells.iter().map(|text| html! { (text) }));
    }

    /// Adds a row.
    pub(crate) fn markup_row(&mut self, cells: impl IntoIterator<Item = Markup>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table, in a box that scrolls.
    pub(crate) fn markup(&self) -> Markup {
        let head = |(i, name): (usize, &String)| {
            let (name, unit) = name.split_once('\n').map_or((name.as_str(), None), |(name, unit)| (name, Some(unit)));
            html! { th scope="col" class=[self.class(i)] { (name) @if let Some(unit) = unit { small { (unit) } } } }
        };
        let table = html! {
            "\n"
            table {
                "\n"
                caption { span { (self.caption) } } "\n"
                thead { tr { @for column in self.header.iter().enumerate() { (head(column)) } } } "\n"
                tbody {
                    "\n"
                    @for row in &self.rows {
                        tr {
                            @for (i, cell) in row.iter().enumerate() {
                                @if i == 0 { th scope="row" { (cell) } } @else { td class=[self.class(i)] { (cell) } }
                            }
                        }
                        "\n"
                    }
                }
                "\n"
            }
            "\n"
        };
        html! { (scrolling(&self.caption, &table)) "\n" }
    }
}

/// Pictures of one kind with their caption, and their numbers as tables behind them.
pub(crate) fn figure(pictures: &[Markup], caption: &Markup, tables: &[Table]) -> Markup {
    html! {
        figure {
            "\n"
            div.tiles { "\n" @for picture in pictures { div.tile { (picture) } "\n" } } "\n"
            figcaption { (caption) } "\n"
            (details("The numbers as a table", &html! { @for table in tables { (table.markup()) } }))
        }
        "\n"
    }
}

/// The colours of a scale in a row, classes `prefix` 0 to 8, with the meaning of its ends and
/// middle.
pub(crate) fn scale_legend(prefix: char, [low, middle, high]: [&str; 3]) -> Markup {
    html! {
        span.legend {
            span { (low) }
            span.ramp aria-hidden="true" { @for step in 0..STEPS { i class={ (prefix) (step) } {} } }
            span { (high) }
            @if !middle.is_empty() { span.note { (middle) } }
        }
    }
}

/// The colours of series: a class `s0`… each.
pub(crate) fn series_legend<'a>(names: impl IntoIterator<Item = (usize, &'a str)>) -> Markup {
    html! {
        ul.series { @for (i, name) in names { li { i class=(series(i)) aria-hidden="true" {} (name) } } }
    }
}

/// Steps of a colour scale; the style sheet has as many classes `q0`… (sequential) and `d0`…
/// (diverging).
pub(crate) const STEPS: usize = 9;

/// The sequential class of `value` between 0 and `max`.
pub(crate) fn sequential(value: f64, max: f64) -> String {
    format!("q{}", step(if max > 0.0 { value / max } else { 0.0 }))
}

/// The diverging class of `value` between `-reach` and `reach`.
pub(crate) fn diverging(value: f64, reach: f64) -> String {
    format!("d{}", step(0.5 + if reach > 0.0 { value / reach / 2.0 } else { 0.0 }))
}

fn step(share: f64) -> usize {
    (share.clamp(0.0, 1.0) * (STEPS - 1) as f64).round() as usize
}

/// The class of the series at `index`; colours repeat after eight, with another dash.
pub(crate) fn series(index: usize) -> String {
    format!("s{} k{}", index % 8, index / 8 % 3)
}

/// A drawing as an element of the page; `label` is what a screen reader says of it.
pub(crate) fn picture(canvas: Canvas, size: (f64, f64), label: &str) -> Markup {
    PreEscaped(canvas.finish(size, "", label))
}

/// A linear axis with round marks.
#[derive(Debug, Clone)]
pub(crate) struct Axis {
    /// The least value shown.
    low: f64,
    /// The largest value shown.
    high: f64,
    /// Pixels of the least and largest value.
    ends: (f64, f64),
    step: f64,
}

impl Axis {
    /// An axis that contains `low` and `high`, widened to round numbers with about `marks` of them.
    pub(crate) fn new(low: f64, high: f64, ends: (f64, f64), marks: usize) -> Self {
        let span = if high - low > 0.0 { high - low } else { low.abs().max(1.0) };
        let rough = span / marks as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * power).find(|s| *s >= rough * 0.999).unwrap_or(rough);
        let (from, to) = ((low / step + 1e-9).floor() * step, (high / step - 1e-9).ceil() * step);
        Self { low: from, high: if to > from { to } else { from + step }, ends, step }
    }

    /// An axis from `low` to `high`, not widened.
    pub(crate) fn exact(low: f64, high: f64, ends: (f64, f64)) -> Self {
        Self { low, high: if high > low { high } else { low + 1.0 }, ends, step: high - low }
    }

    /// The pixel of a value.
    pub(crate) fn at(&self, value: f64) -> f64 {
        let share = (value - self.low) / (self.high - self.low);
        self.ends.0 + share.clamp(0.0, 1.0) * (self.ends.1 - self.ends.0)
    }

    /// The round numbers on the axis, with their text.
    pub(crate) fn marks(&self) -> Vec<(f64, String)> {
        let count = ((self.high - self.low) / self.step).round() as usize;
        let digits = (-self.step.log10().floor()).clamp(0.0, 9.0) as usize;
        let mark = |i: usize| self.low + i as f64 * self.step;
        (0..=count).map(|i| (mark(i), format!("{:.digits$}", mark(i) + 0.0).replace('-', "−"))).collect()
    }
}

/// Width of every plot: a telephone shows it whole.
pub(crate) const WIDTH: f64 = 336.0;
/// Height of a row of dots or bars.
const ROW: f64 = 26.0;
/// Room for names, and for values at the right end of a row.
const NAMES: f64 = 92.0;
const VALUES: f64 = 58.0;

/// A value on a plot.
pub(crate) struct Mark {
    /// Name of what it belongs to.
    pub(crate) name: String,
    /// The value, in the unit that tables show.
    pub(crate) value: f64,
    /// Ends of the line through it.
    pub(crate) ends: Option<(f64, f64)>,
    /// Its text in the tables.
    pub(crate) text: String,
}

impl Mark {
    fn reach(&self) -> [f64; 3] {
        self.ends.map_or([self.value; 3], |(low, high)| [self.value, low, high])
    }

    /// The value of the text, without its uncertainty.
    fn short_text(&self) -> &str {
        self.text.split(' ').next().unwrap_or_default()
    }
}

/// The least and largest of `values`; 0 and 0 if there are none.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let ends = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if ends.0 <= ends.1 { ends } else { (0.0, 0.0) }
}

/// The range of marks with their ends.
pub(crate) fn reach<'a>(marks: impl Iterator<Item = &'a Mark>) -> (f64, f64) {
    range(marks.flat_map(Mark::reach))
}

/// Headline of a plot, and the unit of its axis.
pub(crate) struct Heads<'a> {
    /// The headline.
    pub(crate) head: &'a str,
    /// The unit.
    pub(crate) unit: &'a str,
    /// Text for screen readers, before the values.
    pub(crate) label: String,
}

impl Heads<'_> {
    fn canvas(&self) -> Canvas {
        let mut canvas = Canvas::default();
        canvas.name(0.0, 14.0, "head", WIDTH - text_width(self.unit) as f64 - 12.0, self.head);
        canvas.text(WIDTH, 14.0, "small soft end", self.unit);
        canvas
    }

    fn finish(&self, canvas: Canvas, height: f64, values: &[String]) -> Markup {
        picture(canvas, (WIDTH, height), &format!("{}: {}", self.label, values.join("; ")))
    }
}

/// Draws a horizontal axis from `left`, with its marks under `bottom`.
fn across(canvas: &mut Canvas, left: f64, (low, high): (f64, f64), (top, bottom): (f64, f64)) -> Axis {
    let axis = Axis::new(low, high, (left, WIDTH - VALUES), 3);
    for (value, text) in axis.marks() {
        canvas.line((axis.at(value), top), (axis.at(value), bottom), "grid");
        canvas.text(axis.at(value), bottom + 16.0, "small soft middle", &text);
    }
    axis
}

fn zero_line(canvas: &mut Canvas, axis: &Axis, (top, bottom): (f64, f64)) {
    canvas.line((axis.at(0.0), top - 3.0), (axis.at(0.0), bottom + 3.0), "zero");
}

/// Draws a line with short bars at its ends, horizontally at `y`.
fn whisker(canvas: &mut Canvas, axis: &Axis, ends: Option<(f64, f64)>, y: f64) {
    let Some((low, high)) = ends else { return };
    let [a, b] = [axis.at(low), axis.at(high)];
    canvas.line((a, y), (b, y), "whisker");
    [a, b].iter().for_each(|x| canvas.line((*x, y - 3.5), (*x, y + 3.5), "whisker"));
}

/// As [`whisker`], vertically at `x`.
fn upright_whisker(canvas: &mut Canvas, axis: &Axis, ends: Option<(f64, f64)>, x: f64) {
    let Some((low, high)) = ends else { return };
    let [a, b] = [axis.at(low), axis.at(high)];
    canvas.line((x, a), (x, b), "whisker");
    [a, b].iter().for_each(|y| canvas.line((x - 3.5, *y), (x + 3.5, *y), "whisker"));
}

/// One row per mark, with a dot at its value; `zero` is the name of what is at 0.
pub(crate) fn dots(heads: &Heads<'_>, marks: &[Mark], range: (f64, f64), zero: Option<&str>) -> Markup {
    let (top, bottom) = (30.0, 30.0 + ROW * marks.len() as f64);
    let mut canvas = heads.canvas();
    let range = if zero.is_some() { (range.0.min(0.0), range.1.max(0.0)) } else { range };
    let axis = across(&mut canvas, NAMES + 8.0, range, (top, bottom));
    if let Some(name) = zero {
        zero_line(&mut canvas, &axis, (top, bottom));
        // The name stays inside the plot wherever zero is.
        let half = text_width(name) as f64 / 2.0;
        let at = axis.at(0.0).clamp(half.min(WIDTH / 2.0), (WIDTH - half).max(WIDTH / 2.0));
        canvas.name(at, bottom + 34.0, "small soft middle", WIDTH, name);
    }
    for (i, mark) in marks.iter().enumerate() {
        let middle = top + ROW * (i as f64 + 0.5);
        canvas.name(0.0, middle + 4.0, "", NAMES, &mark.name);
        whisker(&mut canvas, &axis, mark.ends, middle);
        canvas.dot((axis.at(mark.value), middle), "s0", &format!("{}: {}", mark.name, mark.text));
        canvas.text(WIDTH, middle + 4.0, "small end", mark.short_text());
    }
    let values: Vec<String> = marks.iter().map(|mark| format!("{} {}", mark.name, mark.text)).collect();
    heads.finish(canvas, bottom + if zero.is_some() { 42.0 } else { 24.0 }, &values)
}

/// One bar per mark from the value 0, to the right for gains and to the left for losses.
/// `heads.head` is the task and `baseline` the name of what is at 0.
pub(crate) fn gains(heads: &Heads<'_>, marks: &[Mark], (low, high): (f64, f64), baseline: &str) -> Markup {
    let task = heads.head;
    let (top, bottom) = (34.0, 34.0 + ROW * marks.len() as f64);
    let mut canvas = Canvas::default();
    canvas.name(0.0, 14.0, "head", 200.0, task);
    canvas.text(WIDTH, 14.0, "small soft end", heads.unit);
    let names = marks.iter().map(|mark| text_width(&mark.name)).max().unwrap_or(0) as f64;
    let names = names.clamp(NAMES, NAMES + 40.0);
    let axis = across(&mut canvas, names + 8.0, (low, high), (top, bottom));
    for (i, mark) in marks.iter().enumerate() {
        let middle = top + ROW * (i as f64 + 0.5);
        let (zero, end) = (axis.at(0.0), axis.at(mark.value));
        let (class, words) = match mark.value {
            v if v < 0.0 => ("loss", "a loss"),
            v if v > 0.0 => ("gain", "a gain"),
            _ => ("gain", "no difference"),
        };
        canvas.name(0.0, middle + 4.0, "", names, &mark.name);
        let title = format!("{} on {task}: {} against {baseline}, {words}", mark.name, mark.text);
        canvas.rect((zero.min(end), middle - 7.0, (end - zero).abs().max(0.5), 14.0), class, &title);
        whisker(&mut canvas, &axis, mark.ends, middle);
        canvas.text(WIDTH, middle + 4.0, "small end", mark.short_text());
    }
    zero_line(&mut canvas, &axis, (top, bottom));
    canvas.text(axis.at(0.0), bottom + 34.0, "small soft middle", baseline);
    let values: Vec<String> = marks.iter().map(|mark| format!("{} {}", mark.name, mark.text)).collect();
    heads.finish(canvas, bottom + 42.0, &values)
}

/// Two bars per row: the changes ΔA of the first task and ΔB of the second.
pub(crate) fn bars(heads: &Heads<'_>, pairs: &[[Mark; 2]]) -> Markup {
    let height = 44.0;
    let (top, bottom) = (30.0, 30.0 + height * pairs.len() as f64);
    let mut canvas = heads.canvas();
    let (low, high) = reach(pairs.iter().flatten());
    let axis = across(&mut canvas, NAMES + 8.0, (low.min(0.0), high.max(0.0)), (top, bottom));
    for (i, pair) in pairs.iter().enumerate() {
        let middle = top + height * (i as f64 + 0.5);
        canvas.name(0.0, middle + 4.0, "", NAMES, &pair[0].name);
        for (j, mark) in pair.iter().enumerate() {
            let y = middle - 15.0 + 16.0 * j as f64;
            let (zero, end) = (axis.at(0.0), axis.at(mark.value));
            let title = format!("{}, {}: {}", mark.name, ["ΔA", "ΔB"][j], mark.text);
            canvas.rect((zero.min(end), y, (end - zero).abs().max(0.5), 14.0), &series(j), &title);
            whisker(&mut canvas, &axis, mark.ends, y + 7.0);
            canvas.text(WIDTH, y + 11.0, "small end", mark.short_text());
        }
    }
    zero_line(&mut canvas, &axis, (top, bottom));
    let values: Vec<String> = pairs.iter().map(|[a, b]| format!("{} ΔA {}, ΔB {}", a.name, a.text, b.text)).collect();
    heads.finish(canvas, bottom + 24.0, &values)
}

/// A line of a plot: its points by x.
pub(crate) struct Line {
    /// The series.
    pub(crate) name: String,
    /// x and the value there.
    pub(crate) points: Vec<(f64, Mark)>,
}

/// Lines over an axis named `across`, which is logarithmic if `log` is true.
pub(crate) fn lines(heads: &Heads<'_>, across: &str, log: bool, lines: &[Line]) -> Markup {
    let (left, top, right, bottom) = (44.0, 34.0, WIDTH - 12.0, 190.0);
    let mut canvas = heads.canvas();
    let all = || lines.iter().flat_map(|line| &line.points);
    let (low, high) = reach(all().map(|(_, mark)| mark));
    let y = Axis::new(low, high, (bottom, top), 4);
    for (value, text) in y.marks() {
        canvas.line((left, y.at(value)), (right, y.at(value)), "grid");
        canvas.text(left - 6.0, y.at(value) + 4.0, "small soft end", &text);
    }
    let place = |x: f64| if log { x.log10() } else { x };
    let (from, to) = range(all().map(|(x, _)| place(*x)));
    let x = Axis::exact(from, to, (left + 12.0, right - 12.0));
    ticks(&mut canvas, all().map(|(at, _)| (x.at(place(*at)), *at)).collect(), bottom);
    canvas.name((left + right) / 2.0, bottom + 36.0, "small soft middle", right - left, across);
    for (i, line) in lines.iter().enumerate() {
        // Lines are shifted a little, so that whiskers at one x do not cover each other.
        let aside = 3.0 * (i as f64 - (lines.len() - 1) as f64 / 2.0);
        let at = |(at, mark): &(f64, Mark)| (x.at(place(*at)) + aside, y.at(mark.value));
        canvas.curve(&line.points.iter().map(at).collect::<Vec<_>>(), &series(i), &line.name);
        for point in &line.points {
            let (middle, mark) = (at(point), &point.1);
            upright_whisker(&mut canvas, &y, mark.ends, middle.0);
            canvas.dot(middle, &series(i), &format!("{} at {}: {}", mark.name, point.0, mark.text));
        }
    }
    let values = lines.iter().map(|line| {
        let points = line.points.iter().map(|(at, mark)| format!("{} at {at}", mark.text)).collect::<Vec<_>>();
        format!("{}: {}", line.name, points.join(", "))
    });
    let label = format!("{} by {across}. {}", heads.label, values.collect::<Vec<_>>().join("; "));
    picture(canvas, (WIDTH, bottom + 40.0), &label)
}

/// Labels the x of every point, where there is room for its number.
fn ticks(canvas: &mut Canvas, mut places: Vec<(f64, f64)>, bottom: f64) {
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = f64::NEG_INFINITY;
    for (at, value) in places {
        let text = value.to_string();
        let half = text_width(&text) as f64 / 2.0;
        if at - half > free {
            canvas.text(at, bottom + 17.0, "small soft middle", &text);
            free = at + half + 4.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_texts_is_escaped_and_control_characters_are_shown() {
        let page = page("<a b='c' d=\"e\">&", &paragraph("\u{0}\u{1b}[1m<b>"));
        assert!(page.contains("<title>&lt;a b='c' d=&quot;e&quot;&gt;&amp;</title>"), "{page}");
        assert!(page.contains("<p>␀␛[1m&lt;b&gt;</p>"), "{page}");
        assert!(html! { i title=("a\"b<c") {} }.into_string().contains("\"a&quot;b&lt;c\""));
    }

    #[test]
    fn axes_have_round_marks_and_contain_their_values() {
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
}
