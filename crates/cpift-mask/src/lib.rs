//! Stage 1 of CPI-FT: the core region of a task, the exact top p % of a model's parameters by how far they moved.
//!
//! The order of work: [`Percent`] says how many elements are chosen, [`parts`] cuts the parameters into the parts they
//! compete in, [`select`] finds each part's threshold, [`emit`] writes the bits.

mod args;
pub mod emit;
mod extract;
pub mod parts;
mod percent;
mod picture;
pub mod select;
pub mod stats;

pub use args::Args;
pub use extract::{Summary, extract};
pub use percent::Percent;

use anyhow::Result;
use cpift_core::Mask;

use args::{Command, MaskArg};

/// Runs what was typed.
///
/// # Errors
/// [`cpift_core::Usage`], [`cpift_core::BadInput`], or another failure.
pub fn run(args: Args) -> Result<()> {
    let common = args.common;
    common.start()?;
    match args.command {
        Command::Extract(args) => {
            let summary = extract(&args, common.force)?;
            common.print_json(&serde_json::to_value(summary)?);
        }
        Command::Stats(args) => stats::run(&args, &common)?,
        Command::Verify(MaskArg { file }) => {
            let mask = Mask::open(&file)?;
            mask.verify()?;
            log::info!("{}: sound, {} of D = {} elements", file.display(), mask.header.selected, mask.header.d);
            common.print_json(&serde_json::to_value(&mask.header)?);
        }
    }
    Ok(())
}
