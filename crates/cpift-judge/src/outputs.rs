//! outputs.jsonl: the answers that a judge grades, and their lines with the grades.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::format::scores::{JUDGE, Scores};
use cpift_core::{BadInput, files};
use serde_json::{Value, json};

use crate::ask::Question;
use crate::prompt::{self, Message};
use crate::rating;
use crate::verdicts::{self, Verdicts};

/// outputs.jsonl, and the answers in it that a judge grades.
pub struct Outputs {
    path: PathBuf,
    lines: Vec<String>,
    answers: Vec<Answer>,
}

/// An answer that a judge grades.
pub struct Answer {
    /// Index of its line.
    line: usize,
    /// The line.
    fields: Value,
    /// What the judge is asked about it.
    pub question: Question,
    /// Whether it is among the first ones that --limit chooses.
    pub chosen: bool,
}

impl Outputs {
    /// Reads the answers to the tasks for a judge, and chooses the first `limit` of each.
    ///
    /// # Errors
    /// [`BadInput`] when there are none, or a line is no answer.
    pub fn read(path: &Path, scores: &Scores, judge: &str, limit: Option<usize>) -> Result<Self> {
        let judged: BTreeSet<&str> =
            scores.tasks.iter().filter(|t| t.settings.contains_key(JUDGE)).map(|t| t.task.as_str()).collect();
        if judged.is_empty() {
            return Err(BadInput::new(path, "holds no answers to grade")
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
            let key = verdicts::key(&scores.model_digest.to_string(), &conversation, output, judge);
            let count = counts.entry(task.clone()).or_default();
            *count += 1;
            let chosen = *count <= limit.unwrap_or(usize::MAX);
            let messages = prompt::messages(&conversation, output);
            let question = Question { key, task, row: row["row"].as_u64(), messages };
            answers.push(Answer { line, fields: row, question, chosen });
        }
        Ok(Self { path: path.to_owned(), lines, answers })
    }

    /// The answers to be asked about.
    pub fn chosen(&self) -> impl Iterator<Item = &Answer> {
        self.answers.iter().filter(|answer| answer.chosen)
    }

    /// Questions without a verdict, each once.
    pub fn unasked(&self, verdicts: &Verdicts) -> Vec<Question> {
        let mut seen = BTreeSet::new();
        let questions = self.chosen().map(|answer| &answer.question);
        questions.filter(|q| verdicts.get(&q.key).is_none() && seen.insert(&q.key)).cloned().collect()
    }

    /// The answers to a task.
    pub fn of<'a>(&'a self, task: &'a str) -> impl Iterator<Item = &'a Answer> {
        self.answers.iter().filter(move |answer| answer.question.task == task)
    }

    /// BLAKE3 over the keys of all questions, asked or not.
    pub fn digest_of_questions(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for answer in &self.answers {
            hasher.update(answer.question.key.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Writes the file again, each answer with its grade as `score` and `extracted` and with the judge's text as `verdict`; without a
    /// grade the score is null. Tasks without a single verdict stay as they were.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, verdicts: &Verdicts) -> Result<()> {
        let judged = |answer: &&Answer| verdicts.get(&answer.question.key).is_some();
        let tasks: BTreeSet<String> =
            self.answers.iter().filter(judged).map(|answer| answer.question.task.clone()).collect();
        for answer in self.answers.iter_mut().filter(|answer| tasks.contains(&answer.question.task)) {
            let fields = answer.fields.as_object_mut().expect("a row with fields is an object");
            let verdict = verdicts.get(&answer.question.key);
            let rating = json!(verdict.and_then(|v| rating::parse(&v.text).value()));
            fields.insert("score".into(), rating.clone());
            match verdict {
                Some(verdict) => {
                    fields.insert("verdict".into(), json!(verdict.text));
                    fields.insert("extracted".into(), rating);
                }
                // What stands there is another judge's.
                None => ["verdict", "extracted"].iter().for_each(|name| drop(fields.shift_remove(*name))),
            }
            self.lines[answer.line] = answer.fields.to_string();
        }
        files::write_text(&self.path, &(self.lines.join("\n") + "\n"), true)
    }
}

/// What the answer answers: the turns, or a prompt as the user's one turn.
fn conversation(row: &Value) -> Option<Vec<Message>> {
    match row.get("messages") {
        Some(turns) => serde_json::from_value(turns.clone()).ok().filter(|turns: &Vec<Message>| !turns.is_empty()),
        None => Some(vec![Message { role: "user".into(), content: row["prompt"].as_str()?.to_owned() }]),
    }
}
