//! DELLA's random drop: within each row the probability to stay rises with the rank of the
//! magnitude.

use cpift_core::dispatch;
use cpift_core::stream::random::splitmix64;

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
#[derive(Default)]
pub(crate) struct Ranks {
    keyed: Vec<u64>,
    spare: Vec<u64>,
    wide: Vec<(u64, u32)>,
    keys: Vec<u32>,
    bins: Vec<u16>,
    /// Number of earlier elements of the same bin.
    places: Vec<u32>,
}

/// Probability to stay, by rank in a row.
#[derive(Clone, Copy)]
struct Chance {
    lowest: f64,
    step: f64,
}

impl Chance {
    /// Of `density` ± `spread` over `len` ranks.
    fn new(vector: &TaskVector, len: usize) -> Self {
        match len {
            // A row of one element has no ranks.
            0 | 1 => Self { lowest: vector.density, step: 0.0 },
            _ => Self { lowest: vector.density - vector.spread, step: 2.0 * vector.spread / (len - 1) as f64 },
        }
    }

    /// The element of this rank stays if its draw of 53 bits is below the result, which never falls
    /// with the rank.
    #[inline(always)]
    fn limit(self, rank: usize) -> u64 {
        ((self.lowest + rank as f64 * self.step) * (1u64 << 53) as f64) as u64
    }
}

/// Elements of a row whose magnitudes have the same leading bits.
#[derive(Clone, Copy, Default)]
struct Bin {
    count: u32,
    /// Number of elements in smaller bins.
    before: u32,
    /// Key of the first element.
    first: u32,
    /// Bits in which any key differs from the first.
    mixed: u32,
}

/// Rows from this length on are ranked in bins.
const LONG: usize = 512;

/// Calls `keep` with the position of every element of `values` that stays; `values[0]` is element
/// `start` of the tensor and the first of a slab.
pub(crate) fn prune<T: Number>(
    values: &[T],
    start: usize,
    rows: Rows,
    vector: &TaskVector,
    ranks: &mut Ranks,
    mut keep: impl FnMut(usize),
) {
    let chance = Chance::new(vector, rows.len);
    if rows.stride == 1 && rows.len >= LONG && T::PASSES == 2 {
        for (row, values) in values.chunks(rows.len).enumerate() {
            let first = row * rows.len;
            ranks.in_bins(values, start + first, chance, vector.key, |i| keep(first + i));
        }
        return;
    }
    for slab in (0..values.len()).step_by(rows.slab().max(1)) {
        for row in slab..slab + rows.stride {
            let at = |i: usize| row + i * rows.stride;
            ranks.ascending(
                rows.len,
                |i| values[at(i)].abs(),
                |rank, i| {
                    if draw(vector.key, start + at(i)) < chance.limit(rank) {
                        keep(at(i));
                    }
                },
            );
        }
    }
}

/// Random number of 53 bits of an element.
#[inline(always)]
fn draw(key: u64, element: usize) -> u64 {
    splitmix64(key, element as u64) >> 11
}

impl Ranks {
    /// Calls `keep` with the index of every element of a row that stays; `values[0]` is element
    /// `start` of the tensor.
    ///
    /// Most draws decide by themselves, or with the range of ranks of the element's bin. Only the
    /// others need the rank itself.
    fn in_bins<T: Number>(
        &mut self,
        values: &[T],
        start: usize,
        chance: Chance,
        key: u64,
        mut keep: impl FnMut(usize),
    ) {
        /// Bins of keys that are not zero: one more than the differences of 10 bits.
        const BITS: u32 = 10;
        const GROUP: usize = 64;
        let Self { keys, bins, places, .. } = self;
        keys.resize(values.len(), 0);
        bins.resize(values.len(), 0);
        dispatch!({
            keys.iter_mut().zip(values).for_each(|(k, v)| *k = v.abs().key() as u32);
            let low = keys.iter().fold(u32::MAX, |low, k| low.min(k.wrapping_sub(1))).wrapping_add(1);
            let high = keys.iter().fold(0, |high, k| high.max(*k));
            let low = low.min(high);
            let shift = (32 - (high - low).leading_zeros()).saturating_sub(BITS);
            let bin = |k: u32| if k == 0 { 0 } else { 1 + (k.wrapping_sub(low) >> shift) };
            bins.iter_mut().zip(&*keys).for_each(|(b, k)| *b = bin(*k) as u16);
        });
        let mut table = [Bin::default(); (1 << BITS) + 1];
        places.clear();
        places.extend(bins.iter().zip(&*keys).map(|(bin, key)| {
            let bin = &mut table[usize::from(*bin)];
            let place = bin.count;
            bin.first = if place == 0 { *key } else { bin.first };
            bin.mixed |= bin.first ^ key;
            bin.count += 1;
            place
        }));
        let mut sum = 0;
        for bin in &mut table {
            bin.before = sum;
            sum += bin.count;
        }
        let stays = |i: usize, draw: u64| {
            let bin = table[usize::from(bins[i])];
            if draw < chance.limit(bin.before as usize) {
                return true;
            }
            if draw >= chance.limit((bin.before + bin.count - 1) as usize) {
                return false;
            }
            let rank = if bin.mixed == 0 { (bin.before + places[i]) as usize } else { rank(keys, i) };
            draw < chance.limit(rank)
        };
        let (always, never) = (chance.limit(0), chance.limit(values.len() - 1));
        let mut draws = [0u64; GROUP];
        for first in (0..values.len()).step_by(GROUP) {
            let (mut kept, mut open) = (0u64, 0u64);
            dispatch!({
                for (i, slot) in draws.iter_mut().enumerate() {
                    *slot = draw(key, start + first + i);
                }
                for (i, draw) in draws.iter().enumerate() {
                    kept |= u64::from(*draw < always) << i;
                    open |= u64::from(*draw < never) << i;
                }
            });
            let inside = u64::MAX >> (GROUP - GROUP.min(values.len() - first));
            (kept, open) = (kept & inside, open & !kept & inside);
            while open != 0 {
                let i = open.trailing_zeros() as usize;
                kept |= u64::from(stays(first + i, draws[i])) << i;
                open &= open - 1;
            }
            while kept != 0 {
                keep(first + kept.trailing_zeros() as usize);
                kept &= kept - 1;
            }
        }
    }

    /// Calls `each` with rank and index of every magnitude, the smallest first and equal ones in
    /// their order.
    fn ascending<T: Number>(&mut self, n: usize, magnitude: impl Fn(usize) -> T, mut each: impl FnMut(usize, usize)) {
        if T::PASSES != 2 {
            self.wide.clear();
            self.wide.extend((0..n).map(|i| (magnitude(i).key(), i as u32)));
            self.wide.sort_unstable();
            self.wide.iter().enumerate().for_each(|(rank, (_, i))| each(rank, *i as usize));
            return;
        }
        self.keyed.clear();
        self.keyed.extend((0..n).map(|i| magnitude(i).key() << 32 | i as u64));
        if n < 512 {
            self.keyed.sort_unstable();
        } else {
            self.by_digits();
        }
        self.keyed.iter().enumerate().for_each(|(rank, key)| each(rank, *key as u32 as usize));
    }

    /// Sorts by the upper 32 bits, in three stable passes over 11 bits each.
    fn by_digits(&mut self) {
        const BITS: u32 = 11;
        self.spare.resize(self.keyed.len(), 0);
        for shift in [32, 32 + BITS, 32 + 2 * BITS] {
            let digit = |key: u64| (key >> shift) as usize & ((1 << BITS) - 1);
            let mut starts = [0u32; 1 << BITS];
            self.keyed.iter().for_each(|key| starts[digit(*key)] += 1);
            let mut sum = 0;
            for start in &mut starts {
                sum += std::mem::replace(start, sum);
            }
            for key in &self.keyed {
                let place = &mut starts[digit(*key)];
                self.spare[*place as usize] = *key;
                *place += 1;
            }
            std::mem::swap(&mut self.keyed, &mut self.spare);
        }
    }
}

/// Rank of element `i`: the number of smaller keys, and of equal ones before it.
fn rank(keys: &[u32], i: usize) -> usize {
    let key = keys[i];
    let count = |keys: &[u32], last: u32| keys.iter().fold(0u32, |n, k| n + u32::from(*k < last));
    // No key is the largest number: it would be a NaN.
    dispatch!(count(&keys[..i], key + 1) + count(&keys[i..], key)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(density: f64, spread: f64) -> TaskVector {
        TaskVector { weight: 1.0, density, key: 5, spread }
    }

    #[test]
    fn ranks_are_those_of_a_stable_sort_at_any_length_and_width() {
        for n in [1usize, 2, 511, 512, 3000] {
            let values: Vec<f32> = (0..n).map(|i| (splitmix64(1, i as u64) % 97) as f32 - 48.0).collect();
            let mut expected: Vec<usize> = (0..n).collect();
            expected.sort_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs()));
            let (mut narrow, mut wide) = (Vec::new(), Vec::new());
            Ranks::default().ascending(n, |i| values[i].abs(), |_, i| narrow.push(i));
            Ranks::default().ascending(n, |i| f64::from(values[i]).abs(), |_, i| wide.push(i));
            assert_eq!((&narrow, &wide), (&expected, &expected));
        }
    }

    #[test]
    fn bins_keep_what_sorted_rows_keep() {
        let random = |i: usize| splitmix64(2, i as u64) >> 40;
        let rows: [(&str, &dyn Fn(usize) -> f32); 5] = [
            ("spread over many octaves", &|i| (random(i) as f32).powi(-3) * if i % 2 == 0 { 1.0 } else { -1.0 }),
            ("few levels", &|i| (random(i) % 4) as f32),
            ("two levels in one bin", &|i| {
                if random(i) % 50 == 0 { 1e-20 } else { 1.0 + (random(i) % 2) as f32 * 1e-6 }
            }),
            ("zero", &|_| 0.0),
            ("infinite", &|i| if i % 9 == 0 { f32::INFINITY } else { random(i) as f32 }),
        ];
        for (name, value) in rows {
            for len in [512, 700, 3000] {
                let narrow: Vec<f32> = (0..3 * len).map(value).collect();
                let wide: Vec<f64> = narrow.iter().map(|v| f64::from(*v)).collect();
                let rows = Rows { len, stride: 1 };
                let (mut binned, mut sorted) = (Vec::new(), Vec::new());
                prune(&narrow, 64, rows, &vector(0.5, 0.4), &mut Ranks::default(), |j| binned.push(j));
                // In f64 rows are sorted.
                prune(&wide, 64, rows, &vector(0.5, 0.4), &mut Ranks::default(), |j| sorted.push(j));
                sorted.sort_unstable();
                assert_eq!(binned, sorted, "{name}, {len}");
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
            let rows = Rows { len, stride: 1 };
            prune(&row, round * len, rows, &vector(0.5, 0.3), &mut Ranks::default(), |j| stays[j] += 1);
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
