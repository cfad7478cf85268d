//! TIES, DARE, DELLA and Breadcrumbs: task vectors thinned by size or at random, weighted, and
//! summed, optionally only where they agree with the elected sign.
//!
//! Differences from the base and the election are taken in f32 (f64 if an input is F64), sums in
//! f64.

use std::ops::{Add, Mul, Sub};

use cpift_core::stream::random::splitmix64;
use cpift_core::stream::select::{GROUP, Score};
use cpift_core::stream::ties::{TieCut, TieKey};

use super::region::outside;

/// Type in which a tensor is merged: `f32`, which holds every element of an F32, F16 or BF16 input
/// exactly, or `f64` if an input is F64.
pub(crate) trait Number: Score + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> {
    /// Number of bits of the mantissa that are stored.
    const MANTISSA: u32;

    /// The magnitude.
    fn abs(self) -> Self;
}

impl Number for f32 {
    const MANTISSA: u32 = Self::MANTISSA_DIGITS - 1;

    #[inline(always)]
    fn abs(self) -> Self {
        Self::abs(self)
    }
}

impl Number for f64 {
    const MANTISSA: u32 = Self::MANTISSA_DIGITS - 1;

    #[inline(always)]
    fn abs(self) -> Self {
        Self::abs(self)
    }
}

/// Settings of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SignMerge {
    /// Settings of each task vector.
    pub vectors: Vec<TaskVector>,
    /// Selection of the elements that are kept.
    pub sparsify: Sparsify,
    /// Scale a thinned task vector up to the sum of magnitudes it had before.
    pub rescale: bool,
    /// Elect the sign of each element and leave out the terms of the other sign.
    pub elect: bool,
    /// Divide each sum by the weights that took part in it.
    pub normalize: bool,
    /// Factor of the sum.
    pub lambda: f64,
}

/// Settings of one task vector.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TaskVector {
    /// Factor of the task vector.
    pub weight: f64,
    /// Share of its elements that is kept, 0 to 1.
    pub density: f64,
    /// Key of the random numbers by which elements are dropped.
    pub key: u64,
    /// Share of the elements that are dropped as too large (γ), or half the range of the
    /// probabilities to keep one (ε).
    pub spread: f64,
}

/// Selection of the elements of a task vector that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sparsify {
    /// The largest are kept, equal ones in the order of their tie hashes.
    Trim,
    /// Each is kept with the probability `density`.
    Drop,
    /// As [`Sparsify::Trim`], after the share `spread` of the largest has been dropped.
    Outliers,
    /// Each is kept with a probability from `density` − `spread` for the smallest of its row to
    /// `density` + `spread` for the largest.
    Prune,
}

/// Elements of one task vector that are kept, and their factor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Filter {
    /// Elements that are kept.
    pub keep: Keep,
    /// Factor of the elements that are kept.
    pub scale: f64,
}

/// Elements of one task vector that are kept.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Keep {
    /// All elements.
    All,
    /// Elements of at least the magnitude `threshold`.
    Above {
        /// Smallest magnitude that is kept.
        threshold: f64,
        /// Elements equal to the threshold that are kept, in the order of their tie hashes; `None`
        /// if all are.
        ties: Option<(TieKey, TieCut)>,
    },
    /// Elements whose random number of 53 bits is below `limit`.
    Drawn {
        /// Key of the random numbers.
        key: u64,
        /// Density times 2⁵³.
        limit: u64,
    },
    /// Elements whose packed bits are set.
    Bits(Vec<u8>),
}

impl Filter {
    /// Keeps all elements as they are.
    pub const ALL: Self = Self { keep: Keep::All, scale: 1.0 };

    /// Keeps no element.
    pub const NONE: Self = Self { keep: Keep::Above { threshold: f64::INFINITY, ties: None }, scale: 1.0 };
}

impl Keep {
    /// Random selection of a share of `density`.
    pub fn drawn(key: u64, density: f64) -> Self {
        Self::Drawn { key, limit: (density * (1u64 << 53) as f64) as u64 }
    }

    /// Sets the elements that are not kept, and those that `without` keeps, to zero; `values[0]` is
    /// element `start` of the tensor, with packed bits a multiple of 8.
    #[inline(always)]
    pub fn apply<T: Number>(&self, without: Option<&Self>, values: &mut [T], start: usize) {
        if matches!((self, without), (Self::All, None)) {
            return;
        }
        // Loops of known length become vector instructions without a remainder.
        let (groups, rest) = values.as_chunks_mut::<GROUP>();
        let end = start + GROUP * groups.len();
        for (group, values) in groups.iter_mut().enumerate() {
            let start = start + GROUP * group;
            keep_bits(self.bits(without, values, start), values);
        }
        keep_bits(self.bits(without, rest, end), rest);
    }

    /// Bits of those of at most 64 `values` that are kept and that `without` does not keep.
    #[inline(always)]
    fn bits<T: Number>(&self, without: Option<&Self>, values: &[T], start: usize) -> u64 {
        match without {
            Some(without) => self.kept(values, start) & !without.kept(values, start),
            None => self.kept(values, start),
        }
    }

    /// Bits of those of at most 64 `values`, the first of which is element `start`, that are kept.
    #[inline(always)]
    fn kept<T: Number>(&self, values: &[T], start: usize) -> u64 {
        match self {
            Self::All => u64::MAX,
            Self::Above { threshold, ties } => {
                let threshold = T::from_f64(*threshold);
                let (mut above, mut tied) = (0u64, 0u64);
                for (bit, v) in values.iter().enumerate() {
                    above |= u64::from(v.abs() > threshold) << bit;
                    tied |= u64::from(v.abs() == threshold) << bit;
                }
                match ties {
                    Some((key, last)) => above | key.chosen(start, tied, *last),
                    None => above | tied,
                }
            }
            Self::Drawn { key, limit } => drawn(*key, *limit, start),
            Self::Bits(bits) => word_at(&bits[start / 8..]),
        }
    }
}

/// Bits of the 64 elements from element `start` on whose random numbers of 53 bits are below
/// `limit`.
#[inline(always)]
fn drawn(key: u64, limit: u64, start: usize) -> u64 {
    let mut word = 0u64;
    for bit in 0..GROUP {
        word |= u64::from(splitmix64(key, (start + bit) as u64) >> 11 < limit) << bit;
    }
    word
}

/// The first 64 of packed bits; those past the end are not set.
#[inline(always)]
pub(crate) fn word_at(bits: &[u8]) -> u64 {
    match bits.first_chunk::<8>() {
        Some(word) => u64::from_le_bytes(*word),
        None => bits.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    }
}

/// Appends packed bits of `len` elements, the first of which is element `start`: those whose random
/// numbers of 53 bits are below `limit`.
#[inline(always)]
pub(crate) fn draw(key: u64, limit: u64, start: usize, len: usize, bits: &mut Vec<u8>) {
    for first in (0..len).step_by(GROUP) {
        let word = drawn(key, limit, start + first);
        bits.extend_from_slice(&word.to_le_bytes()[..GROUP.min(len - first).div_ceil(8)]);
    }
}

/// Sets those of at most 64 `values` to zero whose bits are not set.
#[inline(always)]
fn keep_bits<T: Number>(bits: u64, values: &mut [T]) {
    for (bit, v) in values.iter_mut().enumerate() {
        *v = if bits >> bit & 1 == 1 { *v } else { T::default() };
    }
}

/// Sets the values to zero whose packed bits are not set; `values[0]` is element `start`.
#[inline(always)]
pub(crate) fn keep_packed<T: Number>(bits: &[u8], start: usize, values: &mut [T]) {
    if !start.is_multiple_of(8) {
        outside(bits, start, values, |_, v| *v = T::default());
        return;
    }
    for (group, values) in values.chunks_mut(GROUP).enumerate() {
        let word = word_at(&bits[start / 8 + 8 * group..]);
        // A loop of known length becomes vector instructions without a remainder.
        match values.first_chunk_mut::<GROUP>() {
            Some(full) => keep_bits(word, full),
            None => keep_bits(word, values),
        }
    }
}

/// Key of the random numbers of one tensor of one model: seed, index and name mixed, eight bytes at
/// a time.
pub(crate) fn key(seed: u64, model: usize, tensor: &str) -> u64 {
    let words = tensor.as_bytes().chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    let parts = [seed, model as u64, tensor.len() as u64].into_iter().chain(words);
    parts.fold(0, |key, part| splitmix64(key ^ part, 0))
}

/// Turns the operands into their differences from `base`.
#[inline(always)]
pub(crate) fn subtract_base<T: Number>(operands: &mut [Vec<T>], base: &[T]) {
    for values in operands {
        values.iter_mut().zip(base).for_each(|(v, b)| *v = *v - *b);
    }
}

/// Sum of magnitudes, in sixteen running sums whose order never depends on the machine or the
/// number of threads.
#[inline(always)]
pub(crate) fn sum_of_magnitudes<T: Number>(values: &[T]) -> f64 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0.0; 16];
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v.abs().to_f64();
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|v| v.abs().to_f64()).sum::<f64>()
}

/// Factor that restores a sum of magnitudes; 1 if one of the two sums is close to zero.
pub(crate) fn rescaling(before: f64, after: f64) -> f64 {
    const CLOSE_TO_ZERO: f64 = 1e-7;
    if before < CLOSE_TO_ZERO || after < CLOSE_TO_ZERO { 1.0 } else { before / after }
}

impl SignMerge {
    /// Random selection that thins `vector`; all elements if none are dropped at random.
    pub fn drawn(&self, vector: &TaskVector) -> Keep {
        match self.sparsify {
            Sparsify::Drop if vector.density < 1.0 => Keep::drawn(vector.key, vector.density),
            _ => Keep::All,
        }
    }

    /// Merges the thinned task vectors `operands` about `base`, which is as long as `out`, into
    /// `out`.
    #[inline(always)]
    pub fn merge<T: Number>(&self, filters: &[Filter], operands: &[Vec<T>], base: &[T], out: &mut [T]) {
        /// Elements whose sums stay in the first-level cache.
        const SIDE: usize = 128;
        let terms = || operands.iter().zip(filters).zip(&self.vectors);
        for (at, (out, base)) in out.chunks_mut(SIDE).zip(base.chunks(SIDE)).enumerate() {
            let side = SIDE * at..SIDE * at + out.len();
            let (mut sums, mut divisors) = ([0.0; SIDE], [0.0; SIDE]);
            if self.elect {
                // The sign of the weighted sum is elected, + for zero.
                out.fill(T::default());
                for ((values, filter), TaskVector { weight, .. }) in terms() {
                    let (scale, weight) = (T::from_f64(filter.scale), T::from_f64(*weight));
                    let pairs = values[side.clone()].iter().zip(out.iter_mut());
                    pairs.for_each(|(v, vote)| *vote = *vote + *v * scale * weight);
                }
                for ((values, filter), TaskVector { weight, .. }) in terms() {
                    let factor = weight * filter.scale;
                    let totals = sums.iter_mut().zip(&mut divisors);
                    for ((v, vote), (sum, divisor)) in values[side.clone()].iter().zip(&*out).zip(totals) {
                        let term = factor * v.to_f64();
                        let agrees = if *vote >= T::default() { term > 0.0 } else { term < 0.0 };
                        *sum += if agrees { term } else { 0.0 };
                        *divisor += if agrees { *weight } else { 0.0 };
                    }
                }
            } else {
                for ((values, filter), TaskVector { weight, .. }) in terms() {
                    let factor = weight * filter.scale;
                    let values = &values[side.clone()];
                    values.iter().zip(&mut sums).for_each(|(v, sum)| *sum += factor * v.to_f64());
                }
                divisors.fill(self.vectors.iter().map(|v| v.weight).sum());
            }
            if self.normalize {
                for (sum, divisor) in sums.iter_mut().zip(&divisors) {
                    *sum /= if divisor.abs() < 1e-8 { 1.0 } else { *divisor };
                }
            }
            let pairs = out.iter_mut().zip(base).zip(&sums);
            pairs.for_each(|((o, b), sum)| *o = T::from_f64(b.to_f64() + sum * self.lambda));
        }
    }
}

#[cfg(test)]
mod tests {
    use cpift_core::format::digest::Digest;
    use cpift_core::stream::ties::TieSalt;

    use super::*;

    fn merged(rule: &SignMerge, base: &[f32], models: &[&[f32]]) -> Vec<f32> {
        let mut operands: Vec<Vec<f32>> = models.iter().map(|m| m.to_vec()).collect();
        subtract_base(&mut operands, base);
        let filters = vec![Filter::ALL; models.len()];
        let mut out = vec![0.0; base.len()];
        rule.merge(&filters, &operands, base, &mut out);
        out
    }

    fn rule(elect: bool, normalize: bool, weights: &[f64]) -> SignMerge {
        let vectors = weights.iter().map(|&weight| TaskVector { weight, density: 1.0, key: 0, spread: 0.0 }).collect();
        SignMerge { vectors, sparsify: Sparsify::Trim, rescale: false, elect, normalize, lambda: 0.5 }
    }

    #[test]
    fn only_what_agrees_with_the_elected_sign_counts() {
        // Element 0: both up. 1: 3 against −1, + wins. 2: 1 against −3, − wins. 3: 1 against −1, a
        // draw is +. 4: nobody moves.
        let (base, a, b) = ([1.0; 5], [3.0, 4.0, 2.0, 2.0, 1.0], [5.0, 0.0, -2.0, 0.0, 1.0]);
        let found = merged(&rule(true, true, &[1.0, 1.0]), &base, &[&a, &b]);
        assert_eq!(found, [1.0 + 1.5, 1.0 + 1.5, 1.0 - 1.5, 1.0 + 0.5, 1.0]);
        let found = merged(&rule(true, false, &[1.0, 2.0]), &base, &[&a, &b]);
        assert_eq!(found, [1.0 + 5.0, 1.0 + 1.5, 1.0 - 3.0, 1.0 - 1.0, 1.0]);
    }

    #[test]
    fn without_an_election_all_terms_are_summed() {
        let (base, a, b) = ([1.0; 2], [3.0, 0.0], [5.0, 2.0]);
        assert_eq!(merged(&rule(false, true, &[1.0, 3.0]), &base, &[&a, &b]), [1.0 + 1.75, 1.0 + 0.25]);
        assert_eq!(merged(&rule(false, true, &[1.0, -1.0]), &base, &[&a, &b]), [1.0 - 1.0, 1.0 - 1.0]);
    }

    #[test]
    fn trimming_keeps_large_elements_and_equals_with_small_hashes() {
        let values = [0.5f32, -2.0, 2.0, 3.0, -2.0];
        let keep = |ties: Option<(TieKey, TieCut)>, start: usize| {
            let (keep, mut values) = (Keep::Above { threshold: 2.0, ties }, values);
            keep.apply(None, &mut values, start);
            values
        };
        assert_eq!(keep(None, 0), [0.0, -2.0, 2.0, 3.0, -2.0]);
        let key = TieSalt::new(&Digest::blank()).key("w");
        for start in [0, 1024] {
            let mut tied = [1, 2, 4].map(|j| (key.hash(start + j), (start + j) as u64));
            let last = TieCut::among(&mut tied, 2);
            tied.sort_unstable();
            let mut expected = [0.0, -2.0, 2.0, 3.0, -2.0];
            expected[tied[2].1 as usize - start] = 0.0;
            assert_eq!(keep(Some((key, last)), start), expected);
        }
    }

    #[test]
    fn draws_depend_on_seed_model_tensor_and_place_alone() {
        let draw = |key: u64, start: usize| {
            let mut values = [1.0f32; 1000];
            Keep::drawn(key, 0.3).apply(None, &mut values, start);
            values
        };
        let one = key(1, 0, "w");
        assert_eq!(draw(one, 0)[100..], draw(one, 100)[..900]);
        for other in [key(2, 0, "w"), key(1, 1, "w"), key(1, 0, "v"), key(1, 0, "ww")] {
            assert_ne!(draw(one, 0), draw(other, 0));
        }
        let kept = (0..100).map(|i| draw(one, 1000 * i).iter().sum::<f32>()).sum::<f32>();
        // 100,000 draws at 0.3: a standard deviation is 145.
        assert!((kept - 30_000.0).abs() < 600.0, "{kept}");
    }
}
