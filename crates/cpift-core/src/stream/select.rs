//! Exact k-th largest score by radix selection, without storing any scores.
//!
//! Non-negative floats sort in the order of their bit patterns. Each pass builds a histogram over
//! 16 bits of the scores whose higher bits equal the threshold found so far, which gives the next
//! 16 bits of the threshold: two passes for f32, four for f64. The sums do not depend on the number
//! of threads.

use rayon::prelude::*;

use crate::format::dtype::Float;
use crate::format::mask::Ties;

const DIGIT: u32 = 16;
const BINS: usize = 1 << DIGIT;

/// Floating-point type of the scores, with an order-preserving integer key.
pub trait Score: Float + Default {
    /// Number of 16-bit passes over a key.
    const PASSES: u32;

    /// Bits of the score; order-preserving from +0.0 to +∞.
    fn key(self) -> u64;

    /// Score with these bits.
    fn from_key(key: u64) -> Self;
}

impl Score for f32 {
    const PASSES: u32 = 2;

    #[inline(always)]
    fn key(self) -> u64 {
        self.to_bits().into()
    }

    fn from_key(key: u64) -> Self {
        Self::from_bits(key as u32)
    }
}

impl Score for f64 {
    const PASSES: u32 = 4;

    #[inline(always)]
    fn key(self) -> u64 {
        self.to_bits()
    }

    fn from_key(key: u64) -> Self {
        Self::from_bits(key)
    }
}

/// Scores in the order of their elements, one chunk at a time.
pub trait Source<T>: Sync {
    /// Number of chunks.
    fn chunks(&self) -> usize;

    /// Replaces `out` with the scores of chunk `i`, none of them negative, −0.0 or NaN.
    fn scores(&self, i: usize, out: &mut Vec<T>);
}

/// Result of a selection: all scores above the threshold are chosen, and `ties.chosen` of the
/// elements equal to it ([`crate::stream::ties`]).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut<T> {
    /// Smallest chosen score.
    pub threshold: T,
    /// Elements equal to the threshold.
    pub ties: Ties,
}

/// Elements that [`split`] compares at a time: one word of packed bits.
pub const GROUP: usize = 64;

/// Bits of the at most 64 `values` that lie above `high`, and of those from `low` to `high`; none
/// of a NaN. Call inside [`crate::dispatch!`].
#[inline(always)]
pub fn split<T: Score>(values: &[T], low: T, high: T) -> (u64, u64) {
    // A loop of known length becomes vector instructions without a remainder.
    match values.first_chunk::<GROUP>() {
        Some(full) => compare(full, low, high),
        None => compare(values, low, high),
    }
}

#[inline(always)]
fn compare<T: Score>(values: &[T], low: T, high: T) -> (u64, u64) {
    let (mut over, mut inside) = (0u64, 0u64);
    for (bit, score) in values.iter().enumerate() {
        over |= u64::from(*score > high) << bit;
        inside |= u64::from(*score >= low) << bit;
    }
    (over, inside & !over)
}

/// Finds the threshold that chooses exactly `k` ≥ 1 scores of `source`.
///
/// # Panics
/// If there are fewer than `k` scores.
pub fn find_cut<T: Score>(source: &impl Source<T>, k: u64) -> Cut<T> {
    let (mut prefix, mut remaining, mut at_threshold) = (0u64, k, 0);
    for pass in 0..T::PASSES {
        let bins = histogram::<T>(source, pass, prefix);
        let mut bin = BINS - 1;
        while bins[bin] < remaining {
            remaining -= bins[bin];
            bin = bin.checked_sub(1).expect("k is at most the number of scores");
        }
        prefix = prefix << DIGIT | bin as u64;
        at_threshold = bins[bin];
    }
    let decided_by_hash = if remaining < at_threshold { remaining } else { 0 };
    Cut { threshold: T::from_key(prefix), ties: Ties { at_threshold, chosen: remaining, decided_by_hash } }
}

/// Histogram of the 16-bit digit of `pass` over the scores whose higher digits equal `prefix`.
fn histogram<T: Score>(source: &impl Source<T>, pass: u32, prefix: u64) -> Vec<u64> {
    let shift = DIGIT * (T::PASSES - 1 - pass);
    let count = |(mut bins, mut scores): (Vec<u64>, Vec<T>), i| {
        source.scores(i, &mut scores);
        for key in scores.iter().map(|s| s.key() >> shift).filter(|key| pass == 0 || key >> DIGIT == prefix) {
            bins[key as usize % BINS] += 1;
        }
        (bins, scores)
    };
    // A few long runs of chunks, because each run has its own histogram of 512 KiB; rayon alone
    // would make many short ones.
    let runs = (4 * rayon::current_num_threads()).min(source.chunks()).max(1);
    let tables = (0..runs).into_par_iter().map(|run| {
        let of = |r: usize| r * source.chunks() / runs;
        (of(run)..of(run + 1)).fold((vec![0; BINS], Vec::new()), count).0
    });
    tables.reduce(
        || vec![0; BINS],
        |mut sums, bins| {
            sums.iter_mut().zip(bins).for_each(|(sum, n)| *sum += n);
            sums
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Chunks<T>(Vec<Vec<T>>);

    impl<T: Score> Source<T> for Chunks<T> {
        fn chunks(&self) -> usize {
            self.0.len()
        }

        fn scores(&self, i: usize, out: &mut Vec<T>) {
            out.clone_from(&self.0[i]);
        }
    }

    #[test]
    fn the_cut_agrees_with_sorting() {
        let scores = [0.5f32, 2.0, 0.0, 2.0, 1.5, 2.0, f32::MAX, 1e-40];
        let mut sorted = scores;
        sorted.sort_by(|a, b| b.total_cmp(a));
        let source = Chunks(scores.chunks(3).map(<[f32]>::to_vec).collect());
        let wide = Chunks(scores.chunks(3).map(|c| c.iter().map(|v| f64::from(*v)).collect()).collect());
        for k in 1..=scores.len() {
            let threshold = sorted[k - 1];
            let equal = scores.iter().filter(|s| **s == threshold).count() as u64;
            let chosen = k as u64 - scores.iter().filter(|s| **s > threshold).count() as u64;
            let decided_by_hash = if chosen < equal { chosen } else { 0 };
            let ties = Ties { at_threshold: equal, chosen, decided_by_hash };
            assert_eq!(find_cut(&source, k as u64), Cut { threshold, ties }, "{k}");
            assert_eq!(find_cut(&wide, k as u64), Cut { threshold: threshold.into(), ties }, "{k}");
        }
    }
}
