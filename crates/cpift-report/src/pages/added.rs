//! A task added to a tuned model (scripts/add_task.py): what each old task lost, what the new ones
//! gained, the models between the old and the new one, and what the safeguards cost.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::format::json;
use maud::{Markup, html};
use serde::Deserialize;

use crate::html::{Heads, Line, Mark, Table, figure, lines, notes, paragraph, series_legend};

/// Name of the file in the directory of a run.
pub(crate) const FILE_NAME: &str = "add-task.json";
/// Format version that this program reads.
const FORMAT_VERSION: u32 = 1;

/// Content of add-task.json.
#[derive(Deserialize)]
struct Added {
    new: Vec<String>,
    old: Vec<String>,
    alpha: f64,
    rule: String,
    dev_rows: u64,
    curve: Vec<Point>,
    tasks: Vec<Change>,
    safeguards: Safeguards,
    tokens: Tokens,
}

/// A model between the old one (0) and the stage's (1).
#[derive(Deserialize)]
struct Point {
    alpha: f64,
    tasks: BTreeMap<String, Score>,
    kl: f64,
}

/// A task before and after.
#[derive(Deserialize)]
struct Change {
    task: String,
    new: bool,
    before: Score,
    after: Score,
}

/// A score in percent.
#[derive(Deserialize)]
struct Score {
    name: String,
    value: f64,
    stderr: Option<f64>,
}

/// Measures against forgetting.
#[derive(Deserialize)]
struct Safeguards {
    replay: String,
    replayed_rows: u64,
    replayed_share: f64,
    protect: String,
    frozen_elements: u64,
}

/// Tokens that were trained on or measured on.
#[derive(Deserialize)]
struct Tokens {
    stage: u64,
    replay: u64,
    importance: u64,
}

/// The section, or nothing if the run added no task.
///
/// # Errors
/// [`cpift_core::BadInput`] for a file of another version or layout.
pub(super) fn section(folder: &Path) -> Option<Result<Markup>> {
    let file = folder.join(FILE_NAME);
    file.exists().then(|| read(&file).map(|added| body(&added)))
}

fn read(file: &Path) -> Result<Added> {
    let value = json::read(file)?;
    json::check_version(file, "a record of an added task", json::version_of(&value), FORMAT_VERSION)?;
    serde_json::from_value(value)
        .map_err(|e| cpift_core::BadInput::new(file, format!("not a record of an added task: {e}")).into())
}

fn body(added: &Added) -> Markup {
    let old = if added.old.is_empty() { "none listed".to_owned() } else { added.old.join(", ") };
    html! {
        (paragraph(&format!("Added {}. Old tasks: {old}. α = {}: {}.", added.new.join(", "), added.alpha, added.rule)))
        (changes(added).markup())
        (curve(added))
        (notes("note", costs(added)))
    }
}

impl Score {
    fn text(&self) -> String {
        let stderr = self.stderr.map_or_else(|| "n/a".to_owned(), |stderr| format!("{stderr:.1}"));
        format!("{:.1} ± {stderr}", self.value)
    }
}

/// A number with a sign that every reader sees.
fn signed(value: f64) -> String {
    format!("{value:+.1}").replace('-', "−")
}

fn changes(added: &Added) -> Table {
    let header = ["task", "", "figure", "before\n%", "after\n%", "change\npoints"].map(str::to_owned);
    let caption = "Scores before and after, with one standard error, on rows that chose nothing";
    let mut table = Table::new(caption, &header).name_column(1).name_column(2);
    for task in &added.tasks {
        let kind = if task.new { "new" } else { "old" };
        let change = signed(task.after.value - task.before.value);
        table.row(&[
            task.task.clone(),
            kind.to_owned(),
            task.before.name.clone(),
            task.before.text(),
            task.after.text(),
            change,
        ]);
    }
    table
}

fn mean(point: &Point, names: &[String]) -> Option<f64> {
    let values: Vec<f64> = names.iter().filter_map(|name| point.tasks.get(name)).map(|score| score.value).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Means of old and new tasks by α, and the divergence.
fn curve(added: &Added) -> Markup {
    let header = ["α", "old tasks\nmean, %", "new tasks\nmean, %", "KL\nnats per token"].map(str::to_owned);
    let mut table = Table::new(&format!("By α, on the first {} rows of each task", added.dev_rows), &header);
    let mut series = Vec::new();
    for (name, tasks) in [("old tasks", &added.old), ("new tasks", &added.new)] {
        let point = |point: &Point| {
            let value = mean(point, tasks)?;
            Some((point.alpha, Mark { name: name.to_owned(), value, ends: None, text: format!("{value:.1}") }))
        };
        let points: Vec<_> = added.curve.iter().filter_map(point).collect();
        if !points.is_empty() {
            series.push(Line { name: name.to_owned(), points });
        }
    }
    for point in &added.curve {
        let shown = |tasks| mean(point, tasks).map_or_else(|| "n/a".to_owned(), |value| format!("{value:.1}"));
        table.row(&[point.alpha.to_string(), shown(&added.old), shown(&added.new), format!("{:.4}", point.kl)]);
    }
    let label = "mean score of old and of new tasks by α".to_owned();
    let picture = lines(&Heads { head: "mean score", unit: "%", label }, "α", false, &series);
    let caption = html! {
        (series_legend(series.iter().map(|line| line.name.as_str()).enumerate()))
        "Models between the old one (α = 0) and the stage's (α = 1)."
    };
    figure(&[picture], &caption, &[table])
}

fn costs(added: &Added) -> Vec<String> {
    let Safeguards { replay, replayed_rows, replayed_share, protect, frozen_elements } = &added.safeguards;
    let Tokens { stage, replay: replayed, importance } = added.tokens;
    vec![
        format!("The stage trained on {stage} tokens, of which about {replayed} were replayed."),
        format!("Replay: {replay}, {replayed_rows} rows, {:.1} % of the tokens.", 100.0 * replayed_share),
        format!(
            "Protection: {protect}, {frozen_elements} elements kept their bits; {importance} tokens to measure importance."
        ),
        "KL is the divergence from the old model's predictions on the new tasks' rows.".to_owned(),
    ]
}
