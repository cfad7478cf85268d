//! config.json of the models we know; what changes the maths and is not implemented is an error.

use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use serde_json::{Map, Value};

use super::rope::RopeScaling;

/// The architectures this program runs.
const KNOWN: &[&str] = &["LlamaForCausalLM"];

/// Fields that would change the maths, with the only values that do not. Absent or null is neutral too.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("hidden_act", &["\"silu\"", "\"swish\""]),
    ("attention_dropout", &["0", "0.0"]),
    ("partial_rotary_factor", &["1", "1.0"]),
    ("rope_interleaved", &["false"]),
    ("sliding_window", &[]),
    ("use_sliding_window", &["false"]),
    ("layer_types", &[]),
    ("no_rope_layers", &[]),
    ("quantization_config", &[]),
    ("attn_logit_softcapping", &[]),
    ("final_logit_softcapping", &[]),
    ("query_pre_attn_scalar", &[]),
    ("qk_norm", &["false"]),
    ("use_qk_norm", &["false"]),
    ("attention_multiplier", &["1", "1.0"]),
    ("embedding_multiplier", &["1", "1.0"]),
    ("residual_multiplier", &["1", "1.0"]),
    ("logits_scaling", &["1", "1.0"]),
    ("logit_scale", &["1", "1.0"]),
    ("num_local_experts", &["0", "1"]),
    ("parallel_attn", &["false"]),
];

/// The numbers that define a LLaMA.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// e: width of the residual stream.
    pub hidden_size: i64,
    /// Width of the MLP.
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
    /// The context the model was trained for.
    pub max_position_embeddings: i64,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Whether the output embedding is the input embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v and o.
    pub attention_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
}

impl ModelConfig {
    /// Reads the fields of a config.json already parsed from `folder`.
    ///
    /// # Errors
    /// [`BadInput`] for an architecture we do not know (with the list), a missing field, or a field that changes the
    /// maths and is not implemented.
    pub fn from_json(folder: &Path, config: &Value) -> Result<Self> {
        let fields = Fields { path: folder.join("config.json"), map: config.as_object().cloned().unwrap_or_default() };
        fields.check_architecture()?;
        fields.check_neutral()?;
        let heads = fields.int("num_attention_heads")?;
        let hidden = fields.int("hidden_size")?;
        let config = Self {
            hidden_size: hidden,
            intermediate_size: fields.int("intermediate_size")?,
            num_hidden_layers: fields.int("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: fields.int_or("num_key_value_heads", heads)?,
            head_dim: fields.int_or("head_dim", hidden / heads)?,
            vocab_size: fields.int("vocab_size")?,
            max_position_embeddings: fields.int_or("max_position_embeddings", 2048)?,
            rms_norm_eps: fields.float_or("rms_norm_eps", 1e-6)?,
            rope_theta: fields.rope_theta()?,
            rope_scaling: fields.rope_scaling()?,
            tie_word_embeddings: fields.bool_or("tie_word_embeddings", false)?,
            attention_bias: fields.bool_or("attention_bias", false)?,
            mlp_bias: fields.bool_or("mlp_bias", false)?,
        };
        if config.num_attention_heads % config.num_key_value_heads != 0 || config.head_dim % 2 != 0 {
            return Err(fields
                .bad("heads that do not divide")
                .expected("num_attention_heads a multiple of num_key_value_heads, head_dim even")
                .into());
        }
        Ok(config)
    }
}

struct Fields {
    path: std::path::PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    fn bad(&self, message: impl Into<String>) -> BadInput {
        BadInput::new(&self.path, message)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn check_architecture(&self) -> Result<()> {
        let found: Vec<&str> = self
            .get("architectures")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        if found.iter().any(|name| KNOWN.contains(name)) {
            return Ok(());
        }
        Err(self
            .bad("an architecture this program does not know")
            .expected(KNOWN.join(", "))
            .found(if found.is_empty() { "no architectures field".into() } else { found.join(", ") })
            .into())
    }

    fn check_neutral(&self) -> Result<()> {
        for (key, neutral) in NEUTRAL {
            if let Some(value) = self.get(key)
                && !neutral.contains(&value.to_string().as_str())
            {
                return Err(self
                    .bad(format!("{key} = {value} changes the maths in a way that is not implemented"))
                    .expected(if neutral.is_empty() { "no such field".into() } else { neutral.join(" or ") })
                    .into());
            }
        }
        Ok(())
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

    fn int(&self, key: &str) -> Result<i64> {
        self.typed(key, |v| v.as_i64().filter(|n| *n > 0))?
            .ok_or_else(|| self.bad(format!("the field {key} is missing")).into())
    }

    fn int_or(&self, key: &str, default: i64) -> Result<i64> {
        Ok(self.typed(key, |v| v.as_i64().filter(|n| *n > 0))?.unwrap_or(default))
    }

    fn float_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.typed(key, Value::as_f64)?.unwrap_or(default))
    }

    fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, Value::as_bool)?.unwrap_or(default))
    }

    /// `rope_scaling`, or the `rope_parameters` of newer transformers.
    fn rope(&self) -> Option<&Value> {
        self.get("rope_scaling").or_else(|| self.get("rope_parameters"))
    }

    /// `rope_theta` inside the rope's own fields, or at the top.
    fn rope_theta(&self) -> Result<f64> {
        let nested = self.rope().and_then(|r| r.get("rope_theta")).and_then(Value::as_f64);
        Ok(nested.unwrap_or(self.float_or("rope_theta", 10_000.0)?))
    }

    fn rope_scaling(&self) -> Result<RopeScaling> {
        let Some(value) = self.rope() else {
            return Ok(RopeScaling::Default);
        };
        let max_positions = self.int_or("max_position_embeddings", 2048)? as f64;
        let original = self.typed("original_max_position_embeddings", Value::as_f64)?;
        RopeScaling::from_json(value, max_positions, original)
            .map_err(|message| self.bad(message).found(value.to_string()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
               "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100})
    }

    #[test]
    fn absent_fields_take_the_defaults_of_transformers() {
        let c = ModelConfig::from_json(Path::new("m"), &config()).unwrap();
        assert_eq!((c.num_key_value_heads, c.head_dim, c.rope_theta), (4, 16, 10_000.0));
        assert!(!c.tie_word_embeddings);
    }

    #[test]
    fn what_changes_the_maths_is_refused_by_name() {
        for (key, value) in [
            ("hidden_act", json!("gelu")),
            ("sliding_window", json!(4096)),
            ("final_logit_softcapping", json!(30.0)),
            ("quantization_config", json!({"bits": 4})),
            ("rope_scaling", json!({"rope_type": "longrope"})),
            ("architectures", json!(["MambaForCausalLM"])),
        ] {
            let mut c = config();
            c[key] = value;
            let error = ModelConfig::from_json(Path::new("m"), &c).unwrap_err().to_string();
            let part = if key == "architectures" { "LlamaForCausalLM" } else { key.split('_').next().unwrap() };
            assert!(error.contains(part), "{key}: {error}");
        }
    }
}
