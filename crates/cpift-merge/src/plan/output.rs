//! Destination of a merge: its dtype, configuration and side files, and the disk space it needs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::error::usage;
use cpift_core::format::checkpoint::{Layout, OtherFiles, with_head_of, with_torch_dtype, without_quantization};
use cpift_core::format::json;
use cpift_core::{BadInput, Dtype};
use serde_json::Value;

use super::inputs::{Source, own_dtypes};
use super::vocabulary::Vocabulary;
use crate::request::OutputRequest;

/// Destination of a merge, resolved.
pub(crate) struct Destination {
    /// Directory or file that is created.
    pub dir: PathBuf,
    /// Replace an existing output.
    pub force: bool,
    /// Dtype of most parameters.
    pub dtype: Dtype,
    /// Dtype of each parameter of the output, in bytewise name order.
    pub dtypes: Vec<Dtype>,
    /// Size of the largest shard in bytes.
    pub shard_size: u64,
    /// Names and metadata of the files of weights: those of the backbone.
    pub layout: Layout,
    /// Content of config.json; null if the output has none.
    pub config: Value,
    /// Directory from which tokenizer and other side files are copied, if there is one.
    pub side_files: Option<PathBuf>,
    /// Chat template in place of that of the side files.
    pub chat_template: Option<String>,
    /// Files of the tokenizer that are written instead of copied, by name.
    pub written: Vec<(String, String)>,
    /// Files of the backbone that are copied, and weights beside them that are not.
    pub others: OtherFiles,
}

impl Destination {
    /// Resolves `request`: the dtypes are those of `dtype_of` by default (with layers rearranged,
    /// `rearranged` has dtype and number of elements of each parameter), layout, configuration and
    /// other files those of `backbone`, and tokenizer and chat template those of `side_files` by
    /// default.
    ///
    /// # Errors
    /// [`BadInput`] if the dtypes of a tensor differ, or if one of `inputs` has a tokenizer and the
    /// output would have none.
    pub fn resolve(
        request: &OutputRequest,
        rearranged: Option<Vec<(Dtype, u64)>>,
        dtype_of: &[&Source],
        backbone: &Source,
        side_files: &Source,
        inputs: &[&Source],
    ) -> Result<Self> {
        let parameters = match (rearranged, request.dtype) {
            (Some(parameters), _) => parameters,
            (None, given) => {
                let own = if given.is_none() { own_dtypes(backbone, dtype_of)? } else { Vec::new() };
                let dtype = |i: usize| given.unwrap_or_else(|| own[i]);
                let views = backbone.checkpoint.parameters().enumerate();
                views.map(|(i, view)| (dtype(i), view.numel() as u64)).collect()
            }
        };
        let mut elements: BTreeMap<Dtype, u64> = BTreeMap::new();
        for (dtype, numel) in &parameters {
            *elements.entry(*dtype).or_default() += numel;
        }
        let dtypes: Vec<Dtype> = parameters.iter().map(|(dtype, _)| *dtype).collect();
        let most = elements.iter().max_by_key(|(_, n)| **n).map(|(dtype, _)| *dtype);
        let dtype = most.ok_or_else(|| usage("the inputs have no parameters to merge"))?;
        let layout = backbone.checkpoint.layout().clone();
        let mut side_files = request.side_files.clone().or_else(|| side_files.folder().map(Path::to_owned));
        let (mut config, mut others) = (Value::Null, OtherFiles::default());
        if layout.is_file {
            side_files = None;
        } else {
            config = with_head_of(backbone.checkpoint.tied(), without_quantization(backbone.config.clone()));
            if elements.len() == 1 && !config.is_null() && (request.dtype.is_some() || names_dtype(&config)) {
                config = with_torch_dtype(config, dtype);
            }
            let components = layout.components().map(str::to_owned).collect();
            others = match backbone.folder() {
                Some(folder) => OtherFiles::of(folder, &components)?,
                None => OtherFiles::default(),
            };
        }
        if let Some(folder) = &side_files {
            check_side_files(folder, backbone, inputs)?;
        }
        let (dir, force, shard_size) = (request.dir.clone(), request.force, request.shard_size);
        Ok(Self {
            dir,
            force,
            dtype,
            dtypes,
            shard_size,
            layout,
            config,
            side_files,
            chat_template: None,
            written: Vec::new(),
            others,
        })
    }

    /// Sets the number of tokens and the files of the tokenizer.
    pub fn set_vocabulary(&mut self, vocabulary: Vocabulary) {
        set_vocab_size(&mut self.config, vocabulary.rows);
        self.written = vocabulary.files;
    }

    /// Writes the chat template to `folder`, where the side files are, in place of any other.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn write_chat_template(&self, folder: &Path) -> Result<()> {
        let Some(template) = &self.chat_template else { return Ok(()) };
        let write = |name: &str, text: &str| {
            std::fs::write(folder.join(name), text).with_context(|| format!("writing {name} into {}", folder.display()))
        };
        write("chat_template.jinja", template)?;
        let path = folder.join("tokenizer_config.json");
        if path.is_file() {
            let mut config: Value = json::read(&path)?;
            if config.as_object_mut().is_some_and(|config| config.shift_remove("chat_template").is_some()) {
                write("tokenizer_config.json", &json::to_text(&config)?)?;
            }
        }
        let older = folder.join("chat_template.json");
        if older.is_file() {
            std::fs::remove_file(&older).with_context(|| format!("removing {}", older.display()))?;
        }
        Ok(())
    }
}

/// Sets every `vocab_size` of config.json.
fn set_vocab_size(config: &mut Value, rows: usize) {
    for (key, value) in config.as_object_mut().into_iter().flatten() {
        if key == "vocab_size" {
            *value = rows.into();
        } else if key == "text_config" {
            set_vocab_size(value, rows);
        }
    }
}

/// Returns true if config.json is that of a model of transformers, which says its dtype.
fn names_dtype(config: &Value) -> bool {
    ["torch_dtype", "dtype", "model_type", "architectures"].iter().any(|key| config.get(key).is_some())
}

/// The text of the chat template that most of `folders` have, of equally frequent ones the first.
pub(super) fn most_common_template<'a>(folders: impl Iterator<Item = &'a Path>) -> Option<String> {
    let mut found: Vec<(String, usize)> = Vec::new();
    for template in folders.filter_map(chat_template) {
        match found.iter_mut().find(|(text, _)| *text == template) {
            Some((_, count)) => *count += 1,
            None => found.push((template, 1)),
        }
    }
    let most = found.iter().map(|(_, count)| *count).max()?;
    found.into_iter().find(|(_, count)| *count == most).map(|(text, _)| text)
}

/// The chat template of a tokenizer; of several named ones the default.
fn chat_template(folder: &Path) -> Option<String> {
    if let Ok(text) = std::fs::read_to_string(folder.join("chat_template.jinja")) {
        return Some(text.trim().to_owned());
    }
    let in_file = |name: &str| -> Option<Value> {
        let value: Value = json::read(&folder.join(name)).ok()?;
        value.get("chat_template").cloned()
    };
    let value = in_file("chat_template.json").or_else(|| in_file("tokenizer_config.json"))?;
    let text = match &value {
        Value::String(text) => text.as_str(),
        Value::Array(list) => {
            let default = list.iter().find(|entry| entry["name"] == "default")?;
            default["template"].as_str()?
        }
        _ => return None,
    };
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Files of which every tokenizer has at least one.
const TOKENIZERS: [&str; 9] = [
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
];

fn has_chat_template(folder: &Path) -> bool {
    let in_config = || {
        let config: Option<Value> = json::read(&folder.join("tokenizer_config.json")).ok();
        config.is_some_and(|c| c.get("chat_template").is_some_and(|t| !t.is_null()))
    };
    folder.join("chat_template.jinja").is_file() || folder.join("chat_template.json").is_file() || in_config()
}

fn has_tokenizer(folder: &Path) -> bool {
    TOKENIZERS.iter().any(|name| folder.join(name).is_file())
}

fn check_side_files(folder: &Path, backbone: &Source, inputs: &[&Source]) -> Result<()> {
    if !folder.is_dir() {
        return Err(BadInput::new(folder, "no such directory").expected("the directory of a tokenizer").into());
    }
    let folders = || inputs.iter().filter_map(|source| source.folder());
    if !has_chat_template(folder)
        && let Some(other) = folders().find(|other| has_chat_template(other))
    {
        log::warn!(
            "{}: no chat template, so the output has none; --copy-from {} copies one",
            folder.display(),
            other.display()
        );
    }
    if has_tokenizer(folder) {
        return Ok(());
    }
    match folders().find(|other| has_tokenizer(other)) {
        Some(other) => Err(BadInput::new(folder, "the output would have no tokenizer")
            .expected(format!("one of {}", TOKENIZERS.join(", ")))
            .found(format!("none of them in this directory, but one in {}", other.display()))
            .hint(format!("--copy-from {} copies tokenizer, chat template and generation config", other.display()))
            .into()),
        // Models of images and sound have none.
        None if backbone.config.get("model_type").is_none() && backbone.config.get("architectures").is_none() => Ok(()),
        None => {
            log::warn!("none of the inputs has a tokenizer, so the output has none; --copy-from DIR names one");
            Ok(())
        }
    }
}

/// Refuses an output of `needed` bytes at `dir` if only `available` bytes are free.
///
/// # Errors
/// Names both numbers.
pub(crate) fn check_space(dir: &Path, needed: u64, available: u64) -> Result<()> {
    // config.json, tokenizer and record are small compared with the weights.
    const SIDE_FILES: u64 = 32 << 20;
    let needed = needed + SIDE_FILES.min(needed);
    if needed <= available {
        return Ok(());
    }
    anyhow::bail!(
        "{}: not enough room for the output\n  needed: {needed} bytes\n  available: {available} bytes",
        dir.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_for_too_little_room_has_both_numbers() {
        assert!(check_space(Path::new("out"), 1000, 2000).is_ok());
        let error = check_space(Path::new("out"), 1000, 1999).unwrap_err().to_string();
        assert!(error.contains("needed: 2000 bytes") && error.contains("available: 1999 bytes"), "{error}");
    }
}
