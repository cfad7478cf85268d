//! The `cpift-mask` program: parse, run, one error print, exit code.

fn main() -> std::process::ExitCode {
    cpift_core::cli::run_stage(cpift_mask::run)
}
