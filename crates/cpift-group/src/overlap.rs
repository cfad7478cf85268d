//! Counting the bits that core regions share, over mapped masks, each byte read once.

use anyhow::Result;
use cpift_core::checkpoint::TensorKind;
use cpift_core::mask::count_ones;
use cpift_core::{BadInput, Mask};
use rayon::prelude::*;

/// Bytes of every mask that one piece of work looks at: small enough that a dozen masks' share stays in cache.
const BLOCK: usize = 16 * 1024;

/// How many bits pairs of regions share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Elements of the compared tensors.
    pub elements: u64,
    /// |a ∩ b| for every pair, row by row; |a| on the diagonal. [regions × regions]
    pub shared: Vec<Vec<u64>>,
}

impl Counts {
    /// Jaccard similarity of regions `a` and `b`: |a ∩ b| / |a ∪ b|; 0 where both are empty.
    pub fn jaccard(&self, a: usize, b: usize) -> f64 {
        let shared = self.shared[a][b];
        let union = self.shared[a][a] + self.shared[b][b] - shared;
        if union == 0 { 0.0 } else { shared as f64 / union as f64 }
    }

    /// The similarity of two independent random regions of the sizes of `a` and `b`: q_a·q_b / (q_a + q_b − q_a·q_b)
    /// with q = |region| / elements, which is q / (2 − q) for equal sizes.
    pub fn chance(&self, a: usize, b: usize) -> f64 {
        let q = |i: usize| self.shared[i][i] as f64 / self.elements as f64;
        let both = q(a) * q(b);
        if both == 0.0 { 0.0 } else { both / (q(a) + q(b) - both) }
    }

    /// A matrix of `value(a, b)`, [regions × regions].
    pub fn matrix(&self, value: impl Fn(&Self, usize, usize) -> f64) -> Vec<Vec<f64>> {
        let n = self.shared.len();
        (0..n).map(|a| (0..n).map(|b| value(self, a, b)).collect()).collect()
    }
}

/// Masks of one base, and which of their tensors are compared.
pub struct Regions<'a> {
    masks: &'a [Mask],
    blocks: Vec<Block<'a>>,
    elements: u64,
}

/// A run of bytes of one tensor, in all masks.
struct Block<'a> {
    bits: Vec<&'a [u8]>,
    compared: bool,
}

impl<'a> Regions<'a> {
    /// Cuts the tensors of `masks`, which have one layout, into blocks; tensors of the kinds in `excluded` are counted for
    /// the check of [`Regions::counts`] and not compared.
    pub fn new(masks: &'a [Mask], excluded: &[TensorKind]) -> Self {
        let (mut blocks, mut elements) = (Vec::new(), 0);
        for (name, numel) in &masks[0].header.numel {
            let compared = !excluded.iter().any(|kind| kind.matches(name));
            elements += if compared { *numel } else { 0 };
            let tensors: Vec<&[u8]> =
                masks.iter().map(|m| m.bits(name).expect("all masks have the same tensors")).collect();
            for start in (0..tensors[0].len()).step_by(BLOCK) {
                let end = tensors[0].len().min(start + BLOCK);
                blocks.push(Block { bits: tensors.iter().map(|t| &t[start..end]).collect(), compared });
            }
        }
        Self { masks, blocks, elements }
    }

    /// Counts for all pairs of masks, after checking that every mask has as many bits as it says.
    ///
    /// # Errors
    /// [`BadInput`] naming the mask whose bits are not those it was written with.
    pub fn counts(&self) -> Result<Counts> {
        let n = self.masks.len();
        let empty = || (vec![0; n], vec![vec![0; n]; n]);
        let (all, shared) = self
            .blocks
            .par_iter()
            .fold(empty, |(mut all, mut shared), block| {
                for a in 0..n {
                    let own = count_ones(block.bits[a]);
                    all[a] += own;
                    if block.compared {
                        shared[a][a] += own;
                        (0..a).for_each(|b| shared[a][b] += count_shared(block.bits[a], block.bits[b]));
                    }
                }
                (all, shared)
            })
            .reduce(empty, |(all, shared), (more, others)| (add(all, more), add_rows(shared, others)));
        self.check(&all)?;
        Ok(Counts { elements: self.elements, shared: mirrored(shared) })
    }

    fn check(&self, all: &[u64]) -> Result<()> {
        for (mask, &found) in self.masks.iter().zip(all) {
            if found != mask.header.selected {
                return Err(BadInput::new(mask.path(), "the number of bits set is not the one recorded")
                    .expected(mask.header.selected.to_string())
                    .found(found.to_string())
                    .hint("the file is damaged: extract the mask again")
                    .into());
            }
        }
        Ok(())
    }

    /// For each group (indices of masks), the Jaccard similarity of its united region and that of all other groups.
    pub fn against_others(&self, groups: &[Vec<usize>]) -> Vec<f64> {
        let empty = || vec![(0u64, 0u64); groups.len()];
        let counted = self.blocks.par_iter().filter(|b| b.compared).fold(empty, |mut sums, block| {
            let unions: Vec<Vec<u8>> = groups.iter().map(|group| union(group.iter().map(|i| block.bits[*i]))).collect();
            for (g, sum) in sums.iter_mut().enumerate() {
                let others = unions.iter().enumerate().filter(|(h, _)| *h != g).map(|(_, u)| u.as_slice());
                let rest = union(others);
                let shared = if rest.is_empty() { 0 } else { count_shared(&unions[g], &rest) };
                *sum = (sum.0 + shared, sum.1 + count_ones(&unions[g]) + count_ones(&rest) - shared);
            }
            sums
        });
        let sums = counted.reduce(empty, |mut sums, more| {
            sums.iter_mut().zip(more).for_each(|(sum, (shared, union))| *sum = (sum.0 + shared, sum.1 + union));
            sums
        });
        sums.into_iter().map(|(shared, union)| if union == 0 { 0.0 } else { shared as f64 / union as f64 }).collect()
    }
}

/// The union of regions of equal length; empty when there are none.
fn union<'a>(regions: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for region in regions {
        if out.is_empty() {
            out = region.to_vec();
        } else {
            out.iter_mut().zip(region).for_each(|(o, r)| *o |= r);
        }
    }
    out
}

/// Number of bits set in both of two regions of equal length.
fn count_shared(a: &[u8], b: &[u8]) -> u64 {
    let ((words_a, rest_a), (words_b, rest_b)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
    let whole: u64 = words_a.iter().zip(words_b).map(|(x, y)| u64::from((word(x) & word(y)).count_ones())).sum();
    whole + rest_a.iter().zip(rest_b).map(|(x, y)| u64::from((x & y).count_ones())).sum::<u64>()
}

fn add(mut sums: Vec<u64>, more: Vec<u64>) -> Vec<u64> {
    sums.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
    sums
}

fn add_rows(sums: Vec<Vec<u64>>, more: Vec<Vec<u64>>) -> Vec<Vec<u64>> {
    sums.into_iter().zip(more).map(|(row, other)| add(row, other)).collect()
}

fn mirrored(lower: Vec<Vec<u64>>) -> Vec<Vec<u64>> {
    let n = lower.len();
    (0..n).map(|a| (0..n).map(|b| lower[a.max(b)][a.min(b)]).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_q_over_two_minus_q_for_equal_sizes() {
        let counts = Counts { elements: 1000, shared: vec![vec![10, 2], vec![2, 10]] };
        assert!((counts.chance(0, 1) - 0.01 / 1.99).abs() < 1e-15);
        assert_eq!(counts.jaccard(0, 1), 2.0 / 18.0);
        assert_eq!(counts.jaccard(1, 1), 1.0);
        let uneven = Counts { elements: 100, shared: vec![vec![10, 0], vec![0, 50]] };
        assert!((uneven.chance(0, 1) - 0.05 / 0.55).abs() < 1e-15);
    }

    #[test]
    fn shared_bits_are_counted_past_the_last_word() {
        let (a, b) = ([0b1110u8; 11], [0b0111u8; 11]);
        assert_eq!(count_shared(&a, &b), 22);
        assert_eq!(union([&a[..], &b[..]].into_iter()), [0b1111; 11]);
        assert!(union(std::iter::empty()).is_empty());
    }
}
