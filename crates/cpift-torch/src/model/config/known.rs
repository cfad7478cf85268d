//! Which fields of config.json this program reads, which cannot matter, and which would change the maths.

use anyhow::Result;
use serde_json::Value;

use super::fields::Fields;

/// Fields that the families read.
const READ: &[&str] = &[
    "architectures",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
];

/// Fields without a say in the loss of a causal language model: how the model was made, is stored, generates or is served.
const HARMLESS: &[&str] = &[
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "cache_implementation",
    "chunk_size_feed_forward",
    "do_sample",
    "dtype",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_length",
    "model_max_length",
    "name_or_path",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
];

/// Fields that would change the maths, with the values that do not.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("attention_dropout", &["0", "0.0"]),
    ("attention_multiplier", &["1", "1.0"]),
    ("embedding_multiplier", &["1", "1.0"]),
    ("is_decoder", &["true", "false"]),
    ("logit_scale", &["1", "1.0"]),
    ("logits_scaling", &["1", "1.0"]),
    ("num_local_experts", &["0", "1"]),
    ("partial_rotary_factor", &["1", "1.0"]),
    ("residual_multiplier", &["1", "1.0"]),
    ("rope_interleaved", &["false"]),
];

/// Refuses every field that is neither read, nor harmless, nor at a value that changes nothing.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the first.
pub(super) fn check_fields(fields: &Fields) -> Result<()> {
    for (key, value) in fields.present() {
        if READ.contains(&key) || harmless(key) {
            continue;
        }
        let neutral = NEUTRAL.iter().find(|(name, _)| *name == key).map(|(_, values)| *values);
        let text = value.to_string();
        let at_rest = match neutral {
            Some(values) => values.contains(&text.as_str()),
            // What is off, zero or empty in a field we do not know is taken to change nothing.
            None => is_off(value),
        };
        if !at_rest {
            return Err(fields
                .bad(format!(
                    "{key} = {text} changes the maths in a way that is not implemented, or is not a known field"
                ))
                .expected(neutral.map_or("no such field".into(), |values| values.join(" or ")))
                .hint("if the field has no say in the model's output, take it out of config.json")
                .into());
        }
    }
    Ok(())
}

/// Private fields, versions and special tokens have no say either.
fn harmless(key: &str) -> bool {
    let by_form = key.starts_with('_')
        || key.ends_with("_version")
        || key.ends_with("_token")
        || key.ends_with("_token_id")
        || key.ends_with("_token_ids");
    by_form || HARMLESS.contains(&key)
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::String(_) => false,
    }
}
