//! Stage 2 of CPI-FT: groups tasks whose core regions overlap, and puts the groups in training
//! order.
//!
//! [`overlap`] counts the bits that regions share, [`partition`] cuts the graph of similar tasks
//! into groups, [`order`] orders them; [`heatmap`] and [`layers`] draw the result, [`sweep`] shows
//! what other thresholds would give.

mod args;
mod dependency;
mod group;
pub mod heatmap;
pub mod layers;
pub mod order;
pub mod overlap;
pub mod partition;
mod plan;
pub mod sweep;

pub use args::Args;
pub use group::{Outcome, group};

use std::io::Write;

use anyhow::Result;
use cpift_core::record::up_to_date::Expected;

use plan::Outputs;

/// Runs what was typed.
///
/// # Errors
/// [`cpift_core::Usage`], [`cpift_core::BadInput`], or another failure.
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

/// A sweep is printed in any case.
fn is_up_to_date(args: &Args) -> bool {
    let Some(outputs) = Outputs::named_by(args).filter(|_| !args.sweep) else { return false };
    let also = vec![outputs.svg.as_path(), &outputs.layers, &outputs.layers_svg];
    args.common.up_to_date(&Expected { also, ..Expected::new(env!("CARGO_PKG_NAME"), &outputs.groups) })
}
