//! Heat maps as self-contained SVG pictures for light and dark color schemes.

use std::fmt::Write;

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

/// Color scale.
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

/// A picture under construction. It grows with its content.
pub struct Picture {
    title: String,
    body: String,
    right: usize,
    bottom: usize,
}

impl Picture {
    /// Creates a picture with a headline and a `title` for screen readers.
    pub fn new(headline: &str, title: &str) -> Self {
        let mut picture = Self { title: title.to_owned(), body: String::new(), right: 0, bottom: 0 };
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
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        let _ = writeln!(self.body, "<text{class} x=\"{x}\" y=\"{y}\">{}</text>", escape(text));
    }

    /// Adds a label that ends at `at`; a very long one is shortened.
    pub fn row_label(&mut self, at: (usize, usize), text: &str) {
        self.label(&format!("class=\"end\" x=\"{}\" y=\"{}\"", at.0, at.1), text);
    }

    /// Adds a label above a column of this `width`, whose center is `x`: horizontal if it fits,
    /// rotated by 45° otherwise. [`label_height`] is the room it takes above `y`.
    pub fn column_label(&mut self, (x, y): (usize, usize), width: usize, text: &str) {
        if text_width(text) <= width {
            self.label(&format!("class=\"middle\" x=\"{x}\" y=\"{y}\""), text);
        } else {
            self.grow(x + label_width([text]) * 3 / 4, y);
            self.label(&format!("transform=\"translate({} {y}) rotate(-45)\"", x + 4), text);
        }
    }

    fn label(&mut self, attributes: &str, text: &str) {
        let short = shortened(text, LABEL);
        let title = if short == text { String::new() } else { format!("<title>{}</title>", escape(text)) };
        let _ = writeln!(self.body, "<text {attributes}>{title}{}</text>", escape(&short));
    }

    /// Adds a cell with its text in the center.
    pub fn cell(&mut self, cell: &Cell<'_>) {
        let (x, y, width, height) = cell.place;
        self.grow(x + width, y + height);
        let (title, fill) = (escape(cell.title), cell.color.hex());
        let _ = write!(
            self.body,
            "<g><title>{title}</title><rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{fill}\"/>"
        );
        if !cell.text.is_empty() {
            let (x, y, ink) = (x + width / 2, y + height / 2 + 4, cell.color.ink());
            let _ = write!(
                self.body,
                "<text class=\"small middle {ink}\" x=\"{x}\" y=\"{y}\">{}</text>",
                escape(cell.text)
            );
        }
        self.body.push_str("</g>\n");
    }

    /// Adds a frame around cells.
    pub fn frame(&mut self, (x, y, width, height): (usize, usize, usize, usize)) {
        let _ = writeln!(
            self.body,
            "<rect class=\"frame\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"none\"/>"
        );
    }

    /// Adds the colors of `scale` as a bar at `(x, y)`, with these values marked below it.
    pub fn legend(&mut self, (x, y): (usize, usize), scale: Scale, marks: &[(f64, String)]) {
        const WIDTH: usize = 320;
        let stops = scale.stops();
        self.body.push_str("<linearGradient id=\"scale\">");
        for (i, stop) in stops.iter().enumerate() {
            let offset = i as f64 / (stops.len() - 1) as f64;
            let _ = write!(self.body, "<stop offset=\"{offset}\" stop-color=\"{}\"/>", stop.hex());
        }
        let _ = writeln!(
            self.body,
            "</linearGradient>\n<rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" height=\"12\" fill=\"url(#scale)\"/>"
        );
        self.grow(x + WIDTH, y + 12);
        for (value, label) in marks {
            let at = x + (scale.place(*value) * WIDTH as f64).round() as usize;
            let _ = writeln!(self.body, "<path d=\"M{at} {}v5\" stroke=\"#8a929c\"/>", y + 12);
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
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"system-ui, sans-serif\" font-size=\"13\" role=\"img\" \
             aria-labelledby=\"title\">\n<title id=\"title\">{}</title>\n<style>{STYLE}</style>\n\
             <rect class=\"paper\" width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}</svg>\n",
            escape(&self.title),
            self.body
        )
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

/// Upper estimate of the width of 13-pixel text. Chinese and similar characters are as wide as they
/// are high.
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

/// Escapes text for XML and replaces characters that XML does not allow.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
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
        assert_eq!(escape("a<b>&\"c\"\u{1}\u{ffff}"), "a&lt;b&gt;&amp;&quot;c&quot;\u{fffd}\u{fffd}");
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
}
