//! Content digests: BLAKE3 over names, dtypes, shapes and hashes of tensors, plus config and
//! tokenizer for directories.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::checkpoint::layout;
use super::checkpoint::sidecar::SIDECAR_FILES;
use crate::files::map;

/// BLAKE3 digest in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest(String);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Digest {
    /// A digest of zeros, to reserve room for one.
    pub fn blank() -> Self {
        Self("0".repeat(2 * blake3::OUT_LEN))
    }

    /// Digest of the bytes of a file.
    ///
    /// # Errors
    /// [`crate::error::BadInput`] if it cannot be read.
    pub fn of_file(path: &Path) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_rayon(&map(path)?);
        Ok(Self::of_hasher(&hasher))
    }

    /// Digest of the concatenation of `chunks`.
    pub fn of_chunks(chunks: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        let mut hasher = blake3::Hasher::new();
        for chunk in chunks {
            hasher.update(chunk.as_ref());
        }
        Self::of_hasher(&hasher)
    }

    pub(crate) fn of_hasher(hasher: &blake3::Hasher) -> Self {
        Self::of_hash(*hasher.finalize().as_bytes())
    }

    pub(crate) fn of_hash(hash: [u8; 32]) -> Self {
        Self(blake3::Hash::from(hash).to_hex().to_string())
    }
}

/// Digest with the sizes and mtimes of the files it was computed from, which tell whether it is
/// still valid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestRecord {
    /// The digest.
    pub blake3: Digest,
    /// Files it covers.
    pub files: Vec<FileStamp>,
}

/// Name, size and modification time of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    name: String,
    size: u64,
    mtime_ns: u64,
}

impl DigestRecord {
    /// Records the sizes and mtimes of the files of `folder`, whose digest is known to be `blake3`.
    pub(crate) fn stamp(folder: &Path, blake3: Digest) -> Result<Self> {
        Ok(Self { blake3, files: stamps(folder)? })
    }

    /// Computes the digest of a file that will be renamed to `dest`; a rename changes neither size
    /// nor mtime.
    ///
    /// # Errors
    /// As [`Digest::of_file`].
    pub(crate) fn of_staged(path: &Path, dest: &Path) -> Result<Self> {
        let name = dest.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { blake3: Digest::of_file(path)?, files: vec![stamp(name, path)?] })
    }

    /// Returns true if the file at `path` has the size and mtime it had when the digest was
    /// computed.
    pub(crate) fn holds_for_file(&self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        stamp(name, path).is_ok_and(|now| self.files == [now])
    }

    /// The file or checkpoint directory that the digest is of, in the output `out`.
    pub(crate) fn subject(&self, out: &Path) -> PathBuf {
        match &self.files[..] {
            // A checkpoint has weights beside its config.json.
            [file] if out.is_dir() => out.join(&file.name),
            _ => out.to_owned(),
        }
    }

    /// Returns true if every weight file the digest covers has been deleted from `folder`.
    pub(crate) fn lost_weights(&self, folder: &Path) -> bool {
        let mut weights = self.files.iter().filter(|file| file.name.contains(".safetensors")).peekable();
        weights.peek().is_some() && weights.all(|file| !folder.join(&file.name).exists())
    }

    /// Returns true if the files of `folder` have the sizes and mtimes they had when the digest was
    /// computed.
    pub fn holds_for(&self, folder: &Path) -> bool {
        stamps(folder).is_ok_and(|now| now == self.files)
    }
}

impl FileStamp {
    /// Stamps of the plain file or checkpoint directory at `path`; none if it cannot be read.
    pub fn of(path: &Path) -> Vec<Self> {
        let name = || path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let found = if path.is_dir() { stamps(path) } else { stamp(name(), path).map(|one| vec![one]) };
        found.unwrap_or_default()
    }

    /// Stamps as [`FileStamp::of`] gives them, or none if a file was changed or replaced at or
    /// after `unix` (in seconds): then a digest taken since may be of another content.
    pub(crate) fn of_unchanged(path: &Path, unix: u64) -> Vec<Self> {
        let stamps = Self::of(path);
        let file = |stamp: &Self| if path.is_dir() { path.join(&stamp.name) } else { path.to_owned() };
        let before = |stamp: &Self| fs::metadata(file(stamp)).is_ok_and(|meta| meta.ctime() < unix as i64);
        if stamps.iter().all(before) { stamps } else { Vec::new() }
    }
}

fn stamps(folder: &Path) -> Result<Vec<FileStamp>> {
    let mut out = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if SIDECAR_FILES.contains(&name.as_str()) || name.contains(".safetensors") {
            out.push(stamp(name, &entry.path())?);
        }
    }
    for component in layout::components(folder)? {
        for entry in fs::read_dir(folder.join(&component))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(".safetensors") {
                out.push(stamp(format!("{component}/{name}"), &entry.path())?);
            }
        }
    }
    out.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(out)
}

fn stamp(name: String, path: &Path) -> Result<FileStamp> {
    let meta = fs::metadata(path)?;
    let mtime_ns = meta.modified()?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    Ok(FileStamp { name, size: meta.len(), mtime_ns })
}
