//! What must be known of a whole tensor before it can be written: inner products, cut-offs, sums of magnitudes.

use std::ops::Range;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::mask::{Ties, count_ones};
use cpift_core::stream::simd;

use super::block::{Block, Number, not_finite};
use super::jobs::{self, Piece, Pool};
use super::{Engine, Job, Tensor, trim};
use crate::cli::Space;
use crate::methods::sign_merge::{self, Filter, Sparsify};
use crate::methods::sphere::{Combination, Gram};
use crate::methods::{Rule, SignMerge};

/// What is known of one tensor before it is written.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorStats {
    /// Coefficients, branches and angles.
    pub combination: Combination,
    /// For a consensus, what stays of each task vector.
    pub filters: Vec<Filter>,
    /// Elements at the cut-offs of trims.
    pub trimmed: Ties,
    /// Elements in at least one core region.
    pub core: u64,
    /// Elements in at least two.
    pub conflicts: u64,
}

/// What the first reading of a tensor yields.
#[derive(Debug, Clone, PartialEq)]
struct Measure {
    /// Inner products of the operands, or of their differences from the base, over the elements that are free.
    gram: Gram,
    core: u64,
    conflicts: u64,
    /// Sums of magnitudes of each task vector, before and after elements are dropped by chance.
    magnitudes: Vec<[f64; 2]>,
}

impl Measure {
    fn zero(k: usize) -> Self {
        Self { gram: Gram::zero(k), core: 0, conflicts: 0, magnitudes: vec![[0.0; 2]; k] }
    }

    fn add(&mut self, other: &Self) {
        self.gram.add(&other.gram);
        self.core += other.core;
        self.conflicts += other.conflicts;
        for (sums, more) in self.magnitudes.iter_mut().zip(&other.magnitudes) {
            *sums = [sums[0] + more[0], sums[1] + more[1]];
        }
    }
}

/// Measures the tensors of a batch and settles how each is written. Finds every number in any input that is not finite,
/// where a tensor is measured at all.
///
/// # Errors
/// [`BadInput`] naming file, tensor and element.
pub fn measure(engine: &Engine<'_>, batch: Range<usize>) -> Result<Vec<TensorStats>> {
    let tensors = &engine.job.tensors;
    let measures = read(engine, batch.clone(), |tensor| !matches!(tensor.rule, Rule::Linear(_)))?;
    batch.zip(measures).map(|(i, m)| settle(engine, i, &tensors[i], &m)).collect()
}

/// Measures angles and core regions only, which is what can be told before anything is written.
///
/// # Errors
/// [`BadInput`] naming file, tensor and element.
pub fn survey(engine: &Engine<'_>, batch: Range<usize>) -> Result<Vec<TensorStats>> {
    let tensors = &engine.job.tensors;
    let measures = read(engine, batch.clone(), |tensor| tensor.rule.has_angles())?;
    batch.zip(measures).map(|(i, m)| combined(engine.job, &tensors[i], &m)).collect()
}

fn read(engine: &Engine<'_>, batch: Range<usize>, needed: impl Fn(&Tensor<'_>) -> bool) -> Result<Vec<Measure>> {
    let tensors = &engine.job.tensors;
    let mut pieces = jobs::pieces(tensors, batch.clone());
    pieces.retain(|piece| needed(&tensors[piece.tensor]));
    let parts = jobs::for_each(&pieces, |piece| {
        let tensor = &tensors[piece.tensor];
        engine.hash(tensor, piece);
        if tensor.is_wide() {
            read_piece(engine.job, &engine.wide, tensor, piece)
        } else {
            read_piece(engine.job, &engine.narrow, tensor, piece)
        }
    })?;
    let mut measures: Vec<Measure> = batch.clone().map(|i| Measure::zero(tensors[i].operands.len())).collect();
    for (piece, part) in pieces.iter().zip(parts) {
        measures[piece.tensor - batch.start].add(&part);
    }
    Ok(measures)
}

fn read_piece<T: Number>(job: &Job<'_>, pool: &Pool<T>, tensor: &Tensor<'_>, piece: &Piece) -> Result<Measure> {
    let sum = pool.with(|block, _| simd::dispatch!(read_blocks(job, tensor, piece, block)));
    sum.map_err(|(start, len)| not_finite(tensor, start, len).into())
}

/// Sums over the blocks of a piece; the error is the range of a block with a number that is not finite.
#[inline(always)]
fn read_blocks<T: Number>(
    job: &Job<'_>,
    tensor: &Tensor<'_>,
    piece: &Piece,
    block: &mut Block<T>,
) -> Result<Measure, (usize, usize)> {
    let mut sum = Measure::zero(tensor.operands.len());
    let about_base = job.space == Space::Delta;
    for (start, len) in piece.blocks() {
        if !block.load(tensor, start, len, about_base || job.base_is_separate) {
            return Err((start, len));
        }
        if let Some(bits) = tensor.protected {
            block.clear(bits, start);
        }
        match tensor.rule {
            Rule::Linear(_) => {}
            Rule::SignMerge(rule) => add_magnitudes(rule, start, block, &mut sum.magnitudes),
            Rule::Fold(_) | Rule::SphericalMean(_) => {
                tensor.claims.for_each(start, len, |j| block.clear_one(j));
                sum.gram.accumulate(&block.operands, about_base.then_some(&block.base[..]));
                let (core, conflicts) = tensor.claims.count(start, len);
                sum.core += core;
                sum.conflicts += conflicts;
            }
        }
    }
    Ok(sum)
}

/// The sums that a rescaled drop needs.
#[inline(always)]
fn add_magnitudes<T: Number>(rule: &SignMerge, start: usize, block: &mut Block<T>, sums: &mut [[f64; 2]]) {
    let (true, Sparsify::Drop { .. }) = (rule.rescale, &rule.sparsify) else { return };
    sign_merge::differences(block);
    for ((i, values), sums) in block.operands.iter_mut().enumerate().zip(sums) {
        sums[0] += sign_merge::sum_of_magnitudes(values);
        rule.drawn(i).apply(values, start, &mut 0);
        sums[1] += sign_merge::sum_of_magnitudes(values);
    }
}

fn settle(engine: &Engine<'_>, index: usize, tensor: &Tensor<'_>, measure: &Measure) -> Result<TensorStats> {
    let mut settled = combined(engine.job, tensor, measure)?;
    let Rule::SignMerge(rule) = tensor.rule else { return Ok(settled) };
    for (i, density) in rule.densities.iter().enumerate() {
        let filter = match rule.sparsify {
            _ if *density >= 1.0 => Filter::ALL,
            _ if *density <= 0.0 => Filter::NONE,
            Sparsify::Drop { .. } => {
                let [before, after] = measure.magnitudes[i];
                Filter {
                    keep: rule.drawn(i),
                    scale: if rule.rescale { sign_merge::stretch(before, after) } else { 1.0 },
                }
            }
            Sparsify::Trim => {
                let (filter, ties) = trim::trim(engine, index, i, rule, *density);
                settled.trimmed.at_threshold += ties.at_threshold;
                settled.trimmed.chosen += ties.chosen;
                settled.trimmed.decided_by_position += ties.decided_by_position;
                filter
            }
        };
        settled.filters.push(filter);
    }
    Ok(settled)
}

fn combined(job: &Job<'_>, tensor: &Tensor<'_>, measure: &Measure) -> Result<TensorStats> {
    if !measure.gram.is_finite() {
        let view = tensor.operands[0];
        return Err(BadInput::new(view.file, "weights so large that their norm overflows").tensor(view.name).into());
    }
    Ok(TensorStats {
        combination: tensor.rule.combination(&measure.gram, job.epsilon),
        filters: Vec::new(),
        trimmed: Ties::default(),
        core: measure.core,
        conflicts: measure.conflicts,
    })
}

/// Elements that are not protected.
pub fn free(tensor: &Tensor<'_>) -> u64 {
    tensor.numel() as u64 - tensor.protected.map_or(0, count_ones)
}
