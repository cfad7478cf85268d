//! Statistics that need whole rows, columns or matrices, read in bands of rows.

use std::ops::Range;

use anyhow::Result;
use cpift_core::stream::select::{Cut, Source, find_cut};
use cpift_core::stream::ties::{TieSalt, find_tie_cut};
use rayon::prelude::*;

use super::job::{self, CHUNK, Job, Pool, Shared};
use super::tensor::{Block, Tensor};
use crate::methods::magprune::{Ranks, Rows, prune};
use crate::methods::pointwise::{Figures, divergence, importance, sce_weights, variance};
use crate::methods::sign_merge::{Filter, Keep, Number, rescaling, subtract_base, sum_of_magnitudes};
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
    let with_base = job.space == Space::Delta || job.base_is_separate;
    if !block.load(tensor, range.start, range.len(), with_base) {
        return Err(tensor.not_finite(range.start, range.len()).into());
    }
    if let Some(region) = tensor.protected {
        block.clear(region, range.start);
    }
    Ok(())
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
        subtract_base(&mut block.operands, &block.base);
        let mut ranks = Ranks::default();
        let of_vector = |(values, vector): (&mut Vec<T>, &_)| {
            let before = sum_of_magnitudes(values);
            let mut bits = vec![0u8; values.len().div_ceil(8)];
            prune(values, start, rows, vector, &mut ranks, |j| bits[j / 8] |= 1 << (j % 8));
            crate::methods::region::outside(&bits, 0, values, |_, v| *v = T::default());
            (bits, [before, sum_of_magnitudes(values)])
        };
        block.operands.iter_mut().zip(&rule.vectors).map(of_vector).collect::<Vec<_>>()
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

/// Scores of the elements, computed from a loaded chunk.
struct Scores<'a, T, F> {
    job: &'a Job<'a>,
    pool: &'a Pool<T>,
    tensor: &'a Tensor<'a>,
    /// Appends the scores of a loaded range that begins at an element.
    score: F,
}

impl<T: Number, F: Fn(usize, &mut Block<T>, &mut Vec<T>) + Sync> Scores<'_, T, F> {
    fn of(&self, chunk: usize, out: &mut Vec<T>) -> Result<()> {
        out.clear();
        let piece = job::pieces_of(0, self.tensor.numel()).nth(chunk).expect("chunks are counted");
        self.pool.with(|block, _| {
            load(self.job, self.tensor, piece.elements.clone(), block)?;
            (self.score)(piece.elements.start, block, out);
            Ok(())
        })
    }

    /// Calls `each` with the index and the scores of every chunk.
    fn for_each<R: Send>(&self, each: impl Fn(usize, &[T]) -> R + Sync + Send) -> Result<Vec<R>> {
        let of_chunk = |chunk| {
            let mut scores = Vec::new();
            self.of(chunk, &mut scores)?;
            Ok(each(chunk, &scores))
        };
        let results: Vec<Result<R>> = (0..self.chunks()).into_par_iter().map(of_chunk).collect();
        results.into_iter().collect()
    }
}

impl<T: Number, F: Fn(usize, &mut Block<T>, &mut Vec<T>) + Sync> Source<T> for Scores<'_, T, F> {
    fn chunks(&self) -> usize {
        job::pieces_of(0, self.tensor.numel()).count()
    }

    fn scores(&self, i: usize, out: &mut Vec<T>) {
        self.of(i, out).expect("an earlier pass found every number finite");
    }
}

fn select<T: Number>(job: &Job<'_>, pool: &Pool<T>, tensor: &Tensor<'_>, select_topk: f64) -> Result<Figures> {
    let variances = Scores {
        job,
        pool,
        tensor,
        score: |_, block: &mut Block<T>, out: &mut Vec<T>| {
            subtract_base(&mut block.operands, &block.base);
            out.extend((0..block.base.len()).map(|j| T::from_f64(variance(&block.operands, j))));
        },
    };
    let kept = if select_topk < 1.0 {
        let differ = |_, scores: &[T]| scores.iter().filter(|s| **s != T::default()).count() as u64;
        let nonzero: u64 = variances.for_each(differ)?.into_iter().sum();
        Some(match (nonzero as f64 * select_topk) as u64 {
            0 => vec![0; tensor.numel().div_ceil(8)],
            k => largest(&variances, k)?,
        })
    } else {
        None
    };
    let squares = job::for_each(&job::pieces_of(0, tensor.numel()).collect::<Vec<_>>(), |piece| {
        pool.with(|block, _| {
            let mut sums = vec![0.0; tensor.operands.len()];
            for (start, len) in piece.blocks() {
                load(job, tensor, start..start + len, block)?;
                subtract_base(&mut block.operands, &block.base);
                for (values, sum) in block.operands.iter_mut().zip(&mut sums) {
                    if let Some(bits) = &kept {
                        crate::methods::region::outside(bits, start, values, |_, v| *v = T::default());
                    }
                    *sum += values.iter().map(|v| v.to_f64() * v.to_f64()).sum::<f64>();
                }
            }
            Ok(sums)
        })
    })?;
    let mean = |i: usize| squares.iter().map(|sums| sums[i]).sum::<f64>() / tensor.numel() as f64;
    let means: Vec<f64> = (0..tensor.operands.len()).map(mean).collect();
    Ok(Figures { factors: sce_weights(&means), kept, ..Figures::default() })
}

/// Packed bits of the `k` largest scores, of equal ones those with the smallest tie hashes of the
/// first model.
fn largest<T: Number, F: Fn(usize, &mut Block<T>, &mut Vec<T>) + Sync>(
    scores: &Scores<'_, T, F>,
    k: u64,
) -> Result<Vec<u8>> {
    let Cut { threshold, ties } = find_cut(scores, k);
    let base = scores.tensor.base.as_ref().expect("scores are about a base");
    let key = TieSalt::new(scores.tensor.operands[0].source.digest()?).key(base.name);
    let last = find_tie_cut(scores.chunks(), ties.at_threshold, ties.chosen, |chunk, count| {
        let mut of_chunk = Vec::new();
        scores.scores(chunk, &mut of_chunk);
        for (j, _) in of_chunk.iter().enumerate().filter(|(_, score)| **score == threshold) {
            let index = chunk * CHUNK + j;
            count.add(key.hash(index), index as u64);
        }
    });
    let bits = scores.for_each(|chunk, scores| {
        let mut bits = vec![0u8; scores.len().div_ceil(8)];
        for (j, score) in scores.iter().enumerate() {
            let index = chunk * CHUNK + j;
            let tied = || *score == threshold && last.chooses(key.hash(index), index as u64);
            bits[j / 8] |= u8::from(*score > threshold || tied()) << (j % 8);
        }
        bits
    })?;
    Ok(bits.concat())
}

fn important<T: Number>(job: &Job<'_>, pool: &Pool<T>, tensor: &Tensor<'_>) -> Result<Figures> {
    let (numel, row) = (tensor.numel(), row_of(tensor.operands[0].view.shape));
    let of_band = |_, block: &mut Block<T>| {
        let rows = block.operands[0].chunks(row).zip(block.base.chunks(row));
        rows.map(|(model, base)| divergence(model, base).max(0.0)).collect::<Vec<f64>>()
    };
    let divergence = bands(job, pool, tensor, row, of_band)?.concat();
    let scores = Scores {
        job,
        pool,
        tensor,
        score: |start, block: &mut Block<T>, out: &mut Vec<T>| {
            let pairs = block.operands[0].iter().zip(&block.base).enumerate();
            out.extend(pairs.map(|(j, (m, b))| importance(*m, *b, divergence[(start + j) / row])));
        },
    };
    // The element of this rank among those in ascending order.
    let quantile = |share: f64| {
        let rank = (share * (numel - 1) as f64) as u64;
        find_cut(&scores, numel as u64 - rank).threshold
    };
    let [low, median, high] = [0.25, 0.5, 0.75].map(quantile);
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
