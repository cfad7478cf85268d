//! mergekit's YAML, for the methods we share: read strictly, so that nothing in the file passes unseen.
//!
//! Settings mean what they mean to mergekit 0.1.5. The parameters of a model come before those of its slice, and those
//! before the recipe's own; in each, the first entry whose filter is a part of the tensor's name counts. A list of
//! numbers is spread over the layers, and tensors outside the layers get its first number.
//!
//! What mergekit has no key for stands under `cpift`, which it passes over: see [`write`].

mod disk;
mod extensions;
mod inputs;
mod node;
mod settings;
mod write;

pub use write::write;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::{BadInput, Dtype};
use serde_json::Value;

use crate::request::{Method, ModelRequest, Request};
use crate::setting::Setting;
use inputs::{Inputs, ONE_SLICE, folder, inputs};
use node::{Fields, Node};
use settings::{Scope, flag, of_all, setting};

/// Longest recipe that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// The keys of a recipe.
const KEYS: [&str; 10] = [
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "cpift",
];

/// Reads the recipe at `path` and checks it against the folders it names.
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
    disk::check(path, &recipe)?;
    Ok(recipe.request)
}

/// Reads a recipe's `text`; `path` is for messages. No other file is looked at.
///
/// # Errors
/// [`BadInput`] that names the file and the key.
pub fn parse(text: &str, path: &Path) -> Result<Request> {
    Ok(parse_recipe(text, path)?.request)
}

/// A recipe, and what remains to be checked against the models on disk.
struct Recipe {
    request: Request,
    /// Number of layers its slices cover.
    layers: Option<usize>,
    /// The folder whose vocabulary all models must have.
    vocabulary: Option<PathBuf>,
}

fn too_long(path: &Path, length: u64) -> BadInput {
    BadInput::new(path, "is too long for a recipe")
        .expected(format!("{LONGEST} bytes at most"))
        .found(format!("{length} bytes"))
}

fn parse_recipe(text: &str, path: &Path) -> Result<Recipe> {
    let value = yaml(text, path)?;
    let root = Node::root(path, &value);
    let fields = root.fields(&KEYS, unsupported_key)?;
    let method = method(&fields.require("merge_method")?)?;
    let inputs = inputs(method, &fields)?;
    let base = base(&fields, &inputs)?;
    if base.is_none() && (method.needs_base() || method == Method::Slerp) {
        return Err(root.error(&format!("{} needs a base_model", method.recipe_name())).into());
    }
    let global = of_all(method, &fields)?;
    let mut request = Request::new(method);
    request.models = models(method, &inputs, base, &global)?;
    request.base = base.filter(|_| method.needs_base()).map(PathBuf::from);
    request.dtype = dtype(&fields)?;
    shared_parameters(&mut request, &[&inputs.slice, &global])?;
    check_count(&root, &request, base)?;
    if let Some(slices) = inputs.slices.filter(|slices| slices.count > 1) {
        refuse_gradients(&root, &request, slices.count)?;
    }
    let vocabulary = tokenizer(&fields, base)?.map(PathBuf::from);
    request.side_files = vocabulary.clone().or_else(|| base.map(PathBuf::from));
    if let Some(node) = fields.get("cpift") {
        extensions::of_all(&mut request, &node)?;
    }
    Ok(Recipe { request, layers: inputs.slices.map(|slices| slices.layers), vocabulary })
}

/// The text as a tree, within bounds that no honest recipe comes near.
fn yaml(text: &str, path: &Path) -> Result<Value> {
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
        // Else y and n, which PyYAML takes for text, would be booleans.
        strict_booleans: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| {
        // The reader's advice to its programmer.
        let problem = e.to_string().replace(", set DuplicateKeyPolicy in Options if acceptable", "");
        BadInput::new(path, format!("is not YAML that can be read: {problem}")).into()
    })
}

fn unsupported_key(key: &str) -> Option<String> {
    let hint = match key {
        "modules" => "models of several modules are not supported",
        "chat_template" => "the output gets the chat template of its tokenizer: name that folder as tokenizer_source",
        _ => return None,
    };
    Some(hint.to_owned())
}

fn method(node: &Node<'_>) -> Result<Method> {
    let name = node.text()?;
    let known = || Method::ALL.map(Method::recipe_name).join(", ");
    let found = Method::ALL.into_iter().find(|m| m.recipe_name() == name);
    found.ok_or_else(|| node.error("is not a method that is supported").expected(known()).found(node.shown()).into())
}

/// The base: of the recipe or, as mergekit has it, of the slices.
fn base<'a>(fields: &Fields<'a>, inputs: &Inputs<'a>) -> Result<Option<&'a str>> {
    let global = fields.get("base_model").map(|node| folder(&node)).transpose()?;
    Ok(inputs.base.or(global))
}

/// The models in the order of the request: that of the file, but a base that is merged like the others comes first,
/// for it gives config.json.
fn models(method: Method, inputs: &Inputs<'_>, base: Option<&str>, global: &Scope<'_>) -> Result<Vec<ModelRequest>> {
    let mut models = Vec::new();
    for input in &inputs.models {
        let is_base = base == Some(input.path);
        if is_base && method.needs_base() {
            if let Some(own) = &input.own {
                log::warn!("{}", own.node().error("has no effect: the base is what differences are taken from"));
            }
            continue;
        }
        let mut model = model(method, &input.node, input.path, &[&input.own, &inputs.slice, global])?;
        if let Some(node) = &input.ours {
            extensions::of_model(method, &mut model, node)?;
        }
        models.insert(if is_base { 0 } else { models.len() }, model);
    }
    if let Some(base) = base.filter(|_| !method.needs_base() && inputs.slices.is_none()) {
        // mergekit adds a base that is not listed to the models.
        if models.iter().all(|model| model.path != Path::new(base)) {
            let node = inputs.models[0].node.clone();
            models.insert(0, model(method, &node, base, &[global])?);
        }
    }
    Ok(models)
}

fn model(method: Method, node: &Node<'_>, path: &str, scopes: &[&Scope<'_>]) -> Result<ModelRequest> {
    let mut model = ModelRequest::new(path);
    if !matches!(method, Method::Slerp | Method::SphericalMean) {
        model.weight = setting(scopes, "weight", f64::MIN..=f64::MAX)?;
        if model.weight.is_empty() {
            let message = format!("no weight for the model {path}");
            return Err(node.error(&message).expected("parameters: {weight: ...} of it or of all").into());
        }
    }
    if method.has_density() {
        model.density = setting(scopes, "density", 0.0..=1.0)?;
        model.density.append(Setting::constant(1.0));
    }
    Ok(model)
}

fn shared_parameters(request: &mut Request, scopes: &[&Scope<'_>]) -> Result<()> {
    if request.method == Method::Slerp {
        request.t = setting(scopes, "t", 0.0..=1.0)?;
    }
    if request.method.needs_base() {
        request.lambda = setting(scopes, "lambda", f64::MIN..=f64::MAX)?;
        request.lambda.append(Setting::constant(1.0));
    }
    request.normalize = flag(scopes, "normalize")?.unwrap_or(request.normalize);
    request.rescale = flag(scopes, "rescale")?.unwrap_or(request.rescale);
    if flag(scopes, "int8_mask")?.is_some() {
        log::info!("int8_mask has no effect: masks are never held whole here");
    }
    if request.method == Method::SphericalMean {
        // The mean on the sphere is taken at any angle, as mergekit does.
        request.epsilon = epsilon(request.method);
        // The mean is always taken to the last digit: mergekit may be asked for more than it does unasked, not for less.
        setting(scopes, "max_iter", 10.0..=1e9)?;
        setting(scopes, "tol", 0.0..=1e-5)?;
    }
    Ok(())
}

/// The angle below which interpolation is linear, where the recipe says nothing.
fn epsilon(method: Method) -> f64 {
    if method == Method::SphericalMean { 0.0 } else { Request::new(method).epsilon }
}

fn check_count(root: &Node<'_>, request: &Request, base: Option<&str>) -> Result<()> {
    let (method, models) = (request.method, request.models.len());
    let name = method.recipe_name();
    if method == Method::Slerp {
        if models != 2 || request.models[0].path != Path::new(base.unwrap_or_default()) {
            let error = root.error("slerp merges base_model (t = 0) and one other model (t = 1)");
            return Err(error.found(format!("{models} models, base_model {}", base.unwrap_or_default())).into());
        }
        if request.t.is_empty() {
            return Err(root.error("slerp needs a parameter").expected("parameters: {t: ...}").into());
        }
    }
    let least = if method.needs_base() { 1 } else { 2 };
    if models < least {
        let error = root.error(&format!("{name} merges at least {least} models besides any base_model"));
        return Err(error.found(models.to_string()).into());
    }
    Ok(())
}

fn refuse_gradients(root: &Node<'_>, request: &Request, slices: usize) -> Result<()> {
    let of_models = request.models.iter().flat_map(|m| [&m.weight, &m.density]);
    let gradient = |setting: &Setting| setting.rules().iter().any(|rule| rule.values.len() > 1);
    if ![&request.t, &request.lambda].into_iter().chain(of_models).any(gradient) {
        return Ok(());
    }
    Err(root.error(&format!("a gradient over {slices} slices is not supported")).hint(ONE_SLICE).into())
}

/// The dtype of the output: `out_dtype`, or else `dtype`, which to mergekit is also that of its arithmetic.
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

/// The folder that gives the tokenizer, where the recipe names one.
fn tokenizer<'a>(fields: &Fields<'a>, base: Option<&'a str>) -> Result<Option<&'a str>> {
    let source = match (fields.get("tokenizer_source"), fields.get("tokenizer")) {
        (Some(_), Some(node)) => return Err(node.error("stands beside tokenizer_source").into()),
        (source, None) => source,
        (None, Some(node)) => {
            let embeddings = |key: &str| {
                let known = matches!(key, "tokens" | "pad_to_multiple_of");
                known.then(|| "embeddings are merged as they are, row by row".to_owned())
            };
            Some(node.fields(&["source"], embeddings)?.require("source")?)
        }
    };
    let Some(node) = source else { return Ok(None) };
    match (folder(&node)?, base) {
        ("union", _) => Err(node.error("a union of vocabularies is not supported").expected("base or a folder").into()),
        ("base", None) => Err(node.error("there is no base_model").found("base").into()),
        ("base", base) => Ok(base),
        (path, _) => Ok(Some(path)),
    }
}
