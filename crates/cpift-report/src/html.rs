//! HTML that is one file: everything from outside is escaped here, and the page asks for nothing and runs nothing.

use std::fmt::Write as _;

/// No script runs and nothing is fetched, whatever a model's output holds.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";
const STYLE: &str = include_str!("style.css");

/// Text as it may stand in HTML, in elements and in quoted attributes, its control characters as [`symbols`].
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in symbols(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Text whose control characters are shown as their pictures, and those that turn the direction of writing by their code: what a model
/// wrote cannot rearrange what stands around it.
pub fn symbols(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            '\u{7f}' => out.push('\u{2421}'),
            c if c < ' ' => out.push(char::from_u32(0x2400 + u32::from(c)).unwrap_or('\u{fffd}')),
            '\u{80}'..='\u{9f}'
            | '\u{61c}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{2066}'..='\u{2069}'
            | '\u{feff}'
            | '\u{fffe}'
            | '\u{ffff}' => {
                let _ = write!(out, "⟨U+{:04X}⟩", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

/// A whole page. `body` is HTML.
pub fn page(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n{body}</body>\n</html>\n"
    )
}

/// A paragraph of text.
pub fn paragraph(text: &str) -> String {
    format!("<p>{}</p>\n", escape(text))
}

/// A paragraph that says what is not there.
pub fn missing(text: &str) -> String {
    format!("<p class=\"missing\">{}</p>\n", escape(text))
}

/// Text of several lines, with its own spaces.
pub fn verbatim(text: &str) -> String {
    // A line break right after <pre> is not shown: one is added, so that the text's own is.
    format!("<pre>\n{}</pre>", escape(text))
}

/// What a reader opens to see more. `body` is HTML.
pub fn details(summary: &str, body: &str) -> String {
    format!("<details>\n<summary>{}</summary>\n{body}</details>\n", escape(summary))
}

/// A table with a caption; the first column names the rows.
pub struct Table {
    header: Vec<String>,
    rows: String,
    caption: String,
    text_columns: Vec<usize>,
    name_columns: Vec<usize>,
}

impl Table {
    /// A table with these column names; what follows a line break in one is set small. Columns are of numbers unless
    /// [`Table::text_column`] says otherwise.
    pub fn new(caption: &str, header: &[String]) -> Self {
        let (header, caption) = (header.to_vec(), caption.to_owned());
        Self { header, rows: String::new(), caption, text_columns: Vec::new(), name_columns: Vec::new() }
    }

    /// Makes a column flush left.
    #[must_use]
    pub fn text_column(mut self, column: usize) -> Self {
        self.text_columns.push(column);
        self
    }

    /// Makes a column of short names flush left.
    #[must_use]
    pub fn name_column(mut self, column: usize) -> Self {
        self.name_columns.push(column);
        self
    }

    fn class(&self, column: usize) -> &'static str {
        match () {
            () if self.text_columns.contains(&column) => " class=\"text\"",
            () if self.name_columns.contains(&column) => " class=\"name\"",
            () => "",
        }
    }

    /// Adds a row of plain text.
    pub fn row(&mut self, cells: &[String]) {
        self.html_row(cells.iter().map(|text| escape(text)));
    }

    /// Adds a row of HTML.
    pub fn html_row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push_str("<tr>");
        for (i, cell) in cells.into_iter().enumerate() {
            let _ = match i {
                0 => write!(self.rows, "<th scope=\"row\">{cell}</th>"),
                i => write!(self.rows, "<td{}>{cell}</td>", self.class(i)),
            };
        }
        self.rows.push_str("</tr>\n");
    }

    /// The table, in a box that scrolls by itself (and by keyboard) where the window is narrow.
    pub fn finish(self) -> String {
        let name = |(i, name): (usize, &String)| {
            let name = escape(name).replacen('\n', "<small>", 1);
            let end = if name.contains("<small>") { "</small>" } else { "" };
            format!("<th scope=\"col\"{}>{name}{end}</th>", self.class(i))
        };
        let header: String = self.header.iter().enumerate().map(name).collect();
        let (caption, rows) = (escape(&self.caption), &self.rows);
        format!(
            "<div class=\"scroll\" role=\"region\" aria-label=\"{caption}\" tabindex=\"0\">\n<table>\n\
             <caption><span>{caption}</span></caption>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
        )
    }
}

/// Pictures of one kind with what they mean, and the numbers behind them. `caption` and `more` are HTML.
pub fn figure(pictures: &[String], caption: &str, tables: Vec<Table>) -> String {
    let tables: String = tables.into_iter().map(Table::finish).collect();
    let tiles: String = pictures.iter().map(|svg| format!("<div class=\"tile\">{svg}</div>\n")).collect();
    format!(
        "<figure>\n<div class=\"tiles\">\n{tiles}</div>\n<figcaption>{caption}</figcaption>\n{}</figure>\n",
        details("The numbers as a table", &tables)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_act_is_shown_instead() {
        assert_eq!(escape("<a b='c' d=\"e\">&"), "&lt;a b=&#39;c&#39; d=&quot;e&quot;&gt;&amp;");
        assert_eq!(escape("\u{0}\u{1b}[1m\n\t\u{7f}"), "␀␛[1m\n\t␡");
        assert_eq!(escape("a\u{202e}b\u{2066}"), "a⟨U+202E⟩b⟨U+2066⟩");
        assert_eq!(escape("{{ 7 * 7 }} {% x %} ‘æ汉’"), "{{ 7 * 7 }} {% x %} ‘æ汉’");
    }
}
