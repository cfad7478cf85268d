//! `cpift-eval run`: one checkpoint on every task.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::checkpoint::Digest;
use cpift_core::cli::Common;
use cpift_core::error::usage;
use cpift_core::files::{StagedDir, check_output};
use cpift_core::provenance::{FILE_NAME, Recorder};
use cpift_core::scores::{FORMAT_VERSION, Scores, TaskScore};
use cpift_core::tasks::{Task, TaskMetric, Tasks};
use cpift_judge::verdicts;
use cpift_torch::data::{self, Layout, Row};
use cpift_torch::session::{Precision, Session};
use log::{info, warn};
use serde_json::{Value, json};

use crate::args::RunArgs;
use crate::metrics::{self, Loss, Settings};

/// Scores and writes the output folder.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`]; nothing is written then.
pub fn run(args: &RunArgs, common: &Common) -> Result<()> {
    if args.batch_size == 0 || args.limit == Some(0) || args.max_new_tokens == Some(0) {
        return Err(usage("--batch-size, --limit and --max-new-tokens must be at least 1"));
    }
    check_output(&args.out, common.force)?;
    let mut recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let list = Tasks::read(&args.tasks)?;
    let tasks = read_rows(args, &list)?;
    let device = args.device.open(common.threads)?;
    let session = Session::open(&args.model, list.template()?, device, Precision::F32)?;
    recorder.input("model", &args.model, session.digest.clone());
    let (mut scores, mut outputs) = (Vec::new(), String::new());
    for (task, rows, digest) in &tasks {
        let (score, rows) = score_task(args, &session, task, rows, digest)?;
        recorder.input(format!("eval:{}", task.name), &task.eval, score.eval_digest.clone());
        for mut row in rows {
            row["task"] = Value::from(task.name.as_str());
            writeln!(outputs, "{row}")?;
        }
        scores.push(score);
    }
    let scores = Scores {
        format_version: FORMAT_VERSION,
        model: args.model.display().to_string(),
        model_digest: session.digest.clone(),
        tasks: scores,
    };
    let staged = StagedDir::create(&args.out, common.force)?;
    scores.write(&staged.path().join("scores.json"), false)?;
    fs::write(staged.path().join("outputs.jsonl"), outputs).context("writing outputs.jsonl")?;
    keep_verdicts(&args.out, staged.path())?;
    recorder.write_to(&staged.path().join(FILE_NAME))?;
    staged.commit()?;
    common.print_json(&json!(scores));
    Ok(())
}

/// A judge's verdicts stay when a folder is scored again: they are paid for, and each is known by the very answer it is on.
fn keep_verdicts(old: &Path, new: &Path) -> Result<()> {
    let verdicts = old.join(verdicts::FILE_NAME);
    if verdicts.is_file() {
        fs::copy(&verdicts, new.join(verdicts::FILE_NAME))
            .with_context(|| format!("copying {}", verdicts.display()))?;
    }
    Ok(())
}

/// A task to score, its rows, and the digest of the file they came from.
type TaskRows = (Task, Vec<Row>, Digest);

fn read_rows(args: &RunArgs, tasks: &Tasks) -> Result<Vec<TaskRows>> {
    let chosen: Vec<Task> = if args.only.is_empty() {
        tasks.list.clone()
    } else {
        args.only.iter().map(|name| tasks.named(name).cloned()).collect::<Result<_>>()?
    };
    chosen
        .into_iter()
        .map(|task| {
            let digest = Digest::of_file(&task.eval)?;
            let mut rows = data::read_rows(&task.eval, &Layout::of(&task)?)?;
            rows.truncate(args.limit.unwrap_or(usize::MAX));
            Ok((task, rows, digest))
        })
        .collect()
}

/// The templates by which rows become conversations, null where there are none: other templates are another test on the same file.
fn templates(task: &Task) -> Value {
    match &task.prompt {
        Some(prompt) => json!({"system": task.system, "prompt": prompt, "completion": task.completion}),
        None => Value::Null,
    }
}

fn score_task(
    args: &RunArgs,
    session: &Session,
    task: &Task,
    rows: &[Row],
    eval_digest: &Digest,
) -> Result<(TaskScore, Vec<Value>)> {
    let settings = Settings {
        batch_size: args.batch_size,
        max_new_tokens: args.max_new_tokens.unwrap_or(task.max_new_tokens),
        max_length: session.context_of(task, None),
    };
    let loss = metrics::loss(session, task, rows, &settings)?;
    let perplexity = loss.perplexity();
    let Loss { nll, truncated, dropped } = loss;
    if truncated > 0 {
        warn!(
            "{}: {truncated} rows are longer than {} tokens: their loss is over the first ones, and {dropped} have none",
            task.name, settings.max_length
        );
    }
    let scored = metrics::score(session, task, rows, &settings)?;
    if scored.prompts_cut > 0 {
        warn!("{}: {} prompts lost their beginning to the model's context", task.name, scored.prompts_cut);
    }
    let main = scored.metric.as_ref().map_or(String::new(), |m| format!("{} {:.3}, ", m.name, m.value));
    info!("{}: {main}nll {:.4} ± {:.4} ({} rows)", task.name, nll.value, nll.stderr, nll.n);
    let mut score = TaskScore {
        task: task.name.clone(),
        eval_digest: eval_digest.clone(),
        metric: scored.metric,
        also: scored.also.into_iter().chain([perplexity]).map(|figure| (figure.name.clone(), figure)).collect(),
        nll,
        settings: BTreeMap::from([
            ("rows".to_owned(), json!(rows.len())),
            ("prompt".to_owned(), json!("chat")),
            ("max_new_tokens".to_owned(), json!(settings.max_new_tokens)),
            ("max_length".to_owned(), json!(settings.max_length)),
            ("truncated".to_owned(), json!(truncated)),
            ("dropped".to_owned(), json!(dropped)),
            ("templates".to_owned(), templates(task)),
            ("prompts_cut".to_owned(), json!(scored.prompts_cut)),
        ]),
    };
    if task.metric == TaskMetric::Judge {
        score.settings.insert(cpift_judge::run::SETTING.to_owned(), Value::Null);
    }
    Ok((score, scored.outputs))
}
