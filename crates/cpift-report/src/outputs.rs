//! outputs.jsonl: what a run said on every row, and how each row was scored.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::{BadInput, files};
use serde::Deserialize;
use serde_json::Value;

/// The file's name beside scores.json.
pub const FILE_NAME: &str = cpift_core::format::scores::OUTPUTS;

/// One line of outputs.jsonl; other fields are the metric's own.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Output {
    /// The task's name.
    pub task: String,
    /// The row's number in the evaluation file.
    pub row: u64,
    /// What the model was asked, where the file says so.
    #[serde(default)]
    pub prompt: Option<Value>,
    /// What it said.
    #[serde(default)]
    pub output: Option<Value>,
    /// The right answer.
    #[serde(default)]
    pub reference: Option<Value>,
    /// What the score was taken from, where that is a part of the output.
    #[serde(default)]
    pub extracted: Option<Value>,
    /// The row's score; none where it could not be scored, such as a judge's answer without a rating.
    #[serde(default)]
    pub score: Option<f64>,
    /// The loss on the reference answer: summed over its target tokens, in nats.
    #[serde(default)]
    pub nll: Option<f64>,
    /// How many target tokens those are; 0 where none fits.
    #[serde(default)]
    pub targets: Option<u64>,
}

/// The outputs of a run by task, in the order of the file; none where the run has no such file.
///
/// # Errors
/// [`BadInput`] naming the line that cannot be read, or a row that occurs twice.
pub fn read(scores: &Path) -> Result<Option<BTreeMap<String, Vec<Output>>>> {
    let path = match scores.is_dir() {
        true => scores.join(FILE_NAME),
        false => scores.with_file_name(FILE_NAME),
    };
    if !path.is_file() {
        return Ok(None);
    }
    let mut tasks: BTreeMap<String, Vec<Output>> = BTreeMap::new();
    let mut seen = std::collections::BTreeSet::new();
    for (i, line) in files::read_text(&path)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let output: Output = serde_json::from_str(line).map_err(|e| {
            BadInput::new(&path, format!("line {} is no row of outputs: {e}", i + 1))
                .hint("score the model again with this version")
        })?;
        if !seen.insert((output.task.clone(), output.row)) {
            return Err(BadInput::new(&path, format!("line {}: this row was there before", i + 1))
                .found(format!("task {}, row {}", output.task, output.row))
                .into());
        }
        tasks.entry(output.task.clone()).or_default().push(output);
    }
    Ok(Some(tasks))
}

/// A field as text: strings as they are, all else as JSON.
pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
