//! `stats`: how a core region lies in the model, by layer and by role.

use std::collections::BTreeMap;
use std::fmt::Write;

use cpift_core::Mask;
use cpift_core::checkpoint::TensorKind;
use cpift_core::mask::{MaskHeader, count_ones};
use rayon::prelude::*;
use serde::Serialize;

use crate::parts::layer;

/// What a mask says of itself and where its bits are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// p in percent, D, scope, ties, digests.
    pub mask: MaskHeader,
    /// By decoder layer; the last row is what lies outside the layers.
    pub layers: Vec<Row>,
    /// By role, in the order of [`ROLES`]; roles the model does not have are left out.
    pub roles: Vec<Row>,
}

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The layer's number, `outside`, or the role.
    pub name: String,
    /// Elements, those left out of D included.
    pub elements: u64,
    /// Bits set.
    pub selected: u64,
    /// `selected / elements`; 0 where there are no elements.
    pub density: f64,
    /// `selected` over all bits set.
    pub share: f64,
}

/// The roles a parameter can have.
pub const ROLES: [&str; 11] = ["q", "k", "v", "o", "gate", "up", "down", "norm", "embed", "head", "other"];

/// The role of a parameter, by its name.
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

/// Counts the bits of `mask` by layer and by role.
pub fn stats(mask: &Mask) -> Stats {
    let tensors: Vec<(&str, &[u8])> = mask.tensors().collect();
    let counted: Vec<(&str, u64)> = tensors.par_iter().map(|(name, bits)| (*name, count_ones(bits))).collect();
    let mut layers: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    let mut roles: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
    for (name, ones) in counted {
        let n = mask.header.numel[name];
        let place = ROLES.iter().position(|r| *r == role(name)).unwrap_or(ROLES.len() - 1);
        // The highest key is for what lies outside the layers, so that it comes last.
        let number = layer(name).map_or(u32::MAX, |(_, number)| number);
        for sums in [layers.entry(number).or_default(), roles.entry(place).or_default()] {
            *sums = (sums.0 + n, sums.1 + ones);
        }
    }
    let total = mask.header.selected;
    let layer_name = |n: u32| if n == u32::MAX { "outside".to_owned() } else { n.to_string() };
    Stats {
        mask: mask.header.clone(),
        layers: layers.into_iter().map(|(n, sums)| row(layer_name(n), sums, total)).collect(),
        roles: roles.into_iter().map(|(place, sums)| row(ROLES[place].to_owned(), sums, total)).collect(),
    }
}

fn row(name: String, (elements, selected): (u64, u64), total: u64) -> Row {
    let over = |whole: u64| if whole == 0 { 0.0 } else { selected as f64 / whole as f64 };
    Row { name, elements, selected, density: over(elements), share: over(total) }
}

impl Stats {
    /// The tables as text.
    pub fn table(&self) -> String {
        let MaskHeader { percent, scope, d, selected, ties, excluded, .. } = &self.mask;
        let scope = format!("{scope:?}").to_lowercase();
        let mut out = format!(
            "p = {percent} % of D = {d} by {scope} scope: {selected} elements, {} of them decided by position\n",
            ties.decided_by_position
        );
        if !excluded.is_empty() {
            let _ = writeln!(out, "left out of D: {}", excluded.join(", "));
        }
        for (title, rows) in [("layer", &self.layers), ("role", &self.roles)] {
            let _ =
                writeln!(out, "\n{title:<8} {:>14} {:>12} {:>10} {:>9}", "elements", "selected", "density", "share");
            for r in rows {
                let (density, share) = (100.0 * r.density, 100.0 * r.share);
                let _ = writeln!(
                    out,
                    "{:<8} {:>14} {:>12} {density:>8.3} % {share:>7.2} %",
                    r.name, r.elements, r.selected
                );
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_told_by_names() {
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
