//! Typed access to the fields of a config.json, with errors that name the file and the field.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::rope::RopeSettings;
use serde_json::{Map, Value};

/// The fields of one config.json; null counts as absent.
pub(super) struct Fields {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    /// Those of `at`, a folder or the file itself.
    pub(super) fn new(at: &Path, config: &Value) -> Self {
        let path = if at.is_file() { at.to_owned() } else { at.join("config.json") };
        Self { path, map: config.as_object().cloned().unwrap_or_default() }
    }

    pub(super) fn bad(&self, message: impl Into<String>) -> BadInput {
        BadInput::new(&self.path, message)
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether the field is there, be it null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// All fields that are not null.
    pub(super) fn present(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.map.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.as_str(), v))
    }

    fn typed<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(v) => Ok(Some(v)),
                None => Err(self.bad(format!("{key} cannot be used")).found(value.to_string()).into()),
            },
        }
    }

    pub(super) fn int(&self, key: &str) -> Result<i64> {
        self.typed(key, positive)?.ok_or_else(|| self.bad(format!("the field {key} is missing")).into())
    }

    pub(super) fn int_or(&self, key: &str, default: i64) -> Result<i64> {
        Ok(self.typed(key, positive)?.unwrap_or(default))
    }

    /// A count that may be 0.
    pub(super) fn count_or(&self, key: &str, default: i64) -> Result<i64> {
        Ok(self.typed(key, |v| v.as_i64().filter(|n| *n >= 0))?.unwrap_or(default))
    }

    /// A positive number; absent gives `default`, null gives none.
    pub(super) fn optional_float(&self, key: &str, default: f64) -> Result<Option<f64>> {
        let given = self.typed(key, |v| v.as_f64().filter(|x| *x > 0.0))?;
        Ok(if self.has(key) { given } else { Some(default) })
    }

    /// A positive integer; absent gives `default`, null gives none.
    pub(super) fn optional_int(&self, key: &str, default: i64) -> Result<Option<i64>> {
        let given = self.typed(key, positive)?;
        Ok(if self.has(key) { given } else { Some(default) })
    }

    pub(super) fn float_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.typed(key, Value::as_f64)?.unwrap_or(default))
    }

    pub(super) fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, Value::as_bool)?.unwrap_or(default))
    }

    pub(super) fn text_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(self.bad(format!("{key} cannot be used")).found(other.to_string()).into()),
        }
    }

    /// A list of words, where the field is there.
    pub(super) fn words(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.typed(key, |v| v.as_array()?.iter().map(|w| w.as_str().map(str::to_owned)).collect())
    }

    /// The rotary settings; `default_positions` is what the family takes where `max_position_embeddings` is absent.
    pub(super) fn rope(&self, default_positions: i64) -> Result<RopeSettings> {
        RopeSettings::read(&self.path, &Value::from(self.map.clone()), default_positions as f64)
    }

    /// The file, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn positive(value: &Value) -> Option<i64> {
    value.as_i64().filter(|n| *n > 0)
}
