//! JSON files, ours and Hugging Face's, with errors that name the file and the position.

use std::path::Path;

use anyhow::Result;
use serde::de::DeserializeOwned;

use crate::error::BadInput;
use crate::files::{read_text_of, refuse_placeholder};

/// Longest JSON file that is read, in bytes. Today's tokenizer.json files reach 30 MB. serde_json
/// limits nesting to 128 levels.
const LONGEST: u64 = 256 << 20;

/// Parses the JSON file at `path` into `T`.
///
/// # Errors
/// [`BadInput`] with line and column if the text is not JSON or not a `T`.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read_text_of(path, LONGEST)?;
    refuse_placeholder(path, text.as_bytes())?;
    serde_json::from_str(&text).map_err(|e| BadInput::new(path, format!("cannot be read as JSON: {e}")).into())
}

/// Refuses one of our files if its `format_version` is not the `known` one.
///
/// # Errors
/// [`BadInput`] with both versions.
pub fn check_version(path: &Path, what: &str, found: u32, known: u32) -> Result<()> {
    if found == known {
        return Ok(());
    }
    let hint = if found > known { "use a newer cpift" } else { "regenerate the file with this version" };
    Err(BadInput::new(path, format!("{what} of another format version"))
        .expected(known.to_string())
        .found(found.to_string())
        .hint(hint)
        .into())
}

/// Returns the `format_version` of one of our files: 0 if it is missing, `u32::MAX` if it is too
/// large.
pub fn version_of(value: &serde_json::Value) -> u32 {
    let version = value.get("format_version").and_then(serde_json::Value::as_u64).unwrap_or(0);
    u32::try_from(version).unwrap_or(u32::MAX)
}

/// Formats `value` as all our JSON files are: pretty-printed, with a final newline.
pub fn to_text<T: serde::Serialize>(value: &T) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}
