//! The parameters that a model of a given config has.

use super::{Family, ModelConfig};
use crate::model::EMBEDDING;

impl ModelConfig {
    /// Name and shape of every parameter, in the order of the forward pass.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let mut all = vec![(EMBEDDING.to_owned(), vec![self.vocab_size, self.hidden_size])];
        (0..self.num_hidden_layers).for_each(|layer| self.block_shapes(layer, &mut all));
        all.push(("model.norm.weight".to_owned(), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab_size, self.hidden_size]));
        }
        all
    }

    fn block_shapes(&self, layer: i64, all: &mut Vec<(String, Vec<i64>)>) {
        let (e, f, d) = (self.hidden_size, self.intermediate_size, self.head_dim);
        let (q, kv) = (self.num_attention_heads * d, self.num_key_value_heads * d);
        let mut add = |name: &str, shape: &[i64]| all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        for (name, rows, columns, bias) in [
            ("self_attn.q_proj", q, e, self.qkv_bias),
            ("self_attn.k_proj", kv, e, self.qkv_bias),
            ("self_attn.v_proj", kv, e, self.qkv_bias),
            ("self_attn.o_proj", e, q, self.o_bias),
            ("mlp.gate_proj", f, e, self.mlp_bias),
            ("mlp.up_proj", f, e, self.mlp_bias),
            ("mlp.down_proj", e, f, self.mlp_bias),
        ] {
            add(&format!("{name}.weight"), &[rows, columns]);
            if bias {
                add(&format!("{name}.bias"), &[rows]);
            }
        }
        if self.qk_norm {
            add("self_attn.q_norm.weight", &[d]);
            add("self_attn.k_norm.weight", &[d]);
        }
        add("input_layernorm.weight", &[e]);
        add("post_attention_layernorm.weight", &[e]);
        if self.family == Family::Gemma2 {
            add("pre_feedforward_layernorm.weight", &[e]);
            add("post_feedforward_layernorm.weight", &[e]);
        }
    }
}
