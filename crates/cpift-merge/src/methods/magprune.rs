//! DELLA's random drop: within each row the probability to stay rises with the rank of the
//! magnitude.

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
}

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
    let lowest = vector.density - vector.spread;
    let step = if rows.len > 1 { 2.0 * vector.spread / (rows.len - 1) as f64 } else { 0.0 };
    // A row of one element has no ranks.
    let lowest = if rows.len > 1 { lowest } else { vector.density };
    for slab in (0..values.len()).step_by(rows.slab().max(1)) {
        for row in slab..slab + rows.stride {
            let at = |i: usize| row + i * rows.stride;
            ranks.ascending(
                rows.len,
                |i| values[at(i)].abs(),
                |rank, i| {
                    let limit = ((lowest + rank as f64 * step) * (1u64 << 53) as f64) as u64;
                    if splitmix64(vector.key, (start + at(i)) as u64) >> 11 < limit {
                        keep(at(i));
                    }
                },
            );
        }
    }
}

impl Ranks {
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
