//! Arithmetic of the methods on slices: the result of one tensor, given its elements in every
//! input.

pub(crate) mod region;
pub(crate) mod sign_merge;
pub mod sphere;

pub(crate) use region::{Claims, Conflict};
pub(crate) use sign_merge::SignMerge;

use sphere::{Combination, Gram};

/// Operation that merges one tensor, with its settings.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Rule {
    /// Linear combination with these coefficients.
    Linear(Vec<f64>),
    /// SLERP of operand after operand into the first, each with its weight ω.
    Fold(Vec<f64>),
    /// Spherical mean; the weights sum to 1.
    SphericalMean(Vec<f64>),
    /// TIES or DARE.
    SignMerge(SignMerge),
}

impl Rule {
    /// Returns true if the coefficients follow from angles.
    pub fn has_angles(&self) -> bool {
        matches!(self, Self::Fold(_) | Self::SphericalMean(_))
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
            Self::SphericalMean(weights) => format!("weights {}", list(weights)),
            Self::SignMerge(rule) => {
                let weights: Vec<f64> = rule.vectors.iter().map(|v| v.weight).collect();
                let densities: Vec<f64> = rule.vectors.iter().map(|v| v.density).collect();
                format!("weights {}; densities {}; λ {}", list(&weights), list(&densities), list(&[rule.lambda]))
            }
        }
    }

    /// The combination that follows from the inner products of the operands; empty for TIES and
    /// DARE.
    pub fn combination(&self, gram: &Gram, epsilon: f64) -> Combination {
        match self {
            Self::Linear(coefficients) => Combination { coefficients: coefficients.clone(), steps: Vec::new() },
            Self::Fold(omegas) => sphere::fold(gram, omegas, epsilon),
            Self::SphericalMean(weights) => sphere::spherical_mean(gram, weights, epsilon),
            Self::SignMerge(_) => Combination { coefficients: Vec::new(), steps: Vec::new() },
        }
    }
}
