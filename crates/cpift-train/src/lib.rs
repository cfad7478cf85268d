//! Stage 4 of CPI-FT: integrated multi-stage fine-tuning with dynamic freezing, and the plain fine-tunes it is compared with.

mod args;
mod paint;
mod plan;
mod preview;
mod run;

pub use args::{Args, Command, PreviewArgs, RunArgs, SampleRows, StageData};

use anyhow::Result;

/// Runs the stage.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any output; failures of training after.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    match args.command {
        Command::Run(run_args) => run::run(&run_args, &args.common),
        Command::Preview(preview_args) => preview::run(&preview_args, &args.common),
    }
}
