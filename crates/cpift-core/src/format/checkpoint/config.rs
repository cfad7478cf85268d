//! config.json as far as files are concerned: read it, and keep its dtype in agreement with the tensors.

use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::found;
use crate::error::BadInput;
use crate::format::dtype::Dtype;
use crate::format::json;

/// Reads the config.json of a checkpoint folder.
///
/// # Errors
/// [`BadInput`] when it is missing or not a JSON object.
pub fn read_config(folder: &Path) -> Result<Value> {
    let path = folder.join("config.json");
    if !path.exists()
        && let Some(adapter) = found::adapter(folder)
    {
        return Err(adapter.into());
    }
    let config: Value = json::read(&path)?;
    if config.is_object() {
        return Ok(config);
    }
    Err(BadInput::new(path, "not a model's config").expected("a JSON object").into())
}

/// Whether config.json says that the output embedding is the input embedding: `tie_word_embeddings`, which Gemma leaves out.
pub(super) fn tied(config: &Value) -> Option<bool> {
    let gemma = || config.get("model_type").and_then(Value::as_str).is_some_and(|t| t.starts_with("gemma"));
    config.get("tie_word_embeddings").and_then(Value::as_bool).or_else(|| gemma().then_some(true))
}

/// Returns `config` with `tie_word_embeddings` set to false where it ties embeddings that are not `tied` in the checkpoint,
/// so that whoever loads the output keeps both.
pub fn with_head_of(tied_in_file: bool, mut config: Value) -> Value {
    if !tied_in_file
        && tied(&config) == Some(true)
        && let Some(object) = config.as_object_mut()
    {
        object.insert("tie_word_embeddings".into(), false.into());
    }
    config
}

/// `config` with every `torch_dtype` and `dtype` (as newer transformers spell it) set to `dtype`, those of nested configs such
/// as `text_config` too; `torch_dtype` is added where there is neither.
pub fn with_torch_dtype(mut config: Value, dtype: Dtype) -> Value {
    if let Some(name) = dtype.torch_name()
        && !set_dtype(&mut config, name)
        && let Some(object) = config.as_object_mut()
    {
        object.insert("torch_dtype".into(), name.into());
    }
    config
}

/// Sets what is there; whether there was anything at this level.
fn set_dtype(config: &mut Value, name: &str) -> bool {
    let mut found = false;
    for (key, value) in config.as_object_mut().into_iter().flatten() {
        if key == "torch_dtype" || key == "dtype" {
            *value = name.into();
            found = true;
        } else if key.ends_with("_config") {
            set_dtype(value, name);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_dtype_of_a_config_is_set() {
        let config = json!({"dtype": "bfloat16", "torch_dtype": "bfloat16", "text_config": {"torch_dtype": "float16"}});
        let expected = json!({"dtype": "float32", "torch_dtype": "float32", "text_config": {"torch_dtype": "float32"}});
        assert_eq!(with_torch_dtype(config, Dtype::F32), expected);
        assert_eq!(with_torch_dtype(json!({"a": 1}), Dtype::BF16), json!({"a": 1, "torch_dtype": "bfloat16"}));
    }
}
