//! Layers and roles of parameters, derived from their names, and the distribution of a core region
//! over them.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::Serialize;

use crate::format::mask::{Mask, MaskHeader, count_ones};

/// Names of the list of layers in Llama and most others, BERT, GPT-2, vision towers, T5.
const LISTS: [&str; 5] = ["layers", "layer", "h", "blocks", "block"];

/// Layer of a tensor: the name up to and including the first `layers.N` (or `h.N`, `blocks.N`), and
/// N.
pub fn layer(name: &str) -> Option<(&str, u32)> {
    let mut end = 0;
    let mut before = "";
    for piece in name.split('.') {
        end += piece.len();
        if LISTS.contains(&before)
            && let Ok(number) = piece.parse()
        {
            return Some((&name[..end], number));
        }
        before = piece;
        end += 1;
    }
    None
}

/// Label of the row of tensors outside the layers.
pub const OUTSIDE: &str = "outside";

/// Rows of a table by layer: the layers of each stack by number, then one row for all other
/// tensors.
#[derive(Debug, Clone)]
pub struct LayerRows {
    /// Number of the layer, or its whole prefix if the model has several stacks of layers;
    /// [`OUTSIDE`] at the end.
    pub labels: Vec<String>,
    rows: BTreeMap<(String, u32), usize>,
}

impl LayerRows {
    /// Creates the rows for tensors with these names.
    pub fn new<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Self {
        let keys: BTreeSet<(String, u32)> = names.clone().filter_map(key).collect();
        let stacks: BTreeSet<&str> = keys.iter().map(|(stack, _)| stack.as_str()).collect();
        let label = |(stack, n): &(String, u32)| if stacks.len() == 1 { n.to_string() } else { format!("{stack}{n}") };
        let mut labels: Vec<String> = keys.iter().map(label).collect();
        if names.clone().any(|name| layer(name).is_none()) {
            labels.push(OUTSIDE.to_owned());
        }
        Self { labels, rows: keys.into_iter().enumerate().map(|(row, key)| (key, row)).collect() }
    }

    /// Index of the row of a tensor, which must be among the names given to [`LayerRows::new`].
    pub fn row(&self, name: &str) -> usize {
        key(name).map_or(self.labels.len() - 1, |key| self.rows[&key])
    }
}

/// Stack and number of a tensor's layer: `model.layers.` and 12.
fn key(name: &str) -> Option<(String, u32)> {
    let (prefix, number) = layer(name)?;
    let stack = prefix.rfind('.').map_or("", |dot| &prefix[..=dot]);
    Some((stack.to_owned(), number))
}

/// Roles of parameters.
pub(crate) const ROLES: [&str; 11] = ["q", "k", "v", "o", "gate", "up", "down", "norm", "embed", "head", "other"];

/// Role of a parameter: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, `norm`, `embed`, `head` or
/// `other`.
pub fn role(name: &str) -> &'static str {
    let projection = name.split('.').find_map(|piece| {
        let role = piece.strip_suffix("_proj")?;
        ROLES[..7].iter().find(|r| **r == role)
    });
    match projection {
        Some(role) => role,
        None if TensorKind::Norms.matches(name) => "norm",
        None if name.starts_with("lm_head") => "head",
        None if TensorKind::Embeddings.matches(name) => "embed",
        None => "other",
    }
}

/// Kind of tensor for `--exclude`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorKind {
    /// Input and output embeddings: `embed_tokens`, `lm_head`.
    Embeddings,
    /// Normalization weights: names that contain `norm`.
    Norms,
}

impl TensorKind {
    /// Returns true if the tensor called `name` is of this kind.
    pub fn matches(self, name: &str) -> bool {
        match self {
            Self::Embeddings => name.contains("embed_tokens") || name.starts_with("lm_head"),
            Self::Norms => name.contains("norm"),
        }
    }
}

impl std::fmt::Display for TensorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Embeddings => "embeddings",
            Self::Norms => "norms",
        })
    }
}

impl std::str::FromStr for TensorKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "embeddings" => Ok(Self::Embeddings),
            "norms" => Ok(Self::Norms),
            other => Err(format!("expected embeddings or norms, found {other:?}")),
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_by_the_number_after_the_list() {
        assert_eq!(layer("model.layers.12.mlp.up_proj.weight"), Some(("model.layers.12", 12)));
        assert_eq!(layer("layers.0.w"), Some(("layers.0", 0)));
        assert_eq!(layer("transformer.h.3.attn.c_attn.weight"), Some(("transformer.h.3", 3)));
        assert_eq!(layer("encoder.block.1.layer.0.SelfAttention.q.weight"), Some(("encoder.block.1", 1)));
        assert_eq!(layer("model.sublayers.1.w"), None);
        assert_eq!(layer("model.layers.norm.weight"), None);
        assert_eq!(layer("model.embed_tokens.weight"), None);
    }

    #[test]
    fn rows_are_layers_by_number_followed_by_the_rest() {
        let names = ["lm_head.weight", "model.layers.10.w", "model.layers.2.w", "model.layers.2.x"];
        let rows = LayerRows::new(names.into_iter());
        assert_eq!(rows.labels, ["2", "10", "outside"]);
        assert_eq!(names.map(|n| rows.row(n)), [2, 1, 0, 0]);
        let rows = LayerRows::new(names[1..].iter().copied());
        assert_eq!(rows.labels, ["2", "10"]);
        let names = ["vision.layers.0.w", "text.layers.0.w", "text.layers.1.w"];
        let rows = LayerRows::new(names.into_iter());
        assert_eq!(rows.labels, ["text.layers.0", "text.layers.1", "vision.layers.0"]);
        assert_eq!(names.map(|n| rows.row(n)), [2, 0, 1]);
    }

    #[test]
    fn roles_follow_from_names() {
        for (name, expected) in [
            ("model.layers.0.self_attn.q_proj.weight", "q"),
            ("model.layers.0.self_attn.k_proj.bias", "k"),
            ("model.layers.0.self_attn.o_proj.weight", "o"),
            ("model.layers.0.mlp.down_proj.weight", "down"),
            ("model.layers.0.input_layernorm.weight", "norm"),
            ("model.norm.weight", "norm"),
            ("model.embed_tokens.weight", "embed"),
            ("lm_head.weight", "head"),
            ("model.layers.0.self_attn.qkv_proj.weight", "other"),
        ] {
            assert_eq!(role(name), expected, "{name}");
        }
    }
}
