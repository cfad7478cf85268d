//! Merges of checkpoints: linear, SLERP, spherical mean, task arithmetic, TIES, DARE, and stage 3 of CPI-FT.
//!
//! Data flows one way. [`cli`] is what can be typed; flags and recipes both become a [`request::Request`], which [`plan`]
//! checks against the checkpoints it names and resolves to a [`Plan`] with one [`methods::Rule`] for each tensor. The
//! [`engine`] then streams tensor by tensor through all threads: it measures what a rule must know of the whole tensor
//! (inner products, cut-offs), and writes the result while the tensor is still in a cache. [`methods`] holds the arithmetic.

pub mod card;
pub mod cli;
mod dry_run;
pub mod engine;
mod flags;
mod merge;
pub mod methods;
pub mod plan;
pub mod recipe;
mod report;
pub mod request;
pub mod setting;
mod verify;

pub use merge::merge;
pub use methods::sphere;
pub use plan::Plan;
pub use report::Summary;
pub use request::{Method, ModelRequest};
pub use setting::Setting;
pub use verify::verify;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use cpift_core::format::digest::Digest;
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::{Checkpoint, files};

use cli::{Args, Command, OutputArgs};
pub use request::Request;

const STAGE: &str = env!("CARGO_PKG_NAME");

/// Runs the command that was typed.
///
/// # Errors
/// Everything that can go wrong, with the exit code its kind means.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    let mut record = Recorder::start(STAGE);
    let common = &args.common;
    let output = args.command.output().filter(|output| !output.dry_run);
    if output.is_some_and(|output| common.up_to_date(&Expected::new(STAGE, &output.out))) {
        return Ok(());
    }
    match &args.command {
        Command::Linear(a) => plain(a.request()?, &a.output, common, record),
        Command::Slerp(a) => plain(a.request()?, &a.output, common, record),
        Command::SphericalMean(a) => plain(a.request()?, &a.output, common, record),
        Command::TaskArithmetic(a) => plain(a.request()?, &a.output, common, record),
        Command::Ties(a) => plain(a.request()?, &a.output, common, record),
        Command::Dare(a) => plain(a.request()?, &a.output, common, record),
        Command::Recipe(a) => {
            files::check_not_input("--out", &a.output.out, [a.recipe.as_path()])?;
            let request = recipe::read(&a.recipe)?;
            record.input("recipe", &a.recipe, Digest::of_file(&a.recipe)?);
            plain(request, &a.output, common, record)
        }
        Command::Cpi(a) => finish(&plan::plan_cpi(a, common.force())?, &a.output, common, record),
        Command::Verify(a) => {
            common.print_json(&verify(&a.checkpoint)?);
            Ok(())
        }
        Command::Digest(a) => digest(&a.paths),
    }
}

/// Prints what cpift.json would record of `paths` as inputs, computed anew.
fn digest(paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        let digest =
            if path.is_dir() { Digest::of_checkpoint(&Checkpoint::open(path)?)? } else { Digest::of_file(path)? };
        writeln!(std::io::stdout(), "{digest}  {}", path.display())?;
    }
    Ok(())
}

/// Plans and runs one of the plain methods; flags come before what a recipe says of the output.
fn plain(mut request: Request, output: &OutputArgs, common: &Common, record: Recorder) -> Result<()> {
    let mut output = output.clone();
    output.dtype = output.dtype.or(request.dtype);
    output.copy_from = output.copy_from.or(request.side_files.take());
    request.side_files.clone_from(&output.copy_from);
    finish(&plan::plan(&request, &output, common.force())?, &output, common, record)
}

/// Runs a plan, or shows it.
fn finish(plan: &Plan, output: &OutputArgs, common: &Common, record: Recorder) -> Result<()> {
    if output.dry_run {
        return dry_run::show(plan, common.json);
    }
    let summary = merge(plan, record)?;
    summary.log();
    common.print_json(&summary.to_json());
    Ok(())
}
