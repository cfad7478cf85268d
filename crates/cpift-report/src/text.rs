//! A comparison as Markdown, CSV and JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::comparison::{Cell, Column, Comparison, Delta};
use crate::html::symbols;
use crate::unit::{ANS_FORMULA, Unit};

/// How the best of a column stands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bold {
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

/// The tables, their notes and the formula.
pub fn markdown(comparison: &Comparison, bold: Bold) -> String {
    let mut out = aligned(&score_lines(comparison), bold);
    let words = format!("{} ± is one standard error. Best in bold.", comparison.rows_words());
    let _ = writeln!(out, "{}", visible(words.trim_start()));
    if let Some(name) = &comparison.question.baseline {
        let _ = writeln!(out, "\nDifference to {} ({}):\n", visible(name), comparison.interval_words());
        out.push_str(&aligned(&delta_lines(comparison), bold));
    }
    for note in &comparison.notes {
        let _ = writeln!(out, "{}", visible(note));
    }
    let _ = writeln!(out, "{ANS_FORMULA}");
    out
}

/// A cell of a table and whether it stands out.
pub type Text = (String, bool);

fn plain(text: impl AsRef<str>) -> Text {
    (visible(text.as_ref()), false)
}

/// Text from outside on one line of a table: it moves no cursor and ends no cell.
pub fn visible(text: &str) -> String {
    symbols(text).replace(['\n', '\t'], " ").replace('|', "\\|")
}

/// The name of a column.
pub fn title(column: &Column) -> String {
    match (&column.task, column.unit) {
        (Some(task), Unit::Nats) => format!("{task} nll"),
        (Some(task), unit) => format!("{task} {} {}", column.figure, unit.symbol()),
        (None, _) => column.figure.clone(),
    }
}

fn score_lines(comparison: &Comparison) -> Vec<Vec<Text>> {
    let header = [plain("model")].into_iter().chain(comparison.columns().map(|c| plain(title(c)))).collect();
    let row = |(i, run): (usize, &crate::runs::Run)| {
        let cells = comparison.columns().map(|c| (cell_text(c, i), matches!(c.cells[i], Cell::Value(_, true))));
        [plain(&run.name)].into_iter().chain(cells).collect()
    };
    [header].into_iter().chain(comparison.runs.iter().enumerate().map(row)).collect()
}

/// A cell as the tables show it.
pub fn cell_text(column: &Column, run: usize) -> String {
    match &column.cells[run] {
        Cell::Value(f, _) if column.task.is_none() || column.unit == Unit::Count => column.unit.text(f.value),
        Cell::Value(f, _) => f.shown(|x| column.unit.text(*x)),
        Cell::NotJudged => "not judged".into(),
        Cell::NoGrade => "no grade".into(),
        Cell::Missing => "-".into(),
    }
}

fn delta_lines(comparison: &Comparison) -> Vec<Vec<Text>> {
    let header = [plain("model")].into_iter().chain(comparison.columns().map(|c| plain(title(c)))).collect();
    let others = comparison.runs.iter().enumerate().filter(|(i, _)| Some(*i) != comparison.baseline());
    let row = |(i, run): (usize, &crate::runs::Run)| {
        let cells =
            comparison.columns().map(|c| plain(c.deltas[i].as_ref().map_or("-".into(), |d| delta_text(c.unit, d))));
        [plain(&run.name)].into_iter().chain(cells).collect()
    };
    [header].into_iter().chain(others.map(row)).collect()
}

/// A difference with its interval.
pub fn delta_text(unit: Unit, delta: &Delta) -> String {
    match delta.interval {
        Some((low, high)) => format!("{} [{}, {}]", unit.signed(delta.value), unit.signed(low), unit.signed(high)),
        None => unit.signed(delta.value),
    }
}

/// A Markdown table whose columns line up as plain text too; the first column is flush left.
pub fn aligned(lines: &[Vec<Text>], bold: Bold) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let (open, close) = bold.marks();
    // A terminal's marks take no room.
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

/// One line a run and figure, values as they are in scores.json.
pub fn csv(comparison: &Comparison) -> String {
    let mut out = "run,task,figure,value,stderr,n,best,delta,delta_low,delta_high,paired_rows\n".to_owned();
    for column in comparison.all_columns() {
        for (i, run) in comparison.runs.iter().enumerate() {
            let (name, task) = (quoted(&run.name), quoted(column.task.as_deref().unwrap_or("")));
            let figure = match &column.cells[i] {
                Cell::Value(f, _) if column.unit == Unit::Count => format!("{},,{},", f.value, f.n),
                Cell::Value(f, best) if column.task.is_some() => {
                    format!(
                        "{},{},{},{best}",
                        f.value,
                        f.stderr.map_or_else(String::new, |stderr| stderr.to_string()),
                        f.n
                    )
                }
                Cell::Value(f, best) => format!("{},,{},{best}", f.value, f.n),
                Cell::NotJudged => "not judged,,,".to_owned(),
                Cell::NoGrade => "no grade,,,".to_owned(),
                Cell::Missing => ",,,".to_owned(),
            };
            let delta = match column.deltas.get(i).and_then(Option::as_ref) {
                Some(Delta { value, interval: Some((low, high)), rows, .. }) => {
                    format!("{value},{low},{high},{}", if *rows > 0 { rows.to_string() } else { String::new() })
                }
                Some(Delta { value, .. }) => format!("{value},,,"),
                None => ",,,".to_owned(),
            };
            let _ = writeln!(out, "{name},{task},{},{figure},{delta}", quoted(&column.figure));
        }
    }
    out
}

/// A field of CSV (RFC 4180).
pub fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

/// The table as JSON.
pub fn json(comparison: &Comparison) -> Value {
    let row = |(i, run): (usize, &crate::runs::Run)| {
        let figure = |c: &Column| c.cells[i].figure().map(|f| f.value);
        let delta = |c: &Column| {
            let d = c.deltas.get(i)?.as_ref()?;
            Some(json!({"task": c.task, "figure": c.figure, "value": d.value, "paired_rows": d.rows,
                "interval": d.interval.map(|(low, high)| [low, high])}))
        };
        let best = comparison.columns().filter(|c| matches!(c.cells[i], Cell::Value(_, true))).map(title);
        json!({"name": run.name, "ans": figure(&comparison.ans), "mean_nll": figure(&comparison.mean_loss),
            "scores": run.scores, "best": best.collect::<Vec<_>>(),
            "deltas": comparison.all_columns().filter_map(delta).collect::<Vec<_>>()})
    };
    json!({"rows": comparison.runs.iter().enumerate().map(row).collect::<Vec<_>>(), "ans_formula": ANS_FORMULA,
        "baseline": comparison.question.baseline, "resamples": comparison.question.resamples,
        "seed": comparison.question.seed, "notes": comparison.notes})
}
