//! From a JSONL file (one object per line) or a JSON list of objects to rows as the file holds
//! them: the columns, the place for messages, and values of a type that a column must have.
//!
//! NaN, the infinities and bytes that are not UTF-8 have no JSON value. A column that is not read
//! must not stop a run, so the row holds a marker in their place. Where the column is read, the
//! marker is neither text, list nor number, and the error shows the original value.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use cpift_core::BadInput;
use cpift_core::files::read_text;
use serde::de::DeserializeOwned;
use serde_json::error::Category;
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

/// Reads JSONL; blank lines are skipped.
pub fn read_lines(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    let text = read_text(file)?;
    let mut rows = Vec::new();
    // Only \n ends a line: JSON strings may contain other characters that Unicode calls line
    // breaks.
    for (i, line) in without_mark(&text).split('\n').enumerate() {
        if !line.trim().is_empty() {
            let place = Place { file: file.clone(), row: i + 1 };
            let value = parse(line).map_err(|Wrong { what, column, .. }| {
                let error = place
                    .bad(format!("not a JSON object: {what}"))
                    .found(format!("column {column}: {}", near(line, column)));
                let list = text.trim_start().starts_with('[');
                if list { error.hint("a file with one list of objects must be named .json") } else { error }
            })?;
            rows.push((place.clone(), object(value, &place)?));
        }
    }
    Ok(rows)
}

/// Reads a JSON list.
pub fn read_list(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    let text = read_text(file)?;
    let text = without_mark(&text);
    let list: Vec<Value> = parse(text).map_err(|Wrong { what, line, column }| {
        let at = if line == 0 { String::new() } else { format!(" at line {line}, column {column}") };
        let error = BadInput::new(file, format!("not a list of JSON objects: {what}{at}")).expected("[{…}, {…}, …]");
        let mut objects = serde_json::Deserializer::from_str(text).into_iter::<Fields>();
        match (objects.next(), objects.next()) {
            (Some(Ok(_)), Some(_)) => error.hint("a file with one object per line must be named .jsonl"),
            (Some(Ok(object)), None) => {
                let error = error.found(names(&object));
                error.hint("a list inside the object must be saved on its own, or its rows one per line as .jsonl")
            }
            _ => error,
        }
    })?;
    let places = (1..).map(|row| Place { file: file.clone(), row });
    places.zip(list).map(|(place, value)| Ok((place.clone(), object(value, &place)?))).collect()
}

/// `text` without a byte order mark.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

fn object(value: Value, place: &Place) -> Result<Fields> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(place.bad("not a JSON object").expected("{…}").found(shown(&other)).into()),
    }
}

/// The part of `line` around the 1-based byte `column`.
fn near(line: &str, column: usize) -> String {
    const BEFORE: usize = 20;
    const AFTER: usize = 12;
    let boundary = |mut at: usize| {
        while !line.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let at = column.min(line.len());
    line[boundary(at.saturating_sub(BEFORE))..boundary((at + AFTER).min(line.len()))].trim_end().to_owned()
}

/// A JSON syntax error.
struct Wrong {
    what: String,
    /// Line and column from 1, in bytes of the original text; 0 if the error has no place.
    line: usize,
    column: usize,
}

/// Parses JSON as Python writes it: NaN, Infinity, -Infinity, numbers beyond f64 and integers
/// beyond 64 bits become markers.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T, Wrong> {
    let first = serde_json::from_str(text);
    let marked = match &first {
        Ok(_) if !has_long_number(text) => None,
        Ok(_) => mark(text),
        Err(error) if error.classify() == Category::Syntax => mark(text),
        Err(_) => None,
    };
    let Some(Marked { text: rewritten, grown }) = marked else {
        return first.map_err(|error| wrong(&error, text, &[], text));
    };
    serde_json::from_str(&rewritten).map_err(|error| wrong(&error, &rewritten, &grown, text))
}

/// Maps an error in the rewritten text `parsed` to its place in `original`.
fn wrong(error: &serde_json::Error, parsed: &str, grown: &[Grown], original: &str) -> Wrong {
    let message = error.to_string();
    let what = match message.rfind(" at line ") {
        Some(end) => message[..end].to_owned(),
        None => message,
    };
    if error.line() == 0 {
        return Wrong { what, line: 0, column: 0 };
    }
    let before: usize = parsed.split_inclusive('\n').take(error.line() - 1).map(str::len).sum();
    let at = before + error.column();
    // Growth by all markers that end before the error.
    let growth: usize = grown.iter().take_while(|grown| grown.end < at).map(|grown| grown.by).sum();
    let at = (at - growth).min(original.len());
    let head = &original.as_bytes()[..at];
    // Column 0 is the line break before the line.
    let line = 1 + head.iter().filter(|byte| **byte == b'\n').count();
    let start = head.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    Wrong { what, line, column: at - start }
}

/// A text with markers in place of numbers that JSON lacks.
struct Marked {
    text: String,
    /// One entry per marker.
    grown: Vec<Grown>,
}

/// End of a marker in the new text, and the bytes by which it is longer than the original.
struct Grown {
    end: usize,
    by: usize,
}

/// Replaces NaN, Infinity, -Infinity and numbers beyond f64 outside of strings; `None` if there are
/// none.
fn mark(text: &str) -> Option<Marked> {
    let bytes = text.as_bytes();
    let (mut out, mut grown, mut copied, mut at) = (String::new(), Vec::new(), 0, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => at = end_of_string(bytes, at),
            byte if is_of_word(byte) => {
                let end = at + bytes[at..].iter().take_while(|byte| is_of_word(**byte)).count();
                if is_no_json_number(&text[at..end]) {
                    let marker = unusable(&text[at..end]).to_string();
                    out.push_str(&text[copied..at]);
                    out.push_str(&marker);
                    grown.push(Grown { end: out.len(), by: marker.len() - (end - at) });
                    copied = end;
                }
                at = end;
            }
            _ => at += 1,
        }
    }
    out.push_str(&text[copied..]);
    (!grown.is_empty()).then_some(Marked { text: out, grown })
}

/// Index after the string that opens at `start`.
fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// Returns true for the bytes of numbers and of names such as `NaN`.
fn is_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.' | b'_')
}

/// Returns true if `text` has as many digits in a row as an integer beyond 64 bits has at least.
fn has_long_number(text: &str) -> bool {
    text.as_bytes().chunk_by(|a, b| a.is_ascii_digit() && b.is_ascii_digit()).any(|run| run.len() >= 19)
}

fn is_no_json_number(word: &str) -> bool {
    let digits = word.strip_prefix('-').unwrap_or(word);
    let integer = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if integer && word.parse::<i64>().is_err() && word.parse::<u64>().is_err() {
        return true;
    }
    let number = || word.strip_prefix('-').unwrap_or(word).starts_with(|c: char| c.is_ascii_digit());
    matches!(word, "NaN" | "Infinity" | "-Infinity") || number() && word.parse().is_ok_and(f64::is_infinite)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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

    #[test]
    fn numbers_that_json_lacks_become_markers_outside_of_strings_only() {
        let text = r#"{"NaN": "NaN, \"Infinity", "a": [NaN,-Infinity , 1e999], "b": Infinity, "c": -1.5e3}"#;
        let value: Value = parse(text).ok().unwrap();
        let markers = json!([unusable("NaN"), unusable("-Infinity"), unusable("1e999")]);
        let expected = json!({"NaN": "NaN, \"Infinity", "a": markers, "b": unusable("Infinity"), "c": -1500.0});
        assert_eq!(value, expected);
        assert_eq!(text_of(&value["a"]), "[NaN,-Infinity,1e999]");
    }

    #[test]
    fn errors_have_the_place_they_have_in_the_file() {
        let place = |text: &str| {
            let wrong = parse::<Value>(text).unwrap_err();
            (wrong.line, wrong.column)
        };
        for bad in ["1 2", "]", "nan", "-NaN", "NaNs"] {
            let tail = format!("[1, {bad}");
            let (line, column) = place(&tail);
            let lines = format!("[NaN, \"é\",\n NaN,\n-Infinity,\n\"NaN\", {}", &tail[1..]);
            let (found, shifted) = place(&lines);
            assert_eq!((line, found), (1, 4), "{bad}");
            assert_eq!(shifted, column + "\"NaN\", ".len() - 1, "{bad}");
        }
        assert_eq!(place("[NaN, \"open"), (1, 11));
        assert_eq!(place("[NaN,\n"), (2, 0));
    }
}
