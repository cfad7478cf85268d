//! Stage 1 of CPI-FT: the core region of a task, the exact top p % of a model's parameters by how far they moved.
//!
//! The order of work: [`Percent`] says how many elements are chosen, [`parts`] cuts the parameters into the parts they
//! compete in, [`bracket`] guesses each part's threshold from a sample, [`sweep`] reads the part once, writes the bits that
//! are beyond doubt and settles the rest. Where the guess was wrong, the exact search of [`cpift_core::stream::select`] finds the
//! threshold and [`emit`] writes the bits. `tensors` chooses whole tensors instead, `random` draws a control.

mod args;
pub mod bracket;
pub mod emit;
mod extract;
pub mod inputs;
mod output;
pub mod parts;
mod percent;
mod picture;
mod random;
pub mod scores;
pub mod stats;
mod summary;
pub mod sweep;
mod tensors;

pub use args::Args;
pub use extract::extract;
pub use percent::Percent;
pub use random::random;
pub use summary::Summary;
pub use tensors::tensors;

use std::path::PathBuf;

use anyhow::Result;
use cpift_core::Mask;
use cpift_core::record::provenance::Provenance;
use cpift_core::record::up_to_date::Expected;

use args::{Command, MaskArg, RandomArgs, TensorsArgs};

const STAGE: &str = env!("CARGO_PKG_NAME");

/// Runs what was typed.
///
/// # Errors
/// [`cpift_core::Usage`], [`cpift_core::BadInput`], or another failure.
pub fn run(args: Args) -> Result<()> {
    let common = args.common;
    common.start()?;
    match args.command {
        Command::Extract(args) => {
            let stats = args.stats_files();
            let also = stats.iter().flatten().map(PathBuf::as_path).collect();
            if common.up_to_date(&Expected { also, ..Expected::new(STAGE, &args.out) }) {
                return Ok(());
            }
            let summary = extract(&args, common.force())?;
            common.print_json(&serde_json::to_value(summary)?);
        }
        Command::Tensors(TensorsArgs { out, .. }) | Command::Random(RandomArgs { out, .. })
            if common.up_to_date(&Expected::new(STAGE, &out)) => {}
        Command::Tensors(args) => common.print_json(&tensors(&args, common.force())?),
        Command::Random(args) => common.print_json(&random(&args, common.force())?),
        Command::Stats(args) => stats::run(&args, &common)?,
        Command::Verify(MaskArg { file }) => {
            let mask = Mask::open(&file)?;
            mask.verify()?;
            let recorded = if Provenance::verify_file(&file)? { "; the content matches its record" } else { "" };
            log::info!(
                "{}: sound, {} of D = {} elements{recorded}",
                file.display(),
                mask.header.selected,
                mask.header.d
            );
            common.print_json(&serde_json::to_value(&mask.header)?);
        }
    }
    Ok(())
}
