//! The files beside the weights of a checkpoint directory: config.json, tokenizer, chat template
//! and generation config.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::diagnose;
use crate::error::BadInput;
use crate::files::{RECORD_NAME, list};
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

/// Files beside the weights of a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OtherFiles {
    /// Files that belong to the checkpoint, by their path below it, in bytewise order.
    pub files: Vec<String>,
    /// Weights in other formats, and directories with other checkpoints.
    pub weights: Vec<String>,
}

impl OtherFiles {
    /// Lists the files of `folder` and its subdirectories, without hidden ones and without records
    /// of these programs. Weights of the `components` belong to the checkpoint and are not listed.
    ///
    /// # Errors
    /// [`crate::BadInput`] for a directory that cannot be read.
    pub fn of(folder: &Path, components: &BTreeSet<String>) -> Result<Self> {
        let mut found = Self::default();
        found.add(folder, "", components)?;
        found.files.sort();
        found.weights.sort();
        Ok(found)
    }

    fn add(&mut self, folder: &Path, below: &str, components: &BTreeSet<String>) -> Result<()> {
        for entry in list(folder)? {
            // A name that is not UTF-8 belongs to no checkpoint of a hub.
            let Ok(name) = entry.file_name().into_string() else { continue };
            let (path, place) = (entry.path(), format!("{below}{name}"));
            if name.starts_with('.') || is_record(&name) {
                continue;
            }
            if path.is_dir() {
                let part = components.iter().any(|c| *c == place || c.starts_with(&format!("{place}/")));
                if !part && diagnose::has_weights(&path) {
                    self.weights.push(format!("{place}/"));
                } else {
                    self.add(&path, &format!("{place}/"), components)?;
                }
            } else if diagnose::is_weights(&name) {
                let own = name.ends_with(".safetensors") || name.contains(".safetensors.index.");
                if !own {
                    self.weights.push(place);
                }
            } else if path.is_file() {
                self.files.push(place);
            }
        }
        Ok(())
    }

    /// Copies the files for which `wanted` is true from `from` to `to`, where existing files stay.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn copy(&self, from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
        for name in self.files.iter().filter(|name| wanted(name)) {
            let (source, target) = (from.join(name), to.join(name));
            if target.exists() {
                continue;
            }
            if let Some(folder) = target.parent() {
                fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
            }
            // Not fs::copy, which would copy the mode too: outputs get the mode of the umask.
            let copied = fs::File::open(&source).and_then(|mut from| {
                fs::File::create_new(&target).and_then(|mut to| std::io::copy(&mut from, &mut to))
            });
            copied.with_context(|| format!("copying {} to {}", source.display(), target.display()))?;
        }
        Ok(())
    }
}

/// Returns true for files that these programs write beside the weights to describe one run.
fn is_record(name: &str) -> bool {
    name == RECORD_NAME || name.ends_with(".cpift.json") || name == "metrics.jsonl"
}

/// Returns true for a file that is copied together with the tokenizer.
pub fn is_sidecar(name: &str) -> bool {
    SIDECAR_FILES.contains(&name)
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
