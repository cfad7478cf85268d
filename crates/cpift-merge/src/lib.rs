//! Stage 3 of CPI-FT, and plain merges of any checkpoints: core transplant, SLERP and linear combination.
//!
//! Every method here writes, per tensor, a linear combination of its inputs whose coefficients follow from the inner
//! products of those inputs alone. So a merge is two passes over memory-mapped files: [`stream::measure`] takes the
//! inner products, [`sphere`] turns them into coefficients, [`stream::write`] writes the combination and puts the core
//! regions in place. Linear merges, whose coefficients are given, skip the first pass.

pub mod cli;
mod inputs;
mod merge;
mod plan;
pub mod recipe;
mod region;
mod report;
pub mod request;
pub mod setting;
mod shard_size;
pub mod sphere;
pub mod stream;
mod verify;

pub use inputs::Source;
pub use merge::merge;
pub use plan::{Output, Plan, Weights, plan_cpi, plan_linear, plan_slerp};
pub use region::{Claims, Conflict};
pub use report::Summary;
pub use request::{Method, ModelRequest, Request};
pub use setting::{Rule, Setting};
pub use shard_size::parse_shard_size;
pub use verify::verify;

use anyhow::Result;
use cpift_core::provenance::Recorder;

use cli::{Args, Command};

/// Runs the command that was typed.
///
/// # Errors
/// Everything that can go wrong, with the exit code its kind means.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    let record = Recorder::start(env!("CARGO_PKG_NAME"));
    let plan: Plan = match &args.command {
        Command::Cpi(cpi) => plan_cpi(cpi, args.common.force)?,
        Command::Slerp(slerp) => plan_slerp(slerp, args.common.force)?,
        Command::Linear(linear) => plan_linear(linear, args.common.force)?,
        Command::Verify(verify_args) => {
            args.common.print_json(&verify(&verify_args.checkpoint)?);
            return Ok(());
        }
    };
    let summary = merge(&plan, record)?;
    summary.log();
    args.common.print_json(&summary.to_json());
    Ok(())
}
