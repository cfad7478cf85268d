//! The command line of cpift-merge: what can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use cpift_core::run::cli::{Common, Named};
use cpift_core::{CheckpointWriter, Dtype};

use crate::methods::Conflict;
use crate::plan::parse_shard_size;
use crate::setting::Setting;

/// Merges checkpoints of one model: plain methods for any checkpoints, and core transplant and SLERP of CPI-FT
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
    /// Weighted mean of two or more models
    Linear(LinearArgs),
    /// Spherical interpolation of two models, tensor by tensor
    Slerp(SlerpArgs),
    /// Mean of two or more models on the sphere, tensor by tensor
    SphericalMean(SphericalMeanArgs),
    /// Weighted sum of task vectors (differences from a base), added to the base
    TaskArithmetic(TaskArithmeticArgs),
    /// Task vectors trimmed to their largest elements, summed where they agree on a sign
    Ties(TiesArgs),
    /// Task vectors thinned out by chance, and summed
    Dare(DareArgs),
    /// What a YAML file in mergekit's form asks for
    Recipe(RecipeArgs),
    /// Core regions from their tasks bit for bit, SLERP of backbone and tasks on the rest
    Cpi(CpiArgs),
    /// Check a checkpoint: structure, NaN/Inf, and the digest recorded in its cpift.json
    Verify(VerifyArgs),
    /// Print the digests of checkpoints and files, as cpift.json records them for inputs: digest and path, a line each
    Digest(DigestArgs),
}

impl Command {
    /// Where the result goes, if there is one.
    pub(crate) fn output(&self) -> Option<&OutputArgs> {
        Some(match self {
            Self::Linear(a) => &a.output,
            Self::Slerp(a) => &a.output,
            Self::SphericalMean(a) => &a.output,
            Self::TaskArithmetic(a) => &a.output,
            Self::Ties(a) => &a.output,
            Self::Dare(a) => &a.output,
            Self::Recipe(a) => &a.output,
            Self::Cpi(a) => &a.output,
            Self::Verify(_) | Self::Digest(_) => return None,
        })
    }
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

/// The models of a plain merge, and where they count.
#[derive(clap::Args, Debug)]
pub struct ModelArgs {
    /// A model's folder; the first gives config.json, tokenizer and buffers where there is no --base
    #[arg(long = "model", value_name = "DIR", required = true)]
    pub models: Vec<PathBuf>,
    /// Where a model counts: outside its mask (of cpift-mask) it is taken to be the backbone, which is the base or else the
    /// first model. NAME is the model's number in the order of --model, from 1, or its folder's name
    #[arg(long = "mask", value_name = "NAME=FILE")]
    pub masks: Vec<Named>,
    /// A mask where the output is the backbone bit for bit (after the cast to --dtype), and no input counts
    #[arg(long, value_name = "FILE")]
    pub protect: Option<PathBuf>,
}

/// Models and settings of a merge of task vectors.
#[derive(clap::Args, Debug)]
pub struct TaskVectorArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub models: ModelArgs,
    /// What the models were fine-tuned from; gives config.json, tokenizer and buffers
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// A model's factor, in the order of --model; V,V,... is a gradient over the layers, FILTER=V is for tensors whose
    /// name holds FILTER [default: all 1]
    #[arg(long = "weight", value_name = "V", allow_negative_numbers = true)]
    pub weights: Vec<Setting>,
    /// Factor of the sum of the task vectors; several as for slerp's --t [default: 1]
    #[arg(long = "lambda", value_name = "V", allow_negative_numbers = true)]
    pub lambda: Vec<Setting>,
}

/// How much of each task vector stays.
#[derive(clap::Args, Debug)]
pub struct DensityArgs {
    /// The share of a model's task vector that stays, 0 to 1: one for all models, or one each
    #[arg(long = "density", value_name = "V", required = true, allow_negative_numbers = true)]
    pub densities: Vec<Setting>,
    /// Stretch what stays to the sum of magnitudes there was before [default: true for dare, false for ties]
    #[arg(long, value_name = "BOOL")]
    pub rescale: Option<bool>,
}

/// What the angles of a spherical method are taken between.
#[derive(clap::Args, Debug)]
pub struct SphereArgs {
    /// Interpolate the weights, or their differences from --base
    #[arg(long, value_enum, default_value = "weights")]
    pub space: Space,
    /// What differences are taken from, with --space delta; gives config.json, tokenizer and buffers then
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
}

/// Arguments of `slerp`.
#[derive(clap::Args, Debug)]
pub struct SlerpArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub models: ModelArgs,
    /// Where between the first (0) and the second (1) model. V,V,... is a gradient from the first layer to the last;
    /// FILTER=V is for tensors whose name holds FILTER. Repeated, the first that fits a tensor counts, those without a
    /// filter after all others [default: 0.5]
    #[arg(long = "t", value_name = "V", allow_negative_numbers = true)]
    pub t: Vec<Setting>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub sphere: SphereArgs,
    /// Angle in radians below which, or within which of π, interpolation is linear [default: 0.0316, whose cosine is
    /// 0.9995]
    #[arg(long, value_name = "RAD", allow_negative_numbers = true)]
    pub epsilon: Option<f64>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `spherical-mean`.
#[derive(clap::Args, Debug)]
pub struct SphericalMeanArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub models: ModelArgs,
    /// A model's weight, in the order of --model, not negative; divided by their sum [default: all equal]
    #[arg(long = "weight", value_name = "V", allow_negative_numbers = true)]
    pub weights: Vec<Setting>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub sphere: SphereArgs,
    /// Angle in radians below which all models, or within which of π any two, make the mean linear [default: 0]
    #[arg(long, value_name = "RAD", allow_negative_numbers = true)]
    pub epsilon: Option<f64>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `linear`.
#[derive(clap::Args, Debug)]
pub struct LinearArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub models: ModelArgs,
    /// A model's weight, in the order of --model; V,V,... is a gradient over the layers, FILTER=V is for tensors whose
    /// name holds FILTER [default: all equal]
    #[arg(long = "weight", value_name = "V", allow_negative_numbers = true)]
    pub weights: Vec<Setting>,
    /// Divide the weights by their sum
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub normalize: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `task-arithmetic`.
#[derive(clap::Args, Debug)]
pub struct TaskArithmeticArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub vectors: TaskVectorArgs,
    /// Divide the weights by their sum
    #[arg(long, value_name = "BOOL", default_value_t = false, action = clap::ArgAction::Set)]
    pub normalize: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `ties`.
#[derive(clap::Args, Debug)]
pub struct TiesArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub vectors: TaskVectorArgs,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub density: DensityArgs,
    /// Divide each element by the weights that took part in it
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub normalize: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `dare`.
#[derive(clap::Args, Debug)]
pub struct DareArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub vectors: TaskVectorArgs,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub density: DensityArgs,
    /// Sum only what agrees with the elected sign, as TIES does
    #[arg(long)]
    pub elect_sign: bool,
    /// Divide each element by the weights that took part in it
    #[arg(long, value_name = "BOOL", default_value_t = false, action = clap::ArgAction::Set)]
    pub normalize: bool,
    /// Seed of what stays
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would print it as help")]
    pub output: OutputArgs,
}

/// Arguments of `recipe`.
#[derive(clap::Args, Debug)]
pub struct RecipeArgs {
    /// The recipe; paths in it are relative to where the program runs
    #[arg(value_name = "FILE.yaml")]
    pub recipe: PathBuf,
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

/// Arguments of `digest`.
#[derive(clap::Args, Debug)]
pub struct DigestArgs {
    /// Hugging Face folders (digest of tensors, config and tokenizer) or files (digest of the bytes)
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
}

/// Where the result goes and in which form.
#[derive(clap::Args, Debug, Clone)]
pub struct OutputArgs {
    /// The folder to make; refused where it exists, unless --force
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Element type of the result: f32, bf16, f16 or f64 [default: that of all inputs, for cpi of all tasks; an error if
    /// they differ]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<Dtype>,
    /// Largest shard: bytes, or a number with KB, MB, GB, KiB, MiB or GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_shard_size, default_value = "5GB")]
    pub shard_size: u64,
    /// The folder whose tokenizer, chat template and generation config the output gets [default: --base where there is one,
    /// else the first model]
    #[arg(long, value_name = "DIR")]
    pub copy_from: Option<PathBuf>,
    /// Print what would be read, done and written, tensor by tensor, and write nothing
    #[arg(long)]
    pub dry_run: bool,
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
