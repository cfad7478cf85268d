//! A row as its file holds it: the columns, the place for messages, and values of a type that a
//! column must have.
//!
//! NaN, the infinities and bytes that are not UTF-8 have no JSON value. A column that is not read
//! must not stop a run, so the row holds a marker in their place. Where the column is read, the
//! marker is neither text, list nor number, and the error shows the original value.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use cpift_core::BadInput;
use serde_json::{Map, Value, json};

/// Columns of a row, in file order. Values that JSON lacks are markers, see [`unusable`].
pub type Fields = Map<String, Value>;

/// Format of a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// One JSON object a line.
    JsonLines,
    /// One JSON list of objects.
    Json,
    /// Apache Parquet.
    Parquet,
}

impl FileKind {
    /// Kind by the extension of `path`, in any case; `None` if unknown.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "jsonl" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// A row of a data file, for messages: `data/x.jsonl line 12`, `data/x.parquet row 12`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file; all its rows share the path.
    pub file: Arc<Path>,
    /// Row number from 1; in JSONL the line number, blank lines counted. 0 if the row comes from no
    /// file.
    pub row: usize,
}

impl Place {
    /// `line 12` of a JSONL file, `row 12` of any other.
    pub fn position(&self) -> String {
        let unit = if FileKind::of(&self.file) == Some(FileKind::JsonLines) { "line" } else { "row" };
        format!("{unit} {}", self.row)
    }

    /// An error in this row.
    pub fn bad(&self, message: impl fmt::Display) -> BadInput {
        BadInput::new(&self.file, format!("{}: {message}", self.position()))
    }
}

impl Default for Place {
    /// Place of an example that comes from no file.
    fn default() -> Self {
        Self { file: Path::new("").into(), row: 0 }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.row == 0 {
            return f.write_str("an example from no file");
        }
        write!(f, "{} {}", self.file.display(), self.position())
    }
}

/// The marker's only key; no column name begins with NUL.
const KEY: &str = "\0unusable";

/// Marker of a value that cannot be used; messages show `found`, such as `NaN`.
pub fn unusable(found: &str) -> Value {
    json!({ KEY: found })
}

/// Text that messages show of `value` if it is a marker.
pub fn reason(value: &Value) -> Option<&str> {
    value.as_object().filter(|object| object.len() == 1)?.get(KEY)?.as_str()
}

/// Returns true if `value` is a marker or holds one.
pub fn has_unusable(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().any(has_unusable),
        Value::Object(map) => reason(value).is_some() || map.values().any(has_unusable),
        _ => false,
    }
}

/// `value` as JSON, with markers shown as the original value.
pub fn text_of(value: &Value) -> String {
    let mut text = value.to_string();
    if has_unusable(value) {
        let open = format!("{{{}:\"", json!(KEY));
        while let Some(start) = text.find(&open) {
            let from = start + open.len();
            let Some(length) = text[from..].find("\"}") else { break };
            text = format!("{}{}{}", &text[..start], &text[from..from + length], &text[from + length + 2..]);
        }
    }
    text
}

/// Names of the fields, for messages; a field without a usable value is shown with it.
pub fn names(fields: &Fields) -> String {
    let named = |(name, value): (&String, &Value)| match reason(value) {
        Some(found) => format!("{name} ({found})"),
        None if value.is_null() => format!("{name} (null)"),
        None => name.clone(),
    };
    let names: Vec<String> = fields.iter().map(named).collect();
    if names.is_empty() { "no fields".into() } else { format!("the fields {}", names.join(", ")) }
}

/// Removes the field `name` and returns its value; null counts as absent.
pub fn take(fields: &mut Fields, name: &str) -> Option<Value> {
    fields.shift_remove(name).filter(|value| !value.is_null())
}

/// Removes the field `name`; an error if it is missing or null.
pub fn need(fields: &mut Fields, name: &str, place: &Place) -> Result<Value> {
    if fields.get(name).is_some_and(Value::is_null) {
        bail!(place.bad(format!("the field {name} is null")).expected("a value").found(names(fields)));
    }
    take(fields, name).ok_or_else(|| place.bad(format!("no field {name}")).found(names(fields)).into())
}

pub fn need_text(fields: &mut Fields, name: &str, place: &Place) -> Result<String> {
    text(need(fields, name, place)?, name, place)
}

pub fn need_list(fields: &mut Fields, name: &str, place: &Place) -> Result<Vec<Value>> {
    list(need(fields, name, place)?, name, place)
}

pub fn text(value: Value, what: &str, place: &Place) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => bail!(place.bad(format!("{what} is not text")).expected("a string").found(shown(&other))),
    }
}

pub fn list(value: Value, what: &str, place: &Place) -> Result<Vec<Value>> {
    match value {
        Value::Array(list) => Ok(list),
        other => {
            let error = place.bad(format!("{what} is not a list")).expected("[…]").found(shown(&other));
            let json = other.as_str().is_some_and(|text| text.trim_start().starts_with('['));
            bail!(if json { error.hint("the list was saved as text: parse it and save the rows again") } else { error })
        }
    }
}

/// Start of `value` as JSON, for messages.
pub fn shown(value: &Value) -> String {
    const MOST: usize = 80;
    let text = text_of(value);
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_names_file_and_row_in_the_units_of_the_file() {
        for (file, expected) in
            [("d/x.jsonl", "d/x.jsonl line 12"), ("d/x.json", "d/x.json row 12"), ("d/x.parquet", "d/x.parquet row 12")]
        {
            assert_eq!(Place { file: Path::new(file).into(), row: 12 }.to_string(), expected);
        }
        assert_eq!(Place::default().to_string(), "an example from no file");
    }

    #[test]
    fn markers_are_told_from_other_values_and_shown_as_what_was_found() {
        let nested = json!({"a": [1, unusable("NaN")], "b": unusable("-Infinity"), "c": {}});
        assert!(has_unusable(&nested) && reason(&nested).is_none() && reason(&nested["b"]) == Some("-Infinity"));
        assert_eq!(text_of(&nested), r#"{"a":[1,NaN],"b":-Infinity,"c":{}}"#);
        let plain = json!({"a": ["NaN", null, {}]});
        assert!(!has_unusable(&plain));
        assert_eq!(text_of(&plain), r#"{"a":["NaN",null,{}]}"#);
    }
}
