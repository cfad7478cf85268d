//! Linear combinations whose coefficients follow from inner products, as mergekit defines them:
//! Model Stock, NuSLERP and Multi-SLERP, of whole tensors or of their rows or columns.

use super::sphere::{Branch, Combination, Gram, Step};

/// A method that combines the operands linearly.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Combine {
    /// Mean of the models, drawn towards the base by the mean cosine between their task vectors.
    ModelStock,
    /// Spherical interpolation of two vectors at this position.
    NuSlerp(f64),
    /// Weighted mean of directions, mapped to the sphere at their Euclidean mean.
    MultiSlerp {
        /// Weight of each operand.
        weights: Vec<f64>,
        /// Number added to norms before a division.
        eps: f64,
    },
}

/// Vectors of a tensor that are combined by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Along {
    /// The whole tensor.
    Whole,
    /// The last dimension: rows of a matrix.
    Rows,
    /// The first dimension: columns of a matrix.
    Columns,
}

/// Norm product below which Model Stock takes two task vectors for orthogonal.
const SMALLEST_PRODUCT: f64 = 1e-6;
/// Norm to which NuSLERP raises smaller ones before it divides.
const SMALLEST_NORM: f64 = 1e-7;
/// Squared sine at and below which NuSLERP interpolates linearly.
const COLLINEAR_SQUARED_SINE: f64 = 1e-16;
/// Denominator of Model Stock at and below which the base is kept.
const SINGULAR: f64 = 1e-6;

impl Combine {
    /// The combination that follows from the inner products. Its coefficients are not finite if the
    /// directions of Multi-SLERP cancel.
    pub fn combination(&self, gram: &Gram) -> Combination {
        match self {
            Self::ModelStock => Combination { coefficients: model_stock(gram), steps: Vec::new() },
            Self::NuSlerp(t) => nuslerp(gram, *t),
            Self::MultiSlerp { weights, eps } => {
                Combination { coefficients: multislerp(gram, weights, *eps), steps: Vec::new() }
            }
        }
    }

    /// Settings as text, for reports.
    pub fn describe(&self, list: impl Fn(&[f64]) -> String) -> String {
        match self {
            Self::ModelStock => "model stock".to_owned(),
            Self::NuSlerp(t) => format!("t {}", list(&[*t])),
            Self::MultiSlerp { weights, .. } => format!("weights {}", list(weights)),
        }
    }
}

/// Share of each task vector: t/k, with t = k·cos / (1 + (k − 1)·cos).
fn model_stock(gram: &Gram) -> Vec<f64> {
    let k = gram.len();
    let cosine = |i: usize, j: usize| {
        let product = gram.get(i, i).sqrt() * gram.get(j, j).sqrt();
        (gram.get(i, j) / product.max(SMALLEST_PRODUCT)).clamp(-1.0, 1.0)
    };
    let pairs: Vec<f64> = (0..k).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| cosine(i, j)).collect();
    let mean = pairs.iter().sum::<f64>() / pairs.len() as f64;
    let denominator = 1.0 + (k - 1) as f64 * mean;
    let share = if denominator.abs() < SINGULAR { 0.0 } else { mean / denominator };
    vec![share; k]
}

fn nuslerp(gram: &Gram, t: f64) -> Combination {
    let norms = [0, 1].map(|i| gram.get(i, i).sqrt());
    let cosine = (gram.get(0, 1) / norms[0].max(SMALLEST_NORM) / norms[1].max(SMALLEST_NORM)).clamp(-1.0, 1.0);
    let angle = cosine.acos();
    let (branch, factors) = if 1.0 - cosine * cosine <= COLLINEAR_SQUARED_SINE {
        (if cosine > 0.0 { Branch::Collinear } else { Branch::Opposite }, [1.0 - t, t])
    } else {
        (Branch::Slerp, [((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()])
    };
    let step = if norms.contains(&0.0) {
        Step { branch: Branch::Zero, angle: None }
    } else {
        Step { branch, angle: Some(angle) }
    };
    Combination { coefficients: factors.to_vec(), steps: vec![step] }
}

fn multislerp(gram: &Gram, weights: &[f64], eps: f64) -> Vec<f64> {
    let k = gram.len();
    if k == 1 {
        return vec![1.0];
    }
    let norms: Vec<f64> = (0..k).map(|i| gram.get(i, i).sqrt()).collect();
    // Factors that turn the operands into the sum of their weighted directions.
    let sum: Vec<f64> = (0..k).map(|i| weights[i] / (norms[i] + eps)).collect();
    let length = gram.norm(&sum);
    if length < eps {
        return if k == 2 { weights.to_vec() } else { vec![f64::NAN; k] };
    }
    let mean: Vec<f64> = sum.iter().map(|c| c / length).collect();
    // The tangent part of the weighted sum: its share along the mean taken out.
    let along: f64 = (0..k).map(|i| weights[i] * gram.with(i, &mean) / (norms[i] + eps)).sum();
    let tangent: Vec<f64> = sum.iter().zip(&mean).map(|(s, m)| s - along * m).collect();
    let angle = gram.norm(&tangent) + eps;
    let scale: f64 = norms.iter().zip(weights).map(|(n, w)| n * w).sum();
    let ratio = angle.sin() / angle;
    mean.iter().zip(&tangent).map(|(m, t)| (m * angle.cos() + t * ratio) * scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_stock_is_the_mean_of_equal_and_the_base_of_orthogonal_vectors() {
        let of = |vectors: &[Vec<f64>]| Combine::ModelStock.combination(&Gram::of(vectors)).coefficients;
        assert_eq!(of(&[vec![3.0, 4.0], vec![3.0, 4.0]]), [0.5, 0.5]);
        assert_eq!(of(&[vec![1.0, 0.0], vec![0.0, 2.0]]), [0.0, 0.0]);
        assert_eq!(of(&[vec![1.0, 0.0], vec![-1.0, 0.0]]), [0.0, 0.0], "the singular case keeps the base");
        let [a, b] = of(&[vec![2.0, 0.0], vec![3.0, 3.0f64.sqrt() * 3.0]])[..] else { panic!() };
        assert!((a - 1.0 / 3.0).abs() < 1e-15 && a == b, "cos 60° gives t = 2/3: {a}");
    }

    #[test]
    fn a_zero_vector_counts_as_orthogonal_in_nuslerp() {
        let found = Combine::NuSlerp(0.25).combination(&Gram::of(&[vec![0.0, 0.0], vec![1.0, 2.0]]));
        assert!((found.coefficients[1] - (0.25 * std::f64::consts::FRAC_PI_2).sin()).abs() < 1e-15, "{found:?}");
        assert_eq!(found.steps[0].branch, Branch::Zero);
    }

    #[test]
    fn directions_that_cancel_have_no_multislerp() {
        let fan = [vec![1.0, 0.0], vec![-1.0, 0.0], vec![0.0, 0.0]];
        let three = Combine::MultiSlerp { weights: vec![1.0; 3], eps: 1e-8 };
        assert!(three.combination(&Gram::of(&fan)).coefficients[0].is_nan());
        let two = Combine::MultiSlerp { weights: vec![0.5; 2], eps: 1e-8 };
        assert_eq!(two.combination(&Gram::of(&fan[..2])).coefficients, [0.5, 0.5], "two are combined linearly");
    }
}
