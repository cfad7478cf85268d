//! The arithmetic of the methods: what becomes of one tensor, given its elements in every input.

mod region;
pub mod sign_merge;
pub mod sphere;

pub use region::{Claims, Conflict, magnitude};
pub use sign_merge::{Filter, SignMerge, Sparsify};

use sphere::{Combination, Gram};

/// How one tensor is merged.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// A combination with these coefficients.
    Linear(Vec<f64>),
    /// SLERP of operand after operand into the first, each with its ω.
    Fold(Vec<f64>),
    /// The mean on the sphere, weights summing to 1.
    SphericalMean(Vec<f64>),
    /// Task vectors thinned out, and summed where they agree on a sign.
    SignMerge(SignMerge),
}

impl Rule {
    /// Whether its coefficients follow from angles.
    pub fn has_angles(&self) -> bool {
        matches!(self, Self::Fold(_) | Self::SphericalMean(_))
    }

    /// Its settings, for people.
    pub fn describe(&self) -> String {
        let list = |numbers: &[f64]| {
            // Ten digits: a weight of 1/3 need not be read to its last one.
            let shown = numbers.iter().map(|x| ((x * 1e10).round() / 1e10).to_string());
            shown.collect::<Vec<String>>().join(", ")
        };
        match self {
            Self::Linear(coefficients) => format!("factors {}", list(coefficients)),
            Self::Fold(omegas) if omegas.len() == 1 => format!("t {}", list(omegas)),
            Self::Fold(omegas) => format!("ω {}", list(omegas)),
            Self::SphericalMean(weights) => format!("weights {}", list(weights)),
            Self::SignMerge(rule) => format!(
                "weights {}; densities {}; λ {}",
                list(&rule.weights),
                list(&rule.densities),
                list(&[rule.lambda])
            ),
        }
    }

    /// The combination that the inner products of the operands lead to; empty for a consensus.
    pub fn combination(&self, gram: &Gram, epsilon: f64) -> Combination {
        match self {
            Self::Linear(coefficients) => Combination { coefficients: coefficients.clone(), steps: Vec::new() },
            Self::Fold(omegas) => sphere::fold(gram, omegas, epsilon),
            Self::SphericalMean(weights) => sphere::spherical_mean(gram, weights, epsilon),
            Self::SignMerge(_) => Combination { coefficients: Vec::new(), steps: Vec::new() },
        }
    }
}
