//! The best approximation of a matrix by one of low rank: a truncated singular value decomposition
//! by subspace iteration in f64.
//!
//! Each step multiplies a block of vectors by the matrix and its transpose and orthonormalizes it.
//! The block has [`EXTRA`] vectors more than the rank, and the iteration ends when the share of the
//! matrix that it holds grows by less than [`TOLERANCE`]. A block as wide as the matrix is exact.

use cpift_core::stream::random::splitmix64;
use rayon::prelude::*;

/// Vectors in the block beyond the rank.
const EXTRA: usize = 16;

/// Relative growth of the squared norm at which the iteration ends.
const TOLERANCE: f64 = 1e-11;

/// Largest number of steps.
const STEPS: usize = 200;

/// Sweeps of the Jacobi rotations, of which 6 to 10 are usual.
const SWEEPS: usize = 40;

/// Rows or columns that one job multiplies.
const CHUNK: usize = 64;

/// Product of `rows` × `rank` and `rank` × `columns` matrices, both row-major, whose columns and
/// rows stand in the order of their singular values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Product {
    pub left: Vec<f32>,
    pub right: Vec<f32>,
    pub rank: usize,
}

/// Approximates the row-major `matrix` of `rows` × `columns` by a product of at most `rank`.
/// Singular values below 1e-12 of the largest are left out. `seed` starts the iteration.
pub(crate) fn truncated(matrix: &[f32], rows: usize, columns: usize, rank: usize, seed: u64) -> Product {
    let width = (rank + EXTRA).min(rows).min(columns);
    let mut block = random_vectors(width, columns, seed);
    let (mut basis, mut images) = (Vec::new(), Vec::new());
    let mut held = 0.0;
    for _ in 0..STEPS {
        basis = times(matrix, rows, columns, &block);
        orthonormalize(&mut basis);
        images = transposed_times(matrix, rows, columns, &basis);
        let now: f64 = images.iter().map(|image| dot(image, image)).sum();
        if now - held <= TOLERANCE * now || width == rows.min(columns) && held > 0.0 {
            break;
        }
        held = now;
        block.clone_from(&images);
        orthonormalize(&mut block);
    }
    // The matrix is about Σ basis · imageᵀ; rotations make the images orthogonal.
    rotate(&mut images, &mut basis);
    let mut order: Vec<(f64, usize)> = images.iter().map(|image| dot(image, image).sqrt()).zip(0..).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let largest = order.first().map_or(0.0, |(value, _)| *value);
    order.retain(|(value, _)| *value > 1e-12 * largest);
    order.truncate(rank);
    let rank = order.len();
    let (mut left, mut right) = (vec![0f32; rows * rank], Vec::with_capacity(rank * columns));
    for (k, (value, index)) in order.iter().enumerate() {
        let root = value.sqrt();
        basis[*index].iter().enumerate().for_each(|(row, v)| left[row * rank + k] = (v * root) as f32);
        right.extend(images[*index].iter().map(|v| (v / root) as f32));
    }
    Product { left, right, rank }
}

/// Relative error of `product` as an approximation of `matrix`: norm of the difference over norm.
pub(crate) fn error(matrix: &[f32], columns: usize, product: &Product) -> f64 {
    let row = |(row, values): (usize, &[f32])| {
        let mut sums: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        let norm = dot(&sums, &sums);
        for k in 0..product.rank {
            let factor = f64::from(product.left[row * product.rank + k]);
            let right = &product.right[k * columns..][..columns];
            sums.iter_mut().zip(right).for_each(|(sum, v)| *sum -= factor * f64::from(*v));
        }
        (dot(&sums, &sums), norm)
    };
    let parts: Vec<(f64, f64)> = matrix.par_chunks(columns.max(1)).enumerate().map(row).collect();
    let (difference, norm) = parts.iter().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
    if norm > 0.0 { (difference / norm).sqrt() } else { 0.0 }
}

/// `n` vectors of numbers between −½ and ½.
fn random_vectors(n: usize, len: usize, seed: u64) -> Vec<Vec<f64>> {
    let number = |index: usize| (splitmix64(seed, index as u64) >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
    (0..n).map(|k| (0..len).map(|i| number(k * len + i)).collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Products of the matrix and each vector of the block.
fn times(matrix: &[f32], rows: usize, columns: usize, block: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let width = block.len();
    let by_column: Vec<f64> = (0..columns).flat_map(|j| block.iter().map(move |vector| vector[j])).collect();
    let row = |values: &[f32]| {
        let mut sums = vec![0f64; width];
        for (value, factors) in values.iter().zip(by_column.chunks_exact(width)) {
            let value = f64::from(*value);
            sums.iter_mut().zip(factors).for_each(|(sum, factor)| *sum += value * factor);
        }
        sums
    };
    let by_row: Vec<Vec<f64>> = matrix.par_chunks_exact(columns).with_min_len(CHUNK).map(row).collect();
    (0..width).map(|k| (0..rows).map(|i| by_row[i][k]).collect()).collect()
}

/// Products of the transposed matrix and each vector of the block.
fn transposed_times(matrix: &[f32], rows: usize, columns: usize, block: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let width = block.len();
    let by_row: Vec<f64> = (0..rows).flat_map(|i| block.iter().map(move |vector| vector[i])).collect();
    let starts: Vec<usize> = (0..columns).step_by(CHUNK).collect();
    let part = |start: &usize| {
        let len = CHUNK.min(columns - start);
        let mut sums = vec![0f64; len * width];
        for (values, factors) in matrix.chunks_exact(columns).zip(by_row.chunks_exact(width)) {
            for (value, sums) in values[*start..start + len].iter().zip(sums.chunks_exact_mut(width)) {
                let value = f64::from(*value);
                sums.iter_mut().zip(factors).for_each(|(sum, factor)| *sum += value * factor);
            }
        }
        sums
    };
    let sums: Vec<f64> = starts.par_iter().map(part).collect::<Vec<_>>().concat();
    (0..width).map(|k| (0..columns).map(|j| sums[j * width + k]).collect()).collect()
}

/// Makes the vectors orthogonal and of norm 1, those that depend on earlier ones zero
/// (Gram-Schmidt, twice).
fn orthonormalize(block: &mut [Vec<f64>]) {
    for k in 0..block.len() {
        let (before, rest) = block.split_at_mut(k);
        let vector = &mut rest[0];
        let start = dot(vector, vector).sqrt();
        for _ in 0..2 {
            for other in before.iter() {
                let share = dot(other, vector);
                vector.iter_mut().zip(other).for_each(|(v, o)| *v -= share * o);
            }
        }
        let norm = dot(vector, vector).sqrt();
        let factor = if norm > 1e-13 * start && norm > 0.0 { 1.0 / norm } else { 0.0 };
        vector.iter_mut().for_each(|v| *v *= factor);
    }
}

/// Rotates pairs of vectors until all are orthogonal (one-sided Jacobi), and the `partners` with
/// them.
fn rotate(vectors: &mut [Vec<f64>], partners: &mut [Vec<f64>]) {
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for p in 0..vectors.len() {
            for q in p + 1..vectors.len() {
                let (a, b, c) =
                    (dot(&vectors[p], &vectors[p]), dot(&vectors[q], &vectors[q]), dot(&vectors[p], &vectors[q]));
                if c.abs() <= 1e-14 * (a * b).sqrt() || c == 0.0 {
                    continue;
                }
                rotated = true;
                let zeta = (b - a) / (2.0 * c);
                let t = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cos = 1.0 / t.hypot(1.0);
                for list in [&mut *vectors, &mut *partners] {
                    let (head, tail) = list.split_at_mut(q);
                    for (x, y) in head[p].iter_mut().zip(&mut tail[0]) {
                        (*x, *y) = (cos * (*x - t * *y), cos * (t * *x + *y));
                    }
                }
            }
        }
        if !rotated {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix with the given singular values: products of two orthonormal sets.
    fn with_values(rows: usize, columns: usize, values: &[f64]) -> Vec<f32> {
        let set = |len: usize| {
            let mut vectors = random_vectors(values.len(), len, len as u64);
            orthonormalize(&mut vectors);
            vectors
        };
        let (u, v) = (set(rows), set(columns));
        let element = |i: usize, j: usize| values.iter().enumerate().map(|(k, s)| s * u[k][i] * v[k][j]).sum::<f64>();
        (0..rows * columns).map(|at| element(at / columns, at % columns) as f32).collect()
    }

    #[test]
    fn the_error_is_that_of_the_singular_values_left_out() {
        // More values than the block is wide, falling slowly.
        let values: Vec<f64> = (0..60).map(|k| 0.9f64.powi(k)).collect();
        let total: f64 = values.iter().map(|v| v * v).sum();
        for (rows, columns) in [(70, 90), (90, 70)] {
            let matrix = with_values(rows, columns, &values);
            for rank in [1, 3, 20, 60] {
                let product = truncated(&matrix, rows, columns, rank, 1);
                let rest: f64 = values[rank..].iter().map(|v| v * v).sum();
                let (found, expected) = (error(&matrix, columns, &product), (rest / total).sqrt());
                assert!(
                    (found - expected).abs() < 2e-6,
                    "rank {rank} of {rows}×{columns}: {found}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn no_more_ranks_are_given_than_there_are() {
        let matrix = with_values(6, 5, &[2.0, 1.0]);
        let product = truncated(&matrix, 6, 5, 4, 1);
        assert!(product.rank >= 2 && error(&matrix, 5, &product) < 1e-6);
        assert_eq!(truncated(&[0.0; 12], 3, 4, 2, 1).rank, 0);
        let one = truncated(&[3.0], 1, 1, 1, 1);
        assert!((one.left[0] * one.right[0] - 3.0).abs() < 1e-6);
    }
}
