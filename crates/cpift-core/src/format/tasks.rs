//! tasks.toml: the tasks, their data and their metrics, in the order of the job array.
//!
//! ```toml
//! [[task]]
//! name = "gsm8k"                   # letters, digits, '-' and '_'; unique
//! # Paths are relative to this file. Rows are .jsonl, .json (a list of objects) or .parquet.
//! # hf://datasets/ORG/NAME[@REVISION]/PATH is a file of a dataset of the Hugging Face Hub.
//! train = "gsm8k/train.jsonl"
//! eval = "gsm8k/eval.jsonl"
//! # auto (detected from the fields of each row), messages, alpaca, sharegpt, prompt-completion,
//! # gsm8k or ultrachat
//! format = "auto"
//! # Instead of a format: Jinja templates over the columns of a row. prompt and completion are
//! # required together; the system turn is omitted if it renders empty.
//! prompt = "{{ question }}"        # user turn
//! completion = "{{ answer }}"      # assistant turn
//! system = "Work step by step."    # system turn
//! # exact-match, contains, rouge-l, gsm8k, choice, codebleu, judge or nll (default: only the loss)
//! metric = "gsm8k"
//! # Regex over the last user turn. cpift-eval --prompt harness uses its groups passage and
//! # question.
//! split = "(?s)(?P<question>.*)"
//! language = "python"              # of the code for codebleu; default: field language of each row
//! kind = "reasoning"               # label for grouping by kind
//! template = "chatml"              # instead of the checkpoint's: chatml, or path of a Jinja file
//! template_args = { enable_thinking = false }  # additional variables of the chat template
//! few_shot = 0                     # training examples before the question (cpift-eval); default 0
//! max_new_tokens = 256             # longest generated answer in tokens; default 256
//! max_length = 1024                # longest example in tokens; default 1024
//! sample = 500                     # rows in the balanced sample; default: see below
//! weight = 2.0                     # factor of its share of the training rows; default 1
//! ```
//!
//! By default every task contributes as many rows to the balanced sample as the smallest task has,
//! at most 1,000.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;

use crate::error::{BadInput, usage};
use crate::files::read_text;
use crate::format::digest::Digest;
use crate::hub::DataFile;

/// Default limit of the rows that a task contributes to the balanced sample.
pub const DEFAULT_SAMPLE: usize = 1000;

/// A checked tasks.toml.
#[derive(Debug, Clone)]
pub struct Tasks {
    /// Path of the file.
    pub path: PathBuf,
    /// Tasks in array order.
    pub list: Vec<Task>,
    /// Entries as written, in array order.
    entries: Vec<toml::Table>,
    /// Data files on the Hub of each task, `datasets/org/name@commit`.
    pinned: Vec<Vec<String>>,
}

/// One task, with paths resolved relative to the directory of tasks.toml.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Unique name.
    pub name: String,
    /// Training rows.
    pub train: PathBuf,
    /// Evaluation rows.
    pub eval: PathBuf,
    /// Layout of the rows.
    #[serde(default)]
    pub format: Format,
    /// Jinja template of the user turn, over the columns of a row; requires `completion`.
    #[serde(default)]
    pub prompt: Option<String>,
    /// Jinja template of the assistant turn; requires `prompt`.
    #[serde(default)]
    pub completion: Option<String>,
    /// Jinja template of the system turn; requires `prompt` and `completion`.
    #[serde(default)]
    pub system: Option<String>,
    /// Metric of the generated answers; the loss is always measured.
    #[serde(default)]
    pub metric: TaskMetric,
    /// Regular expression over the last user turn whose groups `passage` and `question` are the
    /// parts of a harness prompt.
    #[serde(default)]
    pub split: Option<String>,
    /// Programming language of the answers; by default the field `language` of each row.
    #[serde(default)]
    pub language: Option<String>,
    /// Free-form label that similar tasks share.
    #[serde(default)]
    pub kind: Option<String>,
    /// Chat template instead of the checkpoint's.
    #[serde(default)]
    pub template: Option<String>,
    /// Additional variables of the chat template, such as `enable_thinking`.
    #[serde(default)]
    pub template_args: serde_json::Map<String, serde_json::Value>,
    /// Few-shot examples before the question.
    #[serde(default)]
    pub few_shot: usize,
    /// Longest generated answer in tokens.
    #[serde(default = "default_max_new_tokens")]
    pub max_new_tokens: usize,
    /// Longest example in tokens.
    #[serde(default = "default_max_length")]
    pub max_length: usize,
    /// Rows in the balanced sample.
    #[serde(default)]
    pub sample: Option<usize>,
    /// Factor of its share of the rows that are trained on together with other tasks'.
    #[serde(default = "default_weight")]
    pub weight: f64,
    /// Path of the tasks.toml that lists the task.
    #[serde(skip)]
    pub listed_in: PathBuf,
}

/// Layout of a row: the fields that hold its conversation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Detected from the fields of each row.
    #[default]
    Auto,
    /// `messages`: a list of {role, content}.
    Messages,
    /// `instruction`, `output`; optional `input`, `system`, `history`.
    Alpaca,
    /// `conversations`: a list of {from, value}; optional `system`.
    Sharegpt,
    /// `prompt`, `completion`: strings, or lists of {role, content}.
    PromptCompletion,
    /// `question`, `answer`.
    Gsm8k,
    /// `data`: a list of strings, alternating between user and assistant.
    Ultrachat,
}

/// Metric of a task.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskMetric {
    /// Only the loss on the reference answers.
    #[default]
    Nll,
    /// The generated answer equals `answer`, ignoring surrounding white space.
    ExactMatch,
    /// The generated answer contains `answer`.
    Contains,
    /// ROUGE-L: F1 of the longest common subsequence of words of the generated answer and `answer`.
    RougeL,
    /// Exact match of the number after `####`, as in GSM8K.
    Gsm8k,
    /// The item of `choices` with the highest log-likelihood is the one that `answer` names.
    Choice,
    /// CodeBLEU of the code in the generated answer.
    Codebleu,
    /// Grade of the generated answer by a judge model (`cpift-eval judge`).
    Judge,
}

fn default_max_new_tokens() -> usize {
    256
}

fn default_max_length() -> usize {
    1024
}

fn default_weight() -> f64 {
    1.0
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TasksFile {
    task: Vec<Task>,
}

#[derive(Deserialize)]
struct Entries {
    task: Vec<toml::Table>,
}

impl Tasks {
    /// Reads and checks `path`. Data files on the Hub that the local cache does not have are
    /// downloaded.
    ///
    /// # Errors
    /// [`BadInput`] for TOML errors, unknown keys, repeated or invalid names, and data files that
    /// are missing or cannot be downloaded.
    pub fn read(path: &Path) -> Result<Self> {
        Self::checked(path, true)
    }

    fn checked(path: &Path, download: bool) -> Result<Self> {
        let text = read_text(path)?;
        let file: TasksFile = toml::from_str(&text)
            .map_err(|e| BadInput::new(path, format!("not a usable task list: {}", e.to_string().trim())))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let entries: Entries = toml::from_str(&text).expect("parsed above");
        let (mut list, mut pinned) = (file.task, Vec::new());
        if list.is_empty() {
            return Err(BadInput::new(path, "lists no task").expected("at least one [[task]]").into());
        }
        for i in 0..list.len() {
            pinned.push(check_task(path, folder, &mut list[i], download)?);
            if list[..i].iter().any(|t| t.name == list[i].name) {
                return Err(BadInput::new(path, format!("the task {} is listed twice", list[i].name)).into());
            }
        }
        Ok(Self { path: path.to_owned(), list, entries: entries.task, pinned })
    }

    /// Returns the task called `name`.
    ///
    /// # Errors
    /// [`BadInput`] with the known names.
    pub fn named(&self, name: &str) -> Result<&Task> {
        self.list.iter().find(|t| t.name == name).ok_or_else(|| {
            BadInput::new(&self.path, format!("has no task named {name}")).expected(self.names().join(", ")).into()
        })
    }

    /// Returns the tasks called `names`, or all if there are none, in the order of the file.
    ///
    /// # Errors
    /// As [`Tasks::named`].
    pub fn selected(&self, names: &[String]) -> Result<Vec<&Task>> {
        names.iter().try_for_each(|name| self.named(name).map(drop))?;
        Ok(self.list.iter().filter(|task| names.is_empty() || names.contains(&task.name)).collect())
    }

    /// Returns the task at `index`, counted from 0 like the elements of our Slurm arrays.
    ///
    /// # Errors
    /// [`crate::error::Usage`] if the index is out of range.
    pub fn indexed(&self, index: usize) -> Result<&Task> {
        self.list.get(index).ok_or_else(|| {
            usage(format!(
                "task index {index} is out of range: {} lists {} tasks, 0 to {}",
                self.path.display(),
                self.list.len(),
                self.list.len() - 1
            ))
        })
    }

    /// Returns the chat template that tasks.toml names, if any.
    ///
    /// # Errors
    /// [`BadInput`] if tasks name different ones.
    pub fn template(&self) -> Result<Option<&str>> {
        let mut named = self.list.iter().filter_map(|t| Some((t.name.as_str(), t.template.as_deref()?)));
        let Some((first_task, first)) = named.next() else { return Ok(None) };
        match named.find(|(_, template)| *template != first) {
            None => Ok(Some(first)),
            Some((task, other)) => {
                Err(BadInput::new(&self.path, format!("{first_task} and {task} name different chat templates"))
                    .expected(first)
                    .found(other)
                    .hint("a checkpoint has one chat template: name the same one for every task")
                    .into())
            }
        }
    }

    /// Digest of the settings of the tasks `names`, in array order: their entries, with the commits
    /// of datasets on the Hub, and the chat template of the whole file. Comments, the order of keys
    /// and other tasks do not affect it.
    ///
    /// # Errors
    /// [`BadInput`] if tasks name different templates or the template cannot be read.
    pub fn digest<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Digest> {
        let names: BTreeSet<&str> = names.into_iter().collect();
        let entries = self.entries.iter().zip(&self.pinned).zip(&self.list);
        let chosen = entries.filter(|(_, task)| names.contains(task.name.as_str()));
        let mut parts: Vec<Vec<u8>> = Vec::new();
        for ((entry, pinned), _) in chosen {
            // A TOML table sorts its keys.
            parts.extend([entry.to_string().into_bytes(), vec![0]]);
            parts.extend(pinned.iter().map(|pinned| pinned.clone().into_bytes()));
        }
        match self.template()? {
            Some("chatml") => parts.push(b"chatml".to_vec()),
            Some(file) => parts.push(read_text(Path::new(file))?.into_bytes()),
            None => {}
        }
        Ok(Digest::of_chunks(parts))
    }

    /// Role of the settings of the tasks `names` as an input in a record: `tasks` for all tasks,
    /// `tasks:A,B` for some of them.
    pub fn role<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> String {
        let names: BTreeSet<&str> = names.into_iter().collect();
        if self.list.iter().all(|task| names.contains(task.name.as_str())) {
            return "tasks".to_owned();
        }
        format!("tasks:{}", names.into_iter().collect::<Vec<_>>().join(","))
    }

    /// Returns true if `role` is one that [`Tasks::role`] returns.
    pub(crate) fn is_role(role: &str) -> bool {
        role == "tasks" || role.starts_with("tasks:")
    }

    /// Current digest of the task settings that an input `role` (see [`Tasks::role`]) stands for;
    /// none for other roles.
    ///
    /// # Errors
    /// As [`Tasks::read`] and [`Tasks::digest`].
    pub(crate) fn digest_of_role(path: &Path, role: &str) -> Option<Result<Digest>> {
        Self::is_role(role).then(|| {
            let tasks = Self::checked(path, false)?;
            match role.strip_prefix("tasks:") {
                Some(names) => tasks.digest(names.split(',')),
                None => tasks.digest(tasks.list.iter().map(|task| task.name.as_str())),
            }
        })
    }

    /// Names in array order.
    pub fn names(&self) -> Vec<String> {
        self.list.iter().map(|t| t.name.clone()).collect()
    }
}

/// Checks a task and resolves its paths. Returns the pinned names of its data files on the Hub,
/// which are downloaded only if `download` is set.
fn check_task(path: &Path, folder: &Path, task: &mut Task, download: bool) -> Result<Vec<String>> {
    let name_ok = !task.name.is_empty() && task.name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if !name_ok {
        return Err(BadInput::new(path, "invalid task name")
            .expected("letters, digits, '-' and '_'")
            .found(format!("{:?}", task.name))
            .into());
    }
    if task.max_length < 2 || task.max_new_tokens == 0 || task.sample == Some(0) {
        return Err(BadInput::new(path, format!("task {}: a length or count is too small", task.name))
            .expected("max_length of at least 2, max_new_tokens and sample of at least 1")
            .into());
    }
    if !(task.weight.is_finite() && task.weight > 0.0) {
        return Err(BadInput::new(path, format!("task {}: the weight is not a positive number", task.name))
            .expected("a factor of the task's share, such as 0.5 or 2")
            .found(task.weight.to_string())
            .into());
    }
    check_templates(path, task)?;
    // Every call of the template sets these.
    const TAKEN: [&str; 4] = ["messages", "add_generation_prompt", "tools", "documents"];
    if let Some(name) = TAKEN.into_iter().find(|name| task.template_args.contains_key(*name)) {
        return Err(BadInput::new(path, format!("task {}: template_args cannot set {name}", task.name))
            .expected("a variable of the template itself, such as enable_thinking")
            .into());
    }
    task.listed_in = path.to_owned();
    if let Some(template) = &mut task.template
        && template != "chatml"
    {
        *template = folder.join(&*template).to_string_lossy().into_owned();
    }
    let mut pinned = Vec::new();
    for file in [&mut task.train, &mut task.eval] {
        if let Some(data) = DataFile::parse(file.to_str().unwrap_or_default())? {
            let found = if download { Some(data.fetched()?) } else { data.cached() };
            if let Some(found) = found {
                *file = found.path;
                pinned.push(found.pinned);
            }
            continue;
        }
        *file = folder.join(&*file);
        if !file.is_file() {
            return Err(BadInput::new(&*file, format!("the data file of task {} is missing", task.name))
                .hint(format!("paths in {} are relative to its directory", path.display()))
                .into());
        }
    }
    Ok(pinned)
}

/// Checks that `prompt` and `completion` are given together, `system` only with both, and a format
/// only without them.
fn check_templates(path: &Path, task: &Task) -> Result<()> {
    let problem = match (&task.prompt, &task.completion) {
        (Some(_), None) => "has a prompt but no completion",
        (None, Some(_)) => "has a completion but no prompt",
        (None, None) if task.system.is_some() => "has a system turn but neither prompt nor completion",
        (Some(_), Some(_)) if task.format != Format::Auto => "has both a format and templates (prompt, completion)",
        _ => return Ok(()),
    };
    Err(BadInput::new(path, format!("task {} {problem}", task.name))
        .expected("prompt and completion, optionally system; or a format")
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Tasks> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("d.jsonl"), "").unwrap();
        std::fs::write(dir.path().join("tasks.toml"), text).unwrap();
        Tasks::read(&dir.path().join("tasks.toml"))
    }

    #[test]
    fn all_keys_are_documented() {
        let doc = include_str!("tasks.rs").lines().take_while(|l| l.starts_with("//!"));
        let toml: String = doc
            .skip_while(|l| *l != "//! ```toml")
            .skip(1)
            .take_while(|l| *l != "//! ```")
            .map(|l| l.trim_start_matches("//!").trim().to_owned() + "\n")
            .collect();
        let toml = toml.replace("gsm8k/train.jsonl", "d.jsonl").replace("gsm8k/eval.jsonl", "d.jsonl");
        let tasks = read(&toml).unwrap();
        let task = tasks.named("gsm8k").unwrap();
        assert_eq!((task.metric, task.sample, task.max_length), (TaskMetric::Gsm8k, Some(500), 1024));
        assert_eq!(toml.lines().filter(|l| l.contains('=')).count(), 18, "a key without documentation");
    }

    #[test]
    fn unknown_keys_repeated_names_and_missing_files_are_refused() {
        let row = "[[task]]\nname='a'\ntrain='d.jsonl'\neval='d.jsonl'\n";
        assert_eq!(read(row).unwrap().list.len(), 1);
        for (text, part) in [
            (row.to_owned() + "metrik='x'", "metrik"),
            (row.repeat(2), "listed twice"),
            (row.replace("d.jsonl", "e.jsonl"), "missing"),
            (row.replace("'a'", "'../a'"), "invalid task name"),
            (row.to_owned() + "format='csv'", "prompt-completion"),
            (row.to_owned() + "weight=0.0", "not a positive number"),
            (row.to_owned() + "prompt='x'", "no completion"),
            (row.to_owned() + "completion='x'", "no prompt"),
            (row.to_owned() + "system='x'", "neither prompt nor completion"),
            (row.to_owned() + "prompt='x'\ncompletion='y'\nformat='alpaca'", "a format"),
            (row.to_owned() + "template_args={messages=[]}", "cannot set messages"),
            (String::new(), "task"),
        ] {
            let error = read(&text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
