//! Metrics of generated answers: generation; grading of the answer as text against the reference
//! (`exact-match`, `contains`, `rouge-l`, `gsm8k`); and `judge`, whose answers are graded later.
//!
//! `gsm8k` is the exact match of the final number, as in lm-evaluation-harness (task `gsm8k`,
//! version 3), including its quirks.

use std::sync::LazyLock;

use anyhow::Result;
use cpift_core::format::scores::JUDGE;
use cpift_core::format::tasks::Task;
use cpift_core::run::progress;
use cpift_data::Row;
use cpift_torch::generate::{Generated, GenerationOptions, generate};
use cpift_torch::session::Session;
use regex::Regex;
use serde_json::{Map, Value, json};

use super::metric::{FRACTION, Grade, Lines, Metric, Prepared, Scored, TaskView};
use crate::fields::{field_error, reference};
use crate::prompt::Prompt;

/// The prompts of a task.
#[derive(Default)]
pub(super) struct Prompts {
    texts: Vec<String>,
    ids: Vec<Vec<i64>>,
    /// Number of prompts whose beginning was cut to fit the model's context.
    pub(super) cut: usize,
}

impl FromIterator<Prompt> for Prompts {
    fn from_iter<I: IntoIterator<Item = Prompt>>(prompts: I) -> Self {
        let mut all = Self::default();
        for prompt in prompts {
            all.cut += usize::from(prompt.cut > 0);
            all.texts.push(prompt.text);
            all.ids.push(prompt.ids);
        }
        all
    }
}

/// A generated answer.
pub(super) struct Answer {
    /// The answer, cut before a stop text, without preceding reasoning.
    pub(super) output: String,
    /// Reasoning before the answer, with its closing mark.
    reasoning: Option<String>,
    /// Text of the prompt.
    prompt: String,
}

impl Answer {
    /// The row's line of outputs.jsonl, without a grade.
    pub(super) fn line(&self, reference: &str) -> Value {
        let mut line = json!({"prompt": self.prompt, "output": self.output, "reference": reference});
        if let Some(reasoning) = &self.reasoning {
            line["reasoning"] = json!(reasoning);
        }
        line
    }
}

impl Prompts {
    /// Generates an answer to each prompt.
    ///
    /// # Errors
    /// Failures of the tokenizer when it decodes.
    pub(super) fn answers(&self, session: &Session, task: &TaskView<'_>) -> Result<Vec<Answer>> {
        let TaskView { settings, prompter, .. } = task;
        let options = GenerationOptions {
            eos_ids: &session.text.stop_ids(),
            stop: &prompter.stop(),
            max_new_tokens: settings.max_new_tokens,
            batch_size: settings.batch_size,
            sampling: settings.sampling,
        };
        let bar = progress::items("answers", self.ids.len() as u64);
        let answers = generate(&session.model, &session.text, &self.ids, &options, || bar.inc(1))?;
        bar.finish_and_clear();
        let answer = |(prompt, answer): (&String, Generated)| {
            let (output, reasoning) = prompter.split_reasoning(answer)?;
            Ok(Answer { prompt: prompt.clone(), output, reasoning })
        };
        self.texts.iter().zip(answers).map(answer).collect()
    }
}

/// The prompt of a row, with room for the longest answer.
pub(super) fn prompt(task: &TaskView<'_>, row: &Row) -> Result<Prompt> {
    task.prompter.prompt(row, task.settings.max_new_tokens)
}

/// Grades an output against a reference.
pub(super) type Grader = fn(output: &str, reference: &str) -> Grade;

/// Prepares a metric that grades each answer on its own: `reference` reads the reference of a row,
/// `grade` computes figures of which the main one is `name`.
///
/// # Errors
/// As [`Metric::prepare`].
pub(super) fn graded(
    task: &TaskView<'_>,
    name: &'static str,
    reference: impl Fn(&Task, &Row) -> Result<String>,
    grade: Grader,
) -> Result<Box<dyn Prepared>> {
    let asked = |row: &Row| Ok((reference(task.task, row)?, prompt(task, row)?));
    let asked: Vec<(String, Prompt)> = task.rows.iter().map(asked).collect::<Result<_>>()?;
    let (references, prompts) = asked.into_iter().unzip::<_, _, _, Vec<Prompt>>();
    Ok(Box::new(Graded { name, references, prompts: prompts.into_iter().collect(), grade }))
}

struct Graded {
    name: &'static str,
    references: Vec<String>,
    prompts: Prompts,
    grade: Grader,
}

impl Prepared for Graded {
    fn score(&self, session: &Session, task: &TaskView<'_>) -> Result<Scored> {
        let answers = self.prompts.answers(session, task)?;
        let mut lines = Lines::new(self.name);
        for ((row, answer), reference) in task.rows.iter().zip(&answers).zip(&self.references) {
            lines.add(row, (self.grade)(&answer.output, reference), answer.line(reference));
        }
        Ok(lines.scored(self.prompts.cut))
    }
}

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

/// Extracted text of an answer without a number.
const INVALID: &str = "[invalid]";

fn constant(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant that parses")
}

static STRICT: LazyLock<Regex> = LazyLock::new(|| constant(r"#### (\-?[0-9\.\,]+)"));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| constant(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
/// The last pattern is `\.$` in Python, whose `$` also matches before a final line break.
static IGNORED: LazyLock<[Regex; 4]> =
    LazyLock::new(|| [constant(","), constant(r"\$"), constant(r"(?s).*#### "), constant(r"\.(\n?)\z")]);

/// The number after the first `####`, or `[invalid]`.
pub fn strict_match(answer: &str) -> &str {
    STRICT.captures(answer).and_then(|c| c.get(1)).map_or(INVALID, |m| m.as_str())
}

/// The last match that looks like a number, or `[invalid]`.
pub fn flexible_extract(answer: &str) -> &str {
    FLEXIBLE.captures_iter(answer).last().and_then(|c| c.get(1).or(c.get(2))).map_or(INVALID, |m| m.as_str())
}

/// Normalises both sides of the comparison: removes commas, dollar signs, everything up to `#### `
/// and a final full stop, and converts to lower case.
pub fn normalise(text: &str) -> String {
    let mut out = text.to_owned();
    for pattern in IGNORED.iter() {
        out = pattern.replace_all(&out, "$1").into_owned();
    }
    out.to_lowercase()
}

/// `gsm8k`: strict match; `exact_match_flexible` uses flexible extraction.
pub(crate) struct Gsm8k;

impl Metric for Gsm8k {
    fn key(&self) -> &'static str {
        "gsm8k"
    }

    fn name(&self) -> &'static str {
        "exact_match"
    }

    fn unit(&self) -> &'static str {
        FRACTION
    }

    fn summary(&self) -> &'static str {
        "answers whose number after #### is that of the reference"
    }

    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        graded(task, self.name(), reference, grade)
    }
}

fn grade(output: &str, reference: &str) -> Grade {
    let (strict, flexible) = (strict_match(output), flexible_extract(output));
    let expected = normalise(reference);
    let same = |extracted: &str| f64::from(normalise(extracted) == expected);
    let extracted = [("extracted", strict), ("flexible_extract", flexible)];
    Grade {
        score: same(strict),
        also: vec![("exact_match_flexible", same(flexible))],
        extracted: Map::from_iter(extracted.map(|(key, text)| (key.to_owned(), Value::from(text)))),
    }
}

/// `judge`: generates answers for `cpift-eval judge`.
pub(crate) struct Judge;

impl Metric for Judge {
    fn key(&self) -> &'static str {
        "judge"
    }

    fn name(&self) -> &'static str {
        "judge"
    }

    fn unit(&self) -> &'static str {
        "1 to 10"
    }

    fn summary(&self) -> &'static str {
        "grade by another model; written by cpift-eval judge"
    }

    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        let prompts: Prompts = task.rows.iter().map(|row| prompt(task, row)).collect::<Result<_>>()?;
        Ok(Box::new(ToJudge(prompts)))
    }
}

struct ToJudge(Prompts);

impl Prepared for ToJudge {
    /// Leaves the metric and the scores out: not judged is not a grade of zero.
    fn score(&self, session: &Session, task: &TaskView<'_>) -> Result<Scored> {
        let answers = self.0.answers(session, task)?;
        let line = |(row, answer): (&Row, &Answer)| {
            let turns: Vec<Value> =
                row.prompt().iter().map(|turn| json!({"role": turn.role, "content": turn.content})).collect();
            let mut line = answer.line(row.reference());
            (line["messages"], line["row"]) = (json!(turns), json!(row.place.row));
            line
        };
        let lines = task.rows.iter().zip(&answers).map(line).collect();
        Ok(Scored { prompts_cut: self.0.cut, lines, settings: vec![(JUDGE, Value::Null)], ..Scored::default() })
    }
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

    #[test]
    fn strict_takes_the_first_marked_number_and_flexible_the_last_of_any() {
        let answer = "She has 12 apples.\n#### 1,234\nThat is 7 more. #### 9";
        assert_eq!(strict_match(answer), "1,234");
        assert_eq!(flexible_extract(answer), "9");
        assert_eq!(strict_match("about 5"), INVALID);
        assert_eq!(flexible_extract("none"), INVALID);
    }

    #[test]
    fn the_quirks_of_the_harness_are_kept() {
        assert_eq!(normalise("$1,234."), "1234");
        assert_eq!(normalise("work\n#### 18"), "18");
        // Dots alone look like a number to the flexible pattern, and 12.0 is not 12.
        assert_eq!(flexible_extract("It is 5. Hope this helps..."), "...");
        assert_ne!(normalise("12.0"), normalise("12"));
        assert_eq!(flexible_extract("I paid $18.50."), "$18.50.");
    }
}
