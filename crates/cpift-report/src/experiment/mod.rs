//! Experiments over seeds: what methods score, or forget, with the doubt that seeds and rows leave.

mod file;
mod forgetting;
mod seeds;
mod sheets;
mod text;

use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;

use crate::comparison::Question;
use crate::runs::Run;
use crate::unit::Unit;

pub use file::{Axis, File, Head, Inside, Rows, ScoreRow};
pub use forgetting::{Forgetting, Method};
pub use seeds::{Cell, Column, Seeds};
pub use sheets::Sheet;
pub use text::{csv, json, markdown};

/// An experiment and what came out of it.
#[derive(Debug, Clone)]
pub struct Experiment {
    /// What it says about itself.
    pub head: Head,
    /// Resamples and seed of the intervals.
    pub question: Question,
    /// What came out.
    pub outcome: Outcome,
}

/// What came out of an experiment.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Scores over seeds.
    Scores(Box<Seeds>),
    /// What a second task did to the first.
    Forgetting(Forgetting),
}

impl Experiment {
    /// Reads an experiment's file and the scores it names.
    ///
    /// # Errors
    /// [`BadInput`] when a file cannot be read, or runs answer different questions (unless `force`); [`cpift_core::Usage`] for a
    /// number of resamples out of range.
    pub fn read(path: &Path, question: Question, force: bool) -> Result<Self> {
        question.check()?;
        let file = File::read(path)?;
        let question = Question { baseline: file.head.baseline.clone(), ..question };
        let outcome = match &file.rows {
            Rows::Scores(rows) => Outcome::Scores(Box::new(Seeds::new(&file, rows, &question, force)?)),
            Rows::Forgetting(rows) => Outcome::Forgetting(Forgetting::new(&file, rows, &question, force)?),
        };
        Ok(Self { head: file.head, question, outcome })
    }
}

/// One value a seed, or a pair of tasks.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    /// The values, in their order.
    pub values: Vec<f64>,
}

impl Spread {
    /// Their mean.
    pub fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len() as f64
    }

    /// Their sample standard deviation (n − 1); none for one value.
    pub fn sd(&self) -> Option<f64> {
        let (n, mean) = (self.values.len() as f64, self.mean());
        let squares: f64 = self.values.iter().map(|v| (v - mean).powi(2)).sum();
        (self.values.len() > 1).then(|| (squares / (n - 1.0)).sqrt())
    }

    /// `mean ± sd`, or the one value.
    pub fn text(&self, unit: Unit) -> String {
        unit.text(self.mean()) + &self.sd_text(unit)
    }

    /// As [`Spread::text`], with the sign of a difference.
    pub fn signed(&self, unit: Unit) -> String {
        unit.signed(self.mean()) + &self.sd_text(unit)
    }

    fn sd_text(&self, unit: Unit) -> String {
        self.sd().map_or(String::new(), |sd| format!(" ± {}", unit.text(sd)))
    }
}

/// Refuses a folder without scores, and says which row of the experiment wanted it.
fn scores_folder(file: &File, row: &str, folder: &Inside) -> Result<std::path::PathBuf> {
    let path = file.run_dir.join(&folder.0);
    if path.join("scores.json").is_file() {
        return Ok(path);
    }
    Err(BadInput::new(&path, "holds no scores.json")
        .expected(format!("the scores of {row}, as {} says", file.path.display()))
        .hint("cpift-eval run --out makes such a folder")
        .into())
}

/// `1 seed`, `2 seeds`.
pub fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A run read for its scores and those of its rows.
fn scored(name: String, path: &Path, force: bool) -> Result<Run> {
    Run::read(&name, path, force).map(Run::without_texts)
}
