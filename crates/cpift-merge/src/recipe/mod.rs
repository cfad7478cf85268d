//! Recipes in mergekit's YAML. Keys that mergekit ignores are warned about; misspelled ones are
//! errors.
//!
//! Settings mean the same as in mergekit 0.1.5. The parameters of a model come before those of its
//! slice, and those before the recipe's own; in each, the first entry whose filter is a part of the
//! tensor's name counts. A list of numbers is spread over the layers, and tensors outside the
//! layers get its first number.
//!
//! A file may hold several recipes, each with a `name` by which others refer to its result.
//!
//! A model is a path, or `org/name[@revision]` on the Hugging Face Hub.
//!
//! Settings that mergekit has no key for stand under `cpift`, which it ignores: see [`write()`].

mod node;
mod parse;
mod sources;
mod templates;
mod tokenizer;
mod write;

pub use parse::parse;
pub(crate) use parse::result_in;
pub use write::write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::format::checkpoint::{model_of, read_config};
use cpift_core::format::names::layer;
use cpift_core::hub::{self, Need};
use cpift_core::{BadInput, Checkpoint};

use crate::request::{Request, TokenizerSource};
use parse::{LONGEST, Recipe, parse_all, too_long};

/// Reads the recipe of one merge at `path` and checks it against the directories it names.
///
/// # Errors
/// [`BadInput`] that names the file and the key.
pub fn read(path: &Path) -> Result<Request> {
    let mut all = read_all(path)?;
    let last = all.pop().expect("a file has at least one recipe");
    match all.is_empty() {
        true => Ok(last.request),
        false => Err(BadInput::new(path, "is a recipe of several merges").expected("one").into()),
    }
}

/// A merge of a file of recipes.
pub(crate) struct Step {
    /// Name by which later merges refer to the result.
    pub name: Option<String>,
    pub request: Request,
}

/// Reads the recipes at `path`, in an order in which each can be made, the result of the file last,
/// and checks them against the directories they name.
///
/// # Errors
/// [`BadInput`] that names the file and the key.
pub(crate) fn read_all(path: &Path) -> Result<Vec<Step>> {
    let length = std::fs::metadata(path).with_context(|| format!("opening {}", path.display()));
    let length = length.map_err(|e| BadInput::new(path, format!("{:#}", e.root_cause())))?.len();
    if length > LONGEST {
        return Err(too_long(path, length).into());
    }
    let bytes = std::fs::read(path).map_err(|e| BadInput::new(path, e.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|e| BadInput::new(path, format!("is not UTF-8 text: {e}")))?;
    let mut recipes = parse_all(&text, path)?;
    let names: Vec<String> = recipes.iter().filter_map(|recipe| recipe.name.clone()).collect();
    let several = recipes.len() > 1;
    let made = |folder: &Path| several && result_in(&names, folder).is_some();
    for recipe in &mut recipes {
        fetch(&mut recipe.request).with_context(|| path.display().to_string())?;
    }
    let paths = recipes.iter().flat_map(|recipe| recipe.request.paths());
    for (model, rest) in paths.filter_map(|model| Some((model, result_in(&names, model)?.1))).filter(|_| several) {
        let adapters = rest.strip_prefix('+').unwrap_or_default();
        if !adapters.is_empty() && !Path::new(adapters).exists() && !adapters.split('+').all(|a| Path::new(a).exists())
        {
            return Err(missing(path, model).into());
        }
    }
    recipes.iter_mut().try_for_each(|recipe| check(path, recipe, made))?;
    Ok(recipes.into_iter().map(|recipe| Step { name: recipe.name, request: recipe.request }).collect())
}

/// Replaces the names of models on the Hub by their directories in the local cache, into which they
/// are downloaded if need be: whole models, and of others what a tokenizer needs.
fn fetch(request: &mut Request) -> Result<()> {
    let mut found: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    let mut add = |path: &Path, need: Need| -> Result<()> {
        if !found.contains_key(path)
            && let Some(folder) = path.to_str().map(|text| hub::model(text, need)).transpose()?.flatten()
        {
            found.insert(path.to_owned(), folder);
        }
        Ok(())
    };
    for request in [&*request].into_iter().chain(request.slices.iter().map(|slice| &slice.request)) {
        let models = request.models.iter().map(|model| model.path.as_path());
        models.chain(request.base.as_deref()).try_for_each(|path| add(path, Need::Model))?;
    }
    let tokenizer = match request.tokenizer.as_ref().map(|tokenizer| &tokenizer.source) {
        Some(TokenizerSource::Path(path)) => Some(path.as_path()),
        _ => None,
    };
    tokenizer.into_iter().chain(request.side_files.as_deref()).try_for_each(|path| add(path, Need::Tokenizer))?;
    request.relocate(&|path| found.get(path).cloned());
    Ok(())
}

/// Checks that the directories named by `recipe` exist, unless `made` says that another recipe
/// makes them. Slices that are whole models become models.
fn check(file: &Path, recipe: &mut Recipe, made: impl Fn(&Path) -> bool) -> Result<()> {
    for folder in recipe.request.paths().filter(|folder| !made(folder)) {
        check_folder(file, folder)?;
    }
    let request = &mut recipe.request;
    if let [slice] = &request.slices[..] {
        let ranges = slice.layers.iter().chain(&slice.base_layers);
        let paths = slice.request.models.iter().map(|m| m.path.as_path()).chain(slice.request.base.as_deref());
        let mut whole = true;
        for (range, path) in ranges.zip(paths) {
            whole &= !made(path) && range.start == 0 && number_of_layers(path)? == Some(range.end);
        }
        if whole {
            request.slices.clear();
        }
    }
    Ok(())
}

fn check_folder(file: &Path, folder: &Path) -> Result<()> {
    if folder.exists() || model_of(folder).is_some() { Ok(()) } else { Err(missing(file, folder).into()) }
}

fn missing(file: &Path, folder: &Path) -> BadInput {
    let name = folder.to_string_lossy();
    let hint = if name.contains('+') {
        "MODEL+ADAPTER are a model, and a LoRA adapter that is merged into it: two paths or names on the Hub"
    } else {
        "paths are relative to the directory in which the program runs"
    };
    let error = BadInput::new(file, "names a model that does not exist").found(&*name).hint(hint);
    hub::hinted(error, folder)
}

fn number_of_layers(model: &Path) -> Result<Option<usize>> {
    let model = &model_of(model).unwrap_or_else(|| model.to_owned());
    if !model.join("config.json").is_file() {
        // A bare file, or weights alone.
        let checkpoint = Checkpoint::open(model)?;
        let layers = checkpoint.parameters().filter_map(|view| Some(layer(view.name)?.1 as usize + 1));
        return Ok(layers.max());
    }
    let config = read_config(model)?;
    let inner = config.get("text_config").unwrap_or(&config);
    let number = ["num_hidden_layers", "n_layer"].iter().find_map(|key| inner.get(*key)?.as_u64());
    Ok(number.map(|number| number as usize))
}
