//! A small model and what is read from its masks, for the tests of the real binary.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::Path;

use cpift_core::format::mask::indices;
use cpift_core::{Dtype, Mask};
use cpift_testkit::{Tensor, Tensors};
use serde_json::Value;

pub const BIN: &str = env!("CARGO_BIN_EXE_cpift-mask");

/// The elements of a mask, as (name, index).
pub fn chosen(mask: &Mask) -> Vec<(String, usize)> {
    mask.tensors().flat_map(|(name, bits)| indices(bits).map(move |i| (name.to_owned(), i))).collect()
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
