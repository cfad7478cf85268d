//! Stage 2 of CPI-FT: groups tasks whose core regions overlap, and puts the groups in training
//! order.
//!
//! `overlap` counts the bits that regions share, [`partition`] cuts the graph of similar tasks into
//! groups and sweeps τ, `order` puts the groups in training order, and [`heatmaps`] draws the
//! result.

mod args;
mod group;
pub mod heatmaps;
mod order;
mod overlap;
pub mod partition;
mod plan;

pub use args::Args;

use std::io::Write;

use anyhow::Result;
use cpift_core::record::up_to_date::Expected;

use group::{Outcome, group};
use plan::Outputs;

/// Runs the program with these arguments.
///
/// # Errors
/// [`cpift_core::Usage`] for arguments that do not go together; [`cpift_core::BadInput`] for
/// unusable inputs or an output that exists.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    if is_up_to_date(&args) {
        return Ok(());
    }
    match group(&args)? {
        Outcome { sweep: Some(sweep), .. } if args.common.json => args.common.print_json(&serde_json::to_value(sweep)?),
        Outcome { sweep: Some(sweep), .. } => std::io::stdout().write_all(sweep.table().as_bytes())?,
        Outcome { groups, .. } => args.common.print_json(&serde_json::to_value(groups)?),
    }
    Ok(())
}

/// Returns true if `--skip-up-to-date` finds the outputs up to date. A sweep is always printed.
fn is_up_to_date(args: &Args) -> bool {
    let Some(outputs) = Outputs::named_by(args).filter(|_| !args.sweep) else { return false };
    let also = vec![outputs.svg.as_path(), &outputs.layers, &outputs.layers_svg];
    args.common.up_to_date(&Expected { also, ..Expected::new(env!("CARGO_PKG_NAME"), &outputs.groups) })
}
