//! DELLA's random drop: within each row the probability to stay rises with the rank of the
//! magnitude.

use std::ops::Range;

use cpift_core::stream::random::splitmix64;
use cpift_core::stream::select::GROUP;

use super::sign_merge::{Number, TaskVector};

/// Rows of which an element's rank is taken: the elements that differ in the second index alone, or
/// in the only index of a vector, as in mergekit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Number of elements of a row.
    pub len: usize,
    /// Distance of neighbours in a row.
    pub stride: usize,
}

impl Rows {
    /// Rows of a tensor of this shape.
    pub fn of(shape: &[usize]) -> Self {
        match shape {
            [] => Self { len: 1, stride: 1 },
            [len] => Self { len: *len, stride: 1 },
            [_, len, inner @ ..] => Self { len: *len, stride: inner.iter().product() },
        }
    }

    /// Number of elements of the rows that lie within one another.
    pub fn slab(self) -> usize {
        self.len * self.stride
    }
}

/// Working space of [`prune`].
pub(crate) struct Space<T> {
    /// Magnitudes of a row.
    row: Vec<T>,
    ranks: Ranks<T>,
}

impl<T: Number> Default for Space<T> {
    fn default() -> Self {
        Self { row: Vec::new(), ranks: Ranks::new() }
    }
}

/// Random numbers of 53 bits below which the elements of a row stay, by rank.
#[derive(Clone, Copy)]
struct Limits {
    lowest: f64,
    step: f64,
}

impl Limits {
    fn of(vector: &TaskVector, len: usize) -> Self {
        // A row of one element has no ranks.
        match len {
            0 | 1 => Self { lowest: vector.density, step: 0.0 },
            _ => Self { lowest: vector.density - vector.spread, step: 2.0 * vector.spread / (len - 1) as f64 },
        }
    }

    /// Does not fall with the rank.
    #[inline(always)]
    fn at(self, rank: usize) -> u64 {
        ((self.lowest + rank as f64 * self.step) * (1u64 << 53) as f64) as u64
    }
}

/// Sets the bits of the elements of `values` that stay; `values[0]` is element `start` of the
/// tensor and the first of a slab. Call inside [`cpift_core::dispatch!`].
#[inline(always)]
pub(crate) fn prune<T: Number>(
    values: &[T],
    start: usize,
    rows: Rows,
    vector: &TaskVector,
    space: &mut Space<T>,
    bits: &mut [u8],
) {
    let limits = Limits::of(vector, rows.len);
    let Rows { len, stride } = rows;
    for slab in (0..values.len()).step_by(rows.slab().max(1)) {
        for first in slab..slab + stride {
            space.row.clear();
            match stride {
                1 => space.row.extend(values[first..first + len].iter().map(|v| v.abs())),
                _ => space.row.extend(values[first..].iter().step_by(stride).take(len).map(|v| v.abs())),
            }
            let at = |i: usize| first + i * stride;
            let draw = |i: usize| splitmix64(vector.key, (start + at(i)) as u64) >> 11;
            let keep = |i: usize, word: u64| match stride {
                1 => set_word(bits, at(i), word),
                _ => each_bit(word, |j| bits[at(i + j) / 8] |= 1 << (at(i + j) % 8)),
            };
            space.prune_row(limits, draw, keep);
        }
    }
}

/// Sets those of the packed bits from number `at` on that are set in `word`.
#[inline(always)]
fn set_word(bits: &mut [u8], at: usize, word: u64) {
    let (bits, shift) = (&mut bits[at / 8..], at % 8);
    match bits.first_chunk_mut::<8>() {
        Some(whole) if shift == 0 => *whole = (u64::from_le_bytes(*whole) | word).to_le_bytes(),
        _ => {
            let word = (u128::from(word) << shift).to_le_bytes();
            bits.iter_mut().zip(word).for_each(|(byte, more)| *byte |= more);
        }
    }
}

/// Rows from this length on are sorted.
const LONG: usize = 1 << 16;

impl<T: Number> Space<T> {
    /// Calls `keep` with the first index and the bits of every group of elements of the row that
    /// has some that stay.
    #[inline(always)]
    fn prune_row(&mut self, limits: Limits, draw: impl Fn(usize) -> u64, mut keep: impl FnMut(usize, u64)) {
        let n = self.row.len();
        // Whatever its rank, an element with a small random number stays, and one with a large
        // random number goes.
        let (every, some) = (limits.at(0), limits.at(n.saturating_sub(1)));
        if n >= LONG {
            return self.by_order(limits, draw, keep);
        }
        if every < some {
            self.ranks.sort(&self.row);
        }
        for start in (0..n).step_by(GROUP) {
            let mut draws = [0u64; GROUP];
            draws.iter_mut().enumerate().for_each(|(j, number)| *number = draw(start + j));
            let (mut stay, mut open) = (0u64, 0u64);
            for (j, number) in draws.iter().enumerate() {
                stay |= u64::from(*number < every) << j;
                open |= u64::from(*number < some) << j;
            }
            let here = u64::MAX >> (GROUP - GROUP.min(n - start));
            let mut unsure = 0u64;
            each_bit(open & !stay & here, |j| {
                let ranks = self.ranks.between(start + j);
                let stays = draws[j] < limits.at(ranks.start);
                stay |= u64::from(stays) << j;
                unsure |= u64::from(!stays & (draws[j] < limits.at(ranks.end - 1))) << j;
            });
            each_bit(unsure, |j| {
                let stays = draws[j] < limits.at(self.ranks.of(&self.row, start + j));
                stay |= u64::from(stays) << j;
            });
            keep(start, stay & here);
        }
    }

    /// As [`Space::prune_row`], by the order of the whole row.
    fn by_order(&self, limits: Limits, draw: impl Fn(usize) -> u64, mut keep: impl FnMut(usize, u64)) {
        let mut order: Vec<(u64, usize)> = self.row.iter().enumerate().map(|(i, v)| (v.key(), i)).collect();
        order.sort_unstable();
        for (rank, (_, i)) in order.into_iter().enumerate() {
            keep(i, u64::from(draw(i) < limits.at(rank)));
        }
    }
}

#[inline(always)]
fn each_bit(mut bits: u64, mut each: impl FnMut(usize)) {
    while bits != 0 {
        each(bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

/// Number of bins of the magnitudes of a row, a power of two.
const BINS: usize = 1 << 9;

/// Leading bits of the mantissa by which magnitudes are sorted into bins: 64 bins between a power
/// of two and the next.
const LEADING: u32 = 6;

/// Ranks of the elements of a row, which ascend with the magnitude and among equal ones with the
/// index. The magnitudes are sorted into bins by their leading bits, which bounds the ranks; a rank
/// itself is counted when it is asked for.
struct Ranks<T> {
    /// Bin of each element.
    bins: Vec<u16>,
    /// Least rank in each bin, and the number of all elements.
    starts: [u32; BINS + 1],
    counted: [Counted<T>; BINS],
}

/// The magnitude of a bin whose rank was asked for last.
#[derive(Clone, Copy)]
struct Counted<T> {
    /// NaN if there is none.
    magnitude: T,
    /// Number of smaller magnitudes in the row.
    smaller: u32,
    /// Number of equal ones among the first elements, and the number of these elements.
    equal: u32,
    upto: u32,
}

impl<T: Number> Ranks<T> {
    /// Without any elements.
    fn new() -> Self {
        Self { bins: Vec::new(), starts: [0; BINS + 1], counted: [Counted::none(); BINS] }
    }

    /// Sorts the magnitudes of `row`, fewer than [`LONG`] and none of them NaN, into bins.
    #[inline(always)]
    fn sort(&mut self, row: &[T]) {
        /// Neighbours are counted apart: one count would wait for the other where they are equal.
        const APART: usize = 4;
        let leading = |v: &T| (v.key() >> (T::MANTISSA - LEADING)) as u32;
        let largest = row.iter().fold(0, |largest, v| leading(v).max(largest));
        // The bins end at the largest magnitude; all that are too small share the first.
        let first = largest.saturating_sub(BINS as u32 - 1);
        self.bins.clear();
        self.bins.extend(row.iter().map(|v| leading(v).saturating_sub(first) as u16));
        let mut counts = [[0u16; BINS]; APART];
        let (groups, rest) = self.bins.as_chunks::<APART>();
        for group in groups {
            for (bin, counts) in group.iter().zip(&mut counts) {
                counts[usize::from(*bin) % BINS] += 1;
            }
        }
        rest.iter().for_each(|bin| counts[0][usize::from(*bin)] += 1);
        let mut sum = 0;
        for (bin, start) in self.starts[..BINS].iter_mut().enumerate() {
            *start = sum;
            sum += counts.iter().map(|counts| u32::from(counts[bin])).sum::<u32>();
        }
        self.starts[BINS] = sum;
        self.counted.fill(Counted::none());
    }

    /// Range of the ranks in the bin of element `i`.
    #[inline(always)]
    fn between(&self, i: usize) -> Range<usize> {
        let bin = usize::from(self.bins[i]) % BINS;
        self.starts[bin] as usize..self.starts[bin + 1] as usize
    }

    /// Rank of element `i` of the row; to be called with ascending indices.
    #[inline(always)]
    fn of(&mut self, row: &[T], i: usize) -> usize {
        let counted = &mut self.counted[usize::from(self.bins[i]) % BINS];
        let magnitude = row[i];
        if counted.magnitude != magnitude {
            *counted = Counted { magnitude, smaller: count(row, |v| v < magnitude), equal: 0, upto: 0 };
        }
        counted.equal += count(&row[counted.upto as usize..i], |v| v == magnitude);
        counted.upto = i as u32;
        (counted.smaller + counted.equal) as usize
    }
}

impl<T: Number> Counted<T> {
    fn none() -> Self {
        Self { magnitude: T::from_f64(f64::NAN), smaller: 0, equal: 0, upto: 0 }
    }
}

/// Number of values for which `is` is true.
#[inline(always)]
fn count<T: Copy>(values: &[T], is: impl Fn(T) -> bool) -> u32 {
    // In 32 bits, as many as the values have, more fit in a vector.
    values.iter().fold(0, |n, v| n + u32::from(is(*v)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(density: f64, spread: f64) -> TaskVector {
        TaskVector { weight: 1.0, density, key: 5, spread }
    }

    /// Packed bits of the elements that stay, with the ranks of a stable sort.
    fn sorted(row: &[f32], start: usize, vector: &TaskVector) -> Vec<u8> {
        let limits = Limits::of(vector, row.len());
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| row[*a].abs().total_cmp(&row[*b].abs()));
        let mut bits = vec![0; row.len().div_ceil(8)];
        for (rank, i) in order.into_iter().enumerate() {
            if splitmix64(vector.key, (start + i) as u64) >> 11 < limits.at(rank) {
                bits[i / 8] |= 1 << (i % 8);
            }
        }
        bits
    }

    #[test]
    fn elements_stay_by_the_ranks_of_a_stable_sort() {
        // Many equal magnitudes, all equal, none equal, and one overflow.
        let distinct = |levels: u64| move |i: u64| (splitmix64(1, i) % levels) as f32 - levels as f32 / 2.0;
        let kinds: [&dyn Fn(u64) -> f32; 4] =
            [&distinct(9), &|_| 0.0, &distinct(1 << 24), &|i| if i % 3 == 0 { f32::INFINITY } else { (i % 7) as f32 }];
        for (n, kind) in [1u64, 2, 63, 64, 65, 700, 3000, 1 << 16].into_iter().flat_map(|n| kinds.map(|k| (n, k))) {
            let row: Vec<f32> = (0..n).map(kind).collect();
            for vector in [vector(0.5, 0.3), vector(0.5, 0.5), vector(0.2, 0.0)] {
                let rows = Rows { len: n as usize, stride: 1 };
                let (mut narrow, mut wide) = (vec![0; row.len().div_ceil(8)], vec![0; row.len().div_ceil(8)]);
                prune(&row, 77, rows, &vector, &mut Space::default(), &mut narrow);
                let row64: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
                prune(&row64, 77, rows, &vector, &mut Space::default(), &mut wide);
                assert!(narrow == sorted(&row, 77, &vector) && narrow == wide, "{n} elements, {vector:?}");
            }
        }
    }

    #[test]
    fn rows_with_a_stride_are_pruned_as_rows_by_themselves() {
        let (len, stride) = (40, 3);
        let slab: Vec<f32> = (0..len * stride).map(|i| (splitmix64(2, i as u64) % 11) as f32).collect();
        let mut bits = vec![0; slab.len().div_ceil(8)];
        prune(&slab, 0, Rows { len, stride }, &vector(0.5, 0.5), &mut Space::default(), &mut bits);
        let limits = Limits::of(&vector(0.5, 0.5), len);
        for first in 0..stride {
            let mut order: Vec<usize> = (0..len).map(|i| first + i * stride).collect();
            order.sort_by(|a, b| slab[*a].total_cmp(&slab[*b]));
            for (rank, i) in order.into_iter().enumerate() {
                let stays = splitmix64(5, i as u64) >> 11 < limits.at(rank);
                assert_eq!(bits[i / 8] >> (i % 8) & 1 == 1, stays, "element {i}");
            }
        }
    }

    #[test]
    fn large_elements_of_a_row_stay_more_often() {
        // One row in which the magnitude rises with the index, many times over.
        let (len, rounds) = (1000, 200);
        let row: Vec<f32> = (0..len).map(|i| i as f32).collect();
        let mut stays = vec![0u32; len];
        for round in 0..rounds {
            let mut bits = vec![0u8; len.div_ceil(8)];
            let rows = Rows { len, stride: 1 };
            prune(&row, round * len, rows, &vector(0.5, 0.3), &mut Space::default(), &mut bits);
            stays.iter_mut().enumerate().for_each(|(i, n)| *n += u32::from(bits[i / 8] >> (i % 8) & 1));
        }
        let share = |part: &[u32]| f64::from(part.iter().sum::<u32>()) / (part.len() * rounds) as f64;
        // A tenth of the row is 20,000 draws: a standard deviation is at most 0.0036.
        assert!((share(&stays[..100]) - 0.23).abs() < 0.015, "{}", share(&stays[..100]));
        assert!((share(&stays[900..]) - 0.77).abs() < 0.015, "{}", share(&stays[900..]));
        assert!((share(&stays) - 0.5).abs() < 0.005, "{}", share(&stays));
    }

    #[test]
    fn rows_of_a_kernel_run_along_the_second_index() {
        assert_eq!(Rows::of(&[4, 3, 2, 2]), Rows { len: 3, stride: 4 });
        assert_eq!(Rows::of(&[7]), Rows { len: 7, stride: 1 });
        assert_eq!(Rows::of(&[]).slab(), 1);
    }
}
