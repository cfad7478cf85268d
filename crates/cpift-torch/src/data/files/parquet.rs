//! Parquet, as the hub exports data sets: columns of text and numbers, messages as lists of structs.

use std::fmt::Display;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use cpift_core::{BadInput, files};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use super::Fields;
use crate::data::place::Place;

/// Reads all row groups. Uncompressed, Snappy and Zstandard pages are known; others are errors that name the codec.
pub fn read(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    // On some damaged files the library panics where it could return an error.
    catch_unwind(|| read_groups(file)).unwrap_or_else(|_| Err(broken(file, "its parts contradict one another").into()))
}

fn read_groups(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    let reader = SerializedFileReader::new(files::open(file)?).map_err(|e| broken(file, e))?;
    let mut rows = Vec::new();
    for row in reader.get_row_iter(None).map_err(|e| broken(file, e))? {
        let place = Place { file: file.clone(), row: rows.len() + 1 };
        match row.map_err(|e| broken(file, format!("{}: {e}", place.position())))?.to_json_value() {
            Value::Object(fields) => rows.push((place, fields)),
            _ => unreachable!("a Parquet row is a group of columns"),
        }
    }
    Ok(rows)
}

fn broken(file: &Path, error: impl Display) -> BadInput {
    BadInput::new(file, format!("cannot be read as Parquet: {error}"))
        .expected("a whole Parquet file, its pages uncompressed, Snappy or Zstandard")
}
