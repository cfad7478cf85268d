//! The merge that was asked for, by flags or by a recipe, before any file is opened.

use std::path::PathBuf;

use cpift_core::Dtype;
use cpift_core::run::cli::Named;

use crate::methods::Conflict;
use crate::methods::sphere::COLLINEAR_COSINE;
use crate::setting::Setting;

/// Method of a merge of models. `cpi` is not one of them: its inputs are of another kind
/// (`CpiRequest`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Weighted mean or sum of the models.
    Linear,
    /// Spherical interpolation of two models.
    Slerp,
    /// Karcher mean of the models' directions, times the mean of their norms.
    SphericalMean,
    /// Weighted sum of the task vectors (differences from the base), added to the base.
    TaskArithmetic,
    /// Task vectors trimmed to their largest elements, of which those with the elected sign are
    /// merged.
    Ties,
    /// Task vectors with elements dropped at random, then added as in task arithmetic.
    DareLinear,
    /// Task vectors with elements dropped at random, of which those with the elected sign are
    /// merged.
    DareTies,
}

impl Method {
    /// All methods, in the order of help texts.
    pub const ALL: [Self; 7] = [
        Self::Linear,
        Self::Slerp,
        Self::SphericalMean,
        Self::TaskArithmetic,
        Self::Ties,
        Self::DareLinear,
        Self::DareTies,
    ];

    /// Name on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Slerp => "slerp",
            Self::SphericalMean => "spherical-mean",
            Self::TaskArithmetic => "task-arithmetic",
            Self::Ties => "ties",
            Self::DareLinear => "dare-linear",
            Self::DareTies => "dare-ties",
        }
    }

    /// Name in mergekit's YAML.
    pub fn recipe_name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Slerp => "slerp",
            Self::SphericalMean => "karcher",
            Self::TaskArithmetic => "task_arithmetic",
            Self::Ties => "ties",
            Self::DareLinear => "dare_linear",
            Self::DareTies => "dare_ties",
        }
    }

    /// Returns true if the method merges task vectors.
    pub fn needs_base(self) -> bool {
        match self {
            Self::Linear | Self::Slerp | Self::SphericalMean => false,
            Self::TaskArithmetic | Self::Ties | Self::DareLinear | Self::DareTies => true,
        }
    }

    /// Returns true if the method keeps a share of each task vector and drops the rest.
    pub fn has_density(self) -> bool {
        matches!(self, Self::Ties | Self::DareLinear | Self::DareTies)
    }

    /// Default of `normalize`: divide by the sum of the weights.
    pub fn normalizes(self) -> bool {
        matches!(self, Self::Linear | Self::Ties)
    }

    /// Default of `rescale`: scale up the elements that are kept.
    pub fn rescales(self) -> bool {
        self.draws()
    }

    /// Returns true if elements are dropped at random.
    pub fn draws(self) -> bool {
        matches!(self, Self::DareLinear | Self::DareTies)
    }

    /// Default of `epsilon` in radians.
    pub fn epsilon(self) -> f64 {
        // A spherical mean is taken at any angle, as mergekit does.
        if self == Self::SphericalMean { 0.0 } else { COLLINEAR_COSINE.acos() }
    }
}

/// Vectors that are interpolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// The weights.
    Weights,
    /// Their differences from the base.
    Delta,
}

impl Space {
    /// Name on the command line, in recipes and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Delta => "delta",
        }
    }
}

/// A merge of models by one [`Method`].
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Method of the merge.
    pub method: Method,
    /// Models in order, without the base. `slerp` takes exactly two, of which the first is t = 0.
    pub models: Vec<ModelRequest>,
    /// Base of the differences, if the method or the space works on differences.
    pub base: Option<PathBuf>,
    /// Position between the two models of `slerp`, 0 to 1.
    pub t: Setting,
    /// Factor of the merged task vector.
    pub lambda: Setting,
    /// Divide by the sum of the weights.
    pub normalize: bool,
    /// Scale the elements that are kept up to the sum of magnitudes of the whole task vector.
    pub rescale: bool,
    /// Seed of the random drop.
    pub seed: u64,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: f64,
    /// Vectors that are interpolated.
    pub space: Space,
    /// Dtype of the output; by default that of the models.
    pub dtype: Option<Dtype>,
    /// Directory of the output's tokenizer and other side files; by default the base or first
    /// model.
    pub side_files: Option<PathBuf>,
    /// Mask of the elements at which the output is the backbone.
    pub protect: Option<PathBuf>,
}

/// One model of a merge.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelRequest {
    /// Directory of the checkpoint.
    pub path: PathBuf,
    /// Weight of the model.
    pub weight: Setting,
    /// Share of its task vector that is kept, 0 to 1.
    pub density: Setting,
    /// Mask of the elements to which it contributes.
    pub mask: Option<PathBuf>,
}

impl Request {
    /// A merge with the defaults of `method` and no models.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            models: Vec::new(),
            base: None,
            t: Setting::constant(0.5),
            lambda: Setting::constant(1.0),
            normalize: method.normalizes(),
            rescale: method.rescales(),
            seed: 0,
            epsilon: method.epsilon(),
            space: Space::Weights,
            dtype: None,
            side_files: None,
            protect: None,
        }
    }
}

impl ModelRequest {
    /// The model at `path` with weight and density 1.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), weight: Setting::constant(1.0), density: Setting::constant(1.0), mask: None }
    }
}

/// A merge by `cpi`: core regions transplanted, the rest interpolated.
#[derive(Debug, Clone)]
pub(crate) struct CpiRequest {
    /// Checkpoint the tasks were fine-tuned from and the masks were made for.
    pub base: PathBuf,
    /// Path of groups.json, which gives the order of the tasks.
    pub groups: PathBuf,
    /// Checkpoint of each task, in the order in which they were given.
    pub tasks: Vec<Named>,
    /// Core region of each task, in the order in which they were given.
    pub masks: Vec<Named>,
    /// Checkpoint the tasks are folded into; by default the base.
    pub backbone: Option<PathBuf>,
    /// Value of an element that is core to several tasks.
    pub conflict: Conflict,
    /// Weights of backbone and tasks outside the core regions.
    pub weights: TaskWeights,
    /// Vectors that are interpolated.
    pub space: Space,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: Option<f64>,
}

/// Weights of backbone and tasks outside the core regions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum TaskWeights {
    /// Task i is folded in with weight 1/(i+1), so that backbone and tasks have equal weights.
    Equal,
    /// Spherical mean of backbone and tasks, independent of their order.
    SphericalMean,
    /// Each task is folded in with this weight.
    Omega(f64),
}

/// Destination of a merge.
#[derive(Debug, Clone)]
pub(crate) struct OutputRequest {
    /// Directory that is created.
    pub dir: PathBuf,
    /// Replace an existing output.
    pub force: bool,
    /// Dtype of all parameters; by default that of the inputs.
    pub dtype: Option<Dtype>,
    /// Size of the largest shard in bytes.
    pub shard_size: u64,
    /// Directory of the tokenizer and other side files; by default the base or first model.
    pub side_files: Option<PathBuf>,
    /// Plan only, so that an existing output is no error.
    pub dry_run: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_a_name_of_its_own_in_both_spellings() {
        let names: std::collections::BTreeSet<_> = Method::ALL.iter().map(|m| m.name()).collect();
        let recipe_names: std::collections::BTreeSet<_> = Method::ALL.iter().map(|m| m.recipe_name()).collect();
        assert_eq!((names.len(), recipe_names.len()), (Method::ALL.len(), Method::ALL.len()));
    }

    #[test]
    fn defaults_are_those_of_the_method() {
        for (method, normalize, rescale) in [
            (Method::Linear, true, false),
            (Method::TaskArithmetic, false, false),
            (Method::Ties, true, false),
            (Method::DareLinear, false, true),
            (Method::DareTies, false, true),
        ] {
            let request = Request::new(method);
            assert_eq!((request.normalize, request.rescale), (normalize, rescale), "{}", method.name());
        }
    }
}
