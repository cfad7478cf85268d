//! Methods by singular vectors: TSV-M (arXiv 2412.00081) and Iso-C (arXiv 2502.04959), as their
//! authors' programs compute them, and WUDI (arXiv 2503.08099), whose minimum is computed exactly.
//!
//! Decompositions are in f64 on one thread each, so that the result does not depend on the number
//! of threads. Tensors that are not matrices get the mean of the task vectors.

use anyhow::{Result, anyhow};
use faer::{Mat, MatRef, Side};
use rayon::prelude::*;

/// Eigenvalues up to this share of the largest count as zero.
const NEGLIGIBLE: f64 = 1e-10;

/// Settings of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spectral {
    /// Method.
    pub kind: Kind,
    /// Factor of the merged task vector.
    pub lambda: f64,
}

/// Method by singular vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The largest singular vectors of each of k task vectors, a share of 1/k, made orthogonal to
    /// one another.
    TsvM,
    /// The sum of the task vectors, with all its singular values equal to their mean.
    IsoC,
    /// The matrix T with the least interference, Σ ‖(T − δᵢ) δᵢᵀ‖² / ‖δᵢ‖²; of several the nearest
    /// to the sum of the task vectors.
    Wudi,
}

impl Kind {
    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::TsvM => "TSV-M",
            Self::IsoC => "Iso-C",
            Self::Wudi => "WUDI",
        }
    }
}

/// Merges `k` task vectors of this shape; `read` returns the elements of one.
///
/// # Errors
/// Those of `read`, and a decomposition that does not converge.
pub(crate) fn merge(
    kind: Kind,
    shape: &[usize],
    k: usize,
    read: impl Fn(usize) -> Result<Vec<f32>> + Sync,
) -> Result<Vec<f32>> {
    let &[rows, columns] = shape else {
        let sum = sum(k, &read)?;
        return Ok(sum.into_iter().map(|x| (x / k as f64) as f32).collect());
    };
    let matrix = |values: Vec<f32>| Mat::from_fn(rows, columns, |i, j| f64::from(values[i * columns + j]));
    let merged = match kind {
        Kind::IsoC => {
            let sum = sum(k, &read)?;
            isotropic(Mat::from_fn(rows, columns, |i, j| sum[i * columns + j]).as_ref())?
        }
        Kind::TsvM => {
            let rank = rows.min(columns);
            let share = ((rank as f64 * (1.0 / k as f64)) as usize).max(1);
            let of_task = |i| largest(matrix(read(i)?).as_ref(), share);
            // Results are collected in the order of the tasks.
            let parts: Vec<Result<Part>> = (0..k).into_par_iter().map(of_task).collect();
            orthogonal(&parts.into_iter().collect::<Result<Vec<_>>>()?, share)?
        }
        Kind::Wudi => least_interference(rows, columns, (0..k).map(|i| Ok(matrix(read(i)?))))?,
    };
    Ok((0..rows * columns).map(|at| merged[(at / columns, at % columns)] as f32).collect())
}

/// Sum of the task vectors.
fn sum(k: usize, read: &impl Fn(usize) -> Result<Vec<f32>>) -> Result<Vec<f64>> {
    let mut sum: Vec<f64> = read(0)?.into_iter().map(f64::from).collect();
    for i in 1..k {
        sum.iter_mut().zip(read(i)?).for_each(|(s, v)| *s += f64::from(v));
    }
    Ok(sum)
}

/// U, the singular values and V of a thin singular value decomposition.
struct Part {
    left: Mat<f64>,
    values: Vec<f64>,
    right: Mat<f64>,
}

fn decompose(matrix: MatRef<'_, f64>) -> Result<Part> {
    let svd = matrix.thin_svd().map_err(|_| anyhow!("a singular value decomposition did not converge"))?;
    let values = svd.S().column_vector().iter().copied().collect();
    Ok(Part { left: svd.U().to_owned(), values, right: svd.V().to_owned() })
}

/// The largest `share` singular values with their vectors.
fn largest(matrix: MatRef<'_, f64>, share: usize) -> Result<Part> {
    let Part { left, mut values, right } = decompose(matrix)?;
    values.truncate(share);
    let first = |m: Mat<f64>| m.as_ref().subcols(0, share).to_owned();
    Ok(Part { left: first(left), values, right: first(right) })
}

/// The matrix with the singular vectors of all parts, each made orthogonal to those of the others.
fn orthogonal(parts: &[Part], share: usize) -> Result<Mat<f64>> {
    let joined = |of: fn(&Part) -> &Mat<f64>| {
        let rows = of(&parts[0]).nrows();
        Mat::from_fn(rows, parts.len() * share, |i, j| of(&parts[j / share])[(i, j % share)])
    };
    let mut left = polar(joined(|part| &part.left).as_ref())?;
    let right = polar(joined(|part| &part.right).as_ref())?;
    for (j, value) in parts.iter().flat_map(|part| &part.values).enumerate() {
        (0..left.nrows()).for_each(|i| left[(i, j)] *= value);
    }
    Ok(&left * right.transpose())
}

/// The nearest matrix with orthogonal columns.
fn polar(matrix: MatRef<'_, f64>) -> Result<Mat<f64>> {
    let Part { left, right, .. } = decompose(matrix)?;
    Ok(&left * right.transpose())
}

/// The matrix with all singular values equal to their mean.
fn isotropic(matrix: MatRef<'_, f64>) -> Result<Mat<f64>> {
    let Part { left, values, right } = decompose(matrix)?;
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let mut result = &left * right.transpose();
    (0..result.ncols()).for_each(|j| (0..result.nrows()).for_each(|i| result[(i, j)] *= mean));
    Ok(result)
}

/// The minimum of [`Kind::Wudi`] over matrices of `rows` by `columns`. Its gradient is
/// 2 (T C − R), with C = Σ δᵢᵀδᵢ / ‖δᵢ‖² and R = Σ δᵢ δᵢᵀδᵢ / ‖δᵢ‖²; descent from the sum S of
/// the task vectors ends at S + (R − S C) C⁺.
fn least_interference(
    rows: usize,
    columns: usize,
    vectors: impl Iterator<Item = Result<Mat<f64>>>,
) -> Result<Mat<f64>> {
    let mut sum = Mat::<f64>::zeros(rows, columns);
    let mut target = Mat::<f64>::zeros(rows, columns);
    let mut curvature = Mat::<f64>::zeros(columns, columns);
    for vector in vectors {
        let vector = vector?;
        let size = vector.squared_norm_l2();
        if size > 0.0 {
            let gram = vector.transpose() * &vector * faer::Scale(1.0 / size);
            target += &vector * &gram;
            curvature += gram;
            sum += vector;
        }
    }
    let residual = target - &sum * &curvature;
    let eigen = curvature
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| anyhow!("an eigenvalue decomposition did not converge"))?;
    let values = eigen.S().column_vector();
    let largest = values.iter().copied().fold(0.0, f64::max);
    let mut in_eigenvectors = residual * eigen.U();
    for (j, &value) in values.iter().enumerate() {
        let inverse = if value > NEGLIGIBLE * largest { 1.0 / value } else { 0.0 };
        (0..rows).for_each(|i| in_eigenvectors[(i, j)] *= inverse);
    }
    Ok(sum + in_eigenvectors * eigen.U().transpose())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpift_core::stream::random::splitmix64;

    fn random(seed: u64, n: usize) -> Vec<f32> {
        (0..n).map(|i| (splitmix64(seed, i as u64) >> 40) as f32 / (1 << 24) as f32 - 0.5).collect()
    }

    fn merged(kind: Kind, shape: &[usize], vectors: &[Vec<f32>]) -> Vec<f32> {
        merge(kind, shape, vectors.len(), |i| Ok(vectors[i].clone())).unwrap()
    }

    #[track_caller]
    fn assert_near(found: &[f32], expected: &[f32]) {
        let far = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(found.len() == expected.len() && far < 1e-6, "{far}");
    }

    #[test]
    fn one_task_vector_is_its_own_tsv_merge() {
        for shape in [[7, 5], [5, 7], [1, 6], [6, 1]] {
            let vector = random(1, shape[0] * shape[1]);
            assert_near(&merged(Kind::TsvM, &shape, std::slice::from_ref(&vector)), &vector);
        }
    }

    #[test]
    fn task_vectors_of_orthogonal_directions_are_summed_by_tsv() {
        // Rank one each, in rows and columns that the other does not touch.
        let (mut a, mut b) = (vec![0.0; 8], vec![0.0; 8]);
        (a[0], a[1], b[6], b[7]) = (3.0, 4.0, 1.0, -2.0);
        let sum: Vec<f32> = a.iter().zip(&b).map(|(x, y)| x + y).collect();
        assert_near(&merged(Kind::TsvM, &[2, 4], &[a, b]), &sum);
    }

    #[test]
    fn iso_c_has_equal_singular_values_with_the_sum_of_the_nuclear_norm() {
        let vectors = [random(1, 40), random(2, 40)];
        let result = merged(Kind::IsoC, &[8, 5], &vectors);
        let values =
            |m: &dyn Fn(usize) -> f64| decompose(Mat::from_fn(8, 5, |i, j| m(i * 5 + j)).as_ref()).unwrap().values;
        let before = values(&|at| f64::from(vectors[0][at]) + f64::from(vectors[1][at]));
        let mean = before.iter().sum::<f64>() / 5.0;
        assert!(before[0] / before[4] > 1.5);
        for value in values(&|at| f64::from(result[at])) {
            assert!((value - mean).abs() < 1e-6, "{value} {mean}");
        }
    }

    /// Σ ‖(T − δᵢ) δᵢᵀ‖² / ‖δᵢ‖².
    fn interference(merged: &[f32], vectors: &[Vec<f32>], [rows, columns]: [usize; 2]) -> f64 {
        let of = |vector: &Vec<f32>| {
            let size: f64 = vector.iter().map(|x| f64::from(x * x)).sum();
            let entry = |i: usize, j: usize| {
                let terms = (0..columns).map(|c| {
                    let difference = merged[i * columns + c] - vector[i * columns + c];
                    f64::from(difference) * f64::from(vector[j * columns + c])
                });
                terms.sum::<f64>()
            };
            (0..rows * rows).map(|at| entry(at / rows, at % rows).powi(2)).sum::<f64>() / size
        };
        vectors.iter().map(of).sum()
    }

    #[test]
    fn wudi_has_the_least_interference_and_keeps_one_task_vector() {
        for shape in [[8, 5], [5, 8]] {
            let vectors = [1, 2].map(|seed| random(seed, 40));
            let result = merged(Kind::Wudi, &shape, &vectors);
            let least = interference(&result, &vectors, shape);
            for seed in 3..20 {
                let beside: Vec<f32> = result.iter().zip(random(seed, 40)).map(|(x, y)| x + 0.01 * y).collect();
                assert!(interference(&beside, &vectors, shape) >= least * (1.0 - 1e-6), "{shape:?}");
            }
            let sum: Vec<f32> = vectors[0].iter().zip(&vectors[1]).map(|(x, y)| x + y).collect();
            assert!(interference(&sum, &vectors, shape) > 2.0 * least, "{shape:?}");
            assert_near(&merged(Kind::Wudi, &shape, &vectors[..1]), &vectors[0]);
            let unchanged = vec![0.0; 40];
            assert_near(&merged(Kind::Wudi, &shape, &[unchanged.clone(), vectors[0].clone()]), &vectors[0]);
            assert_near(&merged(Kind::Wudi, &shape, &[unchanged.clone(), unchanged.clone()]), &unchanged);
        }
        // Task vectors with no input in common do not interfere: they are summed.
        let (mut a, mut b) = (vec![0.0; 8], vec![0.0; 8]);
        (a[0], a[1], a[4], b[2], b[7]) = (3.0, 4.0, 1.0, 5.0, -2.0);
        let sum: Vec<f32> = a.iter().zip(&b).map(|(x, y)| x + y).collect();
        assert_near(&merged(Kind::Wudi, &[2, 4], &[a, b]), &sum);
    }

    #[test]
    fn tensors_that_are_not_matrices_get_the_mean() {
        let vectors = [vec![1.0, 2.0], vec![3.0, -2.0]];
        for kind in [Kind::TsvM, Kind::IsoC, Kind::Wudi] {
            assert_near(&merged(kind, &[2], &vectors), &[2.0, 0.0]);
            assert_near(&merged(kind, &[1, 2, 1], &vectors), &[2.0, 0.0]);
        }
    }
}
