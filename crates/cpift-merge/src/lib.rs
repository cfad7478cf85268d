//! Merges of checkpoints: means, interpolations, task vectors and layers rearranged, and stage 3 of
//! CPI-FT.
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
mod lora;
mod merge;
mod method;
mod methods;
mod plan;
pub mod recipe;
mod report;
mod request;
mod setting;
mod svd;
mod verify;

pub use method::{Base, Method, Parameter};
pub use methods::sphere;
pub use request::{
    ChatTemplate, Integers, LayoutPolicy, Missing, ModelRequest, Request, Slice, Space, TokenRow, TokenRule,
    TokenizerRequest, TokenizerSource, Values,
};
pub use setting::Setting;
pub use verify::verify;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::StagedDir;
use cpift_core::format::checkpoint::model_of;
use cpift_core::format::digest::Digest;
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::{Checkpoint, files};

use cli::{Args, Command, OutputArgs};
use merge::Merge;
use plan::Plan;
use request::OutputRequest;

const STAGE: &str = env!("CARGO_PKG_NAME");

/// Runs the command given by `args`.
///
/// # Errors
/// Any error of the command; its type decides the exit code.
pub fn run(args: Args) -> Result<()> {
    args.common.start()?;
    let mut record = Recorder::start(STAGE);
    let common = &args.common;
    let adapter = match &args.command {
        Command::ExtractLora(a) => Some(&a.out),
        Command::MergeAdapters(a) => Some(&a.out),
        _ => None,
    };
    if adapter.is_some_and(|out| common.up_to_date(&Expected::new(STAGE, out))) {
        return Ok(());
    }
    let output = args.command.output().filter(|output| !output.dry_run);
    if output.is_some_and(|output| common.up_to_date(&Expected::new(STAGE, &output.out))) {
        return Ok(());
    }
    if let (Some(request), Some(output)) = (args.command.request()?, args.command.output()) {
        if let Some(requests) = args.command.sweep(&request)? {
            return merge_sweep(requests, output, common);
        }
        return merge_models(request, output, common, record);
    }
    match &args.command {
        Command::Recipe(a) => {
            files::check_not_input("--out", &a.output.out, [a.recipe.as_path()])?;
            let mut steps = recipe::read_all(&a.recipe)?;
            for recipe::Step { request, .. } in &mut steps {
                request.layouts = a.layouts.policy();
            }
            if let Some(last) = steps.last_mut() {
                a.layouts.put_tokenizer(&mut last.request);
            }
            record.input("recipe", &a.recipe, Digest::of_file(&a.recipe)?);
            merge_steps(steps, &a.output, common, record)
        }
        Command::Cpi(a) => {
            let request = a.request();
            let plan = Plan::of_tasks(&request, &a.output.request(common.force()))?;
            let card = card::of_cpi(&request, plan.output.dtype);
            finish(plan, card, &a.output, common, record)
        }
        Command::ExtractLora(a) => {
            common.print_json(&a.request(common.force()).run(record)?);
            Ok(())
        }
        Command::MergeAdapters(a) => {
            common.print_json(&a.request(common.force()).run(record)?);
            Ok(())
        }
        Command::Verify(a) => {
            common.print_json(&verify(&a.checkpoint)?);
            Ok(())
        }
        Command::Digest(a) => print_digests(&a.paths),
        _ => unreachable!("merges of models are handled above"),
    }
}

/// Runs the merges of a file of recipes. All but the last go to a temporary directory beside the
/// output.
fn merge_steps(mut steps: Vec<recipe::Step>, args: &OutputArgs, common: &Common, record: Recorder) -> Result<()> {
    let last = steps.pop().expect("a file has at least one recipe");
    if steps.is_empty() {
        return merge_models(last.request, args, common, record);
    }
    if args.dry_run {
        return Err(usage("--dry-run shows one merge, and this recipe has several that build on one another"));
    }
    files::check_output_dir(&args.out, common.force())?;
    let folder = args.out.with_file_name(format!(
        "{}.merges",
        args.out.file_name().map(|name| name.to_string_lossy()).unwrap_or_default()
    ));
    // Never committed, so that it is removed at the end.
    let staged = StagedDir::create(&folder, false)?;
    let names: Vec<String> = steps.iter().filter_map(|step| step.name.clone()).collect();
    let place = |path: &Path| {
        let (name, rest) = recipe::result_in(&names, path)?;
        Some(PathBuf::from(format!("{}{rest}", staged.path().join(name).display())))
    };
    for recipe::Step { name, mut request } in steps {
        let name = name.expect("only the last merge may have no name");
        log::info!("merge {name}");
        request.relocate(&place);
        let mut output = args.request(false);
        (output.dir, output.dtype, output.side_files) =
            (staged.path().join(&name), request.dtype, request.side_files.clone());
        let plan = Plan::of_models(&request, &output)?;
        let card = card::of_request(&request, plan.output.dtype);
        merge::merge(Merge { plan, card, record: Recorder::start(STAGE) })?.log();
    }
    let mut request = last.request;
    request.relocate(&place);
    merge_models(request, args, common, record)
}

/// Merges by one of the plain methods. Flags of the output take precedence over the request, which
/// a recipe may have made.
fn merge_models(request: Request, args: &OutputArgs, common: &Common, record: Recorder) -> Result<()> {
    let (plan, card) = plan_models(request, args.request(common.force()))?;
    finish(plan, card, args, common, record)
}

fn plan_models(mut request: Request, mut output: OutputRequest) -> Result<(Plan, String)> {
    output.dtype = output.dtype.or(request.dtype);
    output.side_files = output.side_files.or(request.side_files.take());
    request.side_files.clone_from(&output.side_files);
    let plan = Plan::of_models(&request, &output)?;
    let card = card::of_request(&request, plan.output.dtype);
    Ok((plan, card))
}

/// Merges once per value of a sweep, with one reading of the inputs; the results are directories,
/// or files, in the output directory, named by the values.
fn merge_sweep(requests: Vec<(f64, Request)>, args: &OutputArgs, common: &Common) -> Result<()> {
    if args.dry_run {
        return Err(usage("--dry-run shows one merge: leave --sweep out"));
    }
    let mut merges = Vec::new();
    for (value, request) in requests {
        let mut output = args.request(common.force());
        let backbone = request.base.as_deref().unwrap_or(&request.models[0].path);
        let is_file = model_of(backbone).as_deref().unwrap_or(backbone).is_file();
        output.dir = args.out.join(if is_file { format!("{value}.safetensors") } else { value.to_string() });
        let (plan, card) = plan_models(request, output)?;
        merges.push(Merge { plan, card, record: Recorder::start(STAGE) });
    }
    let summaries = merge::merge_all(merges)?;
    summaries.iter().for_each(report::Summary::log);
    common.print_json(&serde_json::Value::Array(summaries.iter().map(report::Summary::to_json).collect()));
    Ok(())
}

/// Runs a plan, or prints it if this is a dry run.
fn finish(plan: Plan, card: String, output: &OutputArgs, common: &Common, record: Recorder) -> Result<()> {
    if output.dry_run {
        return report::preview(&plan, common.json);
    }
    let summary = merge::merge(Merge { plan, card, record })?;
    summary.log();
    common.print_json(&summary.to_json());
    Ok(())
}

/// Prints the digests that cpift.json records for `paths` as inputs, computed from their content.
fn print_digests(paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        let is_checkpoint = path.is_dir() || model_of(path).is_some();
        let digest =
            if is_checkpoint { Digest::of_checkpoint(&Checkpoint::open(path)?)? } else { Digest::of_file(path)? };
        writeln!(std::io::stdout(), "{digest}  {}", path.display())?;
    }
    Ok(())
}
