//! verdicts.jsonl: one line per verdict, append-only, so that a killed run keeps every reply it has
//! paid for.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::{BadInput, files};
use log::info;
use serde::{Deserialize, Serialize};

use crate::endpoint::Reply;
use crate::question::{Question, Rating, WORDING};

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
