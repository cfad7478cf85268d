//! Destination of a merge: its dtype, configuration and side files, and the disk space it needs.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::format::checkpoint::{with_head_of, with_torch_dtype};
use cpift_core::format::json;
use cpift_core::{BadInput, Dtype};
use serde_json::Value;

use super::inputs::{Source, common_dtype};
use crate::request::OutputRequest;

/// Destination of a merge, resolved.
pub(crate) struct Destination {
    /// Directory that is created.
    pub dir: PathBuf,
    /// Replace an existing output.
    pub force: bool,
    /// Dtype of all parameters.
    pub dtype: Dtype,
    /// Size of the largest shard in bytes.
    pub shard_size: u64,
    /// Content of config.json.
    pub config: Value,
    /// Directory from which tokenizer and other side files are copied.
    pub side_files: PathBuf,
}

impl Destination {
    /// Resolves `request`: the dtype is that of `dtype_of` by default, the configuration that of
    /// `backbone`, and the side files those of `side_files` by default.
    ///
    /// # Errors
    /// [`BadInput`] if the dtypes differ, or if one of `inputs` has a tokenizer and the output
    /// would have none.
    pub fn resolve(
        request: &OutputRequest,
        dtype_of: &[&Source],
        backbone: &Source,
        side_files: &Source,
        inputs: &[&Source],
    ) -> Result<Self> {
        let dtype = match request.dtype {
            Some(dtype) => dtype,
            None => common_dtype(dtype_of.iter().copied())?,
        };
        let side_files = request.side_files.clone().unwrap_or_else(|| side_files.path().to_owned());
        check_side_files(&side_files, inputs)?;
        Ok(Self {
            dir: request.dir.clone(),
            force: request.force,
            dtype,
            shard_size: request.shard_size,
            config: with_torch_dtype(with_head_of(backbone.checkpoint.tied(), backbone.config.clone()), dtype),
            side_files,
        })
    }
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

fn check_side_files(folder: &Path, inputs: &[&Source]) -> Result<()> {
    if !folder.is_dir() {
        return Err(BadInput::new(folder, "no such directory").expected("the directory of a tokenizer").into());
    }
    if !has_chat_template(folder)
        && let Some(other) = inputs.iter().find(|source| has_chat_template(source.path()))
    {
        log::warn!(
            "{}: no chat template, so the output has none; --copy-from {} copies one",
            folder.display(),
            other.path().display()
        );
    }
    if has_tokenizer(folder) {
        return Ok(());
    }
    match inputs.iter().find(|source| has_tokenizer(source.path())) {
        Some(other) => Err(BadInput::new(folder, "the output would have no tokenizer")
            .expected(format!("one of {}", TOKENIZERS.join(", ")))
            .found(format!("none of them in this directory, but one in {}", other.path().display()))
            .hint(format!(
                "--copy-from {} copies tokenizer, chat template and generation config",
                other.path().display()
            ))
            .into()),
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
