//! `exact-match`, `contains` and `rouge-l`: the generated answer against the reference as text.

use anyhow::Result;
use cpift_core::format::tasks::Task;
use cpift_data::Row;
use serde_json::json;

use super::generated::graded;
use super::metric::{FRACTION, Grade, Metric, Prepared, TaskView};
use crate::fields::{field_error, reference};

/// `exact-match`: answer and reference are equal apart from surrounding white space.
pub(crate) struct ExactMatch;

impl Metric for ExactMatch {
    fn key(&self) -> &'static str {
        "exact-match"
    }

    fn name(&self) -> &'static str {
        "exact_match"
    }

    fn unit(&self) -> &'static str {
        FRACTION
    }

    fn summary(&self) -> &'static str {
        "answers equal to the reference"
    }

    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        let grade = |output: &str, reference: &str| Grade::one(f64::from(output.trim() == reference.trim()));
        graded(task, self.name(), reference, grade)
    }
}

/// `contains`: the answer contains the reference; case-sensitive.
pub(crate) struct Contains;

impl Metric for Contains {
    fn key(&self) -> &'static str {
        "contains"
    }

    fn name(&self) -> &'static str {
        "contains"
    }

    fn unit(&self) -> &'static str {
        FRACTION
    }

    fn summary(&self) -> &'static str {
        "answers that contain the reference"
    }

    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        let grade = |output: &str, reference: &str| Grade::one(f64::from(output.contains(reference.trim())));
        graded(task, self.name(), not_empty, grade)
    }
}

/// The reference of a row; every answer would contain an empty one.
fn not_empty(task: &Task, row: &Row) -> Result<String> {
    let text = reference(task, row)?;
    if text.trim().is_empty() {
        return Err(field_error(task, row, "answer", "a text to look for", &json!(text)).into());
    }
    Ok(text)
}

/// `rouge-l`: F1 of the longest common subsequence of words, as computed by Google's rouge_score
/// 0.1.2 without stemming.
pub(crate) struct RougeL;

impl Metric for RougeL {
    fn key(&self) -> &'static str {
        "rouge-l"
    }

    fn name(&self) -> &'static str {
        "rouge_l"
    }

    fn unit(&self) -> &'static str {
        FRACTION
    }

    fn summary(&self) -> &'static str {
        "F1 of the longest common subsequence of words"
    }

    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        let grade = |output: &str, reference: &str| Grade::one(f1(&words(reference), &words(output)));
        graded(task, self.name(), reference, grade)
    }
}

/// Lower-case words: runs of a–z and 0–9.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

fn f1(reference: &[String], candidate: &[String]) -> f64 {
    let common = common_subsequence(reference, candidate) as f64;
    // 2PR / (P + R) with P = common / candidate and R = common / reference.
    if common == 0.0 { 0.0 } else { 2.0 * common / (reference.len() + candidate.len()) as f64 }
}

/// Length of the longest common subsequence, computed one row of the table at a time.
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_rouge_score() {
        // rouge_scorer.RougeScorer(["rougeL"]).score(reference, candidate)["rougeL"].fmeasure
        for (reference, candidate, expected) in [
            ("The cat sat on the mat.", "the cat is on the mat", 0.8333333333333334),
            ("a b c d e f", "f e d c b a", 0.16666666666666666),
            ("It's 3.5 kg, naïve!", "it s 3 5 kg na ve", 1.0),
            ("alpha beta", "gamma", 0.0),
            ("", "x", 0.0),
            ("one two three", "one two three four five", 0.7499999999999999),
        ] {
            let found = f1(&words(reference), &words(candidate));
            assert!((found - expected).abs() < 1e-12, "{reference:?} {candidate:?}: {found}");
        }
    }
}
