//! The command line of cpift-merge: what can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use cpift_core::cli::{Common, Named};
use cpift_core::{CheckpointWriter, Dtype};

use crate::region::Conflict;
use crate::shard_size::parse_shard_size;

/// Merges checkpoints of one model: core transplant and SLERP of CPI-FT, and plain slerp and linear merges
///
/// Checkpoints are Hugging Face folders: config.json and model.safetensors or shards with an index, in F64, F32, F16 or
/// BF16. Everything is checked before any output starts; the output folder appears whole or not at all.
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-merge", version)]
pub struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Core regions from their tasks bit for bit, SLERP of backbone and tasks on the rest
    Cpi(CpiArgs),
    /// Spherical interpolation of two models, tensor by tensor
    Slerp(SlerpArgs),
    /// Weighted mean of two or more models
    Linear(LinearArgs),
    /// Check a checkpoint: structure, NaN/Inf, and the digest recorded in its cpift.json
    Verify(VerifyArgs),
}

/// Arguments of `cpi`.
#[derive(clap::Args, Debug)]
pub struct CpiArgs {
    /// The checkpoint the tasks were fine-tuned from and the masks were made for; gives the tokenizer
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// groups.json of cpift-group; gives the order of the tasks
    #[arg(long, value_name = "FILE")]
    pub groups: PathBuf,
    /// A task's checkpoint; once for each task of the groups
    #[arg(long = "task", value_name = "NAME=DIR", required = true)]
    pub tasks: Vec<Named>,
    /// A task's core region (safetensors of cpift-mask); once for each task of the groups
    #[arg(long = "mask", value_name = "NAME=FILE", required = true)]
    pub masks: Vec<Named>,
    /// What the tasks are folded into; gives config.json and buffers [default: --base]
    #[arg(long, value_name = "DIR")]
    pub backbone: Option<PathBuf>,
    /// What an element that is core to several tasks becomes
    #[arg(long, value_enum, default_value = "max-delta")]
    pub conflict: Conflict,
    /// How much the backbone and each task count outside the core regions
    #[arg(long, value_enum, default_value = "equal", conflicts_with = "omega")]
    pub weights: WeightsArg,
    /// A fixed weight, 0 to 1, for each task as it is folded in, instead of --weights
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub omega: Option<f64>,
    /// Interpolate the weights (the paper) or their differences from --base
    #[arg(long, value_enum, default_value = "weights")]
    pub space: Space,
    /// Angle in radians below which, or within which of π, interpolation is linear [default: 0.0316, whose cosine is
    /// 0.9995]
    #[arg(long, value_name = "RAD", allow_negative_numbers = true)]
    pub epsilon: Option<f64>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `slerp`.
#[derive(clap::Args, Debug)]
pub struct SlerpArgs {
    /// A model; given exactly twice, the first gives config.json, tokenizer and buffers
    #[arg(long = "model", value_name = "DIR", required = true)]
    pub models: Vec<PathBuf>,
    /// Where between the first (0) and the second (1) model
    #[arg(long, value_name = "F", default_value_t = 0.5, allow_negative_numbers = true)]
    pub t: f64,
    /// Angle in radians below which, or within which of π, interpolation is linear [default: 0.0316, whose cosine is
    /// 0.9995]
    #[arg(long, value_name = "RAD", allow_negative_numbers = true)]
    pub epsilon: Option<f64>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `linear`.
#[derive(clap::Args, Debug)]
pub struct LinearArgs {
    /// A model; two or more, the first gives config.json, tokenizer and buffers
    #[arg(long = "model", value_name = "DIR", required = true)]
    pub models: Vec<PathBuf>,
    /// A model's weight, in the order of --model; divided by their sum [default: all equal]
    #[arg(long = "weight", value_name = "F", allow_negative_numbers = true)]
    pub weights: Vec<f64>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `verify`.
#[derive(clap::Args, Debug)]
pub struct VerifyArgs {
    /// A Hugging Face folder or a .safetensors file
    #[arg(value_name = "DIR")]
    pub checkpoint: PathBuf,
}

/// Where the result goes and in which form.
#[derive(clap::Args, Debug)]
pub struct OutputArgs {
    /// The folder to make; refused where it exists, unless --force
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Element type of the result: f32, bf16, f16 or f64 [default: that of all tasks or models; an error if they differ]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Dtype>,
    /// Largest shard: bytes, or a number with KB, MB, GB, KiB, MiB or GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_shard_size, default_value = "5GB")]
    pub shard_size: u64,
}

/// How much the backbone and each task count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightsArg {
    /// Task i is folded in with weight 1/(i+1), so that backbone and tasks all weigh the same
    Equal,
    /// The mean of backbone and tasks on the sphere, independent of their order
    SphericalMean,
}

/// What is interpolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Space {
    /// The weights themselves (the paper)
    Weights,
    /// The differences from --base, whose angles mean something between fine-tunes of one base
    Delta,
}

impl Space {
    /// The name as typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Delta => "delta",
        }
    }
}

const _: () = assert!(CheckpointWriter::SHARD_SIZE == 5_000_000_000, "the help says 5GB");
