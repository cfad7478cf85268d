//! The model configuration: config.json of the supported families. A field that changes the maths
//! and is not implemented is an error.

use std::path::Path;

use anyhow::Result;
use cpift_core::format::rope::RopeParameters;
use cpift_core::{BadInput, Checkpoint, log_once};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::config_fields::{Fields, check_fields};
use crate::weights::Parameters;

/// Name of the embedding table.
pub const EMBEDDING: &str = "model.embed_tokens.weight";

/// Supported model families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`: LLaMA 1 to 3, SmolLM2 and others.
    Llama,
    /// `MistralForCausalLM`: Mistral 7B, Ministral 8B.
    Mistral,
    /// `MinistralForCausalLM`: Mistral with `layer_types`.
    Ministral,
    /// `Qwen2ForCausalLM`: Qwen1.5, Qwen2, Qwen2.5.
    Qwen2,
    /// `Qwen3ForCausalLM`.
    Qwen3,
    /// `Gemma2ForCausalLM`.
    Gemma2,
}

/// Architecture names of config.json.
const ARCHITECTURES: [(&str, Family); 6] = [
    ("LlamaForCausalLM", Family::Llama),
    ("MistralForCausalLM", Family::Mistral),
    ("MinistralForCausalLM", Family::Ministral),
    ("Qwen2ForCausalLM", Family::Qwen2),
    ("Qwen3ForCausalLM", Family::Qwen3),
    ("Gemma2ForCausalLM", Family::Gemma2),
];

/// Activation function of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x·sigmoid(x).
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// GELU, exact.
    Gelu,
}

/// A model configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Model family.
    pub family: Family,
    /// e: width of the residual stream.
    pub hidden_size: i64,
    /// f: width of the MLP.
    pub intermediate_size: i64,
    /// Number of decoder blocks.
    pub num_hidden_layers: i64,
    /// h: query heads.
    pub num_attention_heads: i64,
    /// k: key and value heads (GQA).
    pub num_key_value_heads: i64,
    /// d: width of a head.
    pub head_dim: i64,
    /// v: rows of the embedding.
    pub vocab_size: i64,
    /// Context length in tokens.
    pub max_position_embeddings: i64,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Rotary settings of each block.
    pub ropes: Vec<RopeParameters>,
    /// True if the output matrix is the embedding table.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on o.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMS norms over each head of q and k (Qwen3).
    pub qk_norm: bool,
    /// Activation function of the MLP.
    pub activation: Activation,
    /// Gemma's norms: scale by 1 + w, before and after both attention and MLP.
    pub gemma_norms: bool,
    /// Factor of the embedded tokens (Gemma: √e).
    pub embedding_scale: Option<f64>,
    /// Factor of q·k.
    pub attention_scale: f64,
    /// Soft cap of attention scores: cap·tanh(x / cap).
    pub attention_softcap: Option<f64>,
    /// Soft cap of logits.
    pub logit_softcap: Option<f64>,
    /// Sliding window of each block: number of tokens a query attends to, itself included; none is
    /// full causal attention.
    pub windows: Vec<Option<i64>>,
    /// Unknown fields of config.json, with their values.
    pub unknown_fields: Vec<String>,
}

impl ModelConfig {
    /// Reads the parsed config.json of `folder`.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for an unknown architecture, a missing field, or a field that
    /// changes the maths and is not implemented.
    pub fn from_json(folder: &Path, config: &Value) -> Result<Self> {
        let fields = Fields::new(folder, config);
        let family = family(&fields)?;
        let unknown_fields = check_fields(&fields)?;
        let heads = fields.int("num_attention_heads")?;
        let hidden = fields.int("hidden_size")?;
        let gemma = family == Family::Gemma2;
        let head_dim = match family {
            Family::Gemma2 => fields.int_or("head_dim", 256)?,
            Family::Qwen3 => fields.int_or("head_dim", 128)?,
            _ => fields.int_or("head_dim", hidden / heads)?,
        };
        let (qkv_bias, o_bias) = attention_biases(family, &fields)?;
        let max_position_embeddings = fields.int_or("max_position_embeddings", default_positions(family))?;
        let scale = if gemma { fields.float_or("query_pre_attn_scalar", 256.0)? } else { head_dim as f64 };
        let softcap = |key, default| {
            if gemma { fields.optional_float(key, default) } else { refuse(&fields, key).map(|()| None) }
        };
        let windows = windows(family, &fields)?;
        let config = Self {
            family,
            hidden_size: hidden,
            intermediate_size: fields.int("intermediate_size")?,
            num_hidden_layers: fields.int("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: fields.int_or("num_key_value_heads", heads)?,
            head_dim,
            vocab_size: fields.int("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: fields.float_or("rms_norm_eps", 1e-6)?,
            ropes: ropes(family, &fields, &windows)?,
            tie_word_embeddings: fields.bool_or("tie_word_embeddings", gemma)?,
            qkv_bias,
            o_bias,
            mlp_bias: family == Family::Llama && fields.bool_or("mlp_bias", false)?,
            qk_norm: family == Family::Qwen3,
            activation: activation(family, &fields)?,
            gemma_norms: gemma,
            embedding_scale: gemma.then(|| (hidden as f64).sqrt()),
            attention_scale: scale.powf(-0.5),
            attention_softcap: softcap("attn_logit_softcapping", 50.0)?,
            logit_softcap: softcap("final_logit_softcapping", 30.0)?,
            windows,
            unknown_fields,
        };
        if !gemma {
            refuse(&fields, "query_pre_attn_scalar")?;
        }
        config.check_shapes(&fields)?;
        Ok(config)
    }

    /// Unties the output matrix if `checkpoint`, whose config this is, has one of its own although
    /// config.json ties it.
    pub fn untie_as(&mut self, checkpoint: &Checkpoint) {
        self.tie_word_embeddings &= checkpoint.tied();
    }

    /// Warns once of each unknown field; with `strict`, refuses them.
    ///
    /// # Errors
    /// [`BadInput`] naming all unknown fields, with `strict`.
    pub fn check_unknown_fields(&self, folder: &Path, strict: bool) -> Result<()> {
        let path = if folder.is_file() { folder.to_owned() } else { folder.join("config.json") };
        if strict && !self.unknown_fields.is_empty() {
            return Err(BadInput::new(path, "fields that this program does not know, which --strict-config refuses")
                .found(self.unknown_fields.join(", "))
                .hint("where a field has no effect on the output of the model, remove it from config.json or leave out --strict-config")
                .into());
        }
        for field in &self.unknown_fields {
            log_once::warn(format!(
                "{}: {field} is not a field that this program knows, and is ignored; --strict-config refuses such fields",
                path.display()
            ));
        }
        Ok(())
    }

    fn check_shapes(&self, fields: &Fields) -> Result<()> {
        if self.num_attention_heads % self.num_key_value_heads == 0 && self.head_dim % 2 == 0 {
            return Ok(());
        }
        Err(fields
            .bad("heads that do not divide")
            .expected("num_attention_heads a multiple of num_key_value_heads, head_dim even")
            .into())
    }
}

fn family(fields: &Fields) -> Result<Family> {
    let found = fields.words("architectures")?.unwrap_or_default();
    let known = ARCHITECTURES.iter().find(|(name, _)| found.iter().any(|f| f == name));
    known.map(|(_, family)| *family).ok_or_else(|| {
        let names: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        fields
            .bad("an architecture this program does not know")
            .expected(names.join(", "))
            .found(if found.is_empty() { "no architectures field".into() } else { found.join(", ") })
            .into()
    })
}

/// Refuses a field that only other families read.
fn refuse(fields: &Fields, key: &str) -> Result<()> {
    match fields.get(key) {
        None => Ok(()),
        Some(value) => Err(fields
            .bad(format!("{key} = {value} changes the maths in a way that this architecture does not have"))
            .expected("no such field")
            .into()),
    }
}

/// Returns true for biases on q, k and v, and on o. LLaMA's `attention_bias` covers all four;
/// Mistral has none; Qwen2 always has the first three.
fn attention_biases(family: Family, fields: &Fields) -> Result<(bool, bool)> {
    match family {
        Family::Llama | Family::Qwen3 | Family::Gemma2 => {
            let asked = fields.bool_or("attention_bias", false)?;
            Ok((asked, asked))
        }
        Family::Mistral | Family::Ministral => Ok((false, false)),
        Family::Qwen2 => Ok((true, false)),
    }
}

/// Default of transformers for `max_position_embeddings`.
fn default_positions(family: Family) -> i64 {
    match family {
        Family::Llama => 2048,
        Family::Mistral | Family::Ministral => 4096 * 32,
        Family::Qwen2 | Family::Qwen3 => 32768,
        Family::Gemma2 => 8192,
    }
}

/// Activation function. Gemma-2 reads `hidden_activation` and ignores `hidden_act`, as in
/// transformers.
fn activation(family: Family, fields: &Fields) -> Result<Activation> {
    let (key, default) =
        if family == Family::Gemma2 { ("hidden_activation", "gelu_pytorch_tanh") } else { ("hidden_act", "silu") };
    match fields.text_or(key, default)? {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::Gelu),
        other => Err(fields
            .bad(format!("{key} = {other:?} is not implemented"))
            .expected("silu, gelu or gelu_pytorch_tanh")
            .into()),
    }
}

/// Sliding window of each block, by `layer_types` if given, else by the family's rule.
fn windows(family: Family, fields: &Fields) -> Result<Vec<Option<i64>>> {
    let layers = fields.int("num_hidden_layers")? as usize;
    let window = match family {
        Family::Llama => {
            refuse(fields, "sliding_window")?;
            None
        }
        Family::Qwen2 | Family::Qwen3 if !fields.bool_or("use_sliding_window", false)? => None,
        _ => fields.optional_int("sliding_window", 4096)?,
    };
    let first_windowed = fields.count_or("max_window_layers", 28)? as usize;
    let by_family = |layer: usize| match family {
        Family::Llama | Family::Mistral | Family::Ministral => true,
        Family::Qwen2 | Family::Qwen3 => layer >= first_windowed,
        Family::Gemma2 => layer.is_multiple_of(2),
    };
    // Mistral has no layer_types: its window applies to every block.
    let named = if family == Family::Mistral { None } else { fields.words("layer_types")? };
    let Some(types) = named else {
        return Ok((0..layers).map(|layer| window.filter(|_| by_family(layer))).collect());
    };
    if types.len() != layers {
        let found = format!("{} entries", types.len());
        return Err(fields.bad("layer_types does not fit").expected(format!("{layers} entries")).found(found).into());
    }
    types
        .iter()
        .map(|kind| match kind.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" if window.is_some() => Ok(window),
            "sliding_attention" => {
                Err(fields.bad("layer_types names sliding_attention, but there is no sliding_window").into())
            }
            other => Err(fields
                .bad(format!("layer_types names {other:?}"))
                .expected("full_attention or sliding_attention")
                .into()),
        })
        .collect()
}

/// Rotary settings of each block, by its layer type if config.json has settings by layer type.
fn ropes(family: Family, fields: &Fields, windows: &[Option<i64>]) -> Result<Vec<RopeParameters>> {
    let settings = fields.rope(default_positions(family))?;
    for note in &settings.notes {
        log_once::warn(format!("{}: {note}", fields.path().display()));
    }
    let of_block = |(layer, window): (usize, &Option<i64>)| {
        let layer_type = if window.is_some() { "sliding_attention" } else { "full_attention" };
        settings.of(layer_type).cloned().ok_or_else(|| {
            let message =
                format!("the rotary settings by layer type have none for {layer_type}, which layer {layer} is");
            fields.bad(message).expected(format!("an entry {layer_type} in rope_parameters")).into()
        })
    };
    windows.iter().enumerate().map(of_block).collect()
}

impl ModelConfig {
    /// Name and shape of every parameter, in forward order.
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

    /// Random parameters, for benchmarks: normal with standard deviation 0.02; norm weights 1.
    pub fn random_parameters(&self, kind: Kind, device: Device) -> Parameters {
        let make = |(name, shape): (String, Vec<i64>)| {
            let tensor = if name.ends_with("norm.weight") && !self.gemma_norms {
                Tensor::ones(&shape, (kind, device))
            } else {
                Tensor::randn(&shape, (kind, device)).g_mul_scalar_(0.02)
            };
            (name, tensor.set_requires_grad(true))
        };
        self.parameter_shapes().into_iter().map(make).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpift_core::format::rope::RopeScaling;
    use serde_json::json;

    fn config() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
               "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100})
    }

    fn read(architecture: &str, more: &Value) -> Result<ModelConfig> {
        let mut c = config();
        c["architectures"] = json!([architecture]);
        for (key, value) in more.as_object().unwrap() {
            c[key] = value.clone();
        }
        ModelConfig::from_json(Path::new("m"), &c)
    }

    #[test]
    fn absent_fields_take_the_defaults_of_transformers() {
        let c = ModelConfig::from_json(Path::new("m"), &config()).unwrap();
        assert_eq!((c.num_key_value_heads, c.head_dim, c.ropes[1].theta), (4, 16, 10_000.0));
        assert!(!c.tie_word_embeddings);
        let gemma = read("Gemma2ForCausalLM", &json!({"num_hidden_layers": 3})).unwrap();
        assert_eq!((gemma.head_dim, gemma.attention_scale, gemma.tie_word_embeddings), (256, 1.0 / 16.0, true));
        assert_eq!(gemma.windows, [Some(4096), None, Some(4096)]);
        assert_eq!((gemma.attention_softcap, gemma.logit_softcap), (Some(50.0), Some(30.0)));
        assert_eq!(read("Qwen3ForCausalLM", &json!({})).unwrap().head_dim, 128);
        assert_eq!(read("MistralForCausalLM", &json!({})).unwrap().windows, [Some(4096); 2]);
        assert_eq!(read("MistralForCausalLM", &json!({"sliding_window": null})).unwrap().windows, [None; 2]);
    }

    #[test]
    fn windows_are_where_the_family_has_them() {
        let published = json!({"sliding_window": 32768, "max_window_layers": 1, "use_sliding_window": false});
        assert_eq!(read("Qwen2ForCausalLM", &published).unwrap().windows, [None, None]);
        let used = json!({"sliding_window": 8, "max_window_layers": 1, "use_sliding_window": true});
        assert_eq!(read("Qwen2ForCausalLM", &used).unwrap().windows, [None, Some(8)]);
        let named = json!({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]});
        assert_eq!(read("Gemma2ForCausalLM", &named).unwrap().windows, [None, Some(8)]);
        let short = json!({"sliding_window": 8, "layer_types": ["full_attention"]});
        assert!(read("Gemma2ForCausalLM", &short).unwrap_err().to_string().contains("layer_types"));
        let strange = json!({"sliding_window": 8, "layer_types": ["full_attention", "chunked_attention"]});
        assert!(read("Gemma2ForCausalLM", &strange).unwrap_err().to_string().contains("chunked_attention"));
    }

    #[test]
    fn what_changes_the_maths_is_refused_by_name() {
        for (key, value) in [
            ("hidden_act", json!("relu2")),
            ("sliding_window", json!(4096)),
            ("final_logit_softcapping", json!(30.0)),
            ("query_pre_attn_scalar", json!(224)),
            ("quantization_config", json!({"bits": 4})),
            ("attention_dropout", json!(0.1)),
            ("rope_scaling", json!({"rope_type": "longrope"})),
            ("some_new_multiplier", json!(0.5)),
            ("logits_cap", json!(30.0)),
            ("clip_qkv", json!(8.0)),
            ("use_qk_norm", json!(true)),
            ("num_experts", json!(8)),
            ("no_rope_layers", json!([1, 0])),
            ("rotary_emb_base", json!(1e6)),
            ("rope_local_base_freq", json!(1e4)),
            ("partial_rotary_factor", json!(0.5)),
            ("attention_sinks", json!(4)),
            ("is_causal", json!(false)),
            ("use_bidirectional_attention", json!(true)),
            ("use_rope", json!(false)),
            ("embd_pdrop", json!(0.1)),
            ("quantization", json!({"bits": 4})),
            ("per_layer_config", json!({"0": {"head_dim": 8}})),
            ("vision_config", json!({"hidden_size": 8})),
            ("architectures", json!(["MambaForCausalLM"])),
        ] {
            let mut c = config();
            c[key] = value;
            let error = ModelConfig::from_json(Path::new("m"), &c).unwrap_err().to_string();
            let part = match key {
                "architectures" => "Gemma2ForCausalLM",
                "rope_scaling" => "rope scaling",
                other => other,
            };
            assert!(error.contains(part), "{key}: {error}");
        }
    }

    #[test]
    fn layer_types_have_rotary_settings_of_their_own() {
        let nested = json!({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}});
        let ropes = read("Gemma2ForCausalLM", &nested).unwrap().ropes;
        assert_eq!((ropes[0].theta, &ropes[0].scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
        assert_eq!((ropes[1].theta, &ropes[1].scaling), (1e4, &RopeScaling::Default));
        let mut half = nested;
        half["rope_parameters"].as_object_mut().unwrap().remove("sliding_attention");
        let error = read("Gemma2ForCausalLM", &half).unwrap_err().to_string();
        assert!(error.contains("none for sliding_attention, which layer 1 is"), "{error}");
    }

    #[test]
    fn fields_of_published_configs_are_passed_over() {
        for field in [
            json!({"is_llama_config": true, "rope_interleaved": false}),
            json!({"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
            json!({"unsloth_fixed": true, "unsloth_version": "2026.4.5"}),
            json!({"max_sequence_length": 2048, "pad_token_id": -1}),
            json!({"activation": "swiglu", "hidden_act": "silu"}),
            json!({"neftune_noise_alpha": 5, "gradient_checkpointing": true}),
            json!({"is_causal": true, "attention_probs_dropout_prob": 0.0, "num_experts": 0, "vision_config": null}),
        ] {
            let config = read("LlamaForCausalLM", &field).unwrap_or_else(|e| panic!("{field}: {e}"));
            assert_eq!(config.unknown_fields, [""; 0], "{field}");
        }
    }

    #[test]
    fn unknown_fields_are_refused_only_where_that_is_asked_for() {
        let config = read("LlamaForCausalLM", &json!({"our_lab_note": "v2", "another": 3, "off": false})).unwrap();
        assert_eq!(config.unknown_fields, ["our_lab_note = \"v2\"", "another = 3"]);
        assert!(config.check_unknown_fields(Path::new("m"), false).is_ok());
        let error = config.check_unknown_fields(Path::new("m"), true).unwrap_err().to_string();
        assert!(error.contains("m/config.json") && error.contains("our_lab_note = \"v2\""), "{error}");
        assert!(read("LlamaForCausalLM", &json!({})).unwrap().check_unknown_fields(Path::new("m"), true).is_ok());
    }

    #[test]
    fn what_cannot_matter_is_passed_over() {
        let more = json!({"_name_or_path": "x", "transformers_version": "5", "bos_token_id": 1, "use_cache": true,
            "pretraining_tp": 1, "some_new_switch": false, "attention_dropout": 0.0, "torch_dtype": "bfloat16"});
        assert!(read("LlamaForCausalLM", &more).is_ok());
    }
}
