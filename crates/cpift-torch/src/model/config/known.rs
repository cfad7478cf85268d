//! Fields of config.json: those that are read, those without a say in the model's output, those that would change it, and the rest.

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
    // Falcon3 has it beside hidden_act.
    "activation",
    "add_cross_attention",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bf16",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "fp16",
    "fp32",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "name_or_path",
    "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_logits_to_keep",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "seq_length",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "typical_p",
    "unsloth_fixed",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention",
    "use_flash_attention_2",
    "use_flash_attn",
    "use_return_dict",
    "use_sdpa",
];

/// Fields that would change the maths, with the values that do not; all others, null excepted, are refused.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("attention_multiplier", &["1", "1.0"]),
    ("causal", &["true"]),
    ("embedding_multiplier", &["1", "1.0"]),
    ("is_causal", &["true"]),
    ("is_decoder", &["true", "false"]),
    ("is_encoder_decoder", &["false"]),
    ("logit_scale", &["1", "1.0"]),
    ("logits_scaling", &["1", "1.0"]),
    ("num_experts", &["0", "1"]),
    ("num_local_experts", &["0", "1"]),
    ("partial_rotary_factor", &["1", "1.0"]),
    ("residual_multiplier", &["1", "1.0"]),
    ("rope_interleaved", &["false"]),
    ("rotary_pct", &["1", "1.0"]),
    ("use_rope", &["true"]),
];

/// What a word in the name of a field begins with where the field changes the maths, in any family of transformers; at a value that is off it
/// does not.
const MATHS: &[&str] = &[
    "adapter",
    "alibi",
    "altup",
    "audio_config",
    "bias",
    "bidirectional",
    "block_sparse",
    "clamp",
    "chunked",
    "clip",
    "dropout",
    "expert",
    "head_dim",
    "heads",
    "kv_shared",
    "laurel",
    "linear_attention",
    "logit",
    "lora",
    "mamba",
    "moe",
    "multiplier",
    "mup",
    "layernorm",
    "nope",
    "norm",
    "parallel_residual",
    "pdrop",
    "per_layer",
    "position_embedding",
    "quantization",
    "rmsnorm",
    "rope",
    "rotary",
    "router",
    "scale",
    "scaling",
    "sink",
    "sliding",
    "softcap",
    "sparse",
    "sparsity",
    "text_config",
    "theta",
    "use_logn",
    "vision_config",
    "window",
];

/// Refuses the fields that change the maths and are not implemented, and returns those that are not known, with their values.
///
/// A field that is not known and off, zero or empty is taken to change nothing.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the first.
pub(super) fn check_fields(fields: &Fields) -> Result<Vec<String>> {
    let mut unknown = Vec::new();
    for (key, value) in fields.present() {
        if READ.contains(&key) || harmless(key) {
            continue;
        }
        let text = value.to_string();
        let neutral = NEUTRAL.iter().find(|(name, _)| *name == key).map(|(_, values)| *values);
        let refused = match neutral {
            Some(values) => !values.contains(&text.as_str()),
            None if is_off(value) => false,
            None if names_maths(key) => true,
            None => {
                unknown.push(format!("{key} = {text}"));
                false
            }
        };
        if refused {
            return Err(fields
                .bad(format!("{key} = {text} changes the maths in a way that is not implemented"))
                .expected(neutral.map_or("no such field".into(), |values| values.join(" or ")))
                .hint("if the field has no say in the model's output, take it out of config.json")
                .into());
        }
    }
    Ok(unknown)
}

fn names_maths(key: &str) -> bool {
    let words = key.char_indices().filter(|(i, _)| *i == 0 || matches!(key.as_bytes()[i - 1], b'_' | b'.'));
    words.map(|(i, _)| &key[i..]).any(|rest| MATHS.iter().any(|part| rest.starts_with(part)))
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
