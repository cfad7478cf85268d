//! Rules of selection: the number of elements that p percent are, and the selections that are not
//! the top p % of single elements: rows, columns, N of M consecutive elements, updates above a
//! size, and TALL masks.
//!
//! p is an exact decimal fraction, so that ⌊p·D/100⌋ does not suffer from binary rounding.

use std::str::FromStr;

use anyhow::Result;
use cpift_core::dispatch;
use cpift_core::error::usage;
use cpift_core::format::mask::{MaskWriter, Metric, count_ones};
use cpift_core::stream::select::Score;
use cpift_core::stream::ties::{TieKey, TieSalt};
use cpift_core::{BadInput, Checkpoint};
use rayon::prelude::*;

use crate::part::{Arithmetic, Block, CHUNK, Chunk, Part, refuse_not_finite};

/// p in percent, above 0 and at most 100, as a fraction of integers.
///
/// In `f64`, 0.57 % of 10,000 is 56.99999999999999, which rounds down to 56 instead of 57.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Percent {
    numerator: u128,
    denominator: u128,
    value: f64,
}

impl Percent {
    /// ⌊p·d/100⌋, exactly.
    pub fn of(self, d: u64) -> u64 {
        // At most 10^22 · 2^64 and below 10^22 · 100: both fit in 128 bits.
        (self.numerator * u128::from(d) / (self.denominator * 100)) as u64
    }

    /// ⌈p·n/100⌉, exactly.
    pub fn up_of(self, n: u64) -> u64 {
        (self.numerator * u128::from(n)).div_ceil(self.denominator * 100) as u64
    }

    /// p as `f64`, for records.
    pub fn value(self) -> f64 {
        self.value
    }
}

/// Largest number of decimals and of significant digits.
const MAX_DIGITS: usize = 18;

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let value: f64 = text.parse().map_err(|_| format!("expected a number, found {text:?}"))?;
        let range = || "p must be above 0 and at most 100 (percent)".to_owned();
        if !(value > 0.0 && value <= 100.0) {
            return Err(range());
        }
        // Rust parsed the text as a float, so it has the form [+]digits[.digits][e[±]digits].
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let exponent: i64 = exponent.parse().map_err(|_| range())?;
        let (whole, fraction) = mantissa.trim_start_matches('+').split_once('.').unwrap_or((mantissa, ""));
        let digits = format!("{}{fraction}", whole.trim_start_matches('+'));
        let kept = digits.trim_end_matches('0');
        let scale = fraction.len() as i64 - (digits.len() - kept.len()) as i64 - exponent;
        let kept = kept.trim_start_matches('0');
        if kept.len() > MAX_DIGITS || scale > MAX_DIGITS as i64 {
            return Err(format!("expected at most {MAX_DIGITS} decimals, found {text:?}"));
        }
        let digits: u128 = kept.parse().map_err(|_| range())?;
        let power = 10u128.pow(scale.unsigned_abs() as u32);
        let (numerator, denominator) = if scale < 0 { (digits * power, 1) } else { (digits, power) };
        if numerator > 100 * denominator {
            return Err(range());
        }
        Ok(Self { numerator, denominator, value })
    }
}

/// Units that are chosen whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Structure {
    /// Rows: elements with one index of the first dimension.
    Row,
    /// Columns: elements with one index of the last dimension.
    Column,
    /// The largest N of every M consecutive elements of the last dimension.
    Groups(usize, usize),
}

impl FromStr for Structure {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let groups = || {
            let (n, m) = text.split_once(':')?;
            let (n, m) = (n.parse().ok()?, m.parse().ok()?);
            (0 < n && n <= m && m <= 1 << 16).then_some(Self::Groups(n, m))
        };
        match text {
            "row" => Ok(Self::Row),
            "column" => Ok(Self::Column),
            _ => groups().ok_or_else(|| {
                format!("expected row, column or N:M with 1 ≤ N ≤ M ≤ 65536, such as 2:4, found {text:?}")
            }),
        }
    }
}

impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Row => f.write_str("row"),
            Self::Column => f.write_str("column"),
            Self::Groups(n, m) => write!(f, "{n}:{m}"),
        }
    }
}

/// A selection other than the top p % of single elements.
pub(crate) enum Rule<'a> {
    /// The best rows or columns, as many as fit p % of the elements, or N of every M elements.
    Structure(Structure, Percent),
    /// Scores above a number.
    Above(f64),
    /// |τ| ≥ λ·|Σ − τ| and τ ≠ 0, where τ is the update and Σ the sum of the updates of all models.
    Tall {
        /// The other models of the sum.
        others: &'a [Checkpoint],
        /// λ.
        lambda: f64,
    },
}

/// Chooses the elements of `part` by `rule` and writes their bits. Returns their number.
///
/// # Errors
/// [`BadInput`] naming a value that is not finite; I/O errors.
pub(crate) fn select<T: Score + Arithmetic + Sum>(
    part: &Part<'_>,
    metric: Metric,
    rule: &Rule<'_>,
    salt: &dyn Fn() -> Result<TieSalt>,
    writer: &MaskWriter,
) -> Result<u64> {
    let write = |pair: usize, bits: &[u8]| {
        writer.write(part.pairs[pair].base.name, 0, bits)?;
        Ok(count_ones(bits))
    };
    let all = |bits_of: &(dyn Fn(usize) -> Result<Vec<u8>> + Sync)| -> Result<u64> {
        let counts: Vec<u64> =
            (0..part.pairs.len()).into_par_iter().map(|i| write(i, &bits_of(i)?)).collect::<Result<_>>()?;
        Ok(counts.iter().sum())
    };
    match rule {
        Rule::Above(limit) => {
            let limit = T::from_f64(*limit);
            all(&|pair| {
                let mut bits = Bits::of(part, pair);
                for_each_score::<T>(part, pair, metric, |at, score| bits.set(at, score > limit))?;
                Ok(bits.0)
            })
        }
        Rule::Tall { others, lambda } => all(&|pair| tall::<T>(part, pair, others, *lambda)),
        Rule::Structure(Structure::Groups(n, m), _) => {
            let salt = salt()?;
            all(&|pair| best_of_groups::<T>(part, pair, metric, (*n, *m), salt.key(part.pairs[pair].base.name)))
        }
        Rule::Structure(structure, percent) => {
            let units = Units::measure::<T>(part, metric, *structure == Structure::Row)?;
            let chosen = units.best(part, percent.of(part.numel()), &salt()?);
            all(&|pair| Ok(units.bits(part, pair, &chosen[pair])))
        }
    }
}

/// Addition, for sums of updates.
pub(crate) trait Sum: std::ops::Add<Output = Self> + std::ops::Sub<Output = Self> + Copy {}
impl Sum for f32 {}
impl Sum for f64 {}

/// The packed bits of a tensor.
struct Bits(Vec<u8>);

impl Bits {
    fn of(part: &Part<'_>, pair: usize) -> Self {
        Self(vec![0; part.pairs[pair].base.numel().div_ceil(8)])
    }

    fn set(&mut self, at: usize, bit: bool) {
        self.0[at / 8] |= u8::from(bit) << (at % 8);
    }
}

/// Calls `each` with index and score of every element of a tensor, in order.
fn for_each_score<T: Score + Arithmetic>(
    part: &Part<'_>,
    pair: usize,
    metric: Metric,
    mut each: impl FnMut(usize, T),
) -> Result<()> {
    let mut block = Block::<T>::new();
    let numel = part.pairs[pair].base.numel();
    for start in (0..numel).step_by(CHUNK) {
        let chunk = Chunk { pair, start, len: CHUNK.min(numel - start) };
        for (start, len) in chunk.blocks() {
            let scores = dispatch!(block.scores(part, pair, metric, start, len).to_vec());
            if !scores.iter().all(|s| s.is_finite()) {
                refuse_not_finite::<T>(&part.pairs[pair], chunk)?;
                return Err(BadInput::new(part.pairs[pair].tuned.file, "an update overflows")
                    .tensor(part.pairs[pair].base.name)
                    .into());
            }
            scores.into_iter().enumerate().for_each(|(j, score)| each(start + j, score));
        }
    }
    Ok(())
}

/// Bits of the elements that the sum of all updates mostly owes to this model.
fn tall<T: Score + Arithmetic + Sum>(
    part: &Part<'_>,
    pair: usize,
    others: &[Checkpoint],
    lambda: f64,
) -> Result<Vec<u8>> {
    let p = &part.pairs[pair];
    let views: Vec<_> =
        others.iter().map(|c| c.get(p.base.name).expect("all models have the same parameters")).collect();
    let (mut bits, lambda, zero) = (Bits::of(part, pair), T::from_f64(lambda), T::default());
    let numel = p.base.numel();
    for start in (0..numel).step_by(CHUNK) {
        let len = CHUNK.min(numel - start);
        let read = |view: &cpift_core::TensorView<'_>| {
            let mut values = vec![zero; len];
            view.read(start, &mut values);
            values
        };
        let (base, tuned) = (read(&p.base), read(&p.tuned));
        let mut rest = vec![zero; len];
        for view in &views {
            let values = read(view);
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(BadInput::new(view.file, format!("a weight is not finite, at flat index {}", start + at))
                    .tensor(view.name)
                    .expected("finite numbers")
                    .found(values[at].to_f64().to_string())
                    .into());
            }
            rest.iter_mut().zip(values).zip(&base).for_each(|((sum, v), b)| *sum = *sum + (v - *b));
        }
        let moved = base.iter().zip(&tuned).map(|(b, t)| t.distance(*b));
        for (at, (moved, rest)) in (start..).zip(moved.zip(rest)) {
            if !moved.is_finite() {
                refuse_not_finite::<T>(p, Chunk { pair, start, len })?;
            }
            // Rounding the f64 product of two f32 numbers gives exactly their f32 product.
            let bound = T::from_f64(lambda.to_f64() * rest.distance(zero).to_f64());
            bits.set(at, moved > zero && moved >= bound);
        }
    }
    Ok(bits.0)
}

/// Bits of the `n` best of every `m` consecutive elements of the last dimension. A group cut short
/// by the end of the dimension keeps its share, rounded down.
fn best_of_groups<T: Score + Arithmetic>(
    part: &Part<'_>,
    pair: usize,
    metric: Metric,
    (n, m): (usize, usize),
    key: TieKey,
) -> Result<Vec<u8>> {
    let width = part.pairs[pair].base.shape.last().copied().unwrap_or(1);
    let (mut bits, mut group) = (Bits::of(part, pair), Vec::with_capacity(m));
    let mut settle = |group: &mut Vec<(T, usize)>| {
        let keep = n * group.len() / m;
        let order = |e: &(T, usize)| (key.hash(e.1), e.1);
        group.sort_by(|a, b| {
            b.0.partial_cmp(&a.0).unwrap_or(std::cmp::Ordering::Equal).then_with(|| order(a).cmp(&order(b)))
        });
        group[..keep].iter().for_each(|(_, at)| bits.set(*at, true));
        group.clear();
    };
    for_each_score::<T>(part, pair, metric, |at, score| {
        group.push((score, at));
        if group.len() == m || (at + 1) % width.max(1) == 0 {
            settle(&mut group);
        }
    })?;
    Ok(bits.0)
}

/// Rows or columns of the tensors of a part.
struct Units {
    rows: bool,
    /// Mean score of each unit, by tensor.
    means: Vec<Vec<f64>>,
}

impl Units {
    /// Measures the mean score of each row or column. Tensors of one dimension have units of one
    /// element.
    fn measure<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric, rows: bool) -> Result<Self> {
        let of = |pair: usize| {
            let (count, numel) = (units(part, pair, rows), part.pairs[pair].base.numel());
            let mut sums = vec![0f64; count];
            for_each_score::<T>(part, pair, metric, |at, score| {
                sums[unit(at, numel, count, rows)] += score.to_f64();
            })?;
            let size = (numel / count.max(1)).max(1) as f64;
            sums.iter_mut().for_each(|sum| *sum /= size);
            Ok(sums)
        };
        let means = (0..part.pairs.len()).into_par_iter().map(of).collect::<Result<_>>()?;
        Ok(Self { rows, means })
    }

    /// The best units, by tensor: in descending order of their means until the next one would take
    /// more than `k` elements in all.
    fn best(&self, part: &Part<'_>, k: u64, salt: &TieSalt) -> Vec<Vec<bool>> {
        let mut order: Vec<(f64, u64, usize, usize)> = Vec::new();
        for (pair, means) in self.means.iter().enumerate() {
            let key = salt.key(part.pairs[pair].base.name);
            order.extend(means.iter().enumerate().map(|(i, mean)| (*mean, key.hash(i), pair, i)));
        }
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
        let mut chosen: Vec<Vec<bool>> = self.means.iter().map(|means| vec![false; means.len()]).collect();
        let mut left = k;
        for (_, _, pair, i) in order {
            let size = (part.pairs[pair].base.numel() / self.means[pair].len()) as u64;
            if size > left {
                break;
            }
            left -= size;
            chosen[pair][i] = true;
        }
        chosen
    }

    fn bits(&self, part: &Part<'_>, pair: usize, chosen: &[bool]) -> Vec<u8> {
        let (mut bits, numel) = (Bits::of(part, pair), part.pairs[pair].base.numel());
        (0..numel).for_each(|at| bits.set(at, chosen[unit(at, numel, chosen.len(), self.rows)]));
        bits.0
    }
}

/// Number of rows or columns of a tensor.
fn units(part: &Part<'_>, pair: usize, rows: bool) -> usize {
    let shape = part.pairs[pair].base.shape;
    if part.pairs[pair].base.numel() == 0 {
        return 0;
    }
    (if rows { shape.first() } else { shape.last() }).copied().unwrap_or(1)
}

/// Row or column of element `at`.
fn unit(at: usize, numel: usize, units: usize, rows: bool) -> usize {
    if rows { at / (numel / units) } else { at % units }
}

/// Refuses a selection without elements.
///
/// # Errors
/// [`cpift_core::Usage`] with a hint.
pub(crate) fn refuse_empty(rule: &Rule<'_>, selected: u64) -> Result<()> {
    if selected > 0 {
        return Ok(());
    }
    let text = match rule {
        Rule::Structure(Structure::Groups(..), _) => {
            "--structure chooses nothing: the last dimension of every tensor is shorter than a group\n  hint: give a \
             smaller M"
        }
        Rule::Structure(..) => {
            "--structure chooses nothing: --percent is less than one row or column\n  hint: give a larger --percent"
        }
        Rule::Above(_) => "--above chooses nothing: no score is that large\n  hint: give a smaller number",
        Rule::Tall { .. } => "no element belongs to this model\n  hint: give a smaller --lambda",
    };
    Err(usage(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, d: u64) -> u64 {
        text.parse::<Percent>().unwrap().of(d)
    }

    #[test]
    fn the_count_is_that_of_the_decimal_text() {
        assert_eq!(of("0.1", 1000), 1);
        assert_eq!(of("0.57", 10_000), 57);
        assert_eq!((0.57f64 * 10_000.0 / 100.0) as u64, 56, "which is why p is not a float");
        assert_eq!(of("0.29", 100_000), 290);
        assert_eq!(of("0.07", 10_000), 7);
        assert_eq!(of("1", 99), 0);
        assert_eq!(of("1", 100), 1);
        assert_eq!(of("100", 12_345), 12_345);
        assert_eq!(of("33.333333333333333", 3), 0);
        assert_eq!(of("1", u64::MAX), u64::MAX / 100);
    }

    #[test]
    fn every_way_to_write_a_number_means_the_same() {
        for text in ["1", "1.0", "+1", "01.00", "1e0", "10e-1", "0.1e1", "1.", "+.1E+1"] {
            assert_eq!(of(text, 12_345), 123, "{text}");
        }
        assert_eq!(of(".5", 1000), 5);
        assert_eq!(of("1e2", 7), 7);
        assert_eq!(of("2.5e-3", 1_000_000), 25);
    }

    #[test]
    fn rounded_up_it_is_one_more_where_something_is_left() {
        let up = |text: &str, n: u64| text.parse::<Percent>().unwrap().up_of(n);
        assert_eq!((up("10", 290), up("10", 291), up("0.001", 3), up("100", 7), up("10", 0)), (29, 30, 1, 7, 0));
        assert_eq!((0.07f64 * 100.0).ceil(), 8.0, "which is why p is not a float");
        assert_eq!(up("7", 100), 7);
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        for text in ["0", "-1", "100.5", "nan", "inf", "1e3", "", "one", "-0", "1e-30", "100.00000000000000001"] {
            assert!(text.parse::<Percent>().is_err(), "{text}");
        }
    }

    #[test]
    fn structures_are_parsed_and_printed() {
        for text in ["row", "column", "2:4", "1:1"] {
            assert_eq!(text.parse::<Structure>().unwrap().to_string(), text);
        }
        for text in ["", "rows", "4:2", "0:4", "2:", "2:4:8", "-1:4", "1:65537"] {
            assert!(text.parse::<Structure>().is_err(), "{text}");
        }
    }

    #[test]
    fn rows_and_columns_of_a_matrix() {
        let row: Vec<usize> = (0..6).map(|at| unit(at, 6, 2, true)).collect();
        let column: Vec<usize> = (0..6).map(|at| unit(at, 6, 3, false)).collect();
        assert_eq!((row, column), (vec![0, 0, 0, 1, 1, 1], vec![0, 1, 2, 0, 1, 2]));
    }
}
