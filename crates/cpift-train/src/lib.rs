//! Stage 4 of CPI-FT: multi-stage fine-tuning with the cores of earlier groups frozen, and its
//! baselines. A plan is run stage after stage, each with its isolation.

mod args;
mod memory_plan;
mod plan;
mod preview;

use anyhow::Result;
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::stream::random::splitmix64;
use cpift_data as data;
use cpift_torch::memory::{self, Job};
use cpift_torch::oom;
use cpift_torch::train::{DynamicConfig, Isolation, Run, Stage, StageReport, States, verify_states};
use cpift_torch::workers::Workers;
use log::{info, warn};
use serde_json::{Map, Value, json};

pub use args::Args;
use args::{Command, IsolationKind, RunArgs, Trainable, VerifyArgs};
use plan::{Plan, StagePlan};

/// Runs the stage.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any output; failures of training
/// after.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    match args.command {
        Command::Run(mut run_args) => {
            run_args.training.lr *= run_args.lr_scale;
            let told = || {
                let frozen = memory_plan::frozen(&run_args);
                let lora = run_args.lora.config(0);
                let job = memory::Job::of_run(&run_args.model, &run_args.tasks, &run_args.training);
                memory::of_failed_run(job.map(|job| job.with_adapters(lora)), &run_args.training, frozen)
            };
            oom::explain(told, || run_stages(&run_args, &args.common))
        }
        Command::Plan(plan_args) => memory_plan::estimate(&plan_args, &args.common),
        Command::Preview(preview_args) => preview::run(&preview_args, &args.common),
        Command::Verify(VerifyArgs { states }) => {
            let count = verify_states(&states)?;
            info!("{}: {count} intact", states.display());
            args.common.print_json(&json!({"path": states, "states": count}));
            Ok(())
        }
    }
}

const STAGE: &str = env!("CARGO_PKG_NAME");

/// Trains and writes the output directory.
///
/// # Errors
/// Errors of [`Plan::new`] before any output, failures of training after.
fn run_stages(args: &RunArgs, common: &Common) -> Result<()> {
    let recorder = Recorder::start(STAGE);
    args.check()?;
    let workers = Workers::start(&args.training, common)?;
    let result = train(args, common, &workers, recorder);
    workers.finish(result)
}

fn train(args: &RunArgs, common: &Common, workers: &Workers, recorder: Recorder) -> Result<()> {
    if workers.agree("the output is up to date", || common.up_to_date(&Expected::new(STAGE, &args.out)))? {
        return Ok(());
    }
    let lora = args.lora.config(args.training.seed);
    let read = || Job::of_run(&args.model, &args.tasks, &args.training).map(|job| job.with_adapters(lora.clone()));
    memory::check_run(read, workers.placement.world())?;
    let mut plan = Plan::new(args, common, workers)?;
    warn_of_rounding(args, &plan);
    let run = describe(args, &plan);
    workers.check_same(&run)?;
    let states = States::new(&args.out, run, &args.training);
    let held_out = std::mem::take(&mut plan.held_out);
    let training = Run {
        session: &plan.session,
        args: &args.training,
        stages: plan.stages.iter().enumerate().map(|(k, stage)| stage_of(args, &plan, stage, k)).collect(),
        held_out,
        lora,
        fisher: None,
        states,
    };
    let tokens = |reports: &[StageReport]| reports.iter().map(|r| r.tokens + r.importance_tokens).sum::<usize>();
    let summaries = |reports: &[StageReport]| -> Vec<Value> {
        plan.stages.iter().zip(reports).map(|(stage, report)| summary(args, stage, report)).collect()
    };
    let written = training.write(&args.out, common, recorder, |recorder, reports| {
        recorder.input("model", &args.model, plan.session.digest.clone());
        for (role, path, digest) in &plan.inputs {
            recorder.input(role.as_str(), path, digest.clone());
        }
        recorder.fact("tokens", tokens(reports));
        if let Some(lora) = args.lora.config(args.training.seed) {
            recorder.fact("lora", json!(lora));
        }
        if args.groups.is_some() {
            recorder.fact("stage_data", args.stage_data().name());
        }
        recorder.fact("stages", summaries(reports));
    })?;
    let Some(reports) = written else { return Ok(()) };
    let (summaries, tokens) = (summaries(&reports), tokens(&reports));
    info!("{} stages, {tokens} tokens; wrote {}", plan.stages.len(), args.out.display());
    if workers.leads() {
        common.print_json(&json!({"stages": summaries, "tokens": tokens, "out": args.out.display().to_string()}));
    }
    Ok(())
}

fn stage_of<'a>(args: &RunArgs, plan: &'a Plan, stage: &'a StagePlan, k: usize) -> Stage<'a> {
    Stage {
        label: stage.label.clone(),
        examples: &stage.examples,
        mixture: &stage.mixture,
        isolation: isolation_of(args, plan, stage),
        budget: stage.budget,
        seed: splitmix64(args.training.seed, k as u64),
        lr: stage.lr,
    }
}

fn isolation_of<'a>(args: &RunArgs, plan: &'a Plan, stage: &'a StagePlan) -> Isolation<'a> {
    let masks = |tasks: &[String]| tasks.iter().map(|task| &plan.masks[task]).collect::<Vec<_>>();
    match (args.isolation.kind, args.trainable) {
        _ if !args.protect.is_empty() || args.freeze_layers > 0 => {
            Isolation::Protected { masks: plan.masks.values().collect(), layers: args.freeze_layers }
        }
        _ if stage.earlier.is_empty() && args.trainable == Trainable::All => Isolation::None,
        (IsolationKind::Dynamic, _) => Isolation::Dynamic(DynamicConfig {
            examples: &stage.earlier_examples,
            percent: args.isolation.dynamic.percent,
            decay: args.isolation.dynamic.ema,
            interval: args.isolation.dynamic.mask_interval,
        }),
        _ if plan.masks.is_empty() => Isolation::None,
        (_, Trainable::All) => Isolation::Static(masks(&stage.earlier)),
        (_, Trainable::Cores) => Isolation::Cores { own: masks(&stage.tasks), earlier: masks(&stage.earlier) },
    }
}

/// Warns if a dtype rounds the frozen elements of the checkpoint.
fn warn_of_rounding(args: &RunArgs, plan: &Plan) {
    if plan.masks.is_empty() && args.freeze_layers == 0 {
        return;
    }
    for (flag, dtype) in [("--master-dtype", args.training.master_dtype), ("--save-dtype", args.training.save_dtype)] {
        if let Some(stored) = plan.session.rounded_by(dtype) {
            warn!("{flag} {dtype} rounds the checkpoint's {stored} weights: frozen elements keep their rounded values");
        }
    }
}

/// Description of the run: everything the weights depend on, for saved states and cpift.json.
fn describe(args: &RunArgs, plan: &Plan) -> Map<String, Value> {
    let mut run = args.training.describe(plan.session.model.device());
    let Value::Object(own) = json!(args) else { unreachable!("the arguments are a struct") };
    run.extend(own);
    run.insert("model".into(), json!(plan.session.digest));
    for (role, _, digest) in &plan.inputs {
        run.insert(role.clone(), json!(digest));
    }
    let stages = plan.stages.iter().map(|s| json!({"stage": s.label, "frozen": frozen(args, s), "lr": s.lr}));
    run.insert("stages".into(), stages.collect());
    run.insert("examples".into(), plan.stages.iter().map(|s| json!(data::digest(s.examples.iter()))).collect());
    run
}

/// Tasks whose cores are frozen in a stage.
fn frozen<'a>(args: &RunArgs, stage: &'a StagePlan) -> &'a [String] {
    if args.masks.is_empty() { &[] } else { &stage.earlier }
}

fn summary(args: &RunArgs, stage: &StagePlan, report: &StageReport) -> Value {
    let drawn: Vec<usize> = stage.mixture.iter().map(|part| part.drawn).collect();
    json!({"stage": stage.label, "examples": stage.examples.len(), "epoch_rows": drawn, "steps": report.steps, "tokens": report.tokens,
        "first_loss": report.first_loss, "final_loss": report.final_loss, "frozen_elements": report.frozen,
        "frozen_tasks": frozen(args, stage), "importance_tokens": report.importance_tokens,
        "replayed_examples": stage.replayed.0, "replayed_share": stage.replayed_share()})
}
