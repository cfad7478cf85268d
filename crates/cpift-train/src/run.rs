//! Runs a plan: stage after stage, each with what it must not move.

use anyhow::Result;
use cpift_core::cli::Common;
use cpift_core::files::StagedDir;
use cpift_core::mask::Mask;
use cpift_core::provenance::Recorder;
use cpift_torch::freeze::Freeze;
use cpift_torch::train::{self, Metrics, Stage, StageReport};
use log::info;
use serde_json::{Value, json};

use crate::args::RunArgs;
use crate::plan::{Plan, StagePlan};

/// Trains and writes the output folder.
///
/// # Errors
/// As [`Plan::new`] before any output; failures of training after.
pub fn run(args: &RunArgs, common: &Common) -> Result<()> {
    let mut recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let plan = Plan::new(args, common)?;
    let staged = StagedDir::create(&args.out, common.force)?;
    let mut metrics = Metrics::create(staged.path())?;
    let mut summaries = Vec::new();
    for (k, stage) in plan.stages.iter().enumerate() {
        let (report, frozen) = run_stage(args, &plan, stage, k, &mut metrics)?;
        summaries.push(summary(stage, &report, frozen));
    }
    plan.session.save(staged.path(), args.training.save_dtype)?;
    let tokens: u64 = summaries.iter().filter_map(|s| s["tokens"].as_u64()).sum();
    recorder.seed(args.training.seed);
    recorder.input("model", &args.model, plan.session.digest.clone());
    for (role, path, digest) in &plan.inputs {
        recorder.input(role.as_str(), path, digest.clone());
    }
    recorder.fact("tokens", tokens);
    recorder.fact("stages", summaries.clone());
    recorder.write_into(staged.path())?;
    staged.commit()?;
    info!("{} stages, {tokens} tokens; wrote {}", plan.stages.len(), args.out.display());
    common.print_json(&json!({"stages": summaries, "tokens": tokens, "out": args.out.display().to_string()}));
    Ok(())
}

/// Trains through stage `k`; returns its report and the number of frozen elements.
fn run_stage(
    args: &RunArgs,
    plan: &Plan,
    stage: &StagePlan,
    k: usize,
    metrics: &mut Metrics,
) -> Result<(StageReport, u64)> {
    let session = &plan.session;
    let masks: Vec<&Mask> = stage.frozen_tasks.iter().map(|task| &plan.masks[task]).collect();
    let freeze = if masks.is_empty() { None } else { Some(Freeze::new(&session.parameters, &masks)?) };
    let frozen = freeze.as_ref().map_or(0, Freeze::len);
    info!("{}: {} examples, {frozen} elements frozen", stage.label, stage.examples.len());
    let task = Stage {
        label: &stage.label,
        examples: &stage.examples,
        freeze: freeze.as_ref(),
        budget: stage.budget,
        seed: args.training.seed.wrapping_add(k as u64),
    };
    let report = train::run_stage(&session.model, &session.parameters, &task, &args.training, metrics)?;
    Ok((report, frozen))
}

fn summary(stage: &StagePlan, report: &StageReport, frozen: u64) -> Value {
    json!({"stage": stage.label, "examples": stage.examples.len(), "steps": report.steps, "tokens": report.tokens,
        "first_loss": report.first_loss, "final_loss": report.final_loss, "frozen_elements": frozen,
        "frozen_tasks": stage.frozen_tasks})
}
