//! What the models said on a few rows of each task. All of it is untrusted text.

use anyhow::Result;
use serde_json::Value;

use crate::comparison::Comparison;
use crate::html::{Table, escape, missing, verbatim};
use crate::outputs::{self, Output};
use crate::runs::Run;

/// Characters of one text that are shown.
const LONGEST: usize = 2000;

/// The sample outputs: `count` rows of each task.
///
/// # Errors
/// None so far; the page takes sections that can fail.
pub fn section(comparison: &Comparison, count: usize) -> Result<String> {
    let runs: Vec<&Run> = comparison.runs.iter().filter(|run| run.outputs.is_some()).collect();
    let tasks = comparison.scores.iter().filter_map(|c| c.task.as_deref());
    let parts: Vec<String> = tasks.filter_map(|task| of_task(&runs, task, count)).collect();
    if parts.is_empty() {
        return Ok(missing("No outputs: no outputs.jsonl beside the scores holds a row."));
    }
    let words = "Rows on which the models' scores differ come first. Control characters are shown as symbols, long texts are cut.";
    Ok(format!("<p class=\"note\">{}</p>\n{}", escape(words), parts.concat()))
}

fn of_task(runs: &[&Run], task: &str, count: usize) -> Option<String> {
    let rows_of = |run: &Run| run.outputs.as_ref().and_then(|o| o.get(task)).map_or(0, Vec::len);
    let longest = runs.iter().max_by_key(|run| rows_of(run))?;
    let rows = longest.outputs.as_ref()?.get(task)?;
    let said = |row: u64| said_on(runs, task, row);
    let mut chosen: Vec<(bool, u64)> = rows
        .iter()
        .map(|row| {
            let scores: Vec<Option<f64>> = said(row.row).iter().map(|(_, output)| output.score).collect();
            (scores.windows(2).all(|pair| pair[0] == pair[1]), row.row)
        })
        .collect();
    chosen.sort_unstable();
    chosen.truncate(count);
    let shown: String = chosen.iter().map(|(_, row)| sample(task, *row, &said(*row))).collect();
    let summary = format!("{task}: {} of {} rows", chosen.len(), rows.len());
    Some(format!("<details>\n<summary>{}</summary>\n<div>\n{shown}</div>\n</details>\n", escape(&summary)))
}

/// What every run said on one row.
fn said_on<'a>(runs: &[&'a Run], task: &str, row: u64) -> Vec<(&'a str, &'a Output)> {
    let of = |run: &&'a Run| Some((run.name.as_str(), run.outputs.as_ref()?.get(task)?.iter().find(|o| o.row == row)?));
    runs.iter().filter_map(of).collect()
}

fn sample(task: &str, row: u64, said: &[(&str, &Output)]) -> String {
    let first = |of: fn(&Output) -> Option<&Value>| said.iter().find_map(|(_, output)| of(output));
    let mut facts = String::new();
    for (name, value) in [("prompt", first(|o| o.prompt.as_ref())), ("reference", first(|o| o.reference.as_ref()))] {
        if let Some(value) = value {
            facts.push_str(&format!("<dt>{name}</dt><dd>{}</dd>\n", shown(value)));
        }
    }
    let header = ["model", "output", "score"].map(str::to_owned);
    let mut table = Table::new(&format!("{task}, row {row}"), &header).text_column(1);
    for (name, output) in said {
        let mut text = output.output.as_ref().map_or(String::new(), shown);
        if let Some(extracted) = output.extracted.as_ref().filter(|e| Some(*e) != output.output.as_ref()) {
            text.push_str(&format!("<small>extracted: {}</small>", escape(&outputs::text(extracted))));
        }
        table.html_row([escape(name), text, output.score.map_or("–".to_owned(), number)]);
    }
    format!("<div class=\"sample\">\n<dl>\n{facts}</dl>\n{}</div>\n", table.finish())
}

/// A score without needless zeros.
fn number(score: f64) -> String {
    let text = format!("{score:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A field, cut where it is very long; a conversation as its turns.
fn shown(value: &Value) -> String {
    let turn = |turn: &Value| Some(format!("{}: {}", turn.get("role")?.as_str()?, turn.get("content")?.as_str()?));
    let turns = value.as_array().and_then(|turns| turns.iter().map(turn).collect::<Option<Vec<String>>>());
    let text = turns.map_or_else(|| outputs::text(value), |turns| turns.join("\n"));
    let more = text.chars().count().saturating_sub(LONGEST);
    let cut: String = text.chars().take(LONGEST).collect();
    let note = if more > 0 { format!("<small>… {more} more characters</small>") } else { String::new() };
    verbatim(&cut) + &note
}
