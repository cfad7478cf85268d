//! `cpift-eval compare`: several scores.json as one table, with the Average Normalised Score.

use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::cli::Common;
use cpift_core::scores::{Scores, TaskScore};
use serde_json::{Value, json};

use crate::args::CompareArgs;

/// The formula under every table. The paper publishes none, so none is claimed to match its column.
const FORMULA: &str = "ANS (Average Normalised Score): the mean over the tasks with a metric of 10 x metric (0 to 10), \
                       or of a judge's grade as it is. \
                       Tasks without one are not in it. No parity with the paper's column is claimed: its formula is not published.";

/// Checkpoints by tasks.
pub struct Table {
    rows: Vec<(String, Scores)>,
}

impl Table {
    /// Reads `[NAME=]DIR` arguments; a row without a name takes its folder's.
    ///
    /// # Errors
    /// [`BadInput`] when a file cannot be read, or runs were scored on different rows (unless `force`).
    pub fn read(runs: &[String], force: bool) -> Result<Self> {
        let mut rows: Vec<(String, Scores)> = Vec::new();
        for run in runs {
            let (name, path) = match run.split_once('=') {
                Some((name, path)) => (name.to_owned(), Path::new(path)),
                None => (file_name(Path::new(run)), Path::new(run.as_str())),
            };
            let scores = Scores::read(path)?;
            if let Some((first_name, first)) = rows.first()
                && !force
            {
                check_comparable(path, first_name, first, &scores)?;
            }
            rows.push((name, scores));
        }
        Ok(Self { rows })
    }

    /// The table as text: one column a task, its metric where it has one, its loss where not.
    pub fn to_text(&self) -> String {
        let tasks = &self.rows[0].1.tasks;
        let mut header = vec!["model".to_owned()];
        header.extend(tasks.iter().map(|t| match &t.metric {
            _ if is_for_judge(t) => format!("{} judge 1-10", t.task),
            Some(metric) => format!("{} {} %", t.task, metric.name),
            None => format!("{} nll", t.task),
        }));
        header.extend(["ANS".to_owned(), "mean nll".to_owned()]);
        let mut lines = vec![header];
        for (name, scores) in &self.rows {
            let mut line = vec![name.clone()];
            let of = |task: &str| scores.tasks.iter().find(|s| s.task == task);
            line.extend(
                tasks
                    .iter()
                    .map(|t| of(&t.task).map_or("-".into(), |s| cell(s, t.metric.is_some() || is_for_judge(t)))),
            );
            line.push(average_normalised_score(scores).map_or("-".into(), |v| format!("{v:.2}")));
            line.push(format!("{:.4}", mean_nll(scores)));
            lines.push(line);
        }
        format!("{}\n{FORMULA}\n", aligned(&lines))
    }

    /// The table as JSON.
    pub fn to_json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|(name, scores)| {
                json!({"name": name, "ans": average_normalised_score(scores), "mean_nll": mean_nll(scores),
                    "scores": scores})
            })
            .collect();
        json!({"rows": rows, "ans_formula": FORMULA})
    }
}

/// Prints the table.
///
/// # Errors
/// As [`Table::read`].
pub fn run(args: &CompareArgs, common: &Common) -> Result<()> {
    let table = Table::read(&args.runs, common.force)?;
    if common.json {
        common.print_json(&table.to_json());
    } else {
        print!("{}", table.to_text());
    }
    Ok(())
}

/// The mean over the tasks with a metric of ten times the metric, or of a judge's grade; `None` when no task has one.
pub fn average_normalised_score(scores: &Scores) -> Option<f64> {
    let values: Vec<f64> = scores.tasks.iter().filter_map(|t| Some(out_of_ten(t) * t.metric.as_ref()?.value)).collect();
    if values.is_empty() { None } else { Some(values.iter().sum::<f64>() / values.len() as f64) }
}

fn mean_nll(scores: &Scores) -> f64 {
    scores.tasks.iter().map(|t| t.nll.value).sum::<f64>() / scores.tasks.len() as f64
}

/// Whether a judge grades the task, now or later.
fn is_for_judge(score: &TaskScore) -> bool {
    score.settings.contains_key(cpift_judge::run::SETTING)
}

/// What a task's metric is multiplied by to lie on a scale to 10.
fn out_of_ten(score: &TaskScore) -> f64 {
    if is_for_judge(score) { 1.0 } else { 10.0 }
}

/// A task's metric where its column shows one, else its loss.
fn cell(score: &TaskScore, metric_column: bool) -> String {
    match &score.metric {
        Some(metric) if is_for_judge(score) => format!("{:.2} ± {:.2}", metric.value, metric.stderr),
        None if is_for_judge(score) => "not judged".into(),
        Some(metric) if metric_column => format!("{:.1} ± {:.1}", 100.0 * metric.value, 100.0 * metric.stderr),
        None if metric_column => "-".into(),
        _ => format!("{:.4} ± {:.4}", score.nll.value, score.nll.stderr),
    }
}

fn check_comparable(path: &Path, first_name: &str, first: &Scores, other: &Scores) -> Result<()> {
    let key = |scores: &Scores| -> Vec<String> {
        let settings = |t: &TaskScore| {
            let keys = ["rows", "prompt", "max_new_tokens", "max_length", "templates"];
            keys.map(|k| format!("{k}={}", t.settings.get(k).unwrap_or(&Value::Null))).join(" ")
        };
        scores.tasks.iter().map(|t| format!("{} {} {}", t.task, t.eval_digest, settings(t))).collect()
    };
    let (a, b) = (key(first), key(other));
    if a == b {
        return Ok(());
    }
    let differing = a.iter().zip(&b).find(|(x, y)| x != y);
    Err(BadInput::new(path, format!("was scored on other tasks or rows than {first_name}"))
        .expected(differing.map_or(format!("{} tasks", a.len()), |(x, _)| x.clone()))
        .found(differing.map_or(format!("{} tasks", b.len()), |(_, y)| y.clone()))
        .hint("score both on the same tasks.toml with the same --limit and lengths; --force compares all the same")
        .into())
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// A Markdown table whose columns line up as plain text too.
fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| lines.iter().filter_map(|l| l.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let row = |line: &[String]| {
        let cells: Vec<String> = widths
            .iter()
            .enumerate()
            .map(|(c, &w)| {
                let text = line.get(c).map_or("", String::as_str);
                let pad = " ".repeat(w - text.chars().count());
                if c == 0 { format!("{text}{pad}") } else { format!("{pad}{text}") }
            })
            .collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule: Vec<String> = widths
        .iter()
        .enumerate()
        .map(|(c, &w)| if c == 0 { "-".repeat(w) } else { format!("{}:", "-".repeat(w - 1)) })
        .collect();
    let mut out = row(&lines[0]);
    out.push_str(&row(&rule));
    lines[1..].iter().for_each(|line| out.push_str(&row(line)));
    out
}
