//! The command line: every flag with its help, and the request that the flags amount to.

mod methods;
mod sweep;

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use clap::builder::PossibleValue;
use clap::{Parser, Subcommand, ValueEnum};
use cpift_core::error::usage;
use cpift_core::run::cli::{Common, Named};
use cpift_core::{CheckpointWriter, Dtype};

use crate::method::Method;
use crate::methods::Conflict;
use crate::request::{CpiRequest, ModelRequest, OutputRequest, Request, Space, TaskWeights};
use crate::setting::Setting;
use methods::{
    ArceeFusionArgs, BreadcrumbsArgs, DellaArgs, IsoCArgs, ModelStockArgs, MultiSlerpArgs, NearSwapArgs, NuSlerpArgs,
    PassthroughArgs, RamArgs, SceArgs, TsvMArgs,
};
use sweep::SweepArgs;

/// Merge checkpoints of one model, by standard methods or by the core transplant and SLERP of
/// CPI-FT
///
/// Checkpoints are Hugging Face directories: config.json and model.safetensors, or shards with an
/// index, in F64, F32, F16 or BF16. All inputs are checked before any output starts; the output
/// directory appears complete or not at all.
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
  by singular vectors      tsv-m, iso-c
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
    /// Merge by a recipe in mergekit's YAML
    Recipe(RecipeArgs),
    /// Transplant each task's core region bit for bit, and interpolate backbone and tasks elsewhere
    /// by SLERP
    Cpi(CpiArgs),
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
            Self::Recipe(_) | Self::Cpi(_) | Self::Verify(_) | Self::Digest(_) => return Ok(None),
        }))
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

/// Models of a merge, with their masks.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Input and output")]
pub(crate) struct ModelArgs {
    /// Directory of a model; without --base the first gives config.json, tokenizer and buffers
    #[arg(long = "model", value_name = "DIR", required = true)]
    models: Vec<PathBuf>,
    /// Mask of the elements that are merged (from cpift-mask): outside it the output is the
    /// backbone, which is the base or else the first model. With NAME= the mask is one model's:
    /// outside it that model's elements are those of the backbone. NAME is the model's position in
    /// the order of --model, from 1, or the name of its directory
    #[arg(long = "mask", value_name = "[NAME=]FILE")]
    masks: Vec<MaskArg>,
    /// Mask of the elements at which the output is the backbone bit for bit (after the cast to
    /// --dtype); they take no part in angles, trims and sums
    #[arg(long, value_name = "FILE")]
    protect: Option<PathBuf>,
}

/// Value of `--mask`.
#[derive(Debug, Clone)]
enum MaskArg {
    /// Mask of one model.
    OfModel(Named),
    /// Mask of the merge.
    OfAll(PathBuf),
}

impl FromStr for MaskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('=') { Named::from_str(text).map(Self::OfModel) } else { Ok(Self::OfAll(text.into())) }
    }
}

impl ModelArgs {
    /// A request with the models, their weights and masks.
    fn request(&self, method: Method, weights: &[Setting]) -> Result<Request> {
        let mut request = Request::new(method);
        request.models = self.models.iter().map(ModelRequest::new).collect();
        let n = request.models.len();
        if !weights.is_empty() && weights.len() != n {
            return Err(usage(format!("expected one --weight for each of {n} --model, found {}", weights.len())));
        }
        for (model, weight) in request.models.iter_mut().zip(weights) {
            model.weight = weight.clone();
        }
        for mask in &self.masks {
            let mask = match mask {
                MaskArg::OfModel(mask) => mask,
                MaskArg::OfAll(path) => {
                    if request.within.replace(path.clone()).is_some() {
                        return Err(usage("--mask FILE without a name can be given once"));
                    }
                    continue;
                }
            };
            let model = &mut request.models[self.position(mask)?];
            if model.mask.replace(mask.path.clone()).is_some() {
                return Err(usage(format!("--mask {} is for a model that has one already", mask.name)));
            }
        }
        request.protect.clone_from(&self.protect);
        if request.protect.is_some() && request.within.is_some() {
            return Err(usage("--protect and --mask FILE exclude one another: make one mask of both with cpift-mask"));
        }
        Ok(request)
    }

    /// Index of the model that a `--mask` is for, by its position or the name of its directory.
    fn position(&self, mask: &Named) -> Result<usize> {
        let models = &self.models;
        let named = |path: &PathBuf| path.file_name().is_some_and(|name| *name == *mask.name);
        let number = mask.name.parse::<usize>().ok().filter(|n| (1..=models.len()).contains(n)).map(|n| n - 1);
        let mut fitting = (0..models.len()).filter(|i| number == Some(*i) || named(&models[*i]));
        match (fitting.next(), fitting.next()) {
            (Some(i), None) => Ok(i),
            (Some(_), Some(_)) => {
                Err(usage(format!("--mask {}: the name fits several models, by number and by name", mask.name)))
            }
            (None, _) => Err(usage(format!(
                "--mask {}: no model has that number or name; expected 1 to {} or the name of a directory",
                mask.name,
                models.len()
            ))),
        }
    }
}

/// Models and settings of a merge of task vectors.
#[derive(clap::Args, Debug)]
pub(crate) struct TaskVectorArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Checkpoint the models were fine-tuned from; gives config.json, tokenizer and buffers
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    base: PathBuf,
    /// Weight of a model, once per --model in the same order; V,V,... is a gradient over the
    /// layers, FILTER=V applies to tensors whose name contains FILTER [default: all 1]
    #[arg(long = "weight", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    weights: Vec<Setting>,
    /// Factor of the sum of the task vectors; repeated as --t of slerp [default: 1]
    #[arg(long = "lambda", value_name = "V", allow_negative_numbers = true, help_heading = "Method")]
    lambda: Vec<Setting>,
}

impl TaskVectorArgs {
    fn request(&self, method: Method) -> Result<Request> {
        let mut request = self.models.request(method, &self.weights)?;
        request.base = Some(self.base.clone());
        request.lambda = one(&self.lambda).unwrap_or(request.lambda);
        Ok(request)
    }
}

/// Share of each task vector that is kept.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Method")]
pub(crate) struct DensityArgs {
    /// Share of a model's task vector that is kept, 0 to 1: once for all models, or once per
    /// --model in the same order
    #[arg(long = "density", value_name = "V", required = true, allow_negative_numbers = true)]
    densities: Vec<Setting>,
    /// Scale the elements that are kept up to the sum of magnitudes of the whole task vector
    /// [default: true for dare and della, else false]
    #[arg(long, value_name = "BOOL")]
    rescale: Option<bool>,
}

impl DensityArgs {
    fn put_into(&self, request: &mut Request) -> Result<()> {
        let (given, models) = (self.densities.len(), request.models.len());
        if given != 1 && given != models {
            return Err(usage(format!("expected one --density, or one for each of {models} --model, found {given}")));
        }
        for (i, model) in request.models.iter_mut().enumerate() {
            model.density = self.densities[i.min(given - 1)].clone();
        }
        request.rescale = self.rescale.unwrap_or(request.rescale);
        Ok(())
    }
}

/// Vectors between which a spherical method takes its angles.
#[derive(clap::Args, Debug)]
pub(crate) struct SphereArgs {
    /// Interpolate the weights, or their differences from --base
    #[arg(long, value_enum, default_value = "weights", help_heading = "Method")]
    space: Space,
    /// Base of the differences with --space delta; then gives config.json, tokenizer and buffers
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    base: Option<PathBuf>,
}

impl SphereArgs {
    fn put_into(&self, request: &mut Request) {
        request.space = self.space;
        request.base.clone_from(&self.base);
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
    /// Elect a sign per element as TIES does, and sum the task vectors that agree with it
    #[arg(long, help_heading = "Method")]
    elect_sign: bool,
    /// Divide each element by the sum of the weights that took part in it
    #[arg(long, value_name = "BOOL", default_value_t = false, action = clap::ArgAction::Set, help_heading = "Method")]
    normalize: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Seed of the random drop
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Run")]
    seed: u64,
}

impl DareArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let method = if self.elect_sign { Method::DareTies } else { Method::DareLinear };
        let mut request = self.vectors.request(method)?;
        self.density.put_into(&mut request)?;
        request.normalize = self.normalize;
        request.seed = self.seed;
        Ok(request)
    }
}

#[derive(clap::Args, Debug)]
pub(crate) struct CpiArgs {
    /// Checkpoint the tasks were fine-tuned from and the masks were made for; gives the tokenizer
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    base: PathBuf,
    /// groups.json of cpift-group; gives the order of the tasks
    #[arg(long, value_name = "FILE", help_heading = "Input and output")]
    groups: PathBuf,
    /// Checkpoint of a task, once for each task in groups.json
    #[arg(long = "task", value_name = "NAME=DIR", required = true, help_heading = "Input and output")]
    tasks: Vec<Named>,
    /// Core region of a task (safetensors of cpift-mask), once for each task in groups.json
    #[arg(long = "mask", value_name = "NAME=FILE", required = true, help_heading = "Input and output")]
    masks: Vec<Named>,
    /// Checkpoint the tasks are folded into; gives config.json and buffers [default: --base]
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
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
    pub(crate) output: OutputArgs,
}

#[derive(clap::Args, Debug)]
pub(crate) struct VerifyArgs {
    /// Hugging Face directory or .safetensors file
    #[arg(value_name = "DIR")]
    pub(crate) checkpoint: PathBuf,
}

#[derive(clap::Args, Debug)]
pub(crate) struct DigestArgs {
    /// Hugging Face directories (digest of tensors, config and tokenizer) or files (digest of the
    /// bytes)
    #[arg(value_name = "PATH", required = true)]
    pub(crate) paths: Vec<PathBuf>,
}

/// Destination and form of the result.
#[derive(clap::Args, Debug)]
pub(crate) struct OutputArgs {
    /// Output directory; an existing one is refused unless --force is given
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    pub(crate) out: PathBuf,
    /// Dtype of the result: f32, bf16, f16 or f64 [default: that of all inputs, for cpi of all
    /// tasks; an error if they differ]
    #[arg(long, value_name = "DTYPE", help_heading = "Input and output")]
    dtype: Option<Dtype>,
    /// Size of the largest shard: bytes, or a number with KB, MB, GB, KiB, MiB or GiB
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = parse_shard_size,
        default_value = "5GB",
        help_heading = "Input and output"
    )]
    shard_size: u64,
    /// Directory whose tokenizer, chat template and generation config the output gets [default:
    /// --base if given, else the first model]
    #[arg(long, value_name = "DIR", help_heading = "Input and output")]
    copy_from: Option<PathBuf>,
    /// Print the plan (inputs, operation per tensor, output) and write nothing
    #[arg(long, help_heading = "Run")]
    pub(crate) dry_run: bool,
}

impl OutputArgs {
    pub(crate) fn request(&self, force: bool) -> OutputRequest {
        OutputRequest {
            dir: self.out.clone(),
            force,
            dtype: self.dtype,
            shard_size: self.shard_size,
            side_files: self.copy_from.clone(),
            dry_run: self.dry_run,
        }
    }
}

const _: () = assert!(CheckpointWriter::SHARD_SIZE == 5_000_000_000, "the help says 5GB");

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

/// All values of a repeated flag as one setting, those without a filter last; `None` if the flag
/// was not given.
fn one(given: &[Setting]) -> Option<Setting> {
    let (filtered, rest): (Vec<_>, Vec<_>) =
        given.iter().flat_map(|setting| setting.rules().iter().cloned()).partition(|rule| rule.filter.is_some());
    let mut all = Setting::default();
    filtered.into_iter().chain(rest).for_each(|rule| all.push(rule));
    (!given.is_empty()).then_some(all)
}

/// Parses `5GB`, `500MB`, `200KiB` or plain bytes, as `save_pretrained` takes them: K, M and G are
/// powers of 1000, Ki, Mi and Gi of 1024.
fn parse_shard_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected bytes or a size such as 5GB, 500MB or 2GiB, found {text:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let factor = match text[digits..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(wrong()),
    };
    match number.checked_mul(factor) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

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
