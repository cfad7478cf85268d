//! JSONL (one object per line) and JSON (one list of objects).

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use cpift_core::{BadInput, files};
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::error::Category;

use super::raw::{Fields, Place, names, shown, unusable};

/// Reads JSONL; blank lines are skipped.
pub fn read_lines(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    let text = files::read_text(file)?;
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
    let text = files::read_text(file)?;
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
    use super::*;
    use crate::files::raw::text_of;
    use serde_json::json;

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
