//! SVG drawings: shapes on a canvas, and self-contained heat maps for light and dark color schemes.
//!
//! All SVG of the workspace is written here. A [`Canvas`] becomes an element of an HTML page, whose
//! style sheet colors its classes. A [`Picture`] becomes a document with its own style sheet.

use std::fmt::{Display, Write};

/// Style sheet. Labels are 13 pixels high, notes 12.
const STYLE: &str = "
  text { font: 13px system-ui, sans-serif; fill: #1b1f24 }
  .paper { fill: #ffffff } .head { font-size: 16px; font-weight: 600 } .small { font-size: 12px } .tiny { font-size: 11px }
  .middle { text-anchor: middle } .end { text-anchor: end }
  .frame { fill: none; stroke: #b4451f; stroke-width: 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e9ed } .paper { fill: #14181d } .frame { stroke: #ff9a6b }
  }
  .on-light { fill: #1b1f24 } .on-dark { fill: #ffffff }
";

/// Margin around the drawing, in pixels.
const MARGIN: usize = 16;

/// Longest label that is drawn in full, in characters.
const LABEL: usize = 44;

/// Color as red, green and blue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rgb(pub u8, pub u8, pub u8);

/// Color of cells without a value.
pub const GREY: Rgb = Rgb(0xdf, 0xe3, 0xe8);

impl Rgb {
    fn hex(self) -> String {
        format!("#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }

    /// Class of text on this color: dark or light, whichever has the higher contrast (WCAG 2).
    fn ink(self) -> &'static str {
        let linear = |c: u8| (f64::from(c) / 255.0).powf(2.2);
        let light = 0.2126 * linear(self.0) + 0.7152 * linear(self.1) + 0.0722 * linear(self.2);
        if (light + 0.05) / (0.013 + 0.05) >= 1.05 / (light + 0.05) { "on-light" } else { "on-dark" }
    }
}

/// Color scale of a heat map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// From 0 (pale) to this value (dark).
    Sequential(f64),
    /// From minus this value (blue) through 0 (pale) to this value (red).
    Diverging(f64),
}

const SEQUENTIAL: [Rgb; 4] =
    [Rgb(0xf1, 0xf5, 0xfa), Rgb(0x9c, 0xc2, 0xea), Rgb(0x3f, 0x83, 0xcf), Rgb(0x12, 0x43, 0x82)];
const DIVERGING: [Rgb; 5] =
    [Rgb(0x1d, 0x4f, 0x91), Rgb(0x8d, 0xb8, 0xe2), Rgb(0xf5, 0xf4, 0xf0), Rgb(0xf0, 0xa8, 0x82), Rgb(0xa6, 0x3a, 0x1c)];

impl Scale {
    fn stops(self) -> &'static [Rgb] {
        match self {
            Self::Sequential(_) => &SEQUENTIAL,
            Self::Diverging(_) => &DIVERGING,
        }
    }

    /// Position of a value on the scale, clamped to 0 to 1.
    fn place(self, value: f64) -> f64 {
        let place = match self {
            Self::Sequential(max) => value / max,
            Self::Diverging(limit) => 0.5 + value / limit / 2.0,
        };
        if place.is_nan() { 0.0 } else { place.clamp(0.0, 1.0) }
    }

    /// Color of a value.
    pub fn color(self, value: f64) -> Rgb {
        let stops = self.stops();
        let at = self.place(value) * (stops.len() - 1) as f64;
        let below = (at as usize).min(stops.len() - 2);
        let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * (at - below as f64)).round() as u8;
        let (a, b) = (stops[below], stops[below + 1]);
        Rgb(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
    }
}

/// Colored rectangle with a text on it.
pub struct Cell<'a> {
    /// Left, top, width and height.
    pub place: (usize, usize, usize, usize),
    /// Fill color.
    pub color: Rgb,
    /// Text on the cell; may be empty.
    pub text: &'a str,
    /// Tooltip.
    pub title: &'a str,
}

/// Formats an element with `content`, which is SVG. Empty attributes are omitted.
fn element(name: &str, attributes: &[(&str, &dyn Display)], content: &str) -> String {
    let mut out = format!("<{name}");
    for (key, value) in attributes {
        let value = escape(&value.to_string());
        if !value.is_empty() {
            let _ = write!(out, " {key}=\"{value}\"");
        }
    }
    if content.is_empty() { out + "/>" } else { format!("{out}>{content}</{name}>") }
}

/// Formats a title element, which viewers show as a tooltip; empty for an empty text.
fn title(text: &str) -> String {
    if text.is_empty() { String::new() } else { element("title", &[], &escape(text)) }
}

/// Formats a coordinate to a tenth of a pixel.
fn number(value: f64) -> String {
    let text = format!("{:.1}", value + 0.0);
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// Drawing with coordinates in pixels, one shape per line. Every shape has a class of the style
/// sheet of its page.
///
/// Markup in texts is escaped. Control characters are not: a [`Picture`] replaces them because XML
/// does not allow them, and an HTML page decides how to show them.
#[derive(Debug, Default)]
pub struct Canvas {
    body: String,
}

impl Canvas {
    fn add(&mut self, shape: &str) {
        self.body.push_str(shape);
        self.body.push('\n');
    }

    /// Adds text with its baseline at `y`.
    pub fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        self.add(&element("text", &[("class", &class), ("x", &number(x)), ("y", &number(y))], &escape(text)));
    }

    /// Adds a name of at most `width` pixels. Longer names are shortened, with the full name as
    /// their title.
    pub fn name(&mut self, x: f64, y: f64, class: &str, width: f64, name: &str) {
        let fits = (1..=name.chars().count()).rev().find(|&k| text_width(&shortened(name, k)) as f64 <= width);
        let content = titled(&shortened(name, fits.unwrap_or(1)), name);
        self.add(&element("text", &[("class", &class), ("x", &number(x)), ("y", &number(y))], &content));
    }

    /// Adds a rectangle at (left, top, width, height).
    pub fn rect(&mut self, (x, y, width, height): (f64, f64, f64, f64), class: &str, text: &str) {
        let (x, y, width, height) = (number(x), number(y), number(width), number(height));
        let place: [(&str, &dyn Display); 5] =
            [("class", &class), ("x", &x), ("y", &y), ("width", &width), ("height", &height)];
        self.add(&element("rect", &place, &title(text)));
    }

    /// Adds a straight line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        self.curve(&[from, to], class, "");
    }

    /// Adds a line through points.
    pub fn curve(&mut self, points: &[(f64, f64)], class: &str, text: &str) {
        let point = |(i, (x, y)): (usize, &(f64, f64))| {
            format!("{}{} {}", if i == 0 { "M" } else { "L" }, number(*x), number(*y))
        };
        let d: String = points.iter().enumerate().map(point).collect();
        self.add(&element("path", &[("class", &class), ("d", &d)], &title(text)));
    }

    /// Adds a dot.
    pub fn dot(&mut self, (x, y): (f64, f64), class: &str, text: &str) {
        let place: [(&str, &dyn Display); 4] =
            [("class", &class), ("cx", &number(x)), ("cy", &number(y)), ("r", &"3.5")];
        self.add(&element("circle", &place, &title(text)));
    }

    /// Returns the drawing as an element of a page. `label` is the text for screen readers; `class`
    /// may be empty.
    pub fn finish(self, (width, height): (f64, f64), class: &str, label: &str) -> String {
        let (width, height) = (number(width), number(height));
        let attributes: [(&str, &dyn Display); 6] = [
            ("role", &"img"),
            ("class", &class),
            ("aria-label", &label),
            ("viewBox", &format!("0 0 {width} {height}")),
            ("width", &width),
            ("height", &height),
        ];
        element("svg", &attributes, &format!("\n{}", self.body))
    }
}

/// Formats a shortened text, with the full text as its title if they differ.
fn titled(short: &str, whole: &str) -> String {
    (if short == whole { String::new() } else { title(whole) }) + &escape(short)
}

/// Self-contained heat map under construction. It grows with its content.
pub struct Picture {
    title: String,
    canvas: Canvas,
    right: usize,
    bottom: usize,
}

impl Picture {
    /// Creates a picture with a headline and a `title` for screen readers.
    pub fn new(headline: &str, title: &str) -> Self {
        let mut picture = Self { title: title.to_owned(), canvas: Canvas::default(), right: 0, bottom: 0 };
        picture.text((MARGIN, 30), "head", headline);
        picture
    }

    fn grow(&mut self, right: usize, bottom: usize) {
        (self.right, self.bottom) = (self.right.max(right), self.bottom.max(bottom));
    }

    /// Adds text with its baseline at `(x, y)`, in classes of the style sheet (`head`, `small`,
    /// `tiny`, `middle`, `end`).
    pub fn text(&mut self, (x, y): (usize, usize), class: &str, text: &str) {
        let width = text_width(text) * if class.contains("head") { 13 } else { 10 } / 10;
        let right = match class {
            c if c.contains("end") => x,
            c if c.contains("middle") => x + width / 2,
            _ => x + width,
        };
        self.grow(right, y + 4);
        self.canvas.text(x as f64, y as f64, class, &xml(text));
    }

    /// Adds a label that ends at `(x, y)`; a very long one is shortened.
    pub fn row_label(&mut self, (x, y): (usize, usize), text: &str) {
        self.label(&[("class", &"end"), ("x", &x), ("y", &y)], text);
    }

    /// Adds a label above a column of this `width`, whose center is `x`: horizontal if it fits,
    /// rotated by 45° otherwise. [`label_height`] is the room it takes above `y`.
    pub fn column_label(&mut self, (x, y): (usize, usize), width: usize, text: &str) {
        if text_width(text) <= width {
            self.label(&[("class", &"middle"), ("x", &x), ("y", &y)], text);
        } else {
            self.grow(x + label_width([text]) * 3 / 4, y);
            self.label(&[("transform", &format!("translate({} {y}) rotate(-45)", x + 4))], text);
        }
    }

    fn label(&mut self, attributes: &[(&str, &dyn Display)], text: &str) {
        let content = titled(&xml(&shortened(text, LABEL)), &xml(text));
        self.canvas.add(&element("text", attributes, &content));
    }

    /// Adds a cell with its text in the center.
    pub fn cell(&mut self, cell: &Cell<'_>) {
        let (x, y, width, height) = cell.place;
        self.grow(x + width, y + height);
        let place: [(&str, &dyn Display); 5] =
            [("x", &x), ("y", &y), ("width", &width), ("height", &height), ("fill", &cell.color.hex())];
        let mut content = title(&xml(cell.title)) + &element("rect", &place, "");
        if !cell.text.is_empty() {
            let class = format!("small middle {}", cell.color.ink());
            let place: [(&str, &dyn Display); 3] =
                [("class", &class), ("x", &(x + width / 2)), ("y", &(y + height / 2 + 4))];
            content += &element("text", &place, &escape(&xml(cell.text)));
        }
        self.canvas.add(&element("g", &[], &content));
    }

    /// Adds a frame around cells.
    pub fn frame(&mut self, (x, y, width, height): (usize, usize, usize, usize)) {
        let place: [(&str, &dyn Display); 6] =
            [("class", &"frame"), ("x", &x), ("y", &y), ("width", &width), ("height", &height), ("fill", &"none")];
        self.canvas.add(&element("rect", &place, ""));
    }

    /// Adds the colors of `scale` as a bar at `(x, y)`, with these values marked below it.
    pub fn legend(&mut self, (x, y): (usize, usize), scale: Scale, marks: &[(f64, String)]) {
        const WIDTH: usize = 320;
        let stops = scale.stops();
        let stop = |(i, stop): (usize, &Rgb)| {
            let offset = i as f64 / (stops.len() - 1) as f64;
            element("stop", &[("offset", &offset), ("stop-color", &stop.hex())], "")
        };
        let colors: String = stops.iter().enumerate().map(stop).collect();
        self.canvas.add(&element("linearGradient", &[("id", &"scale")], &colors));
        let bar: [(&str, &dyn Display); 5] =
            [("x", &x), ("y", &y), ("width", &WIDTH), ("height", &12), ("fill", &"url(#scale)")];
        self.canvas.add(&element("rect", &bar, ""));
        self.grow(x + WIDTH, y + 12);
        for (value, label) in marks {
            let at = x + (scale.place(*value) * WIDTH as f64).round() as usize;
            let d = format!("M{at} {}v5", y + 12);
            self.canvas.add(&element("path", &[("d", &d), ("stroke", &"#8a929c")], ""));
            self.text((at, y + 30), "tiny middle", label);
        }
    }

    /// Adds lines of notes below the current content.
    pub fn notes(&mut self, lines: &[String]) {
        for line in lines {
            let y = self.bottom + 16;
            self.text((MARGIN, y), "small", line);
        }
    }

    /// Bottom edge of the current content.
    pub fn bottom(&self) -> usize {
        self.bottom
    }

    /// Returns the SVG document.
    pub fn finish(self) -> String {
        let (width, height) = (self.right + MARGIN, self.bottom + MARGIN);
        let attributes: [(&str, &dyn Display); 8] = [
            ("xmlns", &"http://www.w3.org/2000/svg"),
            ("viewBox", &format!("0 0 {width} {height}")),
            ("width", &width),
            ("height", &height),
            ("font-family", &"system-ui, sans-serif"),
            ("font-size", &13),
            ("role", &"img"),
            ("aria-labelledby", &"title"),
        ];
        let paper: [(&str, &dyn Display); 4] =
            [("class", &"paper"), ("width", &"100%"), ("height", &"100%"), ("fill", &"#ffffff")];
        let parts = [
            element("title", &[("id", &"title")], &escape(&xml(&self.title))),
            element("style", &[], STYLE),
            element("rect", &paper, ""),
            self.canvas.body,
        ];
        element("svg", &attributes, &format!("\n{}", parts.join("\n"))) + "\n"
    }
}

/// Width of the widest row label.
pub fn label_width<'a>(labels: impl IntoIterator<Item = &'a str>) -> usize {
    labels.into_iter().map(|l| text_width(&shortened(l, LABEL))).max().unwrap_or(0)
}

/// Height of the tallest column label, for columns of this `width`.
pub fn label_height<'a>(labels: impl IntoIterator<Item = &'a str>, width: usize) -> usize {
    let height = |label: &str| if text_width(label) <= width { 16 } else { 14 + label_width([label]) * 3 / 4 };
    labels.into_iter().map(height).max().unwrap_or(0)
}

/// Shortens `text` to at most `longest` characters, with an ellipsis.
pub fn shortened(text: &str, longest: usize) -> String {
    if text.chars().count() <= longest {
        return text.to_owned();
    }
    text.chars().take(longest - 1).chain(['…']).collect()
}

/// Upper estimate of the width of 13-pixel text: Chinese and similar characters are as wide as
/// they are high.
pub fn text_width(text: &str) -> usize {
    let width = |c: char| match c {
        c if u32::from(c) >= 0x1100 => 14,
        'm' | 'w' | 'M' | 'W' | '—' | '@' | '%' => 12,
        'i' | 'l' | 'j' | 't' | 'f' | 'r' | 'I' | '.' | ',' | ':' | ' ' | '(' | ')' => 5,
        c if c.is_uppercase() => 10,
        _ => 8,
    };
    text.chars().map(width).sum()
}

/// Replaces characters that XML does not allow.
fn xml(text: &str) -> String {
    let allowed = |c: char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    text.chars().map(|c| if allowed(c) { c } else { '\u{fffd}' }).collect()
}

/// Escapes text for the content of an element or a quoted attribute.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped() {
        let shown = "a&lt;b&gt;&amp;&quot;c&quot;\u{fffd}\u{fffd}";
        assert_eq!(escape(&xml("a<b>&\"c\"\u{1}\u{ffff}")), shown);
        let mut picture = Picture::new("x", "a<b>&\"c\"\u{1}\u{ffff}");
        picture.row_label((0, 0), "a<b>&\"c\"\u{1}\u{ffff}");
        assert_eq!(picture.finish().matches(shown).count(), 2);
    }

    #[test]
    fn colors_span_the_scale_and_text_on_them_is_readable() {
        let scale = Scale::Sequential(2.0);
        assert_eq!(
            (scale.color(0.0), scale.color(2.0), scale.color(9.0)),
            (SEQUENTIAL[0], SEQUENTIAL[3], SEQUENTIAL[3])
        );
        assert_eq!((scale.color(0.0).ink(), scale.color(2.0).ink()), ("on-light", "on-dark"));
        let scale = Scale::Diverging(3.0);
        assert_eq!((scale.color(-9.0), scale.color(0.0), scale.color(3.0)), (DIVERGING[0], DIVERGING[2], DIVERGING[4]));
        // 0/0 maps to the low end.
        assert_eq!(Scale::Sequential(0.0).color(0.0), SEQUENTIAL[0]);
    }

    #[test]
    fn long_labels_are_shortened_and_keep_the_full_name_as_a_title() {
        let name = "n".repeat(60);
        let mut picture = Picture::new("x", "x");
        picture.row_label((400, 20), &name);
        let svg = picture.finish();
        assert!(svg.contains(&format!("<title>{name}</title>{}…</text>", "n".repeat(43))), "{svg}");
    }
    #[test]
    fn names_on_a_canvas_are_shortened_to_their_width_and_keep_the_full_name_as_a_title() {
        let mut canvas = Canvas::default();
        canvas.name(0.0, 0.0, "end", 60.0, "a-name-that-is-far-too-long");
        let svg = canvas.finish((10.0, 10.0), "", "x");
        assert!(svg.contains("<title>a-name-that-is-far-too-long</title>a-nam…</text>"), "{svg}");
    }
}
