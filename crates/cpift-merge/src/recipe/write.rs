//! From a request to a recipe, which `parse` reads back as the same request.

use std::fmt::Write;
use std::path::Path;

use cpift_core::Dtype;
use serde_json::Value;

use crate::request::{Method, ModelRequest, Request, Space};
use crate::setting::{Rule, Setting};

/// Recipe of `request` for an output of `dtype`.
///
/// mergekit reads it too and gives the same result in f32. It ignores the keys under `cpift`:
/// `seed`, `epsilon`, `space`, `base` of the differences and `protect` of the whole merge, `mask`
/// and (of a spherical mean) `weight` of a model.
pub fn write(request: &Request, dtype: Dtype) -> String {
    let mut text = format!("merge_method: {}\n", request.method.recipe_name());
    let base = base(request);
    if let Some(base) = base {
        line(&mut text, 0, "base_model", &quoted(base));
    }
    text += "models:\n";
    if let Some(path) = base.filter(|_| request.method.needs_base()) {
        let _ = writeln!(text, "  - model: {}", quoted(path));
    }
    request.models.iter().for_each(|m| model(&mut text, request.method, m));
    block(&mut text, 0, "parameters", &parameters(request));
    line(&mut text, 0, "dtype", if dtype == Dtype::F64 { "float64" } else { "float32" });
    line(&mut text, 0, "out_dtype", dtype.torch_name().unwrap_or_default());
    if let Some(source) = request.side_files.as_deref().filter(|path| Some(*path) != base) {
        line(&mut text, 0, "tokenizer_source", &quoted(source));
    }
    block(&mut text, 0, "cpift", &extensions(request));
    text
}

/// Value of `base_model`.
fn base(request: &Request) -> Option<&Path> {
    let first = request.models.first().map(|model| model.path.as_path());
    match request.method {
        Method::Slerp => first,
        Method::Linear | Method::SphericalMean => first.filter(|path| request.side_files.as_deref() == Some(path)),
        _ => request.base.as_deref(),
    }
}

fn model(text: &mut String, method: Method, model: &ModelRequest) {
    let _ = writeln!(text, "  - model: {}", quoted(&model.path));
    let mut parameters = Vec::new();
    let mut extensions: Vec<(&str, String)> = Vec::new();
    match method {
        Method::Slerp => {}
        Method::SphericalMean if model.weight == Setting::constant(1.0) => {}
        Method::SphericalMean => extensions.push(("weight", setting(&model.weight))),
        _ => parameters.push(("weight", setting(&model.weight))),
    }
    if method.has_density() {
        parameters.push(("density", setting(&model.density)));
    }
    if let Some(mask) = &model.mask {
        extensions.push(("mask", quoted(mask)));
    }
    block(text, 4, "parameters", &parameters);
    block(text, 4, "cpift", &extensions);
}

fn parameters(request: &Request) -> Vec<(&'static str, String)> {
    let method = request.method;
    let mut parameters = Vec::new();
    if method == Method::Slerp {
        parameters.push(("t", setting(&request.t)));
    }
    if method.needs_base() {
        parameters.push(("lambda", setting(&request.lambda)));
    }
    if method.needs_base() || method == Method::Linear {
        parameters.push(("normalize", request.normalize.to_string()));
    }
    if method.has_density() {
        parameters.push(("rescale", request.rescale.to_string()));
    }
    parameters
}

fn extensions(request: &Request) -> Vec<(&'static str, String)> {
    let method = request.method;
    let spherical = matches!(method, Method::Slerp | Method::SphericalMean);
    let mut extensions = Vec::new();
    if method.draws() {
        extensions.push(("seed", request.seed.to_string()));
    }
    if spherical && request.epsilon != method.epsilon() {
        extensions.push(("epsilon", request.epsilon.to_string()));
    }
    if spherical && request.space == Space::Delta {
        extensions.push(("space", request.space.name().to_owned()));
        extensions.extend(request.base.as_deref().map(|base| ("base", quoted(base))));
    }
    extensions.extend(request.protect.as_deref().map(|mask| ("protect", quoted(mask))));
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
        [rule @ Rule { filter: None, .. }] => return values(rule),
        rules => rules.iter().map(conditional).collect(),
    };
    format!("[{}]", rules.join(", "))
}

fn conditional(rule: &Rule) -> String {
    match &rule.filter {
        Some(filter) => format!("{{filter: {}, value: {}}}", quoted(Path::new(filter)), values(rule)),
        None => format!("{{value: {}}}", values(rule)),
    }
}

fn values(rule: &Rule) -> String {
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
