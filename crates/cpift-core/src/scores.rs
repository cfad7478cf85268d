//! scores.json: what a checkpoint scored on every task.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::checkpoint::Digest;
use crate::error::BadInput;
use crate::{files, json};

/// The name of the file in the folder of an evaluation.
pub const FILE_NAME: &str = "scores.json";
/// The file beside it that has a line for each row.
pub const OUTPUTS: &str = "outputs.jsonl";
/// The form of scores.json this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// The setting of a task's scores that marks it as one for a judge: null until it is judged, then who judged it and how.
pub const JUDGE: &str = "judge";
/// The setting that counts a judge's verdicts: it differs between runs that are comparable.
pub const VERDICTS: &str = "verdicts";

/// The content of scores.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// Form of the file.
    pub format_version: u32,
    /// The checkpoint that was scored.
    pub model: String,
    /// Its digest.
    pub model_digest: Digest,
    /// Scores in the order of tasks.toml.
    pub tasks: Vec<TaskScore>,
}

/// The scores of one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskScore {
    /// The task's name.
    pub task: String,
    /// Digest of the evaluation file.
    pub eval_digest: Digest,
    /// The task's own metric and its value; `None` where the task is scored by its loss alone.
    pub metric: Option<Figure>,
    /// Further figures of the same outputs, such as flexible extraction.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub also: BTreeMap<String, Figure>,
    /// Mean negative log-likelihood of the reference answers, in nats a target token.
    pub nll: Figure,
    /// Settings that the figures depend on.
    pub settings: BTreeMap<String, serde_json::Value>,
}

/// A mean with its uncertainty.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// What it is: `exact_match`, `acc`, `nll`.
    pub name: String,
    /// The mean; fractions are 0 to 1.
    pub value: f64,
    /// Standard error of the mean: sample standard deviation (n − 1) over √n; 0 for n = 1.
    pub stderr: f64,
    /// Number of rows.
    pub n: u64,
}

impl Figure {
    /// The mean of `values` with its standard error.
    ///
    /// # Panics
    /// When there are no values.
    pub fn mean(name: &str, values: &[f64]) -> Self {
        assert!(!values.is_empty(), "the mean of nothing");
        let n = values.len() as f64;
        let value = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - value).powi(2)).sum();
        let stderr = if values.len() > 1 { (squares / (n - 1.0)).sqrt() / n.sqrt() } else { 0.0 };
        Self { name: name.to_owned(), value, stderr, n: values.len() as u64 }
    }
}

impl Scores {
    /// Reads a scores.json, or the one inside a folder.
    ///
    /// # Errors
    /// [`BadInput`] when it cannot be read or is of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let (file, value) = open(path)?;
        json::check_version(&file, "a scores file", json::version_of(&value), FORMAT_VERSION)?;
        Self::parse(&file, value)
    }

    /// As [`Scores::read`], for a file of any version: what cannot be understood as this one's is still refused.
    ///
    /// # Errors
    /// [`BadInput`] when it cannot be read.
    pub fn read_any_version(path: &Path) -> Result<Self> {
        let (file, value) = open(path)?;
        Self::parse(&file, value)
    }

    fn parse(file: &Path, value: serde_json::Value) -> Result<Self> {
        let scores: Self =
            serde_json::from_value(value).map_err(|e| BadInput::new(file, format!("not a scores file: {e}")))?;
        if scores.tasks.is_empty() {
            return Err(BadInput::new(file, "holds no scores").expected("at least one task").into());
        }
        Ok(scores)
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// A figure that is not finite, which JSON has no number for; as [`files::write_text`].
    pub fn write(&self, path: &Path, force: bool) -> Result<()> {
        for task in &self.tasks {
            let figures = task.metric.iter().chain(task.also.values()).chain([&task.nll]);
            if let Some(figure) = figures.into_iter().find(|f| !(f.value.is_finite() && f.stderr.is_finite())) {
                let Figure { name, value, stderr, .. } = figure;
                bail!("{}: {name} of {} is not finite ({value} ± {stderr})", path.display(), task.task);
            }
        }
        files::write_text(path, &json::to_text(self)?, force)
    }

    /// The loss on `task`, if it was scored.
    pub fn nll(&self, task: &str) -> Option<f64> {
        self.tasks.iter().find(|t| t.task == task).map(|t| t.nll.value)
    }
}

fn open(path: &Path) -> Result<(PathBuf, serde_json::Value)> {
    let file = if path.is_dir() { path.join(FILE_NAME) } else { path.to_owned() };
    let value = json::read(&file)?;
    Ok((file, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_uses_n_minus_one() {
        let figure = Figure::mean("acc", &[1.0, 0.0, 1.0, 1.0]);
        assert_eq!(figure.value, 0.75);
        // numpy.std([1, 0, 1, 1], ddof=1) / 2
        assert!((figure.stderr - 0.25).abs() < 1e-15);
        assert_eq!(Figure::mean("acc", &[1.0]).stderr, 0.0);
    }

    #[test]
    fn figures_that_are_not_finite_are_named_and_not_written() {
        let figure = |name: &str, value, stderr| Figure { name: name.to_owned(), value, stderr, n: 2 };
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
