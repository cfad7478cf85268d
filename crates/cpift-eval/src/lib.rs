//! The last stage of CPI-FT: what a checkpoint scores on every task, and tables of several checkpoints.

mod answers;
mod args;
mod compare;
mod metrics;
mod prompt;
mod run;

pub use args::{Args, Command, CompareArgs, RunArgs};
pub use compare::{Table, average_normalised_score};
pub use metrics::{flexible_extract, normalise, strict_match};

use anyhow::Result;

/// Runs the stage.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any output; failures of scoring after.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    match args.command {
        Command::Run(run_args) => run::run(&run_args, &args.common),
        Command::Judge(judge_args) => cpift_judge::run(&judge_args, &args.common),
        Command::Compare(compare_args) => compare::run(&compare_args, &args.common),
    }
}
