//! `cpift-probe`: fine-tunes a base checkpoint on one task.

use std::process::ExitCode;

fn main() -> ExitCode {
    cpift_core::cli::run_stage(cpift_probe::run)
}
