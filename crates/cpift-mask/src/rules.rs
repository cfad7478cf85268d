//! Selections that are not the top p % of single elements: rows, columns, N of M consecutive
//! elements, updates above a size, and TALL masks.

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
use crate::percent::Percent;

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
