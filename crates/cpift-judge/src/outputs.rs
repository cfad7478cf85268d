//! The answers of outputs.jsonl that a judge grades, and the grades of each task.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::format::scores::{JUDGE, MetricValue, Scores, TaskScore, VERDICTS};
use cpift_core::{BadInput, files};
use log::warn;
use serde_json::{Value, json};

use crate::question::{Message, Question, Rating, WORDING};
use crate::verdicts::Verdicts;

/// outputs.jsonl with the answers in it to grade.
pub(crate) struct Outputs {
    path: PathBuf,
    lines: Vec<String>,
    answers: Vec<Answer>,
}

/// An answer to grade.
pub(crate) struct Answer {
    /// Index of its line.
    line: usize,
    /// Fields of the line.
    fields: Value,
    question: Question,
    /// True if it is within `--limit`.
    chosen: bool,
}

impl Outputs {
    /// Reads the answers to the tasks with metric `judge`, and chooses the first `limit` of each.
    ///
    /// # Errors
    /// [`BadInput`] if there are none, or a line is not an answer.
    pub(crate) fn read(path: &Path, scores: &Scores, judge: &str, limit: Option<usize>) -> Result<Self> {
        let judged: BTreeSet<&str> =
            scores.tasks.iter().filter(|t| t.settings.contains_key(JUDGE)).map(|t| t.task.as_str()).collect();
        if judged.is_empty() {
            return Err(BadInput::new(path, "contains no answers to grade")
                .hint("cpift-eval run writes them for tasks with metric = \"judge\" in tasks.toml")
                .into());
        }
        let lines: Vec<String> = files::read_text(path)?.lines().map(str::to_owned).collect();
        let (mut answers, mut counts) = (Vec::new(), BTreeMap::<String, usize>::new());
        for (line, text) in lines.iter().enumerate() {
            let bad = |what: String| BadInput::new(path, format!("line {}: {what}", line + 1));
            let row: Value = serde_json::from_str(text).map_err(|e| bad(format!("not JSON: {e}")))?;
            let Some(task) = row["task"].as_str().filter(|task| judged.contains(task)).map(str::to_owned) else {
                continue;
            };
            let fields = || {
                bad("not an answer to grade".into())
                    .expected("output, and messages (a list of {role, content}) or prompt (a text)")
            };
            let conversation = conversation(&row).ok_or_else(fields)?;
            let output = row["output"].as_str().ok_or_else(fields)?;
            let count = counts.entry(task.clone()).or_default();
            *count += 1;
            let chosen = *count <= limit.unwrap_or(usize::MAX);
            let place = (task, row["row"].as_u64());
            let question = Question::new(place, &scores.model_digest.to_string(), &conversation, output, judge);
            answers.push(Answer { line, fields: row, question, chosen });
        }
        Ok(Self { path: path.to_owned(), lines, answers })
    }

    /// The answers within `--limit`.
    pub(crate) fn chosen(&self) -> impl Iterator<Item = &Answer> {
        self.answers.iter().filter(|answer| answer.chosen)
    }

    /// Questions of the chosen answers without a verdict, without duplicates.
    pub(crate) fn unasked(&self, verdicts: &Verdicts) -> Vec<Question> {
        let mut seen = BTreeSet::new();
        let questions = self.chosen().map(|answer| &answer.question);
        questions.filter(|q| verdicts.get(&q.key).is_none() && seen.insert(&q.key)).cloned().collect()
    }

    fn of_task<'a>(&'a self, task: &'a str) -> impl Iterator<Item = &'a Answer> {
        self.answers.iter().filter(move |answer| answer.question.task == task)
    }

    /// BLAKE3 hash over the keys of all questions, asked or not.
    pub(crate) fn digest_of_questions(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for answer in &self.answers {
            hasher.update(answer.question.key.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Rewrites the file. Each answer gets its grade as `score` and `extracted`, and the judge's
    /// reply as `verdict`; without a grade `score` is null. Tasks without any verdict are left
    /// unchanged.
    ///
    /// # Errors
    /// A file that cannot be replaced.
    pub(crate) fn write(&mut self, verdicts: &Verdicts) -> Result<()> {
        let judged = |answer: &&Answer| verdicts.get(&answer.question.key).is_some();
        let tasks: BTreeSet<String> =
            self.answers.iter().filter(judged).map(|answer| answer.question.task.clone()).collect();
        for answer in self.answers.iter_mut().filter(|answer| tasks.contains(&answer.question.task)) {
            let fields = answer.fields.as_object_mut().expect("a row with fields is an object");
            let verdict = verdicts.get(&answer.question.key);
            let rating = json!(verdict.and_then(|v| Rating::of(&v.text).value()));
            fields.insert("score".into(), rating.clone());
            match verdict {
                Some(verdict) => {
                    fields.insert("verdict".into(), json!(verdict.text));
                    fields.insert("extracted".into(), rating);
                }
                // Existing fields are from another judge.
                None => ["verdict", "extracted"].iter().for_each(|name| drop(fields.shift_remove(*name))),
            }
            self.lines[answer.line] = answer.fields.to_string();
        }
        files::write_text(&self.path, &(self.lines.join("\n") + "\n"), true)
    }
}

/// The conversation before the answer: `messages`, or `prompt` as a single user turn.
fn conversation(row: &Value) -> Option<Vec<Message>> {
    match row.get("messages") {
        Some(turns) => serde_json::from_value(turns.clone()).ok().filter(|turns: &Vec<Message>| !turns.is_empty()),
        None => Some(vec![Message { role: "user".into(), content: row["prompt"].as_str()?.to_owned() }]),
    }
}

/// All known grades of one task in row order, including those from earlier runs.
#[derive(Default)]
pub(crate) struct Grades {
    ratings: Vec<f64>,
    unrated: usize,
    out_of_range: usize,
    /// Chosen answers without a verdict.
    failed: usize,
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl Grades {
    /// Counts the verdicts on the answers of `task`.
    pub(crate) fn of(outputs: &Outputs, task: &str, verdicts: &Verdicts) -> Self {
        let mut grades = Self::default();
        for answer in outputs.of_task(task) {
            let Some(verdict) = verdicts.get(&answer.question.key) else {
                grades.failed += usize::from(answer.chosen);
                continue;
            };
            grades.prompt_tokens += verdict.prompt_tokens;
            grades.completion_tokens += verdict.completion_tokens;
            match Rating::of(&verdict.text) {
                Rating::Rated(value) => grades.ratings.push(value),
                Rating::OutOfRange => grades.out_of_range += 1,
                Rating::Unrated => grades.unrated += 1,
            }
        }
        grades
    }

    fn mean(&self) -> Option<MetricValue> {
        (!self.ratings.is_empty()).then(|| MetricValue::mean("judge", &self.ratings))
    }

    /// Writes the mean as the task's metric, and judge and counts as settings. Without any grade
    /// the metric is null; without any verdict the task is left unchanged.
    pub(crate) fn write_to(&self, task: &mut TaskScore, judge: &str) {
        if self.ratings.len() + self.unrated + self.out_of_range == 0 {
            return;
        }
        let by = json!({"model": judge, "wording": WORDING});
        if let Some(other) = task.settings.get(JUDGE).filter(|other| !other.is_null() && **other != by) {
            warn!("{}: the grades by {by} replace those by {other}", task.task);
        }
        task.metric = self.mean();
        let counts = json!({"rated": self.ratings.len(), "unrated": self.unrated, "out_of_range": self.out_of_range,
            "failed": self.failed, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens});
        task.settings.insert(JUDGE.to_owned(), by);
        task.settings.insert(VERDICTS.to_owned(), counts);
    }

    /// One line for the log.
    pub(crate) fn summary(&self) -> String {
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
