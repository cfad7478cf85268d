//! The answers of outputs.jsonl that a judge grades, the grades of each task, and verdicts.jsonl,
//! from which they come: one line per verdict, append-only, so that a killed run keeps every reply
//! it has paid for.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::format::scores::{JUDGE, MetricValue, Scores, TaskScore, VERDICTS};
use cpift_core::{BadInput, files};
use log::{info, warn};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::endpoint::Reply;
use crate::question::{Message, Question, Rating, WORDING};

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

/// Name of the file in the directory of an evaluation.
pub const FILE_NAME: &str = "verdicts.jsonl";

/// A judge's reply to one question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Verdict {
    /// Key of the question.
    pub(crate) key: String,
    /// Task of the answer; older files lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) task: Option<String>,
    /// Row of the task; the first of several rows with the same question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) row: Option<u64>,
    /// Model name of the judge.
    pub(crate) judge: String,
    /// Version of the question's wording.
    pub(crate) wording: u32,
    /// Rating in `text`, for readers of the file. Scores are computed from `text`.
    pub(crate) rating: Option<f64>,
    /// The judge's reply.
    pub(crate) text: String,
    /// Tokens of the question, as counted by the endpoint.
    pub(crate) prompt_tokens: u64,
    /// Tokens of the reply, as counted by the endpoint.
    pub(crate) completion_tokens: u64,
}

impl Verdict {
    /// The verdict of `judge` on `question`.
    pub(crate) fn new(question: &Question, judge: &str, reply: Reply) -> Self {
        let Reply { text, prompt_tokens, completion_tokens } = reply;
        Self {
            key: question.key.clone(),
            task: Some(question.task.clone()),
            row: question.row,
            judge: judge.into(),
            wording: WORDING,
            rating: Rating::of(&text).value(),
            text,
            prompt_tokens,
            completion_tokens,
        }
    }
}

/// The verdicts of a file, which is locked against other runs.
pub(crate) struct Verdicts {
    path: PathBuf,
    file: File,
    known: HashMap<String, Verdict>,
}

impl Verdicts {
    /// Opens or creates the file and truncates an incomplete last line.
    ///
    /// # Errors
    /// [`BadInput`] if another run holds the lock, the path is a symbolic link, or a line is not a
    /// verdict.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if path.is_symlink() {
            return Err(BadInput::new(path, "is a symbolic link; links are not followed for writing").into());
        }
        let opened = OpenOptions::new().read(true).append(true).create(true).open(path);
        let mut file = opened.map_err(|e| BadInput::new(path, format!("cannot open: {e}")))?;
        // Without locks in the file system a second run cannot be detected.
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(BadInput::new(path, "another run is adding to it")
                .hint("wait until that run has ended")
                .into());
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("reading {}", path.display()))?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).with_context(|| format!("truncating {}", path.display()))?;
        let mut known = HashMap::new();
        for (i, line) in bytes[..whole].split(|b| *b == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
            let verdict: Verdict = serde_json::from_slice(line).map_err(|e| {
                BadInput::new(path, format!("line {}: not a verdict: {e}", i + 1))
                    .hint("delete the line; its question is then asked again")
            })?;
            known.insert(verdict.key.clone(), verdict);
        }
        Ok(Self { path: path.to_owned(), file, known })
    }

    /// The verdict on the question `key`, if it was asked before.
    pub(crate) fn get(&self, key: &str) -> Option<&Verdict> {
        self.known.get(key)
    }

    /// Appends a verdict in one write.
    pub(crate) fn add(&mut self, verdict: Verdict) -> Result<()> {
        let line = serde_json::to_string(&verdict)? + "\n";
        self.file.write_all(line.as_bytes()).with_context(|| format!("writing {}", self.path.display()))?;
        self.known.insert(verdict.key.clone(), verdict);
        Ok(())
    }
}

/// The complete lines of verdicts.jsonl in `folders`, without duplicates, to carry over into a new
/// directory: verdicts are paid for. Waits for a judge that is adding to one of the files. Symbolic
/// links are skipped.
///
/// # Errors
/// A file that cannot be read.
pub fn kept<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Result<String> {
    let (mut seen, mut all) = (HashSet::new(), String::new());
    for path in folders.into_iter().map(|folder| folder.join(FILE_NAME)) {
        if path.is_symlink() || !path.is_file() {
            continue;
        }
        let mut file = files::open(&path)?;
        // Without locks in the file system a running judge cannot be detected.
        if matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
            info!("waiting for the judge that adds to {}", path.display());
            let _ = file.lock_shared();
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("reading {}", path.display()))?;
        // `Verdicts::open` reports damaged lines. Scoring must not fail because of them.
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        whole.filter(|line| seen.insert((*line).to_owned())).for_each(|line| all.push_str(line));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_not_followed_for_writing() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("precious"), dir.path().join(FILE_NAME));
        std::fs::write(&target, "not a verdict").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(Verdicts::open(&link).err().expect("it is refused").to_string().contains("is a symbolic link"));
        assert_eq!(std::fs::read_to_string(target).unwrap(), "not a verdict");
    }

    fn verdict(key: &str) -> Verdict {
        let question = Question { key: key.into(), task: "t".into(), row: Some(4), messages: Vec::new() };
        Verdict::new(&question, "j", Reply { text: "Rating: [[7]]".into(), prompt_tokens: 5, completion_tokens: 3 })
    }

    #[test]
    fn a_torn_last_line_goes_and_the_next_verdict_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let mut verdicts = Verdicts::open(&path).unwrap();
        verdicts.add(verdict("a")).unwrap();
        verdicts.add(verdict("b")).unwrap();
        drop(verdicts);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        let mut verdicts = Verdicts::open(&path).unwrap();
        assert!(verdicts.get("a").is_some() && verdicts.get("b").is_none());
        verdicts.add(verdict("b")).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn complete_lines_are_kept_without_duplicates() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two, none] = ["one", "two", "none"].map(|name| dir.path().join(name));
        [&one, &two, &none].iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        // A judge was killed while it wrote.
        std::fs::write(one.join(FILE_NAME), "a\nb\nc").unwrap();
        std::fs::write(two.join(FILE_NAME), b"b\nd\n\xff\n").unwrap();
        assert_eq!(kept([&*one, &*none, &*two]).unwrap(), "a\nb\nd\n\u{fffd}\n");
        std::os::unix::fs::symlink(one.join(FILE_NAME), none.join(FILE_NAME)).unwrap();
        assert_eq!(kept([&*none]).unwrap(), "");
    }

    #[test]
    fn kept_waits_for_a_running_judge() {
        let dir = tempfile::tempdir().unwrap();
        let mut verdicts = Verdicts::open(&dir.path().join(FILE_NAME)).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let folder = dir.path().to_owned();
        let reader = std::thread::spawn(move || tell.send(kept([&*folder]).unwrap()).unwrap());
        assert!(told.recv_timeout(std::time::Duration::from_millis(200)).is_err(), "it waits");
        verdicts.add(verdict("a")).unwrap();
        drop(verdicts);
        assert!(told.recv().unwrap().contains("\"key\":\"a\""));
        reader.join().unwrap();
    }

    #[test]
    fn lines_say_their_row_and_older_ones_without_it_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let old = "{\"key\":\"old\",\"judge\":\"j\",\"wording\":1,\"rating\":7.0,\"text\":\"[[7]]\",\"prompt_tokens\":5,\
                   \"completion_tokens\":3}\n";
        std::fs::write(&path, old).unwrap();
        let mut verdicts = Verdicts::open(&path).unwrap();
        verdicts.add(verdict("new")).unwrap();
        drop(verdicts);
        assert!(std::fs::read_to_string(&path).unwrap().contains("{\"key\":\"new\",\"task\":\"t\",\"row\":4,"));
        let verdicts = Verdicts::open(&path).unwrap();
        let (old, new) = (verdicts.get("old").unwrap(), verdicts.get("new").unwrap());
        assert_eq!((&old.task, old.row, new.row), (&None, None, Some(4)));
    }

    #[test]
    fn a_broken_line_within_is_refused_by_its_number_and_a_second_run_by_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let first = Verdicts::open(&path).unwrap();
        let error = Verdicts::open(&path).err().unwrap().to_string();
        assert!(error.contains("another run"), "{error}");
        drop(first);
        std::fs::write(&path, "{\"key\":\n{}\n").unwrap();
        let error = Verdicts::open(&path).err().unwrap().to_string();
        assert!(error.contains("line 1: not a verdict"), "{error}");
    }
}
