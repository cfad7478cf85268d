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
mod sources;
mod tokenizer;
mod write;

pub use write::write;

use std::collections::{BTreeMap, BTreeSet};
use std::f64::consts::FRAC_PI_2;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::format::checkpoint::{model_of, read_config};
use cpift_core::format::names::layer;
use cpift_core::hub::{self, Need};
use cpift_core::{BadInput, Checkpoint, Dtype};
use serde_json::Value;

use crate::method::Method;
use crate::request::{Request, Space, TokenizerSource};
use node::{Fields, Node, rules};
use sources::folder;

/// Length of the longest recipe that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// Keys of a recipe.
const KEYS: [&str; 13] = [
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
    "cpift",
];

/// Reads the recipe of one merge at `path` and checks it against the directories it names.
///
/// # Errors
/// [`BadInput`] that names the file and the key.
pub fn read(path: &Path) -> Result<Request> {
    only(read_all(path)?, path)
}

/// Parses the `text` of a recipe of one merge; `path` is for messages. No other file is read.
///
/// # Errors
/// [`BadInput`] that names the file and the key.
pub fn parse(text: &str, path: &Path) -> Result<Request> {
    only(parse_all(text, path)?, path)
}

fn only(mut all: Vec<Step>, path: &Path) -> Result<Request> {
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
    Ok(recipes)
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
fn check(file: &Path, recipe: &mut Step, made: impl Fn(&Path) -> bool) -> Result<()> {
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

fn too_long(path: &Path, length: u64) -> BadInput {
    BadInput::new(path, "is too long for a recipe")
        .expected(format!("{LONGEST} bytes at most"))
        .found(format!("{length} bytes"))
}

/// Parses the recipes of a file: its YAML documents, and the entries of a list or mapping
/// `merges`. A recipe comes after those it refers to, and the result of the file is the last.
fn parse_all(text: &str, path: &Path) -> Result<Vec<Step>> {
    let documents = yaml(text, path)?;
    let mut recipes = Vec::new();
    for document in documents.iter().filter(|document| !document.is_null()) {
        let root = Node::root(path, document);
        if let Some(merges) = document.get("merges") {
            let merges = root.child("merges", merges);
            let entries = if merges.is_list() {
                merges.entries()?.into_iter().map(|node| (None, node)).collect()
            } else {
                merges.children()?.into_iter().map(|(name, node)| (Some(name), node)).collect::<Vec<_>>()
            };
            for (name, node) in entries {
                recipes.push(recipe(&node, name)?);
            }
        }
        if document.get("merges").is_none() || document.get("merge_method").is_some() {
            recipes.push(recipe(&root, None)?);
        }
    }
    if recipes.is_empty() {
        return Err(BadInput::new(path, "has no recipe").expected("merge_method and models").into());
    }
    in_order(recipes, path)
}

/// The merge among `names` that `path` refers to, `NAME` or `NAME+ADAPTER`, and the rest after the
/// name.
pub(crate) fn result_in<'a>(names: &'a [String], path: &'a Path) -> Option<(&'a str, &'a str)> {
    let text = path.to_str()?;
    let rest = |name: &'a String| Some((name.as_str(), text.strip_prefix(name.as_str())?));
    let found = names.iter().filter_map(rest).filter(|(_, rest)| rest.is_empty() || rest.starts_with('+'));
    found.max_by_key(|(name, _)| name.len())
}

/// Sorts recipes so that each comes after those whose results it merges, and the one without a name
/// last.
fn in_order(mut waiting: Vec<Step>, path: &Path) -> Result<Vec<Step>> {
    if waiting.len() == 1 {
        return Ok(waiting);
    }
    let mut names = BTreeSet::new();
    let twice = waiting.iter().find(|recipe| !names.insert(recipe.name.clone()));
    if let Some(recipe) = twice {
        let error = match &recipe.name {
            Some(name) => BadInput::new(path, "two merges have the same name").found(name.clone()),
            None => BadInput::new(path, "two merges have no name").expected("name: on all merges but the final one"),
        };
        return Err(error.into());
    }
    if let Some(name) = names.iter().flatten().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
        return Err(BadInput::new(path, "the name of a merge is not the name of a folder").found(name.clone()).into());
    }
    // The result is the merge without a name, or else the last one.
    let result = waiting.iter().position(|recipe| recipe.name.is_none()).unwrap_or(waiting.len() - 1);
    let result = waiting.remove(result);
    let mut sorted: Vec<Step> = Vec::new();
    while !waiting.is_empty() {
        let names: Vec<String> = waiting.iter().filter_map(|recipe| recipe.name.clone()).collect();
        let waits = |recipe: &Step| recipe.request.paths().any(|path| result_in(&names, path).is_some());
        let ready = waiting.iter().position(|recipe| !waits(recipe));
        match ready {
            Some(i) => sorted.push(waiting.remove(i)),
            None => {
                let names = waiting.iter().filter_map(|recipe| recipe.name.as_deref()).collect::<Vec<_>>().join(", ");
                return Err(BadInput::new(path, "merges that wait for one another").found(names).into());
            }
        }
    }
    let own: Vec<String> = result.name.iter().cloned().collect();
    let itself = |path: &Path| result_in(&own, path).is_some();
    if sorted.iter().any(|recipe| recipe.request.paths().any(itself)) {
        return Err(BadInput::new(path, "a merge uses the result of the file").into());
    }
    sorted.push(result);
    Ok(sorted)
}

fn recipe(root: &Node<'_>, name: Option<String>) -> Result<Step> {
    let fields = root.open_fields(&[&KEYS[..], &["merges"]].concat(), elsewhere)?;
    let method = method(&fields.require("merge_method")?)?;
    let mut request = sources::read(method, &fields)?;
    request.dtype = dtype(&fields)?;
    let base = fields.get("base_model").map(|node| folder(&node)).transpose()?;
    let base = base.or_else(|| request.base.as_deref().map(|path| path.to_string_lossy().into_owned()));
    request.tokenizer = tokenizer::read(&fields, base.as_deref())?;
    let vocabulary = match request.tokenizer.as_ref().map(|tokenizer| &tokenizer.source) {
        Some(TokenizerSource::Path(path)) => Some(path.clone()),
        _ => None,
    };
    request.side_files = vocabulary.or_else(|| base.map(PathBuf::from));
    request.chat_template = fields.get("chat_template").map(|node| tokenizer::chat_template(&node)).transpose()?;
    if let Some(node) = fields.get("cpift") {
        read_extensions(&mut request, &node)?;
    }
    let name = match fields.get("name") {
        Some(node) => Some(node.text()?.to_owned()),
        None => name,
    };
    Ok(Step { name, request })
}

/// Note on a key that mergekit ignores at this place.
fn elsewhere(key: &str) -> Option<String> {
    sources::is_parameter(key).then(|| format!("{key} is read under parameters"))
}

/// Parses YAML within bounds far above those of any real recipe.
fn yaml(text: &str, path: &Path) -> Result<Vec<Value>> {
    if text.len() as u64 > LONGEST {
        return Err(too_long(path, text.len() as u64).into());
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 32,
            max_nodes: 50_000,
            max_events: 200_000,
            max_aliases: 1000,
            max_anchors: 1000,
            max_recorded_anchor_events: 50_000,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 50_000 },
        // Otherwise y and n would be booleans; PyYAML takes them for text.
        strict_booleans: true,
        with_snippet: false,
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|e| {
        // This part of the message is meant for programmers.
        let problem = e.to_string().replace(", set DuplicateKeyPolicy in Options if acceptable", "");
        BadInput::new(path, format!("is not valid YAML: {problem}")).into()
    })
}

fn method(node: &Node<'_>) -> Result<Method> {
    let name = node.text()?;
    let known = || Method::ALL.map(Method::recipe_name).join(", ");
    let found = Method::ALL.into_iter().find(|m| m.recipe_name() == name);
    found.ok_or_else(|| node.error("is not a method that is supported").expected(known()).found(node.shown()).into())
}

/// Dtype of the output: `out_dtype`, or else `dtype`, which in mergekit is also that of the
/// arithmetic.
fn dtype(fields: &Fields<'_>) -> Result<Option<Dtype>> {
    let read = |key: &str| fields.get(key).map(|node| dtype_of(&node)).transpose();
    let (dtype, out) = (read("dtype")?, read("out_dtype")?);
    Ok(out.or(dtype))
}

fn dtype_of(node: &Node<'_>) -> Result<Dtype> {
    let name = node.text()?;
    let all = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64];
    let bare = name.strip_prefix("torch.").unwrap_or(name);
    let found = all.into_iter().find(|dtype| dtype.torch_name() == Some(bare));
    let known = || all.iter().filter_map(|d| d.torch_name()).collect::<Vec<_>>().join(", ");
    found.ok_or_else(|| node.error("is not a dtype for weights").expected(known()).found(node.shown()).into())
}

/// Reads the keys under `cpift` of the whole recipe, for settings that mergekit does not have.
fn read_extensions(request: &mut Request, node: &Node<'_>) -> Result<()> {
    let mut known = vec!["protect", "mask"];
    if request.method.is_spherical() {
        known.extend(["epsilon", "space", "base"]);
    }
    if request.method.draws() {
        known.push("seed");
    }
    let fields = node.fields(&known, |_| None)?;
    request.protect = path(&fields, "protect")?;
    request.within = path(&fields, "mask")?;
    if let Some(node) = fields.get("seed") {
        request.seed = node.count()? as u64;
        request.slices.iter_mut().for_each(|slice| slice.request.seed = request.seed);
    }
    if let Some(node) = fields.get("epsilon") {
        request.epsilon = *rules(&node, &(0.0..=FRAC_PI_2))?.single().get_or_insert(request.epsilon);
    }
    if let Some(node) = fields.get("space") {
        let found = [Space::Weights, Space::Delta].into_iter().find(|space| node.text().ok() == Some(space.name()));
        request.space = found.ok_or_else(|| node.error("has a value of the wrong type").expected("weights, delta"))?;
    }
    if let Some(base) = path(&fields, "base")? {
        request.base = Some(base);
    }
    Ok(())
}

fn path(fields: &Fields<'_>, key: &str) -> Result<Option<PathBuf>> {
    fields.get(key).map(|node| folder(&node).map(PathBuf::from)).transpose()
}
