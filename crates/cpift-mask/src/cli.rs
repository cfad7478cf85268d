//! The command line of `cpift-mask`: its flags, their checks, and the dispatch to the subcommands.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args as ClapArgs, Parser, Subcommand};
use cpift_core::error::usage;
use cpift_core::files::{check_not_input, check_output};
use cpift_core::format::mask::{Metric, Scope};
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::{Provenance, Recorder};
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::{Mask, Usage};

use crate::inputs::{Inputs, each_once};
use crate::percent::Percent;
use crate::{extract, random, stats, tensors};

const STAGE: &str = env!("CARGO_PKG_NAME");

/// Finds the core region of a task: the exact top p % of a model's parameters by the size of their
/// update in fine-tuning.
///
/// The pipeline uses `extract`. `tensors` chooses whole tensors, as TRACE does, and `random` draws
/// a control of the size of another mask. All write the same file format: safetensors with one U8
/// tensor of packed bits per parameter.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-mask", version)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Write the mask of the elements that changed most between two checkpoints, or that --score
    /// ranks highest
    Extract(ExtractArgs),
    /// Write the mask of the most important tensors, each chosen whole (the selection of TRACE)
    ///
    /// The importance of a tensor is ½·minmax(root mean square of its update) + ½·minmax(mean of
    /// its squared gradients), where minmax scales the figures of all tensors to 0..1; without
    /// --fisher it is the root mean square alone. Equally important tensors are chosen in bytewise
    /// name order. The mask has the format of `extract`.
    Tensors(TensorsArgs),
    /// Write a control: as many elements as another mask has, drawn uniformly at random from the
    /// same parameters
    ///
    /// To measure what a core region contributes, pass the control to cpift-group, cpift-merge or
    /// cpift-train in place of the mask.
    Random(RandomArgs),
    /// Show the density of a mask by layer and by role, as tables, JSON or a picture
    Stats(StatsArgs),
    /// Check the structure of a mask, the number of its bits and its recorded digest
    Verify(VerifyArgs),
}

/// The two checkpoints whose difference is ranked.
#[derive(ClapArgs, Debug)]
struct CheckpointArgs {
    /// Checkpoint before fine-tuning: a Hugging Face directory or a .safetensors file
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    base: PathBuf,
    /// Checkpoint after fine-tuning on one task, with the same tensor names and shapes
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    tuned: PathBuf,
}

impl CheckpointArgs {
    fn open(&self, fisher: Option<&Path>) -> Result<Inputs> {
        Inputs::open(&self.base, &self.tuned, fisher)
    }
}

#[derive(ClapArgs, Debug)]
struct ExtractArgs {
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    /// Sums of squared gradients saved by cpift-probe, for --score fisher and blend: a .safetensors
    /// file or a directory, with the names and shapes of the parameters
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    fisher: Option<PathBuf>,
    /// Mask to write
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    out: PathBuf,
    /// Density by layer and role to write as JSON, with a picture of the same name and the
    /// extension .svg; not written by default
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    stats: Option<PathBuf>,
    /// Share of the parameters to choose, in percent: above 0, at most 100. The count is exactly
    /// ⌊p·D/100⌋
    #[arg(long, value_name = "P", default_value = "1", allow_negative_numbers = true, help_heading = "Method")]
    percent: Percent,
    /// Elements that are ranked together
    #[arg(long, value_enum, default_value_t = Scope::Global, help_heading = "Method")]
    scope: Scope,
    /// Quantity to rank by
    #[arg(long, value_enum, default_value_t = Metric::Magnitude, help_heading = "Method")]
    score: Metric,
    /// Kinds of tensors to exclude from D: embeddings, norms; none by default
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', help_heading = "Method")]
    exclude: Vec<TensorKind>,
}

#[derive(ClapArgs, Debug)]
struct TensorsArgs {
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    /// Sums of squared gradients saved by cpift-probe; by default only the updates count
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    fisher: Option<PathBuf>,
    /// Mask to write; all bits of the chosen tensors are set
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    out: PathBuf,
    /// Share of the number of tensors to choose, in percent, rounded up: above 0, at most 100
    #[arg(long, value_name = "P", default_value = "10", allow_negative_numbers = true, help_heading = "Method")]
    percent: Percent,
    /// Kinds of tensors to exclude from the choice: embeddings, norms; none by default
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', help_heading = "Method")]
    exclude: Vec<TensorKind>,
}

#[derive(ClapArgs, Debug)]
struct RandomArgs {
    /// Mask that sets the base, the number of elements and the excluded kinds of tensors
    #[arg(long, value_name = "MASK", help_heading = "Input and output")]
    like: PathBuf,
    /// Mask to write
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    out: PathBuf,
    /// Draw as many elements in each tensor as the mask has there; by default only the total is the
    /// same
    #[arg(long, help_heading = "Method")]
    per_tensor: bool,
    /// Seed of the draw; a seed gives the same elements on any machine
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Run")]
    seed: u64,
}

#[derive(ClapArgs, Debug)]
struct StatsArgs {
    /// Mask to read
    #[arg(value_name = "FILE", help_heading = "Input and output")]
    file: PathBuf,
    /// JSON file to write, with the tables and the matrix of layers by roles; not written by
    /// default
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    out: Option<PathBuf>,
    /// Picture to write, the density by layer and role as SVG; not written by default
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    svg: Option<PathBuf>,
}

#[derive(ClapArgs, Debug)]
struct VerifyArgs {
    /// Mask to read
    #[arg(value_name = "FILE", help_heading = "Input and output")]
    file: PathBuf,
}

/// Runs a parsed command line.
///
/// # Errors
/// [`Usage`], [`cpift_core::BadInput`], or another failure.
pub fn run(args: Args) -> Result<()> {
    let common = args.common;
    common.start()?;
    match args.command {
        Command::Extract(args) => {
            let recorder = Recorder::start(STAGE);
            let stats = args.stats_files();
            let also = stats.iter().flatten().map(PathBuf::as_path).collect();
            if common.up_to_date(&Expected { also, ..Expected::new(STAGE, &args.out) }) {
                return Ok(());
            }
            let summary = args.plan(common.force())?.run(recorder)?;
            common.print_json(&serde_json::to_value(summary)?);
        }
        Command::Tensors(TensorsArgs { out, .. }) | Command::Random(RandomArgs { out, .. })
            if common.up_to_date(&Expected::new(STAGE, &out)) => {}
        Command::Tensors(args) => {
            let recorder = Recorder::start(STAGE);
            common.print_json(&args.plan(common.force())?.run(recorder)?);
        }
        Command::Random(args) => {
            let recorder = Recorder::start(STAGE);
            common.print_json(&args.plan(common.force())?.run(recorder)?);
        }
        Command::Stats(args) => {
            let plan = args.plan(common.force())?;
            let stats = plan.run()?;
            if !common.json && plan.out.is_none() && plan.svg.is_none() {
                std::io::stdout().write_all(stats::table(&stats).as_bytes())?;
            }
            common.print_json(&serde_json::to_value(stats)?);
        }
        Command::Verify(VerifyArgs { file }) => {
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

impl ExtractArgs {
    /// JSON file and picture of --stats.
    fn stats_files(&self) -> Option<[PathBuf; 2]> {
        self.stats.as_ref().map(|json| [json.clone(), json.with_extension("svg")])
    }

    fn plan(self, force: bool) -> Result<extract::Plan> {
        let stats = self.stats_files();
        for path in stats.iter().flatten().chain([&self.out]) {
            check_output(path, force)?;
        }
        if stats.as_ref().is_some_and(|[json, svg]| json == svg || [json, svg].contains(&&self.out)) {
            return Err(usage("--stats names its own picture, or the file that --out names"));
        }
        check_fisher(self.score, self.fisher.is_some())?;
        let inputs = self.checkpoints.open(self.fisher.as_deref())?;
        check_not_input("--out", &self.out, inputs.files())?;
        stats.iter().flatten().try_for_each(|path| check_not_input("--stats", path, inputs.files()))?;
        Ok(extract::Plan {
            inputs,
            percent: self.percent,
            scope: self.scope,
            metric: self.score,
            excluded: each_once(&self.exclude),
            out: self.out,
            stats,
            force,
        })
    }
}

/// Returns an error unless --fisher is given exactly for the scores that read squared gradients.
fn check_fisher(score: Metric, given: bool) -> Result<(), Usage> {
    let name = format!("{score:?}").to_lowercase();
    match (matches!(score, Metric::Fisher | Metric::Blend), given) {
        (true, false) => Err(Usage(format!("--score {name} needs --fisher with squared gradients"))),
        (false, true) => Err(Usage(format!("--score {name} does not use --fisher"))),
        _ => Ok(()),
    }
}

impl TensorsArgs {
    fn plan(self, force: bool) -> Result<tensors::Plan> {
        check_output(&self.out, force)?;
        let inputs = self.checkpoints.open(self.fisher.as_deref())?;
        check_not_input("--out", &self.out, inputs.files())?;
        let (percent, excluded) = (self.percent, each_once(&self.exclude));
        Ok(tensors::Plan { inputs, percent, excluded, out: self.out, force })
    }
}

impl RandomArgs {
    fn plan(self, force: bool) -> Result<random::Plan> {
        check_output(&self.out, force)?;
        check_not_input("--out", &self.out, [self.like.as_path()])?;
        let Self { like, seed, per_tensor, out } = self;
        Ok(random::Plan { like: Mask::open(&like)?, seed, per_tensor, out, force })
    }
}

impl StatsArgs {
    fn plan(self, force: bool) -> Result<stats::Plan> {
        let Self { file, out, svg } = self;
        if out.is_some() && out == svg {
            return Err(usage("--out and --svg name the same file"));
        }
        out.iter().chain(&svg).try_for_each(|path| check_output(path, force))?;
        for (flag, path) in [("--out", &out), ("--svg", &svg)] {
            path.iter().try_for_each(|path| check_not_input(flag, path, [file.as_path()]))?;
        }
        Ok(stats::Plan { mask: Mask::open(&file)?, out, svg, force })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_flag_stands_under_a_heading_in_their_order() {
        const HEADINGS: [&str; 3] = ["Input and output", "Method", "Run"];
        // The flags of all stages get their heading in cpift-core.
        let common = Common::augment_args(clap::Command::new("common"));
        let shared = |id: &clap::Id| common.get_arguments().any(|arg| arg.get_id() == id);
        for command in Args::command().get_subcommands() {
            let own = command.get_arguments().filter(|arg| !shared(arg.get_id()));
            let places = own.map(|arg| {
                let place = HEADINGS.iter().position(|heading| arg.get_help_heading() == Some(*heading));
                place.unwrap_or_else(|| panic!("{} {}: no known heading", command.get_name(), arg.get_id()))
            });
            assert!(places.collect::<Vec<_>>().is_sorted(), "{}", command.get_name());
        }
    }
}
