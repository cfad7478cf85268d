//! Building blocks of a page that is one file: it loads nothing and runs nothing.

use cpift_core::format::svg::Canvas;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::svg::{STEPS, series};
use crate::tables::sheet::symbols;

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
}
