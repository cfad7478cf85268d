//! `cpift-eval run`: one checkpoint on every task.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::Checkpoint;
use cpift_core::files::{self, RECORD_NAME, StagedDir, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::{self, FORMAT_VERSION, JUDGE, OUTPUTS, Scores, TaskScore};
use cpift_core::format::tasks::{Task, TaskMetric, Tasks};
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_data::Row;
use cpift_judge::verdicts;
use cpift_torch::memory;
use cpift_torch::score::ExampleLoss;
use cpift_torch::session::{ModelInfo, Session, set_strict_config};
use log::{info, warn};
use serde_json::{Value, json};
use tch::Kind;

use crate::args::RunArgs;
use crate::metrics::{self, Loss, Settings};
use crate::plan::TaskPlan;
use crate::prompt::PromptBuilder;

/// The program, for its records.
pub const STAGE: &str = env!("CARGO_PKG_NAME");

/// Scores and writes the output folder.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before anything is scored; figures that are not finite. Nothing is written then.
pub fn run(args: &RunArgs, common: &Common) -> Result<()> {
    args.check()?;
    set_strict_config(args.strict_config);
    let mut recorder = Recorder::start(STAGE);
    if up_to_date(common, &args.out) {
        return Ok(());
    }
    check_output(&args.out, common.force())?;
    let list = Tasks::read(&args.tasks)?;
    let device = args.device.open(common.threads)?;
    if !device.is_cuda() {
        let size = |file: &Path| fs::metadata(file).map_or(0, |file| file.len());
        let bytes: u64 = Checkpoint::open(&args.model)?.files().map(size).sum();
        // Mapped, and in memory.
        memory::check_address_space(2 * bytes)?;
    }
    let plans = TaskPlan::read(args, &list, &ModelInfo::open(&args.model, list.template()?)?)?;
    let session = Session::for_inference(&args.model, list.template()?, device, args.kind(device))?;
    recorder.input("model", &args.model, session.digest.clone());
    recorder.tasks(&list, plans.iter().map(|plan| plan.task.name.as_str()))?;
    [scores::FILE_NAME, OUTPUTS].iter().for_each(|name| recorder.also(&args.out.join(name)));
    let staged = StagedDir::create(&args.out, common.force())?;
    let mut outputs = BufWriter::new(File::create(staged.path().join(OUTPUTS)).context("creating outputs.jsonl")?);
    let mut tasks = Vec::new();
    for plan in &plans {
        recorder.input(format!("eval:{}", plan.task.name), &plan.task.eval, plan.digest.clone());
        if plan.few_shot > 0 {
            recorder.input(format!("train:{}", plan.task.name), &plan.task.train, Digest::of_file(&plan.task.train)?);
        }
        tasks.push(score_task(args, &session, plan, &mut outputs)?);
    }
    outputs.into_inner().context("writing outputs.jsonl")?;
    let scores = Scores {
        format_version: FORMAT_VERSION,
        model: args.model.display().to_string(),
        model_digest: session.digest.clone(),
        tasks,
    };
    scores.write(&staged.path().join(scores::FILE_NAME), false)?;
    keep_verdicts([args.out.as_path()], staged.path())?;
    recorder.write_to(&staged.path().join(RECORD_NAME))?;
    staged.commit()?;
    common.print_json(&json!(scores));
    Ok(())
}

/// Whether `--if-stale` finds nothing to do for the folder of an evaluation.
pub fn up_to_date(common: &Common, out: &Path) -> bool {
    let made = [scores::FILE_NAME, OUTPUTS].map(|name| out.join(name));
    common.up_to_date(&Expected { also: made.iter().map(PathBuf::as_path).collect(), ..Expected::new(STAGE, out) })
}

/// A judge's verdicts stay when a folder is scored again or joined: they are paid for, and each is known by the very answer it is on.
///
/// # Errors
/// As [`verdicts::kept`]; I/O errors.
pub fn keep_verdicts<'a>(old: impl IntoIterator<Item = &'a Path>, new: &Path) -> Result<()> {
    let kept = verdicts::kept(old)?;
    if kept.is_empty() { Ok(()) } else { files::write_text(&new.join(verdicts::FILE_NAME), &kept, false) }
}

/// The templates by which rows become conversations, null where there are none: other templates are another test on the same file.
fn templates(task: &Task) -> Value {
    match &task.prompt {
        Some(prompt) => json!({"system": task.system, "prompt": prompt, "completion": task.completion}),
        None => Value::Null,
    }
}

/// Scores a task and adds its rows to `outputs`.
fn score_task(args: &RunArgs, session: &Session, plan: &TaskPlan, outputs: &mut impl Write) -> Result<TaskScore> {
    let TaskPlan { task, rows, digest, few_shot, settings, .. } = plan;
    let prompter = plan.prompter(&session.text, session.model.config.max_position_embeddings as usize)?;
    let loss = metrics::loss(session, task, rows, settings)?;
    warn_of_loss(task, &loss, settings);
    let scored = metrics::score(session, &prompter, task, rows, settings)?;
    if scored.prompts_cut > 0 {
        warn!("{}: {} prompts lost their beginning to the model's context", task.name, scored.prompts_cut);
    }
    if task.metric == TaskMetric::Nll {
        write_lines(outputs, task, &loss, rows.iter().map(|row| line_of_loss(&prompter, row)))?;
    } else {
        write_lines(outputs, task, &loss, scored.outputs.into_iter().map(Ok))?;
    }
    let (perplexity, Loss { nll, truncated, dropped, .. }) = (loss.perplexity(), loss);
    let main = scored.metric.as_ref().map_or(String::new(), |m| format!("{} {:.3}, ", m.name, m.value));
    info!("{}: {main}nll {} ({} rows)", task.name, nll.shown(|x| format!("{x:.4}")), nll.n);
    let mut score = TaskScore {
        task: task.name.clone(),
        eval_digest: digest.clone(),
        metric: scored.metric,
        also: scored.also.into_iter().chain(perplexity).map(|figure| (figure.name.clone(), figure)).collect(),
        nll,
        settings: BTreeMap::from([
            ("rows".to_owned(), json!(rows.len())),
            ("prompt".to_owned(), json!(plan.style.name())),
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
            ("max_length".to_owned(), json!(settings.max_length.tokens)),
            ("truncated".to_owned(), json!(truncated)),
            ("dropped".to_owned(), json!(dropped)),
            ("templates".to_owned(), templates(task)),
            ("template_args".to_owned(), json!(task.template_args)),
            ("prompts_cut".to_owned(), json!(scored.prompts_cut)),
            ("skipped".to_owned(), json!(scored.skipped)),
        ]),
    };
    if task.metric == TaskMetric::Codebleu {
        score.settings.insert("language".to_owned(), json!(task.language));
    }
    if task.metric == TaskMetric::Judge {
        score.settings.insert(JUDGE.to_owned(), Value::Null);
    }
    Ok(score)
}

fn warn_of_loss(task: &Task, loss: &Loss, settings: &Settings) {
    let Loss { nll, truncated, dropped, .. } = loss;
    if *truncated > 0 {
        warn!(
            "{}: {truncated} rows are longer than {} tokens: their loss is over the first ones, and {dropped} have none",
            task.name, settings.max_length.tokens
        );
    }
    if loss.perplexity().is_none() {
        warn!(
            "{}: a loss of {:.1} nats has no perplexity that a number could hold: it is left out",
            task.name, nll.value
        );
    }
}

/// A row of a task that is scored by its loss alone.
fn line_of_loss(prompter: &PromptBuilder<'_>, row: &Row) -> Result<Value> {
    Ok(json!({"prompt": prompter.before_the_answer(row)?, "reference": row.reference(), "row": row.place.row}))
}

/// Writes each row with its loss and task.
fn write_lines(
    outputs: &mut impl Write,
    task: &Task,
    loss: &Loss,
    lines: impl Iterator<Item = Result<Value>>,
) -> Result<()> {
    for line in lines {
        let mut line = line?;
        let row = line["row"].as_u64().and_then(|row| loss.rows.get(&(row as usize)));
        let ExampleLoss { nll, targets } = row.copied().unwrap_or(ExampleLoss { nll: 0.0, targets: 0 });
        (line["nll"], line["targets"], line["task"]) = (json!(nll), json!(targets), json!(task.name));
        writeln!(outputs, "{line}").context("writing outputs.jsonl")?;
    }
    Ok(())
}
