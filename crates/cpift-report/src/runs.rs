//! The scored checkpoints that are compared: read, and checked to be answers to the same questions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::error::usage;
use cpift_core::scores::{Scores, TaskScore};

use crate::outputs::{self, Output};

/// What scoring counted, as opposed to what it was told: runs may differ in these.
const COUNTS: [&str; 5] = ["dropped", "prompts_cut", "skipped", "truncated", "verdicts"];

/// A scored checkpoint.
#[derive(Debug, Clone)]
pub struct Run {
    /// What its row is called.
    pub name: String,
    /// The folder or file it was read from.
    pub path: PathBuf,
    /// Its scores.
    pub scores: Scores,
    /// Its outputs by task, where they are beside the scores.
    pub outputs: Option<BTreeMap<String, Vec<Output>>>,
}

impl Run {
    /// Reads one run.
    ///
    /// # Errors
    /// [`BadInput`] when scores or outputs cannot be read; another version of scores.json is read as far as it can be with `force`.
    pub fn read(name: &str, path: &Path, force: bool) -> Result<Self> {
        let scores = if force { Scores::read_any_version(path)? } else { Scores::read(path)? };
        Ok(Self { name: name.to_owned(), path: path.to_owned(), scores, outputs: outputs::read(path)? })
    }

    /// The score of one task.
    pub fn task(&self, name: &str) -> Option<&TaskScore> {
        self.scores.tasks.iter().find(|t| t.task == name)
    }
}

/// Reads `[NAME=]DIR` arguments; a run without a name takes its folder's.
///
/// # Errors
/// [`BadInput`] when a file cannot be read, or runs answer different questions (unless `force`); [`cpift_core::Usage`] when two runs
/// have one name.
pub fn read_all(arguments: &[String], force: bool) -> Result<Vec<Run>> {
    let named = arguments.iter().map(|argument| match argument.split_once('=') {
        Some((name, path)) => (name.to_owned(), PathBuf::from(path)),
        None => (default_name(Path::new(argument)), PathBuf::from(argument)),
    });
    let mut runs: Vec<Run> = Vec::new();
    for (name, path) in named {
        if runs.iter().any(|run| run.name == name) {
            return Err(usage(format!("two runs are called {name}: write OTHER_NAME={}", path.display())));
        }
        runs.push(Run::read(&name, &path, force)?);
    }
    if !force {
        check_comparable(&runs)?;
    }
    Ok(runs)
}

fn default_name(path: &Path) -> String {
    let path = if path.ends_with("scores.json") { path.parent().unwrap_or(path) } else { path };
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// Refuses runs on other tasks, rows, metrics or settings than the first one's.
///
/// # Errors
/// [`BadInput`] that names both runs and the first difference.
pub fn check_comparable(runs: &[Run]) -> Result<()> {
    let Some((first, others)) = runs.split_first() else { return Ok(()) };
    for other in others {
        if let Some((what, expected, found)) = difference(&first.scores.tasks, &other.scores.tasks) {
            return Err(BadInput::new(
                &other.path,
                format!(
                    "{} was scored on other tasks or rows than {} ({}): {what}",
                    other.name,
                    first.name,
                    first.path.display()
                ),
            )
            .expected(expected)
            .found(found)
            .hint("score both on the same tasks.toml with the same --limit and lengths; --force compares all the same")
            .into());
        }
    }
    Ok(())
}

/// What differs, and both sides of it.
fn difference(a: &[TaskScore], b: &[TaskScore]) -> Option<(String, String, String)> {
    let names = |tasks: &[TaskScore]| tasks.iter().map(|t| t.task.clone()).collect::<Vec<_>>().join(", ");
    if names(a) != names(b) {
        return Some(("the tasks".into(), names(a), names(b)));
    }
    a.iter().zip(b).find_map(|(a, b)| task_difference(a, b))
}

fn task_difference(a: &TaskScore, b: &TaskScore) -> Option<(String, String, String)> {
    let named = |what: &str| format!("{what} of {}", a.task);
    if a.eval_digest != b.eval_digest {
        return Some((named("the evaluation file"), a.eval_digest.to_string(), b.eval_digest.to_string()));
    }
    if let (Some(x), Some(y)) = (&a.metric, &b.metric)
        && x.name != y.name
    {
        return Some((named("the metric"), x.name.clone(), y.name.clone()));
    }
    // A run that no judge has read yet is as comparable as its loss is.
    let judged = a.metric.is_some() && b.metric.is_some();
    let matters = |key: &str| !COUNTS.contains(&key) && (judged || !key.starts_with("judge"));
    let keys = a.settings.keys().chain(b.settings.keys()).filter(|key| matters(key));
    let side =
        |task: &TaskScore, key: &str| task.settings.get(key).map_or("not set".to_owned(), |v| format!("{key} = {v}"));
    keys.map(|key| (named(&format!("the setting {key}")), side(a, key), side(b, key))).find(|(_, a, b)| a != b)
}
