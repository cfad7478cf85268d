//! Stage 1 of CPI-FT, first half: the probe. A short fine-tune of the base θ⁽⁰⁾ on one task's data
//! gives θ⁽ⁱ⁾, whose difference from the base shows which parameters the task changes most.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::slice;

use anyhow::Result;
use clap::Parser;
use cpift_core::error::usage;
use cpift_core::files::{check_not_input, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::tasks::{Task, Tasks};
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::stream::random::seed_for;
use cpift_data::{self as data, Encoded};
use cpift_torch::args::TrainingArgs;
use cpift_torch::memory::{self, Job};
use cpift_torch::oom;
use cpift_torch::session::{ModelInfo, Session};
use cpift_torch::train::{FISHER, FisherConfig, HeldOut, Isolation, Run, Stage, States, read_examples};
use cpift_torch::workers::Workers;
use log::{info, warn};
use serde_json::{Map, Value, json};

const STAGE: &str = env!("CARGO_PKG_NAME");

const IO: &str = "Input and output";
const FISHER_HEADING: &str = "Method";

/// Fine-tunes a base checkpoint on one task: θ⁽⁰⁾ and the task's data give the probe θ⁽ⁱ⁾.
///
/// The output is a Hugging Face directory with metrics.jsonl (one line per step) and cpift.json
/// (provenance). During the run, metrics.jsonl is in OUT.checkpoints. Probes of different tasks are
/// independent: run them as a Slurm array, where --task-index defaults to SLURM_ARRAY_TASK_ID.
/// Weights and optimizer are f32 whatever the dtype of the base unless --master-dtype and
/// --optim-state-dtype say otherwise. The probe is saved as f32 unless --save-dtype says otherwise:
/// bf16 loses most of the small updates that cpift-mask ranks.
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input; 75 stopped by SIGTERM or SIGUSR1 with the
/// state saved.
#[derive(Parser, Debug)]
#[command(name = "cpift-probe", version)]
pub struct Args {
    /// Base checkpoint θ⁽⁰⁾: a Hugging Face directory, or org/name[@revision] on the Hub
    #[arg(long, aliases = ["model_name_or_path", "model-name-or-path"], value_name = "MODEL")]
    #[arg(required_unless_present = "list", help_heading = IO)]
    pub base: Option<PathBuf>,
    /// Task list, tasks.toml
    #[arg(long, value_name = "FILE", help_heading = IO)]
    pub tasks: PathBuf,
    /// Task to train on, by name
    #[arg(long, value_name = "NAME", conflicts_with = "task_index", help_heading = IO)]
    pub task: Option<String>,
    /// Task to train on, by its index in tasks.toml, from 0 [default: SLURM_ARRAY_TASK_ID, if
    /// --task is not given]
    #[arg(long, value_name = "I", help_heading = IO)]
    pub task_index: Option<usize>,
    /// Output directory
    #[arg(long, aliases = ["output_dir", "output-dir"], value_name = "DIR", required_unless_present = "list")]
    #[arg(help_heading = IO)]
    pub out: Option<PathBuf>,
    /// Only print the tasks, one per line: index, name, training file, evaluation file, separated
    /// by tabs
    #[arg(long, conflicts_with_all = ["base", "out", "task", "task_index"], help_heading = IO)]
    pub list: bool,
    /// Also save OUT/fisher: sums of squared gradients of batches of the task's rows at the trained
    /// weights, in f32, for cpift-mask --score fisher and blend, and cpift-mask tensors. cpift.json
    /// records their tokens as fisher_tokens
    #[arg(long, conflicts_with = "list", help_heading = FISHER_HEADING)]
    pub save_fisher: bool,
    /// Batches whose squared gradients are summed (TRACE uses 150)
    #[arg(long, value_name = "N", default_value = "150", requires = "save_fisher", help_heading = FISHER_HEADING)]
    pub fisher_batches: NonZeroUsize,
    /// Rows per batch of squared gradients
    #[arg(long, value_name = "N", default_value = "2", requires = "save_fisher", help_heading = FISHER_HEADING)]
    pub fisher_batch_size: NonZeroUsize,
    /// Fine-tuning arguments.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Arguments of every stage.
    #[command(flatten)]
    pub common: Common,
}

/// A checked run: the task, its examples, the open checkpoint.
struct Plan {
    task: Task,
    tasks_role: String,
    tasks_digest: Digest,
    train_digest: Digest,
    encoded: Encoded,
    held_out: Vec<HeldOut>,
    session: Session,
}

/// Runs the stage.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any output; failures of training
/// after.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    match (&args.base, &args.out) {
        (Some(base), Some(out)) => {
            let job = || Job::of_run(base, &args.tasks, &args.training);
            oom::explain(|| memory::of_failed_run(job(), &args.training, 0), || probe(&args, base, out))
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
    let recorder = Recorder::start(STAGE);
    args.training.check()?;
    let workers = Workers::start(&args.training, &args.common)?;
    let result = train(args, base, out, &workers, recorder);
    workers.finish(result)
}

fn train(args: &Args, base: &Path, out: &Path, workers: &Workers, recorder: Recorder) -> Result<()> {
    let (tasks, task) = chosen_task(args)?;
    let expected = Expected { facts: vec![("task", &task.name)], ..Expected::new(STAGE, out) };
    if workers.agree("the output is up to date", || args.common.up_to_date(&expected))? {
        return Ok(());
    }
    memory::check_run(|| Job::of_run(base, &args.tasks, &args.training), workers.placement.world())?;
    let mut plan = plan(args, (&tasks, task), base, out, workers)?;
    warn_of_rounding(args, &plan.session);
    let run = describe(args, &plan);
    workers.check_same(&run)?;
    let states = States::new(out, run, &args.training);
    let held_out = std::mem::take(&mut plan.held_out);
    let written =
        training_run(args, &plan, held_out, states).write(out, &args.common, recorder, |recorder, reports| {
            recorder.input("base", base, plan.session.digest.clone());
            recorder.input(plan.tasks_role.as_str(), &args.tasks, plan.tasks_digest.clone());
            recorder.input("train", &plan.task.train, plan.train_digest.clone());
            recorder.fact("task", plan.task.name.as_str());
            recorder.fact("steps", reports[0].steps);
            recorder.fact("tokens", reports[0].tokens);
            recorder.fact("examples", plan.encoded.examples.len());
            recorder.fact("truncated", plan.encoded.truncated);
        })?;
    let Some(report) = written.map(|mut reports| reports.remove(0)) else { return Ok(()) };
    info!("{}: loss {:.4} -> {:.4}; wrote {}", plan.task.name, report.first_loss, report.final_loss, out.display());
    if workers.leads() {
        args.common.print_json(&json!({"task": plan.task.name, "steps": report.steps, "tokens": report.tokens,
            "first_loss": report.first_loss, "final_loss": report.final_loss, "out": out.display().to_string()}));
    }
    Ok(())
}

/// The task list, and the task given by name, by index or by the Slurm array.
fn chosen_task(args: &Args) -> Result<(Tasks, Task)> {
    let tasks = Tasks::read(&args.tasks)?;
    let task = match &args.task {
        Some(name) => tasks.named(name)?,
        None => tasks.indexed(task_index(args.task_index)?)?,
    };
    let task = task.clone();
    Ok((tasks, task))
}

fn plan(args: &Args, (tasks, task): (&Tasks, Task), base: &Path, out: &Path, workers: &Workers) -> Result<Plan> {
    // Resuming a finished run is no error.
    if !args.training.resume {
        check_output(out, args.common.force())?;
    }
    let inputs = [base, &args.tasks, &task.train, &task.eval];
    check_not_input("--out", out, inputs)?;
    check_not_input("--out's states", &States::folder(out), inputs)?;
    // The templates and lengths of tasks.toml determine the examples.
    let (tasks_role, tasks_digest) = (tasks.role([task.name.as_str()]), tasks.digest([task.name.as_str()])?);
    let train_digest = Digest::of_file(&task.train)?;
    let placement = workers.placement.clone();
    let model = ModelInfo::open(base, tasks.template()?)?.with_router_aux_loss(args.training.router_aux_loss_coef)?;
    let encoded = read_examples(&task, &model, &args.training)?;
    let held_out = HeldOut::read(slice::from_ref(&task), &model, &args.training)?;
    let precision = args.training.precision(placement.device);
    let session = model.load_at(placement, precision)?;
    Ok(Plan { task, tasks_role, tasks_digest, train_digest, encoded, held_out, session })
}

/// Warns if a dtype rounds the difference from the base, which cpift-mask ranks.
fn warn_of_rounding(args: &Args, session: &Session) {
    let training = &args.training;
    if let Some(stored) = session.rounded_by(training.master_dtype) {
        warn!(
            "--master-dtype {} rounds the base's {stored} weights: what cpift-mask ranks includes the rounding",
            training.master_dtype
        );
    }
    if training.save_dtype != cpift_core::Dtype::F32 {
        warn!("saving as {}: cpift-mask cannot see updates smaller than its resolution", training.save_dtype);
    }
}

/// The index as given, or that of the Slurm array.
fn task_index(typed: Option<usize>) -> Result<usize> {
    const SLURM: &str = "SLURM_ARRAY_TASK_ID";
    match (typed, std::env::var(SLURM)) {
        (Some(index), _) => Ok(index),
        (None, Ok(text)) => text.parse().map_err(|_| usage(format!("{SLURM} is {text:?}, not an index from 0"))),
        (None, Err(_)) => Err(usage(format!("no task: give --task NAME or --task-index I, or set {SLURM}"))),
    }
}

fn training_run<'a>(args: &'a Args, plan: &'a Plan, held_out: Vec<HeldOut>, states: States) -> Run<'a> {
    let training = &args.training;
    let stage = Stage {
        label: plan.task.name.clone(),
        examples: &plan.encoded.examples,
        mixture: &[],
        isolation: Isolation::None,
        budget: training.budget(),
        seed: training.seed,
        lr: training.lr,
    };
    Run {
        session: &plan.session,
        args: training,
        stages: vec![stage],
        held_out,
        lora: None,
        fisher: fisher(args),
        states,
    }
}

/// Settings of the squared gradients, if they are saved.
fn fisher(args: &Args) -> Option<FisherConfig> {
    args.save_fisher.then(|| FisherConfig {
        batches: args.fisher_batches.get(),
        batch_size: args.fisher_batch_size.get(),
        seed: seed_for(args.training.seed, FISHER),
    })
}

/// Description of the run: everything the weights depend on, for saved states and cpift.json.
fn describe(args: &Args, plan: &Plan) -> Map<String, Value> {
    let mut description = args.training.describe(plan.session.model.device());
    description.insert("base".into(), json!(plan.session.digest));
    description.insert("task".into(), json!(plan.task.name));
    description.insert("tasks".into(), json!(plan.tasks_digest));
    description.insert("train".into(), json!(plan.train_digest));
    description.insert("examples".into(), json!(data::digest(&plan.encoded.examples)));
    description.insert("fisher".into(), json!(fisher(args).map(|f| (f.batches, f.batch_size))));
    description
}
