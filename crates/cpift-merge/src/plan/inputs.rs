//! The checkpoints a merge reads, and what they must have in common before any work begins.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::checkpoint::{Excluded, check_same_parameters, read_config};
use cpift_core::format::digest::Digest;
use cpift_core::format::names::TensorKind;
use cpift_core::format::rope::RopeSettings;
use cpift_core::record::provenance::Provenance;
use cpift_core::{BadInput, Checkpoint, Dtype};
use serde_json::Value;

use super::tokens;

/// The output embedding.
const HEAD: &str = "lm_head.weight";

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
        if config.get("quantization_config").is_some_and(|q| !q.is_null()) {
            return Err(BadInput::new(path, "is quantised (config.json has a quantization_config)")
                .hint("merge the floating-point checkpoint it was made from")
                .into());
        }
        Ok(Self { role: role.into(), checkpoint, config, digest: OnceLock::new() })
    }

    /// Its content digest, where it is recorded in a cpift.json that still holds or has been computed.
    pub fn known_digest(&self) -> Option<&Digest> {
        if self.digest.get().is_none()
            && let Some(record) = Provenance::recorded_digest(self.path())
            && record.holds_for(self.path())
        {
            self.set_digest(record.blake3);
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
    pub fn set_digest(&self, digest: Digest) {
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

/// Gives the tied ones among `sources` an output embedding, the values of their input embedding, where others have one of their own.
pub fn share_head(sources: &mut [&mut Source]) {
    let Some(own) = sources.iter().find(|s| !s.checkpoint.tied() && s.checkpoint.get(HEAD).is_some()) else { return };
    let own = own.path().to_owned();
    for source in sources.iter_mut().filter(|source| source.checkpoint.tied()) {
        log::warn!(
            "{}: {HEAD} is the input embedding, and a parameter of its own in {}: both are merged, and the output has one of its own",
            source.path().display(),
            own.display()
        );
        source.checkpoint.untie();
    }
}

/// Checks that `other` is a checkpoint of the same model as `first`: architecture, tying, vocabulary, parameters and shapes.
///
/// # Errors
/// [`BadInput`] that names the first difference.
pub fn check_compatible(first: &Source, other: &Source) -> Result<()> {
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
    let (expected, found) = (first.checkpoint.tied(), other.checkpoint.tied());
    if expected != found {
        let hint =
            "one config.json asks for an output embedding of its own that its weights do not have: save both alike";
        return Err(differs("tie_word_embeddings", &expected.into(), &found.into(), hint).into());
    }
    check_vocabulary(first, other)?;
    check_same_parameters(&first.checkpoint, &other.checkpoint)?;
    check_same_integers(first, other)?;
    warn_of_settings(first, other);
    tokens::warn_of_differences(first.path(), other.path());
    Ok(())
}

/// Integer tensors are copied from the first model, so the others must have the same.
fn check_same_integers(first: &Source, other: &Source) -> Result<()> {
    let integers = |source: &'_ Source| {
        let all = source.checkpoint.not_parameters().filter(|(_, why)| *why == Excluded::NotFloat);
        all.map(|(view, _)| view.name.to_owned()).collect::<BTreeSet<String>>()
    };
    for name in integers(first).union(&integers(other)) {
        let same = match (first.checkpoint.get(name), other.checkpoint.get(name)) {
            (Some(a), Some(b)) => (a.dtype, a.shape, a.bytes) == (b.dtype, b.shape, b.bytes),
            _ => false,
        };
        if !same {
            return Err(BadInput::new(
                other.path(),
                format!("an integer tensor differs from {}", first.path().display()),
            )
            .tensor(name)
            .hint("integers cannot be merged: take checkpoints in floating point")
            .into());
        }
    }
    Ok(())
}

/// Tells of settings that change what the weights mean and are not the same; the output takes the first model's.
fn warn_of_settings(first: &Source, other: &Source) {
    for key in ["rms_norm_eps", "hidden_act", "head_dim", "sliding_window"] {
        let (ours, theirs) = (&first.config[key], &other.config[key]);
        if ours != theirs {
            warn_of_setting(first, other, key, ours, theirs);
        }
    }
    // By meaning: versions of transformers spell one and the same differently.
    let rope = |source: &Source| RopeSettings::read(&source.config_path(), &source.config, POSITIONS).ok();
    let alike = |key: &str| first.config[key] == other.config[key];
    let keys = ["rope_theta", "rope_scaling", "rope_parameters"];
    let same = match (rope(first), rope(other)) {
        (Some(ours), Some(theirs)) => ours.same_as(&theirs),
        // Settings of architectures that this program does not train.
        _ => keys.iter().all(|key| alike(key)),
    };
    for key in keys.into_iter().filter(|key| !same && !alike(key)) {
        warn_of_setting(first, other, key, &first.config[key], &other.config[key]);
    }
}

/// A context for configs without `max_position_embeddings`: the same for both that are compared.
const POSITIONS: f64 = 2048.0;

fn warn_of_setting(first: &Source, other: &Source, key: &str, ours: &Value, theirs: &Value) {
    log::warn!(
        "{}: {key} is {theirs}, and {ours} in {}, whose config.json the output takes",
        other.config_path().display(),
        first.config_path().display()
    );
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
