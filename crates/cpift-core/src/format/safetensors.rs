//! Safetensors files: a reader that checks the header once, so that views cannot fail afterwards,
//! and a deterministic writer.
//!
//! The `safetensors` crate checks that tensors are contiguous and fit their shapes. This module
//! adds errors that name the file and the numbers, and a writer whose output depends only on the
//! content.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::error::BadInput;
use crate::files::{self, refuse_placeholder, staging};
use crate::format::dtype::Dtype;

/// Largest header that the safetensors format allows, in bytes.
const MAX_HEADER: u64 = 100_000_000;

/// Dtype, shape and position of a tensor in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Element type.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Byte range of the elements in the file.
    pub range: Range<usize>,
}

/// A mapped safetensors file with a checked header.
pub struct MappedFile {
    /// Path of the file, for messages.
    pub path: PathBuf,
    /// String metadata of the header.
    pub metadata: BTreeMap<String, String>,
    /// Tensors in bytewise name order.
    pub entries: BTreeMap<String, Entry>,
    map: Mmap,
}

impl MappedFile {
    /// Maps and checks `path`.
    ///
    /// # Errors
    /// [`BadInput`] if the header is truncated or not JSON, or describes tensors that overlap,
    /// leave gaps or extend past the end of the file.
    pub fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        let (data_start, header) = read_header(path, &map)?;
        let mut entries = BTreeMap::new();
        for (name, info) in header.tensors() {
            let dtype = Dtype::from_safetensors(info.dtype).ok_or_else(|| {
                BadInput::new(path, "unsupported dtype")
                    .tensor(&name)
                    .expected(Dtype::KNOWN)
                    .found(format!("{:?}", info.dtype))
            })?;
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            entries.insert(name, Entry { dtype, shape: info.shape.clone(), range });
        }
        let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self { path: path.to_owned(), metadata, entries, map })
    }

    /// Bytes of the whole file.
    pub fn whole(&self) -> &[u8] {
        &self.map
    }

    /// Bytes of one tensor of this file.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.range.clone()]
    }
}

/// Header of a file, as JSON.
#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    metadata: Option<HashMap<String, String>>,
    #[serde(flatten, deserialize_with = "each_once")]
    tensors: HashMap<String, TensorInfo>,
}

/// Deserializes a map and refuses repeated names.
fn each_once<'de, D: Deserializer<'de>>(input: D) -> Result<HashMap<String, TensorInfo>, D::Error> {
    struct Each;
    impl<'de> Visitor<'de> for Each {
        type Value = HashMap<String, TensorInfo>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("tensors by name")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut tensors = HashMap::new();
            while let Some((name, info)) = map.next_entry::<String, TensorInfo>()? {
                if tensors.contains_key(&name) {
                    return Err(A::Error::custom(format!("the tensor {name} appears twice")));
                }
                tensors.insert(name, info);
            }
            Ok(tensors)
        }
    }
    input.deserialize_map(Each)
}

/// Reads and checks the header. Returns the offset at which the data begins, and the header, whose
/// tensors fill the data exactly.
fn read_header(path: &Path, map: &[u8]) -> Result<(usize, Metadata)> {
    refuse_placeholder(path, map)?;
    let data_start = check_lengths(path, map)?;
    let Header { metadata, tensors } = serde_json::from_slice(&map[8..data_start])
        .map_err(|e| BadInput::new(path, format!("not a valid safetensors header: {e}")))?;
    let mut tensors: Vec<(String, TensorInfo)> = tensors.into_iter().collect();
    tensors.sort_by(|(a, x), (b, y)| x.data_offsets.cmp(&y.data_offsets).then_with(|| a.cmp(b)));
    let header = Metadata::new(metadata, tensors).map_err(|e| explain(path, &e))?;
    // In 128 bits, because offsets may be any 64-bit numbers and the sum must not overflow.
    let described = header.data_len() as u128 + data_start as u128;
    if described != map.len() as u128 {
        let message = "the tensors do not fill the file exactly: it is truncated or has extra bytes";
        return Err(BadInput::new(path, message)
            .expected(format!("{described} bytes"))
            .found(format!("{} bytes", map.len()))
            .hint("download or copy the file again")
            .into());
    }
    Ok((data_start, header))
}

fn check_lengths(path: &Path, map: &[u8]) -> Result<usize> {
    let Some(first) = map.first_chunk::<8>() else {
        return Err(BadInput::new(path, "too short to be a safetensors file")
            .expected("at least 8 bytes")
            .found(format!("{} bytes", map.len()))
            .hint("the file may be truncated: download or copy it again")
            .into());
    };
    let (header, room) = (u64::from_le_bytes(*first), map.len() as u64 - 8);
    if header > MAX_HEADER.min(room) {
        return Err(BadInput::new(path, "the header extends past the end of the file")
            .expected(format!("at most {} bytes", room.min(MAX_HEADER)))
            .found(format!("{header} bytes"))
            .hint("the file is truncated or is not a safetensors file")
            .into());
    }
    Ok(8 + header as usize)
}

fn explain(path: &Path, error: &safetensors::SafeTensorError) -> BadInput {
    use safetensors::SafeTensorError as E;
    match error {
        E::InvalidOffset(name) => {
            BadInput::new(path, "a tensor's offsets overlap another's, leave a gap or go backwards")
                .tensor(name)
                .expected("contiguous tensors")
                .hint("the file is damaged: download or write it again")
        }
        E::TensorInvalidInfo => BadInput::new(path, "a tensor's offsets do not fit its dtype and shape"),
        other => BadInput::new(path, format!("not a valid safetensors header: {other}")),
    }
}

/// Name, dtype and shape of a tensor to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type on disk.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes on disk.
    pub fn nbytes(&self) -> usize {
        self.numel() * self.dtype.size()
    }
}

/// Writes a safetensors file by positional writes, from any thread and in any order.
pub struct FileWriter {
    file: File,
    /// Final path, for messages.
    path: PathBuf,
    specs: Vec<TensorSpec>,
    starts: BTreeMap<String, (u64, u64)>,
    header_len: usize,
}

impl FileWriter {
    /// Creates `path` with the header for `specs` and `metadata`; all data is zero.
    pub fn create(path: &Path, specs: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Self> {
        Self::create_with_last(path, specs, None, metadata)
    }

    /// As [`FileWriter::create`], with a tensor `last` at the end of the file that
    /// [`FileWriter::drop_last`] can take away.
    pub(crate) fn create_with_last(
        path: &Path,
        specs: &[TensorSpec],
        last: Option<TensorSpec>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut specs = specs.to_vec();
        sort(&mut specs);
        specs.extend(last);
        let (header, starts, len) = lay_out(&specs, metadata, 0);
        let file = staging::create_sized(path, len)?;
        let path = staging::final_name(path);
        file.write_all_at(&header, 0).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self { file, path, specs, starts, header_len: header.len() })
    }

    /// Cuts the last tensor off the file. The header still has it until
    /// [`FileWriter::replace_metadata`].
    pub(crate) fn drop_last(&mut self) -> Result<()> {
        let Some(last) = self.specs.pop() else { return Ok(()) };
        let (start, _) = self.starts.remove(&last.name).expect("every tensor has a place");
        self.file.set_len(start).with_context(|| format!("writing {}", self.path.display()))
    }

    /// Replaces the metadata in place.
    ///
    /// # Panics
    /// If the new metadata is longer than the old.
    pub(crate) fn replace_metadata(&self, metadata: &BTreeMap<String, String>) -> Result<()> {
        let (header, _, _) = lay_out(&self.specs, metadata, self.header_len);
        assert_eq!(header.len(), self.header_len, "the new metadata is longer than the old");
        self.file.write_all_at(&header, 0).with_context(|| format!("writing {}", self.path.display()))
    }

    /// Syncs everything written so far to disk. Other threads may continue writing.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| format!("writing {}", self.path.display()))
    }

    /// Writes `bytes` at byte `offset` of the tensor `name`.
    ///
    /// # Panics
    /// If the tensor is not among the specs or the bytes extend past its end.
    pub fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let (start, len) = self.starts[name];
        assert!(offset + bytes.len() as u64 <= len, "write past the end of {name}");
        self.file.write_all_at(bytes, start + offset).with_context(|| format!("writing {}", self.path.display()))
    }

    /// Reads back the bytes at byte `offset` of the tensor `name`.
    ///
    /// # Panics
    /// If the tensor is not among the specs.
    pub fn read(&self, name: &str, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let (start, _) = self.starts[name];
        self.file.read_exact_at(bytes, start + offset).with_context(|| format!("reading back {}", self.path.display()))
    }
}

/// Sorts tensors by element size, largest first, so that each is aligned to its elements, and then
/// by name.
fn sort(specs: &mut [TensorSpec]) {
    specs.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
}

/// Returns the header bytes, (start, length) of each tensor in the file, and the length of the
/// file. Tensors keep their order. The header takes at least `room` bytes.
fn lay_out(
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    room: usize,
) -> (Vec<u8>, BTreeMap<String, (u64, u64)>, u64) {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut starts = BTreeMap::new();
    let mut offset = 0u64;
    for spec in specs {
        let end = offset + spec.nbytes() as u64;
        let entry = json!({"dtype": spec.dtype.name(), "shape": spec.shape, "data_offsets": [offset, end]});
        header.insert(spec.name.clone(), entry);
        starts.insert(spec.name.clone(), (offset, end - offset));
        offset = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8).max(room.saturating_sub(8)), b' ');
    let data_start = 8 + text.len() as u64;
    for (start, _) in starts.values_mut() {
        *start += data_start;
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    (bytes, starts, data_start + offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn repeated_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let tensor = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
        let header = format!(r#"{{"w":{tensor},"w":{tensor}}}"#);
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[7]].concat();
        std::fs::write(&path, bytes).unwrap();
        let error = MappedFile::open(&path).err().unwrap().to_string();
        assert!(error.contains("the tensor w appears twice"), "{error}");
    }

    #[test]
    fn written_tensors_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let specs = [spec("b", Dtype::BF16, &[3]), spec("a", Dtype::F32, &[2, 1]), spec("s", Dtype::F32, &[])];
        let writer = FileWriter::create(&path, &specs, &BTreeMap::from([("format".into(), "pt".into())])).unwrap();
        writer.write("b", 2, &[1, 2, 3, 4]).unwrap();
        writer.write("a", 0, &1.5f32.to_le_bytes()).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.metadata["format"], "pt");
        assert_eq!(file.bytes(&file.entries["b"]), [0, 0, 1, 2, 3, 4]);
        assert_eq!(file.entries["a"].shape, [2, 1]);
        assert_eq!(file.bytes(&file.entries["a"])[..4], 1.5f32.to_le_bytes());
        assert_eq!(file.entries["a"].range.start % 8, 0);
    }

    #[test]
    fn offsets_near_the_end_of_64_bits_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        // Nine tensors of the largest size that passes the checks of the format; the last ends at
        // 2⁶⁴ − 1.
        let mut ends: Vec<u64> = (0..=8u64).map(|i| i * ((1 << 61) - 1)).collect();
        ends.push(u64::MAX);
        let tensor = |(i, pair): (usize, &[u64])| {
            (format!("t{i}"), json!({"dtype": "U8", "shape": [pair[1] - pair[0]], "data_offsets": pair}))
        };
        let header: Map<String, Value> = ends.windows(2).enumerate().map(tensor).collect();
        let text = Value::Object(header).to_string();
        std::fs::write(&path, [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()).unwrap();
        let error = MappedFile::open(&path).map(drop).unwrap_err().to_string();
        assert!(error.contains("do not fill the file exactly"), "{error}");
    }
}
