//! DELLA's random drop: within each row the probability to stay rises with the rank of the
//! magnitude.

use std::collections::BTreeMap;

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
    row: Vec<T>,
    /// Elements whose ranks decide, with their random numbers.
    open: Vec<(usize, u64)>,
    order: Vec<(u64, usize)>,
}

impl<T> Default for Space<T> {
    fn default() -> Self {
        Self { row: Vec::new(), open: Vec::new(), order: Vec::new() }
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
    for slab in (0..values.len()).step_by(rows.slab().max(1)) {
        for first in slab..slab + rows.stride {
            let of_row = values[first..].iter().step_by(rows.stride).take(rows.len);
            space.row.clear();
            space.row.extend(of_row.map(|v| v.abs()));
            let at = |i: usize| first + i * rows.stride;
            let draw = |i: usize| splitmix64(vector.key, (start + at(i)) as u64) >> 11;
            space.prune_row(limits, draw, |i| bits[at(i) / 8] |= 1 << (at(i) % 8));
        }
    }
}

impl<T: Number> Space<T> {
    /// Calls `keep` with the index of every element of the row that stays.
    #[inline(always)]
    fn prune_row(&mut self, limits: Limits, draw: impl Fn(usize) -> u64, mut keep: impl FnMut(usize)) {
        /// Rows from this length on are sorted.
        const LONG: usize = 1 << 16;
        let n = self.row.len();
        // Whatever its rank, an element with a small random number stays, and one with a large
        // random number goes.
        let (every, some) = (limits.at(0), limits.at(n.saturating_sub(1)));
        self.open.clear();
        for start in (0..n).step_by(GROUP) {
            let mut draws = [u64::MAX; GROUP];
            let len = GROUP.min(n - start);
            draws[..len].iter_mut().enumerate().for_each(|(j, number)| *number = draw(start + j));
            let (mut stay, mut open) = (0u64, 0u64);
            for (j, number) in draws.iter().enumerate() {
                stay |= u64::from(*number < every) << j;
                open |= u64::from(*number < some) << j;
            }
            each_bit(stay, |j| keep(start + j));
            each_bit(open & !stay, |j| self.open.push((start + j, draws[j])));
        }
        if n >= LONG {
            self.by_order(limits, keep);
        } else if !self.open.is_empty() {
            let mut brackets = Brackets::of(&self.row, limits);
            for (i, number) in &self.open {
                let bracket = brackets.index(self.row[*i]);
                let stays = match *number {
                    number if number < brackets.stays[bracket] => true,
                    number if number >= brackets.goes[bracket] => false,
                    number => number < limits.at(brackets.rank(&self.row, *i, bracket)),
                };
                if stays {
                    keep(*i);
                }
            }
        }
    }

    /// Decides on the open elements by the order of the whole row.
    fn by_order(&mut self, limits: Limits, mut keep: impl FnMut(usize)) {
        self.order.clear();
        self.order.extend(self.row.iter().enumerate().map(|(i, v)| (v.key(), i)));
        self.order.sort_unstable();
        let numbers: BTreeMap<usize, u64> = self.open.iter().copied().collect();
        for (rank, (_, i)) in self.order.iter().enumerate() {
            if numbers.get(i).is_some_and(|number| *number < limits.at(rank)) {
                keep(*i);
            }
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

/// Number of magnitudes at which a row is cut, one less than a power of two.
const CUTS: usize = 15;

/// The magnitudes of a row cut into brackets: an element's rank is one of those of its bracket.
/// Ranks ascend with the magnitude, and among equal ones with the index.
struct Brackets<T> {
    /// Magnitudes in ascending order, each the least of a bracket. A magnitude that many elements
    /// share has a bracket of its own.
    cuts: [T; CUTS],
    /// Least rank in each bracket.
    starts: [usize; CUTS + 1],
    /// Limits of the least and of the largest rank in each bracket.
    stays: [u64; CUTS + 1],
    goes: [u64; CUTS + 1],
    /// Elements of each bracket of one magnitude, counted up to an index.
    counted: [(usize, usize); CUTS + 1],
}

impl<T: Number> Brackets<T> {
    /// Cuts the magnitudes of `row`, none of them NaN, at quantiles of a sample.
    #[inline(always)]
    fn of(row: &[T], limits: Limits) -> Self {
        const SAMPLE: usize = 64;
        const STEP: usize = SAMPLE / (CUTS + 1);
        let mut keys = [0; SAMPLE];
        keys.iter_mut().enumerate().for_each(|(i, key)| *key = row[i * row.len() / SAMPLE].key());
        keys.sort_unstable();
        let mut cuts = [T::from_f64(f64::INFINITY); CUTS];
        let mut places = cuts.iter_mut();
        let mut last = None;
        for i in (STEP / 2..SAMPLE).step_by(STEP) {
            let key = keys[i];
            if last.replace(key) == Some(key) {
                continue;
            }
            let shared = keys[i - 1] == key || keys[i + 1] == key;
            let these = [Some(key), shared.then_some(key + 1)];
            these.into_iter().flatten().zip(&mut places).for_each(|(key, place)| *place = T::from_key(key));
        }
        let mut starts = [0; CUTS + 1];
        for (start, cut) in starts[1..].iter_mut().zip(&cuts) {
            *start = count(row, |v| v < *cut);
        }
        let (stays, mut goes) = (starts.map(|rank| limits.at(rank)), [limits.at(row.len() - 1); CUTS + 1]);
        for (goes, next) in goes.iter_mut().zip(&starts[1..]) {
            // Nothing is in a bracket that the next one follows at rank 0.
            *goes = limits.at(next.saturating_sub(1));
        }
        Self { cuts, starts, stays, goes, counted: [(0, 0); CUTS + 1] }
    }

    /// Bracket of a magnitude.
    #[inline(always)]
    fn index(&self, magnitude: T) -> usize {
        let (mut index, mut step) = (0, CUTS.div_ceil(2));
        while step > 0 {
            index += if magnitude >= self.cuts[index + step - 1] { step } else { 0 };
            step /= 2;
        }
        index
    }

    /// Rank of element `i` of the row, which is in `bracket`; to be called with ascending indices.
    #[inline(always)]
    fn rank(&mut self, row: &[T], i: usize, bracket: usize) -> usize {
        let magnitude = row[i];
        let one = |low: T, high: T| low.key() + 1 == high.key();
        if (1..CUTS).contains(&bracket) && one(self.cuts[bracket - 1], self.cuts[bracket]) {
            let (upto, before) = &mut self.counted[bracket];
            *before += count(&row[*upto..i], |v| v == magnitude);
            *upto = i;
            return self.starts[bracket] + *before;
        }
        count(&row[..i], |v| v <= magnitude) + count(&row[i..], |v| v < magnitude)
    }
}

/// Number of values for which `is` is true.
#[inline(always)]
fn count<T: Copy>(values: &[T], is: impl Fn(T) -> bool) -> usize {
    // In 32 bits, as many as the values have, more fit in a vector.
    values.iter().fold(0u32, |n, v| n + u32::from(is(*v))) as usize
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
