//! Input checkpoints of a merge, and the checks that they are checkpoints of one model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::checkpoint::{Excluded, check_readable, check_same_parameters, read_config};
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::format::names::TensorKind;
use cpift_core::format::rope::RopeSettings;
use cpift_core::{BadInput, Checkpoint, Dtype, TensorView};
use serde_json::Value;

use crate::request::{Integers, LayoutPolicy, Missing};

/// Name of the output embedding.
const HEAD: &str = "lm_head.weight";

/// One input checkpoint.
pub(crate) struct Source {
    /// Role in the merge, such as `base` or `task:gsm8k`.
    pub role: String,
    /// Mapped tensors.
    pub checkpoint: Checkpoint,
    /// Content of config.json, or null.
    pub config: Value,
    digest: OnceLock<Digest>,
}

impl Source {
    /// Opens the checkpoint at `path`.
    ///
    /// # Errors
    /// [`BadInput`] if it cannot be opened, or is quantised in a way that leaves no numbers to
    /// merge.
    pub fn open(role: impl Into<String>, path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let config = match checkpoint.folder() {
            Some(folder) if folder.join("config.json").exists() => read_config(folder)?,
            _ => Value::Null,
        };
        check_readable(path, &config)?;
        Ok(Self { role: role.into(), checkpoint, config, digest: OnceLock::new() })
    }

    /// Digest of its content, if it has been computed or is recorded in a cpift.json whose sizes
    /// and mtimes still match.
    pub fn known_digest(&self) -> Option<&Digest> {
        if self.digest.get().is_none()
            && let Some(digest) = self.checkpoint.recorded_digest()
        {
            self.set_digest(digest);
        }
        self.digest.get()
    }

    /// Returns true if its digest has been asked for or computed.
    pub fn has_digest(&self) -> bool {
        self.digest.get().is_some()
    }

    /// Digest of its content; the whole checkpoint is read if the digest is not known.
    ///
    /// # Errors
    /// A side file that cannot be read.
    pub fn digest(&self) -> Result<&Digest> {
        if let Some(known) = self.known_digest() {
            return Ok(known);
        }
        let digest = Digest::of_checkpoint(&self.checkpoint)?;
        Ok(self.digest.get_or_init(|| digest))
    }

    /// Stores a digest that was computed while the checkpoint was read.
    pub fn set_digest(&self, digest: Digest) {
        let _ = self.digest.set(digest);
    }

    /// Path, as given.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// Directory of config.json and tokenizer; none for a bare file.
    pub fn folder(&self) -> Option<&Path> {
        self.checkpoint.folder()
    }

    fn config_path(&self) -> PathBuf {
        self.folder().unwrap_or(self.path()).join("config.json")
    }
}

/// Unties the sources with a tied output embedding if others have one of their own: theirs gets the
/// values of the input embedding.
pub(crate) fn share_head(sources: &mut [&mut Source]) {
    let Some(own) = sources.iter().find(|s| !s.checkpoint.tied() && s.checkpoint.get(HEAD).is_some()) else { return };
    let own = own.path().to_owned();
    for source in sources.iter_mut().filter(|source| source.checkpoint.tied()) {
        log::warn!(
            "{}: {HEAD} is the input embedding, but a parameter of its own in {}: both are merged, and the output has one of its own",
            source.path().display(),
            own.display()
        );
        source.checkpoint.untie();
    }
}

/// Brings the names of the `others` to those of the backbone, where they differ by a prefix, and
/// checks that all are checkpoints of its model, by the rules of `policy`.
///
/// # Errors
/// [`BadInput`] that names the first difference.
pub(crate) fn reconcile(backbone: &mut Source, others: &mut [&mut Source], policy: LayoutPolicy) -> Result<()> {
    for other in others {
        if let Some(change) = other.checkpoint.align_names(&backbone.checkpoint) {
            log::info!("{change}, as in {}", backbone.path().display());
        }
        let lacking = check_compatible(backbone, other, policy)?;
        if policy.missing == Missing::Skip {
            backbone.checkpoint.skip(lacking);
        }
    }
    Ok(())
}

/// Checks that `other` is a checkpoint of the same model as `first`: architecture, tying,
/// vocabulary, parameters and shapes. Warns about settings and tokenizers that differ. Returns the
/// parameters that `other` lacks.
///
/// # Errors
/// [`BadInput`] that names the first difference.
pub(crate) fn check_compatible(first: &Source, other: &Source, policy: LayoutPolicy) -> Result<Vec<String>> {
    check_architecture(first, other)?;
    check_setting(first, other, "num_hidden_layers")?;
    check_vocabulary(first, other)?;
    let lacking = check_parameters(first, other, policy.missing)?;
    check_same_integers(first, other, policy.integers)?;
    warn_of_differences(first, other);
    Ok(lacking)
}

/// Checks that `other` has the architecture of `first` and ties its embeddings alike. Warns about
/// settings and tokenizers that differ.
///
/// # Errors
/// [`BadInput`] that names the first difference.
pub(crate) fn check_alike(first: &Source, other: &Source) -> Result<()> {
    check_architecture(first, other)?;
    warn_of_differences(first, other);
    Ok(())
}

fn warn_of_differences(first: &Source, other: &Source) {
    warn_of_settings(first, other);
    if let (Some(ours), Some(theirs), false) = (first.folder(), other.folder(), other.checkpoint.has_mapped_rows()) {
        warn_of_tokens(ours, theirs);
    }
}

fn check_architecture(first: &Source, other: &Source) -> Result<()> {
    for key in ["architectures", "model_type"] {
        let (expected, found) = (&first.config[key], &other.config[key]);
        if expected != found && !expected.is_null() && !found.is_null() {
            return Err(differs(first, other, key, expected, found, ONE_ARCHITECTURE).into());
        }
    }
    // Settings that the shapes of the tensors do not determine.
    for key in ["num_attention_heads", "num_key_value_heads"] {
        check_setting(first, other, key)?;
    }
    let (expected, found) = (first.checkpoint.tied(), other.checkpoint.tied());
    let asks = |source: &Source| source.config.get("tie_word_embeddings") == Some(&Value::Bool(false));
    if expected != found && [first, other].iter().any(|source| !source.checkpoint.tied() && asks(source)) {
        let hint = "one config.json asks for an output embedding of its own that its weights do not have: save both models alike";
        return Err(differs(first, other, "tie_word_embeddings", &expected.into(), &found.into(), hint).into());
    }
    Ok(())
}

/// Hint for models of different architectures.
const ONE_ARCHITECTURE: &str = "only checkpoints of one architecture can be merged";

fn differs(first: &Source, other: &Source, key: &str, expected: &Value, found: &Value, hint: &str) -> BadInput {
    BadInput::new(other.config_path(), format!("{key} differs from {}", first.config_path().display()))
        .expected(expected.to_string())
        .found(found.to_string())
        .hint(hint)
}

/// Refuses a setting of config.json that both have with different values.
fn check_setting(first: &Source, other: &Source, key: &str) -> Result<()> {
    match (first.config.get(key), other.config.get(key)) {
        (Some(expected), Some(found)) if expected != found => {
            Err(differs(first, other, key, expected, found, ONE_ARCHITECTURE).into())
        }
        _ => Ok(()),
    }
}

/// Checks names and shapes of the parameters, and returns those that `other` lacks.
fn check_parameters(first: &Source, other: &Source, missing: Missing) -> Result<Vec<String>> {
    if missing == Missing::Error {
        return check_same_parameters(&first.checkpoint, &other.checkpoint).map(|()| Vec::new()).map_err(|error| {
            match error.downcast::<BadInput>() {
                Ok(bad) if bad.is_about_a_missing_tensor() => bad
                    .hint("both must be checkpoints of the same model; --missing base or skip merges what both have")
                    .into(),
                Ok(bad) => bad.into(),
                Err(error) => error,
            }
        });
    }
    let mut lacking = Vec::new();
    for view in first.checkpoint.parameters() {
        match other.checkpoint.get(view.name) {
            None => lacking.push(view.name.to_owned()),
            Some(found) if found.shape != view.shape || !found.dtype.is_float() => {
                check_same_parameters(&first.checkpoint, &other.checkpoint)?;
            }
            Some(_) => {}
        }
    }
    let extra: Vec<&str> =
        other.checkpoint.parameters().map(|view| view.name).filter(|n| first.checkpoint.get(n).is_none()).collect();
    if let Some(name) = lacking.first() {
        let rule = if missing == Missing::Base { "counts as having those of" } else { "they are taken from" };
        log::warn!(
            "{}: {} parameters are missing, the first {name}: {rule} {}",
            other.path().display(),
            lacking.len(),
            first.path().display()
        );
    }
    if let Some(name) = extra.first() {
        let place = first.path().display();
        log::warn!(
            "{}: {} parameters that {place} does not have are left out, the first {name}",
            other.path().display(),
            extra.len()
        );
    }
    Ok(lacking)
}

/// Returns true for counters and positions that say nothing about the model.
fn is_position(name: &str) -> bool {
    matches!(name.rsplit('.').next(), Some("position_ids" | "num_batches_tracked"))
}

/// Refuses integer tensors that differ, unless the base's are asked for. They are copied from the
/// first model, also where another does not have them.
fn check_same_integers(first: &Source, other: &Source, integers: Integers) -> Result<()> {
    let all = first.checkpoint.not_parameters().filter(|(_, why)| *why == Excluded::NotFloat);
    for (view, _) in all.filter(|(view, _)| !is_position(view.name)) {
        let Some(found) = other.checkpoint.get(view.name) else { continue };
        if (view.dtype, view.shape, view.bytes) == (found.dtype, found.shape, found.bytes) {
            continue;
        }
        let message = format!("an integer tensor differs from {}", first.path().display());
        if integers == Integers::Base {
            log::warn!("{}: {message}, which the output takes: {}", other.path().display(), view.name);
            continue;
        }
        return Err(BadInput::new(other.path(), message)
            .tensor(view.name)
            .hint("integers cannot be merged: use floating-point checkpoints, or --integers base takes those of the first")
            .into());
    }
    Ok(())
}

/// Warns about differing settings that change what the weights mean; the output takes those of the
/// first model.
fn warn_of_settings(first: &Source, other: &Source) {
    for key in ["rms_norm_eps", "hidden_act", "head_dim", "sliding_window"] {
        let (ours, theirs) = (&first.config[key], &other.config[key]);
        if ours != theirs {
            warn_of_setting(first, other, key, ours, theirs);
        }
    }
    // Compared by meaning, because versions of transformers spell the same settings differently.
    let rope = |source: &Source| RopeSettings::read(&source.config_path(), &source.config, POSITIONS).ok();
    let alike = |key: &str| first.config[key] == other.config[key];
    let keys = ["rope_theta", "rope_scaling", "rope_parameters"];
    let same = match (rope(first), rope(other)) {
        (Some(ours), Some(theirs)) => ours.same_as(&theirs),
        // Settings of architectures that the pipeline does not train.
        _ => keys.iter().all(|key| alike(key)),
    };
    for key in keys.into_iter().filter(|key| !same && !alike(key)) {
        warn_of_setting(first, other, key, &first.config[key], &other.config[key]);
    }
}

/// Context length for configs without `max_position_embeddings`, the same for both that are
/// compared.
const POSITIONS: f64 = 2048.0;

fn warn_of_setting(first: &Source, other: &Source, key: &str, ours: &Value, theirs: &Value) {
    log::warn!(
        "{}: {key} is {theirs}, and {ours} in {}, whose config.json the output takes",
        other.config_path().display(),
        first.config_path().display()
    );
}

/// Warns if two directories have different tokens at the same id, naming the first. A merge mixes
/// rows of the embeddings, so that equal ids must mean equal tokens.
fn warn_of_tokens(first: &Path, other: &Path) {
    let (Some(ours), Some(theirs)) = (tokens(first), tokens(other)) else { return };
    let ids = ours.keys().chain(theirs.keys().filter(|id| !ours.contains_key(id)));
    let mut different: Vec<u64> = ids.filter(|id| ours.get(id) != theirs.get(id)).copied().collect();
    different.sort_unstable();
    let Some(id) = different.first() else { return };
    let shown = |tokens: &BTreeMap<u64, String>| tokens.get(id).map_or("no token".to_owned(), |t| format!("{t:?}"));
    log::warn!(
        "{}: {} ids stand for other tokens than in {}: id {id} is {}, and {} there; their rows of the embeddings are merged anyway",
        other.display(),
        different.len(),
        first.display(),
        shown(&theirs),
        shown(&ours)
    );
}

/// Tokens by id: those of tokenizer.json, then those added by tokenizer_config.json. `None` if
/// there is no readable tokenizer.
fn tokens(folder: &Path) -> Option<BTreeMap<u64, String>> {
    let file: Value = json::read(&folder.join("tokenizer.json")).ok()?;
    let mut tokens = BTreeMap::new();
    match file.pointer("/model/vocab")? {
        Value::Object(vocab) => {
            tokens.extend(vocab.iter().filter_map(|(token, id)| Some((id.as_u64()?, token.clone()))));
        }
        // The vocabulary of a unigram model is a list of tokens with scores.
        Value::Array(vocab) => {
            let token = |entry: &Value| Some(entry.get(0)?.as_str()?.to_owned());
            tokens.extend((0..).zip(vocab).filter_map(|(id, entry)| Some((id, token(entry)?))));
        }
        _ => return None,
    }
    for token in file.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        if let (Some(id), Some(content)) =
            (token.get("id").and_then(Value::as_u64), token.get("content").and_then(Value::as_str))
        {
            tokens.insert(id, content.to_owned());
        }
    }
    let config: Option<Value> = json::read(&folder.join("tokenizer_config.json")).ok();
    let decoder = config.as_ref().and_then(|config| config.get("added_tokens_decoder")?.as_object());
    for (id, token) in decoder.into_iter().flatten() {
        if let (Ok(id), Some(content)) = (id.parse(), token.get("content").and_then(Value::as_str)) {
            tokens.insert(id, content.to_owned());
        }
    }
    Some(tokens)
}

/// Refuses embeddings with different numbers of tokens, a common difference between fine-tunes of
/// one base.
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
                    "--tokenizer base or union matches rows by token; or bring both to one tokenizer first: resize_token_embeddings({small}) of transformers drops the added \
                     tokens, resize_token_embeddings({large}) adds rows for them"
                ))
                .into());
        }
    }
    Ok(())
}

/// Dtype of each parameter of `backbone`: the one that it has in all `sources`.
///
/// # Errors
/// [`BadInput`] that names the first parameter with several.
pub(crate) fn own_dtypes(backbone: &Source, sources: &[&Source]) -> Result<Vec<Dtype>> {
    let dtype = |view: TensorView<'_>| {
        let found = sources.iter().filter_map(|source| source.checkpoint.get(view.name));
        Ok(common_dtype(found)?.unwrap_or(view.output_dtype()))
    };
    let dtypes: Vec<Dtype> = backbone.checkpoint.parameters().map(dtype).collect::<Result<_>>()?;
    if dtypes.is_empty() { Err(usage("the inputs have no parameters to merge")) } else { Ok(dtypes) }
}

/// Dtype as which all `views` would be stored; `None` if there are none.
///
/// # Errors
/// [`BadInput`] that names the first one that differs.
pub(crate) fn common_dtype<'a>(views: impl Iterator<Item = TensorView<'a>>) -> Result<Option<Dtype>> {
    let mut common: Option<(Dtype, &Path)> = None;
    for found in views {
        let (dtype, file) = *common.get_or_insert((found.output_dtype(), found.file));
        if found.output_dtype() != dtype {
            return Err(BadInput::new(found.file, "the inputs are of several dtypes")
                .tensor(found.name)
                .expected(format!("{dtype}, as in {}", file.display()))
                .found(found.output_dtype().name())
                .hint("--dtype f32, bf16, f16 or f64 sets the dtype of the output")
                .into());
        }
    }
    Ok(common.map(|(dtype, _)| dtype))
}
