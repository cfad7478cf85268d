//! throwaway
use clap::Parser;
#[derive(Parser)]
struct A {
    #[command(subcommand)]
    c: C,
    #[command(flatten)]
    common: cpift_core::cli::Common,
}
#[derive(clap::Subcommand)]
enum C {
    Report(cpift_report::ReportArgs),
    Compare(cpift_report::CompareArgs),
}
fn main() -> std::process::ExitCode {
    cpift_core::cli::run_stage(|a: A| {
        a.common.start()?;
        match a.c {
            C::Report(r) => cpift_report::report(&r, &a.common),
            C::Compare(r) => cpift_report::compare(&r, &a.common),
        }
    })
}
