//! Tensors computed while they are read: numbers of 8 bits times their scales, weights plus the
//! product of an adapter, rows of an embedding in another order.

use crate::format::dtype::{Dtype, Float};

/// Steps by which the elements of a tensor are computed from the stored ones, in this order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Derived {
    /// Scales of the stored elements.
    pub scale: Option<Scale>,
    /// Rows in another order, or given as numbers.
    pub rows: Option<Rows>,
    /// Products that are added, in order.
    pub low_rank: Vec<LowRank>,
}

/// Scales of a matrix: one per block of rows and columns.
#[derive(Debug, Clone)]
pub(crate) struct Scale {
    /// Columns of the matrix.
    pub columns: usize,
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// Blocks in a row of blocks.
    pub blocks: usize,
    /// Scales, row-major.
    pub values: Vec<f32>,
    /// Dtype of the result, as which an output stores it.
    pub dtype: Dtype,
}

/// Rows of a matrix.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Shape of the result.
    pub shape: Vec<usize>,
    /// Source of each row.
    pub sources: Vec<Row>,
    /// Rows given as numbers.
    pub given: Vec<Vec<f64>>,
}

/// Source of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// A row of the stored tensor.
    Stored(u32),
    /// A row given as numbers.
    Given(u32),
    /// Zeros.
    Zero,
}

/// A product of two matrices, with a factor per row of the sum.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    /// Columns of the sum.
    pub columns: usize,
    /// Inner dimension.
    pub rank: usize,
    /// Rows of the left factor one after another, multiplied by the scaling of the adapter.
    pub left: Vec<f32>,
    /// Rows of the right factor one after another.
    pub right: Vec<f32>,
    /// Factor of each row of the sum (DoRA).
    pub magnitude: Option<Vec<f32>>,
}

impl Derived {
    /// Shape of the result, if it is not that of the stored tensor.
    pub fn shape(&self) -> Option<&[usize]> {
        self.rows.as_ref().map(|rows| rows.shape.as_slice())
    }

    /// Gives the result other rows; rows that are given as numbers are final.
    pub fn map_rows(&mut self, rows: Rows) {
        for product in &mut self.low_rank {
            let rank = product.rank;
            let left = |row: &Row| match row {
                Row::Stored(row) => product.left[*row as usize * rank..][..rank].to_vec(),
                Row::Given(_) | Row::Zero => vec![0.0; rank],
            };
            product.left = rows.sources.iter().flat_map(left).collect();
            let magnitude = |factors: &Vec<f32>| {
                let factor = |row: &Row| if let Row::Stored(row) = row { factors[*row as usize] } else { 1.0 };
                rows.sources.iter().map(factor).collect()
            };
            product.magnitude = product.magnitude.as_ref().map(magnitude);
        }
        self.rows = Some(rows);
    }

    /// Reads the elements `start..start + out.len()` of the result from the stored `bytes`.
    ///
    /// # Panics
    /// If the range extends past the end.
    pub fn read<T: Float>(&self, dtype: Dtype, bytes: &[u8], start: usize, out: &mut [T]) {
        match &self.rows {
            None => self.read_stored(dtype, bytes, start, out),
            Some(rows) => {
                let width = rows.shape[1..].iter().product::<usize>().max(1);
                for_rows(width, start, out.len(), |row, column, range| match rows.sources[row] {
                    Row::Stored(stored) => {
                        self.read_stored(dtype, bytes, stored as usize * width + column, &mut out[range]);
                    }
                    Row::Given(index) => {
                        let given = &rows.given[index as usize][column..][..range.len()];
                        out[range].iter_mut().zip(given).for_each(|(slot, v)| *slot = T::from_f64(*v));
                    }
                    Row::Zero => out[range].fill(T::from_f64(0.0)),
                });
            }
        }
        self.low_rank.iter().for_each(|low_rank| low_rank.add(start, out));
    }

    fn read_stored<T: Float>(&self, dtype: Dtype, bytes: &[u8], start: usize, out: &mut [T]) {
        let size = dtype.size();
        T::read(dtype, &bytes[start * size..(start + out.len()) * size], out);
        let Some(scale) = &self.scale else { return };
        for_rows(scale.columns, start, out.len(), |row, column, range| {
            let scales = &scale.values[row / scale.block[0] * scale.blocks..][..scale.blocks];
            for (i, slot) in out[range].iter_mut().enumerate() {
                // A product of two f32 numbers, as the dequantization of the publishers computes
                // it.
                *slot = T::from_f64(f64::from(slot.to_f64() as f32 * scales[(column + i) / scale.block[1]]));
            }
        });
    }
}

impl LowRank {
    /// Adds the product to the elements `start..` of the sum, in f32 as PEFT does.
    fn add<T: Float>(&self, start: usize, out: &mut [T]) {
        let mut sums = Vec::new();
        for_rows(self.columns, start, out.len(), |row, column, range| {
            sums.clear();
            sums.resize(range.len(), 0f32);
            self.product(row, column, &mut sums);
            let factor = self.magnitude.as_ref().map(|factors| factors[row]);
            for (slot, sum) in out[range].iter_mut().zip(&sums) {
                let value = slot.to_f64() + f64::from(*sum);
                // One rounding to f32, or none for F64 weights.
                *slot = match factor {
                    None => T::from_f64(value),
                    Some(factor) => T::from_f64(T::from_f64(value).to_f64() * f64::from(factor)),
                };
            }
        });
    }

    /// Adds the elements of the product in `row` from `column` on to `sums`.
    pub fn product(&self, row: usize, column: usize, sums: &mut [f32]) {
        let left = &self.left[row * self.rank..][..self.rank];
        for (k, factor) in left.iter().enumerate() {
            let right = &self.right[k * self.columns + column..][..sums.len()];
            sums.iter_mut().zip(right).for_each(|(sum, value)| *sum += factor * value);
        }
    }
}

/// Calls `each` with row, first column and range of the output for every part of a row among the
/// elements `start..start + len` of a matrix with `columns` columns.
fn for_rows(columns: usize, start: usize, len: usize, mut each: impl FnMut(usize, usize, std::ops::Range<usize>)) {
    let (mut at, end) = (start, start + len);
    while at < end {
        let (row, column) = (at / columns, at % columns);
        let next = end.min(at - column + columns);
        each(row, column, at - start..next - start);
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    /// Reads 12 elements in pieces of every size and asserts that all give the same.
    fn read(derived: &Derived, stored: &[f32], numel: usize) -> Vec<f32> {
        let (bytes, mut whole) = (bytes(stored), vec![0f32; numel]);
        derived.read(Dtype::F32, &bytes, 0, &mut whole);
        for size in 1..numel {
            let mut pieces = vec![0f32; numel];
            for start in (0..numel).step_by(size) {
                let end = numel.min(start + size);
                derived.read(Dtype::F32, &bytes, start, &mut pieces[start..end]);
            }
            assert_eq!(pieces, whole, "pieces of {size}");
        }
        whole
    }

    #[test]
    fn scales_are_those_of_the_block() {
        let scale = Scale { columns: 3, block: [2, 2], blocks: 2, values: vec![1.0, 2.0, 3.0, 4.0], dtype: Dtype::F32 };
        let derived = Derived { scale: Some(scale), ..Derived::default() };
        let found = read(&derived, &[1.0; 9], 9);
        assert_eq!(found, [1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 3.0, 3.0, 4.0]);
    }

    #[test]
    fn rows_that_are_mapped_take_their_part_of_a_product_along() {
        let low_rank = LowRank {
            columns: 2,
            rank: 1,
            left: vec![1.0, 2.0],
            right: vec![10.0, 20.0],
            magnitude: Some(vec![1.0, 2.0]),
        };
        let mut derived = Derived { low_rank: vec![low_rank], ..Derived::default() };
        let before = read(&derived, &[1.0, 2.0, 3.0, 4.0], 4);
        let sources = vec![Row::Stored(1), Row::Given(0), Row::Stored(0), Row::Zero];
        derived.map_rows(Rows { shape: vec![4, 2], sources, given: vec![vec![7.0, 8.0]] });
        let after = read(&derived, &[1.0, 2.0, 3.0, 4.0], 8);
        assert_eq!(after, [before[2], before[3], 7.0, 8.0, before[0], before[1], 0.0, 0.0]);
    }

    #[test]
    fn rows_are_moved_given_or_zero_before_the_product_is_added() {
        let sources = vec![Row::Stored(1), Row::Zero, Row::Given(0)];
        let rows = Rows { shape: vec![3, 2], sources, given: vec![vec![7.0, 8.0]] };
        let low_rank =
            LowRank { columns: 2, rank: 1, left: vec![0.0, 1.0, 2.0], right: vec![10.0, 20.0], magnitude: None };
        let derived = Derived { rows: Some(rows), low_rank: vec![low_rank], scale: None };
        assert_eq!(read(&derived, &[1.0, 2.0, 3.0, 4.0], 6), [3.0, 4.0, 10.0, 20.0, 27.0, 48.0]);
        let magnitude = Some(vec![1.0, 0.5, 2.0]);
        let low_rank = LowRank { magnitude, ..derived.low_rank[0].clone() };
        let derived = Derived { low_rank: vec![low_rank], ..derived };
        assert_eq!(read(&derived, &[1.0, 2.0, 3.0, 4.0], 6), [3.0, 4.0, 5.0, 10.0, 54.0, 96.0]);
    }
}
