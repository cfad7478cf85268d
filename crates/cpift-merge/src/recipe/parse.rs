//! From the text of a recipe to a request.

use std::f64::consts::FRAC_PI_2;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result};
use cpift_core::{BadInput, Dtype};
use serde_json::Value;

use super::node::{Fields, Node, Scope, flag, rules, setting};
use crate::request::{Method, ModelRequest, Request, Space};
use crate::setting::Setting;

/// Length of the longest recipe that is read, in bytes.
pub(super) const LONGEST: u64 = 1 << 20;

/// Keys of a recipe.
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

/// Parses the `text` of a recipe; `path` is for messages. No other file is read.
///
/// # Errors
/// [`BadInput`] that names the file and the key.
pub fn parse(text: &str, path: &Path) -> Result<Request> {
    Ok(parse_recipe(text, path)?.request)
}

/// A recipe, with the facts to be checked against the models on disk.
pub(super) struct Recipe {
    pub request: Request,
    /// Number of layers that its slices cover.
    pub layers: Option<usize>,
    /// Directory whose vocabulary all models must have.
    pub vocabulary: Option<PathBuf>,
}

pub(super) fn too_long(path: &Path, length: u64) -> BadInput {
    BadInput::new(path, "is too long for a recipe")
        .expected(format!("{LONGEST} bytes at most"))
        .found(format!("{length} bytes"))
}

pub(super) fn parse_recipe(text: &str, path: &Path) -> Result<Recipe> {
    let value = yaml(text, path)?;
    let root = Node::root(path, &value);
    let fields = root.fields(&KEYS, unsupported_key)?;
    let method = method(&fields.require("merge_method")?)?;
    let inputs = inputs(method, &fields)?;
    let base = base(&fields, &inputs)?;
    if base.is_none() && (method.needs_base() || method == Method::Slerp) {
        return Err(root.error(&format!("{} needs a base_model", method.recipe_name())).into());
    }
    let global = all_parameters(method, &fields)?;
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
        read_extensions(&mut request, &node)?;
    }
    Ok(Recipe { request, layers: inputs.slices.map(|slices| slices.layers), vocabulary })
}

/// Parses YAML within bounds far above those of any real recipe.
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
        // Otherwise y and n would be booleans; PyYAML takes them for text.
        strict_booleans: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| {
        // This part of the message is meant for programmers.
        let problem = e.to_string().replace(", set DuplicateKeyPolicy in Options if acceptable", "");
        BadInput::new(path, format!("is not valid YAML: {problem}")).into()
    })
}

fn unsupported_key(key: &str) -> Option<String> {
    let hint = match key {
        "modules" => "models of several modules are not supported",
        "chat_template" => "the output gets the chat template of its tokenizer: name its directory as tokenizer_source",
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

/// Base of the slices or else of the recipe, as in mergekit.
fn base<'a>(fields: &Fields<'a>, inputs: &Inputs<'a>) -> Result<Option<&'a str>> {
    let global = fields.get("base_model").map(|node| folder(&node)).transpose()?;
    Ok(inputs.base.or(global))
}

/// Models in the order of the request: that of the file, except that a base that is merged like the
/// others comes first, because it gives config.json.
fn models(method: Method, inputs: &Inputs<'_>, base: Option<&str>, global: &Scope<'_>) -> Result<Vec<ModelRequest>> {
    let mut models = Vec::new();
    for input in &inputs.models {
        let is_base = base == Some(input.path);
        if is_base && method.needs_base() {
            if let Some(own) = &input.own {
                log::warn!(
                    "{}",
                    own.node().error("has no effect: the base is not merged, differences are taken from it")
                );
            }
            continue;
        }
        let mut model = model(method, &input.node, input.path, &[&input.own, &inputs.slice, global])?;
        if let Some(node) = &input.extensions {
            read_model_extensions(method, &mut model, node)?;
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
        log::info!("int8_mask has no effect: cpift-merge holds no masks of whole tensors in memory");
    }
    if request.method == Method::SphericalMean {
        // The mean is always computed to full precision: settings that ask for at least mergekit's
        // default are accepted.
        setting(scopes, "max_iter", 10.0..=1e9)?;
        setting(scopes, "tol", 0.0..=1e-5)?;
    }
    Ok(())
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

/// Directory that gives the tokenizer, if the recipe names one.
fn tokenizer<'a>(fields: &Fields<'a>, base: Option<&'a str>) -> Result<Option<&'a str>> {
    let source = match (fields.get("tokenizer_source"), fields.get("tokenizer")) {
        (Some(_), Some(node)) => return Err(node.error("cannot be given together with tokenizer_source").into()),
        (source, None) => source,
        (None, Some(node)) => {
            let embeddings = |key: &str| {
                let known = matches!(key, "tokens" | "pad_to_multiple_of");
                known.then(|| "embeddings are merged unchanged, row by row".to_owned())
            };
            Some(node.fields(&["source"], embeddings)?.require("source")?)
        }
    };
    let Some(node) = source else { return Ok(None) };
    match (folder(&node)?, base) {
        ("union", _) => {
            Err(node.error("a union of vocabularies is not supported").expected("base or a directory").into())
        }
        ("base", None) => Err(node.error("there is no base_model").found("base").into()),
        ("base", base) => Ok(base),
        (path, _) => Ok(Some(path)),
    }
}

/// A model of the recipe with its own parameters.
struct Input<'a> {
    /// Its place in the file.
    pub node: Node<'a>,
    /// Its directory as written.
    pub path: &'a str,
    /// Its own parameters.
    pub own: Scope<'a>,
    /// Its keys under `cpift`.
    pub extensions: Option<Node<'a>>,
}

/// All models of the recipe, with the settings of `slices`.
struct Inputs<'a> {
    /// Models in the order of the file.
    pub models: Vec<Input<'a>>,
    /// Parameters of the slice, if there is exactly one.
    pub slice: Scope<'a>,
    /// Base, if a slice names it.
    pub base: Option<&'a str>,
    /// Layers that the slices cover; `None` for a list of models.
    pub slices: Option<Slices>,
}

/// Partition of the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slices {
    /// Number of slices.
    pub count: usize,
    /// Number of layers of all slices.
    pub layers: usize,
}

/// The models under `models` or `slices`, exactly one of which must be present.
fn inputs<'a>(method: Method, recipe: &Fields<'a>) -> Result<Inputs<'a>> {
    match (recipe.get("models"), recipe.get("slices")) {
        (Some(models), None) => {
            let models = distinct(models.entries()?.iter().map(|node| listed(method, node)).collect::<Result<_>>()?)?;
            Ok(Inputs { models, slice: None, base: None, slices: None })
        }
        (None, Some(slices)) => of_slices(method, &slices.entries()?),
        (Some(_), Some(slices)) => {
            Err(slices.error("cannot be given together with models").expected("one of the two").into())
        }
        (None, None) => Err(recipe.node().error("a key is missing").expected("models or slices").into()),
    }
}

fn listed<'a>(method: Method, node: &Node<'a>) -> Result<Input<'a>> {
    input(method, node, &node.fields(&["model", "parameters", "cpift"], |_| None)?)
}

fn input<'a>(method: Method, node: &Node<'a>, fields: &Fields<'a>) -> Result<Input<'a>> {
    let path = folder(&fields.require("model")?)?;
    Ok(Input { node: node.clone(), path, own: model_parameters(method, fields)?, extensions: fields.get("cpift") })
}

/// Directory of a model as written.
fn folder<'a>(node: &Node<'a>) -> Result<&'a str> {
    if node.is_mapping() {
        return Err(node.error("is a mapping").expected("the path of a directory").found(node.shown()).into());
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

/// The models under `slices`, which together must cover every layer in order.
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

/// One slice, which must begin at layer `next`; sets `next` to the layer after it.
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
    Ok(Inputs { models: distinct(models)?, slice: all_parameters(method, &fields)?, base, slices: None })
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
    node.error("moves layers to another position, which is not supported (a frankenmerge)")
        .expected(format!("[{start}, {end}]: every layer once, in order, and the same layers of every source"))
        .found(node.shown())
        .into()
}

/// Refuses parameters of one of several slices: mergekit restarts every gradient at each slice, and
/// assigns the embeddings to one of them.
fn refuse_own_parameters(slice: &Inputs<'_>) -> Result<()> {
    let scopes = slice.models.iter().map(|model| &model.own).chain([&slice.slice]);
    match scopes.flatten().next() {
        None => Ok(()),
        Some(own) => {
            Err(own.node().error("parameters of one of several slices are not supported").hint(ONE_SLICE).into())
        }
    }
}

/// Hint for recipes with several slices.
const ONE_SLICE: &str = "write one slice with all layers, and filters such as layers.0. for some of them";

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

/// Parameters of the merge as a whole.
fn shared(method: Method) -> &'static [&'static str] {
    match method {
        Method::Linear => &["normalize"],
        Method::Slerp => &["t"],
        Method::SphericalMean => &["max_iter", "tol"],
        Method::TaskArithmetic => &["lambda", "normalize", "int8_mask"],
        Method::Ties | Method::DareLinear | Method::DareTies => &["lambda", "normalize", "rescale", "int8_mask"],
    }
}

/// Parameters that each model may have.
fn of_models(method: Method) -> &'static [&'static str] {
    match method {
        Method::Slerp | Method::SphericalMean => &[],
        Method::Linear | Method::TaskArithmetic => &["weight"],
        Method::Ties | Method::DareLinear | Method::DareTies => &["weight", "density"],
    }
}

/// The `parameters` of one model, next to `fields`.
fn model_parameters<'a>(method: Method, fields: &Fields<'a>) -> Result<Scope<'a>> {
    let elsewhere = |key: &str| {
        let all = shared(method).contains(&key);
        all.then(|| format!("{key} applies to the whole merge: write it under the recipe's own parameters"))
            .or_else(|| methods_with(key))
    };
    fields.get("parameters").map(|node| node.fields(of_models(method), elsewhere)).transpose()
}

/// The `parameters` of the whole recipe or of a slice, next to `fields`.
fn all_parameters<'a>(method: Method, fields: &Fields<'a>) -> Result<Scope<'a>> {
    let known = [of_models(method), shared(method)].concat();
    fields.get("parameters").map(|node| node.fields(&known, methods_with)).transpose()
}

/// Sentence with the methods that have the parameter `key`, if any.
fn methods_with(key: &str) -> Option<String> {
    let has = |m: &Method| shared(*m).contains(&key) || of_models(*m).contains(&key);
    let names: Vec<&str> = Method::ALL.into_iter().filter(has).map(Method::recipe_name).collect();
    (!names.is_empty()).then(|| format!("{key} is a parameter of {}", names.join(", ")))
}

/// Reads the keys under `cpift` of the whole recipe, for settings that mergekit does not have.
fn read_extensions(request: &mut Request, node: &Node<'_>) -> Result<()> {
    let known: &[&str] = match request.method {
        Method::Slerp | Method::SphericalMean => &["protect", "epsilon", "space", "base"],
        Method::DareLinear | Method::DareTies => &["protect", "seed"],
        _ => &["protect"],
    };
    let fields = node.fields(known, |_| None)?;
    request.protect = path(&fields, "protect")?;
    if let Some(node) = fields.get("seed") {
        request.seed = node.count()? as u64;
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

/// Reads the keys under `cpift` of a model.
fn read_model_extensions(method: Method, model: &mut ModelRequest, node: &Node<'_>) -> Result<()> {
    let known: &[&str] = if method == Method::SphericalMean { &["mask", "weight"] } else { &["mask"] };
    let fields = node.fields(known, |_| None)?;
    model.mask = path(&fields, "mask")?;
    if let Some(node) = fields.get("weight") {
        model.weight = rules(&node, &(0.0..=f64::MAX))?;
    }
    Ok(())
}

fn path(fields: &Fields<'_>, key: &str) -> Result<Option<PathBuf>> {
    fields.get(key).map(|node| folder(&node).map(PathBuf::from)).transpose()
}
