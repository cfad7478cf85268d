//! The command line: every flag with its help, and the request that the flags amount to.

mod methods;
mod shared;

use std::path::PathBuf;

use anyhow::Result;
use clap::builder::PossibleValue;
use clap::{Parser, Subcommand, ValueEnum};
use cpift_core::Dtype;
use cpift_core::error::usage;
use cpift_core::run::cli::{Common, Named};

use crate::lora::{Combination, Extraction};
use crate::method::Method;
use crate::methods::Conflict;
use crate::request::{CpiRequest, Integers, Missing, Request, Space, TaskWeights};
use crate::setting::Setting;
use methods::{
    ArceeFusionArgs, BreadcrumbsArgs, DellaArgs, IsoCArgs, ModelStockArgs, MultiSlerpArgs, NearSwapArgs, NuSlerpArgs,
    PassthroughArgs, RamArgs, SceArgs, TsvMArgs, WudiArgs,
};
pub(crate) use shared::OutputArgs;
use shared::{DensityArgs, ElectArgs, LayoutArgs, ModelArgs, SphereArgs, SweepArgs, TaskVectorArgs, one};

/// Merge checkpoints of one model, by standard methods or by the core transplant and SLERP of
/// CPI-FT
///
/// Checkpoints are directories of transformers, diffusers or sentence-transformers, or single
/// safetensors files, in F64, F32, F16, BF16 or F8. org/name[@revision] is a model of the Hugging
/// Face Hub, from its local cache or downloaded. MODEL+ADAPTER is a model with a LoRA adapter
/// merged into it while it is read. The output has the layout of the base. All inputs are checked
/// before any output starts; the output appears complete or not at all.
///
/// Exit codes: 0 done; 1 failed; 2 usage; 3 bad input.
#[derive(Parser, Debug)]
#[command(name = "cpift-merge", version, after_help = METHODS)]
pub struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Methods by kind, below the list of commands.
const METHODS: &str = "Methods:
  of weights               linear, slerp, spherical-mean, nuslerp, multislerp, passthrough
  of two fine-tunes        nearswap, arcee-fusion
  of task vectors          task-arithmetic, model-stock, sce, ram, nuslerp, multislerp
  of thinned task vectors  ties, dare, della, breadcrumbs
  by singular vectors      tsv-m, iso-c, wudi
  of CPI-FT                cpi
  recipe runs all but cpi, and rearranges layers (slices)";

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Weighted mean of two or more models
    Linear(LinearArgs),
    /// Spherical interpolation of two models, tensor by tensor
    Slerp(SlerpArgs),
    /// Spherical (Karcher) mean of two or more models, tensor by tensor
    SphericalMean(SphericalMeanArgs),
    /// Spherical interpolation of two models or task vectors, of tensors, rows or columns
    #[command(name = "nuslerp")]
    NuSlerp(NuSlerpArgs),
    /// Mean on the sphere of two or more models or task vectors
    #[command(name = "multislerp")]
    MultiSlerp(MultiSlerpArgs),
    /// Copy of one model, with another dtype or scaled weights
    Passthrough(PassthroughArgs),
    /// The base moved towards a second model where both are near
    #[command(name = "nearswap")]
    NearSwap(NearSwapArgs),
    /// The base with the elements of a second model whose change matters most
    ArceeFusion(ArceeFusionArgs),
    /// Weighted sum of task vectors (differences from a base), added to the base
    TaskArithmetic(TaskArithmeticArgs),
    /// Mean of the models, drawn towards the base by the angles between their task vectors
    ModelStock(ModelStockArgs),
    /// SCE: the elements that differ most between the models, weighted by energy
    Sce(SceArgs),
    /// RAM: mean of the task vectors that change an element
    Ram(RamArgs),
    /// TIES: task vectors trimmed to their largest elements, and summed where they agree with the
    /// elected sign
    Ties(TiesArgs),
    /// DARE: task vectors with elements dropped at random, and summed
    Dare(DareArgs),
    /// DELLA: task vectors with elements dropped at random, small ones more often, and summed
    Della(DellaArgs),
    /// Model Breadcrumbs: task vectors without their smallest and largest elements, summed
    Breadcrumbs(BreadcrumbsArgs),
    /// TSV-M: singular vectors of the task vectors, made orthogonal to one another
    TsvM(TsvMArgs),
    /// Iso-C: the sum of the task vectors with equal singular values
    IsoC(IsoCArgs),
    /// WUDI: what interferes least with each of the task vectors
    Wudi(WudiArgs),
    /// Merge by a recipe in mergekit's YAML
    Recipe(RecipeArgs),
    /// Transplant each task's core region bit for bit, and interpolate backbone and tasks elsewhere
    /// by SLERP
    Cpi(CpiArgs),
    /// Turn the difference of a model and its base into a LoRA adapter, a PEFT directory
    ExtractLora(ExtractLoraArgs),
    /// Combine LoRA adapters of one model into one: a weighted sum, exact or compressed to a rank
    MergeAdapters(MergeAdaptersArgs),
    /// Check a checkpoint: structure, NaN and Inf, and the digest recorded in its cpift.json
    Verify(VerifyArgs),
    /// Print the digests that cpift.json records for inputs: one line per path, digest and path
    Digest(DigestArgs),
}

impl Command {
    /// The merge of models that the flags ask for; `None` for other commands.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] that names the flag.
    pub(crate) fn request(&self) -> Result<Option<Request>> {
        Ok(Some(match self {
            Self::Linear(a) => a.request()?,
            Self::Slerp(a) => a.request()?,
            Self::SphericalMean(a) => a.request()?,
            Self::NuSlerp(a) => a.request()?,
            Self::MultiSlerp(a) => a.request()?,
            Self::Passthrough(a) => a.request()?,
            Self::NearSwap(a) => a.request()?,
            Self::ArceeFusion(a) => a.request()?,
            Self::TaskArithmetic(a) => a.request()?,
            Self::ModelStock(a) => a.request()?,
            Self::Sce(a) => a.request()?,
            Self::Ram(a) => a.request()?,
            Self::Ties(a) => a.request()?,
            Self::Dare(a) => a.request()?,
            Self::Della(a) => a.request()?,
            Self::Breadcrumbs(a) => a.request()?,
            Self::TsvM(a) => a.request()?,
            Self::IsoC(a) => a.request()?,
            Self::Wudi(a) => a.request()?,
            Self::Recipe(_)
            | Self::Cpi(_)
            | Self::ExtractLora(_)
            | Self::MergeAdapters(_)
            | Self::Verify(_)
            | Self::Digest(_) => return Ok(None),
        }))
    }

    /// The merges of a `--sweep`, each with its value; `request` is the merge without it. `None` if
    /// it was not given.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for values that cannot be swept.
    pub(crate) fn sweep(&self, request: &Request) -> Result<Option<Vec<(f64, Request)>>> {
        let values = match self {
            Self::Slerp(a) => &a.sweep.sweep,
            Self::Linear(a) => &a.sweep.sweep,
            Self::TaskArithmetic(a) => &a.sweep.sweep,
            _ => return Ok(None),
        };
        if values.is_empty() {
            return Ok(None);
        }
        let mut merges: Vec<(f64, Request)> = Vec::new();
        for &value in values {
            let mut request = request.clone();
            match &mut request.models[..] {
                [first, second] if request.method == Method::Linear => {
                    first.weight = Setting::constant(1.0 - value);
                    second.weight = Setting::constant(value);
                }
                _ if request.method == Method::Linear => {
                    return Err(usage("--sweep of linear takes exactly two --model"));
                }
                _ if request.method == Method::Slerp => request.t = Setting::constant(value),
                _ => request.lambda = Setting::constant(value),
            }
            if merges.iter().any(|(other, _)| *other == value) {
                return Err(usage(format!("--sweep has the value {value} twice")));
            }
            merges.push((value, request));
        }
        Ok(Some(merges))
    }

    /// Destination of the result, for the commands that have one.
    pub(crate) fn output(&self) -> Option<&OutputArgs> {
        Some(match self {
            Self::NuSlerp(a) => &a.output,
            Self::MultiSlerp(a) => &a.output,
            Self::Passthrough(a) => &a.output,
            Self::NearSwap(a) => &a.output,
            Self::ArceeFusion(a) => &a.output,
            Self::ModelStock(a) => &a.output,
            Self::Sce(a) => &a.output,
            Self::Ram(a) => &a.output,
            Self::Della(a) => &a.output,
            Self::Breadcrumbs(a) => &a.output,
            Self::TsvM(a) => &a.output,
            Self::IsoC(a) => &a.output,
            Self::Wudi(a) => &a.output,
            Self::Linear(a) => &a.output,
            Self::Slerp(a) => &a.output,
            Self::SphericalMean(a) => &a.output,
            Self::TaskArithmetic(a) => &a.output,
            Self::Ties(a) => &a.output,
            Self::Dare(a) => &a.output,
            Self::Recipe(a) => &a.output,
            Self::Cpi(a) => &a.output,
            Self::ExtractLora(_) | Self::MergeAdapters(_) | Self::Verify(_) | Self::Digest(_) => return None,
        })
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct LinearArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Weight of a model, once per --model in the same order; V,V,... is a gradient over the
    /// layers, FILTER=V applies to tensors whose name contains FILTER [default: all equal]
    #[arg(long = "weight", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    weights: Vec<Setting>,
    /// Divide the weights by their sum
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, help_heading = "Method")]
    normalize: bool,
    #[command(flatten)]
    sweep: SweepArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl LinearArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.models.request(Method::Linear, &self.weights)?;
        request.normalize = self.normalize;
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct SlerpArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Position between the first (0) and the second (1) model. V,V,... is a gradient from the
    /// first layer to the last; FILTER=V applies to tensors whose name contains FILTER. Repeated,
    /// the first that fits a tensor counts; those without a filter come after all others [default:
    /// 0.5]
    #[arg(long = "t", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    t: Vec<Setting>,
    #[command(flatten)]
    sphere: SphereArgs,
    /// Angle in radians below which, or within which of π, interpolation is linear [default:
    /// 0.0316, whose cosine is 0.9995]
    #[arg(long, value_name = "RAD", allow_negative_numbers = true, help_heading = "Method")]
    epsilon: Option<f64>,
    #[command(flatten)]
    sweep: SweepArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl SlerpArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.models.request(Method::Slerp, &[])?;
        request.t = one(&self.t).unwrap_or(request.t);
        request.epsilon = self.epsilon.unwrap_or(request.epsilon);
        self.sphere.put_into(&mut request);
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct SphericalMeanArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Weight of a model, once per --model in the same order, not negative; divided by their sum
    /// [default: all equal]
    #[arg(long = "weight", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    weights: Vec<Setting>,
    #[command(flatten)]
    sphere: SphereArgs,
    /// The mean is linear if all angles are below this angle in radians, or if any is within it of
    /// π [default: 0]
    #[arg(long, value_name = "RAD", allow_negative_numbers = true, help_heading = "Method")]
    epsilon: Option<f64>,
    /// Largest number of iterations
    #[arg(long, value_name = "N", default_value = "1000", help_heading = "Method")]
    max_iter: Setting,
    /// Length of a step at which the mean has converged
    #[arg(long, value_name = "V", default_value = "1e-12", help_heading = "Method")]
    tol: Setting,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl SphericalMeanArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.models.request(Method::SphericalMean, &self.weights)?;
        request.values.set("max_iter", self.max_iter.clone());
        request.values.set("tol", self.tol.clone());
        request.epsilon = self.epsilon.unwrap_or(request.epsilon);
        self.sphere.put_into(&mut request);
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct TaskArithmeticArgs {
    #[command(flatten)]
    vectors: TaskVectorArgs,
    /// Divide the weights by their sum
    #[arg(long, value_name = "BOOL", default_value_t = false, action = clap::ArgAction::Set, help_heading = "Method")]
    normalize: bool,
    #[command(flatten)]
    sweep: SweepArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl TaskArithmeticArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.vectors.request(Method::TaskArithmetic)?;
        request.normalize = self.normalize;
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct TiesArgs {
    #[command(flatten)]
    vectors: TaskVectorArgs,
    #[command(flatten)]
    density: DensityArgs,
    /// Divide each element by the sum of the weights that took part in it
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, help_heading = "Method")]
    normalize: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

impl TiesArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.vectors.request(Method::Ties)?;
        self.density.put_into(&mut request)?;
        request.normalize = self.normalize;
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct DareArgs {
    #[command(flatten)]
    vectors: TaskVectorArgs,
    #[command(flatten)]
    density: DensityArgs,
    #[command(flatten)]
    elect: ElectArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Seed of the random drop
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Run")]
    seed: u64,
}

impl DareArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let method = if self.elect.elect_sign { Method::DareTies } else { Method::DareLinear };
        let mut request = self.vectors.request(method)?;
        self.density.put_into(&mut request)?;
        self.elect.put_into(&mut request);
        request.seed = self.seed;
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct CpiArgs {
    /// Checkpoint the tasks were fine-tuned from and the masks were made for; gives the tokenizer
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    base: PathBuf,
    /// groups.json of cpift-group; gives the order of the tasks
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    groups: PathBuf,
    /// Checkpoint of a task, once for each task in groups.json
    #[arg(long = "task", value_name = "NAME=MODEL", required = true, help_heading = "Input and output")]
    tasks: Vec<Named>,
    /// Core region of a task (safetensors of cpift-mask), once for each task in groups.json
    #[arg(long = "mask", value_name = "NAME=FILE", required = true, help_heading = "Input and output")]
    masks: Vec<Named>,
    /// Checkpoint the tasks are folded into; gives config.json and buffers [default: --base]
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    backbone: Option<PathBuf>,
    /// Value of an element that is core to several tasks
    #[arg(long, value_enum, default_value = "max-delta", help_heading = "Method")]
    conflict: Conflict,
    /// Weights of backbone and tasks outside the core regions
    #[arg(long, value_enum, default_value = "equal", conflicts_with = "omega", help_heading = "Method")]
    weights: WeightsArg,
    /// Fixed weight of each task as it is folded in, 0 to 1, instead of --weights
    #[arg(long, value_name = "F", allow_negative_numbers = true, help_heading = "Method")]
    omega: Option<f64>,
    /// Interpolate the weights (as in the paper) or their differences from --base
    #[arg(long, value_enum, default_value = "weights", help_heading = "Method")]
    space: Space,
    /// Angle in radians below which, or within which of π, interpolation is linear [default:
    /// 0.0316, whose cosine is 0.9995]
    #[arg(long, value_name = "RAD", allow_negative_numbers = true, help_heading = "Method")]
    epsilon: Option<f64>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Values of `--weights`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum WeightsArg {
    /// Task i is folded in with weight 1/(i+1), so that backbone and tasks have equal weights
    Equal,
    /// Spherical mean of backbone and tasks, independent of their order
    SphericalMean,
}

impl CpiArgs {
    pub(crate) fn request(&self) -> CpiRequest {
        let weights = match (self.omega, self.weights) {
            (Some(omega), _) => TaskWeights::Omega(omega),
            (None, WeightsArg::Equal) => TaskWeights::Equal,
            (None, WeightsArg::SphericalMean) => TaskWeights::SphericalMean,
        };
        CpiRequest {
            base: self.base.clone(),
            groups: self.groups.clone(),
            tasks: self.tasks.clone(),
            masks: self.masks.clone(),
            backbone: self.backbone.clone(),
            conflict: self.conflict,
            weights,
            space: self.space,
            epsilon: self.epsilon,
        }
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct RecipeArgs {
    /// Recipe; paths in it are relative to the directory in which the program runs
    #[arg(value_name = "FILE.yaml")]
    pub(crate) recipe: PathBuf,
    #[command(flatten)]
    pub(crate) layouts: LayoutArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(clap::Args, Debug)]
pub(crate) struct ExtractLoraArgs {
    /// Model before fine-tuning
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    base: PathBuf,
    /// Model after fine-tuning
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    model: PathBuf,
    /// Directory of the adapter; an existing one is refused unless --force is given
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    pub(crate) out: PathBuf,
    /// Dtype of the factors: f32, bf16, f16 or f64
    #[arg(long, value_name = "DTYPE", default_value = "f32", help_heading = "Input and output")]
    dtype: Dtype,
    /// Rank of each product: the largest singular values of each difference that are kept
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Method")]
    rank: usize,
}

impl ExtractLoraArgs {
    pub(crate) fn request(&self, force: bool) -> Extraction {
        let Self { base, model, out, dtype, rank } = self;
        Extraction { base: base.clone(), model: model.clone(), rank: *rank, dtype: *dtype, out: out.clone(), force }
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct MergeAdaptersArgs {
    /// LoRA adapter, a PEFT directory or a .safetensors file of diffusers or kohya; two or more
    #[arg(long = "adapter", value_name = "ADAPTER", required = true, help_heading = "Input and output")]
    adapters: Vec<PathBuf>,
    /// Output: a directory if the first adapter is a PEFT directory, else a file; an existing one
    /// is refused unless --force is given
    #[arg(long, value_name = "PATH", help_heading = "Input and output")]
    pub(crate) out: PathBuf,
    /// Dtype of the factors: f32, bf16, f16 or f64
    #[arg(long, value_name = "DTYPE", default_value = "f32", help_heading = "Input and output")]
    dtype: Dtype,
    /// Weight of an adapter, once per --adapter in the same order [default: all equal, with the sum
    /// 1]
    #[arg(long = "weight", value_name = "F", allow_negative_numbers = true, help_heading = "Method")]
    weights: Vec<f64>,
    /// Compress each sum to this rank by its singular values [default: the sum of the ranks, which
    /// is exact]
    #[arg(long, value_name = "N", help_heading = "Method")]
    rank: Option<usize>,
}

impl MergeAdaptersArgs {
    pub(crate) fn request(&self, force: bool) -> Combination {
        Combination {
            adapters: self.adapters.clone(),
            weights: self.weights.clone(),
            rank: self.rank,
            dtype: self.dtype,
            out: self.out.clone(),
            force,
        }
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct VerifyArgs {
    /// Hugging Face directory, .safetensors file or MODEL+ADAPTER
    #[arg(value_name = "MODEL")]
    pub(crate) checkpoint: PathBuf,
}

#[derive(clap::Args, Debug)]
pub(crate) struct DigestArgs {
    /// Hugging Face directories or MODEL+ADAPTER (digest of tensors, config and tokenizer), or
    /// files (digest of the bytes; verify prints that of the tensors)
    #[arg(value_name = "PATH", required = true)]
    pub(crate) paths: Vec<PathBuf>,
}

impl ValueEnum for Conflict {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Self::Last => "Value of the last task in the order of groups.json",
            Self::First => "Value of the first task in the order of groups.json",
            Self::MaxDelta => "Value of the task that moved it most from --base; of equals the first",
            Self::Mean => "Mean of the values of the tasks whose core it belongs to",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

impl ValueEnum for Missing {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Error, Self::Base, Self::Skip]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Self::Error => PossibleValue::new("error").help("The merge is refused"),
            Self::Base => PossibleValue::new("base").help("The model counts as having the values of the base"),
            Self::Skip => PossibleValue::new("skip").help("It is not merged: the output has the values of the base"),
        })
    }
}

impl ValueEnum for Integers {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Error, Self::Base]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Self::Error => PossibleValue::new("error").help("The merge is refused"),
            Self::Base => PossibleValue::new("base").help("The output has the values of the base"),
        })
    }
}

impl ValueEnum for Space {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Weights, Self::Delta]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Self::Weights => "The weights themselves (as in the paper)",
            Self::Delta => "Their differences from --base, whose angles are meaningful between fine-tunes of one base",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::shared::parse_shard_size;
    use super::*;

    #[test]
    fn shard_sizes_are_read_with_and_without_units() {
        assert_eq!(parse_shard_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_shard_size("300"), Ok(300));
        assert_eq!(parse_shard_size("2MiB"), Ok(2 << 20));
        for wrong in ["", "GB", "0", "5TB", "-1", "1.5GB", "99999999999GiB"] {
            assert!(parse_shard_size(wrong).is_err(), "{wrong}");
        }
    }

    /// Checks the flags that are defined here; those of [`Common`] get their headings in
    /// cpift-core.
    #[test]
    fn every_flag_stands_under_a_heading_and_headings_keep_their_order() {
        const HEADINGS: [&str; 3] = ["Input and output", "Method", "Run"];
        let program = Args::command();
        for command in program.get_subcommands() {
            let mut seen: Vec<&str> = Vec::new();
            for flag in command.get_arguments().filter(|a| !a.is_positional()) {
                let place = format!("--{} of {}", flag.get_id(), command.get_name());
                let heading = flag.get_help_heading().unwrap_or_else(|| panic!("{place} stands under no heading"));
                assert!(HEADINGS.contains(&heading), "{place} stands under {heading}");
                if !seen.contains(&heading) {
                    seen.push(heading);
                }
            }
            assert!(HEADINGS.iter().filter(|h| seen.contains(h)).eq(&seen), "{}: {seen:?}", command.get_name());
        }
    }
}
