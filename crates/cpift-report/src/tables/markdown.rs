//! Comparisons and experiments as Markdown that lines up as plain text.

use std::fmt::Write as _;

use super::sheet::{Text, notes, sheets, symbols};
use crate::statistics::comparison::Comparison;
use crate::statistics::experiment::Experiment;
use crate::statistics::runs::Run;
use crate::statistics::unit::ANS_FORMULA;

/// Emphasis of the best values of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bold {
    /// `**value**`.
    Markdown,
    /// Bold type of a terminal.
    Terminal,
}

impl Bold {
    fn marks(self) -> (&'static str, &'static str) {
        match self {
            Self::Markdown => ("**", "**"),
            Self::Terminal => ("\x1b[1m", "\x1b[0m"),
        }
    }
}

/// A comparison: the tables, their notes, and the formula of ANS.
pub(crate) fn comparison(compared: &Comparison, bold: Bold) -> String {
    let mut out = aligned(&score_lines(compared), bold);
    let words = format!("{} ± is one standard error. Best in bold.", compared.rows_text());
    let _ = writeln!(out, "{}", visible(words.trim_start()));
    if let Some(name) = &compared.question.baseline {
        let _ = writeln!(out, "\nDifference to {} ({}):\n", visible(name), compared.interval_text());
        out.push_str(&aligned(&delta_lines(compared), bold));
    }
    for note in &compared.notes {
        let _ = writeln!(out, "{}", visible(note));
    }
    let _ = writeln!(out, "{ANS_FORMULA}");
    out
}

/// An experiment: title, question, tables and notes.
pub(crate) fn experiment(shown: &Experiment, bold: Bold) -> String {
    let mut out = format!("## {}\n\n{}\n", visible(&shown.head.title), visible(&shown.head.question));
    for sheet in sheets(shown) {
        let cells = |line: &[(String, bool)]| line.iter().map(|(text, best)| (visible(text), *best)).collect();
        let header: Vec<(String, bool)> = sheet.header.iter().map(|name| (visible(name), false)).collect();
        let lines: Vec<Vec<(String, bool)>> =
            [header].into_iter().chain(sheet.lines.iter().map(|line| cells(line))).collect();
        let _ = writeln!(out, "\n{}:\n\n{}", visible(&sheet.caption), aligned(&lines, bold).trim_end());
    }
    out.push('\n');
    for words in notes(shown) {
        let _ = writeln!(out, "{}", visible(&words));
    }
    out
}

fn score_lines(comparison: &Comparison) -> Vec<Vec<Text>> {
    let header = [plain("model")].into_iter().chain(comparison.columns().map(|c| plain(c.title()))).collect();
    let row = |(i, run): (usize, &Run)| {
        let cells = comparison.columns().map(|c| (c.text(i), c.is_best(i)));
        [plain(&run.name)].into_iter().chain(cells).collect()
    };
    [header].into_iter().chain(comparison.runs.iter().enumerate().map(row)).collect()
}

fn delta_lines(comparison: &Comparison) -> Vec<Vec<Text>> {
    let header = [plain("model")].into_iter().chain(comparison.columns().map(|c| plain(c.title()))).collect();
    let others = comparison.runs.iter().enumerate().filter(|(i, _)| Some(*i) != comparison.baseline());
    let row = |(i, run): (usize, &Run)| {
        let cells = comparison.columns().map(|c| plain(c.deltas[i].as_ref().map_or("-".into(), |d| d.text(c.unit))));
        [plain(&run.name)].into_iter().chain(cells).collect()
    };
    [header].into_iter().chain(others.map(row)).collect()
}

fn plain(text: impl AsRef<str>) -> Text {
    (visible(text.as_ref()), false)
}

/// Text as a cell of a Markdown table: on one line, with its bars escaped and its control
/// characters visible.
pub(crate) fn visible(text: &str) -> String {
    symbols(text).replace(['\n', '\t'], " ").replace('|', "\\|")
}

/// A Markdown table whose columns line up as plain text too; the first column is flush left.
pub(crate) fn aligned(lines: &[Vec<Text>], bold: Bold) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let (open, close) = bold.marks();
    // Escape sequences of a terminal have no width.
    let marks = if bold == Bold::Markdown { open.len() + close.len() } else { 0 };
    let wide = |(text, best): &Text| text.chars().count() + if *best { marks } else { 0 };
    let widths: Vec<usize> =
        (0..columns).map(|c| lines.iter().filter_map(|l| l.get(c)).map(wide).max().unwrap_or(0)).collect();
    let row = |line: &[Text]| {
        let cell = |(c, text): (usize, &Text)| {
            let pad = " ".repeat(widths[c] - wide(text));
            let shown = if text.1 { format!("{open}{}{close}", text.0) } else { text.0.clone() };
            if c == 0 { format!("{shown}{pad}") } else { format!("{pad}{shown}") }
        };
        let cells: Vec<String> = line.iter().enumerate().map(cell).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule = widths
        .iter()
        .enumerate()
        .map(|(c, &w)| plain(if c == 0 { "-".repeat(w) } else { format!("{}:", "-".repeat(w.saturating_sub(1))) }));
    let mut out = row(&lines[0]);
    out.push_str(&row(&rule.collect::<Vec<_>>()));
    lines[1..].iter().for_each(|line| out.push_str(&row(line)));
    out
}
