//! What a merge is asked to do, whether by flags or by a recipe: the method, the models and their settings.

use std::path::PathBuf;

use cpift_core::Dtype;

use crate::cli::Space;
use crate::setting::Setting;

/// How the models are merged; all but `cpi`, whose inputs are of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Weighted mean or sum of the models.
    Linear,
    /// Spherical interpolation of two models.
    Slerp,
    /// Mean of the models' directions on the sphere, times the mean of their norms.
    SphericalMean,
    /// Weighted sum of the differences from the base, added to it.
    TaskArithmetic,
    /// The largest differences from the base, those of the elected sign only.
    Ties,
    /// Differences from the base dropped at random, then added as in task arithmetic.
    DareLinear,
    /// Differences from the base dropped at random, those of the elected sign only.
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

    /// The name on the command line.
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

    /// The name in mergekit's YAML.
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

    /// Whether the method merges differences from a base.
    pub fn needs_base(self) -> bool {
        match self {
            Self::Linear | Self::Slerp | Self::SphericalMean => false,
            Self::TaskArithmetic | Self::Ties | Self::DareLinear | Self::DareTies => true,
        }
    }

    /// Whether a part of each difference from the base is kept and the rest dropped.
    pub fn has_density(self) -> bool {
        matches!(self, Self::Ties | Self::DareLinear | Self::DareTies)
    }

    /// Whether coefficients are divided by their sum where nothing else is said.
    pub fn normalizes(self) -> bool {
        matches!(self, Self::Linear | Self::Ties)
    }

    /// Whether what is kept of a difference is scaled up for what was dropped, where nothing else is said.
    pub fn rescales(self) -> bool {
        matches!(self, Self::DareLinear | Self::DareTies)
    }
}

/// A merge as it was asked for, before any checkpoint is opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// How the models are merged.
    pub method: Method,
    /// The models to merge, in order and without the base. For slerp exactly two: the first is t = 0.
    pub models: Vec<ModelRequest>,
    /// What differences are taken from, where the method or the space works on differences.
    pub base: Option<PathBuf>,
    /// Where between the two models of slerp.
    pub t: Setting,
    /// Factor of the merged difference from the base.
    pub lambda: Setting,
    /// Divide by the sum of the weights.
    pub normalize: bool,
    /// Scale up what is kept of a difference for what was dropped.
    pub rescale: bool,
    /// Seed of what is dropped at random.
    pub seed: u64,
    /// Angle in radians below which, or within which of π, interpolation is linear.
    pub epsilon: f64,
    /// Whether the weights or their differences from the base are interpolated.
    pub space: Space,
    /// Element type of the output; that of the models where nothing is said.
    pub dtype: Option<Dtype>,
    /// The folder whose tokenizer and other side files the output gets; the base or first model where nothing is said.
    pub side_files: Option<PathBuf>,
    /// A mask of what stays as in the base.
    pub protect: Option<PathBuf>,
}

/// A model to merge.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelRequest {
    /// Its folder.
    pub path: PathBuf,
    /// How much it counts.
    pub weight: Setting,
    /// The share of its difference from the base that is kept.
    pub density: Setting,
    /// A mask of the elements to which it contributes.
    pub mask: Option<PathBuf>,
}

impl Request {
    /// A merge by `method` with that method's defaults and no models yet.
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
            epsilon: crate::sphere::COLLINEAR_COSINE.acos(),
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
