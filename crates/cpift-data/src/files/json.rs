//! JSONL (one object a line) and JSON (one list of objects).

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use cpift_core::{BadInput, files};
use serde_json::Value;

use super::Fields;
use crate::place::Place;

/// Reads JSONL; blank lines are passed over.
pub fn read_lines(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    let text = files::read_text(file)?;
    let mut rows = Vec::new();
    // Only \n ends a line: JSON strings may hold other characters that Unicode calls line ends.
    for (i, line) in without_mark(&text).split('\n').enumerate() {
        if !line.trim().is_empty() {
            let place = Place { file: file.clone(), row: i + 1 };
            let value = serde_json::from_str(line).map_err(|e| place.bad(format!("not a JSON object: {e}")))?;
            rows.push((place.clone(), object(value, &place)?));
        }
    }
    Ok(rows)
}

/// Reads a JSON list.
pub fn read_list(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    let text = files::read_text(file)?;
    let text = without_mark(&text);
    let list: Vec<Value> = serde_json::from_str(text).map_err(|e| {
        let error = BadInput::new(file, format!("not a list of JSON objects: {e}")).expected("[{…}, {…}, …]");
        let lines = text.trim_start().starts_with('{');
        if lines { error.hint("if it has one object a line, name it .jsonl") } else { error }
    })?;
    let places = (1..).map(|row| Place { file: file.clone(), row });
    places.zip(list).map(|(place, value)| Ok((place.clone(), object(value, &place)?))).collect()
}

/// `text` without the byte order mark that some editors put first.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

fn object(value: Value, place: &Place) -> Result<Fields> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(place.bad("not a JSON object").expected("{…}").found(crate::formats::shown(&other)).into()),
    }
}
