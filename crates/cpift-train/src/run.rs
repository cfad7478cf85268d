//! Runs a plan: stage after stage, each with what it must not move.

use anyhow::Result;
use cpift_core::cli::Common;
use cpift_core::files::StagedDir;
use cpift_core::provenance::Recorder;
use cpift_torch::train::{RUN, Run, Stage, StageReport, States};
use log::info;
use serde_json::{Map, Value, json};

use crate::args::RunArgs;
use crate::plan::{Plan, StagePlan};

/// Trains and writes the output folder.
///
/// # Errors
/// As [`Plan::new`] before any output; failures of training after.
pub fn run(args: &RunArgs, common: &Common) -> Result<()> {
    let mut recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let mut plan = Plan::new(args, common)?;
    let states = States::new(&args.out, describe(args, &plan), args.training.keep);
    if args.training.resume && !common.force && states.finished(&args.out)? {
        info!("{} is finished already", args.out.display());
        return Ok(());
    }
    let staged = StagedDir::create(&args.out, common.force)?;
    let held_out = std::mem::take(&mut plan.held_out);
    let training = Run {
        session: &plan.session,
        args: &args.training,
        stages: plan.stages.iter().enumerate().map(|(k, stage)| stage_of(args, &plan, stage, k)).collect(),
        held_out,
        states,
    };
    let reports = training.train(staged.path(), common.force)?;
    let summaries: Vec<Value> = plan.stages.iter().zip(&reports).map(|(s, r)| summary(s, r)).collect();
    let tokens: usize = reports.iter().map(|r| r.tokens).sum();
    plan.session.save(staged.path(), args.training.save_dtype)?;
    recorder.seed(args.training.seed);
    recorder.input("model", &args.model, plan.session.digest.clone());
    for (role, path, digest) in &plan.inputs {
        recorder.input(role.as_str(), path, digest.clone());
    }
    recorder.fact("tokens", tokens);
    recorder.fact("stages", summaries.clone());
    recorder.fact(RUN, training.states.run());
    recorder.write_into(staged.path())?;
    staged.commit()?;
    training.states.remove()?;
    info!("{} stages, {tokens} tokens; wrote {}", plan.stages.len(), args.out.display());
    common.print_json(&json!({"stages": summaries, "tokens": tokens, "out": args.out.display().to_string()}));
    Ok(())
}

fn stage_of<'a>(args: &RunArgs, plan: &'a Plan, stage: &'a StagePlan, k: usize) -> Stage<'a> {
    Stage {
        label: stage.label.clone(),
        examples: &stage.examples,
        masks: stage.frozen_tasks.iter().map(|task| &plan.masks[task]).collect(),
        budget: stage.budget,
        seed: args.training.seed.wrapping_add(k as u64),
        lr: stage.lr,
    }
}

/// All that the bytes of the result depend on.
fn describe(args: &RunArgs, plan: &Plan) -> Map<String, Value> {
    let mut run = args.training.describe();
    run.insert("model".into(), json!(plan.session.digest));
    for (role, _, digest) in &plan.inputs {
        run.insert(role.clone(), json!(digest));
    }
    let stages = plan.stages.iter().map(|s| json!({"stage": s.label, "frozen": s.frozen_tasks, "lr": s.lr}));
    run.insert("stages".into(), stages.collect());
    run.insert("rows".into(), plan.stages.iter().map(|s| s.examples.len()).collect());
    run
}

fn summary(stage: &StagePlan, report: &StageReport) -> Value {
    json!({"stage": stage.label, "examples": stage.examples.len(), "steps": report.steps, "tokens": report.tokens,
        "first_loss": report.first_loss, "final_loss": report.final_loss, "frozen_elements": report.frozen,
        "frozen_tasks": stage.frozen_tasks})
}
