//! `cpift-train`: staged fine-tuning with the cores of earlier groups frozen, and its baselines.

use std::process::ExitCode;

fn main() -> ExitCode {
    cpift_core::run::cli::run_stage(cpift_train::run)
}
