//! The files of a Hugging Face folder beside the weights: config, tokenizer, chat template, generation config.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Files that belong to a checkpoint and travel with it unchanged, in bytewise order.
pub const SIDECAR_FILES: [&str; 19] = [
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

/// Copies the side files that exist in `from` into the folder `to`, except config.json, which the caller writes.
///
/// # Errors
/// I/O errors that name the file.
pub fn copy_sidecars(from: &Path, to: &Path) -> Result<()> {
    for name in SIDECAR_FILES.into_iter().filter(|n| *n != "config.json") {
        let source = from.join(name);
        if source.is_file() {
            // Read and write rather than fs::copy: the copy gets the umask's mode, not the source's.
            let bytes = fs::read(&source).with_context(|| format!("reading {}", source.display()))?;
            fs::write(to.join(name), bytes).with_context(|| format!("writing {name} into {}", to.display()))?;
        }
    }
    Ok(())
}
