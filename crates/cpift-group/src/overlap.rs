//! Counts of the bits that core regions share, by layer, in one pass over the mapped masks that
//! also hashes the files.

use anyhow::Result;
use cpift_core::dispatch;
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{clear_flagged, count_ones};
use cpift_core::format::names::{LayerRows, TensorKind};
use cpift_core::record::provenance::Provenance;
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::{BadInput, Dtype, Mask, TensorSpec};
use rayon::prelude::*;

/// Bytes of every mask that are hashed and counted together. Pieces of a dozen masks fit a thread's
/// second-level cache.
const PIECE: usize = 64 * 1024;

/// Bytes of every mask that are compared pair by pair at a time. Blocks of five masks fit the
/// first-level cache.
const BLOCK: usize = 8 * 1024;

/// Number of bits that pairs of regions share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Elements of the compared tensors.
    pub(crate) elements: u64,
    /// |a ∩ b| for every pair; |a| on the diagonal. [regions × regions]
    pub(crate) shared: Vec<Vec<u64>>,
}

impl Counts {
    /// Jaccard similarity of regions `a` and `b`: |a ∩ b| / |a ∪ b|; 0 if both are empty.
    pub(crate) fn jaccard(&self, a: usize, b: usize) -> f64 {
        let shared = self.shared[a][b];
        let union = self.shared[a][a] + self.shared[b][b] - shared;
        if union == 0 { 0.0 } else { shared as f64 / union as f64 }
    }

    /// The similarity of two independent random regions of the sizes of `a` and `b`: q_a·q_b / (q_a
    /// + q_b − q_a·q_b) with q = |region| / elements, which is q / (2 − q) for equal sizes.
    pub(crate) fn chance(&self, a: usize, b: usize) -> f64 {
        let q = |i: usize| self.shared[i][i] as f64 / self.elements as f64;
        let both = q(a) * q(b);
        if both == 0.0 { 0.0 } else { both / (q(a) + q(b) - both) }
    }

    /// A matrix of `value(a, b)`, [regions × regions].
    pub(crate) fn matrix(&self, value: impl Fn(&Self, usize, usize) -> f64) -> Vec<Vec<f64>> {
        let n = self.shared.len();
        (0..n).map(|a| (0..n).map(|b| value(self, a, b)).collect()).collect()
    }
}

/// The counts of all compared tensors, and of each layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Overlap {
    /// All compared tensors.
    pub(crate) total: Counts,
    /// All compared tensors, without the elements chosen among equals; `None` if there are none.
    pub(crate) without_ties: Option<Counts>,
    /// Layers, with the order and names of [`LayerRows`].
    pub(crate) layers: Vec<(String, Counts)>,
}

/// Masks of one base, with the tensors that are compared.
pub(crate) struct Regions<'a> {
    masks: &'a [Mask],
    tensors: Vec<Tensor<'a>>,
    /// Sorted by position in the first mask's file.
    blocks: Vec<Block>,
    labels: Vec<String>,
    /// Elements by layer.
    elements: Vec<u64>,
    /// For each mask with flags of ties, the flags and the number of the first one of each block.
    flags: Vec<Option<(&'a [u8], Vec<u64>)>>,
}

/// A tensor's bits in all masks.
struct Tensor<'a> {
    bits: Vec<&'a [u8]>,
    /// Row of its layer; one past the last if it is not compared.
    row: usize,
}

/// A run of bytes of one tensor.
struct Block {
    tensor: usize,
    start: usize,
    /// Position in the first mask's file.
    offset: usize,
    /// Index among all blocks.
    index: usize,
}

impl<'a> Regions<'a> {
    /// The tensors of `masks`, which have one layout; those of the kinds in `excluded` are counted
    /// for the check of [`Regions::count`] and not compared.
    pub(crate) fn new(masks: &'a [Mask], excluded: &[TensorKind]) -> Self {
        let numel = &masks[0].header.numel;
        let compared = |name: &&str| !excluded.iter().any(|kind| kind.matches(name));
        let rows = LayerRows::new(numel.keys().map(String::as_str).filter(compared));
        let mut elements = vec![0; rows.labels.len()];
        let (mut tensors, mut blocks) = (Vec::new(), Vec::new());
        for (name, n) in numel {
            let row = if compared(&name.as_str()) { rows.row(name) } else { rows.labels.len() };
            if let Some(sum) = elements.get_mut(row) {
                *sum += n;
            }
            let range = masks[0].range(name).expect("a mask has the tensors of its header");
            let tensor = tensors.len();
            let block = |start| Block { tensor, start, offset: range.start + start, index: 0 };
            blocks.extend((0..range.len()).step_by(BLOCK).map(block));
            let bits = masks.iter().map(|m| m.bits(name).expect("all masks have the same tensors")).collect();
            tensors.push(Tensor { bits, row });
        }
        blocks.sort_by_key(|block| block.offset);
        blocks.iter_mut().enumerate().for_each(|(index, block)| block.index = index);
        let flags =
            masks.iter().enumerate().map(|(i, mask)| Some((mask.tie_flags()?, first_flags(i, &tensors, &blocks))));
        let flags = flags.collect();
        Self { masks, tensors, blocks, labels: rows.labels, elements, flags }
    }

    /// Counts all pairs of masks, and checks that every mask has as many bits set as its header
    /// says.
    ///
    /// # Errors
    /// [`BadInput`] with the mask whose number of bits is not the recorded one.
    pub(crate) fn count(&self) -> Result<Overlap> {
        self.count_and(|_| ())
    }

    /// As [`Regions::count`], with the digests of the mask files: the ones recorded beside them,
    /// or computed in the same pass.
    ///
    /// # Errors
    /// As [`Regions::count`].
    pub(crate) fn count_and_hash(&self) -> Result<(Overlap, Vec<Digest>)> {
        // For the hasher, every file is one tensor of bytes.
        let spec = |mask: &Mask| TensorSpec {
            name: mask.path().display().to_string(),
            dtype: Dtype::U8,
            shape: vec![mask.file_bytes().len()],
        };
        let specs: Vec<TensorSpec> = self.masks.iter().map(spec).collect();
        let hasher = PieceHasher::new(&specs, PIECE);
        let known: Vec<Option<Digest>> =
            self.masks.iter().map(|mask| Provenance::recorded_file_digest(mask.path())).collect();
        let overlap = self.count_and(|piece| {
            for (i, mask) in self.masks.iter().enumerate() {
                let (file, start) = (mask.file_bytes(), piece * PIECE);
                if known[i].is_none() && start < file.len() {
                    hasher.add(i, start, &file[start..file.len().min(start + PIECE)]);
                }
            }
        })?;
        let digests = known.into_iter().enumerate().map(|(i, known)| known.unwrap_or_else(|| hasher.tensor(i)));
        Ok((overlap, digests.collect()))
    }

    /// Counts piece by piece. `also` gets each piece first, and leaves it in cache.
    fn count_and(&self, also: impl Fn(usize) + Sync) -> Result<Overlap> {
        let (n, cells) = (self.masks.len(), triangle(self.masks.len(), 0));
        let rows = self.labels.len() + 1;
        let has_ties = self.flags.iter().any(Option::is_some);
        // The rows of all elements come first, then those without ties.
        let sums = self.sum_pieces(if has_ties { 2 * rows } else { rows } * cells, |sums, piece, blocks| {
            also(piece);
            dispatch!({
                let mut bits = Vec::with_capacity(n);
                let mut untied = vec![[0u8; BLOCK]; if has_ties { n } else { 0 }];
                for block in blocks {
                    let row = self.tensors[block.tensor].row;
                    self.cut(block, &mut bits);
                    let compared = row < self.labels.len();
                    add_pairs(&bits, compared, &mut sums[row * cells..]);
                    if has_ties && compared {
                        let len = bits[0].len();
                        for ((copy, bits), flags) in untied.iter_mut().zip(&bits).zip(&self.flags) {
                            copy[..len].copy_from_slice(bits);
                            if let Some((flags, first)) = flags {
                                clear_flagged(&mut copy[..len], flags, first[block.index]);
                            }
                        }
                        let cut: Vec<&[u8]> = untied.iter().map(|copy| &copy[..len]).collect();
                        add_pairs(&cut, true, &mut sums[(rows + row) * cells..]);
                    }
                }
            });
        });
        let counted: Vec<&[u64]> = sums.chunks_exact(cells).collect();
        let (all, without_ties) = counted.split_at(rows);
        self.check(all)?;
        let without_ties = has_ties.then(|| self.total(without_ties));
        Ok(Overlap { without_ties, ..self.overlap(&all[..self.labels.len()]) })
    }

    fn overlap(&self, rows: &[&[u64]]) -> Overlap {
        let layer = |(i, row): (usize, &&[u64])| {
            let counts = Counts { elements: self.elements[i], shared: self.square(&|place| row[place]) };
            (self.labels[i].clone(), counts)
        };
        Overlap { total: self.total(rows), without_ties: None, layers: rows.iter().enumerate().map(layer).collect() }
    }

    /// Counts over the compared tensors.
    fn total(&self, rows: &[&[u64]]) -> Counts {
        let compared = &rows[..self.labels.len()];
        let shared = self.square(&|place| compared.iter().map(|row| row[place]).sum());
        Counts { elements: self.elements.iter().sum(), shared }
    }

    /// A symmetric matrix of values in the order of [`triangle`].
    fn square(&self, of: &dyn Fn(usize) -> u64) -> Vec<Vec<u64>> {
        let n = self.masks.len();
        (0..n).map(|a| (0..n).map(|b| of(triangle(a.max(b), a.min(b)))).collect()).collect()
    }

    fn check(&self, rows: &[&[u64]]) -> Result<()> {
        for (i, mask) in self.masks.iter().enumerate() {
            let found: u64 = rows.iter().map(|row| row[triangle(i, i)]).sum();
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

    /// For each group (indices of masks), the Jaccard similarity of its united region and that of
    /// all other groups.
    pub(crate) fn against_others(&self, groups: &[Vec<usize>]) -> Vec<f64> {
        // The union of a group and all others is the same for every group. Their intersection is
        // the group's part of the elements that at least two groups cover.
        let sums = self.sum_pieces(groups.len() + 1, |sums, _, blocks| {
            dispatch!({
                let mut bits = Vec::with_capacity(self.masks.len());
                let mut unions = vec![[0u8; BLOCK]; groups.len()];
                for block in blocks.iter().filter(|b| self.tensors[b.tensor].row < self.labels.len()) {
                    self.cut(block, &mut bits);
                    let (mut once, mut twice) = ([0u8; BLOCK], [0u8; BLOCK]);
                    for (group, union) in groups.iter().zip(&mut unions) {
                        union.fill(0);
                        group.iter().for_each(|i| union.iter_mut().zip(bits[*i]).for_each(|(u, b)| *u |= b));
                        twice.iter_mut().zip(&once).zip(&*union).for_each(|((t, o), u)| *t |= o & u);
                        once.iter_mut().zip(&*union).for_each(|(o, u)| *o |= u);
                    }
                    unions.iter().zip(sums.iter_mut()).for_each(|(u, sum)| *sum += count_shared(u, &twice));
                    sums[groups.len()] += count_shared(&once, &once);
                }
            });
        });
        let all = sums[groups.len()];
        let share = |shared: &u64| if all == 0 { 0.0 } else { *shared as f64 / all as f64 };
        sums[..groups.len()].iter().map(share).collect()
    }

    /// The bytes of `block` in all masks.
    #[inline(always)]
    fn cut(&self, block: &Block, bits: &mut Vec<&'a [u8]>) {
        let tensor = &self.tensors[block.tensor];
        let end = tensor.bits[0].len().min(block.start + BLOCK);
        bits.clear();
        bits.extend(tensor.bits.iter().map(|bits| &bits[block.start..end]));
    }

    /// Sums over all pieces. `work` adds to them, given the piece's index and the blocks that begin
    /// in it.
    fn sum_pieces(&self, sums: usize, work: impl Fn(&mut [u64], usize, &[Block]) + Sync) -> Vec<u64> {
        let longest = self.masks.iter().map(|m| m.file_bytes().len()).max().unwrap_or(0);
        let first = |piece: usize| self.blocks.partition_point(|b| b.offset < piece * PIECE);
        (0..longest.div_ceil(PIECE))
            .into_par_iter()
            .fold(
                || vec![0; sums],
                |mut sums, piece| {
                    work(&mut sums, piece, &self.blocks[first(piece)..first(piece + 1)]);
                    sums
                },
            )
            .reduce(
                || vec![0; sums],
                |mut sums, more| {
                    sums.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
                    sums
                },
            )
    }
}

/// Number of the first flag of each block of mask `i`: the number of its bits set before the block,
/// in the order of the tensors' names.
fn first_flags(i: usize, tensors: &[Tensor<'_>], blocks: &[Block]) -> Vec<u64> {
    let count = |block: &Block| {
        let bits = tensors[block.tensor].bits[i];
        dispatch!(count_ones(&bits[block.start..bits.len().min(block.start + BLOCK)]))
    };
    let counts: Vec<u64> = blocks.par_iter().map(count).collect();
    let mut order: Vec<&Block> = blocks.iter().collect();
    order.sort_unstable_by_key(|block| (block.tensor, block.start));
    let (mut first, mut sum) = (vec![0; blocks.len()], 0);
    for block in order {
        first[block.index] = sum;
        sum += counts[block.index];
    }
    first
}

/// Adds the numbers of bits that pairs of regions share to `sums`; those of single regions only, if
/// `pairs` is false.
#[inline(always)]
fn add_pairs(bits: &[&[u8]], pairs: bool, sums: &mut [u64]) {
    for a in 0..bits.len() {
        for b in if pairs { 0..a + 1 } else { a..a + 1 } {
            sums[triangle(a, b)] += count_shared(bits[a], bits[b]);
        }
    }
}

/// Index of pair (a, b), b ≤ a, in a lower triangle stored row by row.
#[inline(always)]
fn triangle(a: usize, b: usize) -> usize {
    a * (a + 1) / 2 + b
}

/// Number of bits set in both of two regions of equal length.
#[inline(always)]
fn count_shared(a: &[u8], b: &[u8]) -> u64 {
    let ((words_a, rest_a), (words_b, rest_b)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
    let whole: u64 = words_a.iter().zip(words_b).map(|(x, y)| u64::from((word(x) & word(y)).count_ones())).sum();
    whole + rest_a.iter().zip(rest_b).map(|(x, y)| u64::from((x & y).count_ones())).sum::<u64>()
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
        assert_eq!(count_shared(&[], &[]), 0);
    }
}
