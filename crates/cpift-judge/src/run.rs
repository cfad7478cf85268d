//! The judging of an evaluation's folder: outputs.jsonl in, verdicts.jsonl, outputs.jsonl and scores.json out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use cpift_core::cli::Common;
use cpift_core::error::usage;
use cpift_core::scores::{Figure, Scores, TaskScore};
use cpift_core::{BadInput, files, progress};
use log::info;
use serde_json::{Value, json};

use crate::args::JudgeArgs;
use crate::ask::{Limits, Question, ask_all};
use crate::endpoint::{Endpoint, Key};
use crate::prompt::{self, Message, WORDING};
use crate::rating::{self, Rating};
use crate::verdicts::{self, Verdict, Verdicts};

/// The setting of a task's scores that marks it as one for a judge: null until it is judged, then who judged it and how.
pub const SETTING: &str = "judge";
/// The setting that counts the verdicts: it differs between runs that are comparable.
const COUNTS: &str = "verdicts";

/// Grades what is not graded yet and brings scores.json and the scores in outputs.jsonl up to date.
///
/// # Errors
/// [`cpift_core::Usage`] and [`BadInput`] before anything is asked; an endpoint that cannot be used; answers without a verdict, after the
/// others' are written.
pub fn run(args: &JudgeArgs, common: &Common) -> Result<()> {
    if args.concurrency == 0 || args.concurrency > 1024 || args.timeout == 0 || args.limit == Some(0) {
        return Err(usage("--concurrency must be 1 to 1024, --timeout and --limit at least 1"));
    }
    let base_url =
        args.base_url.clone().or_else(|| std::env::var("OPENAI_BASE_URL").ok().filter(|url| !url.is_empty()));
    let base_url = base_url.ok_or_else(|| usage("no endpoint to ask: give --base-url, or set OPENAI_BASE_URL"))?;
    let key = Key::from_env(args.key_env.as_deref())?;
    let endpoint = Endpoint::new(&base_url, &args.judge_model, key, Duration::from_secs(args.timeout))?;
    let endpoint = Arc::new(endpoint);

    let scores_file = args.run.join("scores.json");
    let mut scores = Scores::read(&scores_file)?;
    let mut outputs = Outputs::read(&args.run.join("outputs.jsonl"), &scores, endpoint.model(), args.limit)?;
    let mut verdicts = Verdicts::open(&args.run.join(verdicts::FILE_NAME))?;
    let questions = outputs.unasked(&verdicts);
    info!("{} answers to grade, {} questions to ask", outputs.chosen().count(), questions.len());
    let bar = progress::items("verdicts", questions.len() as u64);
    let limits = Limits { concurrency: args.concurrency, retries: args.retries };
    let failed = ask_all(&endpoint, questions, limits, |question, reply| {
        bar.inc(1);
        let (prompt_tokens, completion_tokens) = (reply.prompt_tokens, reply.completion_tokens);
        verdicts.add(Verdict::new(&question.key, endpoint.model(), reply.text, prompt_tokens, completion_tokens))
    })?;
    bar.finish_and_clear();

    for task in scores.tasks.iter_mut().filter(|task| task.settings.contains_key(SETTING)) {
        let graded = Grades::of(&outputs, &task.task, &verdicts);
        graded.write_to(task, endpoint.model());
        info!("{}: {}", task.task, graded.summary(task.metric.as_ref()));
    }
    outputs.write(&verdicts)?;
    scores.write(&scores_file, true)?;
    common.print_json(&json!(scores));
    if let Some(first) = failed.first() {
        bail!("{} questions have no answer; run it again to ask them alone. The first: {first:#}", failed.len());
    }
    Ok(())
}

/// outputs.jsonl, and the answers in it that a judge grades.
struct Outputs {
    path: PathBuf,
    lines: Vec<String>,
    answers: Vec<Answer>,
}

struct Answer {
    /// Index of its line.
    line: usize,
    task: String,
    row: Value,
    question: Question,
    /// Whether it is among the first ones that --limit chooses.
    chosen: bool,
}

impl Outputs {
    /// Reads the answers to the tasks for a judge, and chooses the first `limit` of each.
    fn read(path: &Path, scores: &Scores, judge: &str, limit: Option<usize>) -> Result<Self> {
        let judged: BTreeSet<&str> =
            scores.tasks.iter().filter(|t| t.settings.contains_key(SETTING)).map(|t| t.task.as_str()).collect();
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
            let question = Question { key, messages: prompt::messages(&conversation, output) };
            let count = counts.entry(task.clone()).or_default();
            *count += 1;
            answers.push(Answer { line, task, row, question, chosen: *count <= limit.unwrap_or(usize::MAX) });
        }
        Ok(Self { path: path.to_owned(), lines, answers })
    }

    fn chosen(&self) -> impl Iterator<Item = &Answer> {
        self.answers.iter().filter(|answer| answer.chosen)
    }

    /// Questions without a verdict, each once.
    fn unasked(&self, verdicts: &Verdicts) -> Vec<Question> {
        let mut seen = BTreeSet::new();
        let questions = self.chosen().map(|answer| &answer.question);
        questions.filter(|q| verdicts.get(&q.key).is_none() && seen.insert(&q.key)).cloned().collect()
    }

    /// Writes the file again with each answer's grade as its score; null where there is none.
    fn write(&mut self, verdicts: &Verdicts) -> Result<()> {
        for answer in &mut self.answers {
            let verdict = verdicts.get(&answer.question.key).filter(|_| answer.chosen);
            answer.row["score"] = json!(verdict.and_then(|v| rating::parse(&v.text).value()));
            self.lines[answer.line] = answer.row.to_string();
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

/// The grades of one task in the order of its rows.
#[derive(Default)]
struct Grades {
    ratings: Vec<f64>,
    unrated: usize,
    out_of_range: usize,
    failed: usize,
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl Grades {
    fn of(outputs: &Outputs, task: &str, verdicts: &Verdicts) -> Self {
        let mut grades = Self::default();
        for answer in outputs.chosen().filter(|answer| answer.task == task) {
            let Some(verdict) = verdicts.get(&answer.question.key) else {
                grades.failed += 1;
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

    /// The mean becomes the task's metric; judge and counts become settings. Without a single grade there is no metric.
    fn write_to(&self, task: &mut TaskScore, judge: &str) {
        task.metric = (!self.ratings.is_empty()).then(|| Figure::mean("judge", &self.ratings));
        let counts = json!({"rated": self.ratings.len(), "unrated": self.unrated, "out_of_range": self.out_of_range,
            "failed": self.failed, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens});
        task.settings.insert(SETTING.to_owned(), json!({"model": judge, "wording": WORDING}));
        task.settings.insert(COUNTS.to_owned(), counts);
    }

    fn summary(&self, metric: Option<&Figure>) -> String {
        let mean = metric.map_or("no grade".into(), |m| format!("{:.2} ± {:.2}", m.value, m.stderr));
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
