//! The `cpift-mask` program: parse, run, one error print, exit code.

fn main() -> std::process::ExitCode {
    cpift_core::run::cli::run_stage(cpift_mask::run)
}
