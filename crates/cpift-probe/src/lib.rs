//! Stage 1 of CPI-FT, first half: the probe. A short fine-tune of the base θ⁽⁰⁾ on one task's data gives θ⁽ⁱ⁾, whose
//! difference from the base shows which parameters the task moves most.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use cpift_core::checkpoint::Digest;
use cpift_core::cli::Common;
use cpift_core::error::usage;
use cpift_core::files::{StagedDir, check_output};
use cpift_core::provenance::Recorder;
use cpift_core::tasks::{Task, Tasks};
use cpift_torch::args::TrainingArgs;
use cpift_torch::data::{self, Encoded, Layout};
use cpift_torch::session::Session;
use cpift_torch::train::{HeldOut, RUN, Run, Stage, States};
use cpift_torch::{memory, oom};
use log::{info, warn};
use serde_json::json;

/// Fine-tunes a base checkpoint on one task: θ⁽⁰⁾ and the task's data give the probe θ⁽ⁱ⁾.
///
/// The output is a Hugging Face folder with metrics.jsonl (one line a step) and cpift.json (provenance). Probes of different
/// tasks are independent of one another: run them as a Slurm array, where --task-index defaults to SLURM_ARRAY_TASK_ID.
/// Weights and optimizer are f32 whatever the base's dtype unless --master and --optim-state say otherwise, and the probe is saved as f32 unless --save-dtype says otherwise:
/// bf16 loses most of the small updates that cpift-mask ranks.
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input; 75 stopped by SIGTERM or SIGUSR1 with the state saved.
#[derive(Parser, Debug)]
#[command(name = "cpift-probe", version)]
pub struct Args {
    /// The base checkpoint θ⁽⁰⁾: a Hugging Face folder
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    pub base: Option<PathBuf>,
    /// The task list, tasks.toml
    #[arg(long, value_name = "FILE")]
    pub tasks: PathBuf,
    /// The task to train on, by name
    #[arg(long, value_name = "NAME", conflicts_with = "task_index")]
    pub task: Option<String>,
    /// The task to train on, by its place in tasks.toml, from 0 [default: SLURM_ARRAY_TASK_ID, when --task is not given]
    #[arg(long, value_name = "I")]
    pub task_index: Option<usize>,
    /// The folder to write
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    pub out: Option<PathBuf>,
    /// Only print the tasks, a line each: index, name, training file, evaluation file, separated by tabs
    #[arg(long, conflicts_with_all = ["base", "out", "task", "task_index"])]
    pub list: bool,
    /// How to fine-tune.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Arguments of every stage.
    #[command(flatten)]
    pub common: Common,
}

/// What was checked before any work: the task, its examples, the opened model.
struct Plan {
    task: Task,
    tasks_digest: Digest,
    train_digest: Digest,
    encoded: Encoded,
    session: Session,
}

/// Runs the stage.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any output; failures of training after.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    match (&args.base, &args.out) {
        (Some(base), Some(out)) => {
            oom::explain(|| memory::of_failed_run(base, &args.tasks, &args.training, 0), || probe(&args, base, out))
        }
        _ => list(&args),
    }
}

fn list(args: &Args) -> Result<()> {
    for (i, task) in Tasks::read(&args.tasks)?.list.iter().enumerate() {
        println!("{i}\t{}\t{}\t{}", task.name, task.train.display(), task.eval.display());
    }
    Ok(())
}

fn probe(args: &Args, base: &Path, out: &Path) -> Result<()> {
    let mut recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let plan = plan(args, base, out)?;
    let run = training_run(args, &plan, out)?;
    if args.training.resume && !args.common.force && run.states.finished(out)? {
        info!("{} is finished already", out.display());
        return Ok(());
    }
    let staged = StagedDir::create(out, args.common.force)?;
    let report = run
        .train(staged.path(), args.common.force)
        .with_context(|| format!("training on {}", plan.task.train.display()))?
        .remove(0);
    plan.session.save(staged.path(), args.training.save_dtype)?;
    recorder.seed(args.training.seed);
    recorder.input("base", base, plan.session.digest.clone());
    recorder.input("tasks", &args.tasks, plan.tasks_digest.clone());
    recorder.input("train", &plan.task.train, plan.train_digest.clone());
    recorder.fact("task", plan.task.name.as_str());
    recorder.fact("steps", report.steps);
    recorder.fact("tokens", report.tokens);
    recorder.fact("examples", plan.encoded.examples.len());
    recorder.fact("truncated", plan.encoded.truncated);
    recorder.fact(RUN, run.states.run());
    recorder.write_into(staged.path())?;
    staged.commit()?;
    run.states.remove()?;
    info!("{}: loss {:.4} -> {:.4}; wrote {}", plan.task.name, report.first_loss, report.final_loss, out.display());
    args.common.print_json(&json!({"task": plan.task.name, "steps": report.steps, "tokens": report.tokens,
        "first_loss": report.first_loss, "final_loss": report.final_loss, "out": out.display().to_string()}));
    Ok(())
}

fn plan(args: &Args, base: &Path, out: &Path) -> Result<Plan> {
    args.training.check()?;
    // Resuming a run that is finished is no error.
    if !args.training.resume {
        check_output(out, args.common.force)?;
    }
    let tasks = Tasks::read(&args.tasks)?;
    let task = match &args.task {
        Some(name) => tasks.named(name)?,
        None => tasks.indexed(task_index(args.task_index)?)?,
    }
    .clone();
    // Its templates and lengths decide what the rows become.
    let tasks_digest = Digest::of_file(&args.tasks)?;
    let train_digest = Digest::of_file(&task.train)?;
    let rows = data::read_rows(&task.train, &Layout::of(&task)?)?;
    let device = args.training.device.open(args.common.threads)?;
    let session = Session::open(base, tasks.template()?, device, args.training.precision(device))?;
    let max_length = session.context_of(&task, args.training.max_length);
    let encoded = data::encode_rows(&task.train, &rows, &session.text, max_length, args.training.overlong())?;
    data::report(&task.name, &encoded, max_length);
    Ok(Plan { task, tasks_digest, train_digest, encoded, session })
}

/// The index that was typed, or that of the Slurm array.
fn task_index(typed: Option<usize>) -> Result<usize> {
    const SLURM: &str = "SLURM_ARRAY_TASK_ID";
    match (typed, std::env::var(SLURM)) {
        (Some(index), _) => Ok(index),
        (None, Ok(text)) => text.parse().map_err(|_| usage(format!("{SLURM} is {text:?}, not an index from 0"))),
        (None, Err(_)) => Err(usage(format!("name the task: --task NAME or --task-index I (or {SLURM})"))),
    }
}

fn training_run<'a>(args: &'a Args, plan: &'a Plan, out: &Path) -> Result<Run<'a>> {
    let training = &args.training;
    if training.save_dtype != cpift_core::Dtype::F32 {
        warn!("saving as {}: updates smaller than its resolution are lost to cpift-mask", training.save_dtype);
    }
    let stage = Stage {
        label: plan.task.name.clone(),
        examples: &plan.encoded.examples,
        masks: Vec::new(),
        budget: training.budget(),
        seed: training.seed,
        lr: training.lr,
    };
    let max_length = plan.session.context_of(&plan.task, training.max_length);
    let held_out = match training.eval_every {
        Some(_) => vec![HeldOut::read(&plan.task, training.eval_rows, &plan.session.text, max_length)?],
        None => Vec::new(),
    };
    let mut description = training.describe();
    description.insert("base".into(), json!(plan.session.digest));
    description.insert("task".into(), json!(plan.task.name));
    description.insert("tasks".into(), json!(plan.tasks_digest));
    description.insert("train".into(), json!(plan.train_digest));
    let states = States::new(out, description, training.keep);
    Ok(Run { session: &plan.session, args: training, stages: vec![stage], held_out, states })
}
