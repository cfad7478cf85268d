//! The command line of `cpift-mask`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use cpift_core::format::mask::{Metric, Scope};
use cpift_core::format::names::TensorKind;
use cpift_core::run::cli::Common;

use crate::percent::Percent;

/// Finds the core region of a task: the exact top p % of a model's parameters by how far fine-tuning moved them.
///
/// `extract` is what the pipeline uses. `tensors` chooses whole tensors, as TRACE does, and `random` draws a control of the size
/// of another mask; all write the same form of file.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-mask", version)]
pub struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Write the mask of the elements that moved most between two checkpoints, or that --score ranks highest
    Extract(ExtractArgs),
    /// Write the mask of the most important tensors, each whole (the selection of TRACE)
    ///
    /// The importance of a tensor is ½·minmax(root mean square of its update) + ½·minmax(mean of its squared gradients), where
    /// minmax scales the figures of all tensors to 0..1; without --fisher it is the root mean square alone. Equally important
    /// tensors are chosen in bytewise name order. The mask is one like any other.
    Tensors(TensorsArgs),
    /// Write a control: as many elements as another mask has, drawn uniformly at random from the same parameters
    ///
    /// What a core region is worth shows beside a control of its size: give the control to cpift-group, cpift-merge or cpift-train
    /// in place of the mask.
    Random(RandomArgs),
    /// Show the density of a mask by layer and by role: tables, JSON, a picture
    Stats(StatsArgs),
    /// Check a mask's structure and the number of its bits
    Verify(MaskArg),
}

/// Arguments of `extract`.
#[derive(clap::Args, Debug, Clone)]
pub struct ExtractArgs {
    /// Checkpoint before fine-tuning: a Hugging Face folder or a .safetensors file
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// Checkpoint after fine-tuning on one task; same tensor names and shapes
    #[arg(long, value_name = "DIR")]
    pub tuned: PathBuf,
    /// Share of the parameters to choose, in percent: above 0, at most 100. The count is ⌊p·D/100⌋ exactly
    #[arg(long, value_name = "P", default_value = "1", allow_negative_numbers = true)]
    pub percent: Percent,
    /// The mask to write: safetensors with one U8 tensor of packed bits for each parameter
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// What the top p % is taken over
    #[arg(long, value_enum, default_value_t = Scope::Global)]
    pub scope: Scope,
    /// The quantity that is ranked
    #[arg(long, value_enum, default_value_t = Metric::Magnitude)]
    pub score: Metric,
    /// Sums of squared gradients that a probe saved, for --score fisher and blend: a .safetensors file or a folder with the names
    /// and shapes of the parameters
    #[arg(long, value_name = "FILE")]
    pub fisher: Option<PathBuf>,
    /// Kinds of tensors to leave out of D: embeddings, norms
    #[arg(long, value_name = "KIND,…", value_delimiter = ',')]
    pub exclude: Vec<TensorKind>,
    /// Also write the density of every layer and role: JSON here, a picture beside it with the extension .svg
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
}

impl ExtractArgs {
    /// JSON and picture of the density.
    pub(crate) fn stats_files(&self) -> Option<[PathBuf; 2]> {
        self.stats.as_ref().map(|json| [json.clone(), json.with_extension("svg")])
    }
}

/// Arguments of `tensors`.
#[derive(clap::Args, Debug, Clone)]
pub struct TensorsArgs {
    /// Checkpoint before fine-tuning: a Hugging Face folder or a .safetensors file
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// Checkpoint after fine-tuning on one task; same tensor names and shapes
    #[arg(long, value_name = "DIR")]
    pub tuned: PathBuf,
    /// Sums of squared gradients that a probe saved; without it the updates alone count
    #[arg(long, value_name = "FILE")]
    pub fisher: Option<PathBuf>,
    /// Share of the number of tensors to choose, in percent, rounded up: above 0, at most 100
    #[arg(long, value_name = "P", default_value = "10", allow_negative_numbers = true)]
    pub percent: Percent,
    /// The mask to write: all bits of the chosen tensors are set
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Kinds of tensors that are not chosen from: embeddings, norms
    #[arg(long, value_name = "KIND,…", value_delimiter = ',')]
    pub exclude: Vec<TensorKind>,
}

/// Arguments of `random`.
#[derive(clap::Args, Debug, Clone)]
pub struct RandomArgs {
    /// The mask to be like: of the same base, as many elements, none in the kinds of tensors it leaves out
    #[arg(long, value_name = "MASK")]
    pub like: PathBuf,
    /// Seed: the same one draws the same elements, on any machine
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Draw as many elements in each tensor as the mask has there, not only as many in all
    #[arg(long)]
    pub per_tensor: bool,
    /// The mask to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Arguments of `stats`.
#[derive(clap::Args, Debug)]
pub(crate) struct StatsArgs {
    /// A mask that `extract` wrote
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// JSON to write: the tables, and counts and density for every layer and role
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Picture to write: the density for every layer and role
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(clap::Args, Debug)]
pub(crate) struct MaskArg {
    /// A mask that `extract` wrote
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
}
