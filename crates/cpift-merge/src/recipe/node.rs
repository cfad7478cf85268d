//! A place in a recipe: its value, the settings read from it, and the path of keys to it, so that
//! every error names it.

use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::error::closest;
use serde_json::{Map, Value};

use crate::setting::{Rule, Setting};

/// A value in the file, with the path of keys to it.
#[derive(Clone)]
pub(super) struct Node<'a> {
    file: &'a Path,
    path: String,
    value: &'a Value,
}

/// A mapping whose keys are all known.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    node: Node<'a>,
    map: &'a Map<String, Value>,
}

impl<'a> Node<'a> {
    /// The whole file.
    pub fn root(file: &'a Path, value: &'a Value) -> Self {
        Self { file, path: String::new(), value }
    }

    /// An error that names this place.
    pub fn error(&self, message: &str) -> BadInput {
        let place = if self.path.is_empty() { "the recipe" } else { &self.path };
        BadInput::new(self.file, format!("{place}: {message}"))
    }

    fn unexpected<T>(&self, expected: &str) -> Result<T> {
        Err(self.error("has a value of the wrong type").expected(expected).found(self.shown()).into())
    }

    /// The value as JSON, cut to a length that fits a line.
    pub fn shown(&self) -> String {
        const LONGEST: usize = 60;
        let text = self.value.to_string();
        match text.char_indices().nth(LONGEST) {
            Some((end, _)) => format!("{}...", &text[..end]),
            None => text,
        }
    }

    pub fn is_list(&self) -> bool {
        self.value.is_array()
    }

    pub fn is_mapping(&self) -> bool {
        self.value.is_object()
    }

    pub fn text(&self) -> Result<&'a str> {
        match self.value.as_str() {
            Some(text) if !text.trim().is_empty() => Ok(text),
            _ => self.unexpected("text"),
        }
    }

    /// A finite number, which may be in quotes.
    pub fn number(&self) -> Result<f64> {
        let number = match self.value {
            Value::String(text) => text.trim().parse().ok(),
            value => value.as_f64(),
        };
        match number.filter(|n| n.is_finite()) {
            Some(number) => Ok(number),
            None => self.unexpected("a finite number"),
        }
    }

    pub fn count(&self) -> Result<usize> {
        match self.value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(count) => Ok(count),
            None => self.unexpected("a whole number, 0 or more"),
        }
    }

    /// A boolean in any form that YAML 1.1 and mergekit accept.
    pub fn flag(&self) -> Result<bool> {
        match self.value.to_string().trim_matches('"').to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" | "1.0" => Ok(true),
            "false" | "no" | "off" | "0" | "0.0" => Ok(false),
            _ => self.unexpected("true or false"),
        }
    }

    /// The entries of a list that has at least one.
    pub fn entries(&self) -> Result<Vec<Self>> {
        let Some(list) = self.value.as_array().filter(|list| !list.is_empty()) else {
            return self.unexpected("a list with at least one entry");
        };
        let entry = |(i, value)| Self { path: format!("{}[{i}]", self.path), value, ..self.clone() };
        Ok(list.iter().enumerate().map(entry).collect())
    }

    /// The entries of a mapping, in the order of the file.
    pub fn children(&self) -> Result<Vec<(String, Self)>> {
        let map = self.mapping(&[])?;
        Ok(map.iter().map(|(key, value)| (key.clone(), self.child(key, value))).collect())
    }

    /// A mapping with no other than the `known` keys. `hint` may explain why another key is not
    /// supported.
    pub fn fields(&self, known: &[&str], hint: impl Fn(&str) -> Option<String>) -> Result<Fields<'a>> {
        let map = self.mapping(known)?;
        match map.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(self.unknown(key, known, hint(key)).into()),
            None => Ok(Fields { node: self.clone(), map }),
        }
    }

    /// A mapping in which other keys than the `known` ones have no effect, as in mergekit: each is
    /// warned about, with the note that `why` gives. One that looks like a misspelling of a known
    /// key is an error.
    pub fn open_fields(&self, known: &[&str], why: impl Fn(&str) -> Option<String>) -> Result<Fields<'a>> {
        let map = self.mapping(known)?;
        for (key, value) in map.iter().filter(|(key, _)| !known.contains(&key.as_str())) {
            let note = why(key);
            if note.is_none() && closest(key, known).is_some() {
                return Err(self.unknown(key, known, None).into());
            }
            let note = note.map_or(String::new(), |note| format!(": {note}"));
            log::warn!("{}", self.child(key, value).error(&format!("has no effect{note}")));
        }
        Ok(Fields { node: self.clone(), map })
    }

    fn mapping(&self, known: &[&str]) -> Result<&'a Map<String, Value>> {
        match self.value.as_object() {
            Some(map) => Ok(map),
            None => self.unexpected(&format!("a mapping with {}", known.join(", "))),
        }
    }

    fn unknown(&self, key: &str, known: &[&str], hint: Option<String>) -> BadInput {
        let place = self.child(key, &Value::Null);
        let problem = if hint.is_some() { "is not supported here" } else { "is not a known key" };
        let hint = hint.or_else(|| closest(key, known).map(|near| format!("did you mean {near}?")));
        let known = if known.is_empty() { "no keys".to_owned() } else { known.join(", ") };
        let error = place.error(problem).expected(known).found(place.last_key(key));
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }

    fn last_key(&self, key: &str) -> String {
        Node { value: &Value::String(key.to_owned()), ..self.clone() }.shown()
    }

    /// The value itself.
    pub fn value(&self) -> &'a Value {
        self.value
    }

    /// The value of `key` in this mapping.
    pub fn child(&self, key: &str, value: &'a Value) -> Self {
        const LONGEST: usize = 100;
        let key: String = key.chars().take(LONGEST).collect();
        let path = if self.path.is_empty() { key } else { format!("{}.{key}", self.path) };
        Self { path, value, ..self.clone() }
    }
}

impl<'a> Fields<'a> {
    /// The value of `key`, if it is present and not null.
    pub fn get(&self, key: &str) -> Option<Node<'a>> {
        let value = self.map.get(key).filter(|value| !value.is_null())?;
        Some(self.node.child(key, value))
    }

    /// The value of `key`, which must be present.
    pub fn require(&self, key: &str) -> Result<Node<'a>> {
        let missing = || self.node.error("a key is missing").expected(key).into();
        self.get(key).ok_or_else(missing)
    }

    /// The mapping itself.
    pub fn node(&self) -> &Node<'a> {
        &self.node
    }
}

/// The parameters in one place of the recipe, such as those of a model.
pub(super) type Scope<'a> = Option<Fields<'a>>;

/// The setting `key`: the rules of all scopes, those of the innermost first.
pub(super) fn setting(scopes: &[&Scope<'_>], key: &str, range: RangeInclusive<f64>) -> Result<Setting> {
    let mut setting = Setting::default();
    for node in written(scopes, key) {
        setting.append(rules(&node, &range)?);
    }
    Ok(setting)
}

/// A boolean that is the same for every tensor, from the innermost scope that has it.
pub(super) fn flag(scopes: &[&Scope<'_>], key: &str) -> Result<Option<bool>> {
    written(scopes, key).next().map(|node| node.flag()).transpose()
}

/// The values of `key` in the scopes that have it.
fn written<'a>(scopes: &[&Scope<'a>], key: &str) -> impl Iterator<Item = Node<'a>> {
    scopes.iter().filter_map(move |scope| scope.as_ref()?.get(key))
}

/// Reads a value, a gradient, or a list of either with filters.
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

/// Reads a value for the tensors whose name contains the filter.
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
