//! Flags that several methods share: models and their masks, task vectors, and the output.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::run::cli::Named;
use cpift_core::{CheckpointWriter, Dtype};

use crate::method::Method;
use crate::request::{
    Integers, LayoutPolicy, Missing, ModelRequest, OutputRequest, Request, Space, TokenizerRequest, TokenizerSource,
};
use crate::setting::Setting;

/// Models of a merge, with their masks.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Input and output")]
pub(crate) struct ModelArgs {
    /// Directory of a model; without --base the first gives config.json, tokenizer and buffers
    #[arg(long = "model", value_name = "MODEL", required = true)]
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
    #[command(flatten)]
    layouts: LayoutArgs,
}

/// Treatment of layouts that differ.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Input and output")]
pub(crate) struct LayoutArgs {
    /// A parameter of the base (or first model) that a model does not have: an error; the model
    /// counts as having the values of the base; or it is not merged, and the output has the values
    /// of the base. Parameters that the base does not have are then left out
    #[arg(long, value_enum, value_name = "RULE", default_value = "error")]
    missing: Missing,
    /// Integer tensors whose values differ: an error, or those of the base (or first model)
    #[arg(long, value_enum, value_name = "RULE", default_value = "error")]
    integers: Integers,
    /// Vocabulary of the output, if those of the models differ: base (or that of the first model),
    /// union, or the directory of a tokenizer. Rows of the embeddings are matched by token; a token
    /// that a model lacks gets the base's row, else the mean of the models that have it
    #[arg(long, value_name = "SOURCE")]
    tokenizer: Option<String>,
    /// With --tokenizer: pad the rows of the embeddings to a multiple of N with their mean
    #[arg(long, value_name = "N", requires = "tokenizer", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pad_to_multiple_of: Option<u32>,
}

impl LayoutArgs {
    /// Sets the tokenizer of the request, if one is given.
    pub(crate) fn put_tokenizer(&self, request: &mut Request) {
        let Some(source) = &self.tokenizer else { return };
        let mut tokenizer = TokenizerRequest::new(match source.as_str() {
            "base" => TokenizerSource::Base,
            "union" => TokenizerSource::Union,
            path => TokenizerSource::Path(path.into()),
        });
        tokenizer.pad_to_multiple_of = self.pad_to_multiple_of.map(|n| n as usize);
        request.tokenizer = Some(tokenizer);
    }

    pub(crate) fn policy(&self) -> LayoutPolicy {
        LayoutPolicy { missing: self.missing, integers: self.integers }
    }
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
    pub(super) fn request(&self, method: Method, weights: &[Setting]) -> Result<Request> {
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
        request.layouts = self.layouts.policy();
        self.layouts.put_tokenizer(&mut request);
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
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
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
    pub(super) fn request(&self, method: Method) -> Result<Request> {
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
    pub(super) fn put_into(&self, request: &mut Request) -> Result<()> {
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

/// Election of signs as in TIES, for methods that merge with and without it.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Method")]
pub(crate) struct ElectArgs {
    /// Elect a sign per element as TIES does, and sum the task vectors that agree with it
    #[arg(long)]
    pub(super) elect_sign: bool,
    /// Divide each element by the sum of the weights that took part in it [default: true for della
    /// with --elect-sign, else false]
    #[arg(long, value_name = "BOOL")]
    normalize: Option<bool>,
}

impl ElectArgs {
    pub(super) fn put_into(&self, request: &mut Request) {
        request.normalize = self.normalize.unwrap_or(request.normalize);
    }
}

/// Vectors between which a spherical method takes its angles.
#[derive(clap::Args, Debug)]
pub(crate) struct SphereArgs {
    /// Interpolate the weights, or their differences from --base
    #[arg(long, value_enum, default_value = "weights", help_heading = "Method")]
    space: Space,
    /// Base of the differences with --space delta; then gives config.json, tokenizer and buffers
    #[arg(long, value_name = "MODEL", help_heading = "Input and output")]
    base: Option<PathBuf>,
}

impl SphereArgs {
    pub(super) fn put_into(&self, request: &mut Request) {
        request.space = self.space;
        request.base.clone_from(&self.base);
    }
}

/// Several merges of the same models.
#[derive(clap::Args, Debug)]
pub(crate) struct SweepArgs {
    /// Merge once per value with one reading of the inputs: t of slerp, the weight of the second
    /// of two models of linear (the first gets 1 - V), or the lambda of task-arithmetic. The
    /// results are directories of --out named by the values
    #[arg(long, value_name = "V,V,...", value_delimiter = ',', allow_negative_numbers = true, help_heading = "Method")]
    pub(super) sweep: Vec<f64>,
}

/// Destination and form of the result.
#[derive(clap::Args, Debug)]
pub(crate) struct OutputArgs {
    /// Output: a directory, or a file if the base is one; an existing one is refused unless --force
    /// is given
    #[arg(long, value_name = "PATH", help_heading = "Input and output")]
    pub(crate) out: PathBuf,
    /// Dtype of the result: f32, bf16, f16, f64, f8_e4m3 or f8_e5m2 (8 bits without scales, rounded
    /// as torch casts) [default: each tensor keeps its own, which must be the same in all inputs,
    /// for cpi in all tasks]
    #[arg(long, value_name = "DTYPE", value_parser = Dtype::parse_any_float, help_heading = "Input and output")]
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
    #[arg(long, value_name = "SOURCE", help_heading = "Input and output")]
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

/// All values of a repeated flag as one setting, those without a filter last; `None` if the flag
/// was not given.
pub(super) fn one(given: &[Setting]) -> Option<Setting> {
    let (filtered, rest): (Vec<_>, Vec<_>) =
        given.iter().flat_map(|setting| setting.rules().iter().cloned()).partition(|rule| rule.filter.is_some());
    let mut all = Setting::default();
    filtered.into_iter().chain(rest).for_each(|rule| all.push(rule));
    (!given.is_empty()).then_some(all)
}

/// Parses `5GB`, `500MB`, `200KiB` or plain bytes, as `save_pretrained` takes them: K, M and G are
/// powers of 1000, Ki, Mi and Gi of 1024.
pub(super) fn parse_shard_size(text: &str) -> Result<u64, String> {
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
