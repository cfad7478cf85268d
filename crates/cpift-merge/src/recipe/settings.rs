//! The `parameters` of a recipe: which each method has, where they may stand, and how their values are read.

use std::ops::RangeInclusive;

use anyhow::Result;

use super::node::{Fields, Node};
use crate::request::Method;
use crate::setting::{Rule, Setting};

/// The parameters in one place of the recipe, such as those of a model.
pub(super) type Scope<'a> = Option<Fields<'a>>;

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

/// Parameters that each model may have its own of.
fn of_models(method: Method) -> &'static [&'static str] {
    match method {
        Method::Slerp | Method::SphericalMean => &[],
        Method::Linear | Method::TaskArithmetic => &["weight"],
        Method::Ties | Method::DareLinear | Method::DareTies => &["weight", "density"],
    }
}

/// The `parameters` of one model, beside `fields`.
pub(super) fn of_model<'a>(method: Method, fields: &Fields<'a>) -> Result<Scope<'a>> {
    let elsewhere = |key: &str| {
        let all = shared(method).contains(&key);
        all.then(|| format!("{key} is of the whole merge: write it under the recipe's own parameters"))
            .or_else(|| methods_with(key))
    };
    fields.get("parameters").map(|node| node.fields(of_models(method), elsewhere)).transpose()
}

/// The `parameters` of the whole recipe or of a slice, beside `fields`.
pub(super) fn of_all<'a>(method: Method, fields: &Fields<'a>) -> Result<Scope<'a>> {
    let known = [of_models(method), shared(method)].concat();
    fields.get("parameters").map(|node| node.fields(&known, methods_with)).transpose()
}

/// Says which methods have the parameter `key`, if any.
fn methods_with(key: &str) -> Option<String> {
    let has = |m: &Method| shared(*m).contains(&key) || of_models(*m).contains(&key);
    let names: Vec<&str> = Method::ALL.into_iter().filter(has).map(Method::recipe_name).collect();
    (!names.is_empty()).then(|| format!("{key} is a parameter of {}", names.join(", ")))
}

/// The setting `key`: the rules of all scopes, those of the narrowest first.
pub(super) fn setting(scopes: &[&Scope<'_>], key: &str, range: RangeInclusive<f64>) -> Result<Setting> {
    let mut setting = Setting::default();
    for node in written(scopes, key) {
        setting.append(rules(&node, &range)?);
    }
    Ok(setting)
}

/// A yes or no that is the same for every tensor; that of the narrowest scope which has one.
pub(super) fn flag(scopes: &[&Scope<'_>], key: &str) -> Result<Option<bool>> {
    written(scopes, key).next().map(|node| node.flag()).transpose()
}

/// The values of `key` in the scopes that have one.
fn written<'a>(scopes: &[&Scope<'a>], key: &str) -> impl Iterator<Item = Node<'a>> {
    scopes.iter().filter_map(move |scope| scope.as_ref()?.get(key))
}

/// What is written in one place: a value, a gradient, or a list of either with filters.
pub(super) fn rules(node: &Node<'_>, range: &RangeInclusive<f64>) -> Result<Setting> {
    let mut setting = Setting::default();
    let entries = if node.is_list() { node.entries()? } else { vec![node.clone()] };
    if entries.iter().any(Node::is_mapping) {
        entries.iter().try_for_each(|entry| conditional(entry, &mut setting, range))?;
    } else {
        setting.push(Rule::new(None, values(node, range)?));
    }
    Ok(setting)
}

/// A value for the tensors whose name holds the filter.
fn conditional(node: &Node<'_>, into: &mut Setting, range: &RangeInclusive<f64>) -> Result<()> {
    let fields = node.fields(&["filter", "value"], |_| None)?;
    let filter = fields.get("filter").map(|f| f.text().map(str::to_owned)).transpose()?;
    into.push(Rule::new(filter, values(&fields.require("value")?, range)?));
    Ok(())
}

fn values(node: &Node<'_>, range: &RangeInclusive<f64>) -> Result<Vec<f64>> {
    if !node.is_list() {
        return Ok(vec![in_range(node, range)?]);
    }
    node.entries()?.iter().map(|entry| in_range(entry, range)).collect()
}

fn in_range(node: &Node<'_>, range: &RangeInclusive<f64>) -> Result<f64> {
    let value = node.number()?;
    if range.contains(&value) {
        return Ok(value);
    }
    let expected = format!("{} to {}", range.start(), range.end());
    Err(node.error("is out of range").expected(expected).found(node.shown()).into())
}
