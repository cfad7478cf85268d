//! `cpift-eval run`: scores one checkpoint on every task.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::Checkpoint;
use cpift_core::files::{self, StagedDir, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::{self, FORMAT_VERSION, OUTPUTS, Scores, TaskScore};
use cpift_core::format::tasks::{Task, Tasks};
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_judge::verdicts;
use cpift_torch::memory;
use cpift_torch::score::ExampleLoss;
use cpift_torch::session::{ModelInfo, Session};
use cpift_torch::workers::Workers;
use log::{info, warn};
use serde_json::{Map, Value, json};
use tch::Kind;

use crate::args::RunArgs;
use crate::metrics::Loss;
use crate::plan::{TaskInputs, TaskPlan};

/// Name of the program in its records.
pub(crate) const STAGE: &str = env!("CARGO_PKG_NAME");

/// Scores every task and writes the output directory.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any task is scored; a figure that is
/// not finite. Nothing is written then.
pub(crate) fn run(args: &RunArgs, common: &Common) -> Result<()> {
    args.check()?;
    let recorder = Recorder::start(STAGE);
    args.inference.on_ranks(common, |workers| score(args, common, workers, recorder))
}

/// Scores every task; with several ranks each has the model, all share the rows, and rank 0 writes.
fn score(args: &RunArgs, common: &Common, workers: &Workers, mut recorder: Recorder) -> Result<()> {
    if workers.agree("the output is up to date", || up_to_date(common, &args.out))? {
        return Ok(());
    }
    check_output(&args.out, common.force())?;
    let list = Tasks::read(&args.tasks)?;
    let device = workers.placement.device;
    if !device.is_cuda() {
        let size = |file: &Path| fs::metadata(file).map_or(0, |file| file.len());
        let bytes: u64 = Checkpoint::open(&args.model)?.files().map(size).sum();
        // The weights are mapped and also copied into memory.
        memory::check_address_space(2 * bytes)?;
    }
    let plans = TaskPlan::read(args, &list, &ModelInfo::open(&args.model, list.template()?)?)?;
    let kind = args.inference.kind(device);
    let mut session = Session::for_inference(&args.model, list.template()?, device, kind)?;
    session.model.row_sharers = workers.placement.group.clone();
    workers.check_same(&describe(&session, &plans))?;
    recorder.input("model", &args.model, session.digest.clone());
    recorder.tasks(&list, plans.iter().map(|plan| plan.inputs.task.name.as_str()))?;
    [scores::FILE_NAME, OUTPUTS].iter().for_each(|name| recorder.also(&args.out.join(name)));
    let staged = workers.leads().then(|| StagedDir::create(&args.out, common.force())).transpose()?;
    let mut outputs: Box<dyn Write> = match &staged {
        Some(staged) => {
            let file = File::create(staged.path().join(OUTPUTS)).context("creating outputs.jsonl")?;
            Box::new(BufWriter::new(file))
        }
        None => Box::new(io::sink()),
    };
    let mut tasks = Vec::new();
    for plan in plans {
        let TaskInputs { task, digest, few_shot, .. } = &plan.inputs;
        recorder.input(format!("eval:{}", task.name), &task.eval, digest.clone());
        if *few_shot > 0 {
            recorder.input(format!("train:{}", task.name), &task.train, Digest::of_file(&task.train)?);
        }
        tasks.push(score_task(&session, kind, &plan, &mut outputs)?);
    }
    outputs.flush().context("writing outputs.jsonl")?;
    let Some(staged) = staged else { return Ok(()) };
    let scores = Scores {
        format_version: FORMAT_VERSION,
        model: args.model.display().to_string(),
        model_digest: session.digest.clone(),
        tasks,
    };
    scores.write(&staged.path().join(scores::FILE_NAME), false)?;
    keep_verdicts([args.out.as_path()], staged.path())?;
    recorder.write_into_for(staged.path(), scores::FILE_NAME)?;
    staged.commit()?;
    common.print_json(&json!(scores));
    Ok(())
}

/// Inputs that all ranks must have alike.
fn describe(session: &Session, plans: &[TaskPlan]) -> Map<String, Value> {
    let mut run = Map::from_iter([("model".to_owned(), json!(session.digest))]);
    for plan in plans {
        run.insert(format!("eval:{}", plan.inputs.task.name), json!(plan.inputs.digest));
    }
    run
}

/// Returns true if `--skip-up-to-date` is given and the directory of an evaluation is up to date.
pub(crate) fn up_to_date(common: &Common, out: &Path) -> bool {
    let made = [scores::FILE_NAME, OUTPUTS].map(|name| out.join(name));
    common.up_to_date(&Expected { also: made.iter().map(PathBuf::as_path).collect(), ..Expected::new(STAGE, out) })
}

/// Copies a judge's verdicts when a directory is scored again or joined: they are paid for, and
/// each is identified by the answer it grades.
///
/// # Errors
/// As [`verdicts::kept`]; a file that cannot be written.
pub(crate) fn keep_verdicts<'a>(old: impl IntoIterator<Item = &'a Path>, new: &Path) -> Result<()> {
    let kept = verdicts::kept(old)?;
    if kept.is_empty() { Ok(()) } else { files::write_text(&new.join(verdicts::FILE_NAME), &kept, false) }
}

/// Templates that turn rows into conversations, or null: other templates are another test on the
/// same file.
fn templates(task: &Task) -> Value {
    match &task.prompt {
        Some(prompt) => json!({"system": task.system, "prompt": prompt, "completion": task.completion}),
        None => Value::Null,
    }
}

/// Scores a task and appends its rows to `outputs`.
fn score_task(session: &Session, kind: Kind, plan: &TaskPlan, outputs: &mut impl Write) -> Result<TaskScore> {
    let TaskInputs { task, rows, digest, few_shot, seed, settings, style, .. } = &plan.inputs;
    let prompter = plan.inputs.prompter(&session.text, session.model.config.max_position_embeddings as usize)?;
    let loss = Loss::of(session, task, &plan.examples, settings.batch_size)?;
    warn_of_loss(task, &loss, settings.max_length.tokens);
    let scored = plan.metric.score(session, &plan.inputs.view(&prompter))?;
    if scored.prompts_cut > 0 {
        warn!("{}: the beginning of {} prompts was cut to fit the model's context", task.name, scored.prompts_cut);
    }
    write_lines(outputs, task, &loss, scored.lines)?;
    let (perplexity, Loss { nll, truncated, dropped, .. }) = (loss.perplexity(), loss);
    let main = scored.metric.as_ref().map_or(String::new(), |m| format!("{} {:.3}, ", m.name, m.value));
    info!("{}: {main}nll {} ({} rows)", task.name, nll.shown(|x| format!("{x:.4}")), nll.n);
    let sampling = settings.sampling;
    let sampling = sampling.map(|s| json!({"temperature": s.temperature, "top_p": s.top_p, "seed": s.seed}));
    let mut own = BTreeMap::from([
        ("rows", json!(rows.len())),
        ("prompt", json!(style.name())),
        ("few_shot", json!(few_shot)),
        ("compute_dtype", json!(if kind == Kind::Float { "f32" } else { "bf16" })),
        ("sampling", json!(sampling)),
        ("seed", json!((*few_shot > 0).then_some(seed))),
        ("max_new_tokens", json!(settings.max_new_tokens)),
        ("max_length", json!(settings.max_length.tokens)),
        ("truncated", json!(truncated)),
        ("dropped", json!(dropped)),
        ("templates", templates(task)),
        ("template_args", json!(task.template_args)),
        ("prompts_cut", json!(scored.prompts_cut)),
        ("skipped", json!(scored.skipped)),
    ]);
    own.extend((plan.inputs.skipped > 0).then(|| ("first_row", json!(plan.inputs.skipped + 1))));
    own.extend(scored.settings);
    Ok(TaskScore {
        task: task.name.clone(),
        eval_digest: digest.clone(),
        metric: scored.metric,
        also: scored.also.into_iter().chain(perplexity).map(|figure| (figure.name.clone(), figure)).collect(),
        nll,
        settings: own.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
    })
}

fn warn_of_loss(task: &Task, loss: &Loss, max_length: usize) {
    let Loss { nll, truncated, dropped, .. } = loss;
    if *truncated > 0 {
        warn!(
            "{}: {truncated} rows are longer than {max_length} tokens: their loss covers the first tokens only, and {dropped} rows have none",
            task.name
        );
    }
    if loss.perplexity().is_none() {
        warn!(
            "{}: a loss of {:.1} nats has no perplexity within the range of f64: it is omitted",
            task.name, nll.value
        );
    }
}

/// Writes the rows' lines with loss and task.
fn write_lines(outputs: &mut impl Write, task: &Task, loss: &Loss, lines: Vec<Value>) -> Result<()> {
    for mut line in lines {
        let row = line["row"].as_u64().and_then(|row| loss.rows.get(&(row as usize)));
        let ExampleLoss { nll, targets } = row.copied().unwrap_or(ExampleLoss { nll: 0.0, targets: 0 });
        (line["nll"], line["targets"], line["task"]) = (json!(nll), json!(targets), json!(task.name));
        writeln!(outputs, "{line}").context("writing outputs.jsonl")?;
    }
    Ok(())
}
