//! Statistics that need whole rows, columns or matrices, read in bands of rows.

use std::ops::Range;

use anyhow::Result;
use cpift_core::dispatch;
use cpift_core::stream::cuts::{self, Elements, Found, Largest};
use cpift_core::stream::select::GROUP;
use cpift_core::stream::ties::TieSalt;
use rayon::prelude::*;

use super::job::{self, BLOCK, Block, CHUNK, Job, Piece, Pool, Shared, Tensor};
use crate::methods::magprune::{Rows, Space as RowSpace, prune};
use crate::methods::pointwise::{Figures, divergence, importance, rows_in, sce_weights, variances};
use crate::methods::sign_merge::{Filter, Keep, Number, keep_packed, rescaling, subtract_base, sum_of_magnitudes};
use crate::methods::sphere::Gram;
use crate::methods::{Along, Combine, SignMerge, Spectral, spectral as singular};
use crate::request::Space;

/// Coefficients of a linear combination by row or column.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Grouped {
    /// Number of operands.
    k: usize,
    /// One coefficient per operand for each group.
    coefficients: Vec<f64>,
    /// Number of neighbouring elements of one group.
    run: usize,
    /// Number of groups.
    groups: usize,
}

impl Grouped {
    /// Writes the combination of a block, the first element of which is element `start`.
    #[inline(always)]
    pub fn apply<T: Number>(&self, start: usize, operands: &[Vec<T>], base: Option<&[T]>, out: &mut [T]) {
        for (j, o) in out.iter_mut().enumerate() {
            let group = (start + j) / self.run % self.groups;
            let coefficients = &self.coefficients[group * self.k..(group + 1) * self.k];
            let terms = coefficients.iter().zip(operands);
            *o = T::from_f64(match base {
                None => terms.map(|(c, values)| c * values[j].to_f64()).sum::<f64>(),
                Some(base) => {
                    let origin = base[j].to_f64();
                    origin + terms.map(|(c, values)| c * (values[j].to_f64() - origin)).sum::<f64>()
                }
            });
        }
    }
}

/// Evaluates a generic function with the buffers for the type in which the tensor is merged.
macro_rules! by_width {
    ($shared:expr, $tensor:expr, $function:ident($($argument:expr),*)) => {
        if $tensor.is_wide() {
            $function($shared.job, &$shared.wide, $tensor, $($argument),*)
        } else {
            $function($shared.job, &$shared.narrow, $tensor, $($argument),*)
        }
    };
}

/// Coefficients of each row or column.
///
/// # Errors
/// [`cpift_core::BadInput`] naming file, tensor and element if a number is not finite.
pub(super) fn grouped(shared: &Shared<'_>, tensor: &Tensor<'_>, combine: &Combine, along: Along) -> Result<Grouped> {
    match tensor.operands[0].view.shape {
        [first, _, ..] if along == Along::Columns => by_width!(shared, tensor, columns(combine, *first)),
        shape => by_width!(shared, tensor, by_rows(combine, row_of(shape))),
    }
}

/// Number of elements of a row: of a tensor of one dimension all.
fn row_of(shape: &[usize]) -> usize {
    shape.last().copied().unwrap_or(1)
}

/// Filters of task vectors that are dropped by the ranks in each row.
///
/// # Errors
/// As [`grouped`].
pub(super) fn pruned(shared: &Shared<'_>, tensor: &Tensor<'_>, rule: &SignMerge) -> Result<Vec<Filter>> {
    by_width!(shared, tensor, prune_rows(rule))
}

/// Weights of the task vectors and the elements that SCE keeps.
///
/// # Errors
/// As [`grouped`].
pub(super) fn sce(shared: &Shared<'_>, tensor: &Tensor<'_>, select_topk: f64) -> Result<Figures> {
    by_width!(shared, tensor, select(select_topk))
}

/// Divergence of each row, and the threshold of importance.
///
/// # Errors
/// As [`grouped`].
pub(super) fn fusion(shared: &Shared<'_>, tensor: &Tensor<'_>) -> Result<Figures> {
    by_width!(shared, tensor, important())
}

/// Merged task vector of a method by singular vectors.
///
/// # Errors
/// As [`grouped`].
pub(super) fn spectral(shared: &Shared<'_>, tensor: &Tensor<'_>, rule: &Spectral) -> Result<Vec<f32>> {
    by_width!(shared, tensor, singular_vectors(rule))
}

/// Loads elements of a tensor; those that are protected become zero in every operand.
fn load<T: Number>(job: &Job<'_>, tensor: &Tensor<'_>, range: Range<usize>, block: &mut Block<T>) -> Result<()> {
    let (start, len) = (range.start, range.len());
    if dispatch!(load_block(job, tensor, range.clone(), block)) {
        Ok(())
    } else {
        Err(tensor.not_finite(start, len).into())
    }
}

/// As [`load`]; returns false if a number is not finite.
#[inline(always)]
fn load_block<T: Number>(job: &Job<'_>, tensor: &Tensor<'_>, range: Range<usize>, block: &mut Block<T>) -> bool {
    let with_base = job.space == Space::Delta || job.base_is_separate;
    let finite = block.load(tensor, range.start, range.len(), with_base);
    if let Some(region) = tensor.protected {
        block.clear(region, range.start);
    }
    finite
}

/// Calls `each` with the elements of every band of whole slabs of `slab` elements, and returns the
/// results in order. A band begins at a multiple of 8.
fn bands<T: Number, R: Send>(
    job: &Job<'_>,
    pool: &Pool<T>,
    tensor: &Tensor<'_>,
    slab: usize,
    each: impl Fn(usize, &mut Block<T>) -> R + Sync + Send,
) -> Result<Vec<R>> {
    let numel = tensor.numel();
    let band = slab * (CHUNK / slab).next_multiple_of(8).max(8);
    let starts: Vec<usize> = (0..numel).step_by(band).collect();
    let results: Vec<Result<R>> = starts
        .into_par_iter()
        .with_max_len(1)
        .map(|start| {
            pool.with(|block, _| {
                load(job, tensor, start..numel.min(start + band), block)?;
                Ok(each(start, block))
            })
        })
        .collect();
    results.into_iter().collect()
}

fn by_rows<T: Number>(
    job: &Job<'_>,
    pool: &Pool<T>,
    tensor: &Tensor<'_>,
    combine: &Combine,
    row: usize,
) -> Result<Grouped> {
    let k = tensor.operands.len();
    let about_base = job.space == Space::Delta;
    let coefficients = bands(job, pool, tensor, row, |_, block| {
        let mut coefficients = Vec::new();
        for at in (0..block.operands[0].len()).step_by(row) {
            let pieces: Vec<&[T]> = block.operands.iter().map(|values| &values[at..at + row]).collect();
            let mut gram = Gram::zero(k);
            gram.accumulate(&pieces, about_base.then(|| &block.base[at..at + row]));
            coefficients.extend(combine.combination(&gram).coefficients);
        }
        coefficients
    })?;
    Ok(Grouped { k, coefficients: coefficients.concat(), run: row, groups: tensor.numel() / row })
}

fn columns<T: Number>(
    job: &Job<'_>,
    pool: &Pool<T>,
    tensor: &Tensor<'_>,
    combine: &Combine,
    rows: usize,
) -> Result<Grouped> {
    /// Number of columns that are read together.
    const WIDTH: usize = 1 << 9;
    let k = tensor.operands.len();
    let columns = tensor.numel() / rows;
    let about_base = job.space == Space::Delta;
    let of_strip = |first: usize| -> Result<Vec<f64>> {
        let width = WIDTH.min(columns - first);
        let mut sums = vec![vec![0.0; k * k]; width];
        pool.with(|block, _| -> Result<()> {
            for row in 0..rows {
                let start = row * columns + first;
                load(job, tensor, start..start + width, block)?;
                for (c, sums) in sums.iter_mut().enumerate() {
                    let origin = if about_base { block.base[c].to_f64() } else { 0.0 };
                    for i in 0..k {
                        for j in 0..k {
                            sums[i * k + j] +=
                                (block.operands[i][c].to_f64() - origin) * (block.operands[j][c].to_f64() - origin);
                        }
                    }
                }
            }
            Ok(())
        })?;
        let of_column = |sums: Vec<f64>| combine.combination(&Gram::from_entries(k, sums)).coefficients;
        Ok(sums.into_iter().flat_map(of_column).collect())
    };
    let strips: Vec<usize> = (0..columns).step_by(WIDTH).collect();
    let strips: Vec<Result<Vec<f64>>> = strips.into_par_iter().map(of_strip).collect();
    let coefficients = strips.into_iter().collect::<Result<Vec<_>>>()?.concat();
    Ok(Grouped { k, coefficients, run: 1, groups: columns })
}

fn prune_rows<T: Number>(job: &Job<'_>, pool: &Pool<T>, tensor: &Tensor<'_>, rule: &SignMerge) -> Result<Vec<Filter>> {
    let rows = Rows::of(tensor.operands[0].view.shape);
    let slab = rows.slab();
    // Packed bits of each task vector, and its sums of magnitudes before and after the drop.
    let parts = bands(job, pool, tensor, slab, |start, block| {
        let mut space = RowSpace::default();
        let Block { operands, base, .. } = block;
        let of_vector = |(values, vector): (&mut Vec<T>, &_)| {
            let mut bits = vec![0u8; values.len().div_ceil(8)];
            let sums = dispatch!({
                let before = sum_of_magnitudes(values);
                prune(values, start, rows, vector, &mut space, &mut bits);
                keep_packed(&bits, 0, values);
                [before, sum_of_magnitudes(values)]
            });
            (bits, sums)
        };
        dispatch!(subtract_base(operands, base));
        operands.iter_mut().zip(&rule.vectors).map(of_vector).collect::<Vec<_>>()
    })?;
    let filter = |(i, vector): (usize, &crate::methods::sign_merge::TaskVector)| match vector.density {
        density if density >= 1.0 => Filter::ALL,
        density if density <= 0.0 => Filter::NONE,
        _ => {
            let [before, after] = parts.iter().fold([0.0; 2], |[a, b], part| [a + part[i].1[0], b + part[i].1[1]]);
            let bits = parts.iter().flat_map(|part| part[i].0.iter().copied()).collect();
            Filter { keep: Keep::Bits(bits), scale: if rule.rescale { rescaling(before, after) } else { 1.0 } }
        }
    };
    Ok(rule.vectors.iter().enumerate().map(filter).collect())
}

/// Scores of the elements, computed from a loaded block.
struct Scores<'a, F> {
    job: &'a Job<'a>,
    tensor: &'a Tensor<'a>,
    /// Puts the scores of a loaded block, which begins at an element, into a slice.
    score: F,
}

impl<T: Number, F: Fn(usize, &mut Block<T>, &mut [T]) + Sync> Elements<T> for Scores<'_, F> {
    type Space = Block<T>;

    fn count(&self) -> usize {
        self.tensor.numel()
    }

    fn space(&self) -> Block<T> {
        Block::new(self.tensor.operands.len())
    }

    #[inline(always)]
    fn read(&self, start: usize, scores: &mut [T], block: &mut Block<T>) -> bool {
        let finite = load_block(self.job, self.tensor, start..start + scores.len(), block);
        (self.score)(start, block, scores);
        // A difference can overflow although both values are finite.
        let infinity = T::from_f64(f64::INFINITY);
        scores.iter_mut().for_each(|s| *s = if *s >= T::default() { *s } else { infinity });
        finite
    }
}

/// Scores of the elements of `tensor`, which `score` puts into a slice.
fn scores<'a, T: Number, F: Fn(usize, &mut Block<T>, &mut [T]) + Sync>(
    job: &'a Job<'a>,
    tensor: &'a Tensor<'a>,
    score: F,
) -> Scores<'a, F> {
    Scores { job, tensor, score }
}

/// The `ks` largest scores, of equal ones those with the smallest tie hashes of the first model.
fn ranked<T: Number, F: Fn(usize, &mut Block<T>, &mut [T]) + Sync>(
    scores: &Scores<'_, F>,
    ks: &[u64],
) -> Result<Vec<Largest<T>>> {
    let tensor = scores.tensor;
    let key = || {
        let base = tensor.base.as_ref().expect("scores are about a base");
        Ok(TieSalt::new(tensor.operands[0].source.digest()?).key(base.name))
    };
    match cuts::largest(scores, tensor.numel() as u64, ks, key)? {
        Found::All(found) => Ok(found),
        Found::NoScore(start, len) => Err(tensor.not_finite(start, len).into()),
    }
}

fn select<T: Number>(job: &Job<'_>, pool: &Pool<T>, tensor: &Tensor<'_>, select_topk: f64) -> Result<Figures> {
    /// Blocks whose sums of squares are taken side by side: each sum is a chain of additions.
    const SIDE: usize = 4;
    let scores = scores(
        job,
        tensor,
        #[inline(always)]
        |_, block: &mut Block<T>, out: &mut [T]| {
            subtract_base(&mut block.operands, &block.base);
            let Block { operands, sums, divisors, .. } = block;
            variances(operands, [&mut sums[..out.len()], &mut divisors[..out.len()]], out);
        },
    );
    let pieces: Vec<Piece> = job::pieces_of(0, tensor.numel()).collect();
    let largest: Option<Largest<T>> = if select_topk < 1.0 {
        let differ = job::for_each(&pieces, |piece| {
            let (mut found, mut block) = (vec![T::default(); BLOCK], Elements::<T>::space(&scores));
            let count = dispatch!({
                let mut count = Ok(0);
                for (start, len) in piece.blocks() {
                    let found = &mut found[..len];
                    if !scores.read(start, found, &mut block) {
                        count = Err((start, len));
                        break;
                    }
                    let nonzero = found.iter().fold(0u64, |n, s| n + u64::from(*s != T::default()));
                    count = count.map(|sum| sum + nonzero);
                }
                count
            });
            count.map_err(|(start, len)| tensor.not_finite(start, len).into())
        })?;
        match (differ.iter().sum::<u64>() as f64 * select_topk) as u64 {
            0 => {
                let kept = Some(vec![0; tensor.numel().div_ceil(8)]);
                return Ok(Figures {
                    factors: sce_weights(&vec![0.0; tensor.operands.len()]),
                    kept,
                    ..Figures::default()
                });
            }
            k => ranked(&scores, &[k])?.pop(),
        }
    } else {
        None
    };
    // Packed bits of the elements that are kept, and sums of their squares.
    let parts = job::for_each(&pieces, |piece| {
        pool.with(|block, _| -> Result<(Vec<u8>, Vec<f64>)> {
            let mut bits = vec![0u8; largest.map_or(0, |_| piece.elements.len().div_ceil(8))];
            let mut sums = vec![0.0; tensor.operands.len()];
            let mut scores = [T::default(); SIDE * BLOCK];
            let (mut means, mut squares) = (vec![0.0; SIDE * BLOCK], vec![0.0; SIDE * BLOCK]);
            for start in piece.elements.clone().step_by(SIDE * BLOCK) {
                let len = (SIDE * BLOCK).min(piece.elements.end - start);
                load(job, tensor, start..start + len, block)?;
                dispatch!({
                    subtract_base(&mut block.operands, &block.base);
                    if let Some(largest) = &largest {
                        let scores = &mut scores[..len];
                        variances(&block.operands, [&mut means[..len], &mut squares[..len]], scores);
                        let words = bits[(start - piece.elements.start) / 8..].chunks_mut(8);
                        for ((group, scores), bytes) in scores.chunks(GROUP).enumerate().zip(words) {
                            let word = largest.chosen(start + GROUP * group, scores);
                            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
                        }
                        let bits = &bits[(start - piece.elements.start) / 8..];
                        block.operands.iter_mut().for_each(|values| keep_packed(bits, 0, values));
                    }
                    for (values, sum) in block.operands.iter().zip(&mut sums) {
                        for of_block in sums_of_squares::<T, SIDE>(values) {
                            *sum += of_block;
                        }
                    }
                });
            }
            Ok((bits, sums))
        })
    })?;
    let mean = |i: usize| parts.iter().map(|(_, sums)| sums[i]).sum::<f64>() / tensor.numel() as f64;
    let means: Vec<f64> = (0..tensor.operands.len()).map(mean).collect();
    let kept = largest.map(|_| parts.iter().flat_map(|(bits, _)| bits.iter().copied()).collect());
    Ok(Figures { factors: sce_weights(&means), kept, ..Figures::default() })
}

/// Sum of squares of each block of at most `N`, the numbers of a block in their order.
#[inline(always)]
fn sums_of_squares<T: Number, const N: usize>(values: &[T]) -> impl Iterator<Item = f64> {
    let mut sums = [0.0; N];
    if values.len() == N * BLOCK {
        for j in 0..BLOCK {
            for (block, sum) in sums.iter_mut().enumerate() {
                let v = values[block * BLOCK + j].to_f64();
                *sum += v * v;
            }
        }
    } else {
        let of_block = |block: &[T]| block.iter().map(|v| v.to_f64() * v.to_f64()).sum::<f64>();
        values.chunks(BLOCK).zip(&mut sums).for_each(|(block, sum)| *sum = of_block(block));
    }
    sums.into_iter().take(values.len().div_ceil(BLOCK))
}

fn important<T: Number>(job: &Job<'_>, pool: &Pool<T>, tensor: &Tensor<'_>) -> Result<Figures> {
    let (numel, row) = (tensor.numel(), row_of(tensor.operands[0].view.shape));
    let of_band = |_, block: &mut Block<T>| {
        let rows = block.operands[0].chunks(row).zip(block.base.chunks(row));
        rows.map(|(model, base)| divergence(model, base).max(0.0)).collect::<Vec<f64>>()
    };
    let divergence = bands(job, pool, tensor, row, of_band)?.concat();
    let scores = scores(
        job,
        tensor,
        #[inline(always)]
        |start, block: &mut Block<T>, out: &mut [T]| {
            for (i, range) in rows_in(start, out.len(), row) {
                let pairs = block.operands[0][range.clone()].iter().zip(&block.base[range.clone()]);
                out[range].iter_mut().zip(pairs).for_each(|(o, (m, b))| *o = importance(*m, *b, divergence[i]));
            }
        },
    );
    // The elements of these ranks among those in ascending order.
    let ranks = [0.25, 0.5, 0.75].map(|share| numel as u64 - (share * (numel - 1) as f64) as u64);
    let found = ranked(&scores, &ranks)?;
    let [low, median, high] = [0, 1, 2].map(|i| found[i].cut.threshold);
    let threshold = (median + T::from_f64(1.5) * (high - low)).to_f64();
    Ok(Figures { divergence, row, threshold, ..Figures::default() })
}

fn singular_vectors<T: Number>(
    job: &Job<'_>,
    pool: &Pool<T>,
    tensor: &Tensor<'_>,
    rule: &Spectral,
) -> Result<Vec<f32>> {
    // One task vector at a time, in f32.
    let read = |i: usize| -> Result<Vec<f32>> {
        let parts = bands(job, pool, tensor, 1, |_, block| {
            let pairs = block.operands[i].iter().zip(&block.base);
            pairs.map(|(v, b)| (v.to_f64() - b.to_f64()) as f32).collect::<Vec<f32>>()
        })?;
        Ok(parts.concat())
    };
    singular::merge(rule.kind, tensor.operands[0].view.shape, tensor.operands.len(), read)
}
