//! Arithmetic of the methods on slices: the result of one tensor, given its elements in every
//! input.

pub(crate) mod magprune;
pub(crate) mod pointwise;
pub(crate) mod region;
pub(crate) mod sign_merge;
pub(crate) mod spectral;
pub mod sphere;

pub(crate) use pointwise::Pointwise;
pub(crate) use region::{Claims, Conflict};
pub(crate) use sign_merge::SignMerge;
pub(crate) use spectral::Spectral;
pub(crate) use sphere::{Along, Combine};

use sphere::{Combination, Gram, Stop};

/// Operation that merges one tensor, with its settings.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Rule {
    /// Linear combination with these coefficients.
    Linear(Vec<f64>),
    /// SLERP of operand after operand into the first, each with its weight ω.
    Fold(Vec<f64>),
    /// Spherical mean; the weights sum to 1.
    SphericalMean(Vec<f64>, Stop),
    /// Linear combination whose coefficients follow from inner products.
    Combine(Combine, Along),
    /// TIES, DARE, DELLA or Breadcrumbs.
    SignMerge(SignMerge),
    /// Element by element.
    Pointwise(Pointwise),
    /// By singular vectors.
    Spectral(Spectral),
}

impl Rule {
    /// Returns true if the coefficients follow from angles.
    pub fn has_angles(&self) -> bool {
        matches!(self, Self::Fold(_) | Self::SphericalMean(..) | Self::Combine(_, Along::Whole))
    }

    /// Returns true if whole chunks of the tensor are read before it is written.
    pub fn reads_chunks_first(&self) -> bool {
        match self {
            Self::Linear(_) | Self::Combine(_, Along::Rows | Along::Columns) | Self::Spectral(_) => false,
            Self::Pointwise(pointwise) => matches!(pointwise, Pointwise::Ram { plus: Some(_), .. }),
            Self::SignMerge(rule) => rule.sparsify == sign_merge::Sparsify::Drop && rule.rescale,
            Self::Fold(_) | Self::SphericalMean(..) | Self::Combine(_, Along::Whole) => true,
        }
    }

    /// Settings as text, for reports.
    pub fn describe(&self) -> String {
        let list = |numbers: &[f64]| {
            // Ten digits, so that a weight of 1/3 stays readable.
            let shown = numbers.iter().map(|x| ((x * 1e10).round() / 1e10).to_string());
            shown.collect::<Vec<String>>().join(", ")
        };
        match self {
            Self::Linear(coefficients) => format!("factors {}", list(coefficients)),
            Self::Fold(omegas) if omegas.len() == 1 => format!("t {}", list(omegas)),
            Self::Fold(omegas) => format!("ω {}", list(omegas)),
            Self::SphericalMean(weights, _) => format!("weights {}", list(weights)),
            Self::Combine(combine, _) => combine.describe(list),
            Self::Pointwise(pointwise) => pointwise.describe(),
            Self::Spectral(spectral) => format!("{}; λ {}", spectral.kind.name(), list(&[spectral.lambda])),
            Self::SignMerge(rule) => {
                let weights: Vec<f64> = rule.vectors.iter().map(|v| v.weight).collect();
                let densities: Vec<f64> = rule.vectors.iter().map(|v| v.density).collect();
                format!("weights {}; densities {}; λ {}", list(&weights), list(&densities), list(&[rule.lambda]))
            }
        }
    }

    /// The combination that follows from the inner products of the operands; empty for methods that
    /// are no linear combination.
    pub fn combination(&self, gram: &Gram, epsilon: f64) -> Combination {
        match self {
            Self::Linear(coefficients) => Combination { coefficients: coefficients.clone(), steps: Vec::new() },
            Self::Fold(omegas) => sphere::fold(gram, omegas, epsilon),
            Self::SphericalMean(weights, stop) => sphere::spherical_mean(gram, weights, epsilon, *stop),
            Self::Combine(combine, Along::Whole) => combine.combination(gram),
            _ => Combination { coefficients: Vec::new(), steps: Vec::new() },
        }
    }
}
