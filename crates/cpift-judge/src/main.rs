//! `cpift-judge`: `cpift-eval judge` for machines without libtorch.

use std::process::ExitCode;

use clap::Parser;
use cpift_core::run::cli::{Common, run_stage};
use cpift_judge::JudgeArgs;

/// Grades the answers of an evaluation from 1 to 10 by a chat endpoint; the same as `cpift-eval judge`, without libtorch.
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-judge", version, after_help = JudgeArgs::EXAMPLES)]
struct Args {
    #[command(flatten)]
    judge: JudgeArgs,
    #[command(flatten)]
    common: Common,
}

fn main() -> ExitCode {
    run_stage(|args: Args| {
        args.common.start()?;
        cpift_judge::run(env!("CARGO_PKG_NAME"), &args.judge, &args.common)
    })
}
