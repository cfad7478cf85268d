//! Distribution of a core region over a model: the bits of its mask, counted by layer and by role.

use rayon::prelude::*;
use serde::Serialize;

use crate::format::mask::{Mask, MaskHeader, count_ones};
use crate::format::names::{LayerRows, ROLES, TensorKind, role};

/// Metadata of a mask and the distribution of its bits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Metadata: p in percent, D, scope, ties, digests.
    pub mask: MaskHeader,
    /// Counts by decoder layer; the last row is for the tensors outside the layers.
    pub layers: Vec<Row>,
    /// Counts by role (see [`role`]); roles that the model does not have are omitted.
    pub roles: Vec<Row>,
    /// Counts by layer and role.
    pub matrix: Matrix,
    /// Counts by tensor; empty unless asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<Row>,
}

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Number of the layer, `outside`, or the role.
    pub name: String,
    /// Number of elements, including those excluded from D.
    pub elements: u64,
    /// Number of bits set.
    pub selected: u64,
    /// `selected / elements`; 0 if there are no elements.
    pub density: f64,
    /// `selected` divided by the number of bits set in the whole mask.
    pub share: f64,
}

/// Counts per layer and role, [layers × roles].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Matrix {
    /// Names of the rows, as in [`Stats::layers`].
    pub layers: Vec<String>,
    /// Names of the columns, as in [`Stats::roles`].
    pub roles: Vec<&'static str>,
    /// Number of elements, including those excluded from D.
    pub elements: Vec<Vec<u64>>,
    /// Number of bits set.
    pub selected: Vec<Vec<u64>>,
    /// `selected / elements`; none if no element of the cell is in D.
    pub density: Vec<Vec<Option<f64>>>,
}

/// Numbers of elements, of elements in D, and of bits set.
#[derive(Clone, Copy, Default)]
struct Sums {
    elements: u64,
    ranked: u64,
    selected: u64,
}

impl Sums {
    fn of(cells: impl Iterator<Item = Self>) -> Self {
        cells.fold(Self::default(), |a, b| Self {
            elements: a.elements + b.elements,
            ranked: a.ranked + b.ranked,
            selected: a.selected + b.selected,
        })
    }
}

/// Counts the bits of `mask` by layer and by role in one pass over the mapped file.
pub fn stats(mask: &Mask) -> Stats {
    let excluded: Vec<TensorKind> = mask.header.excluded.iter().filter_map(|kind| kind.parse().ok()).collect();
    let rows = LayerRows::new(mask.header.numel.keys().map(String::as_str));
    let tensors: Vec<(&str, &[u8])> = mask.tensors().collect();
    let counted: Vec<(&str, u64)> = tensors.par_iter().map(|(name, bits)| (*name, count_ones(bits))).collect();
    let roles: Vec<&'static str> =
        ROLES.into_iter().filter(|r| counted.iter().any(|(name, _)| role(name) == *r)).collect();
    let mut cells = vec![vec![Sums::default(); roles.len()]; rows.labels.len()];
    for (name, selected) in counted {
        let column = roles.iter().position(|r| *r == role(name)).expect("every role that occurs is a column");
        let elements = mask.header.numel[name];
        let ranked = if excluded.iter().any(|kind| kind.matches(name)) { 0 } else { elements };
        let cell = &mut cells[rows.row(name)][column];
        *cell = Sums::of([*cell, Sums { elements, ranked, selected }].into_iter());
    }
    let total = mask.header.selected;
    let layer = |(name, cells): (&String, &Vec<Sums>)| row(name, Sums::of(cells.iter().copied()), total);
    let role = |(i, name): (usize, &&str)| row(name, Sums::of(cells.iter().map(|cells| cells[i])), total);
    Stats {
        mask: mask.header.clone(),
        layers: rows.labels.iter().zip(&cells).map(layer).collect(),
        roles: roles.iter().enumerate().map(role).collect(),
        matrix: matrix(rows.labels.clone(), roles.clone(), &cells),
        tensors: Vec::new(),
    }
}

/// Counts the bits of `mask` by tensor.
pub fn tensors(mask: &Mask) -> Vec<Row> {
    let list: Vec<(&str, &[u8])> = mask.tensors().collect();
    let of = |(name, bits): &(&str, &[u8])| {
        let sums = Sums { elements: mask.header.numel[*name], ranked: 0, selected: count_ones(bits) };
        row(name, sums, mask.header.selected)
    };
    list.par_iter().map(of).collect()
}

fn matrix(layers: Vec<String>, roles: Vec<&'static str>, cells: &[Vec<Sums>]) -> Matrix {
    fn each<T>(cells: &[Vec<Sums>], value: impl Fn(&Sums) -> T) -> Vec<Vec<T>> {
        cells.iter().map(|row| row.iter().map(&value).collect()).collect()
    }
    Matrix {
        layers,
        roles,
        elements: each(cells, |c| c.elements),
        selected: each(cells, |c| c.selected),
        density: each(cells, |c| (c.ranked > 0).then(|| c.selected as f64 / c.elements as f64)),
    }
}

fn row(name: &str, Sums { elements, selected, .. }: Sums, total: u64) -> Row {
    let over = |whole: u64| if whole == 0 { 0.0 } else { selected as f64 / whole as f64 };
    Row { name: name.to_owned(), elements, selected, density: over(elements), share: over(total) }
}
