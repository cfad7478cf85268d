//! From a data file to its rows as JSON objects: JSONL, a JSON list, or Parquet, by the file's
//! extension.

mod json;
mod parquet;
pub mod raw;

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use cpift_core::BadInput;

use raw::{Fields, FileKind, Place};

/// Reads all rows of the file at `path` with their places, in order.
///
/// # Errors
/// [`BadInput`] for an unknown extension, a broken file, or a row that is not an object, with its
/// place.
pub fn read_fields(path: &Path) -> Result<Vec<(Place, Fields)>> {
    let file: Arc<Path> = path.into();
    match FileKind::of(path) {
        Some(FileKind::JsonLines) => json::read_lines(&file),
        Some(FileKind::Json) => json::read_list(&file),
        Some(FileKind::Parquet) => parquet::read(&file),
        None => Err(BadInput::new(path, "unknown kind of data file")
            .expected("a name that ends in .jsonl, .json or .parquet")
            .hint("rename the file if it has one of these formats, else convert it to JSONL (one object per line)")
            .into()),
    }
}
