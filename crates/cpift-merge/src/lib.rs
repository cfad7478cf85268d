//! Merges of checkpoints: linear, SLERP, spherical mean, task arithmetic, TIES, DARE, and stage 3
//! of CPI-FT.
//!
//! Data flows one way. [`cli`] and [`recipe`] turn flags and recipes into a [`Request`], free of
//! clap. The plan checks it against the checkpoints it names and resolves it to one rule per
//! tensor. The engine streams the tensors through all threads: it measures what a rule needs to
//! know of the whole tensor (inner products, cut-offs), and writes the result while the tensor is
//! still in a cache. The methods are the arithmetic on slices. A report sums up the merge, and the
//! card says how to reproduce it.

pub mod card;
pub mod cli;
mod engine;
mod merge;
mod methods;
mod plan;
pub mod recipe;
mod report;
mod request;
mod setting;
mod verify;

pub use methods::sphere;
pub use request::{Method, ModelRequest, Request, Space};
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
use plan::Plan;

const STAGE: &str = env!("CARGO_PKG_NAME");

/// Runs the command given by `args`.
///
/// # Errors
/// Any error of the command; its type decides the exit code.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    let mut record = Recorder::start(STAGE);
    let common = &args.common;
    let output = args.command.output().filter(|output| !output.dry_run);
    if output.is_some_and(|output| common.up_to_date(&Expected::new(STAGE, &output.out))) {
        return Ok(());
    }
    match &args.command {
        Command::Linear(a) => merge_models(a.request()?, &a.output, common, record),
        Command::Slerp(a) => merge_models(a.request()?, &a.output, common, record),
        Command::SphericalMean(a) => merge_models(a.request()?, &a.output, common, record),
        Command::TaskArithmetic(a) => merge_models(a.request()?, &a.output, common, record),
        Command::Ties(a) => merge_models(a.request()?, &a.output, common, record),
        Command::Dare(a) => merge_models(a.request()?, &a.output, common, record),
        Command::Recipe(a) => {
            files::check_not_input("--out", &a.output.out, [a.recipe.as_path()])?;
            let request = recipe::read(&a.recipe)?;
            record.input("recipe", &a.recipe, Digest::of_file(&a.recipe)?);
            merge_models(request, &a.output, common, record)
        }
        Command::Cpi(a) => {
            let request = a.request();
            let plan = Plan::of_tasks(&request, &a.output.request(common.force()))?;
            let card = card::of_cpi(&request, plan.output.dtype);
            finish(&plan, &card, &a.output, common, record)
        }
        Command::Verify(a) => {
            common.print_json(&verify(&a.checkpoint)?);
            Ok(())
        }
        Command::Digest(a) => print_digests(&a.paths),
    }
}

/// Merges by one of the plain methods. Flags of the output take precedence over the request, which
/// a recipe may have made.
fn merge_models(mut request: Request, args: &OutputArgs, common: &Common, record: Recorder) -> Result<()> {
    let mut output = args.request(common.force());
    output.dtype = output.dtype.or(request.dtype);
    output.side_files = output.side_files.or(request.side_files.take());
    request.side_files.clone_from(&output.side_files);
    let plan = Plan::of_models(&request, &output)?;
    let card = card::of_request(&request, plan.output.dtype);
    finish(&plan, &card, args, common, record)
}

/// Runs a plan, or prints it if this is a dry run.
fn finish(plan: &Plan, card: &str, output: &OutputArgs, common: &Common, record: Recorder) -> Result<()> {
    if output.dry_run {
        return report::preview(plan, common.json);
    }
    let summary = merge::merge(plan, card, record)?;
    summary.log();
    common.print_json(&summary.to_json());
    Ok(())
}

/// Prints the digests that cpift.json records for `paths` as inputs, computed from their content.
fn print_digests(paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        let digest =
            if path.is_dir() { Digest::of_checkpoint(&Checkpoint::open(path)?)? } else { Digest::of_file(path)? };
        writeln!(std::io::stdout(), "{digest}  {}", path.display())?;
    }
    Ok(())
}
