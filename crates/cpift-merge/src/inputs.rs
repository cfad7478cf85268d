//! The checkpoints a merge reads, and what they must have in common before any work begins.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use cpift_core::checkpoint::{Digest, check_same_parameters, read_config};
use cpift_core::error::usage;
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

    /// Its content digest; the first call may read all of it.
    ///
    /// # Errors
    /// I/O errors on the side files.
    pub fn digest(&self) -> Result<&Digest> {
        if let Some(known) = self.digest.get() {
            return Ok(known);
        }
        let digest = self.checkpoint.digest()?;
        Ok(self.digest.get_or_init(|| digest))
    }

    /// The folder as it was given.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    fn config_path(&self) -> PathBuf {
        self.path().join("config.json")
    }
}

/// Checks that `other` is a checkpoint of the same model as `first`: architecture, tying, parameters and shapes.
///
/// # Errors
/// [`BadInput`] that names the first difference.
pub fn check_alike(first: &Source, other: &Source) -> Result<()> {
    let tying = "tie_word_embeddings";
    for key in ["architectures", "model_type", tying] {
        let (expected, found) = (setting(&first.config, key), setting(&other.config, key));
        if expected != found {
            let message = format!("{key} differs from {}", first.config_path().display());
            let hint = if key == tying {
                "one model has an output embedding of its own and the other has not: save both alike"
            } else {
                "only checkpoints of one architecture can be merged"
            };
            return Err(BadInput::new(other.config_path(), message)
                .expected(expected.to_string())
                .found(found.to_string())
                .hint(hint)
                .into());
        }
    }
    check_same_parameters(&first.checkpoint, &other.checkpoint)
}

/// A setting of config.json, with transformers' default where it is not written.
fn setting(config: &Value, key: &str) -> Value {
    match config.get(key) {
        Some(Value::Null) | None if key == "tie_word_embeddings" => Value::Bool(false),
        Some(value) => value.clone(),
        None => Value::Null,
    }
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
