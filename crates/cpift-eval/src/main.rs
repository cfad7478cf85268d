//! `cpift-eval`: scores a checkpoint on every task, and compares scores.

use std::process::ExitCode;

fn main() -> ExitCode {
    cpift_core::run::cli::run_stage(cpift_eval::run)
}
