//! `cpift-probe`: fine-tunes a base checkpoint on one task.

use std::process::ExitCode;

fn main() -> ExitCode {
    cpift_core::run::cli::run_stage(cpift_probe::run)
}
