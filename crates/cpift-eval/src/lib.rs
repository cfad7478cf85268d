//! The last stage of CPI-FT: scores of a checkpoint on every task. cpift-report compares scores and
//! writes reports; cpift-judge grades answers.

mod args;
mod divergence;
mod fields;
mod metrics;
mod prompt;
mod run;
mod sample;

pub use args::{Args, Command, DivergenceArgs, InferenceArgs, JoinArgs, RunArgs, SampleArgs};
pub use metrics::{flexible_extract, normalise, strict_match};

use anyhow::Result;
use cpift_torch::oom;

/// Runs the stage.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any output; failures of scoring after.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    match args.command {
        Command::Run(run_args) => oom::explain(smaller_batch, || run::run(&run_args, &args.common)),
        Command::Sample(sample_args) => oom::explain(smaller_batch, || sample::run(&sample_args, &args.common)),
        Command::Divergence(of) => oom::explain(smaller_batch, || divergence::run(&of, &args.common)),
        Command::Join(join_args) => run::join(&join_args, &args.common),
        Command::Judge(judge_args) => cpift_judge::run(env!("CARGO_PKG_NAME"), &judge_args, &args.common),
        Command::Compare(compare_args) => cpift_report::compare(&compare_args, &args.common),
        Command::Experiment(experiment_args) => cpift_report::experiment(&experiment_args, &args.common),
        Command::Report(report_args) => cpift_report::report(&report_args, &args.common),
    }
}

/// Hint for a run without enough memory.
fn smaller_batch() -> String {
    "  hint: use a smaller --batch-size, or raise the limit".to_owned()
}
