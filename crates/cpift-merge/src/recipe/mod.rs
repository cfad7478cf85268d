//! Recipes in mergekit's YAML, for the methods that both programs have. Keys that are not known are
//! errors.
//!
//! Settings mean the same as in mergekit 0.1.5. The parameters of a model come before those of its
//! slice, and those before the recipe's own; in each, the first entry whose filter is a part of the
//! tensor's name counts. A list of numbers is spread over the layers, and tensors outside the
//! layers get its first number.
//!
//! Settings that mergekit has no key for stand under `cpift`, which it ignores: see [`write()`].

mod node;
mod parse;
mod write;

pub use parse::parse;
pub use write::write;

use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::BadInput;
use cpift_core::format::checkpoint::read_config;
use cpift_core::format::json;
use serde_json::Value;

use crate::request::Request;
use parse::{LONGEST, Recipe, parse_recipe, too_long};

/// Reads the recipe at `path` and checks it against the directories it names.
///
/// # Errors
/// [`BadInput`] that names the file and the key.
pub fn read(path: &Path) -> Result<Request> {
    let length = std::fs::metadata(path).with_context(|| format!("opening {}", path.display()));
    let length = length.map_err(|e| BadInput::new(path, format!("{:#}", e.root_cause())))?.len();
    if length > LONGEST {
        return Err(too_long(path, length).into());
    }
    let bytes = std::fs::read(path).map_err(|e| BadInput::new(path, e.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|e| BadInput::new(path, format!("is not UTF-8 text: {e}")))?;
    let recipe = parse_recipe(&text, path)?;
    check(path, &recipe)?;
    Ok(recipe.request)
}

/// Checks that the directories named by `recipe` exist, and that their layers and vocabularies are
/// those it asks for.
fn check(file: &Path, recipe: &Recipe) -> Result<()> {
    let request = &recipe.request;
    let models = || request.models.iter().map(|model| model.path.as_path()).chain(request.base.as_deref());
    for folder in models().chain(request.side_files.as_deref()) {
        check_folder(file, folder)?;
    }
    if let Some(layers) = recipe.layers {
        models().try_for_each(|model| check_layers(file, model, layers))?;
    }
    if let Some(source) = &recipe.vocabulary {
        models().try_for_each(|model| check_vocabulary(file, source, model))?;
    }
    Ok(())
}

fn check_folder(file: &Path, folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let name = folder.to_string_lossy();
    let of_hub = name.split('/').count() == 2 && !name.starts_with(['/', '.', '~']);
    let hint = if name.contains('+') {
        "an adapter must be merged into its model first".to_owned()
    } else if of_hub {
        format!("download a model of the hub first: huggingface-cli download {name} --local-dir {name}")
    } else {
        "paths are relative to the directory in which the program runs".to_owned()
    };
    Err(BadInput::new(file, "names a model that is not a directory").found(name).hint(hint).into())
}

fn check_layers(file: &Path, model: &Path, layers: usize) -> Result<()> {
    let config = read_config(model)?;
    let inner = config.get("text_config").unwrap_or(&config);
    let number = ["num_hidden_layers", "n_layer"].iter().find_map(|key| inner.get(*key)?.as_u64());
    if number == Some(layers as u64) {
        return Ok(());
    }
    let found = match number {
        Some(number) => format!("{number} layers in {}", model.display()),
        None => format!("no num_hidden_layers in {}", model.join("config.json").display()),
    };
    Err(BadInput::new(file, "the slices do not cover every layer, which is not supported (a frankenmerge)")
        .expected(format!("models with {layers} layers"))
        .found(found)
        .into())
}

/// Refuses a model whose vocabulary differs from that of `source`. mergekit would rearrange its
/// embeddings; here they are merged unchanged.
fn check_vocabulary(file: &Path, source: &Path, model: &Path) -> Result<()> {
    let (expected, found) = (vocabulary(source)?, vocabulary(model)?);
    let Some(expected) = expected else {
        return Err(BadInput::new(source, "has no tokenizer").expected("tokenizer.json or tokenizer.model").into());
    };
    match found {
        // A model saved without a tokenizer is assumed to have that of the others.
        None => Ok(()),
        Some(found) if found == expected => Ok(()),
        Some(_) => Err(BadInput::new(file, "the models' vocabularies differ")
            .expected(format!("that of {}", source.display()))
            .found(format!("another in {}", model.display()))
            .hint("embeddings are merged row by row, so that each row must stand for the same token")
            .into()),
    }
}

/// Vocabulary of a tokenizer, to be compared.
#[derive(PartialEq)]
enum Vocabulary {
    /// Vocabulary and added tokens of tokenizer.json.
    Tokens(Value, Value),
    /// Bytes of tokenizer.model.
    Model(Vec<u8>),
}

fn vocabulary(folder: &Path) -> Result<Option<Vocabulary>> {
    let path = folder.join("tokenizer.json");
    if path.exists() {
        let tokenizer: Value = json::read(&path)?;
        let part = |pointer: &str| tokenizer.pointer(pointer).cloned().unwrap_or_default();
        return Ok(Some(Vocabulary::Tokens(part("/model/vocab"), part("/added_tokens"))));
    }
    let path = folder.join("tokenizer.model");
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(Some(Vocabulary::Model(bytes)))
}
