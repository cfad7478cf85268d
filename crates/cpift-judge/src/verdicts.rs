//! The file of verdicts: one line each, only ever appended to, so that a killed run loses no reply it has paid for.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::{BadInput, files};
use log::info;
use serde::{Deserialize, Serialize};

use crate::ask::Question;
use crate::endpoint::Reply;
use crate::prompt::{Message, WORDING};
use crate::rating;

/// The file's name in an evaluation's folder.
pub const FILE_NAME: &str = "verdicts.jsonl";

/// A judge's reply to one question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// The question, by [`key`].
    pub key: String,
    /// The task it is on; older files do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// The row of the task; the first of several with the same question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row: Option<u64>,
    /// The judge's name.
    pub judge: String,
    /// Version of the question's words.
    pub wording: u32,
    /// The grade in the text, for readers of the file: the text is what counts.
    pub rating: Option<f64>,
    /// The reply.
    pub text: String,
    /// Tokens of the question, as the endpoint counts them.
    pub prompt_tokens: u64,
    /// Tokens of the reply, as the endpoint counts them.
    pub completion_tokens: u64,
}

impl Verdict {
    /// A reply of `judge` to `question`.
    pub fn new(question: &Question, judge: &str, reply: Reply) -> Self {
        let Reply { text, prompt_tokens, completion_tokens } = reply;
        Self {
            key: question.key.clone(),
            task: Some(question.task.clone()),
            row: question.row,
            judge: judge.into(),
            wording: WORDING,
            rating: rating::parse(&text).value(),
            text,
            prompt_tokens,
            completion_tokens,
        }
    }
}

/// What makes a question the same: the scored model, its prompt, its answer, the judge and the wording.
pub fn key(model: &str, conversation: &[Message], answer: &str, judge: &str) -> String {
    let question = serde_json::json!([model, conversation, answer, judge, WORDING]);
    blake3::hash(question.to_string().as_bytes()).to_hex().to_string()
}

/// The verdicts of a file, which is locked against other runs.
pub struct Verdicts {
    path: PathBuf,
    file: File,
    known: HashMap<String, Verdict>,
}

impl Verdicts {
    /// Opens or creates the file; a last line that was cut short goes.
    ///
    /// # Errors
    /// [`BadInput`] when another run has it, it is a link, or a line is no verdict.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_symlink() {
            return Err(BadInput::new(path, "is a symbolic link, which is not followed for writing").into());
        }
        let opened = OpenOptions::new().read(true).append(true).create(true).open(path);
        let mut file = opened.map_err(|e| BadInput::new(path, format!("cannot be opened: {e}")))?;
        // Where a file system has no locks, nothing keeps a second run away.
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(BadInput::new(path, "another run is adding to it").hint("wait until it has ended").into());
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("reading {}", path.display()))?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).with_context(|| format!("mending {}", path.display()))?;
        let mut known = HashMap::new();
        for (i, line) in bytes[..whole].split(|b| *b == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
            let verdict: Verdict = serde_json::from_slice(line).map_err(|e| {
                BadInput::new(path, format!("line {}: not a verdict: {e}", i + 1))
                    .hint("delete the line: it is asked again")
            })?;
            known.insert(verdict.key.clone(), verdict);
        }
        Ok(Self { path: path.to_owned(), file, known })
    }

    /// The verdict on a question, if it was asked before.
    pub fn get(&self, key: &str) -> Option<&Verdict> {
        self.known.get(key)
    }

    /// Adds a verdict, in one write.
    ///
    /// # Errors
    /// I/O errors.
    pub fn add(&mut self, verdict: Verdict) -> Result<()> {
        let line = serde_json::to_string(&verdict)? + "\n";
        self.file.write_all(line.as_bytes()).with_context(|| format!("writing {}", self.path.display()))?;
        self.known.insert(verdict.key.clone(), verdict);
        Ok(())
    }
}

/// The verdicts in `folders` as text, each once and whole, for a folder that is made anew: they are paid for. Waits for a judge that is at
/// work in one of them. A link is passed over: no judge wrote through it.
///
/// # Errors
/// I/O errors.
pub fn kept<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Result<String> {
    let (mut seen, mut all) = (HashSet::new(), String::new());
    for path in folders.into_iter().map(|folder| folder.join(FILE_NAME)) {
        if path.is_symlink() || !path.is_file() {
            continue;
        }
        let mut file = files::open(&path)?;
        // Where a file system has no locks, nothing tells of a judge.
        if matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
            info!("waiting for the judge that adds to {}", path.display());
            let _ = file.lock_shared();
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("reading {}", path.display()))?;
        // A damaged line is for `Verdicts::open` to tell of: scores must not be lost by it.
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
    fn what_is_kept_is_each_whole_verdict_once() {
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
    fn what_is_kept_is_read_when_the_judge_has_ended() {
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

    #[test]
    fn the_key_tells_apart_all_that_makes_a_question() {
        let turn = |text: &str| vec![Message { role: "user".into(), content: text.into() }];
        let keys = [
            key("m", &turn("p"), "a", "j"),
            key("n", &turn("p"), "a", "j"),
            key("m", &turn("q"), "a", "j"),
            key("m", &turn("p"), "b", "j"),
            key("m", &turn("p"), "a", "k"),
        ];
        let distinct: std::collections::HashSet<&String> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(keys[0], key("m", &turn("p"), "a", "j"));
    }
}
