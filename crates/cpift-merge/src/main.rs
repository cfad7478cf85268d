//! The `cpift-merge` program: parse, run, print an error once, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    cpift_core::run::cli::run_stage(cpift_merge::run)
}
