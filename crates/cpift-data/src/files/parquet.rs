//! Parquet, as the hub exports data sets: columns of text and numbers, messages as lists of structs.

use std::fmt::Display;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use cpift_core::{BadInput, files};
use parquet::data_type::ByteArray;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::Value;

use super::thrift::walk;
use super::{Fields, unusable};
use crate::place::Place;

/// Reads all row groups. Uncompressed, Snappy and Zstandard pages are known; others are errors that name the codec.
pub fn read(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    // On some damaged files the library panics where it could return an error.
    catch_unwind(|| read_groups(file)).unwrap_or_else(|_| Err(broken(file, "its parts contradict one another").into()))
}

fn read_groups(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    let bytes = files::map(file)?;
    if metadata(&bytes).is_some_and(|metadata| walk(metadata).is_none()) {
        return Err(broken(file, "its metadata does not end where it should").into());
    }
    let reader = SerializedFileReader::new(files::open(file)?).map_err(|e| broken(file, e))?;
    check_sizes(&bytes, reader.metadata()).map_err(|problem| broken(file, problem))?;
    let mut rows = Vec::new();
    for row in reader.get_row_iter(None).map_err(|e| broken(file, e))? {
        let place = Place { file: file.clone(), row: rows.len() + 1 };
        let row = row.map_err(|e| broken(file, format!("{}: {e}", place.position())))?;
        rows.push((place, fields(&row)));
    }
    Ok(rows)
}

fn fields(row: &Row) -> Fields {
    row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

/// A field as JSON. Bytes without an annotation are text where they are UTF-8, as Impala, older Spark and pandas write it.
fn value(field: &Field) -> Value {
    match field {
        Field::Bytes(bytes) => text(bytes),
        Field::Float16(number) => number_of(f64::from(*number)),
        Field::Float(number) => number_of(f64::from(*number)),
        Field::Double(number) => number_of(*number),
        Field::Group(row) => Value::Object(fields(row)),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, field): &(Field, Field)| (name_of(value(key)), value(field));
            Value::Object(map.entries().iter().map(entry).collect())
        }
        other => other.to_json_value(),
    }
}

fn text(bytes: &ByteArray) -> Value {
    match std::str::from_utf8(bytes.data()) {
        Ok(text) => Value::from(text),
        Err(_) => unusable("bytes that are not UTF-8 text"),
    }
}

/// JSON has no number for NaN and the infinities.
fn number_of(number: f64) -> Value {
    let special = || {
        unusable(if number.is_nan() {
            "NaN"
        } else if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        })
    };
    serde_json::Number::from_f64(number).map_or_else(special, Value::Number)
}

fn name_of(key: Value) -> String {
    if let Value::String(text) = key { text } else { super::text_of(&key) }
}

/// What lies between the last page and the eight bytes at the end, which are its length and a mark.
fn metadata(bytes: &[u8]) -> Option<&[u8]> {
    let (before, end) = bytes.split_last_chunk::<8>()?;
    let length = u32::from_le_bytes([end[0], end[1], end[2], end[3]]) as usize;
    before.get(before.len().checked_sub(length)?..)
}

/// Ids of fields of a page's header: its kind and its two sizes, integers all, before what differs between kinds of page.
const KIND: i64 = 1;
const UNCOMPRESSED_SIZE: i64 = 2;
const COMPRESSED_SIZE: i64 = 3;
/// The most that a page may grow, beside a constant: the library takes memory for as much as its header says.
const GROWTH: i64 = 1024;
const PAGE: i64 = 1 << 20;
/// The most rows that a byte may stand for, beside a constant: those of few words, repeated.
const ROWS: i64 = 64;
const FEW: i64 = 1 << 16;

/// Refuses headers of pages that the library would not come to the end of, and pages and rows that claim to be beyond reason.
fn check_sizes(bytes: &[u8], metadata: &ParquetMetaData) -> Result<(), &'static str> {
    if metadata.file_metadata().num_rows() > bytes.len() as i64 * ROWS + FEW {
        return Err("it claims to have more rows than its bytes can hold");
    }
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        let (start, length) = column.byte_range();
        let end = start.checked_add(length).ok_or("a column without an end")?;
        let mut pages = bytes.get(start as usize..end as usize).ok_or("a column that lies outside of it")?;
        while !pages.is_empty() {
            let header = walk(pages).ok_or("the header of a page that does not end where it should")?;
            let size = |id| header.integer(id).filter(|size| *size >= 0).ok_or("a page without a size");
            size(KIND)?;
            let (compressed, uncompressed) = (size(COMPRESSED_SIZE)?, size(UNCOMPRESSED_SIZE)?);
            if uncompressed > compressed.saturating_mul(GROWTH).saturating_add(PAGE) {
                return Err("a page that claims to grow more than a thousandfold");
            }
            pages = pages.get(header.length + compressed as usize..).ok_or("a page that lies outside of its column")?;
        }
    }
    Ok(())
}

fn broken(file: &Path, error: impl Display) -> BadInput {
    BadInput::new(file, format!("cannot be read as Parquet: {error}"))
        .expected("a whole Parquet file, its pages uncompressed, Snappy or Zstandard")
}
