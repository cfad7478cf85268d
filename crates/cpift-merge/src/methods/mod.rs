//! The arithmetic of the methods: what becomes of one tensor, given its elements in every input.

pub mod consensus;
mod region;
pub mod sphere;

pub use consensus::{Consensus, Filter, Sparsify};
pub use region::{Claims, Conflict, magnitude};

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
    Consensus(Consensus),
}

impl Rule {
    /// Whether its coefficients follow from angles.
    pub fn has_angles(&self) -> bool {
        matches!(self, Self::Fold(_) | Self::SphericalMean(_))
    }

    /// The combination that the inner products of the operands lead to; empty for a consensus.
    pub fn combination(&self, gram: &Gram, epsilon: f64) -> Combination {
        match self {
            Self::Linear(coefficients) => Combination { coefficients: coefficients.clone(), steps: Vec::new() },
            Self::Fold(omegas) => sphere::fold(gram, omegas, epsilon),
            Self::SphericalMean(weights) => sphere::spherical_mean(gram, weights, epsilon),
            Self::Consensus(_) => Combination { coefficients: Vec::new(), steps: Vec::new() },
        }
    }
}
