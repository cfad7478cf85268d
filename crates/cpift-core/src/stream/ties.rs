//! Order of elements with equal scores: by a hash of the tuned checkpoint, the tensor's name and
//! the element's index.
//!
//! Between bf16 checkpoints most of a core region can be chosen among equals. A choice by position
//! would put it into the tensors whose names sort first, and would make independent regions look
//! alike. The hash spreads the choice evenly, makes the choices of two tasks independent, and is
//! the same on every machine.
//!
//! The key of a tensor is the first eight bytes, as a little-endian number, of the BLAKE3 hash of
//! the digest in hexadecimal, a zero byte and the name. The hash of element i is number i of the
//! SplitMix64 sequence that starts at the key. Elements with small hashes are chosen first, and of
//! two with the same hash the one that comes first.

use rayon::prelude::*;

use crate::format::digest::Digest;
use crate::stream::random::splitmix64;

/// Identity of the tuned checkpoint in the hashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TieSalt(Digest);

impl TieSalt {
    /// The salt of the checkpoint with this digest.
    pub fn new(tuned: &Digest) -> Self {
        Self(tuned.clone())
    }

    /// Key of the tensor `name`.
    pub fn key(&self, name: &str) -> TieKey {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.0.to_string().as_bytes()).update(&[0]).update(name.as_bytes());
        let hash = hasher.finalize();
        TieKey(u64::from_le_bytes(hash.as_bytes().as_chunks::<8>().0[0]))
    }
}

/// Key of the hashes of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TieKey(u64);

impl TieKey {
    /// Hash of element `index` of the tensor.
    #[inline(always)]
    pub fn hash(self, index: usize) -> u64 {
        splitmix64(self.0, index as u64)
    }

    /// Of the 64 elements from `start` on whose bits are set in `tied`, those whose hashes lie
    /// below `band`, and those whose hashes lie in it. Call inside [`crate::dispatch!`].
    #[inline(always)]
    pub fn split(self, start: usize, tied: u64, band: HashBand) -> (u64, u64) {
        let [below, inside] = self.select(
            start,
            tied,
            #[inline(always)]
            |hash, _| {
                let below = hash < band.low;
                [below, !below & (hash <= band.high)]
            },
        );
        (below, inside)
    }

    /// Of the 64 elements from `start` on whose bits are set in `tied`, those that `last` chooses.
    /// Call inside [`crate::dispatch!`].
    #[inline(always)]
    pub fn chosen(self, start: usize, tied: u64, last: TieCut) -> u64 {
        let [chosen] = self.select(
            start,
            tied,
            #[inline(always)]
            |hash, place| [last.chooses(hash, place)],
        );
        chosen
    }

    /// Bits of the tied elements for which `is(hash, index)` is true.
    #[inline(always)]
    fn select<const N: usize>(self, start: usize, tied: u64, is: impl Fn(u64, u64) -> [bool; N]) -> [u64; N] {
        /// Number of elements from which on all 64 hashes, computed with vector instructions, take
        /// less time than those of the elements alone.
        const MANY: u32 = 10;
        /// Elements that are hashed side by side.
        const FEW: usize = 4;
        let mut bits = [0u64; N];
        if tied.count_ones() >= MANY {
            for bit in 0..64 {
                let found = is(self.hash(start + bit), (start + bit) as u64);
                for i in 0..N {
                    bits[i] |= u64::from(found[i]) << bit;
                }
            }
        } else {
            let mut left = tied;
            while left != 0 {
                // Side by side, and without a branch between them: most words have few.
                for _ in 0..FEW {
                    // Element 0 once more if none are left.
                    let bit = left.trailing_zeros() as usize % 64;
                    let found = is(self.hash(start + bit), (start + bit) as u64);
                    for i in 0..N {
                        bits[i] |= u64::from(found[i]) << bit;
                    }
                    left &= left.wrapping_sub(1);
                }
            }
        }
        bits.map(|bits| bits & tied)
    }
}

/// Last of the tied elements that are chosen, in the order of their hashes and places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TieCut {
    hash: u64,
    place: u64,
}

impl TieCut {
    /// Chooses every tied element.
    pub const ALL: Self = Self { hash: u64::MAX, place: u64::MAX };

    /// Returns true if the tied element with this hash is chosen; `place` orders elements whose
    /// hashes are equal.
    #[inline(always)]
    pub fn chooses(self, hash: u64, place: u64) -> bool {
        // Without a branch, so that loops over it become vector instructions.
        (hash < self.hash) | (hash == self.hash) & (place <= self.place)
    }

    /// The cut that chooses the first `k` ≥ 1 of the (hash, place) pairs in `tied`.
    ///
    /// # Panics
    /// If there are fewer than `k`.
    pub fn among(tied: &mut [(u64, u64)], k: u64) -> Self {
        let (hash, place) = *tied.select_nth_unstable(k as usize - 1).1;
        Self { hash, place }
    }
}

/// Hashes from `low` to `high`: those of the elements that an estimate leaves open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashBand {
    /// Smallest hash that is open. Elements below it are chosen.
    pub low: u64,
    /// Largest hash that is open. Elements above it are not chosen.
    pub high: u64,
}

impl HashBand {
    /// The band that leaves open the shares from `share - slack` to `share + slack` of the hashes.
    pub fn around(share: f64, slack: f64) -> Self {
        // The cast saturates: a share of 1 or more becomes the largest hash.
        let at = |share: f64| (share * 2f64.powi(64)) as u64;
        Self { low: at(share - slack), high: at(share + slack) }
    }
}

/// Half width of a band, in standard errors of the number of hashes below it.
const SPAN: f64 = 12.0;

/// Tied elements counted against a band.
#[derive(Debug, Clone)]
pub struct TieCount {
    band: HashBand,
    /// Number of hashes below the band.
    below: u64,
    /// Hashes and places in the band.
    open: Vec<(u64, u64)>,
}

impl TieCount {
    /// Counts the tied element with this hash and place.
    #[inline(always)]
    pub fn add(&mut self, hash: u64, place: u64) {
        self.below += u64::from(hash < self.band.low);
        if hash >= self.band.low && hash <= self.band.high {
            self.open.push((hash, place));
        }
    }
}

/// Finds the cut that chooses `k` of `n` tied elements, 1 ≤ k ≤ n, without storing their hashes.
/// `visit` adds the tied elements of a chunk to a count.
pub fn find_tie_cut(chunks: usize, n: u64, k: u64, visit: impl Fn(usize, &mut TieCount) + Sync) -> TieCut {
    let share = k as f64 / n as f64;
    let error = (share * (1.0 - share) / n as f64).sqrt().max(1.0 / n as f64);
    let mut span = SPAN;
    loop {
        let band = HashBand::around(share, span * error);
        let empty = || TieCount { band, below: 0, open: Vec::new() };
        let add = |mut count: TieCount, i| {
            visit(i, &mut count);
            count
        };
        let join = |mut a: TieCount, b: TieCount| {
            a.below += b.below;
            a.open.extend(b.open);
            a
        };
        let TieCount { below, mut open, .. } = (0..chunks).into_par_iter().fold(empty, add).reduce(empty, join);
        if (below + 1..=below + open.len() as u64).contains(&k) {
            return TieCut::among(&mut open, k - below);
        }
        if band == HashBand::around(0.5, 1.0) {
            // Fewer than k are tied.
            return TieCut::ALL;
        }
        span *= SPAN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_hashes_are_those_of_the_documentation() {
        let digest = Digest::of_chunks(["tuned"]);
        let key = TieSalt::new(&digest).key("w");
        let bytes = *blake3::hash(format!("{digest}\0w").as_bytes()).as_bytes();
        let head = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(key, TieKey(head));
        assert_eq!(key.hash(7), splitmix64(head, 7));
        assert_ne!(key, TieSalt::new(&digest).key("v"));
        assert_ne!(key, TieSalt::new(&Digest::blank()).key("w"));
    }

    #[test]
    fn the_cut_is_that_of_sorting_also_where_hashes_are_equal() {
        // Few distinct hashes: position decides between them, and the first band misses.
        for levels in [u64::MAX, 5] {
            let hash = |i: u64| splitmix64(3, i) % levels;
            let mut sorted: Vec<(u64, u64)> = (0..5_000).map(|i| (hash(i), i)).collect();
            sorted.sort_unstable();
            for k in [1, 2, 777, 2_500, 4_999, 5_000] {
                let cut = find_tie_cut(50, 5_000, k, |chunk, count| {
                    (0..100).map(|i| 100 * chunk as u64 + i).for_each(|i| count.add(hash(i), i));
                });
                let chosen: Vec<_> = sorted.iter().filter(|(hash, place)| cut.chooses(*hash, *place)).collect();
                assert_eq!(chosen, sorted[..k as usize].iter().collect::<Vec<_>>(), "{k} of {levels} levels");
            }
        }
    }

    #[test]
    fn a_band_ends_at_the_ends_of_the_hashes() {
        assert_eq!(HashBand::around(0.5, 1.0), HashBand { low: 0, high: u64::MAX });
        assert_eq!(HashBand::around(0.5, 0.25), HashBand { low: 1 << 62, high: 3 << 62 });
    }
}
