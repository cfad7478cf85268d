//! The fields of a config.json: typed access with errors that name file and field; which fields are
//! read, have no effect on the output, or would change it; and those that describe experts, with
//! the tensors that follow from them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::rope::RopeSettings;
use serde_json::{Map, Value};

/// Context length, if neither config.json nor the family has one.
pub(super) const DEFAULT_POSITIONS: i64 = 2048;

/// The fields of one config.json; null counts as absent.
pub(super) struct Fields {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    /// The fields of `at`, a checkpoint directory or a config.json.
    pub(super) fn new(at: &Path, config: &Value) -> Self {
        let path = if at.is_file() { at.to_owned() } else { at.join("config.json") };
        Self { path, map: config.as_object().cloned().unwrap_or_default() }
    }

    pub(super) fn bad(&self, message: impl Into<String>) -> BadInput {
        BadInput::new(&self.path, message)
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// All fields that are not null.
    pub(super) fn present(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.map.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.as_str(), v))
    }

    fn typed<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(v) => Ok(Some(v)),
                None => Err(self.bad(format!("{key} cannot be used")).found(value.to_string()).into()),
            },
        }
    }

    pub(super) fn int(&self, key: &str) -> Result<i64> {
        self.typed(key, positive)?.ok_or_else(|| self.bad(format!("the field {key} is missing")).into())
    }

    pub(super) fn int_or(&self, key: &str, default: i64) -> Result<i64> {
        Ok(self.typed(key, positive)?.unwrap_or(default))
    }

    /// A count that may be 0.
    pub(super) fn count_or(&self, key: &str, default: i64) -> Result<i64> {
        Ok(self.typed(key, |v| v.as_i64().filter(|n| *n >= 0))?.unwrap_or(default))
    }

    /// A positive number, if the field is present.
    pub(super) fn positive_float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, |v| v.as_f64().filter(|x| *x > 0.0))
    }

    /// A positive integer, if the field is present.
    pub(super) fn optional_int(&self, key: &str) -> Result<Option<i64>> {
        self.typed(key, positive)
    }

    /// A list of integers, if the field is present.
    pub(super) fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.typed(key, |v| v.as_array()?.iter().map(Value::as_i64).collect())
    }

    /// A list of 0 and 1, if the field is present.
    pub(super) fn flags(&self, key: &str) -> Result<Option<Vec<bool>>> {
        let flag = |v: &Value| v.as_i64().filter(|n| [0, 1].contains(n)).map(|n| n == 1).or(v.as_bool());
        self.typed(key, |v| v.as_array()?.iter().map(flag).collect())
    }

    /// The fields of the object `part`; `tie_word_embeddings` may stand beside it.
    pub(super) fn part(&self, part: &str) -> Result<Self> {
        let Some(Value::Object(map)) = self.get(part) else {
            let found = self.get(part).map_or("no such field".to_owned(), Value::to_string);
            return Err(self.bad(format!("{part} cannot be used")).expected("an object").found(found).into());
        };
        let (mut map, tie) = (map.clone(), "tie_word_embeddings");
        if let Some(value) = self.get(tie) {
            map.entry(tie).or_insert_with(|| value.clone());
        }
        Ok(Self { path: self.path.clone(), map })
    }

    /// Adds fields that are absent; null stays. A θ is not added beside `rope_parameters`, which
    /// has its own.
    pub(super) fn set_defaults(&mut self, defaults: &[(&str, i64)]) {
        for (key, value) in defaults {
            if *key != "rope_theta" || self.get("rope_parameters").is_none() {
                self.map.entry(*key).or_insert_with(|| Value::from(*value));
            }
        }
    }

    pub(super) fn float_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.typed(key, Value::as_f64)?.unwrap_or(default))
    }

    pub(super) fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, Value::as_bool)?.unwrap_or(default))
    }

    pub(super) fn text_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(self.bad(format!("{key} cannot be used")).found(other.to_string()).into()),
        }
    }

    /// A list of strings, if the field is present.
    pub(super) fn words(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.typed(key, |v| v.as_array()?.iter().map(|w| w.as_str().map(str::to_owned)).collect())
    }

    /// The rotary settings.
    pub(super) fn rope(&self) -> Result<RopeSettings> {
        RopeSettings::read(&self.path, &Value::from(self.map.clone()), DEFAULT_POSITIONS as f64)
    }

    /// Path of the file, for errors.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn positive(value: &Value) -> Option<i64> {
    value.as_i64().filter(|n| *n > 0)
}

/// Fields that every family reads, or ignores as in transformers.
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

/// Fields beside the text model's in the config.json of a model with other parts.
pub(super) const BESIDE_TEXT: &[&str] =
    &["boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "text_config", "vision_config"];

/// Fields without effect on the loss of a causal language model: they concern training, storage,
/// generation or serving.
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

/// Fields that change the maths, with their neutral values; all other values but null are refused.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("attention_multiplier", &["1", "1.0"]),
    ("causal", &["true"]),
    ("full_attn_mod", &["1"]),
    ("interpolate_factor", &["1", "1.0"]),
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

/// Prefixes of words in field names that change the maths in some family of transformers, unless
/// the value is off.
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

/// Refuses fields that change the maths and are not implemented, but those `of_family`; returns
/// unknown fields with their values. An unknown field that is false, zero or empty is ignored.
///
/// # Errors
/// [`cpift_core::BadInput`] naming the first refused field.
pub(super) fn check_fields(fields: &Fields, of_family: &[&str]) -> Result<Vec<String>> {
    let mut unknown = Vec::new();
    for (key, value) in fields.present() {
        if READ.contains(&key) || of_family.contains(&key) || harmless(key) {
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
                .hint("if the field has no effect on the model's output, remove it from config.json")
                .into());
        }
    }
    Ok(unknown)
}

fn names_maths(key: &str) -> bool {
    let words = key.char_indices().filter(|(i, _)| *i == 0 || matches!(key.as_bytes()[i - 1], b'_' | b'.'));
    words.map(|(i, _)| &key[i..]).any(|rest| MATHS.iter().any(|part| rest.starts_with(part)))
}

/// Private fields, versions and special tokens have no effect either.
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

/// Fields of config.json that [`ExpertsConfig::read`] reads.
pub(super) const EXPERT_FIELDS: &[&str] = &[
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",
    "router_aux_loss_coef",
];

/// Default of `router_aux_loss_coef` in transformers.
const AUX_LOSS_COEF: f64 = 0.001;

/// The experts of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsConfig {
    /// x: experts per block.
    pub count: i64,
    /// k: experts that compute each token.
    pub per_token: i64,
    /// Width of an expert.
    pub width: i64,
    /// Divides the weights of a token's experts by their sum.
    pub normalised: bool,
    /// True for the blocks that have experts.
    pub in_block: Vec<bool>,
    /// Factor of the load-balancing loss in training; 0 if it is not added.
    pub aux_loss_coef: f64,
}

impl ExpertsConfig {
    /// Reads the fields [`EXPERT_FIELDS`]; none if no block has experts.
    pub(super) fn read(fields: &Fields) -> Result<Option<Self>> {
        let named = ["num_experts", "num_local_experts"].map(|key| fields.get(key).map(|_| key));
        if let [Some(_), Some(_)] = named
            && fields.get("num_experts") != fields.get("num_local_experts")
        {
            return Err(fields.bad("num_experts and num_local_experts disagree").into());
        }
        let count = fields.count_or(named.into_iter().flatten().next().unwrap_or("num_experts"), 128)?;
        let per_token = fields.int_or("num_experts_per_tok", 8)?;
        let step = fields.int_or("decoder_sparse_step", 1)?;
        let dense = fields.integers("mlp_only_layers")?.unwrap_or_default();
        let width = fields.int_or("moe_intermediate_size", 768)?;
        let layers = fields.int("num_hidden_layers")?;
        let in_block: Vec<bool> =
            (0..layers).map(|layer| count > 0 && !dense.contains(&layer) && (layer + 1) % step == 0).collect();
        let coef = fields.float_or("router_aux_loss_coef", AUX_LOSS_COEF)?;
        if !(coef.is_finite() && coef >= 0.0) {
            return Err(fields
                .bad("router_aux_loss_coef cannot be used")
                .expected("0 or more")
                .found(coef.to_string())
                .into());
        }
        if !in_block.contains(&true) {
            return Ok(None);
        }
        if per_token > count {
            return Err(fields
                .bad("num_experts_per_tok is more than the experts of a block")
                .expected(format!("1 to {count}, which is num_experts"))
                .found(per_token.to_string())
                .into());
        }
        let added = fields.bool_or("output_router_logits", false)?;
        Ok(Some(Self {
            count,
            per_token,
            width,
            normalised: fields.bool_or("norm_topk_prob", false)?,
            in_block,
            aux_loss_coef: if added { coef } else { 0.0 },
        }))
    }

    /// Number of parameters of the experts that do not compute a token.
    pub(crate) fn idle(&self, e: i64) -> i64 {
        let blocks = self.in_block.iter().filter(|has| **has).count() as i64;
        blocks * (self.count - self.per_token) * 3 * self.width * e
    }

    /// Returns true for the names of the matrices of routers and experts.
    pub(super) fn is_part(name: &str) -> bool {
        name.contains(".mlp.experts.") || name.ends_with(".mlp.gate.weight")
    }

    /// Name within a block and shape of every tensor of the router and the experts, given the
    /// embedding width.
    pub(super) fn shapes(&self, e: i64) -> impl Iterator<Item = (String, [i64; 2])> {
        let (f, count) = (self.width, self.count);
        let of_expert = move |x: i64| {
            [("gate_proj", [f, e]), ("up_proj", [f, e]), ("down_proj", [e, f])]
                .map(|(name, shape)| (format!("mlp.experts.{x}.{name}.weight"), shape))
        };
        std::iter::once(("mlp.gate.weight".to_owned(), [count, e])).chain((0..count).flat_map(of_expert))
    }
}
