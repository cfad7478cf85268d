//! How many parameters a model has, unit by unit, from its config.json alone.

use crate::model::ModelConfig;

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
        let [e, f, d, h, k, v] = dimensions(c);
        let bias = |has: bool, width: u64| if has { width } else { 0 };
        let attention = 2 * (h + k) * d * e + bias(c.qkv_bias, (h + 2 * k) * d) + bias(c.o_bias, e);
        let mlp = 3 * e * f + bias(c.mlp_bias, 2 * f + e);
        let norms = if c.gemma_norms { 4 * e } else { 2 * e } + bias(c.qk_norm, 2 * d);
        Self {
            embedding: v * e,
            block: attention + mlp + norms,
            blocks: c.num_hidden_layers as u64,
            norm: e,
            head: if c.tie_word_embeddings { 0 } else { v * e },
            largest: (v * e).max(e * f).max(h * d * e),
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
