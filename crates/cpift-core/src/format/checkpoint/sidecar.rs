//! The files beside the weights of a checkpoint directory: config.json, tokenizer, chat template
//! and generation config.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::diagnose;
use crate::error::BadInput;
use crate::format::dtype::Dtype;
use crate::format::json;

/// Files that are part of a checkpoint and are copied with it, in bytewise order.
pub(crate) const SIDECAR_FILES: [&str; 19] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// Copies the side files that exist in `from` to the directory `to`, except config.json, which the
/// caller writes.
pub fn copy_sidecars(from: &Path, to: &Path) -> Result<()> {
    for name in SIDECAR_FILES.into_iter().filter(|n| *n != "config.json") {
        let source = from.join(name);
        if source.is_file() {
            // Not fs::copy, which would copy the mode too: outputs get the mode of the umask.
            let bytes = fs::read(&source).with_context(|| format!("reading {}", source.display()))?;
            fs::write(to.join(name), bytes).with_context(|| format!("writing {name} into {}", to.display()))?;
        }
    }
    Ok(())
}

/// Reads the config.json of a checkpoint directory.
///
/// # Errors
/// [`BadInput`] if it is missing or not a JSON object.
pub fn read_config(folder: &Path) -> Result<Value> {
    let path = folder.join("config.json");
    if !path.exists()
        && let Some(adapter) = diagnose::adapter(folder)
    {
        return Err(adapter.into());
    }
    let config: Value = json::read(&path)?;
    if config.is_object() {
        return Ok(config);
    }
    Err(BadInput::new(path, "not a model's config").expected("a JSON object").into())
}

/// Returns `tie_word_embeddings` of config.json, if given. Gemma configs omit it and are tied.
pub(super) fn tied(config: &Value) -> Option<bool> {
    let gemma = || config.get("model_type").and_then(Value::as_str).is_some_and(|t| t.starts_with("gemma"));
    config.get("tie_word_embeddings").and_then(Value::as_bool).or_else(|| gemma().then_some(true))
}

/// Returns `config` with `tie_word_embeddings` set to false if it ties embeddings that differ in
/// the checkpoint, so that loading the output keeps both.
pub fn with_head_of(tied_in_file: bool, mut config: Value) -> Value {
    if !tied_in_file
        && tied(&config) == Some(true)
        && let Some(object) = config.as_object_mut()
    {
        object.insert("tie_word_embeddings".into(), false.into());
    }
    config
}

/// Returns `config` with every `torch_dtype` and `dtype` (the newer spelling) set to `dtype`, also
/// in nested configs such as `text_config`. If there is neither, `torch_dtype` is added.
pub fn with_torch_dtype(mut config: Value, dtype: Dtype) -> Value {
    if let Some(name) = dtype.torch_name()
        && !set_dtype(&mut config, name)
        && let Some(object) = config.as_object_mut()
    {
        object.insert("torch_dtype".into(), name.into());
    }
    config
}

/// Sets the existing dtype fields. Returns true if there was one at this level.
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
    fn all_dtype_fields_of_a_config_are_set() {
        let config = json!({"dtype": "bfloat16", "torch_dtype": "bfloat16", "text_config": {"torch_dtype": "float16"}});
        let expected = json!({"dtype": "float32", "torch_dtype": "float32", "text_config": {"torch_dtype": "float32"}});
        assert_eq!(with_torch_dtype(config, Dtype::F32), expected);
        assert_eq!(with_torch_dtype(json!({"a": 1}), Dtype::BF16), json!({"a": 1, "torch_dtype": "bfloat16"}));
    }
}
