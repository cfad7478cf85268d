//! scores.json: the scores of a checkpoint on every task.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::error::BadInput;
use crate::files::staging;
use crate::format::digest::Digest;
use crate::format::json;

/// Name of the file in the directory of an evaluation.
pub const FILE_NAME: &str = "scores.json";
/// Name of the file beside it with one line per row.
pub const OUTPUTS: &str = "outputs.jsonl";
/// Format version of scores.json that this program writes. In version 1 every figure had a standard
/// error, 0 for one row.
pub const FORMAT_VERSION: u32 = 2;
/// Oldest format version that this program reads.
const OLDEST_VERSION: u32 = 1;

/// Setting that marks a task for a judge model: null until it is judged, then the judge and its
/// settings.
pub const JUDGE: &str = "judge";
/// Setting with the judge's verdict counts. It is ignored when two runs are checked for
/// comparability.
pub const VERDICTS: &str = "verdicts";

/// Content of scores.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// Format version of the file.
    pub format_version: u32,
    /// Path of the scored checkpoint.
    pub model: String,
    /// Digest of the checkpoint.
    pub model_digest: Digest,
    /// Scores in the order of tasks.toml.
    pub tasks: Vec<TaskScore>,
}

/// Scores of one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskScore {
    /// Task name.
    pub task: String,
    /// Digest of the evaluation file.
    pub eval_digest: Digest,
    /// Value of the task's metric; `None` if only the loss is measured.
    pub metric: Option<MetricValue>,
    /// Additional figures of the same outputs, such as flexible extraction.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub also: BTreeMap<String, MetricValue>,
    /// Mean negative log-likelihood of the reference answers, in nats per target token.
    pub nll: MetricValue,
    /// Settings that the figures depend on.
    pub settings: BTreeMap<String, serde_json::Value>,
}

/// A mean with its standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricValue {
    /// Name of the metric: `exact_match`, `acc`, `nll`.
    pub name: String,
    /// Mean; fractions are 0 to 1.
    pub value: f64,
    /// Standard error of the mean: the sample standard deviation (n − 1) divided by √n. `None` for
    /// a single row (null in the file).
    pub stderr: Option<f64>,
    /// Number of rows.
    pub n: u64,
}

impl MetricValue {
    /// Mean of `values` with its standard error.
    ///
    /// # Panics
    /// If there are no values.
    pub fn mean(name: &str, values: &[f64]) -> Self {
        assert!(!values.is_empty(), "the mean of no values");
        let n = values.len() as f64;
        let value = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - value).powi(2)).sum();
        let stderr = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt());
        Self { name: name.to_owned(), value, stderr, n: values.len() as u64 }
    }

    fn is_finite(&self) -> bool {
        self.value.is_finite() && self.stderr.is_none_or(f64::is_finite)
    }

    /// Formats as `0.50 ± 0.10`, with `number` formatting both numbers, or `0.50 ± n/a` without a
    /// standard error.
    pub fn shown(&self, number: impl Fn(&f64) -> String) -> String {
        let stderr = self.stderr.as_ref().map_or_else(|| "n/a".to_owned(), &number);
        format!("{} ± {stderr}", number(&self.value))
    }
}

impl Scores {
    /// Path of the scores at `path`: the file itself, or scores.json in the directory.
    pub fn file(path: &Path) -> PathBuf {
        if path.is_dir() { path.join(FILE_NAME) } else { path.to_owned() }
    }

    /// Reads a scores.json, or the one inside a directory.
    ///
    /// # Errors
    /// [`BadInput`] if it cannot be read or has an unknown version.
    pub fn read(path: &Path) -> Result<Self> {
        let (file, value) = open(path)?;
        let version = json::version_of(&value);
        if !Self::is_readable(version) {
            json::check_version(&file, "a scores file", version, FORMAT_VERSION)?;
        }
        Self::parse(&file, value)
    }

    /// As [`Scores::read`], but accepts any version whose content can be read as the current one.
    ///
    /// # Errors
    /// [`BadInput`] if it cannot be read.
    pub fn read_any_version(path: &Path) -> Result<Self> {
        let (file, value) = open(path)?;
        Self::parse(&file, value)
    }

    /// Returns true if this program reads this format version.
    pub fn is_readable(version: u32) -> bool {
        (OLDEST_VERSION..=FORMAT_VERSION).contains(&version)
    }

    fn parse(file: &Path, value: serde_json::Value) -> Result<Self> {
        let scores: Self =
            serde_json::from_value(value).map_err(|e| BadInput::new(file, format!("not a scores file: {e}")))?;
        if scores.tasks.is_empty() {
            return Err(BadInput::new(file, "holds no scores").expected("at least one task").into());
        }
        Ok(scores)
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// If a figure is not finite, which JSON cannot represent, or the file cannot be written.
    pub fn write(&self, path: &Path, force: bool) -> Result<()> {
        for task in &self.tasks {
            let figures = task.metric.iter().chain(task.also.values()).chain([&task.nll]);
            if let Some(figure) = figures.into_iter().find(|f| !f.is_finite()) {
                bail!(
                    "{}: {} of {} is not finite ({})",
                    path.display(),
                    figure.name,
                    task.task,
                    figure.shown(f64::to_string)
                );
            }
        }
        staging::write_text(path, &json::to_text(self)?, force)
    }

    /// Loss on `task`, if it was scored.
    pub fn nll(&self, task: &str) -> Option<f64> {
        self.tasks.iter().find(|t| t.task == task).map(|t| t.nll.value)
    }
}

fn open(path: &Path) -> Result<(PathBuf, serde_json::Value)> {
    let file = Scores::file(path);
    let value = json::read(&file)?;
    Ok((file, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_uses_n_minus_one() {
        let figure = MetricValue::mean("acc", &[1.0, 0.0, 1.0, 1.0]);
        assert_eq!(figure.value, 0.75);
        // numpy.std([1, 0, 1, 1], ddof=1) / 2
        assert!((figure.stderr.unwrap() - 0.25).abs() < 1e-15);
    }

    #[test]
    fn one_row_has_no_standard_error() {
        let one = MetricValue::mean("acc", &[1.0]);
        assert_eq!(serde_json::to_string(&one).unwrap(), r#"{"name":"acc","value":1.0,"stderr":null,"n":1}"#);
        let shown = |figure: &MetricValue| figure.shown(|x| format!("{x:.2}"));
        assert_eq!(
            (shown(&one), shown(&MetricValue::mean("acc", &[1.0, 0.0]))),
            ("1.00 ± n/a".into(), "0.50 ± 0.50".into())
        );
    }

    #[test]
    fn files_of_version_1_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scores.json");
        let text = |version: u32, stderr: &str| {
            let digest = Digest::blank();
            format!(
                r#"{{"format_version": {version}, "model": "m", "model_digest": "{digest}", "tasks": [{{"task": "t", "eval_digest": "{digest}",
                "metric": null, "nll": {{"name": "nll", "value": 1.5, "stderr": {stderr}, "n": 1}}, "settings": {{}}}}]}}"#
            )
        };
        for (version, stderr, expected) in [(1, "0.0", Some(0.0)), (1, "0.25", Some(0.25)), (2, "null", None)] {
            std::fs::write(&path, text(version, stderr)).unwrap();
            assert_eq!(Scores::read(&path).unwrap().tasks[0].nll.stderr, expected);
        }
        for version in [0, 3] {
            std::fs::write(&path, text(version, "0.1")).unwrap();
            assert!(Scores::read(&path).unwrap_err().to_string().contains("another format version"));
        }
    }

    #[test]
    fn non_finite_figures_are_reported_and_not_written() {
        let figure =
            |name: &str, value, stderr| MetricValue { name: name.to_owned(), value, stderr: Some(stderr), n: 2 };
        let scores = |metric, also, nll| Scores {
            format_version: FORMAT_VERSION,
            model: "m".into(),
            model_digest: Digest::blank(),
            tasks: vec![TaskScore {
                task: "pick".into(),
                eval_digest: Digest::blank(),
                metric: Some(metric),
                also: BTreeMap::from([("perplexity".to_owned(), also)]),
                nll,
                settings: BTreeMap::new(),
            }],
        };
        let good = |name| figure(name, 1.0, 0.5);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scores.json");
        for (scores, named) in [
            (scores(figure("acc", f64::NAN, 0.0), good("perplexity"), good("nll")), "acc of pick"),
            (scores(good("acc"), figure("perplexity", f64::INFINITY, 0.5), good("nll")), "perplexity of pick"),
            (scores(good("acc"), good("perplexity"), figure("nll", 1.0, f64::NAN)), "nll of pick"),
        ] {
            let error = scores.write(&path, false).unwrap_err().to_string();
            assert!(error.contains(named) && !path.exists(), "{error}");
        }
        let scores = scores(good("acc"), good("perplexity"), good("nll"));
        scores.write(&path, false).unwrap();
        assert_eq!(Scores::read(&path).unwrap(), scores);
    }
}
