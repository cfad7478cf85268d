//! TIES and DARE: task vectors thinned out by size or by chance, weighted, and summed, on request only where they agree with
//! the sign elected.
//!
//! Differences from the base and the election are taken in f32 (f64 where an input is F64), sums in f64.

use crate::engine::{Block, Number};
use cpift_core::stream::random::splitmix64;

/// The settings of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct SignMerge {
    /// What becomes of most of each task vector.
    pub sparsify: Sparsify,
    /// The share of each task vector that stays.
    pub densities: Vec<f64>,
    /// Factor of each task vector.
    pub weights: Vec<f64>,
    /// Whether a thinned task vector is stretched to the sum of magnitudes it had before.
    pub rescale: bool,
    /// Whether the sign of an element is elected, and what points the other way left out.
    pub elect: bool,
    /// Whether the sum is divided by the weights that took part in it.
    pub normalize: bool,
    /// Factor of the sum.
    pub lambda: f64,
}

/// How task vectors are thinned out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sparsify {
    /// The largest elements stay, of equal ones the first.
    Trim,
    /// Each element stays by chance, drawn with the key of its task vector and its place.
    Drop {
        /// One key for each task vector.
        keys: Vec<u64>,
    },
}

/// Which elements of one task vector stay, and how they are stretched.
#[derive(Debug, Clone, PartialEq)]
pub struct Filter {
    /// Which.
    pub keep: Keep,
    /// Factor of those that stay.
    pub scale: f64,
}

/// Which elements of one task vector stay.
#[derive(Debug, Clone, PartialEq)]
pub enum Keep {
    /// All.
    All,
    /// Those of at least a magnitude.
    Above {
        /// The smallest magnitude that stays.
        threshold: f64,
        /// Of the elements that equal it, how many stay in each chunk, the first ones; empty where all do.
        ties: Vec<u64>,
    },
    /// Those whose random number is below a limit.
    Drawn {
        /// Key of the random numbers.
        key: u64,
        /// Below this share of 2⁵³.
        limit: u64,
    },
}

impl Filter {
    /// All stay, as they are.
    pub const ALL: Self = Self { keep: Keep::All, scale: 1.0 };

    /// Nothing stays.
    pub const NONE: Self = Self { keep: Keep::Above { threshold: f64::INFINITY, ties: Vec::new() }, scale: 1.0 };
}

impl Keep {
    /// The draw that keeps a share of `density`.
    pub fn drawn(key: u64, density: f64) -> Self {
        Self::Drawn { key, limit: (density * (1u64 << 53) as f64) as u64 }
    }

    /// How many elements equal to the threshold stay in `chunk`.
    pub fn ties_in(&self, chunk: usize) -> u64 {
        match self {
            Self::Above { ties, .. } => ties.get(chunk).copied().unwrap_or(u64::MAX),
            _ => 0,
        }
    }

    /// Sets the elements that do not stay to zero; `values[0]` is element `start` of the tensor, and `ties` how many equal to
    /// the threshold may still stay.
    #[inline(always)]
    pub fn apply<T: Number>(&self, values: &mut [T], start: usize, ties: &mut u64) {
        let zero = T::default();
        match self {
            Self::All => {}
            Self::Above { threshold, .. } if *ties == u64::MAX => {
                let threshold = T::from_f64(*threshold);
                values.iter_mut().for_each(|v| *v = if v.abs() < threshold { zero } else { *v });
            }
            Self::Above { threshold, .. } => {
                let threshold = T::from_f64(*threshold);
                for v in values {
                    let tied = v.abs() == threshold;
                    if v.abs() < threshold || tied && *ties == 0 {
                        *v = zero;
                    }
                    *ties -= u64::from(tied && *ties > 0);
                }
            }
            Self::Drawn { key, limit } => {
                for (j, v) in values.iter_mut().enumerate() {
                    *v = if splitmix64(*key, (start + j) as u64) >> 11 < *limit { *v } else { zero };
                }
            }
        }
    }
}

/// The key of the random numbers of one tensor of one model: seed, number and name mixed, eight bytes at a time.
pub fn key(seed: u64, model: usize, tensor: &str) -> u64 {
    let words = tensor.as_bytes().chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    let parts = [seed, model as u64, tensor.len() as u64].into_iter().chain(words);
    parts.fold(0, |key, part| splitmix64(key ^ part, 0))
}

/// Turns the operands of `block` into differences from its base.
#[inline(always)]
pub fn differences<T: Number>(block: &mut Block<T>) {
    for values in &mut block.operands {
        values.iter_mut().zip(&block.base).for_each(|(v, b)| *v = *v - *b);
    }
}

/// The sum of magnitudes, with sixteen running sums whose order never depends on the machine or the number of threads.
#[inline(always)]
pub fn sum_of_magnitudes<T: Number>(values: &[T]) -> f64 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0.0; 16];
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v.abs().to_f64();
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|v| v.abs().to_f64()).sum::<f64>()
}

/// The factor that restores a sum of magnitudes; 1 where one of the two is next to nothing.
pub fn stretch(before: f64, after: f64) -> f64 {
    const NOTHING: f64 = 1e-7;
    if before < NOTHING || after < NOTHING { 1.0 } else { before / after }
}

impl SignMerge {
    /// The draw that thins task vector `i`.
    pub fn drawn(&self, i: usize) -> Keep {
        match &self.sparsify {
            Sparsify::Drop { keys } if self.densities[i] < 1.0 => Keep::drawn(keys[i], self.densities[i]),
            _ => Keep::All,
        }
    }

    /// Merges the thinned task vectors in the operands of `block` about its base.
    #[inline(always)]
    pub fn merge<T: Number>(&self, filters: &[Filter], block: &mut Block<T>) {
        let Block { operands, base, out, sums, divisors } = block;
        let len = base.len();
        sums[..len].fill(0.0);
        out.resize(len, T::default());
        if self.elect {
            self.vote(filters, operands, out);
            divisors[..len].fill(0.0);
            for ((values, filter), weight) in operands.iter().zip(filters).zip(&self.weights) {
                let factor = weight * filter.scale;
                let totals = sums.iter_mut().zip(divisors.iter_mut());
                for ((v, vote), (sum, divisor)) in values.iter().zip(&*out).zip(totals) {
                    let term = factor * v.to_f64();
                    let agrees = if *vote >= T::default() { term > 0.0 } else { term < 0.0 };
                    *sum += if agrees { term } else { 0.0 };
                    *divisor += if agrees { *weight } else { 0.0 };
                }
            }
        } else {
            for ((values, filter), weight) in operands.iter().zip(filters).zip(&self.weights) {
                let factor = weight * filter.scale;
                values.iter().zip(sums.iter_mut()).for_each(|(v, sum)| *sum += factor * v.to_f64());
            }
            divisors[..len].fill(self.weights.iter().sum());
        }
        for (((o, b), sum), divisor) in out.iter_mut().zip(base).zip(&*sums).zip(&*divisors) {
            let divisor = if !self.normalize || divisor.abs() < 1e-8 { 1.0 } else { *divisor };
            *o = T::from_f64(b.to_f64() + sum / divisor * self.lambda);
        }
    }

    /// Sums the weighted task vectors; the sign of the sum is the one elected, + for zero.
    #[inline(always)]
    fn vote<T: Number>(&self, filters: &[Filter], operands: &[Vec<T>], votes: &mut [T]) {
        votes.fill(T::default());
        for ((values, filter), weight) in operands.iter().zip(filters).zip(&self.weights) {
            let (scale, weight) = (T::from_f64(filter.scale), T::from_f64(*weight));
            values.iter().zip(votes.iter_mut()).for_each(|(v, vote)| *vote = *vote + *v * scale * weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(rule: &SignMerge, base: &[f32], models: &[&[f32]]) -> Vec<f32> {
        let mut block = Block::new(models.len());
        block.base = base.to_vec();
        block.operands = models.iter().map(|m| m.to_vec()).collect();
        differences(&mut block);
        let filters = vec![Filter { keep: Keep::All, scale: 1.0 }; models.len()];
        rule.merge(&filters, &mut block);
        block.out
    }

    fn rule(elect: bool, normalize: bool, weights: &[f64]) -> SignMerge {
        let (sparsify, densities) = (Sparsify::Trim, vec![1.0; weights.len()]);
        SignMerge { sparsify, densities, weights: weights.to_vec(), rescale: false, elect, normalize, lambda: 0.5 }
    }

    #[test]
    fn only_what_agrees_with_the_elected_sign_counts() {
        // Element 0: both up. 1: 3 against −1, + wins. 2: 1 against −3, − wins. 3: 1 against −1, a draw is +. 4: nobody moves.
        let (base, a, b) = ([1.0; 5], [3.0, 4.0, 2.0, 2.0, 1.0], [5.0, 0.0, -2.0, 0.0, 1.0]);
        let found = merged(&rule(true, true, &[1.0, 1.0]), &base, &[&a, &b]);
        assert_eq!(found, [1.0 + 1.5, 1.0 + 1.5, 1.0 - 1.5, 1.0 + 0.5, 1.0]);
        let found = merged(&rule(true, false, &[1.0, 2.0]), &base, &[&a, &b]);
        assert_eq!(found, [1.0 + 5.0, 1.0 + 1.5, 1.0 - 3.0, 1.0 - 1.0, 1.0]);
    }

    #[test]
    fn without_an_election_all_of_it_is_summed() {
        let (base, a, b) = ([1.0; 2], [3.0, 0.0], [5.0, 2.0]);
        assert_eq!(merged(&rule(false, true, &[1.0, 3.0]), &base, &[&a, &b]), [1.0 + 1.75, 1.0 + 0.25]);
        assert_eq!(merged(&rule(false, true, &[1.0, -1.0]), &base, &[&a, &b]), [1.0 - 1.0, 1.0 - 1.0]);
    }

    #[test]
    fn trimming_keeps_what_is_large_and_the_first_of_equals() {
        let values = [0.5f32, -2.0, 2.0, 3.0, -2.0];
        let keep = |ties: Vec<u64>| {
            let (keep, mut values) = (Keep::Above { threshold: 2.0, ties }, values);
            let mut left = keep.ties_in(0);
            keep.apply(&mut values, 0, &mut left);
            values
        };
        assert_eq!(keep(vec![]), [0.0, -2.0, 2.0, 3.0, -2.0]);
        assert_eq!(keep(vec![2]), [0.0, -2.0, 2.0, 3.0, 0.0]);
        assert_eq!(keep(vec![0]), [0.0, 0.0, 0.0, 3.0, 0.0]);
    }

    #[test]
    fn draws_depend_on_seed_model_tensor_and_place_alone() {
        let draw = |key: u64, start: usize| {
            let mut values = [1.0f32; 1000];
            Keep::drawn(key, 0.3).apply(&mut values, start, &mut 0);
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
