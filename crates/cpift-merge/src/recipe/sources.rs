//! The inputs of a recipe: `models`, `slices` or `modules`, with the parameters of each.

use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::node::{Fields, Node, Scope, flag, rules, setting};
use crate::method::{Base, Method, Parameter};
use crate::request::{ModelRequest, Request, Slice, Values};
use crate::setting::Setting;

const ANY: RangeInclusive<f64> = f64::MIN..=f64::MAX;

/// Models of a merge or of one of its slices.
struct Block<'a> {
    /// Place in the file.
    node: Node<'a>,
    inputs: Vec<Input<'a>>,
    base: Option<String>,
    /// Parameters that all models share, those of the innermost scope first.
    scopes: Vec<Scope<'a>>,
}

/// A model with its own parameters.
struct Input<'a> {
    node: Node<'a>,
    path: String,
    own: Scope<'a>,
    extensions: Option<Node<'a>>,
    /// Layers that are taken, in a slice.
    layers: Range<usize>,
}

/// Reads the inputs of a recipe by `method` and all parameters.
///
/// # Errors
/// [`cpift_core::BadInput`] that names the file and the key.
pub(super) fn read(method: Method, recipe: &Fields<'_>) -> Result<Request> {
    let base = recipe.get("base_model").map(|node| folder(&node)).transpose()?;
    let mut scopes = vec![parameters(method, recipe, true)?];
    let module = recipe.get("modules").map(|node| module(method, &node)).transpose()?;
    if let Some(fields) = &module {
        scopes.insert(0, parameters(method, fields, true)?);
    }
    let inputs = module.as_ref().unwrap_or(recipe);
    let given = ["models", "slices"].map(|key| inputs.get(key));
    if module.is_some() && ["models", "slices"].iter().any(|key| recipe.get(key).is_some()) {
        return Err(recipe.node().error("modules cannot be given together with models or slices").into());
    }
    match given {
        [Some(models), None] => {
            let inputs = models.entries()?.iter().map(|node| input(method, node, false)).collect::<Result<_>>()?;
            let block = Block { node: recipe.node().clone(), inputs: distinct(inputs)?, base, scopes };
            block.request(method, true)
        }
        [None, Some(slices)] => of_slices(method, &slices.entries()?, base.as_deref(), &scopes),
        [Some(_), Some(slices)] => {
            Err(slices.error("cannot be given together with models").expected("one of the two").into())
        }
        [None, None] => Err(inputs.node().error("a key is missing").expected("models or slices").into()),
    }
}

/// The module that is merged: the only one, or the first of several that are alike.
fn module<'a>(method: Method, node: &Node<'a>) -> Result<Fields<'a>> {
    let modules = node.children()?;
    let Some((_, first)) = modules.first() else {
        return Err(node.error("has no module").expected("one with models or slices").into());
    };
    if modules.len() > 1 {
        let whole = |(_, module): &(String, Node<'_>)| module.value().get("slices").is_none();
        if !modules.iter().all(whole) || modules.iter().any(|(_, module)| module.value() != first.value()) {
            let names = modules.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            let error = node.error("modules that are merged differently are not supported");
            return Err(error.found(names).hint("filters such as visual. set parameters for one of them").into());
        }
    }
    let _ = method;
    first.open_fields(&["models", "slices", "parameters"], |_| None)
}

fn of_slices(method: Method, nodes: &[Node<'_>], base: Option<&str>, scopes: &[Scope<'_>]) -> Result<Request> {
    let mut slices = Vec::new();
    for node in nodes {
        let unused = |key: &str| (key == "residual_weight").then(|| "mergekit does not use it".to_owned());
        let fields = node.open_fields(&["sources", "base_model", "parameters"], unused)?;
        let sources = fields.require("sources")?.entries()?;
        let inputs = sources.iter().map(|source| input(method, source, true)).collect::<Result<Vec<_>>>()?;
        let length = inputs[0].layers.len();
        if let Some(other) = inputs.iter().find(|input| input.layers.len() != length) {
            let error = other.node.error("takes another number of layers than the first source of the slice");
            return Err(error.expected(length.to_string()).found(other.layers.len().to_string()).into());
        }
        let own = fields.get("base_model").map(|node| folder(&node)).transpose()?;
        let base = own.or_else(|| base.map(str::to_owned));
        let scopes = [parameters(method, &fields, true)?].into_iter().chain(scopes.iter().cloned()).collect();
        let block = Block { node: node.clone(), inputs: distinct(inputs)?, base: base.clone(), scopes };
        let request = block.request(method, false)?;
        let range = |path: &Path| {
            let of_path = block.inputs.iter().find(|input| Path::new(&input.path) == path);
            of_path.map(|input| input.layers.clone())
        };
        let layers = request.models.iter().map(|m| range(&m.path).expect("a source of the slice")).collect();
        let base_layers = request.base.as_deref().and_then(range);
        if request.base.is_some() && base_layers.is_none() {
            let error = node.error("the base_model must be among the sources, for its layers");
            return Err(error.expected(base.unwrap_or_default()).into());
        }
        slices.push(Slice { request, layers, base_layers });
    }
    if let Some(slice) = slices.iter().find(|slice| slice.request.base != slices[0].request.base) {
        let found = slice.request.base.as_deref().unwrap_or(Path::new("")).display().to_string();
        return Err(nodes[0].error("slices with different bases are not supported").found(found).into());
    }
    let mut whole = slices[0].request.clone();
    for model in slices[1..].iter().flat_map(|slice| &slice.request.models) {
        if whole.models.iter().all(|m| m.path != model.path) {
            whole.models.push(model.clone());
        }
    }
    // The base gives config.json.
    if let Some(at) = base.and_then(|base| whole.models.iter().position(|m| m.path == Path::new(base))) {
        let model = whole.models.remove(at);
        whole.models.insert(0, model);
    }
    whole.slices = slices;
    Ok(whole)
}

impl Block<'_> {
    /// The request for these inputs. A base that is merged like the others comes first, because it
    /// gives config.json; with `add_base` it is added if it is not listed, as in mergekit.
    fn request(&self, method: Method, add_base: bool) -> Result<Request> {
        let base = self.base.as_deref();
        if base.is_none() && (method.needs_base() || method == Method::Slerp) {
            return Err(self.node.error(&format!("{} needs a base_model", method.recipe_name())).into());
        }
        let mut request = Request::new(method);
        for input in &self.inputs {
            let is_base = base == Some(input.path.as_str());
            if is_base && method.base() != Base::Model {
                if let Some(own) = &input.own {
                    let why = "has no effect: the base is not merged, differences are taken from it";
                    log::warn!("{}", own.node().error(why));
                }
                continue;
            }
            let mut model = self.model(method, &input.node, &input.path, &input.own)?;
            if let Some(node) = &input.extensions {
                read_model_extensions(method, &mut model, node)?;
            }
            request.models.insert(if is_base { 0 } else { request.models.len() }, model);
        }
        match base {
            Some(base) if method.base() != Base::Model => request.base = Some(PathBuf::from(base)),
            Some(base) if add_base && request.models.iter().all(|model| model.path != Path::new(base)) => {
                let node = &self.inputs[0].node;
                request.models.insert(0, self.model(method, node, base, &None)?);
            }
            _ => {}
        }
        self.add_shared(&mut request)?;
        self.check_count(&request)?;
        Ok(request)
    }

    fn model(&self, method: Method, node: &Node<'_>, path: &str, own: &Scope<'_>) -> Result<ModelRequest> {
        let scopes: Vec<&Scope<'_>> = [own].into_iter().chain(&self.scopes).collect();
        let mut model = ModelRequest::new(path);
        if method.has("weight") {
            model.weight = setting(&scopes, "weight", ANY)?;
            if model.weight.is_empty() {
                let message = format!("no weight for the model {path}");
                return Err(node.error(&message).expected("parameters: {weight: ...} of it or of all").into());
            }
        }
        if method.has_density() {
            model.density = setting(&scopes, "density", 0.0..=1.0)?;
            model.density.append(Setting::constant(1.0));
        }
        add_values(&mut model.values, method.parameters().iter().filter(|p| p.of_models), &scopes)?;
        Ok(model)
    }

    fn add_shared(&self, request: &mut Request) -> Result<()> {
        let scopes: Vec<&Scope<'_>> = self.scopes.iter().collect();
        let method = request.method;
        if method.has("t") {
            let range = if method == Method::Slerp { 0.0..=1.0 } else { ANY };
            request.t = setting(&scopes, "t", range)?;
            if request.t.is_empty() {
                let error = self.node.error(&format!("{} needs a parameter", method.recipe_name()));
                return Err(error.expected("parameters: {t: ...}").into());
            }
        }
        if method.has("lambda") {
            request.lambda = setting(&scopes, "lambda", ANY)?;
            request.lambda.append(Setting::constant(1.0));
        }
        if method.has("normalize") {
            request.normalize = flag(&scopes, "normalize")?.unwrap_or(request.normalize);
        }
        if method.has("rescale") {
            request.rescale = flag(&scopes, "rescale")?.unwrap_or(request.rescale);
        }
        if flag(&scopes, "int8_mask")?.is_some() {
            log::info!("int8_mask has no effect: cpift-merge holds no masks of whole tensors in memory");
        }
        add_values(&mut request.values, method.parameters().iter().filter(|p| !p.of_models), &scopes)
    }

    fn check_count(&self, request: &Request) -> Result<()> {
        let (method, models) = (request.method, request.models.len());
        let base = self.base.as_deref().unwrap_or_default();
        if method == Method::Slerp {
            if models != 2 || request.models[0].path != Path::new(base) {
                let error = self.node.error("slerp merges base_model (t = 0) and one other model (t = 1)");
                return Err(error.found(format!("{models} models, base_model {base}")).into());
            }
            return Ok(());
        }
        let range = method.models();
        if range.contains(&models) {
            return Ok(());
        }
        let count = match (*range.start(), *range.end()) {
            (least, usize::MAX) => format!("at least {least}"),
            (least, most) if least == most => format!("exactly {least}"),
            (least, most) => format!("{least} to {most}"),
        };
        let beside = if method.base() == Base::Model { "" } else { " besides any base_model" };
        let error = self.node.error(&format!("{} merges {count} models{beside}", method.recipe_name()));
        Err(error.found(models.to_string()).into())
    }
}

/// Adds the settings of `parameters` that a scope has.
fn add_values<'p>(
    values: &mut Values,
    parameters: impl Iterator<Item = &'static Parameter> + 'p,
    scopes: &[&Scope<'_>],
) -> Result<()> {
    for parameter in parameters {
        if parameter.flag {
            if let Some(value) = flag(scopes, parameter.name)? {
                values.set(parameter.name, Setting::constant(f64::from(u8::from(value))));
            }
            continue;
        }
        let setting = setting(scopes, parameter.name, parameter.range.clone())?;
        if !setting.is_empty() {
            values.set(parameter.name, setting);
        }
    }
    Ok(())
}

fn input<'a>(method: Method, node: &Node<'a>, of_slice: bool) -> Result<Input<'a>> {
    let layers: &[&str] = if of_slice { &["layer_range"] } else { &[] };
    let known = [&["model", "parameters", "cpift"], layers].concat();
    let stray = |key: &str| is_parameter(key).then(|| format!("{key} is read under parameters"));
    let fields = node.open_fields(&known, stray)?;
    let path = folder(&fields.require("model")?)?;
    let layers = if of_slice { layer_range(&fields.require("layer_range")?)? } else { 0..0 };
    let own = parameters(method, &fields, false)?;
    Ok(Input { node: node.clone(), path, own, extensions: fields.get("cpift"), layers })
}

/// Directory of a model as written: text, or mergekit's own form of a reference, a mapping with
/// `model`, `lora` and `override_architecture`.
pub(super) fn folder(node: &Node<'_>) -> Result<String> {
    if !node.is_mapping() {
        return Ok(node.text()?.to_owned());
    }
    let fields = node.fields(&["model", "lora", "override_architecture"], |_| None)?;
    if let Some(node) = fields.get("override_architecture") {
        return Err(node.error("is not supported").hint("correct architectures in the model's config.json").into());
    }
    let model = location(&fields.require("model")?)?;
    Ok(match fields.get("lora") {
        Some(lora) => format!("{model}+{}", location(&lora)?),
        None => model,
    })
}

/// A path, or a mapping with `path` and `revision`.
fn location(node: &Node<'_>) -> Result<String> {
    if !node.is_mapping() {
        return Ok(node.text()?.to_owned());
    }
    let fields = node.fields(&["path", "revision"], |_| None)?;
    let path = fields.require("path")?.text()?;
    Ok(match fields.get("revision") {
        Some(revision) => format!("{path}@{}", revision.text()?),
        None => path.to_owned(),
    })
}

fn distinct(models: Vec<Input<'_>>) -> Result<Vec<Input<'_>>> {
    for (i, model) in models.iter().enumerate() {
        if models[..i].iter().any(|other| other.path == model.path) {
            return Err(model.node.error("is listed twice").found(model.path.clone()).into());
        }
    }
    Ok(models)
}

fn layer_range(node: &Node<'_>) -> Result<Range<usize>> {
    let ends = node.entries()?.iter().map(Node::count).collect::<Result<Vec<_>>>()?;
    match ends[..] {
        [start, end] if start < end => Ok(start..end),
        _ => Err(node.error("is not a range").expected("[FIRST, LAST + 1]").found(node.shown()).into()),
    }
}

/// Parameters of the merge as a whole.
fn shared(method: Method) -> Vec<&'static str> {
    let fields = ["t", "lambda", "normalize", "rescale"].into_iter().filter(|name| method.has(name));
    let own = method.parameters().iter().filter(|p| !p.of_models).map(|p| p.name);
    let int8 = (method.needs_base() && method.has("weight") || method == Method::Sce).then_some("int8_mask");
    fields.chain(own).chain(int8).collect()
}

/// Parameters that each model may have.
fn of_models(method: Method) -> Vec<&'static str> {
    let fields = ["weight", "density"].into_iter().filter(|name| method.has(name));
    fields.chain(method.parameters().iter().filter(|p| p.of_models).map(|p| p.name)).collect()
}

/// Returns true if a method has a parameter of this name.
pub(super) fn is_parameter(key: &str) -> bool {
    Method::ALL.iter().any(|method| shared(*method).contains(&key) || of_models(*method).contains(&key))
}

/// The `parameters` next to `fields`: of the whole recipe, a module or a slice if `of_all` is set,
/// else of one model. Others than those of the method have no effect in mergekit.
fn parameters<'a>(method: Method, fields: &Fields<'a>, of_all: bool) -> Result<Scope<'a>> {
    let known = if of_all { [of_models(method), shared(method)].concat() } else { of_models(method) };
    let why = |key: &str| {
        if !of_all && shared(method).contains(&key) {
            return Some(format!("{key} applies to the whole merge: write it under the recipe's own parameters"));
        }
        methods_with(key)
    };
    fields.get("parameters").map(|node| node.open_fields(&known, why)).transpose()
}

/// Sentence with the methods that have the parameter `key`, if any.
fn methods_with(key: &str) -> Option<String> {
    let has = |m: &Method| shared(*m).contains(&key) || of_models(*m).contains(&key);
    let names: Vec<&str> = Method::ALL.into_iter().filter(has).map(Method::recipe_name).collect();
    (!names.is_empty()).then(|| format!("{key} is a parameter of {}", names.join(", ")))
}

/// Reads the keys under `cpift` of a model.
fn read_model_extensions(method: Method, model: &mut ModelRequest, node: &Node<'_>) -> Result<()> {
    let known: &[&str] = if method == Method::SphericalMean { &["mask", "weight"] } else { &["mask"] };
    let fields = node.fields(known, |_| None)?;
    model.mask = fields.get("mask").map(|node| folder(&node).map(PathBuf::from)).transpose()?;
    if let Some(node) = fields.get("weight") {
        model.weight = rules(&node, &(0.0..=f64::MAX))?;
    }
    Ok(())
}
