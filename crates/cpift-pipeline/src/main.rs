//! The `cpift-pipeline` program: parse, run, one error print, exit code.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match cpift_pipeline::run(cpift_pipeline::Args::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(cpift_core::error::exit_code(&error))
        }
    }
}
