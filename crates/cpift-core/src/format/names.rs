//! Layer and role of a parameter, derived from its name.

use std::collections::{BTreeMap, BTreeSet};

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
