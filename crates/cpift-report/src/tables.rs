//! Comparisons and experiments as text: Markdown that lines up, and CSV and JSON with values
//! unrounded.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::comparison::{ANS_FORMULA, Cell, Column, Comparison, Delta, Spread, Unit};
use crate::experiment::{self, Change, Experiment, Forgetting, Method, Outcome, SeedScores};
use crate::runs::Run;
use crate::sheet::{Text, notes, sheets, symbols};

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
pub(crate) fn comparison_markdown(compared: &Comparison, bold: Bold) -> String {
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
pub(crate) fn experiment_markdown(shown: &Experiment, bold: Bold) -> String {
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

/// A comparison as CSV: one line per run and figure, values as in scores.json.
pub(crate) fn comparison_csv(comparison: &Comparison) -> String {
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
            let delta = delta_csv(column.deltas.get(i).and_then(Option::as_ref));
            let _ = writeln!(out, "{name},{task},{},{figure},{delta}", quoted(&column.figure));
        }
    }
    out
}

/// A comparison as JSON.
pub(crate) fn comparison_json(comparison: &Comparison) -> Value {
    let row = |(i, run): (usize, &Run)| {
        let figure = |c: &Column| c.cells[i].figure().map(|f| f.value);
        let delta = |c: &Column| {
            let d = c.deltas.get(i)?.as_ref()?;
            Some(json!({"task": c.task, "figure": c.figure, "value": d.value, "paired_rows": d.rows,
                "interval": d.interval.map(|(low, high)| [low, high])}))
        };
        let best = comparison.columns().filter(|c| c.is_best(i)).map(Column::title);
        json!({"name": run.name, "ans": figure(&comparison.ans), "mean_nll": figure(&comparison.mean_loss),
            "scores": run.scores, "best": best.collect::<Vec<_>>(),
            "deltas": comparison.all_columns().filter_map(delta).collect::<Vec<_>>()})
    };
    json!({"rows": comparison.runs.iter().enumerate().map(row).collect::<Vec<_>>(), "ans_formula": ANS_FORMULA,
        "baseline": comparison.question.baseline, "resamples": comparison.question.resamples,
        "seed": comparison.question.seed, "notes": comparison.notes})
}

/// An experiment as CSV: one line per method and figure, or per method and pair of tasks.
pub(crate) fn experiment_csv(of: &Experiment) -> String {
    match &of.outcome {
        Outcome::Scores(seeds) => scores_csv(seeds),
        Outcome::Forgetting(forgetting) => forgetting_csv(forgetting),
    }
}

fn scores_csv(seeds: &SeedScores) -> String {
    let mut out =
        "method,series,x,tokens,task,figure,mean,sd,seeds,best,delta,delta_low,delta_high,paired_rows\n".to_owned();
    for column in seeds.all_columns() {
        for (i, row) in seeds.rows.iter().enumerate() {
            let (name, series) = (quoted(&row.name), quoted(row.series.as_deref().unwrap_or("")));
            let (x, tokens) = (number(row.x), row.tokens.map_or(String::new(), |n| n.to_string()));
            let (task, figure) = (quoted(column.task.as_deref().unwrap_or("")), quoted(&column.figure));
            let cell = match &column.cells[i] {
                experiment::Cell::Value(spread, best) => {
                    format!("{},{},{},{best}", spread.mean(), number(spread.sd()), spread.values.len())
                }
                experiment::Cell::Without(text) => format!("{},,,", if text == "-" { "" } else { text }),
            };
            let delta = delta_csv(column.deltas.get(i).and_then(Option::as_ref));
            let _ = writeln!(out, "{name},{series},{x},{tokens},{task},{figure},{cell},{delta}");
        }
    }
    out
}

fn number(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

fn forgetting_csv(forgetting: &Forgetting) -> String {
    let mut out = "method,first,second,runs,delta_a,delta_a_sd,delta_b,delta_b_sd,cut,cut_low,cut_high\n".to_owned();
    let mut line = |method: &Method, pair: [&str; 2], first: &Spread, second: &Spread, cut: &str| {
        let changes = [first, second].map(|spread| format!("{},{}", spread.mean(), number(spread.sd()))).join(",");
        let [a, b] = pair.map(quoted);
        let _ = writeln!(out, "{},{a},{b},{},{changes},{cut}", quoted(&method.name), first.values.len());
    };
    for method in &forgetting.methods {
        let cut = method.cut.as_ref().map_or(",,".to_owned(), |cut| {
            let (low, high) = cut.interval.unzip();
            format!("{},{},{}", cut.value, number(low), number(high))
        });
        line(method, [""; 2], &method.first, &method.second, &cut);
        for pair in forgetting.pairs.iter().filter(|pair| method.of_pair(pair).next().is_some()) {
            let spread = |of: fn(&Change) -> f64| Spread { values: method.of_pair(pair).map(of).collect() };
            line(method, [&pair.0, &pair.1], &spread(|c| c.first), &spread(|c| c.second), ",,");
        }
    }
    out
}

/// The four fields of a difference.
fn delta_csv(delta: Option<&Delta>) -> String {
    match delta {
        Some(Delta { value, interval: Some((low, high)), rows, .. }) => {
            format!("{value},{low},{high},{}", if *rows > 0 { rows.to_string() } else { String::new() })
        }
        Some(Delta { value, .. }) => format!("{value},,,"),
        None => ",,,".to_owned(),
    }
}

/// A field of CSV (RFC 4180).
pub(crate) fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

/// An experiment as JSON, with the values of every seed.
pub(crate) fn experiment_json(of: &Experiment) -> Value {
    let head = &of.head;
    let mut out = json!({"name": head.name, "title": head.title, "question": head.question, "baseline": head.baseline,
        "resamples": of.question.resamples, "seed": of.question.seed, "notes": notes(of)});
    let (kind, rows) = match &of.outcome {
        Outcome::Scores(seeds) => {
            out["seeds"] = json!(seeds.seeds);
            out["axis"] = json!(seeds.axis.as_ref().map(|axis| json!({"label": axis.label, "log": axis.log})));
            out["ans_formula"] = json!(ANS_FORMULA);
            ("scores", (0..seeds.rows.len()).map(|row| score_row(seeds, row)).collect::<Vec<_>>())
        }
        Outcome::Forgetting(forgetting) => {
            out["unit"] = json!(forgetting.unit.symbol());
            ("forgetting", forgetting.methods.iter().map(method).collect())
        }
    };
    (out["kind"], out["rows"]) = (json!(kind), json!(rows));
    out
}

fn spread(spread: &Spread) -> Value {
    json!({"values": spread.values, "mean": spread.mean(), "sd": spread.sd()})
}

fn interval(ends: Option<(f64, f64)>) -> Value {
    json!(ends.map(|(low, high)| [low, high]))
}

fn score_row(seeds: &SeedScores, row: usize) -> Value {
    let figure = |column: &experiment::Column| {
        let experiment::Cell::Value(values, best) = &column.cells[row] else { return None };
        let delta = column.deltas.get(row).and_then(Option::as_ref);
        let delta = delta.map(|d| json!({"value": d.value, "interval": interval(d.interval), "paired_rows": d.rows}));
        let mut out = spread(values);
        (out["task"], out["figure"], out["best"], out["delta"]) =
            (json!(column.task), json!(column.figure), json!(best), json!(delta));
        Some(out)
    };
    let of = &seeds.rows[row];
    let runs: Vec<&str> = of.runs.iter().map(|run| run.0.as_str()).collect();
    json!({"name": of.name, "series": of.series, "x": of.x, "tokens": of.tokens, "note": of.note, "runs": runs,
        "figures": seeds.all_columns().filter_map(figure).collect::<Vec<_>>()})
}

fn method(method: &Method) -> Value {
    let change = |c: &Change| json!({"first": c.pair.0, "second": c.pair.1, "delta_a": c.first, "delta_b": c.second});
    let cut = method.cut.as_ref().map(|cut| json!({"value": cut.value, "interval": interval(cut.interval)}));
    json!({"name": method.name, "delta_a": spread(&method.first), "delta_b": spread(&method.second),
        "cut": cut, "pairs": method.changes.iter().map(change).collect::<Vec<_>>()})
}
