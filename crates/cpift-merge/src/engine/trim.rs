//! The cut-off of a trimmed task vector: exactly as many of its largest elements stay as the density says.

use std::sync::Mutex;

use cpift_core::format::mask::Ties;
use cpift_core::stream::select::{Cut, Source, find_cut};
use cpift_core::stream::simd;
use rayon::prelude::*;

use super::block::{Number, outside, read};
use super::jobs::{self, Piece};
use super::measure::free;
use super::{Engine, Tensor};
use crate::methods::SignMerge;
use crate::methods::sign_merge::{Filter, Keep, stretch, sum_of_magnitudes};

/// What stays of task vector `operand` of a tensor, and how the ties at the cut-off fell.
pub fn trim(engine: &Engine<'_>, index: usize, operand: usize, rule: &SignMerge, density: f64) -> (Filter, Ties) {
    let tensor = &engine.job.tensors[index];
    let free = free(tensor);
    if free == 0 {
        return (Filter::ALL, Ties::default());
    }
    // As mergekit counts: rounded down, but never none.
    let k = ((density * free as f64) as u64).max(1);
    if tensor.is_wide() {
        cut::<f64>(tensor, operand, k, rule.rescale)
    } else {
        cut::<f32>(tensor, operand, k, rule.rescale)
    }
}

fn cut<T: Number>(tensor: &Tensor<'_>, operand: usize, k: u64, rescale: bool) -> (Filter, Ties) {
    let source = Magnitudes::<T> { tensor, operand, spare: Mutex::new(Vec::new()) };
    let Cut { threshold, ties } = find_cut(&source, k);
    if threshold == T::default() {
        // What is tied is zero anyway.
        return (Filter::ALL, Ties::default());
    }
    let split = ties.chosen < ties.at_threshold;
    if !split && !rescale {
        return (Filter { keep: Keep::Above { threshold: threshold.to_f64(), ties: Vec::new() }, scale: 1.0 }, ties);
    }
    let counts = source.counts(threshold);
    let mut left = ties.chosen;
    let per_chunk = counts.iter().map(|c| {
        let kept = c.tied.min(left);
        left -= kept;
        kept
    });
    let keep =
        Keep::Above { threshold: threshold.to_f64(), ties: if split { per_chunk.collect() } else { Vec::new() } };
    let [before, above] = counts.iter().fold([0.0; 2], |[a, b], c| [a + c.all, b + c.above]);
    let after = above + ties.chosen as f64 * threshold.to_f64();
    (Filter { keep, scale: if rescale { stretch(before, after) } else { 1.0 } }, ties)
}

/// The magnitudes of one task vector, without protected elements.
struct Magnitudes<'a, T> {
    tensor: &'a Tensor<'a>,
    operand: usize,
    /// Buffers for elements of the operand and of the base.
    spare: Mutex<Vec<(Vec<T>, Vec<T>)>>,
}

/// What one chunk adds to the choice of ties and to the sums of magnitudes.
struct Count {
    tied: u64,
    all: f64,
    above: f64,
}

impl<T: Number> Source<T> for Magnitudes<'_, T> {
    fn chunks(&self) -> usize {
        jobs::of_tensor(0, self.tensor.numel()).count()
    }

    fn scores(&self, i: usize, out: &mut Vec<T>) {
        let piece = jobs::of_tensor(0, self.tensor.numel()).nth(i).expect("chunks are counted");
        let taken = self.spare.lock().expect("no thread panics here").pop();
        let (mut values, mut base) = taken.unwrap_or_default();
        out.clear();
        simd::dispatch!(self.read(&piece, &mut values, &mut base, out));
        self.spare.lock().expect("no thread panics here").push((values, base));
    }
}

impl<T: Number> Magnitudes<'_, T> {
    #[inline(always)]
    fn read(&self, piece: &Piece, values: &mut Vec<T>, base: &mut Vec<T>, out: &mut Vec<T>) {
        let tensor = self.tensor;
        let base_view = tensor.base.as_ref().expect("task vectors have a base");
        for (start, len) in piece.blocks() {
            read(&tensor.operands[self.operand], start, len, values);
            read(base_view, start, len, base);
            values.iter_mut().zip(&*base).for_each(|(v, b)| *v = (*v - *b).abs());
            if let Some(bits) = tensor.masks.get(self.operand).copied().flatten() {
                outside(bits, start, values, |_, v| *v = T::default());
            }
            match tensor.protected {
                None => out.extend_from_slice(values),
                Some(bits) => outside(bits, start, values, |_, v| out.push(*v)),
            }
        }
    }

    fn counts(&self, threshold: T) -> Vec<Count> {
        let count = |scores: &mut Vec<T>, i| {
            self.scores(i, scores);
            let all = sum_of_magnitudes(scores);
            let tied = scores.iter().filter(|s| **s == threshold).count() as u64;
            scores.iter_mut().for_each(|s| *s = if *s > threshold { *s } else { T::default() });
            Count { tied, all, above: sum_of_magnitudes(scores) }
        };
        (0..self.chunks()).into_par_iter().map_init(Vec::new, count).collect()
    }
}
