//! From a request to a recipe, which `parse` reads back as the same request.

use std::fmt::Write;
use std::ops::Range;
use std::path::Path;

use cpift_core::Dtype;
use serde_json::Value;

use crate::method::{Base, Method};
use crate::request::{ChatTemplate, ModelRequest, Request, Slice, Space, Values};
use crate::setting::{Rule, Setting};

/// Recipe of `request` for an output of `dtype`.
///
/// mergekit reads it too and gives the same result in f32. It ignores the keys under `cpift`:
/// `seed`, `epsilon`, `space`, `base` of the differences, `protect` and `mask` of the whole merge,
/// `mask` and (of a spherical mean) `weight` of a model.
pub fn write(request: &Request, dtype: Dtype) -> String {
    let mut text = format!("merge_method: {}\n", request.method.recipe_name());
    let base = base(request);
    if let Some(base) = base {
        line(&mut text, 0, "base_model", &quoted(base));
    }
    if request.slices.is_empty() {
        text += "models:\n";
        if let Some(path) = base.filter(|_| request.method.base() != Base::Model) {
            let _ = writeln!(text, "  - model: {}", quoted(path));
        }
        request.models.iter().for_each(|m| model(&mut text, request.method, m, 2, None));
        block(&mut text, 0, "parameters", &parameters(request));
    } else {
        text += "slices:\n";
        request.slices.iter().for_each(|one| slice(&mut text, one));
    }
    line(&mut text, 0, "dtype", if dtype == Dtype::F64 { "float64" } else { "float32" });
    line(&mut text, 0, "out_dtype", dtype.torch_name().unwrap_or_default());
    if let Some(tokenizer) = &request.tokenizer {
        text += &super::tokenizer::write(tokenizer);
    } else if let Some(source) = request.side_files.as_deref().filter(|path| Some(*path) != base) {
        line(&mut text, 0, "tokenizer_source", &quoted(source));
    }
    match &request.chat_template {
        Some(ChatTemplate::Auto) => line(&mut text, 0, "chat_template", "auto"),
        Some(ChatTemplate::Text(template)) => {
            line(&mut text, 0, "chat_template", &Value::from(template.as_str()).to_string());
        }
        None => {}
    }
    block(&mut text, 0, "cpift", &extensions(request));
    text
}

/// Value of `base_model`.
fn base(request: &Request) -> Option<&Path> {
    let first = request.models.first().map(|model| model.path.as_path());
    match request.method {
        Method::Slerp => first,
        method if method.base() == Base::Model => first.filter(|path| request.side_files.as_deref() == Some(path)),
        _ => request.base.as_deref(),
    }
}

fn slice(text: &mut String, slice: &Slice) {
    let method = slice.request.method;
    *text += "  - sources:\n";
    if let (Some(base), Some(range)) = (&slice.request.base, &slice.base_layers) {
        let _ = writeln!(text, "      - model: {}", quoted(base));
        line(text, 8, "layer_range", &format!("[{}, {}]", range.start, range.end));
    }
    for (one, range) in slice.request.models.iter().zip(&slice.layers) {
        model(text, method, one, 6, Some(range));
    }
    if let (Base::Model, Some(first)) = (method.base(), slice.request.models.first()) {
        line(text, 4, "base_model", &quoted(&first.path));
    }
    block(text, 4, "parameters", &parameters(&slice.request));
}

fn model(text: &mut String, method: Method, model: &ModelRequest, indent: usize, layers: Option<&Range<usize>>) {
    let _ = writeln!(text, "{:indent$}- model: {}", "", quoted(&model.path));
    if let Some(range) = layers {
        line(text, indent + 2, "layer_range", &format!("[{}, {}]", range.start, range.end));
    }
    let mut parameters = Vec::new();
    let mut extensions: Vec<(&str, String)> = Vec::new();
    if method.has("weight") {
        parameters.push(("weight", setting(&model.weight)));
    } else if method == Method::SphericalMean && model.weight != Setting::constant(1.0) {
        extensions.push(("weight", setting(&model.weight)));
    }
    if method.has_density() {
        parameters.push(("density", setting(&model.density)));
    }
    parameters.extend(values(method, &model.values));
    if let Some(mask) = &model.mask {
        extensions.push(("mask", quoted(mask)));
    }
    block(text, indent + 2, "parameters", &parameters);
    block(text, indent + 2, "cpift", &extensions);
}

fn values(method: Method, values: &Values) -> impl Iterator<Item = (&'static str, String)> {
    values.iter().map(move |(name, value)| match method.parameter(name) {
        Some(parameter) if parameter.flag => (name, (value.single() != Some(0.0)).to_string()),
        _ => (name, setting(value)),
    })
}

fn parameters(request: &Request) -> Vec<(&'static str, String)> {
    let method = request.method;
    let mut parameters = Vec::new();
    if method.has("t") {
        parameters.push(("t", setting(&request.t)));
    }
    if method.has("lambda") {
        parameters.push(("lambda", setting(&request.lambda)));
    }
    if method.has("normalize") {
        parameters.push(("normalize", request.normalize.to_string()));
    }
    if method.has("rescale") {
        parameters.push(("rescale", request.rescale.to_string()));
    }
    parameters.extend(values(method, &request.values));
    parameters
}

fn extensions(request: &Request) -> Vec<(&'static str, String)> {
    let method = request.method;
    let mut extensions = Vec::new();
    if method.draws() {
        extensions.push(("seed", request.seed.to_string()));
    }
    if method.is_spherical() && request.epsilon != method.epsilon() {
        extensions.push(("epsilon", request.epsilon.to_string()));
    }
    if method.is_spherical() && request.space == Space::Delta {
        extensions.push(("space", request.space.name().to_owned()));
        extensions.extend(request.base.as_deref().map(|base| ("base", quoted(base))));
    }
    extensions.extend(request.protect.as_deref().map(|mask| ("protect", quoted(mask))));
    extensions.extend(request.within.as_deref().map(|mask| ("mask", quoted(mask))));
    extensions
}

fn block(text: &mut String, indent: usize, key: &str, entries: &[(&str, String)]) {
    if entries.is_empty() {
        return;
    }
    let _ = writeln!(text, "{:indent$}{key}:", "");
    entries.iter().for_each(|(key, value)| line(text, indent + 2, key, value));
}

fn line(text: &mut String, indent: usize, key: &str, value: &str) {
    let _ = writeln!(text, "{:indent$}{key}: {value}", "");
}

/// A setting on one line: a number, a gradient, or a list of either with filters.
fn setting(setting: &Setting) -> String {
    let rules: Vec<String> = match setting.rules() {
        [rule @ Rule { filter: None, .. }] => return numbers(rule),
        rules => rules.iter().map(conditional).collect(),
    };
    format!("[{}]", rules.join(", "))
}

fn conditional(rule: &Rule) -> String {
    match &rule.filter {
        Some(filter) => format!("{{filter: {}, value: {}}}", quoted(Path::new(filter)), numbers(rule)),
        None => format!("{{value: {}}}", numbers(rule)),
    }
}

fn numbers(rule: &Rule) -> String {
    let values: Vec<String> = rule.values.iter().map(f64::to_string).collect();
    match &values[..] {
        [value] => value.clone(),
        values => format!("[{}]", values.join(", ")),
    }
}

/// Path in quotes, which YAML reads as JSON does.
fn quoted(path: &Path) -> String {
    Value::from(path.to_string_lossy()).to_string()
}
