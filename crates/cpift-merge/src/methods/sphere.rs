//! Linear combinations whose coefficients follow from inner products: SLERP and the spherical mean,
//! with their angles and branches; and, as mergekit defines them, Model Stock, NuSLERP and
//! Multi-SLERP, of whole tensors or of their rows or columns.

use std::f64::consts::PI;

use cpift_core::format::dtype::Float;

/// Cosine of the default ε; below this angle two tensors count as collinear.
pub const COLLINEAR_COSINE: f64 = 0.9995;

/// Smallest ε in effect, in radians: `acos` of a rounded cosine cannot tell smaller angles from
/// zero.
const SMALLEST_EPSILON: f64 = 1e-7;

/// A squared norm below this share of the terms it is the sum of has been cancelled down to
/// rounding errors.
const CANCELLED: f64 = 64.0 * f64::EPSILON;

/// Form of interpolation between two tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Branch {
    /// On the sphere.
    Slerp,
    /// Linear, because the angle is below ε.
    Collinear,
    /// Linear, because the angle is within ε of π, where the great circle is undefined.
    Opposite,
    /// Linear, because a norm is zero and there is no angle.
    Zero,
}

impl Branch {
    /// All branches, in the order of reports.
    pub const ALL: [Self; 4] = [Self::Slerp, Self::Collinear, Self::Opposite, Self::Zero];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slerp => "slerp",
            Self::Collinear => "collinear",
            Self::Opposite => "opposite",
            Self::Zero => "zero",
        }
    }
}

/// Inner products of k vectors with one another, [k × k], symmetric.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    k: usize,
    entries: Vec<f64>,
}

impl Gram {
    /// All zero, for `k` vectors.
    pub fn zero(k: usize) -> Self {
        Self { k, entries: vec![0.0; k * k] }
    }

    /// The inner products `entries`, [k × k].
    pub(crate) fn from_entries(k: usize, entries: Vec<f64>) -> Self {
        assert_eq!(entries.len(), k * k, "k × k products");
        Self { k, entries }
    }

    /// Inner products of whole vectors of one length.
    pub fn of(vectors: &[Vec<f64>]) -> Self {
        let mut gram = Self::zero(vectors.len());
        gram.accumulate(vectors, None);
        gram
    }

    /// Adds the inner products of a piece of the vectors, or of their differences from `base`.
    #[inline(always)]
    pub fn accumulate<T: Float, P: AsRef<[T]>>(&mut self, pieces: &[P], base: Option<&[T]>) {
        if let [only] = pieces {
            let only = only.as_ref();
            self.entries[0] +=
                products(only, only, |x, b| x - b, base.unwrap_or(&vec![T::from_f64(0.0); only.len()]))[0];
        }
        for i in 0..self.k {
            for j in 0..i {
                // Three products in one reading of two vectors, of which the two squares count
                // once.
                let (x, y) = (pieces[i].as_ref(), pieces[j].as_ref());
                let [xx, xy, yy] = match base {
                    None => products(x, y, |x, _| x, x),
                    Some(base) => products(x, y, |x, b| x - b, base),
                };
                self.entries[i * self.k + j] += xy;
                self.entries[j * self.k + i] += xy;
                if j == 0 {
                    self.entries[i * self.k + i] += xx;
                }
                if (i, j) == (1, 0) {
                    self.entries[0] += yy;
                }
            }
        }
    }

    /// Adds the inner products of another piece.
    pub fn add(&mut self, other: &Self) {
        self.entries.iter_mut().zip(&other.entries).for_each(|(a, b)| *a += b);
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.k
    }

    /// Returns true if there are no vectors.
    pub fn is_empty(&self) -> bool {
        self.k == 0
    }

    /// The inner product of vectors `i` and `j`.
    pub fn get(&self, i: usize, j: usize) -> f64 {
        self.entries[i * self.k + j]
    }

    /// Returns true if no product overflowed.
    pub fn is_finite(&self) -> bool {
        self.entries.iter().all(|x| x.is_finite())
    }

    /// Inner product of vector `i` with the combination `c`.
    pub(crate) fn with(&self, i: usize, c: &[f64]) -> f64 {
        (0..self.k).map(|j| self.get(i, j) * c[j]).sum()
    }

    /// Norm of the combination `c`; zero if the terms cancel down to their rounding errors.
    pub(crate) fn norm(&self, c: &[f64]) -> f64 {
        let (mut sum, mut size) = (0.0, 0.0);
        for i in 0..self.k {
            for j in 0..self.k {
                let term = c[i] * c[j] * self.get(i, j);
                sum += term;
                size += term.abs();
            }
        }
        if sum <= CANCELLED * size { 0.0 } else { sum.sqrt() }
    }
}

/// Running sums of an inner product: their number and order never depend on the machine or the
/// number of threads.
const LANES: usize = 16;

/// x·x, x·y and y·y, after `about` has combined every element with that of `base` at the same
/// position.
#[inline(always)]
fn products<T: Float>(x: &[T], y: &[T], about: impl Fn(f64, f64) -> f64, base: &[T]) -> [f64; 3] {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let (base, base_rest) = base.as_chunks::<LANES>();
    let mut lanes = [[0.0; LANES]; 3];
    for ((x, y), base) in x.iter().zip(y).zip(base) {
        for lane in 0..LANES {
            let (x, y) = (about(x[lane].to_f64(), base[lane].to_f64()), about(y[lane].to_f64(), base[lane].to_f64()));
            lanes[0][lane] += x * x;
            lanes[1][lane] += x * y;
            lanes[2][lane] += y * y;
        }
    }
    let mut sums = lanes.map(|l| l.iter().sum::<f64>());
    for ((x, y), base) in x_rest.iter().zip(y_rest).zip(base_rest) {
        let (x, y) = (about(x.to_f64(), base.to_f64()), about(y.to_f64(), base.to_f64()));
        sums = [sums[0] + x * x, sums[1] + x * y, sums[2] + y * y];
    }
    sums
}

/// A linear combination of vectors, with the interpolations that led to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Combination {
    /// One factor per vector.
    pub coefficients: Vec<f64>,
    /// One entry per task folded in; one for a spherical mean.
    pub steps: Vec<Step>,
}

/// One interpolation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Form of the interpolation.
    pub branch: Branch,
    /// Angle in radians; `None` if a norm is zero.
    pub angle: Option<f64>,
}

impl Combination {
    /// Writes Σ cᵢ vᵢ to `out`, or base + Σ cᵢ (vᵢ − base) if there is a base. `sums` is working
    /// space; all slices are as long as `out`.
    #[inline(always)]
    pub(crate) fn apply<T: Float>(&self, vectors: &[Vec<T>], base: Option<&[T]>, sums: &mut [f64], out: &mut [T]) {
        if let ([a, b], None) = (&self.coefficients[..], base)
            && *a != 0.0
            && *b != 0.0
        {
            let pairs = vectors[0].iter().zip(&vectors[1]);
            out.iter_mut().zip(pairs).for_each(|(o, (x, y))| *o = T::from_f64(a * x.to_f64() + b * y.to_f64()));
            return;
        }
        // Sums begin at −0.0 and terms with coefficient zero are left out, so that a −0.0 is
        // preserved.
        sums.fill(-0.0);
        for (c, values) in self.coefficients.iter().zip(vectors).filter(|(c, _)| **c != 0.0) {
            match base {
                Some(base) => {
                    let pairs = values.iter().zip(base);
                    sums.iter_mut().zip(pairs).for_each(|(s, (v, b))| *s += c * (v.to_f64() - b.to_f64()));
                }
                None => sums.iter_mut().zip(values).for_each(|(s, v)| *s += c * v.to_f64()),
            }
        }
        if let Some(base) = base {
            sums.iter_mut().zip(base).for_each(|(s, b)| *s += b.to_f64());
        }
        out.iter_mut().zip(&*sums).for_each(|(o, s)| *o = T::from_f64(*s));
    }
}

/// Folds vectors 1.. into vector 0 one after another, vector i with weight `omegas[i - 1]`.
///
/// `epsilon` is the angle in radians below which (or within which of π) interpolation is linear.
pub fn fold(gram: &Gram, omegas: &[f64], epsilon: f64) -> Combination {
    let mut c = vec![0.0; gram.len()];
    c[0] = 1.0;
    let mut steps = Vec::with_capacity(omegas.len());
    for (i, &omega) in (1..gram.len()).zip(omegas) {
        let step = Step::between(gram.norm(&c), gram.get(i, i).sqrt(), gram.with(i, &c), epsilon);
        let (keep, take) = step.factors(omega);
        c.iter_mut().for_each(|x| *x *= keep);
        c[i] += take;
        steps.push(step);
    }
    Combination { coefficients: c, steps }
}

impl Step {
    fn between(norm_a: f64, norm_b: f64, product: f64, epsilon: f64) -> Self {
        if norm_a == 0.0 || norm_b == 0.0 {
            return Self { branch: Branch::Zero, angle: None };
        }
        let angle = (product / norm_a / norm_b).clamp(-1.0, 1.0).acos();
        let epsilon = epsilon.max(SMALLEST_EPSILON);
        let branch = if angle < epsilon {
            Branch::Collinear
        } else if PI - angle < epsilon {
            Branch::Opposite
        } else {
            Branch::Slerp
        };
        Self { branch, angle: Some(angle) }
    }

    /// Factors of the vector so far and of the one folded in with weight `omega`.
    fn factors(self, omega: f64) -> (f64, f64) {
        match (self.branch, self.angle) {
            (Branch::Slerp, Some(angle)) => {
                (((1.0 - omega) * angle).sin() / angle.sin(), (omega * angle).sin() / angle.sin())
            }
            _ => (1.0 - omega, omega),
        }
    }
}

/// End of the iterations of a spherical mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stop {
    /// Largest number of iterations.
    pub max_iter: usize,
    /// Length of a step at which the mean has converged.
    pub tol: f64,
}

impl Stop {
    /// Iterates to the precision of f64.
    pub const FULL: Self = Self { max_iter: 1000, tol: 1e-12 };
}

/// The mean of all vectors on the sphere (Karcher mean of their directions), times the mean of
/// their norms; `weights` sum to 1.
///
/// A zero vector has no direction and counts in the mean norm only. The angle of the step is the
/// largest between any two.
pub fn spherical_mean(gram: &Gram, weights: &[f64], epsilon: f64, stop: Stop) -> Combination {
    let norms: Vec<f64> = (0..gram.len()).map(|i| gram.get(i, i).sqrt()).collect();
    let step = widest(gram, &norms, epsilon);
    let linear = || Combination { coefficients: weights.to_vec(), steps: vec![step] };
    if step.branch != Branch::Slerp {
        return linear();
    }
    let Some(mean) = karcher(gram, &norms, weights, stop) else {
        let steps = vec![Step { branch: Branch::Opposite, ..step }];
        return Combination { steps, ..linear() };
    };
    let scale: f64 = norms.iter().zip(weights).map(|(n, w)| n * w).sum();
    Combination { coefficients: mean.iter().map(|c| c * scale).collect(), steps: vec![step] }
}

/// Step between the two vectors that are farthest apart.
fn widest(gram: &Gram, norms: &[f64], epsilon: f64) -> Step {
    let mut widest = Step { branch: Branch::Zero, angle: None };
    for i in 0..gram.len() {
        for j in 0..i {
            let step = Step::between(norms[i], norms[j], gram.get(i, j), epsilon);
            if step.angle > widest.angle {
                widest = step;
            }
        }
    }
    widest
}

/// Coefficients of the unit vector that is the mean of the directions; `None` if the mean is
/// undefined.
fn karcher(gram: &Gram, norms: &[f64], weights: &[f64], stop: Stop) -> Option<Vec<f64>> {
    let with_direction = |i: &usize| norms[*i] > stop.tol.min(1e-5);
    let directed: Vec<usize> = (0..gram.len()).filter(with_direction).collect();
    let mut mean = vec![0.0; gram.len()];
    directed.iter().for_each(|&i| mean[i] = weights[i] / norms[i]);
    normalise(gram, &mut mean)?;
    let total: f64 = directed.iter().map(|&i| weights[i]).sum();
    for _ in 0..stop.max_iter {
        let mut step = vec![0.0; gram.len()];
        for &i in &directed {
            let cos = (gram.with(i, &mean) / norms[i]).clamp(-1.0, 1.0);
            let sin = ((1.0 - cos) * (1.0 + cos)).sqrt();
            // The direction's logarithm at the mean: its tangent part, stretched to the length of
            // the angle.
            let stretch = if sin > 1e-12 { sin.atan2(cos) / sin } else { 1.0 };
            let weight = weights[i] / total * stretch;
            step.iter_mut().zip(&mean).for_each(|(s, m)| *s -= weight * cos * m);
            step[i] += weight / norms[i];
        }
        let size = gram.norm(&step);
        if size < stop.tol {
            break;
        }
        let ratio = size.sin() / size;
        mean.iter_mut().zip(&step).for_each(|(m, s)| *m = size.cos() * *m + ratio * s);
        normalise(gram, &mut mean)?;
    }
    Some(mean)
}

fn normalise(gram: &Gram, c: &mut [f64]) -> Option<()> {
    let norm = gram.norm(c);
    if norm == 0.0 {
        return None;
    }
    c.iter_mut().for_each(|x| *x /= norm);
    Some(())
}

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

    fn epsilon() -> f64 {
        COLLINEAR_COSINE.acos()
    }

    #[test]
    fn a_quarter_circle_is_halved() {
        let gram = Gram::of(&[vec![1.0, 0.0], vec![0.0, 1.0]]);
        let half = fold(&gram, &[0.5], epsilon());
        assert_eq!(half.steps[0].branch, Branch::Slerp);
        for c in &half.coefficients {
            assert!((c - 0.5f64.sqrt()).abs() < 1e-15, "{half:?}");
        }
    }

    #[test]
    fn exact_cancellation_counts_as_a_zero_norm() {
        let a = vec![0.1, -0.7, 0.3];
        let gram = Gram::of(&[a.clone(), a.iter().map(|x| -x).collect(), vec![1.0, 2.0, 3.0]]);
        let folded = fold(&gram, &[0.5, 1.0 / 3.0], epsilon());
        let branches: Vec<Branch> = folded.steps.iter().map(|s| s.branch).collect();
        assert_eq!(branches, [Branch::Opposite, Branch::Zero]);
        assert_eq!(folded.coefficients[2], 1.0 / 3.0);
    }

    #[test]
    fn the_mean_of_three_axes_lies_between_them() {
        let axes: Vec<Vec<f64>> = (0..3).map(|i| (0..3).map(|j| f64::from(u8::from(i == j))).collect()).collect();
        let mean = spherical_mean(&Gram::of(&axes), &[1.0 / 3.0; 3], epsilon(), Stop::FULL);
        for c in &mean.coefficients {
            assert!((c - 1.0 / 3.0f64.sqrt()).abs() < 1e-12, "{mean:?}");
        }
    }

    #[test]
    fn few_iterations_stop_before_the_mean() {
        let vectors = [vec![1.0, 0.0, 0.0], vec![0.0, 1.0, 0.0], vec![-0.8, 0.0, 0.6]];
        let mean = |max_iter| {
            let stop = Stop { max_iter, tol: 1e-12 };
            spherical_mean(&Gram::of(&vectors), &[1.0 / 3.0; 3], 0.0, stop).coefficients
        };
        let far = |n| mean(n).iter().zip(mean(1000)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far(0) > far(1) && far(1) > far(5) && far(5) > 1e-9, "{} {} {}", far(0), far(1), far(5));
        assert!(far(200) < 1e-12, "{}", far(200));
    }

    #[test]
    fn a_zero_vector_shortens_the_mean_and_does_not_turn_it() {
        let vectors = [vec![2.0, 0.0], vec![0.0, 2.0], vec![0.0, 0.0]];
        let mean = spherical_mean(&Gram::of(&vectors), &[1.0 / 3.0; 3], epsilon(), Stop::FULL);
        assert_eq!(mean.steps[0].branch, Branch::Slerp);
        for i in 0..2 {
            assert!((2.0 * mean.coefficients[i] - 4.0 / 3.0 * 0.5f64.sqrt()).abs() < 1e-12, "{mean:?}");
        }
    }

    #[test]
    fn directions_without_a_mean_fall_back_to_the_linear_form() {
        let third = 2.0 * PI / 3.0;
        let fan: Vec<Vec<f64>> =
            (0..3).map(|i| vec![(f64::from(i) * third).cos(), (f64::from(i) * third).sin()]).collect();
        let mean = spherical_mean(&Gram::of(&fan), &[1.0 / 3.0; 3], epsilon(), Stop::FULL);
        assert_eq!(mean.steps[0].branch, Branch::Opposite);
        assert_eq!(mean.coefficients, [1.0 / 3.0; 3]);
    }

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
