//! RUN_DIR/experiments/NAME.json: the methods of an experiment, with the scores directories of
//! every seed.

use std::path::{Component, Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::json;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Format version of the file.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// An experiment's file, checked: its rows have the fields of their kind, and its paths stay under
/// the run's directory.
#[derive(Debug, Clone)]
pub(crate) struct File {
    /// Path of the file.
    pub(crate) path: PathBuf,
    /// Directory of the run, which the paths of the file are relative to.
    pub(crate) run_dir: PathBuf,
    /// Name, question and baseline.
    pub(crate) head: Head,
    /// The methods.
    pub(crate) rows: Rows,
}

/// An experiment's description.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    /// Short name.
    pub(crate) name: String,
    /// Headline.
    pub(crate) title: String,
    /// The question, in one sentence.
    pub(crate) question: String,
    /// Name of the row that the others are compared with.
    pub(crate) baseline: Option<String>,
    /// The axis, if the rows are a sweep.
    pub(crate) axis: Option<Axis>,
}

/// The axis of a sweep.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Axis {
    /// Name and unit.
    pub(crate) label: String,
    /// True for a logarithmic axis.
    #[serde(default)]
    pub(crate) log: bool,
}

/// The rows of either kind.
#[derive(Debug, Clone)]
pub(crate) enum Rows {
    /// Methods with the scores of each seed.
    Scores(Vec<ScoreRow>),
    /// Methods with scores before and after training on a second task.
    Forgetting(Vec<PairRow>),
}

/// A method and its scores, one directory per seed.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScoreRow {
    /// The method.
    pub(crate) name: String,
    /// The line of the sweep's plot.
    #[serde(default)]
    pub(crate) series: Option<String>,
    /// Position on the axis of the sweep.
    #[serde(default)]
    pub(crate) x: Option<f64>,
    /// Number of training tokens.
    #[serde(default)]
    pub(crate) tokens: Option<u64>,
    /// Scores directories, in the order of the seeds.
    pub(crate) runs: Vec<InsideRun>,
    /// A note under the table.
    #[serde(default)]
    pub(crate) note: Option<String>,
}

/// A method trained on one task and then on another.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PairRow {
    /// The method.
    pub(crate) name: String,
    /// Pairs of tasks; a pair occurs once per seed.
    pub(crate) pairs: Vec<Pair>,
    /// A note under the table.
    #[serde(default)]
    pub(crate) note: Option<String>,
}

/// Scores after the first task and after the second.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pair {
    /// The task trained first.
    pub(crate) first: String,
    /// The task trained after it.
    pub(crate) second: String,
    /// Scores directory after the first task.
    pub(crate) after_first: InsideRun,
    /// Scores directory after the second task.
    pub(crate) after_second: InsideRun,
}

/// A path under the run's directory.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct InsideRun(pub(crate) String);

impl TryFrom<String> for InsideRun {
    type Error = String;

    fn try_from(path: String) -> Result<Self, String> {
        let plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
        match !path.is_empty() && Path::new(&path).components().all(plain) {
            true => Ok(Self(path)),
            false => Err(format!("`{path}` is no path under the run's directory: it must be relative, without `..`")),
        }
    }
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Scores,
    Forgetting,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(rename = "format_version")]
    _format_version: u32,
    name: String,
    title: String,
    question: String,
    kind: Kind,
    #[serde(default)]
    baseline: Option<String>,
    #[serde(default)]
    axis: Option<Axis>,
    rows: Vec<Value>,
}

impl File {
    /// Reads the file. The scores that it names are not opened.
    ///
    /// # Errors
    /// [`BadInput`] for another format version, or fields that do not fit its kind.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let value: Value = json::read(path)?;
        json::check_version(path, "an experiment", json::version_of(&value), FORMAT_VERSION)?;
        let raw: Raw =
            serde_json::from_value(value).map_err(|e| BadInput::new(path, format!("not an experiment: {e}")))?;
        let rows = match raw.kind {
            Kind::Scores => Rows::Scores(parsed(path, raw.rows)?),
            Kind::Forgetting => Rows::Forgetting(parsed(path, raw.rows)?),
        };
        let Raw { name, title, question, baseline, axis, .. } = raw;
        let head = Head { name, title, question, baseline, axis };
        if let Some(problem) = problem(&head, &rows) {
            return Err(BadInput::new(path, problem).into());
        }
        Ok(Self { path: path.to_owned(), run_dir: run_dir(path)?, head, rows })
    }
}

impl File {
    /// The scores directory of a row.
    ///
    /// # Errors
    /// [`BadInput`] naming the row if the directory has no scores.json.
    pub(crate) fn scores_dir(&self, row: &str, folder: &InsideRun) -> Result<PathBuf> {
        let path = self.run_dir.join(&folder.0);
        if path.join("scores.json").is_file() {
            return Ok(path);
        }
        Err(BadInput::new(&path, "no scores.json in this directory")
            .expected(format!("the scores of {row}, which {} names", self.path.display()))
            .hint("make it with cpift-eval run --out")
            .into())
    }
}

fn parsed<T: DeserializeOwned>(path: &Path, rows: Vec<Value>) -> Result<Vec<T>> {
    let row = |(i, value)| {
        serde_json::from_value(value).map_err(|e| BadInput::new(path, format!("row {}: {e}", i + 1)).into())
    };
    rows.into_iter().enumerate().map(row).collect()
}

/// The parent of the directory that the file is in.
fn run_dir(path: &Path) -> Result<PathBuf> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let up = |folder: &Path| folder.parent().map(Path::to_owned);
    let found = match folder.file_name() {
        Some(_) => up(folder),
        // `.` and `..` have no parent in the path itself.
        None => up(&Path::new(".").join(folder).canonicalize()?),
    };
    let found = found.ok_or_else(|| BadInput::new(path, "is not in a subdirectory of a run"))?;
    Ok(if found.as_os_str().is_empty() { PathBuf::from(".") } else { found })
}

/// The first inconsistency of an experiment whose fields are all present.
fn problem(head: &Head, rows: &Rows) -> Option<String> {
    let names: Vec<&str> = match rows {
        Rows::Scores(rows) => rows.iter().map(|row| row.name.as_str()).collect(),
        Rows::Forgetting(rows) => rows.iter().map(|row| row.name.as_str()).collect(),
    };
    if names.is_empty() {
        return Some("has no rows".into());
    }
    if let Some(baseline) = head.baseline.as_ref().filter(|b| !names.contains(&b.as_str())) {
        return Some(format!("the baseline {baseline} is not among the rows: {}", names.join(", ")));
    }
    match rows {
        Rows::Scores(rows) => seeds_problem(rows).or_else(|| sweep_problem(head.axis.as_ref(), rows)),
        Rows::Forgetting(_) if head.axis.is_some() => Some("has an axis, which is for kind scores".into()),
        Rows::Forgetting(rows) => pairs_problem(rows),
    }
}

fn seeds_problem(rows: &[ScoreRow]) -> Option<String> {
    let first = &rows[0];
    let of = |row: &ScoreRow| {
        let (n, expected) = (row.runs.len(), first.runs.len());
        if n == 0 {
            Some(format!("{} has no runs", row.name))
        } else {
            (n != expected)
                .then(|| format!("{} has {expected} runs and {} has {n}: one per seed", first.name, row.name))
        }
    };
    rows.iter().find_map(of)
}

fn sweep_problem(axis: Option<&Axis>, rows: &[ScoreRow]) -> Option<String> {
    let alone = |row: &ScoreRow| match (axis, row.x) {
        (None, Some(_)) => Some(format!("{} has an x, but the experiment has no axis", row.name)),
        (None, None) if row.series.is_some() => {
            Some(format!("{} has a series, but the experiment has no axis", row.name))
        }
        (Some(axis), None) => Some(format!("{} has no x on the axis {}", row.name, axis.label)),
        (Some(axis), Some(x)) if axis.log && x <= 0.0 => Some(format!("{} is at {x} on a log axis", row.name)),
        _ => None,
    };
    let twice = |(i, row): (usize, &ScoreRow)| {
        let same = |other: &&ScoreRow| other.x == row.x && (other.name == row.name || other.series == row.series);
        // Without an axis, rows differ by name alone.
        let same = |other: &&ScoreRow| if axis.is_some() { same(other) } else { other.name == row.name };
        let at = row.x.map_or(String::new(), |x| format!(" at {x} (of one name or series)"));
        rows[..i].iter().find(same).map(|_| format!("{} occurs twice{at}", row.name))
    };
    rows.iter().find_map(alone).or_else(|| rows.iter().enumerate().find_map(twice))
}

fn pairs_problem(rows: &[PairRow]) -> Option<String> {
    let of = |(i, row): (usize, &PairRow)| {
        if row.pairs.is_empty() {
            Some(format!("{} has no pairs", row.name))
        } else if rows[..i].iter().any(|other| other.name == row.name) {
            Some(format!("{} occurs twice", row.name))
        } else {
            let same = row.pairs.iter().find(|pair| pair.first == pair.second)?;
            Some(format!("{}: first and second are both {}", row.name, same.first))
        }
    };
    rows.iter().enumerate().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_under_the_runs_folder() {
        let inside = |path: &str| InsideRun::try_from(path.to_owned()).is_ok();
        assert!(["store/a", "a", "./a/b", "a..b/..c"].iter().all(|path| inside(path)));
        assert!(["", "/a", "..", "../a", "a/../../b", "a/..", "./.."].iter().all(|path| !inside(path)));
    }

    #[test]
    fn the_runs_folder_is_two_above_the_file() {
        let of = |path: &str| run_dir(Path::new(path)).unwrap();
        assert_eq!(of("runs/a/experiments/x.json"), Path::new("runs/a"));
        assert_eq!(of("experiments/x.json"), Path::new("."));
        let here = std::env::current_dir().unwrap();
        assert_eq!(of("x.json"), here.canonicalize().unwrap().parent().unwrap());
        assert_eq!(of("./x.json"), of("x.json"));
    }
}
