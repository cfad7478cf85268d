//! Methods that give each element its value by its own elements in all inputs and by figures of the
//! whole tensor: NearSwap, RAM, SCE and Arcee Fusion, as mergekit defines them.

use std::ops::Range;

use cpift_core::stream::select::GROUP;

use super::sign_merge::{Number, subtract_base, word_at};

/// A method that works element by element.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Pointwise {
    /// The second model, mixed in by t over the distance of the two elements, at most whole.
    NearSwap {
        /// Distance up to which the element of the model is taken.
        t: f64,
    },
    /// Mean of the differences above `epsilon`.
    Ram {
        /// Largest difference that counts as no change.
        epsilon: f64,
        /// Scaling of what only one model changed.
        plus: Option<RamPlus>,
    },
    /// Differences of the share of elements with the largest variance between the models.
    Sce {
        /// Share of the elements that are kept.
        select_topk: f64,
    },
    /// Elements of the model whose importance is an outlier.
    Fusion,
}

/// Scaling of what only one model changed: 1 + r · min(shared / unique, α).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RamPlus {
    /// Strength.
    pub r: f64,
    /// Largest ratio that counts.
    pub alpha: f64,
}

/// Figures of a whole tensor.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Figures {
    /// Factor of each task vector: the scaling of RAM+, the weights of SCE.
    pub factors: Vec<f64>,
    /// Packed bits of the elements that SCE keeps; `None` if it keeps all.
    pub kept: Option<Vec<u8>>,
    /// Divergence of each row, for Arcee Fusion.
    pub divergence: Vec<f64>,
    /// Number of elements of a row.
    pub row: usize,
    /// Least importance of an element that is taken from the model.
    pub threshold: f64,
}

/// Elements whose sums are taken side by side, close to the processor: those of one word of packed
/// bits.
const SIDE: usize = GROUP;

/// Distance to which NearSwap raises smaller ones, and sum of weights to which SCE does.
const SMALLEST: f64 = 1e-6;

impl Pointwise {
    /// Settings as text, for reports.
    pub fn describe(&self) -> String {
        match self {
            Self::NearSwap { t } => format!("t {t}"),
            Self::Ram { epsilon, plus: None } => format!("ε {epsilon}"),
            Self::Ram { epsilon, plus: Some(plus) } => format!("ε {epsilon}; r {}; α {}", plus.r, plus.alpha),
            Self::Sce { select_topk } => format!("top {select_topk}"),
            Self::Fusion => "importance".to_owned(),
        }
    }

    /// Merges a block of elements, the first of which is element `start`, into `out`.
    #[inline(always)]
    pub fn merge<T: Number>(
        &self,
        figures: &Figures,
        start: usize,
        operands: &mut [Vec<T>],
        base: &[T],
        out: &mut [T],
    ) {
        match self {
            Self::NearSwap { t } => near_swap(*t, &operands[0], base, out),
            Self::Ram { epsilon, .. } => {
                subtract_base(operands, base);
                ram(*epsilon, &figures.factors, operands, base, out);
            }
            Self::Sce { .. } => {
                subtract_base(operands, base);
                sce(figures, start, operands, base, out);
            }
            Self::Fusion => fusion(figures, start, &operands[0], base, out),
        }
    }
}

#[inline(always)]
fn near_swap<T: Number>(t: f64, model: &[T], base: &[T], out: &mut [T]) {
    for ((o, m), b) in out.iter_mut().zip(model).zip(base) {
        let distance = (*b - *m).abs().to_f64();
        let share = (t / distance.max(SMALLEST)).clamp(0.0, 1.0);
        *o = T::from_f64(share * m.to_f64() + (1.0 - share) * b.to_f64());
    }
}

/// Returns true if a difference counts as a change.
#[inline(always)]
pub(crate) fn changes<T: Number>(delta: T, epsilon: T) -> bool {
    delta.abs() > epsilon
}

#[inline(always)]
fn ram<T: Number>(epsilon: f64, factors: &[f64], deltas: &[Vec<T>], base: &[T], out: &mut [T]) {
    let epsilon = T::from_f64(epsilon);
    for (at, (out, base)) in out.chunks_mut(SIDE).zip(base.chunks(SIDE)).enumerate() {
        let (mut count, mut sum, mut alone) = ([0.0; SIDE], [0.0; SIDE], [0.0; SIDE]);
        for (i, values) in deltas.iter().enumerate() {
            let factor = factors.get(i).copied().unwrap_or(1.0);
            for (j, v) in values[SIDE * at..].iter().take(SIDE).enumerate() {
                let changed = changes(*v, epsilon);
                count[j] += if changed { 1.0 } else { 0.0 };
                sum[j] += if changed { v.to_f64() } else { 0.0 };
                alone[j] = if changed { v.to_f64() * factor } else { alone[j] };
            }
        }
        for (j, (o, b)) in out.iter_mut().zip(base).enumerate() {
            let change = if count[j] > 1.0 { sum[j] / count[j] } else { alone[j] };
            *o = T::from_f64(b.to_f64() + change);
        }
    }
}

#[inline(always)]
fn sce<T: Number>(figures: &Figures, start: usize, deltas: &[Vec<T>], base: &[T], out: &mut [T]) {
    let zero = T::default();
    for (at, (out, base)) in out.chunks_mut(SIDE).zip(base.chunks(SIDE)).enumerate() {
        let side = SIDE * at..SIDE * at + out.len();
        let kept = match &figures.kept {
            Some(bits) => word_at(&bits[(start + side.start) / 8..]),
            None => u64::MAX,
        };
        let (mut votes, mut sums, mut weights) = ([zero; SIDE], [0.0; SIDE], [0.0; SIDE]);
        for values in deltas {
            votes.iter_mut().zip(&values[side.clone()]).for_each(|(vote, v)| *vote = *vote + *v);
        }
        for (values, weight) in deltas.iter().zip(&figures.factors) {
            for (j, v) in values[side.clone()].iter().enumerate() {
                let agrees = if votes[j] >= zero { *v > zero } else { *v < zero };
                sums[j] += if agrees { weight * v.to_f64() } else { 0.0 };
                weights[j] += if agrees { *weight } else { 0.0 };
            }
        }
        for (j, (o, b)) in out.iter_mut().zip(base).enumerate() {
            let changed = T::from_f64(b.to_f64() + sums[j] / weights[j].max(SMALLEST));
            *o = if kept >> j & 1 == 1 { changed } else { *b };
        }
    }
}

/// Weights of SCE, from the mean squares of the task vectors.
pub(crate) fn sce_weights(mean_squares: &[f64]) -> Vec<f64> {
    let sum: f64 = mean_squares.iter().sum();
    if sum.abs() < 1e-6 {
        return vec![1.0 / mean_squares.len() as f64; mean_squares.len()];
    }
    mean_squares.iter().map(|x| x / sum).collect()
}

/// Puts the variance between the task vectors at each element into `out`. `means` and `squares` are
/// working space; all slices are as long as `out`.
#[inline(always)]
pub(crate) fn variances<T: Number>(deltas: &[Vec<T>], [means, squares]: [&mut [f64]; 2], out: &mut [T]) {
    let n = deltas.len() as f64;
    // A division by a power of two is this multiplication, which is faster.
    let exact = deltas.len().is_power_of_two().then_some(1.0 / n);
    let divide = |sums: &mut [f64]| match exact {
        Some(share) => sums.iter_mut().for_each(|sum| *sum *= share),
        None => sums.iter_mut().for_each(|sum| *sum /= n),
    };
    means.fill(0.0);
    for values in deltas {
        means.iter_mut().zip(values).for_each(|(sum, v)| *sum += v.to_f64());
    }
    divide(means);
    squares.fill(0.0);
    for values in deltas {
        let pairs = values.iter().zip(&*means);
        squares.iter_mut().zip(pairs).for_each(|(sum, (v, mean))| *sum += (v.to_f64() - mean) * (v.to_f64() - mean));
    }
    divide(squares);
    out.iter_mut().zip(&*squares).for_each(|(o, mean)| *o = T::from_f64(*mean));
}

/// Importance of an element: its change times the divergence of its row.
#[inline(always)]
pub(crate) fn importance<T: Number>(model: T, base: T, divergence: f64) -> T {
    T::from_f64((model - base).abs().to_f64() * divergence)
}

#[inline(always)]
fn fusion<T: Number>(figures: &Figures, start: usize, model: &[T], base: &[T], out: &mut [T]) {
    let threshold = T::from_f64(figures.threshold);
    for (row, range) in rows_in(start, out.len(), figures.row) {
        let divergence = figures.divergence[row];
        let pairs = model[range.clone()].iter().zip(&base[range.clone()]);
        for (o, (m, b)) in out[range].iter_mut().zip(pairs) {
            // Written as base plus difference: mergekit rounds the difference.
            let sum = *b + (*m - *b);
            *o = if importance(*m, *b, divergence) >= threshold { sum } else { *b };
        }
    }
}

/// Rows of `row` elements that a block touches, each with its range in the block, of `len` elements
/// from element `start` of the tensor on.
#[inline(always)]
pub(crate) fn rows_in(start: usize, len: usize, row: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let rows = if len == 0 { 0..0 } else { start / row..(start + len - 1) / row + 1 };
    rows.map(move |i| (i, (i * row).max(start) - start..((i + 1) * row).min(start + len) - start))
}

/// Kullback-Leibler divergence of the softmax of a row of the model from that of the base, each
/// raised by 1e-8 as in mergekit.
pub(crate) fn divergence<T: Number>(model: &[T], base: &[T]) -> f64 {
    // Powers of a row, and their sum.
    let softmax = |row: &[T]| {
        let largest = row.iter().fold(f64::NEG_INFINITY, |m, v| m.max(v.to_f64()));
        let powers: Vec<f64> = row.iter().map(|v| (v.to_f64() - largest).exp()).collect();
        let sum: f64 = powers.iter().sum();
        (powers, sum)
    };
    let ((p, p_sum), (q, q_sum)) = (softmax(model), softmax(base));
    let terms = p.iter().zip(&q).map(|(p, q)| {
        let (p, q) = (p / p_sum + 1e-8, q / q_sum + 1e-8);
        p * (p / q).ln()
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_swap_moves_by_at_most_t() {
        let mut out = [0.0f64; 3];
        near_swap(0.1, &[1.0, 0.05, -3.0], &[0.0, 0.0, 1.0], &mut out);
        for (found, expected) in out.iter().zip([0.1, 0.05, 0.9]) {
            assert!((found - expected).abs() < 1e-15, "{found} {expected}");
        }
    }

    #[test]
    fn ram_takes_the_mean_of_those_that_changed_and_scales_what_one_changed() {
        let deltas = [vec![1.0f64, 0.0, 2.0, 1e-6], vec![3.0, 0.0, 0.0, 1e-6]];
        let mut out = [0.0; 4];
        ram(1e-5, &[], &deltas, &[10.0; 4], &mut out);
        assert_eq!(out, [12.0, 10.0, 12.0, 10.0]);
        ram(1e-5, &[1.5, 1.0], &deltas, &[10.0; 4], &mut out);
        assert_eq!(out, [12.0, 10.0, 13.0, 10.0]);
    }

    #[test]
    fn sce_weighs_what_agrees_with_the_majority() {
        let figures = Figures { factors: vec![0.25, 0.75], kept: Some(vec![0b0111]), ..Figures::default() };
        let deltas = [vec![2.0f64, -1.0, 1.0, 5.0], vec![4.0, 3.0, -1.0, 5.0]];
        let mut out = [0.0; 4];
        sce(&figures, 0, &deltas, &[1.0; 4], &mut out);
        assert_eq!(out, [4.5, 4.0, 2.0, 1.0], "a draw is +, and what is not kept is the base");
    }

    #[test]
    fn the_rows_of_a_block_share_its_elements() {
        for (start, len, row) in [(0, 10, 4), (3, 1, 4), (5, 9, 3), (8, 4, 4), (2, 0, 4), (7, 20, 64)] {
            let mut elements = Vec::new();
            for (i, range) in rows_in(start, len, row) {
                elements.extend(range.map(|j| (i, start + j)));
            }
            assert_eq!(elements, (start..start + len).map(|e| (e / row, e)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn equal_rows_do_not_diverge() {
        assert_eq!(divergence(&[0.5f32, -1.0], &[0.5, -1.0]), 0.0);
        let (p, q) = (1.0 / (1.0 + (-1f64).exp()) + 1e-8, 0.5 + 1e-8);
        let expected = p * (p / q).ln() + (1.0 - p + 2e-8) * ((1.0 - p + 2e-8) / q).ln();
        assert!((divergence(&[1.0f64, 0.0], &[0.0, 0.0]) - expected).abs() < 1e-12);
    }
}
