//! `cpift-eval run`: one checkpoint on every task.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::checkpoint::Digest;
use cpift_core::cli::Common;
use cpift_core::files::{StagedDir, check_output};
use cpift_core::provenance::{FILE_NAME, Recorder};
use cpift_core::scores::{FORMAT_VERSION, Scores, TaskScore};
use cpift_core::tasks::{Task, TaskMetric, Tasks};
use cpift_judge::verdicts;
use cpift_torch::data::{self, Layout, Row};
use cpift_torch::session::Session;
use log::{info, warn};
use serde_json::{Value, json};
use tch::Kind;

use crate::args::RunArgs;
use crate::metrics::{self, Loss, Settings};
use crate::prompt::Prompter;

/// Scores and writes the output folder.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`]; nothing is written then.
pub fn run(args: &RunArgs, common: &Common) -> Result<()> {
    args.check()?;
    check_output(&args.out, common.force)?;
    let mut recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let list = Tasks::read(&args.tasks)?;
    let tasks = read_rows(args, &list)?;
    let device = args.device.open(common.threads)?;
    let session = Session::for_inference(&args.model, list.template()?, device, args.kind(device))?;
    recorder.input("model", &args.model, session.digest.clone());
    let (mut scores, mut outputs) = (Vec::new(), String::new());
    for task_rows in &tasks {
        let (task, (score, rows)) = (&task_rows.task, score_task(args, &session, task_rows)?);
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

/// A task to score.
struct TaskRows {
    task: Task,
    rows: Vec<Row>,
    /// Of the file they came from.
    digest: Digest,
    /// Examples before every question, and the training rows they are drawn from; none are read where there are to be none.
    few_shot: usize,
    train: Vec<Row>,
}

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
            let layout = Layout::of(&task)?;
            let mut rows = data::read_rows(&task.eval, &layout)?;
            rows.truncate(args.limit.unwrap_or(usize::MAX));
            let few_shot = args.few_shot.unwrap_or(task.few_shot);
            let train = if few_shot > 0 { data::read_rows(&task.train, &layout)? } else { Vec::new() };
            Ok(TaskRows { task, rows, digest, few_shot, train })
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

fn score_task(args: &RunArgs, session: &Session, of: &TaskRows) -> Result<(TaskScore, Vec<Value>)> {
    let TaskRows { task, rows, digest, few_shot, train } = of;
    let prompter = Prompter::new(session, task, args.prompt, (train, *few_shot, args.seed))?;
    let settings = Settings {
        batch_size: args.batch_size,
        max_new_tokens: args.max_new_tokens.unwrap_or(task.max_new_tokens),
        max_length: session.context_of(task, None),
        sampling: args.sampling(),
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
    let scored = metrics::score(session, &prompter, task, rows, &settings)?;
    if scored.prompts_cut > 0 {
        warn!("{}: {} prompts lost their beginning to the model's context", task.name, scored.prompts_cut);
    }
    let main = scored.metric.as_ref().map_or(String::new(), |m| format!("{} {:.3}, ", m.name, m.value));
    info!("{}: {main}nll {:.4} ± {:.4} ({} rows)", task.name, nll.value, nll.stderr, nll.n);
    let mut score = TaskScore {
        task: task.name.clone(),
        eval_digest: digest.clone(),
        metric: scored.metric,
        also: scored.also.into_iter().chain([perplexity]).map(|figure| (figure.name.clone(), figure)).collect(),
        nll,
        settings: BTreeMap::from([
            ("rows".to_owned(), json!(rows.len())),
            ("prompt".to_owned(), json!(args.prompt.name())),
            ("few_shot".to_owned(), json!(few_shot)),
            (
                "compute_dtype".to_owned(),
                json!(if args.kind(session.model.device()) == Kind::Float { "f32" } else { "bf16" }),
            ),
            (
                "sampling".to_owned(),
                settings
                    .sampling
                    .map_or(Value::Null, |s| json!({"temperature": s.temperature, "top_p": s.top_p, "seed": s.seed})),
            ),
            ("seed".to_owned(), if *few_shot > 0 { json!(args.seed) } else { Value::Null }),
            ("max_new_tokens".to_owned(), json!(settings.max_new_tokens)),
            ("max_length".to_owned(), json!(settings.max_length)),
            ("truncated".to_owned(), json!(truncated)),
            ("dropped".to_owned(), json!(dropped)),
            ("templates".to_owned(), templates(task)),
            ("prompts_cut".to_owned(), json!(scored.prompts_cut)),
            ("skipped".to_owned(), json!(scored.skipped)),
        ]),
    };
    if task.metric == TaskMetric::Codebleu {
        score.settings.insert("language".to_owned(), json!(task.language));
    }
    if task.metric == TaskMetric::Judge {
        score.settings.insert(cpift_judge::run::SETTING.to_owned(), Value::Null);
    }
    Ok((score, scored.outputs))
}
