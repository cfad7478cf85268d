//! Stage 2 of CPI-FT: groups tasks whose core regions overlap, and puts the groups in training order.
//!
//! [`overlap`] counts the bits that regions share, [`partition`] cuts the graph of similar tasks into groups, [`order`]
//! orders them, [`heatmap`] draws the result.

mod args;
mod dependency;
mod group;
pub mod heatmap;
pub mod order;
pub mod overlap;
pub mod partition;

pub use args::Args;
pub use group::group;

use anyhow::Result;

/// Runs what was typed.
///
/// # Errors
/// [`cpift_core::Usage`], [`cpift_core::BadInput`], or another failure.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    let groups = group::group(&args)?;
    args.common.print_json(&serde_json::to_value(groups)?);
    Ok(())
}
