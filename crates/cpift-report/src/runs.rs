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
        Ok(Self { outputs: outputs::read(path)?, ..Self::read_scores(name, path, force)? })
    }

    /// Reads one run's scores and nothing else.
    ///
    /// # Errors
    /// As [`Run::read`].
    pub fn read_scores(name: &str, path: &Path, force: bool) -> Result<Self> {
        let scores = if force { Scores::read_any_version(path)? } else { Scores::read(path)? };
        Ok(Self { name: name.to_owned(), path: path.to_owned(), scores, outputs: None })
    }

    /// The run without what was said on its rows, which may be long; their scores stay.
    #[must_use]
    pub fn without_texts(mut self) -> Self {
        for output in self.outputs.iter_mut().flat_map(BTreeMap::values_mut).flatten() {
            (output.prompt, output.output, output.reference, output.extracted) = (None, None, None, None);
        }
        self
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
        if let Some(difference) = difference(&first.scores.tasks, &other.scores.tasks) {
            return Err(refusal(first, other, difference));
        }
    }
    Ok(())
}

/// As [`check_comparable`], for runs that need not have the same tasks: those that two of them have must be the same ones.
///
/// # Errors
/// [`BadInput`] that names both runs and the first difference.
pub fn check_shared_tasks(runs: &[Run]) -> Result<()> {
    let mut first: BTreeMap<&str, (&Run, &TaskScore)> = BTreeMap::new();
    for (run, task) in runs.iter().flat_map(|run| run.scores.tasks.iter().map(move |task| (run, task))) {
        let (other, known) = *first.entry(&task.task).or_insert((run, task));
        if let Some(difference) = task_difference(known, task) {
            return Err(refusal(other, run, difference));
        }
    }
    Ok(())
}

fn refusal(first: &Run, other: &Run, (what, expected, found): Difference) -> anyhow::Error {
    let (name, first_name, path) = (&other.name, &first.name, first.path.display());
    BadInput::new(&other.path, format!("{name} was scored on other tasks or rows than {first_name} ({path}): {what}"))
        .expected(expected)
        .found(found)
        .hint("score both on the same tasks.toml with the same --limit and lengths; --force compares all the same")
        .into()
}

/// What differs, and both sides of it.
type Difference = (String, String, String);

fn difference(a: &[TaskScore], b: &[TaskScore]) -> Option<Difference> {
    let names = |tasks: &[TaskScore]| tasks.iter().map(|t| t.task.clone()).collect::<Vec<_>>().join(", ");
    if names(a) != names(b) {
        return Some(("the tasks".into(), names(a), names(b)));
    }
    a.iter().zip(b).find_map(|(a, b)| task_difference(a, b))
}

fn task_difference(a: &TaskScore, b: &TaskScore) -> Option<Difference> {
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
