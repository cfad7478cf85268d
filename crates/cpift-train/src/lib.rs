//! Stage 4 of CPI-FT: integrated multi-stage fine-tuning with dynamic freezing, and the plain fine-tunes it is compared with.

mod args;
mod highlight;
mod memory_plan;
mod plan;
mod preview;
mod run;

pub use args::{Args, Command, PreviewArgs, RunArgs, SampleRows, StageData, VerifyArgs};
pub use memory_plan::PlanArgs;

use anyhow::Result;
use cpift_torch::train::verify_states;
use cpift_torch::{memory, oom};

/// Runs the stage.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any output; failures of training after.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    match args.command {
        Command::Run(run_args) => oom::explain(
            || {
                memory::of_failed_run(
                    &run_args.model,
                    &run_args.tasks,
                    &run_args.training,
                    memory_plan::frozen(&run_args),
                )
            },
            || run::run(&run_args, &args.common),
        ),
        Command::Plan(plan_args) => memory_plan::estimate(&plan_args, &args.common),
        Command::Preview(preview_args) => preview::run(&preview_args, &args.common),
        Command::Verify(VerifyArgs { states }) => {
            let count = verify_states(&states)?;
            log::info!("{}: {count} sound", states.display());
            args.common.print_json(&serde_json::json!({"path": states, "states": count}));
            Ok(())
        }
    }
}
