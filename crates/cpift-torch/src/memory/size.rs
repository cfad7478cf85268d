//! How many parameters a model has, unit by unit, from its config.json alone.

use crate::model::{EMBEDDING, ModelConfig};

/// Parameters of a model's units, and of its largest tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// The embedding table, [v, e].
    pub embedding: u64,
    /// One decoder block.
    pub block: u64,
    /// Number of decoder blocks.
    pub blocks: u64,
    /// The norm before the output matrix.
    pub norm: u64,
    /// The output matrix, [v, e]; 0 where it is the embedding table.
    pub head: u64,
    /// The largest tensor.
    pub largest: u64,
}

impl Sizes {
    /// Those of `c`.
    pub fn of(c: &ModelConfig) -> Self {
        let shapes: Vec<(String, u64)> = c
            .parameter_shapes()
            .into_iter()
            .map(|(name, shape)| (name, shape.iter().product::<i64>() as u64))
            .collect();
        let sum = |prefix: &str| shapes.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, n)| n).sum();
        Self {
            embedding: sum(EMBEDDING),
            block: sum("model.layers.0."),
            blocks: c.num_hidden_layers as u64,
            norm: sum("model.norm."),
            head: sum("lm_head."),
            largest: shapes.iter().map(|(_, n)| *n).max().unwrap_or(0),
        }
    }

    /// D: all parameters, a tied matrix once.
    pub fn total(&self) -> u64 {
        self.embedding + self.blocks * self.block + self.norm + self.head
    }
}

/// e, f, d, h, k and v: width of the residual stream, of the MLP and of a head; query heads, key heads, vocabulary.
pub(super) fn dimensions(c: &ModelConfig) -> [u64; 6] {
    [c.hidden_size, c.intermediate_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads, c.vocab_size]
        .map(|n| n as u64)
}
