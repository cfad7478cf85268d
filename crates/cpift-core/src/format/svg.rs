//! Heat maps as SVG pictures: readable on their own, in light and in dark, in every viewer.

use std::fmt::Write;

/// The type of labels is 13 pixels high, of notes 12.
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

/// Room around the drawing.
const MARGIN: usize = 16;

/// Longest label that is drawn whole, in characters.
const LABEL: usize = 44;

/// A colour by its red, green and blue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rgb(pub u8, pub u8, pub u8);

/// The colour of cells that have no value to show.
pub const GREY: Rgb = Rgb(0xdf, 0xe3, 0xe8);

impl Rgb {
    fn hex(self) -> String {
        format!("#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }

    /// The class of text on this colour: whichever of dark and light stands out more (WCAG 2 contrast).
    fn ink(self) -> &'static str {
        let linear = |c: u8| (f64::from(c) / 255.0).powf(2.2);
        let light = 0.2126 * linear(self.0) + 0.7152 * linear(self.1) + 0.0722 * linear(self.2);
        if (light + 0.05) / (0.013 + 0.05) >= 1.05 / (light + 0.05) { "on-light" } else { "on-dark" }
    }
}

/// From values to colours.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// 0 (pale) to this value (dark).
    Sequential(f64),
    /// Minus this value (blue) over 0 (pale) to this value (red).
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

    /// Where a value lies on the scale, 0 to 1; values beyond its ends lie on them.
    fn place(self, value: f64) -> f64 {
        let place = match self {
            Self::Sequential(max) => value / max,
            Self::Diverging(limit) => 0.5 + value / limit / 2.0,
        };
        if place.is_nan() { 0.0 } else { place.clamp(0.0, 1.0) }
    }

    /// The colour of a value.
    pub fn color(self, value: f64) -> Rgb {
        let stops = self.stops();
        let at = self.place(value) * (stops.len() - 1) as f64;
        let below = (at as usize).min(stops.len() - 2);
        let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * (at - below as f64)).round() as u8;
        let (a, b) = (stops[below], stops[below + 1]);
        Rgb(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
    }
}

/// A coloured rectangle with a value on it.
pub struct Cell<'a> {
    /// Left, top, width, height.
    pub place: (usize, usize, usize, usize),
    /// Its colour.
    pub color: Rgb,
    /// What is written on it; may be empty.
    pub text: &'a str,
    /// What a viewer says when the pointer rests on it.
    pub title: &'a str,
}

/// A picture being drawn; it grows with what is drawn on it.
pub struct Picture {
    title: String,
    body: String,
    right: usize,
    bottom: usize,
}

impl Picture {
    /// A picture with a headline. `title` is what a screen reader says of it.
    pub fn new(headline: &str, title: &str) -> Self {
        let mut picture = Self { title: title.to_owned(), body: String::new(), right: 0, bottom: 0 };
        picture.text((MARGIN, 30), "head", headline);
        picture
    }

    fn grow(&mut self, right: usize, bottom: usize) {
        (self.right, self.bottom) = (self.right.max(right), self.bottom.max(bottom));
    }

    /// Text with its baseline at `at`, in the classes of the style sheet (`head`, `small`, `tiny`, `middle`, `end`).
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

    /// A label that ends at `at`, cut where it is very long.
    pub fn row_label(&mut self, at: (usize, usize), text: &str) {
        self.label(&format!("class=\"end\" x=\"{}\" y=\"{}\"", at.0, at.1), text);
    }

    /// A label over a column of this width: upright where it fits, leaning to the right otherwise. [`label_height`] says how
    /// much room it takes above `at`, the middle of the column.
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

    /// A cell with its value in the middle.
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

    /// A frame around cells.
    pub fn frame(&mut self, (x, y, width, height): (usize, usize, usize, usize)) {
        let _ = writeln!(
            self.body,
            "<rect class=\"frame\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"none\"/>"
        );
    }

    /// The colours of `scale` as a bar that begins at `at`, with these values marked under it.
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

    /// Lines of notes below what is drawn so far.
    pub fn notes(&mut self, lines: &[String]) {
        for line in lines {
            let y = self.bottom + 16;
            self.text((MARGIN, y), "small", line);
        }
    }

    /// Where what is drawn so far ends at the bottom.
    pub fn bottom(&self) -> usize {
        self.bottom
    }

    /// The picture as an SVG document.
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

/// Room that labels take beside their rows.
pub fn label_width<'a>(labels: impl IntoIterator<Item = &'a str>) -> usize {
    labels.into_iter().map(|l| text_width(&shortened(l, LABEL))).max().unwrap_or(0)
}

/// Room that labels take above their columns of this width.
pub fn label_height<'a>(labels: impl IntoIterator<Item = &'a str>, width: usize) -> usize {
    let height = |label: &str| if text_width(label) <= width { 16 } else { 14 + label_width([label]) * 3 / 4 };
    labels.into_iter().map(height).max().unwrap_or(0)
}

/// Text of at most `longest` characters.
pub fn shortened(text: &str, longest: usize) -> String {
    if text.chars().count() <= longest {
        return text.to_owned();
    }
    text.chars().take(longest - 1).chain(['…']).collect()
}

/// Width of 13-pixel text, on the safe side: scripts like Chinese have characters as wide as they are high.
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

/// Text as it may stand in XML; characters XML cannot hold are replaced.
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
    fn colours_run_from_end_to_end_and_carry_readable_text() {
        let scale = Scale::Sequential(2.0);
        assert_eq!(
            (scale.color(0.0), scale.color(2.0), scale.color(9.0)),
            (SEQUENTIAL[0], SEQUENTIAL[3], SEQUENTIAL[3])
        );
        assert_eq!((scale.color(0.0).ink(), scale.color(2.0).ink()), ("on-light", "on-dark"));
        let scale = Scale::Diverging(3.0);
        assert_eq!((scale.color(-9.0), scale.color(0.0), scale.color(3.0)), (DIVERGING[0], DIVERGING[2], DIVERGING[4]));
        // Nothing to compare with: 0/0 is the low end.
        assert_eq!(Scale::Sequential(0.0).color(0.0), SEQUENTIAL[0]);
    }

    #[test]
    fn long_labels_are_cut_and_keep_their_whole_name_as_a_title() {
        let name = "n".repeat(60);
        let mut picture = Picture::new("x", "x");
        picture.row_label((400, 20), &name);
        let svg = picture.finish();
        assert!(svg.contains(&format!("<title>{name}</title>{}…</text>", "n".repeat(43))), "{svg}");
    }
}
