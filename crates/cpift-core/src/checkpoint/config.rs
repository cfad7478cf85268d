//! config.json as far as files are concerned: read it, and keep its dtype in agreement with the tensors.

use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::Dtype;
use crate::error::BadInput;
use crate::json;

/// Reads the config.json of a checkpoint folder.
///
/// # Errors
/// [`BadInput`] when it is missing or not a JSON object.
pub fn read_config(folder: &Path) -> Result<Value> {
    let path = folder.join("config.json");
    let config: Value = json::read(&path)?;
    if config.is_object() {
        return Ok(config);
    }
    Err(BadInput::new(path, "not a model's config").expected("a JSON object").into())
}

/// Whether the output embedding is the input embedding: `tie_word_embeddings`, or transformers' default for the model type
/// where it is not written.
pub fn tied(config: &Value) -> bool {
    let gemma = || config.get("model_type").and_then(Value::as_str).is_some_and(|t| t.starts_with("gemma"));
    config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or_else(gemma)
}

/// `config` with `torch_dtype` (or `dtype`, as newer transformers spell it) set to `dtype`.
pub fn with_torch_dtype(mut config: Value, dtype: Dtype) -> Value {
    if let (Some(object), Some(name)) = (config.as_object_mut(), dtype.torch_name()) {
        let key = if object.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        object.insert(key.into(), name.into());
    }
    config
}
