//! The models of a recipe, whether it lists `models` or `slices`.

use std::ops::Range;

use anyhow::{Error, Result};

use super::node::{Fields, Node};
use super::settings::{Scope, of_all, of_model};
use crate::request::Method;

/// A model with the parameters that are its own.
pub(super) struct Input<'a> {
    /// Where it is written.
    pub node: Node<'a>,
    /// Its folder as written.
    pub path: &'a str,
    /// Its own parameters.
    pub own: Scope<'a>,
    /// What it has of ours beside them.
    pub ours: Option<Node<'a>>,
}

/// All models and what holds for them together.
pub(super) struct Inputs<'a> {
    /// The models, in the order of the file.
    pub models: Vec<Input<'a>>,
    /// Parameters of the one slice; none in a list of models.
    pub slice: Scope<'a>,
    /// The base, where a slice names it.
    pub base: Option<&'a str>,
    /// What the slices cover; nothing is known of a list of models.
    pub slices: Option<Slices>,
}

/// How the layers are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slices {
    /// Number of slices.
    pub count: usize,
    /// Number of layers in all of them together.
    pub layers: usize,
}

/// The models under `models` or `slices`, exactly one of which must be there.
pub(super) fn inputs<'a>(method: Method, recipe: &Fields<'a>) -> Result<Inputs<'a>> {
    match (recipe.get("models"), recipe.get("slices")) {
        (Some(models), None) => {
            let models = distinct(models.entries()?.iter().map(|node| model(method, node)).collect::<Result<_>>()?)?;
            Ok(Inputs { models, slice: None, base: None, slices: None })
        }
        (None, Some(slices)) => of_slices(method, &slices.entries()?),
        (Some(_), Some(slices)) => Err(slices.error("stands beside models").expected("one of the two").into()),
        (None, None) => Err(recipe.node().error("a key is missing").expected("models or slices").into()),
    }
}

fn model<'a>(method: Method, node: &Node<'a>) -> Result<Input<'a>> {
    input(method, node, &node.fields(&["model", "parameters", "cpift"], |_| None)?)
}

fn input<'a>(method: Method, node: &Node<'a>, fields: &Fields<'a>) -> Result<Input<'a>> {
    let path = folder(&fields.require("model")?)?;
    Ok(Input { node: node.clone(), path, own: of_model(method, fields)?, ours: fields.get("cpift") })
}

/// A model's folder as written.
pub(super) fn folder<'a>(node: &Node<'a>) -> Result<&'a str> {
    if node.is_mapping() {
        return Err(node.error("is a mapping").expected("the path of a folder").found(node.shown()).into());
    }
    node.text()
}

fn distinct(models: Vec<Input<'_>>) -> Result<Vec<Input<'_>>> {
    for (i, model) in models.iter().enumerate() {
        if models[..i].iter().any(|other| other.path == model.path) {
            return Err(model.node.error("is listed twice").found(model.path).into());
        }
    }
    Ok(models)
}

/// Slices that together are the whole models, layer by layer.
fn of_slices<'a>(method: Method, slices: &[Node<'a>]) -> Result<Inputs<'a>> {
    let mut whole: Option<Inputs<'a>> = None;
    let mut layers = 0;
    for node in slices {
        let slice = slice(method, node, &mut layers)?;
        if slices.len() > 1 {
            refuse_own_parameters(&slice)?;
        }
        match &whole {
            None => whole = Some(slice),
            Some(first) => check_same_models(node, first, &slice)?,
        }
    }
    let mut whole = whole.expect("a list of slices has at least one");
    whole.slices = Some(Slices { count: slices.len(), layers });
    Ok(whole)
}

/// One slice, which must begin at layer `next`; moves `next` behind it.
fn slice<'a>(method: Method, node: &Node<'a>, next: &mut usize) -> Result<Inputs<'a>> {
    let unsupported = |key: &str| (key == "residual_weight").then(|| "layers are merged whole".to_owned());
    let fields = node.fields(&["sources", "base_model", "parameters"], unsupported)?;
    let sources = fields.require("sources")?.entries()?;
    let mut end = None;
    let mut models = Vec::new();
    for source in &sources {
        let fields = source.fields(&["model", "layer_range", "parameters", "cpift"], |_| None)?;
        let node = fields.require("layer_range")?;
        let range = layer_range(&node)?;
        if range.start != *next || range.end != *end.get_or_insert(range.end) {
            return Err(frankenmerge(&node, *next, end));
        }
        models.push(input(method, source, &fields)?);
    }
    *next = end.unwrap_or(*next);
    let base = fields.get("base_model").map(|node| folder(&node)).transpose()?;
    Ok(Inputs { models: distinct(models)?, slice: of_all(method, &fields)?, base, slices: None })
}

fn layer_range(node: &Node<'_>) -> Result<Range<usize>> {
    let ends = node.entries()?.iter().map(Node::count).collect::<Result<Vec<_>>>()?;
    match ends[..] {
        [start, end] if start < end => Ok(start..end),
        _ => Err(node.error("is not a range").expected("[FIRST, LAST + 1]").found(node.shown()).into()),
    }
}

fn frankenmerge(node: &Node<'_>, start: usize, end: Option<usize>) -> Error {
    let end = end.map_or("...".to_owned(), |end| end.to_string());
    node.error("takes layers from another place than they go to, which is not supported (a frankenmerge)")
        .expected(format!("[{start}, {end}]: every layer once, in order, the same of every source"))
        .found(node.shown())
        .into()
}

/// Over several slices mergekit starts every gradient anew, and embeddings belong to one of them.
fn refuse_own_parameters(slice: &Inputs<'_>) -> Result<()> {
    let scopes = slice.models.iter().map(|model| &model.own).chain([&slice.slice]);
    match scopes.flatten().next() {
        None => Ok(()),
        Some(own) => {
            Err(own.node().error("parameters of one of several slices are not supported").hint(ONE_SLICE).into())
        }
    }
}

/// What to do about several slices.
pub(super) const ONE_SLICE: &str = "write one slice with all layers, and filters such as layers.0. for some of them";

fn check_same_models(node: &Node<'_>, first: &Inputs<'_>, slice: &Inputs<'_>) -> Result<()> {
    let models = |inputs: &Inputs<'_>| inputs.models.iter().map(|m| m.path.to_owned()).collect::<Vec<_>>();
    if models(first) == models(slice) && first.base == slice.base {
        return Ok(());
    }
    Err(node
        .error("has other models than the first slice, which is not supported (a frankenmerge)")
        .expected(models(first).join(", "))
        .found(models(slice).join(", "))
        .into())
}
