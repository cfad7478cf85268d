//! The scored checkpoints that are compared: read with their outputs, and checked to answer the
//! same questions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::scores::{FORMAT_VERSION, OUTPUTS, Scores, TaskScore};
use cpift_core::{BadInput, files};
use serde::Deserialize;
use serde_json::Value;

/// Settings that are counts made while scoring: runs may differ in them and stay comparable.
pub(crate) const COUNTS: [&str; 5] = ["dropped", "prompts_cut", "skipped", "truncated", "verdicts"];

/// A scored checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// The name of its row.
    pub(crate) name: String,
    /// The directory or file it was read from.
    pub(crate) path: PathBuf,
    /// Its scores.
    pub(crate) scores: Scores,
    /// Its outputs by task, if outputs.jsonl is beside the scores.
    pub(crate) outputs: Option<BTreeMap<String, Vec<Output>>>,
}

impl Run {
    /// Reads one run.
    ///
    /// # Errors
    /// [`BadInput`] when scores or outputs cannot be read; another version of scores.json is read
    /// as far as it can be with `force`.
    pub(crate) fn read(name: &str, path: &Path, force: bool) -> Result<Self> {
        Ok(Self { outputs: read_outputs(path)?, ..Self::read_scores(name, path, force)? })
    }

    /// Reads one run's scores and nothing else.
    ///
    /// # Errors
    /// As [`Run::read`].
    pub(crate) fn read_scores(name: &str, path: &Path, force: bool) -> Result<Self> {
        let scores = if force { Scores::read_any_version(path)? } else { Scores::read(path)? };
        Ok(Self { name: name.to_owned(), path: path.to_owned(), scores, outputs: None })
    }

    /// Drops the texts of prompts and outputs, which may be long, and keeps the rows' scores.
    pub(crate) fn without_texts(mut self) -> Self {
        for output in self.outputs.iter_mut().flat_map(BTreeMap::values_mut).flatten() {
            (output.prompt, output.output, output.reference, output.extracted) = (None, None, None, None);
        }
        self
    }

    /// The score of one task.
    pub(crate) fn task(&self, name: &str) -> Option<&TaskScore> {
        self.scores.tasks.iter().find(|t| t.task == name)
    }
}

/// Reads `[NAME=]DIR` arguments; a run without a name takes the directory's.
///
/// # Errors
/// [`BadInput`] when a file cannot be read or, without `force`, when the runs are not comparable;
/// [`cpift_core::Usage`] when two runs have one name.
pub(crate) fn read_all(arguments: &[String], force: bool) -> Result<Vec<Run>> {
    let named: Vec<(String, PathBuf)> = arguments.iter().map(|argument| named(argument)).collect::<Result<_>>()?;
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

/// Splits an argument into name and path. A path may contain `=` itself: if the whole argument is
/// an existing path, or has a `/` before its first `=`, it has no name.
fn named(argument: &str) -> Result<(String, PathBuf)> {
    let path = Path::new(argument);
    match argument.split_once('=').filter(|(name, _)| !path.exists() && !name.contains('/')) {
        Some(("", _) | (_, "")) => Err(usage(format!("{argument} is no [NAME=]RUN: one side of = is empty"))),
        Some((name, path)) => Ok((name.to_owned(), PathBuf::from(path))),
        None => Ok((default_name(path), path.to_owned())),
    }
}

fn default_name(path: &Path) -> String {
    let path = if path.ends_with("scores.json") { path.parent().unwrap_or(path) } else { path };
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// Refuses runs whose tasks, rows, metrics or settings differ from an earlier run's.
///
/// # Errors
/// [`BadInput`] that names both runs and the first difference.
pub(crate) fn check_comparable(runs: &[Run]) -> Result<()> {
    for (i, other) in runs.iter().enumerate() {
        if let Some((first, difference)) = conflict(&runs[..i], other) {
            return Err(refusal(first, other, difference));
        }
    }
    Ok(())
}

/// The first of `runs` that `other` differs from, with the difference.
pub(crate) fn conflict<'a>(runs: impl IntoIterator<Item = &'a Run>, other: &Run) -> Option<(&'a Run, Difference)> {
    let of = |run: &'a Run| Some((run, task_list_differences(&run.scores.tasks, &other.scores.tasks).next()?));
    runs.into_iter().find_map(of)
}

/// As [`check_comparable`], for runs that need not have the same tasks: only tasks that two runs
/// share are checked.
///
/// # Errors
/// [`BadInput`] that names both runs and the first difference.
pub(crate) fn check_shared_tasks(runs: &[Run]) -> Result<()> {
    match shared_differences(runs).into_iter().next() {
        Some((first, other, difference)) => Err(refusal(first, other, difference)),
        None => Ok(()),
    }
}

fn shared_differences(runs: &[Run]) -> Vec<(&Run, &Run, Difference)> {
    let mut first: BTreeMap<&str, (&Run, &TaskScore)> = BTreeMap::new();
    let mut found = Vec::new();
    for (run, task) in runs.iter().flat_map(|run| run.scores.tasks.iter().map(move |task| (run, task))) {
        let (other, known) = *first.entry(&task.task).or_insert((run, task));
        found.extend(task_differences(known, task).map(|difference| (other, run, difference)));
    }
    found
}

/// All differences from the first run, listed under tables made with `--force`.
pub(crate) fn differences(runs: &[Run]) -> Vec<String> {
    let Some((first, others)) = runs.split_first() else { return Vec::new() };
    let of = |other| task_list_differences(&first.scores.tasks, other).collect::<Vec<_>>();
    let pairs = others.iter().flat_map(|other| of(&other.scores.tasks).into_iter().map(move |d| (other, d)));
    let words = pairs.map(|(other, difference)| difference_text(first, other, &difference));
    other_versions(runs).into_iter().chain(words).collect()
}

/// As [`differences`], for runs that need not have the same tasks.
pub(crate) fn differences_of_shared_tasks(runs: &[Run]) -> Vec<String> {
    let differences = shared_differences(runs);
    let words = differences.iter().map(|(first, other, difference)| difference_text(first, other, difference));
    other_versions(runs).into_iter().chain(words).collect()
}

fn difference_text(first: &Run, other: &Run, difference: &Difference) -> String {
    format!("{} {}.", other.name, difference.text(first))
}

fn other_versions(runs: &[Run]) -> Vec<String> {
    let others = runs.iter().filter(|run| !Scores::is_readable(run.scores.format_version));
    let words = |run: &Run| {
        let version = run.scores.format_version;
        format!("{}: its scores.json is of version {version}, read as version {FORMAT_VERSION}.", run.name)
    };
    others.map(words).collect()
}

fn refusal(first: &Run, other: &Run, difference: Difference) -> anyhow::Error {
    let (name, first_name, path) = (&other.name, &first.name, first.path.display());
    let what = difference.what;
    BadInput::new(&other.path, format!("{name} was scored on other tasks or rows than {first_name} ({path}): {what}"))
        .expected(difference.first)
        .found(difference.other)
        .hint("score both on the same tasks.toml with the same --limit and lengths; --force compares all the same")
        .into()
}

/// A difference between two runs.
pub(crate) struct Difference {
    /// The setting that differs.
    pub(crate) what: String,
    /// Its value in the first run.
    pub(crate) first: String,
    /// Its value in the other.
    pub(crate) other: String,
}

impl Difference {
    /// The difference as a phrase that follows the other run's name.
    pub(crate) fn text(&self, first: &Run) -> String {
        format!("differs from {} in {}: {} against {}", first.name, self.what, self.other, self.first)
    }
}

fn task_list_differences<'a>(a: &'a [TaskScore], b: &'a [TaskScore]) -> impl Iterator<Item = Difference> + use<'a> {
    let names = |tasks: &[TaskScore]| tasks.iter().map(|t| t.task.clone()).collect::<Vec<_>>().join(", ");
    let (first, other) = (names(a), names(b));
    let lists = (first != other).then(|| Difference { what: "the tasks".into(), first, other });
    let shared = a.iter().filter_map(|a| Some((a, b.iter().find(|b| b.task == a.task)?)));
    lists.into_iter().chain(shared.flat_map(|(a, b)| task_differences(a, b)))
}

fn task_differences(a: &TaskScore, b: &TaskScore) -> impl Iterator<Item = Difference> {
    let of = |what: &str, first: String, other: String| {
        (first != other).then(|| Difference { what: format!("{what} of {}", a.task), first, other })
    };
    let digests = of("the evaluation file", a.eval_digest.to_string(), b.eval_digest.to_string());
    let metrics = a.metric.as_ref().zip(b.metric.as_ref());
    let metrics = metrics.and_then(|(x, y)| of("the metric", x.name.clone(), y.name.clone()));
    // A run that is not judged yet can still be compared by its loss.
    let judged = a.metric.is_some() && b.metric.is_some();
    let matters = |key: &&String| !COUNTS.contains(&key.as_str()) && (judged || !key.starts_with("judge"));
    let keys: BTreeSet<&String> = a.settings.keys().chain(b.settings.keys()).filter(matters).collect();
    let side =
        |task: &TaskScore, key: &str| task.settings.get(key).map_or("not set".to_owned(), |v| format!("{key} = {v}"));
    let settings: Vec<Difference> =
        keys.into_iter().filter_map(|key| of(&format!("the setting {key}"), side(a, key), side(b, key))).collect();
    digests.into_iter().chain(metrics).chain(settings)
}

/// One line of outputs.jsonl; other fields are the metric's own.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Output {
    /// The task's name.
    pub(crate) task: String,
    /// The row's number in the evaluation file.
    pub(crate) row: u64,
    /// The prompt, if recorded.
    #[serde(default)]
    pub(crate) prompt: Option<Value>,
    /// The model's output.
    #[serde(default)]
    pub(crate) output: Option<Value>,
    /// The reference answer.
    #[serde(default)]
    pub(crate) reference: Option<Value>,
    /// The part of the output that was scored, if not all of it.
    #[serde(default)]
    pub(crate) extracted: Option<Value>,
    /// The row's score; `None` if it could not be scored, such as a judge's reply without a rating.
    #[serde(default)]
    pub(crate) score: Option<f64>,
    /// The loss on the reference answer, summed over its target tokens, in nats.
    #[serde(default)]
    pub(crate) nll: Option<f64>,
    /// Number of those target tokens; 0 if none fits.
    #[serde(default)]
    pub(crate) targets: Option<u64>,
}

/// Reads the outputs of a run by task, in the order of the file; `None` if the run has no
/// outputs.jsonl.
///
/// # Errors
/// [`BadInput`] with the line that cannot be read, or a row that occurs twice.
fn read_outputs(scores: &Path) -> Result<Option<BTreeMap<String, Vec<Output>>>> {
    let path = match scores.is_dir() {
        true => scores.join(OUTPUTS),
        false => scores.with_file_name(OUTPUTS),
    };
    if !path.is_file() {
        return Ok(None);
    }
    let mut tasks: BTreeMap<String, Vec<Output>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (i, line) in files::read_text(&path)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let output: Output = serde_json::from_str(line).map_err(|e| {
            BadInput::new(&path, format!("line {} is not a row of outputs: {e}", i + 1))
                .hint("score the model again with this version")
        })?;
        if !seen.insert((output.task.clone(), output.row)) {
            return Err(BadInput::new(&path, format!("line {}: duplicate row", i + 1))
                .found(format!("task {}, row {}", output.task, output.row))
                .into());
        }
        tasks.entry(output.task.clone()).or_default().push(output);
    }
    Ok(Some(tasks))
}

/// A field as text: strings unchanged, other values as JSON.
pub(crate) fn field_text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_hold_an_equals_sign() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().join("p=1");
        std::fs::create_dir(&there).unwrap();
        let there = there.to_str().unwrap();
        let of = |argument: &str| named(argument).unwrap();
        assert_eq!(of(there), ("p=1".into(), PathBuf::from(there)));
        assert_eq!(of(&format!("a={there}")), ("a".into(), PathBuf::from(there)));
        assert_eq!(of("runs/p=1/scores/base"), ("base".into(), PathBuf::from("runs/p=1/scores/base")));
        assert_eq!(of("a=runs/p=1/base"), ("a".into(), PathBuf::from("runs/p=1/base")));
        assert_eq!(of("a/b/scores.json").0, "b");
        for argument in ["=a", "a="] {
            assert!(named(argument).unwrap_err().is::<cpift_core::Usage>(), "{argument}");
        }
    }
}
