//! Grades generated answers from 1 to 10 with any OpenAI-compatible chat endpoint, one answer at a
//! time, in the style of MT-Bench's single-answer grading: `cpift-eval judge`. Reads scores.json
//! and outputs.jsonl, asks, and writes verdicts.jsonl, both files again, and judge.cpift.json.
//!
//! | module | content |
//! | --- | --- |
//! | this one | arguments; many questions with retries and limited concurrency |
//! | `verdicts` | answers to grade, grades of a task, and verdicts.jsonl, so that no question is asked twice |
//! | `endpoint` | one request; the API key |
//! | `question` | wording of the question; rating in the reply |

mod endpoint;
mod question;
pub mod verdicts;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Error, Result, bail};
use cpift_core::error::usage;
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::{self, JUDGE, OUTPUTS, Scores};
use cpift_core::record::provenance::{Recorder, argv};
use cpift_core::run::cli::Common;
use cpift_core::run::progress;
use log::{info, warn};
use serde_json::{Value, json};

use endpoint::{Endpoint, Failure, Key, Reply};
use question::{Question, WORDING};
use verdicts::{Grades, Outputs, Verdict, Verdicts};

/// Arguments of `cpift-eval judge`.
#[derive(clap::Args, Debug)]
pub struct JudgeArgs {
    /// Directory written by `cpift-eval run`; its tasks with metric = "judge" are graded
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Base URL of the endpoint, including /v1: requests go to URL/chat/completions [default:
    /// $OPENAI_BASE_URL]
    #[arg(long, value_name = "URL", help_heading = "Input and output")]
    pub base_url: Option<String>,
    /// Environment variable that holds the API key. The key is never written to a file or a message
    /// [default: OPENAI_API_KEY; no key is sent if that is not set]
    #[arg(long, value_name = "NAME", help_heading = "Input and output")]
    pub key_env: Option<String>,
    /// Model name of the judge at the endpoint
    #[arg(long, value_name = "NAME", help_heading = "Method")]
    pub judge_model: String,
    /// Maximum length of a reply in tokens. A reply cut off before its rating is not a verdict; the
    /// next run asks again
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Method")]
    pub max_tokens: u32,
    /// Ask about the first N answers of each task only; earlier verdicts on other answers still
    /// count [default: all]
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub limit: Option<usize>,
    /// Maximum number of requests in flight
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Run")]
    pub concurrency: usize,
    /// Timeout of a request in seconds
    #[arg(long, value_name = "S", default_value_t = 120, help_heading = "Run")]
    pub timeout: u64,
    /// Retries of a request after a timeout, a lost connection, status 429 or 5xx. The first wait
    /// is half a second and doubles with each retry, up to a minute; Retry-After can lengthen it
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Run")]
    pub retries: u32,
}

impl JudgeArgs {
    /// Examples at the end of `--help`.
    pub const EXAMPLES: &str = "\
Examples:
  A local judge (llama.cpp's llama-server, vLLM, Ollama and others implement this API; no key is needed):
    llama-server -m judge.gguf --port 8080 &
    cpift-eval judge scores/final --base-url http://127.0.0.1:8080/v1 --judge-model judge
  A hosted judge:
    export OPENAI_API_KEY=...
    cpift-eval judge scores/final --base-url https://api.openai.com/v1 --judge-model gpt-4o
  Every verdict is kept in RUN/verdicts.jsonl. After a failure, run the command again: it asks only what is missing.";

    /// Checks the arguments and opens the endpoint that they name.
    fn endpoint(&self) -> Result<Endpoint> {
        if self.concurrency == 0 || self.concurrency > 1024 {
            return Err(usage("--concurrency must be 1 to 1024"));
        }
        if self.timeout == 0 || self.limit == Some(0) || self.max_tokens == 0 {
            return Err(usage("--timeout, --limit and --max-tokens must be at least 1"));
        }
        let from_env = || std::env::var("OPENAI_BASE_URL").ok().filter(|url| !url.is_empty());
        let base_url = self.base_url.clone().or_else(from_env);
        let base_url = base_url.ok_or_else(|| usage("no endpoint: give --base-url, or set OPENAI_BASE_URL"))?;
        let key = Key::from_env(self.key_env.as_deref())?;
        key.iter().try_for_each(|key| key.check_arguments(&argv()))?;
        Endpoint::new(&base_url, &self.judge_model, key, Duration::from_secs(self.timeout), self.max_tokens)
    }
}

/// Provenance record of the judging, beside cpift.json of the evaluation.
const RECORD: &str = "judge.cpift.json";

/// Asks for the missing grades and updates scores.json and outputs.jsonl. A task without any
/// verdict of this judge is left unchanged. `stage` is the program's name in the record.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any question; an endpoint that cannot
/// be used; questions without an answer, after the other answers are written.
pub fn run(stage: &str, args: &JudgeArgs, common: &Common) -> Result<()> {
    let mut recorder = Recorder::start(stage);
    let endpoint = Arc::new(args.endpoint()?);
    let (scores_file, outputs_file) = (args.run.join(scores::FILE_NAME), args.run.join(OUTPUTS));
    let mut scores = Scores::read(&scores_file)?;
    let mut outputs = Outputs::read(&outputs_file, &scores, endpoint.model(), args.limit)?;
    recorder.input("scores", &scores_file, Digest::of_file(&scores_file)?);
    recorder.input("outputs", &outputs_file, Digest::of_file(&outputs_file)?);
    let mut verdicts = Verdicts::open(&args.run.join(verdicts::FILE_NAME))?;
    let questions = outputs.unasked(&verdicts);
    let asked = questions.len();
    info!("{} answers to grade, {asked} questions to ask", outputs.chosen().count());
    let bar = progress::items("verdicts", asked as u64);
    let limits = Limits { concurrency: args.concurrency, retries: args.retries };
    let failed = ask_all(&endpoint, questions, limits, |question, reply| {
        bar.inc(1);
        verdicts.add(Verdict::new(question, endpoint.model(), reply))
    })?;
    bar.finish_and_clear();

    for task in scores.tasks.iter_mut().filter(|task| task.settings.contains_key(JUDGE)) {
        let grades = Grades::of(&outputs, &task.task, &verdicts);
        grades.write_to(task, endpoint.model());
        info!("{}: {}", task.task, grades.summary());
    }
    outputs.write(&verdicts)?;
    scores.write(&scores_file, true)?;
    let record = args.run.join(RECORD);
    // A rerun without questions keeps the record of the run that asked them.
    if asked > failed.len() || (failed.is_empty() && !record.is_file()) {
        for (name, value) in facts(args, &endpoint, &outputs, (asked, failed.len())) {
            recorder.fact(name, value);
        }
        recorder.write_to(&record)?;
    }
    common.print_json(&json!(scores));
    if let Some(first) = failed.first() {
        bail!(
            "{} questions have no answer; run the command again to ask only these. The first error: {first:#}",
            failed.len()
        );
    }
    Ok(())
}

/// Facts for the provenance record.
fn facts(
    args: &JudgeArgs,
    endpoint: &Endpoint,
    outputs: &Outputs,
    (asked, failed): (usize, usize),
) -> [(&'static str, Value); 8] {
    [
        ("judge", json!(endpoint.model())),
        ("base_url", json!(endpoint.base_url())),
        ("wording", json!(WORDING)),
        ("max_tokens", json!(args.max_tokens)),
        ("temperature", json!(endpoint.at_temperature_0().then_some(0))),
        ("questions", json!(outputs.digest_of_questions())),
        ("asked", json!(asked)),
        ("failed", json!(failed)),
    ]
}

/// Wait before the first retry, without jitter.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Longest wait before a retry, even if the endpoint asks for more.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Consecutive failed questions that end the run: the endpoint is down, not the question at fault.
const GIVE_UP_AFTER: usize = 10;

/// Limits on the requests.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Requests in flight.
    concurrency: usize,
    /// Retries per question.
    retries: u32,
}

/// Asks all `questions` and calls `answered` with each question and reply in the order of arrival.
/// Returns the errors of the failed questions.
///
/// # Errors
/// Stops early if the endpoint refuses the key or does not exist, after ten consecutive failures,
/// and if `answered` fails. Requests in flight are then abandoned.
fn ask_all(
    endpoint: &Arc<Endpoint>,
    questions: Vec<Question>,
    limits: Limits,
    mut answered: impl FnMut(&Question, Reply) -> Result<()>,
) -> Result<Vec<Error>> {
    let queue =
        Arc::new(Queue { questions, next: AtomicUsize::new(0), stopped: Mutex::new(false), wake: Condvar::new() });
    // Stops the threads however this function returns.
    let _stop = StopOnDrop(Arc::clone(&queue));
    // Capacity 0: no thread asks more than one question after an outcome that ends the run.
    let (sender, outcomes) = sync_channel(0);
    for _ in 0..limits.concurrency.min(queue.questions.len()) {
        let (endpoint, queue, sender) = (Arc::clone(endpoint), Arc::clone(&queue), sender.clone());
        thread::spawn(move || queue.work(&endpoint, limits.retries, &sender));
    }
    drop(sender);
    let (mut failed, mut in_a_row) = (Vec::new(), 0);
    for (i, outcome) in outcomes {
        match outcome {
            Ok(reply) => {
                answered(&queue.questions[i], reply)?;
                in_a_row = 0;
            }
            Err(Failure::Fatal(error)) => return Err(error),
            Err(Failure::Passing { error, .. } | Failure::Lasting(error)) => {
                in_a_row += 1;
                if in_a_row == GIVE_UP_AFTER {
                    return Err(error.context(format!("{GIVE_UP_AFTER} questions in a row failed; the last error")));
                }
                failed.push(error);
            }
        }
    }
    Ok(failed)
}

struct Queue {
    questions: Vec<Question>,
    next: AtomicUsize,
    stopped: Mutex<bool>,
    wake: Condvar,
}

struct StopOnDrop(Arc<Queue>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        *self.0.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.wake.notify_all();
    }
}

impl Queue {
    /// Asks questions until none are left or the run has ended.
    fn work(&self, endpoint: &Endpoint, retries: u32, outcomes: &SyncSender<(usize, Result<Reply, Failure>)>) {
        while !self.stopped_within(Duration::ZERO) {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(question) = self.questions.get(i) else { return };
            if outcomes.send((i, self.ask(endpoint, question, retries))).is_err() {
                return;
            }
        }
    }

    fn ask(&self, endpoint: &Endpoint, question: &Question, retries: u32) -> Result<Reply, Failure> {
        let mut attempt = 0;
        loop {
            match endpoint.ask(&question.messages) {
                Err(Failure::Passing { error, retry_after }) if attempt < retries => {
                    let wait = wait_before_retry(&question.key, attempt, retry_after);
                    warn!("{error:#}\n  retrying in {:.1} s", wait.as_secs_f64());
                    if self.stopped_within(wait) {
                        return Err(Failure::Passing { error, retry_after });
                    }
                    attempt += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Waits until the run ends, at most `wait`. Returns true if it has ended.
    fn stopped_within(&self, wait: Duration) -> bool {
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.wake.wait_timeout_while(stopped, wait, |stopped| !*stopped);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Exponential backoff with jitter (50 to 100 %), at least the wait the endpoint asks for and at
/// most a minute. The jitter depends on question and attempt only.
fn wait_before_retry(key: &str, attempt: u32, retry_after: Option<Duration>) -> Duration {
    let hash = blake3::hash(format!("{key} {attempt}").as_bytes());
    let share = 0.5 + f64::from(hash.as_bytes()[0]) / 510.0;
    let backoff = FIRST_WAIT.saturating_mul(1 << attempt.min(16)).min(LONGEST_WAIT).mul_f64(share);
    backoff.max(retry_after.unwrap_or_default()).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_with_jitter_and_are_bounded() {
        for attempt in 0..40 {
            let whole = (0.5 * 2f64.powi(attempt as i32)).min(60.0);
            let wait = wait_before_retry("k", attempt, None).as_secs_f64();
            assert!((whole / 2.0..=whole).contains(&wait), "{attempt}: {wait}");
        }
        let first: Vec<Duration> = (0..20).map(|i| wait_before_retry(&i.to_string(), 0, None)).collect();
        assert!(first.iter().any(|wait| *wait != first[0]), "no jitter");
        assert_eq!(first[0], wait_before_retry("0", 0, None));
    }

    #[test]
    fn the_endpoints_wish_is_followed_up_to_a_minute() {
        assert_eq!(wait_before_retry("k", 0, Some(Duration::from_secs(7))), Duration::from_secs(7));
        assert_eq!(wait_before_retry("k", 0, Some(Duration::from_secs(86_400))), LONGEST_WAIT);
        assert!(wait_before_retry("k", 3, Some(Duration::ZERO)) >= Duration::from_secs(2));
    }
}
