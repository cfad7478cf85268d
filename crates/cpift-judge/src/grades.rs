//! The grades of a task, and what they make of its scores.

use cpift_core::format::scores::{JUDGE, MetricValue, TaskScore, VERDICTS};
use log::warn;
use serde_json::json;

use crate::outputs::Outputs;
use crate::prompt::WORDING;
use crate::rating::{self, Rating};
use crate::verdicts::Verdicts;

/// The grades of one task in the order of its rows: all that are known, whichever run asked for them.
#[derive(Default)]
pub struct Grades {
    ratings: Vec<f64>,
    unrated: usize,
    out_of_range: usize,
    /// Asked about, without a verdict.
    failed: usize,
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl Grades {
    /// Counts the verdicts on a task's answers.
    pub fn of(outputs: &Outputs, task: &str, verdicts: &Verdicts) -> Self {
        let mut grades = Self::default();
        for answer in outputs.of(task) {
            let Some(verdict) = verdicts.get(&answer.question.key) else {
                grades.failed += usize::from(answer.chosen);
                continue;
            };
            grades.prompt_tokens += verdict.prompt_tokens;
            grades.completion_tokens += verdict.completion_tokens;
            match rating::parse(&verdict.text) {
                Rating::Rated(value) => grades.ratings.push(value),
                Rating::OutOfRange(_) => grades.out_of_range += 1,
                Rating::Unrated => grades.unrated += 1,
            }
        }
        grades
    }

    /// The mean of the grades.
    fn mean(&self) -> Option<MetricValue> {
        (!self.ratings.is_empty()).then(|| MetricValue::mean("judge", &self.ratings))
    }

    /// The mean becomes the task's metric; judge and counts become settings. Without a single grade there is no metric; without a
    /// single verdict the task stays as it was.
    pub fn write_to(&self, task: &mut TaskScore, judge: &str) {
        if self.ratings.len() + self.unrated + self.out_of_range == 0 {
            return;
        }
        let by = json!({"model": judge, "wording": WORDING});
        if let Some(other) = task.settings.get(JUDGE).filter(|other| !other.is_null() && **other != by) {
            warn!("{}: the grades by {other} give way to those by {by}", task.task);
        }
        task.metric = self.mean();
        let counts = json!({"rated": self.ratings.len(), "unrated": self.unrated, "out_of_range": self.out_of_range,
            "failed": self.failed, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens});
        task.settings.insert(JUDGE.to_owned(), by);
        task.settings.insert(VERDICTS.to_owned(), counts);
    }

    /// One line for the log.
    pub fn summary(&self) -> String {
        let mean = self.mean().map_or("no grade".into(), |m| m.shown(|x| format!("{x:.2}")));
        format!(
            "{mean} ({} rated, {} unrated, {} out of range, {} failed; {} + {} tokens)",
            self.ratings.len(),
            self.unrated,
            self.out_of_range,
            self.failed,
            self.prompt_tokens,
            self.completion_tokens
        )
    }
}
