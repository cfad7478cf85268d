//! `cpift-train`: staged fine-tuning with the cores already placed frozen, and the baselines it is compared with.

use std::process::ExitCode;

fn main() -> ExitCode {
    cpift_core::run::cli::run_stage(cpift_train::run)
}
