//! `cpift-eval judge`: arguments, and the judging of an evaluation's directory. Reads scores.json
//! and outputs.jsonl, asks, and writes verdicts.jsonl, both files again, and judge.cpift.json.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use cpift_core::error::usage;
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::{self, JUDGE, OUTPUTS, Scores};
use cpift_core::record::provenance::{Recorder, argv};
use cpift_core::run::cli::Common;
use cpift_core::run::progress;
use log::info;
use serde_json::{Value, json};

use crate::ask::{Limits, ask_all};
use crate::endpoint::Endpoint;
use crate::key::Key;
use crate::outputs::{Grades, Outputs};
use crate::question::WORDING;
use crate::verdicts::{self, Verdict, Verdicts};

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
