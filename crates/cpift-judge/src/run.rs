//! The judging of an evaluation's folder: outputs.jsonl in, verdicts.jsonl, outputs.jsonl, scores.json and judge.cpift.json out.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use cpift_core::error::usage;
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::{JUDGE, Scores};
use cpift_core::record::provenance::{Recorder, argv};
use cpift_core::run::cli::Common;
use cpift_core::run::progress;
use log::info;
use serde_json::json;

use crate::args::JudgeArgs;
use crate::ask::{Limits, ask_all};
use crate::endpoint::{Endpoint, Key};
use crate::grades::Grades;
use crate::outputs::Outputs;
use crate::prompt::WORDING;
use crate::verdicts::{self, Verdict, Verdicts};

/// The record of the judging, beside cpift.json of what was judged.
pub const RECORD: &str = "judge.cpift.json";

/// Grades what is not graded yet and brings scores.json and the scores in outputs.jsonl up to date. A task without a single verdict of
/// this judge stays as it was. `stage` is the program that does so, for the record.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before anything is asked; an endpoint that cannot be used; answers without a
/// verdict, after the others' are written.
pub fn run(stage: &str, args: &JudgeArgs, common: &Common) -> Result<()> {
    let mut recorder = Recorder::start(stage);
    let endpoint = Arc::new(endpoint(args)?);
    let (scores_file, outputs_file) = (args.run.join("scores.json"), args.run.join("outputs.jsonl"));
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
    // A rerun that asked nothing leaves the record of the run that did.
    if asked > failed.len() || (failed.is_empty() && !record.is_file()) {
        for (name, value) in facts(args, &endpoint, &outputs, (asked, failed.len())) {
            recorder.fact(name, value);
        }
        recorder.write_to(&record)?;
    }
    common.print_json(&json!(scores));
    if let Some(first) = failed.first() {
        bail!("{} questions have no answer; run it again to ask them alone. The first: {first:#}", failed.len());
    }
    Ok(())
}

fn endpoint(args: &JudgeArgs) -> Result<Endpoint> {
    if args.concurrency == 0 || args.concurrency > 1024 {
        return Err(usage("--concurrency must be 1 to 1024"));
    }
    if args.timeout == 0 || args.limit == Some(0) || args.max_tokens == 0 {
        return Err(usage("--timeout, --limit and --max-tokens must be at least 1"));
    }
    let base_url =
        args.base_url.clone().or_else(|| std::env::var("OPENAI_BASE_URL").ok().filter(|url| !url.is_empty()));
    let base_url = base_url.ok_or_else(|| usage("no endpoint to ask: give --base-url, or set OPENAI_BASE_URL"))?;
    let key = Key::from_env(args.key_env.as_deref())?;
    key.iter().try_for_each(|key| key.check_arguments(&argv()))?;
    Endpoint::new(&base_url, &args.judge_model, key, Duration::from_secs(args.timeout), args.max_tokens)
}

/// What the record says of the judging.
fn facts(
    args: &JudgeArgs,
    endpoint: &Endpoint,
    outputs: &Outputs,
    (asked, failed): (usize, usize),
) -> [(&'static str, serde_json::Value); 8] {
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
