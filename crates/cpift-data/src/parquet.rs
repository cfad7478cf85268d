//! Parquet, as the Hugging Face Hub exports data sets: columns of text and numbers, messages as
//! lists of structs.
//!
//! The parquet crate trusts sizes and counts in a file. It loops over as many list elements as a
//! header claims, and a boolean or unknown element takes no bytes, so six bytes can claim two
//! billion. [`walk`] therefore checks the metadata and the page headers (Thrift's compact protocol)
//! first: every element takes at least one byte, and the fields of a structure come once and in
//! order, as all writers put them.

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

use crate::files::{Fields, Place, text_of, unusable};

/// Reads all row groups, with uncompressed, Snappy or Zstandard pages; other codecs are errors that
/// name the codec.
pub fn read(file: &Arc<Path>) -> Result<Vec<(Place, Fields)>> {
    // The library panics on some damaged files.
    catch_unwind(|| read_groups(file)).unwrap_or_else(|_| Err(broken(file, "its parts contradict each other").into()))
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

/// A field as JSON. Bytes without an annotation are text if they are UTF-8, as Impala, old Spark
/// and pandas write text.
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
    if let Value::String(text) = key { text } else { text_of(&key) }
}

/// The metadata: the bytes before the last eight, which hold its length and a magic number.
fn metadata(bytes: &[u8]) -> Option<&[u8]> {
    let (before, end) = bytes.split_last_chunk::<8>()?;
    let length = u32::from_le_bytes([end[0], end[1], end[2], end[3]]) as usize;
    before.get(before.len().checked_sub(length)?..)
}

/// Field ids of a page header: kind and sizes, before the fields that differ between kinds of page.
const KIND: i64 = 1;
const UNCOMPRESSED_SIZE: i64 = 2;
const COMPRESSED_SIZE: i64 = 3;
/// Largest growth of a page by decompression, plus a constant: the library allocates what the
/// header claims.
const GROWTH: i64 = 1024;
const PAGE: i64 = 1 << 20;
/// Largest number of rows per byte, plus a constant; repeated values compress well.
const ROWS: i64 = 64;
const FEW: i64 = 1 << 16;

/// Returns an error for page headers that do not end, and for pages and rows of implausible size.
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
        .expected("a complete Parquet file with pages that are uncompressed, Snappy or Zstandard")
}

/// Largest nesting depth; Parquet's own is 6.
const DEEPEST: usize = 32;

/// Extent and integers of a Thrift structure.
#[derive(Debug, PartialEq, Eq)]
pub struct Walked {
    /// Length in bytes.
    pub length: usize,
    /// Integer fields by id.
    pub integers: Vec<(i64, i64)>,
}

impl Walked {
    /// The integer of the field `id`.
    pub fn integer(&self, id: i64) -> Option<i64> {
        self.integers.iter().find(|(known, _)| *known == id).map(|(_, value)| *value)
    }
}

/// Parses the structure at the start of `bytes`. Returns `None` if it does not end in them, or
/// contains what Parquet's structures do not: maps, lists of booleans, deep nesting.
pub fn walk(bytes: &[u8]) -> Option<Walked> {
    let mut walk = Walk { rest: bytes };
    let mut integers = Vec::new();
    walk.fields(DEEPEST, |id, value| integers.push((id, value)))?;
    Some(Walked { length: bytes.len() - walk.rest.len(), integers })
}

struct Walk<'a> {
    rest: &'a [u8],
}

impl Walk<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    fn bytes(&mut self, count: u64) -> Option<()> {
        self.rest = self.rest.get(usize::try_from(count).ok()?..)?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn integer(&mut self) -> Option<i64> {
        let bits = self.varint()?;
        Some((bits >> 1) as i64 ^ -((bits & 1) as i64))
    }

    fn fields(&mut self, depth: usize, mut integer: impl FnMut(i64, i64)) -> Option<()> {
        let mut id = 0;
        loop {
            let head = self.byte()?;
            let next = match (head & 0xf, head >> 4) {
                (0, _) => return Some(()),
                (_, 0) => self.integer()?,
                (_, step) => id + i64::from(step),
            };
            if next <= id || next > i64::from(i16::MAX) {
                return None;
            }
            id = next;
            match head & 0xf {
                // A boolean is encoded in the head.
                1 | 2 => {}
                4..=6 => integer(id, self.integer()?),
                kind => self.value(kind, depth)?,
            }
        }
    }

    fn value(&mut self, kind: u8, depth: usize) -> Option<()> {
        match kind {
            3 => self.bytes(1),
            4..=6 => self.varint().map(drop),
            7 => self.bytes(8),
            8 => {
                let length = self.varint()?;
                self.bytes(length)
            }
            9 | 10 => self.elements(depth.checked_sub(1)?),
            12 => self.fields(depth.checked_sub(1)?, |_, _| ()),
            13 => self.bytes(16),
            _ => None,
        }
    }

    fn elements(&mut self, depth: usize) -> Option<()> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        (0..count).try_for_each(|_| self.value(head & 0xf, depth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lists_and_structures_are_walked_over() {
        // 1: i32 -3; 2: binary "ab"; 3: list of two i32; 4: struct {1: true}; 20: i64 300; stop;
        // one byte more.
        let bytes = [0x15, 5, 0x18, 2, b'a', b'b', 0x19, 0x25, 2, 4, 0x1c, 0x11, 0, 0x06, 40, 0xd8, 4, 0, 9];
        assert_eq!(walk(&bytes), Some(Walked { length: 18, integers: vec![(1, -3), (20, 300)] }));
        (0..18).for_each(|end| assert_eq!(walk(&bytes[..end]), None, "{end}"));
        assert_eq!(walk(&bytes).unwrap().integer(20), Some(300));
        assert_eq!(walk(&bytes).unwrap().integer(2), None);
    }

    #[test]
    fn what_takes_no_bytes_or_comes_twice_is_refused() {
        // Field 2 again, by its whole id; field 65538, which is 2 in sixteen bits.
        assert_eq!(walk(&[0x25, 2, 0x05, 4, 8, 0]), None);
        assert_eq!(walk(&[0x25, 2, 0x05, 0x84, 0x80, 8, 8, 0]), None);
        let booleans = [0x19, 0xf1, 0xff, 0xff, 0xff, 0xff, 7, 0];
        assert_eq!(walk(&booleans), None);
        let deep = [&[0x19; 1][..], &[0x19; 40], &[0x15, 2, 0]].concat();
        assert_eq!(walk(&deep), None);
        let strings = [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0];
        assert_eq!(walk(&strings), None);
    }
}
