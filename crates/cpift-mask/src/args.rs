//! The command line of `cpift-mask`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use cpift_core::checkpoint::TensorKind;
use cpift_core::cli::Common;
use cpift_core::mask::{Metric, Scope};

use crate::percent::Percent;

/// Finds the core region of a task: the exact top p % of a model's parameters by how far fine-tuning moved them.
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
    /// Write the mask of the elements that moved most between two checkpoints
    Extract(ExtractArgs),
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
