//! Statistics of a whole tensor that its rule needs before it can be written: inner products,
//! cut-offs of trims, sums of magnitudes. Those that need whole rows or matrices are in [`rows`].

use std::ops::Range;

use anyhow::Result;
use cpift_core::format::mask::Ties;
use cpift_core::stream::cuts::{self, Elements, Found, Largest};
use cpift_core::stream::select::Cut;
use cpift_core::stream::ties::{TieKey, TieSalt};
use cpift_core::{BadInput, TensorView, dispatch};
use rayon::prelude::*;

use super::job::{self, Block, Job, Piece, Pool, Shared, Tensor};
use super::rows::{self, Grouped};
use crate::methods::pointwise::{Figures, changes};
use crate::methods::region::outside;
use crate::methods::sign_merge::{
    self, Filter, Keep, Number, Sparsify, TaskVector, draw, keep_packed, rescaling, sum_of_magnitudes,
};
use crate::methods::sphere::{Combination, Gram};
use crate::methods::{Along, Pointwise, Rule, SignMerge};
use crate::request::Space;

/// Statistics of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorStats {
    /// Coefficients, branches and angles.
    pub combination: Combination,
    /// For TIES and its relatives, the elements of each task vector that are kept.
    pub filters: Vec<Filter>,
    /// For Breadcrumbs, the elements of each task vector that are dropped because they are large.
    pub outliers: Vec<Filter>,
    /// Coefficients by row or column.
    pub grouped: Grouped,
    /// Figures of methods that work element by element.
    pub figures: Figures,
    /// Merged task vector of methods by singular vectors.
    pub change: Vec<f32>,
    /// Numbers of elements at the cut-offs of trims.
    pub trimmed: Ties,
    /// Number of elements in at least one core region.
    pub core: u64,
    /// Number of elements in at least two core regions.
    pub conflicts: u64,
}

impl TensorStats {
    /// The figures for reports, without what is as large as the tensor.
    pub fn for_report(self) -> Self {
        Self {
            filters: Vec::new(),
            outliers: Vec::new(),
            grouped: Grouped::default(),
            figures: Figures::default(),
            change: Vec::new(),
            ..self
        }
    }
}

/// Sums over a tensor, or over a part of it.
#[derive(Debug, Clone, PartialEq)]
struct Measure {
    /// Inner products of the operands, or of their differences from the base, over the elements
    /// that are neither core nor protected.
    gram: Gram,
    core: u64,
    conflicts: u64,
    /// Sums of magnitudes of each task vector, before and after elements are dropped at random.
    magnitudes: Vec<[f64; 2]>,
    /// Packed bits of the elements that a random drop keeps in each task vector; empty if its sums
    /// are not needed.
    drawn: Vec<Vec<u8>>,
    /// Numbers of elements that each model changed, together with others and alone.
    changed: Vec<[u64; 2]>,
}

impl Measure {
    fn zero(k: usize) -> Self {
        Self {
            gram: Gram::zero(k),
            core: 0,
            conflicts: 0,
            magnitudes: vec![[0.0; 2]; k],
            drawn: vec![Vec::new(); k],
            changed: vec![[0; 2]; k],
        }
    }

    /// Adds those of the elements that follow.
    fn add(&mut self, other: &Self) {
        self.gram.add(&other.gram);
        self.core += other.core;
        self.conflicts += other.conflicts;
        for (sums, more) in self.magnitudes.iter_mut().zip(&other.magnitudes) {
            *sums = [sums[0] + more[0], sums[1] + more[1]];
        }
        self.drawn.iter_mut().zip(&other.drawn).for_each(|(bits, more)| bits.extend(more));
        for (counts, more) in self.changed.iter_mut().zip(&other.changed) {
            *counts = [counts[0] + more[0], counts[1] + more[1]];
        }
    }
}

/// Measures the tensors of a batch. Tensors merged by a linear combination need no measurement and
/// are not read.
///
/// # Errors
/// [`BadInput`] naming file, tensor and element if a number is not finite.
pub(super) fn measure(shared: &Shared<'_>, batch: Range<usize>) -> Result<Vec<TensorStats>> {
    let tensors = &shared.job.tensors;
    let measures = read_tensors(shared, batch.clone(), |tensor| tensor.rule.reads_chunks_first())?;
    batch.zip(measures).map(|(i, m)| complete(shared, &tensors[i], &m)).collect()
}

/// Measures angles and core regions only.
///
/// # Errors
/// [`BadInput`] naming file, tensor and element if a number is not finite.
pub(super) fn survey(shared: &Shared<'_>, batch: Range<usize>) -> Result<Vec<TensorStats>> {
    let tensors = &shared.job.tensors;
    let measures = read_tensors(shared, batch.clone(), |tensor| tensor.rule.has_angles())?;
    batch.zip(measures).map(|(i, m)| combined(shared.job, &tensors[i], &m)).collect()
}

/// Measures the tensors of a batch for which `needed` is true; the sums of the others are zero.
fn read_tensors(
    shared: &Shared<'_>,
    batch: Range<usize>,
    needed: impl Fn(&Tensor<'_>) -> bool,
) -> Result<Vec<Measure>> {
    let tensors = &shared.job.tensors;
    let mut pieces = job::pieces(tensors, batch.clone());
    pieces.retain(|piece| needed(&tensors[piece.tensor]));
    let parts = job::for_each(&pieces, |piece| {
        let tensor = &tensors[piece.tensor];
        shared.hash(tensor, piece);
        if tensor.is_wide() {
            read_piece(shared.job, &shared.wide, tensor, piece)
        } else {
            read_piece(shared.job, &shared.narrow, tensor, piece)
        }
    })?;
    let zero = |i: usize| Measure::zero(tensors[i].operands.len());
    let mut measures: Vec<Measure> = batch.clone().map(zero).collect();
    for (piece, part) in pieces.iter().zip(parts) {
        measures[piece.tensor - batch.start].add(&part);
    }
    Ok(measures)
}

fn read_piece<T: Number>(job: &Job<'_>, pool: &Pool<T>, tensor: &Tensor<'_>, piece: &Piece) -> Result<Measure> {
    let sum = pool.with(|block, _| dispatch!(read_blocks(job, tensor, piece, block)));
    sum.map_err(|(start, len)| tensor.not_finite(start, len).into())
}

/// Sums over the blocks of a piece; the error is the range (start, length) of a block with a number
/// that is not finite.
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
            Rule::Linear(_) | Rule::Spectral(_) | Rule::Combine(_, Along::Rows | Along::Columns) => {}
            Rule::Pointwise(Pointwise::Ram { epsilon, .. }) => count_changes(*epsilon, block, &mut sum.changed),
            Rule::Pointwise(_) => {}
            Rule::SignMerge(rule) => add_magnitudes(rule, start, block, &mut sum),
            Rule::Fold(_) | Rule::SphericalMean(..) | Rule::Combine(_, Along::Whole) => {
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

/// Adds the sums of magnitudes before and after a random drop, which its rescaling needs, and the
/// elements that stay.
#[inline(always)]
fn add_magnitudes<T: Number>(rule: &SignMerge, start: usize, block: &mut Block<T>, sum: &mut Measure) {
    let (true, Sparsify::Drop) = (rule.rescale, rule.sparsify) else { return };
    sign_merge::subtract_base(&mut block.operands, &block.base);
    let sums = sum.magnitudes.iter_mut().zip(&mut sum.drawn);
    for ((values, vector), (sums, bits)) in block.operands.iter_mut().zip(&rule.vectors).zip(sums) {
        sums[0] += sum_of_magnitudes(values);
        if let Keep::Drawn { key, limit } = rule.drawn(vector) {
            let first = bits.len();
            draw(key, limit, start, values.len(), bits);
            keep_packed(&bits[first..], 0, values);
        }
        sums[1] += sum_of_magnitudes(values);
    }
}

/// Counts the elements that each model changed, together with others and alone.
#[inline(always)]
fn count_changes<T: Number>(epsilon: f64, block: &mut Block<T>, counts: &mut [[u64; 2]]) {
    sign_merge::subtract_base(&mut block.operands, &block.base);
    let (epsilon, none, one) = (T::from_f64(epsilon), T::default(), T::from_f64(1.0));
    let Block { operands, base, out: models, .. } = block;
    models.clear();
    models.resize(base.len(), none);
    for values in &*operands {
        let pairs = models.iter_mut().zip(values);
        pairs.for_each(|(models, v)| *models = *models + if changes(*v, epsilon) { one } else { none });
    }
    for (values, counts) in operands.iter().zip(counts) {
        let (mut changed, mut alone) = (0u32, 0u32);
        for (v, models) in values.iter().zip(&*models) {
            changed += u32::from(changes(*v, epsilon));
            alone += u32::from(changes(*v, epsilon) & (*models == one));
        }
        counts[0] += u64::from(changed - alone);
        counts[1] += u64::from(alone);
    }
}

/// The statistics of a tensor, with all that its rule needs.
fn complete(shared: &Shared<'_>, tensor: &Tensor<'_>, measure: &Measure) -> Result<TensorStats> {
    let mut stats = combined(shared.job, tensor, measure)?;
    if tensor.numel() == 0 {
        return Ok(stats);
    }
    match tensor.rule {
        Rule::SignMerge(rule) => add_filters(shared, tensor, rule, measure, &mut stats)?,
        Rule::Combine(combine, along) if *along != Along::Whole => {
            stats.grouped = rows::grouped(shared, tensor, combine, *along)?;
        }
        Rule::Pointwise(Pointwise::Ram { epsilon, plus: Some(plus) }) => {
            let factor = |[together, alone]: &[u64; 2]| {
                1.0 + plus.r * (*together as f64 / (*alone as f64).max(*epsilon)).clamp(0.0, plus.alpha)
            };
            stats.figures.factors = measure.changed.iter().map(factor).collect();
        }
        Rule::Pointwise(Pointwise::Sce { select_topk }) => stats.figures = rows::sce(shared, tensor, *select_topk)?,
        Rule::Pointwise(Pointwise::Fusion) => stats.figures = rows::fusion(shared, tensor)?,
        Rule::Spectral(rule) => stats.change = rows::spectral(shared, tensor, rule)?,
        _ => {}
    }
    Ok(stats)
}

/// Adds the filters of the task vectors.
fn add_filters(
    shared: &Shared<'_>,
    tensor: &Tensor<'_>,
    rule: &SignMerge,
    measure: &Measure,
    stats: &mut TensorStats,
) -> Result<()> {
    if rule.sparsify == Sparsify::Prune {
        stats.filters = rows::pruned(shared, tensor, rule)?;
        return Ok(());
    }
    let of_vector = |(i, vector): (usize, &TaskVector)| -> Result<[(Filter, Ties); 2]> {
        let none = (Filter::NONE, Ties::default());
        Ok(match rule.sparsify {
            _ if vector.density >= 1.0 => [none, (Filter::ALL, Ties::default())],
            _ if vector.density <= 0.0 => [none.clone(), none],
            Sparsify::Drop => {
                let [before, after] = measure.magnitudes[i];
                let filter = match rule.rescale {
                    true => Filter { keep: Keep::Bits(measure.drawn[i].clone()), scale: rescaling(before, after) },
                    false => Filter { keep: rule.drawn(vector), scale: 1.0 },
                };
                [none, (filter, Ties::default())]
            }
            Sparsify::Trim => [none, trim(tensor, i, vector.density, rule.rescale)?],
            Sparsify::Outliers => without_outliers(tensor, i, vector, rule.rescale)?.map(|f| (f, Ties::default())),
            Sparsify::Prune => unreachable!("handled above"),
        })
    };
    let filters: Vec<Result<_>> = rule.vectors.par_iter().enumerate().map(of_vector).collect();
    for found in filters {
        let [(outliers, _), (filter, ties)] = found?;
        if rule.sparsify == Sparsify::Outliers {
            stats.outliers.push(outliers);
        }
        stats.filters.push(filter);
        stats.trimmed.at_threshold += ties.at_threshold;
        stats.trimmed.chosen += ties.chosen;
        stats.trimmed.decided_by_hash += ties.decided_by_hash;
    }
    Ok(())
}

fn combined(job: &Job<'_>, tensor: &Tensor<'_>, measure: &Measure) -> Result<TensorStats> {
    if !measure.gram.is_finite() {
        let view = &tensor.operands[0].view;
        return Err(BadInput::new(view.file, "weights so large that their norm overflows").tensor(view.name).into());
    }
    let combination = tensor.rule.combination(&measure.gram, job.epsilon);
    if combination.coefficients.iter().any(|c| !c.is_finite()) {
        let view = &tensor.operands[0].view;
        return Err(BadInput::new(view.file, "the weighted directions of the models cancel")
            .tensor(view.name)
            .hint("other weights, or linear instead of multislerp")
            .into());
    }
    Ok(TensorStats {
        combination,
        filters: Vec::new(),
        outliers: Vec::new(),
        grouped: Grouped::default(),
        figures: Figures::default(),
        change: Vec::new(),
        trimmed: Ties::default(),
        core: measure.core,
        conflicts: measure.conflicts,
    })
}

/// Elements of task vector `operand` that are dropped as too large, and those that are kept if they
/// are not among these.
///
/// The share γ of the largest is dropped and of the others as many of the largest kept as the
/// density asks for; if too few remain, fewer are dropped.
///
/// # Errors
/// As [`ranked`].
fn without_outliers(tensor: &Tensor<'_>, operand: usize, vector: &TaskVector, rescale: bool) -> Result<[Filter; 2]> {
    let free = tensor.free();
    let kept = (vector.density * free as f64) as u64;
    let dropped = ((vector.spread * free as f64) as u64).min(free - kept);
    if kept == 0 {
        return Ok([Filter::NONE, Filter::NONE]);
    }
    // Nothing needs to be ranked where none or all are asked for.
    let open: Vec<u64> = [dropped, dropped + kept].into_iter().filter(|k| (1..free).contains(k)).collect();
    let mut found = if tensor.is_wide() {
        ranked::<f64>(tensor, operand, &open, rescale)?
    } else {
        ranked::<f32>(tensor, operand, &open, rescale)?
    }
    .into_iter();
    let mut largest = |k: u64| match k {
        0 => (Filter::NONE, [0.0; 2]),
        k if k == free => (Filter::ALL, [0.0; 2]),
        _ => {
            let (filter, _, sums) = found.next().expect("it was ranked");
            (filter, sums)
        }
    };
    let (outliers, [all, large]) = largest(dropped);
    let (mut filter, [before, after]) = largest(dropped + kept);
    if rescale {
        // Without smaller elements to drop, all that is kept is what is not too large.
        let [before, after] = if dropped + kept == free { [all, all] } else { [before, after] };
        filter.scale = rescaling(before, after - large);
    }
    Ok([outliers, filter])
}

/// Elements of task vector `operand` that are kept, exactly as many of the largest as `density`
/// asks for, and the ties at the cut-off.
fn trim(tensor: &Tensor<'_>, operand: usize, density: f64, rescale: bool) -> Result<(Filter, Ties)> {
    let free = tensor.free();
    if free == 0 {
        return Ok((Filter::ALL, Ties::default()));
    }
    // Rounded down, but at least one, as mergekit does.
    let k = ((density * free as f64) as u64).max(1);
    let found = if tensor.is_wide() {
        ranked::<f64>(tensor, operand, &[k], rescale)?
    } else {
        ranked::<f32>(tensor, operand, &[k], rescale)?
    };
    let (filter, ties, _) = found.into_iter().next().expect("one was asked for");
    Ok((filter, ties))
}

/// For every k of `ks` the largest k elements of a task vector, the ties at the cut-off and, if
/// `rescale` is set, the sums of magnitudes of all elements and of these.
///
/// # Errors
/// [`BadInput`] naming the first element that is not finite; a digest that a tie needs and that
/// cannot be computed.
fn ranked<T: Number>(
    tensor: &Tensor<'_>,
    operand: usize,
    ks: &[u64],
    rescale: bool,
) -> Result<Vec<(Filter, Ties, [f64; 2])>> {
    let magnitudes = Magnitudes { tensor, operand };
    let found = match cuts::largest::<T, _>(&magnitudes, tensor.free(), ks, || magnitudes.key())? {
        Found::All(found) => found,
        Found::NoScore(start, len) => return Err(tensor.not_finite(start, len).into()),
    };
    let filter = |Largest { cut: Cut { threshold, ties }, last }: Largest<T>| {
        if threshold == T::default() {
            // The tied elements are zero in any case.
            let sum = if rescale { magnitudes.sums(threshold)[0] } else { 0.0 };
            return (Filter::ALL, Ties::default(), [sum; 2]);
        }
        let sums = if rescale {
            let [before, above] = magnitudes.sums(threshold);
            [before, above + ties.chosen as f64 * threshold.to_f64()]
        } else {
            [0.0; 2]
        };
        let scale = if rescale { rescaling(sums[0], sums[1]) } else { 1.0 };
        (Filter { keep: Keep::Above { threshold: threshold.to_f64(), ties: last }, scale }, ties, sums)
    };
    Ok(found.into_iter().map(filter).collect())
}

/// Magnitudes of one task vector; protected elements take no part.
struct Magnitudes<'a> {
    tensor: &'a Tensor<'a>,
    operand: usize,
}

impl<T: Number> Elements<T> for Magnitudes<'_> {
    /// Elements of the base.
    type Space = Vec<T>;

    fn count(&self) -> usize {
        self.tensor.numel()
    }

    fn space(&self) -> Vec<T> {
        vec![T::default(); cuts::BLOCK]
    }

    #[inline(always)]
    fn read(&self, start: usize, scores: &mut [T], base: &mut Vec<T>) -> bool {
        let (operand, base) = (&self.tensor.operands[self.operand], &mut base[..scores.len()]);
        operand.view.read(start, scores);
        self.base().read(start, base);
        scores.iter_mut().zip(&*base).for_each(|(v, b)| *v = (*v - *b).abs());
        let finite = |values: &[T]| values.iter().fold(true, |all, v| all & v.is_finite());
        // A difference that is finite is one of finite numbers; that of finite numbers can
        // overflow.
        let usable = finite(scores) || {
            let mut values = base.to_vec();
            operand.view.read(start, &mut values);
            finite(&values) && finite(base)
        };
        if let Some(bits) = operand.mask {
            outside(bits, start, scores, |_, v| *v = T::default());
        }
        if let Some(region) = self.tensor.protected {
            region.inside(start, scores, |_, v| *v = T::from_f64(f64::NAN));
        }
        usable
    }
}

impl<'a> Magnitudes<'a> {
    fn base(&self) -> &TensorView<'a> {
        self.tensor.base.as_ref().expect("task vectors have a base")
    }

    /// Key of the tie hashes.
    ///
    /// # Errors
    /// As [`crate::plan::Source::digest`].
    fn key(&self) -> Result<TieKey> {
        Ok(TieSalt::new(self.tensor.operands[self.operand].source.digest()?).key(self.base().name))
    }

    /// Sums of magnitudes over all elements, and over those above `threshold`.
    fn sums<T: Number>(&self, threshold: T) -> [f64; 2] {
        let count = |(scores, base): &mut (Vec<T>, Vec<T>), piece: &Piece| {
            scores.resize(piece.elements.len(), T::default());
            dispatch!({
                for (start, len) in piece.blocks() {
                    let at = start - piece.elements.start;
                    self.read(start, &mut scores[at..at + len], base);
                }
                // Only those that take part.
                scores.retain(|score| *score >= T::default());
                let all = sum_of_magnitudes(scores);
                scores.iter_mut().for_each(|s| *s = if *s > threshold { *s } else { T::default() });
                [all, sum_of_magnitudes(scores)]
            })
        };
        let pieces: Vec<Piece> = job::pieces_of(0, self.tensor.numel()).collect();
        let space = || (Vec::new(), Elements::<T>::space(self));
        let sums: Vec<[f64; 2]> = pieces.par_iter().map_init(space, count).collect();
        sums.iter().fold([0.0; 2], |[a, b], [all, above]| [a + all, b + above])
    }
}
