//! The checkpoints a merge reads, and what they must have in common before any work begins.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use cpift_core::checkpoint::{Digest, TensorKind, check_same_parameters, read_config, tied};
use cpift_core::error::usage;
use cpift_core::provenance::Provenance;
use cpift_core::{BadInput, Checkpoint, Dtype};
use serde_json::Value;

/// One input checkpoint: a Hugging Face folder.
pub struct Source {
    /// What it is to the merge, such as `base` or `task:gsm8k`.
    pub role: String,
    /// The mapped tensors.
    pub checkpoint: Checkpoint,
    /// Its config.json.
    pub config: Value,
    digest: OnceLock<Digest>,
}

impl Source {
    /// Opens the folder at `path`.
    ///
    /// # Errors
    /// [`BadInput`] when it is not a sound Hugging Face folder.
    pub fn open(role: impl Into<String>, path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        if checkpoint.folder().is_none() {
            return Err(BadInput::new(path, "is a bare file")
                .expected("a Hugging Face folder with config.json and weights")
                .into());
        }
        let config = read_config(path)?;
        Ok(Self { role: role.into(), checkpoint, config, digest: OnceLock::new() })
    }

    /// Its content digest, where it is recorded in a cpift.json that still holds or has been computed.
    pub fn known_digest(&self) -> Option<&Digest> {
        if self.digest.get().is_none()
            && let Some(record) = Provenance::recorded_digest(self.path())
            && record.holds_for(self.path())
        {
            self.tell_digest(record.blake3);
        }
        self.digest.get()
    }

    /// Its content digest; where it is not known, all of it is read.
    ///
    /// # Errors
    /// I/O errors on the side files.
    pub fn digest(&self) -> Result<&Digest> {
        if let Some(known) = self.known_digest() {
            return Ok(known);
        }
        let digest = Digest::of_checkpoint(&self.checkpoint)?;
        Ok(self.digest.get_or_init(|| digest))
    }

    /// Takes over a digest computed while the checkpoint was read.
    pub fn tell_digest(&self, digest: Digest) {
        let _ = self.digest.set(digest);
    }

    /// The folder as it was given.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    fn config_path(&self) -> PathBuf {
        self.path().join("config.json")
    }
}

/// Checks that `other` is a checkpoint of the same model as `first`: architecture, tying, vocabulary, parameters and shapes.
///
/// # Errors
/// [`BadInput`] that names the first difference.
pub fn check_alike(first: &Source, other: &Source) -> Result<()> {
    let differs = |key: &str, expected: &Value, found: &Value, hint: &str| {
        BadInput::new(other.config_path(), format!("{key} differs from {}", first.config_path().display()))
            .expected(expected.to_string())
            .found(found.to_string())
            .hint(hint)
    };
    for key in ["architectures", "model_type"] {
        let (expected, found) = (&first.config[key], &other.config[key]);
        if expected != found {
            return Err(differs(key, expected, found, "only checkpoints of one architecture can be merged").into());
        }
    }
    // What the shapes of the tensors do not tell.
    for key in ["num_hidden_layers", "num_attention_heads", "num_key_value_heads"] {
        if let (Some(expected), Some(found)) = (first.config.get(key), other.config.get(key))
            && expected != found
        {
            return Err(differs(key, expected, found, "only checkpoints of one architecture can be merged").into());
        }
    }
    let (expected, found) = (tied(&first.config), tied(&other.config));
    if expected != found {
        let hint = "one model has an output embedding of its own and the other has not: save both alike";
        return Err(differs("tie_word_embeddings", &expected.into(), &found.into(), hint).into());
    }
    check_vocabulary(first, other)?;
    check_same_parameters(&first.checkpoint, &other.checkpoint)
}

/// Refuses embeddings of another number of tokens, the usual difference between fine-tunes of one base.
fn check_vocabulary(first: &Source, other: &Source) -> Result<()> {
    for view in first.checkpoint.parameters().filter(|view| TensorKind::Embeddings.matches(view.name)) {
        let Some(found) = other.checkpoint.get(view.name) else { continue };
        if let ([tokens, width @ ..], [other_tokens, other_width @ ..]) = (view.shape, found.shape)
            && tokens != other_tokens
            && width == other_width
        {
            let (small, large) = (tokens.min(other_tokens), tokens.max(other_tokens));
            return Err(BadInput::new(found.file, format!("the vocabulary differs from {}", first.path().display()))
                .tensor(view.name)
                .expected(format!("{tokens} tokens"))
                .found(format!("{other_tokens} tokens"))
                .hint(format!(
                    "bring both to one tokenizer first: resize_token_embeddings({small}) of transformers drops what \
                     was added, resize_token_embeddings({large}) makes room"
                ))
                .into());
        }
    }
    Ok(())
}

/// The dtype that all parameters of all `sources` have.
///
/// # Errors
/// [`BadInput`] that names the first parameter of another dtype.
pub fn common_dtype<'a>(sources: impl Iterator<Item = &'a Source>) -> Result<Dtype> {
    let mut common: Option<(Dtype, &Path)> = None;
    for view in sources.flat_map(|s| s.checkpoint.parameters()) {
        let (dtype, file) = *common.get_or_insert((view.dtype, view.file));
        if view.dtype != dtype {
            return Err(BadInput::new(view.file, "the inputs are of several dtypes")
                .tensor(view.name)
                .expected(format!("{dtype}, as in {}", file.display()))
                .found(view.dtype.name())
                .hint("--dtype f32, bf16, f16 or f64 says which the output shall have")
                .into());
        }
    }
    common.map(|c| c.0).ok_or_else(|| usage("the inputs hold no parameters to merge"))
}

/// Refuses an output that is, or holds, one of the `inputs`: `--force` would destroy it.
///
/// # Errors
/// [`cpift_core::Usage`] naming the input.
pub fn check_not_input<'a>(out: &Path, inputs: impl Iterator<Item = &'a Path>) -> Result<()> {
    let Ok(out) = out.canonicalize() else { return Ok(()) };
    for input in inputs {
        if input.canonicalize().is_ok_and(|path| path.starts_with(&out)) {
            return Err(usage(format!("--out {} would replace the input {}", out.display(), input.display())));
        }
    }
    Ok(())
}
