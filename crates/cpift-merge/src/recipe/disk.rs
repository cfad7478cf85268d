//! What a recipe says, held against the folders it names: are they there, do slices cover all layers, is the
//! vocabulary one.

use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::BadInput;
use cpift_core::format::checkpoint::read_config;
use cpift_core::format::json;
use serde_json::Value;

use super::Recipe;

/// Checks `recipe`, read from `file`, against what is on disk.
pub(super) fn check(file: &Path, recipe: &Recipe) -> Result<()> {
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
        "an adapter is merged into its model first".to_owned()
    } else if of_hub {
        format!("a model of the hub is downloaded first: huggingface-cli download {name} --local-dir {name}")
    } else {
        "paths are relative to the folder the program runs in".to_owned()
    };
    Err(BadInput::new(file, "names a model that is not a folder").found(name).hint(hint).into())
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

/// mergekit would rearrange the embeddings of a model with another vocabulary; they are merged as they are here.
fn check_vocabulary(file: &Path, source: &Path, model: &Path) -> Result<()> {
    let (expected, found) = (vocabulary(source)?, vocabulary(model)?);
    let Some(expected) = expected else {
        return Err(BadInput::new(source, "has no tokenizer").expected("tokenizer.json or tokenizer.model").into());
    };
    match found {
        // A model saved without one is taken to have that of the others.
        None => Ok(()),
        Some(found) if found == expected => Ok(()),
        Some(_) => Err(BadInput::new(file, "the models' vocabularies differ")
            .expected(format!("that of {}", source.display()))
            .found(format!("another in {}", model.display()))
            .hint("embeddings are merged row by row, so that each row must stand for the same token")
            .into()),
    }
}

/// What tells vocabularies apart.
#[derive(PartialEq)]
enum Vocabulary {
    /// Of tokenizer.json: the vocabulary and the tokens added to it.
    Tokens(Value, Value),
    /// Of tokenizer.model: its bytes.
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
