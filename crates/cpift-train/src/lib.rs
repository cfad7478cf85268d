//! Stage 4 of CPI-FT: multi-stage fine-tuning with the cores of earlier groups frozen, and its
//! baselines.

mod args;
mod memory_plan;
mod plan;
mod preview;
mod run;

pub use args::Args;

use anyhow::Result;
use args::{Command, VerifyArgs};
use cpift_torch::train::verify_states;
use cpift_torch::{memory, oom};

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
            oom::explain(told, || run::run(&run_args, &args.common))
        }
        Command::Plan(plan_args) => memory_plan::estimate(&plan_args, &args.common),
        Command::Preview(preview_args) => preview::run(&preview_args, &args.common),
        Command::Verify(VerifyArgs { states }) => {
            let count = verify_states(&states)?;
            log::info!("{}: {count} intact", states.display());
            args.common.print_json(&serde_json::json!({"path": states, "states": count}));
            Ok(())
        }
    }
}
