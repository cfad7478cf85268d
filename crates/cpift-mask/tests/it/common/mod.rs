//! A small model and what is read from its masks, for the tests of the real binary.

use std::path::Path;

use cpift_core::format::digest::Digest;
use cpift_core::format::mask::indices;
use cpift_core::stream::ties::TieSalt;
use cpift_core::{Checkpoint, Dtype, Mask};
use cpift_testkit::{Tensor, Tensors};
use serde_json::Value;

pub const BIN: &str = env!("CARGO_BIN_EXE_cpift-mask");

/// The elements of a mask, as (name, index).
pub fn chosen(mask: &Mask) -> Vec<(String, usize)> {
    mask.tensors().flat_map(|(name, bits)| indices(bits).map(move |i| (name.to_owned(), i))).collect()
}

/// Sorts (score, name, index) as elements are chosen: the largest score first, equal scores by the
/// tie hashes of the tuned checkpoint.
pub fn sort_as_chosen(list: &mut [(f64, &str, usize)], tuned: &Digest) {
    let salt = TieSalt::new(tuned);
    let mut keys = std::collections::HashMap::new();
    let mut hashed: Vec<_> = list
        .iter()
        .map(|&(score, name, i)| (score, keys.entry(name).or_insert_with(|| salt.key(name)).hash(i), name, i))
        .collect();
    hashed.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    list.iter_mut().zip(hashed).for_each(|(slot, (score, _, name, i))| *slot = (score, name, i));
}

/// Digest of the checkpoint at `path`.
pub fn digest(path: &Path) -> Digest {
    Checkpoint::open(path).unwrap().digest().unwrap()
}

/// A small model of two layers with one tensor of several chunks; `next` draws its values.
pub fn model(dtypes: &[Dtype], mut next: impl FnMut() -> f32) -> Tensors {
    let shapes: [(&str, &[usize]); 8] = [
        ("lm_head.weight", &[100_003]),
        ("model.embed_tokens.weight", &[50, 7]),
        ("model.layers.0.mlp.up_proj.weight", &[64, 33]),
        ("model.layers.0.self_attn.q_proj.weight", &[31, 31]),
        ("model.layers.1.mlp.up_proj.weight", &[64, 33]),
        ("model.layers.10.input_layernorm.weight", &[3]),
        ("model.norm.weight", &[13]),
        ("scalar", &[]),
    ];
    let tensor = |(i, (name, shape)): (usize, (&str, &[usize]))| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        (name.to_owned(), Tensor::floats(dtypes[i % dtypes.len()], shape, &values))
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

/// The record beside an output.
pub fn record(out: &Path) -> Value {
    let text = std::fs::read_to_string(cpift_core::record::provenance::beside(out)).unwrap();
    serde_json::from_str(&text).unwrap()
}
