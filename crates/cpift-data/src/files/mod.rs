//! From a data file to its rows as JSON objects: JSONL, a JSON list, or Parquet, told by the file's extension.

mod json;
mod parquet;
mod thrift;
mod unusable;

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use cpift_core::BadInput;
use serde_json::{Map, Value};

use super::place::Place;

pub use unusable::{has_unusable, reason, text_of, unusable};

/// The columns of a row, in file order. A value that is neither text nor a JSON number is a marker, see [`reason`].
pub type Fields = Map<String, Value>;

/// How a data file holds its rows.
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
    /// By the extension of `path`, in any case; `None` for one that is not known.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "jsonl" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// All rows of the file at `path` with their places, in order.
///
/// # Errors
/// [`BadInput`] for an unknown extension, a file that is broken, and a row that is not an object (named).
pub fn read_fields(path: &Path) -> Result<Vec<(Place, Fields)>> {
    let file: Arc<Path> = path.into();
    match FileKind::of(path) {
        Some(FileKind::JsonLines) => json::read_lines(&file),
        Some(FileKind::Json) => json::read_list(&file),
        Some(FileKind::Parquet) => parquet::read(&file),
        None => Err(BadInput::new(path, "a data file of an unknown kind")
            .expected("a name that ends in .jsonl, .json or .parquet")
            .hint("rename it if it is one of these, else convert it to one object a line (.jsonl)")
            .into()),
    }
}
