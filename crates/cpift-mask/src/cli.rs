//! The command line of `cpift-mask`: its flags, their checks, and the dispatch to the subcommands.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args as ClapArgs, Parser, Subcommand};
use cpift_core::error::usage;
use cpift_core::files::{check_not_input, check_output, check_output_dir};
use cpift_core::format::checkpoint::check_same_parameters;
use cpift_core::format::mask::{Metric, Scope};
use cpift_core::format::names::TensorKind;
use cpift_core::format::safetensors::MappedFile;
use cpift_core::record::provenance::{Provenance, Recorder};
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::{Checkpoint, Mask, Usage};

use crate::apply::{Keep, Target, Values};
use crate::convert::{Form, Input};
use crate::extract::Special;
use crate::inputs::{Inputs, each_once};
use crate::rules::{Percent, Structure};
use crate::sets::Operation;
use crate::{apply, convert, extract, random, sets, stats, tensors};

const STAGE: &str = env!("CARGO_PKG_NAME");

/// Finds the core region of a task: the exact top p % of a model's parameters by the size of their
/// update in fine-tuning.
///
/// Choose elements: `extract` (the pipeline uses it), `tall`, `tensors`, `random`.
/// Combine masks: `union`, `intersect`, `subtract`, `complement`, `consensus`.
/// Look at masks: `stats`, `overlap`, `verify`.
/// Use masks elsewhere: `apply`, `restore`, `convert`.
///
/// A mask is a safetensors file with one U8 tensor of packed bits per parameter.
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
    /// Write the mask of the elements that the sum of several fine-tunes owes to one of them (a
    /// TALL mask)
    ///
    /// With the updates τ of all models and their sum Σ, element j is chosen if τ_j is not 0 and
    /// |τ_j| ≥ λ·|Σ_j − τ_j|. `consensus` combines the masks of several models.
    Tall(TallArgs),
    /// Write the elements that are in any of the masks
    Union(SetArgs),
    /// Write the elements that are in all masks
    Intersect(SetArgs),
    /// Write the elements that are in the first mask and in none of the others
    Subtract(SetArgs),
    /// Write the elements of D that are not in a mask
    Complement(ComplementArgs),
    /// Write the elements that are in at least --min masks
    Consensus(ConsensusArgs),
    /// Show how much every pair of masks shares
    Overlap(OverlapArgs),
    /// Keep the change of a fine-tune inside a mask, as a checkpoint or a sparse task vector
    Apply(ApplyArgs),
    /// Write the checkpoint of a base and a sparse task vector
    Restore(RestoreArgs),
    /// Convert a mask to boolean arrays (NumPy files, safetensors), or such arrays to a mask
    Convert(ConvertArgs),
    /// Show the density of a mask by layer and by role, as tables, JSON or a picture
    Stats(StatsArgs),
    /// Check the structure of a mask, the number of its bits and its recorded digest
    Verify(VerifyArgs),
}

/// The two checkpoints whose difference is ranked.
#[derive(ClapArgs, Debug)]
struct CheckpointArgs {
    /// Checkpoint before fine-tuning: a Hugging Face directory, a .safetensors file, or
    /// org/name[@revision] on the Hub
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    base: PathBuf,
    /// Checkpoint after fine-tuning on one task, with the same tensor names and shapes
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
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
    /// Choose the elements whose score is above this number, instead of a share
    #[arg(
        long,
        value_name = "NUMBER",
        allow_negative_numbers = true,
        conflicts_with = "percent",
        help_heading = "Method"
    )]
    above: Option<f64>,
    /// Choose whole rows or columns by their mean score, as many as fit in --percent (row, column),
    /// or the best N of every M consecutive elements of the last dimension (N:M, such as 2:4)
    #[arg(long, value_name = "UNIT", conflicts_with = "above", help_heading = "Method")]
    structure: Option<Structure>,
    /// Kinds of tensors to exclude from D: embeddings, norms; none by default
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', help_heading = "Method")]
    exclude: Vec<TensorKind>,
}

#[derive(ClapArgs, Debug)]
struct TallArgs {
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    /// Another fine-tune of the base; repeat it for each
    #[arg(long = "model", value_name = "MODEL", required = true, help_heading = "Input and output")]
    models: Vec<PathBuf>,
    /// Mask to write
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    out: PathBuf,
    /// Factor λ: a larger one chooses fewer elements
    #[arg(long, value_name = "L", default_value_t = 0.4, help_heading = "Method")]
    lambda: f64,
    /// Kinds of tensors to exclude from D: embeddings, norms; none by default
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', help_heading = "Method")]
    exclude: Vec<TensorKind>,
}

#[derive(ClapArgs, Debug)]
struct SetArgs {
    /// Masks of one base, extracted with the same --exclude. The result records the tuned
    /// checkpoint of the first
    #[arg(value_name = "MASK", num_args = 2.., required = true, help_heading = "Input and output")]
    masks: Vec<PathBuf>,
    /// Mask to write
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    out: PathBuf,
}

#[derive(ClapArgs, Debug)]
struct ComplementArgs {
    /// Mask to read
    #[arg(value_name = "MASK", help_heading = "Input and output")]
    mask: PathBuf,
    /// Mask to write
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    out: PathBuf,
}

#[derive(ClapArgs, Debug)]
struct ConsensusArgs {
    #[command(flatten)]
    set: SetArgs,
    /// Number of masks that must have an element: 1 to the number of masks
    #[arg(long, value_name = "K", default_value_t = 2, help_heading = "Method")]
    min: usize,
}

#[derive(ClapArgs, Debug)]
struct OverlapArgs {
    /// Masks of one base, extracted with the same --exclude
    #[arg(value_name = "MASK", num_args = 2.., required = true, help_heading = "Input and output")]
    masks: Vec<PathBuf>,
}

#[derive(ClapArgs, Debug)]
struct ApplyArgs {
    /// Mask to apply, made for the base
    #[arg(value_name = "MASK", help_heading = "Input and output")]
    mask: PathBuf,
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    /// Checkpoint directory to write; with --sparse a safetensors file
    #[arg(long, value_name = "PATH", help_heading = "Input and output")]
    out: PathBuf,
    /// Elements whose change is kept; all others get the value of the base
    #[arg(long, value_enum, default_value_t = Keep::Inside, help_heading = "Method")]
    keep: Keep,
    /// Write a sparse task vector: NAME.indices (flat, I32 or I64) and NAME.values per parameter
    #[arg(long, help_heading = "Method")]
    sparse: bool,
    /// Values of the sparse task vector
    #[arg(long, value_enum, default_value_t = Values::Delta, requires = "sparse", help_heading = "Method")]
    values: Values,
}

#[derive(ClapArgs, Debug)]
struct RestoreArgs {
    /// Sparse task vector that `apply --sparse` wrote
    #[arg(value_name = "FILE", help_heading = "Input and output")]
    vector: PathBuf,
    /// Base that it was made for
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    base: PathBuf,
    /// Checkpoint directory to write
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    out: PathBuf,
}

#[derive(ClapArgs, Debug)]
struct ConvertArgs {
    /// Mask, safetensors file of BOOL or U8 tensors (0 or 1), or directory of NumPy files NAME.npy
    #[arg(value_name = "INPUT", help_heading = "Input and output")]
    input: PathBuf,
    /// Checkpoint with the shapes of the parameters; required for --to mask. Without it the arrays
    /// of a mask are flat
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    base: Option<PathBuf>,
    /// Checkpoint that the bits belong to, to record in a mask; none by default
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    tuned: Option<PathBuf>,
    /// File to write; a directory for --to npy
    #[arg(long, value_name = "PATH", help_heading = "Input and output")]
    out: PathBuf,
    /// Form of the output
    #[arg(long = "to", value_enum, help_heading = "Method")]
    form: Form,
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
    /// List every tensor too, in the table and in JSON
    #[arg(long, help_heading = "Method")]
    tensors: bool,
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
        command if command.out().is_some_and(|out| common.up_to_date(&Expected::new(STAGE, out))) => {}
        Command::Tensors(args) => {
            let recorder = Recorder::start(STAGE);
            common.print_json(&args.plan(common.force())?.run(recorder)?);
        }
        Command::Random(args) => {
            let recorder = Recorder::start(STAGE);
            common.print_json(&args.plan(common.force())?.run(recorder)?);
        }
        Command::Tall(args) => {
            let recorder = Recorder::start(STAGE);
            let summary = args.plan(common.force())?.run(recorder)?;
            common.print_json(&serde_json::to_value(summary)?);
        }
        Command::Union(args) => args.run(Operation::Union, &common)?,
        Command::Intersect(args) => args.run(Operation::Intersect, &common)?,
        Command::Subtract(args) => args.run(Operation::Subtract, &common)?,
        Command::Complement(ComplementArgs { mask, out }) => {
            SetArgs { masks: vec![mask], out }.run(Operation::Complement, &common)?;
        }
        Command::Consensus(ConsensusArgs { set, min }) => {
            if !(1..=set.masks.len()).contains(&min) {
                let n = set.masks.len();
                return Err(usage(format!("--min must be from 1 to the number of masks ({n}), found {min}")));
            }
            set.run(Operation::Consensus(min), &common)?;
        }
        Command::Overlap(OverlapArgs { masks }) => {
            let overlap = sets::overlap(&open_masks(&masks)?)?;
            if !common.json {
                std::io::stdout().write_all(sets::table(&overlap).as_bytes())?;
            }
            common.print_json(&serde_json::to_value(overlap)?);
        }
        Command::Apply(args) => {
            let recorder = Recorder::start(STAGE);
            common.print_json(&args.plan(common.force())?.run(recorder)?);
        }
        Command::Restore(args) => {
            let recorder = Recorder::start(STAGE);
            common.print_json(&args.plan(common.force())?.run(recorder)?);
        }
        Command::Convert(args) => {
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

impl Command {
    /// The output, for the subcommands that write one file or directory and are not `extract`.
    fn out(&self) -> Option<&Path> {
        Some(match self {
            Self::Tensors(args) => &args.out,
            Self::Random(args) => &args.out,
            Self::Tall(args) => &args.out,
            Self::Union(args) | Self::Intersect(args) | Self::Subtract(args) => &args.out,
            Self::Complement(args) => &args.out,
            Self::Consensus(args) => &args.set.out,
            Self::Apply(args) => &args.out,
            Self::Restore(args) => &args.out,
            Self::Convert(args) => &args.out,
            Self::Extract(_) | Self::Overlap(_) | Self::Stats(_) | Self::Verify(_) => return None,
        })
    }
}

fn open_masks(paths: &[PathBuf]) -> Result<Vec<Mask>> {
    paths.iter().map(|path| Mask::open(path)).collect()
}

impl SetArgs {
    fn run(self, operation: Operation, common: &Common) -> Result<()> {
        let recorder = Recorder::start(STAGE);
        check_output(&self.out, common.force())?;
        check_not_input("--out", &self.out, self.masks.iter().map(PathBuf::as_path))?;
        let Self { masks, out } = self;
        let plan = sets::Plan { operation, masks: open_masks(&masks)?, out, force: common.force() };
        common.print_json(&plan.run(recorder)?);
        Ok(())
    }
}

impl TallArgs {
    fn plan(self, force: bool) -> Result<extract::Plan> {
        check_output(&self.out, force)?;
        if !(self.lambda > 0.0 && self.lambda.is_finite()) {
            return Err(usage(format!("--lambda must be a number above 0, found {}", self.lambda)));
        }
        let inputs = self.checkpoints.open(None)?;
        let others = self.models.iter().map(|path| Checkpoint::open(path)).collect::<Result<Vec<_>>>()?;
        others.iter().try_for_each(|other| check_same_parameters(&inputs.base, other))?;
        check_not_input("--out", &self.out, inputs.files().chain(others.iter().flat_map(Checkpoint::files)))?;
        Ok(extract::Plan {
            inputs,
            percent: "100".parse().expect("a percentage"),
            scope: Scope::Global,
            metric: Metric::Magnitude,
            special: Some(Special::Tall(others, self.lambda)),
            excluded: each_once(&self.exclude),
            out: self.out,
            stats: None,
            force,
        })
    }
}

impl ApplyArgs {
    fn plan(self, force: bool) -> Result<apply::Plan> {
        let inputs = self.checkpoints.open(None)?;
        match self.sparse || inputs.base.layout().is_file {
            true => check_output(&self.out, force)?,
            false => check_output_dir(&self.out, force)?,
        }
        check_not_input("--out", &self.out, inputs.files().chain([self.mask.as_path()]))?;
        Ok(apply::Plan {
            inputs,
            mask: Mask::open(&self.mask)?,
            keep: self.keep,
            target: if self.sparse { Target::Sparse(self.values) } else { Target::Checkpoint },
            out: self.out,
            force,
        })
    }
}

impl RestoreArgs {
    fn plan(self, force: bool) -> Result<apply::Restore> {
        let base = Checkpoint::open(&self.base)?;
        match base.layout().is_file {
            true => check_output(&self.out, force)?,
            false => check_output_dir(&self.out, force)?,
        }
        check_not_input("--out", &self.out, base.files().chain([self.vector.as_path()]))?;
        Ok(apply::Restore { base, vector: MappedFile::open(&self.vector)?, out: self.out, force })
    }
}

impl ConvertArgs {
    fn plan(self, force: bool) -> Result<convert::Plan> {
        match self.form {
            Form::Npy => check_output_dir(&self.out, force)?,
            _ => check_output(&self.out, force)?,
        }
        if self.form == Form::Mask && self.base.is_none() {
            return Err(usage("--to mask needs --base, the checkpoint that the bits are for"));
        }
        if self.form != Form::Mask && self.tuned.is_some() {
            return Err(usage("--tuned is recorded in masks: it goes with --to mask"));
        }
        let input = Input::open(&self.input)?;
        if matches!((&input, self.form), (Input::Mask(_), Form::Mask)) {
            return Err(usage(format!("{} is a mask already", self.input.display())));
        }
        check_not_input("--out", &self.out, [self.input.as_path()])?;
        let open = |path: &Option<PathBuf>| path.as_ref().map(|path| Checkpoint::open(path)).transpose();
        let (base, tuned) = (open(&self.base)?, open(&self.tuned)?);
        for checkpoint in base.iter().chain(&tuned) {
            check_not_input("--out", &self.out, checkpoint.files())?;
        }
        Ok(convert::Plan { input, form: self.form, base, tuned, out: self.out, force })
    }
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
        if self.above.is_some_and(|limit| !(limit >= 0.0 && limit.is_finite())) {
            return Err(usage("--above must be a finite number, 0 or above"));
        }
        let special = self.above.map(Special::Above).or(self.structure.map(Special::Structure));
        let inputs = self.checkpoints.open(self.fisher.as_deref())?;
        check_not_input("--out", &self.out, inputs.files())?;
        stats.iter().flatten().try_for_each(|path| check_not_input("--stats", path, inputs.files()))?;
        Ok(extract::Plan {
            inputs,
            percent: self.percent,
            scope: self.scope,
            metric: self.score,
            special,
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
        let Self { file, out, svg, tensors } = self;
        if out.is_some() && out == svg {
            return Err(usage("--out and --svg name the same file"));
        }
        out.iter().chain(&svg).try_for_each(|path| check_output(path, force))?;
        for (flag, path) in [("--out", &out), ("--svg", &svg)] {
            path.iter().try_for_each(|path| check_not_input(flag, path, [file.as_path()]))?;
        }
        Ok(stats::Plan { mask: Mask::open(&file)?, out, svg, tensors, force })
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
