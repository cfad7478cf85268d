//! From the text of a recipe to requests.

use std::collections::BTreeSet;
use std::f64::consts::FRAC_PI_2;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::{BadInput, Dtype};
use serde_json::Value;

use super::node::{Fields, Node, rules};
use super::sources::{self, folder};
use super::{templates, tokenizer};
use crate::method::Method;
use crate::request::{ChatTemplate, Request, Space, TokenizerSource};

/// Length of the longest recipe that is read, in bytes.
pub(super) const LONGEST: u64 = 1 << 20;

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

/// Parses the `text` of a recipe of one merge; `path` is for messages. No other file is read.
///
/// # Errors
/// [`BadInput`] that names the file and the key.
pub fn parse(text: &str, path: &Path) -> Result<Request> {
    let mut all = parse_all(text, path)?;
    let last = all.pop().expect("there is at least one");
    match all.is_empty() {
        true => Ok(last.request),
        false => Err(BadInput::new(path, "is a recipe of several merges").expected("one").into()),
    }
}

/// A recipe of one merge, with the facts to be checked against the models on disk.
pub(super) struct Recipe {
    /// Name by which other recipes of the file refer to the result.
    pub name: Option<String>,
    pub request: Request,
}

pub(super) fn too_long(path: &Path, length: u64) -> BadInput {
    BadInput::new(path, "is too long for a recipe")
        .expected(format!("{LONGEST} bytes at most"))
        .found(format!("{length} bytes"))
}

/// Parses the recipes of a file: its YAML documents, and the entries of a list or mapping
/// `merges`. A recipe comes after those it refers to, and the result of the file is the last.
pub(super) fn parse_all(text: &str, path: &Path) -> Result<Vec<Recipe>> {
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
fn in_order(mut waiting: Vec<Recipe>, path: &Path) -> Result<Vec<Recipe>> {
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
    let mut sorted: Vec<Recipe> = Vec::new();
    while !waiting.is_empty() {
        let names: Vec<String> = waiting.iter().filter_map(|recipe| recipe.name.clone()).collect();
        let waits = |recipe: &Recipe| recipe.request.paths().any(|path| result_in(&names, path).is_some());
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

fn recipe(root: &Node<'_>, name: Option<String>) -> Result<Recipe> {
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
    request.chat_template = fields.get("chat_template").map(|node| chat_template(&node)).transpose()?;
    if let Some(node) = fields.get("cpift") {
        read_extensions(&mut request, &node)?;
    }
    let name = match fields.get("name") {
        Some(node) => Some(node.text()?.to_owned()),
        None => name,
    };
    Ok(Recipe { name, request })
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

fn chat_template(node: &Node<'_>) -> Result<ChatTemplate> {
    let text = node.text()?;
    if text == "auto" {
        return Ok(ChatTemplate::Auto);
    }
    if let Some(known) = templates::named(text) {
        return Ok(ChatTemplate::Text(known.to_owned()));
    }
    if text.len() < 20 || !text.contains('{') {
        let expected = format!("auto, {}, or a Jinja template", templates::NAMES.join(", "));
        return Err(node.error("is not a chat template").expected(expected).found(node.shown()).into());
    }
    Ok(ChatTemplate::Text(text.to_owned()))
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
