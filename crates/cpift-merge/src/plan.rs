//! What a merge will do, checked and resolved before any work or any output starts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use cpift_core::checkpoint::{Digest, with_torch_dtype};
use cpift_core::error::usage;
use cpift_core::groups::Groups;
use cpift_core::{BadInput, Dtype, Mask, TensorSpec, cli, files, mask};
use serde_json::Value;

use crate::cli::{CpiArgs, LinearArgs, OutputArgs, SlerpArgs, Space, WeightsArg};
use crate::inputs::{Source, check_alike, check_not_input, common_dtype};
use crate::region::{Claims, Conflict};
use crate::stream::Tensor;

/// How the coefficients of the operands come about.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// Given, the same for every tensor.
    Linear(Vec<f64>),
    /// SLERP of operand after operand into the first, each with its ω.
    Fold(Vec<f64>),
    /// The mean on the sphere, weights summing to 1.
    SphericalMean(Vec<f64>),
}

/// Where the result goes and in which form.
pub struct Output {
    /// The folder.
    pub dir: PathBuf,
    /// Replace it where it exists.
    pub force: bool,
    /// Dtype of all parameters.
    pub dtype: Dtype,
    /// Largest shard in bytes.
    pub shard_size: u64,
    /// Its config.json.
    pub config: Value,
    /// The folder whose tokenizer and other side files it gets.
    pub side_files: PathBuf,
}

/// A merge ready to run.
pub struct Plan {
    /// The command: `cpi`, `slerp` or `linear`.
    pub method: &'static str,
    /// θ⁽⁰⁾, for `cpi`.
    pub base: Option<Arc<Source>>,
    /// What is combined; the backbone or first model comes first and gives the buffers and config.json.
    pub operands: Vec<Arc<Source>>,
    /// How it is combined.
    pub weights: Weights,
    /// Whether weights or differences from the base are combined.
    pub space: Space,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: f64,
    /// The core region of each operand after the first; empty for the plain methods.
    pub masks: Vec<Mask>,
    /// What becomes of an element in several core regions.
    pub conflict: Conflict,
    /// The output.
    pub output: Output,
    /// Path and digest of the input files that are not checkpoints, by role.
    pub files: BTreeMap<String, (PathBuf, Digest)>,
}

impl Plan {
    /// The parameters to merge, in bytewise name order.
    pub fn tensors(&self) -> Vec<Tensor<'_>> {
        let first = &self.operands[0].checkpoint;
        first.parameters().map(|view| self.tensor(view.name)).collect()
    }

    fn tensor(&self, name: &str) -> Tensor<'_> {
        Tensor {
            operands: self.operands.iter().map(|s| s.checkpoint.get(name).expect("checked to be there")).collect(),
            base: self.base.as_ref().map(|s| s.checkpoint.get(name).expect("checked to be there")),
            claims: Claims::new(self.masks.iter().map(|m| m.bits(name).expect("checked to be there")).collect()),
        }
    }

    /// What the output's parameters are.
    pub fn specs(&self) -> Vec<TensorSpec> {
        let parameters = self.operands[0].checkpoint.parameters();
        parameters.map(|view| TensorSpec { dtype: self.output.dtype, ..view.spec() }).collect()
    }

    /// Whether the base is read apart from the operands.
    pub fn base_is_separate(&self) -> bool {
        self.base.as_ref().is_some_and(|base| !Arc::ptr_eq(base, &self.operands[0]))
    }
}

/// Resolves `cpift-merge slerp`.
///
/// # Errors
/// [`cpift_core::Usage`] and [`BadInput`] as the arguments and inputs deserve.
pub fn plan_slerp(args: &SlerpArgs, force: bool) -> Result<Plan> {
    if args.models.len() != 2 {
        return Err(usage(format!("slerp takes exactly two --model, found {}", args.models.len())));
    }
    require_unit("--t", args.t)?;
    let weights = Weights::Fold(vec![args.t]);
    plan_plain("slerp", &args.models, weights, epsilon(args.epsilon)?, &args.output, force)
}

/// Resolves `cpift-merge linear`.
///
/// # Errors
/// [`cpift_core::Usage`] and [`BadInput`] as the arguments and inputs deserve.
pub fn plan_linear(args: &LinearArgs, force: bool) -> Result<Plan> {
    if args.models.len() < 2 {
        return Err(usage(format!("linear takes at least two --model, found {}", args.models.len())));
    }
    let weights = normalised(&args.weights, args.models.len())?;
    plan_plain("linear", &args.models, Weights::Linear(weights), epsilon(None)?, &args.output, force)
}

fn normalised(weights: &[f64], models: usize) -> Result<Vec<f64>> {
    if weights.is_empty() {
        return Ok(vec![1.0 / models as f64; models]);
    }
    if weights.len() != models {
        return Err(usage(format!("expected one --weight for each of {models} --model, found {}", weights.len())));
    }
    let sum: f64 = weights.iter().sum();
    if !sum.is_finite() || sum.abs() < 1e-8 {
        return Err(usage(format!("--weight must be finite numbers that do not sum to 0, found {weights:?}")));
    }
    Ok(weights.iter().map(|w| w / sum).collect())
}

fn plan_plain(
    method: &'static str,
    models: &[PathBuf],
    weights: Weights,
    epsilon: f64,
    output: &OutputArgs,
    force: bool,
) -> Result<Plan> {
    files::check_output(&output.out, force)?;
    let sources: Vec<Source> =
        models.iter().enumerate().map(|(i, m)| Source::open(format!("model:{}", i + 1), m)).collect::<Result<_>>()?;
    for other in &sources[1..] {
        check_alike(&sources[0], other)?;
    }
    check_not_input(&output.out, models.iter().map(PathBuf::as_path))?;
    let output = resolve_output(output, force, sources.iter(), &sources[0], &sources[0])?;
    sources.iter().try_for_each(|s| s.digest().map(drop))?;
    Ok(Plan {
        method,
        base: None,
        operands: sources.into_iter().map(Arc::new).collect(),
        weights,
        space: Space::Weights,
        epsilon,
        masks: Vec::new(),
        conflict: Conflict::MaxDelta,
        output,
        files: BTreeMap::new(),
    })
}

/// Resolves `cpift-merge cpi`.
///
/// # Errors
/// [`cpift_core::Usage`] and [`BadInput`] as the arguments and inputs deserve.
pub fn plan_cpi(args: &CpiArgs, force: bool) -> Result<Plan> {
    let epsilon = epsilon(args.epsilon)?;
    if let Some(omega) = args.omega {
        require_unit("--omega", omega)?;
    }
    cli::require_unique(&args.tasks, "--task")?;
    files::check_output(&args.output.out, force)?;
    let groups = Groups::read(&args.groups)?;
    groups.check_names(&args.groups, "--task", args.tasks.iter().map(|t| &t.name))?;
    groups.check_names(&args.groups, "--mask", args.masks.iter().map(|m| &m.name))?;
    let base = Arc::new(Source::open("base", &args.base)?);
    let operands = cpi_operands(args, &groups, &base)?;
    let probes = operands[1..].iter().map(Arc::as_ref);
    let output = resolve_output(&args.output, force, probes, &operands[0], &base)?;
    check_groups_base(&args.groups, &groups, &base)?;
    let (masks, mut files) = open_masks(args, &groups, &base, &operands[1..])?;
    files.insert("groups".into(), (args.groups.clone(), Digest::of_file(&args.groups)?));
    let folders = operands.iter().chain([&base]).map(|source| source.path());
    check_not_input(&output.dir, folders.chain(files.values().map(|(path, _)| path.as_path())))?;
    let weights = cpi_weights(args, operands.len() - 1);
    let (space, conflict) = (args.space, args.conflict);
    let (method, base) = ("cpi", Some(base));
    Ok(Plan { method, base, operands, weights, space, epsilon, masks, conflict, output, files })
}

/// The backbone, then the tasks in the order of the groups, all checked to be of the base's model.
fn cpi_operands(args: &CpiArgs, groups: &Groups, base: &Arc<Source>) -> Result<Vec<Arc<Source>>> {
    let mut operands = vec![match &args.backbone {
        Some(path) => Arc::new(Source::open("backbone", path)?),
        None => Arc::clone(base),
    }];
    for name in groups.task_order() {
        let task = args.tasks.iter().find(|t| t.name == name).expect("names are checked");
        operands.push(Arc::new(Source::open(format!("task:{name}"), &task.path)?));
    }
    for operand in operands.iter().filter(|o| !Arc::ptr_eq(o, base)) {
        check_alike(base, operand)?;
    }
    Ok(operands)
}

fn cpi_weights(args: &CpiArgs, tasks: usize) -> Weights {
    match (args.omega, args.weights) {
        (Some(omega), _) => Weights::Fold(vec![omega; tasks]),
        (None, WeightsArg::Equal) => Weights::Fold((1..=tasks).map(|i| 1.0 / (i as f64 + 1.0)).collect()),
        (None, WeightsArg::SphericalMean) => Weights::SphericalMean(vec![1.0 / (tasks as f64 + 1.0); tasks + 1]),
    }
}

fn check_groups_base(path: &Path, groups: &Groups, base: &Source) -> Result<()> {
    let digest = base.digest()?;
    if groups.base == *digest {
        return Ok(());
    }
    Err(BadInput::new(path, format!("made for another base than {}", base.path().display()))
        .expected(format!("base digest {digest}"))
        .found(format!("base digest {}", groups.base))
        .hint("extract the masks and group them again from this base")
        .into())
}

/// Masks in the order of the tasks, with the files they came from.
type OpenedMasks = (Vec<Mask>, BTreeMap<String, (PathBuf, Digest)>);

fn open_masks(args: &CpiArgs, groups: &Groups, base: &Source, tasks: &[Arc<Source>]) -> Result<OpenedMasks> {
    let mut by_name = mask::open_all(&args.masks, &base.checkpoint, base.digest()?)?;
    let (mut masks, mut files) = (Vec::new(), BTreeMap::new());
    for (name, task) in groups.task_order().into_iter().zip(tasks) {
        let mask = by_name.remove(name).expect("names are checked");
        if mask.header.tuned != *task.digest()? {
            log::warn!("{}: extracted from another checkpoint than {}", mask.path().display(), task.path().display());
        }
        let digest = groups.check_mask(&args.groups, name, mask.path())?;
        files.insert(format!("mask:{name}"), (mask.path().to_owned(), digest));
        masks.push(mask);
    }
    Ok((masks, files))
}

fn resolve_output<'a>(
    args: &OutputArgs,
    force: bool,
    dtype_of: impl Iterator<Item = &'a Source>,
    first: &Source,
    side_files: &Source,
) -> Result<Output> {
    let dtype = match args.dtype {
        Some(dtype) => dtype,
        None => common_dtype(dtype_of)?,
    };
    Ok(Output {
        dir: args.out.clone(),
        force,
        dtype,
        shard_size: args.shard_size,
        config: with_torch_dtype(first.config.clone(), dtype),
        side_files: side_files.path().to_owned(),
    })
}

fn require_unit(flag: &str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(usage(format!("{flag} must lie between 0 and 1, found {value}")))
}

fn epsilon(given: Option<f64>) -> Result<f64> {
    let value = given.unwrap_or_else(|| crate::sphere::COLLINEAR_COSINE.acos());
    if (0.0..=std::f64::consts::FRAC_PI_2).contains(&value) {
        return Ok(value);
    }
    Err(usage(format!("--epsilon must lie between 0 and π/2 radians, found {value}")))
}
