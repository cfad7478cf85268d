//! BLAKE3 digest of a checkpoint, computed piece by piece on any thread while the bytes are in
//! cache.
//!
//! BLAKE3 is a binary tree over 1 KiB chunks. A piece whose length is a power of two can therefore
//! be hashed by itself, and merging the chaining values of all pieces gives the hash of the whole
//! tensor.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use rayon::prelude::*;

use crate::format::checkpoint::reader::Checkpoint;
use crate::format::checkpoint::sidecar::SIDECAR_FILES;
use crate::format::digest::{Digest, DigestRecord};
use crate::format::safetensors::TensorSpec;

/// Hashes the tensors of one checkpoint from pieces added in any order.
pub struct PieceHasher {
    tensors: Vec<Tensor>,
    chunk: usize,
}

struct Tensor {
    spec: TensorSpec,
    pieces: Vec<OnceLock<ChainingValue>>,
}

impl PieceHasher {
    /// Default number of elements per piece.
    pub const CHUNK: usize = 1 << 18;

    /// Creates a hasher for the tensors of `specs`, in pieces of `chunk` elements; the last piece
    /// of a tensor may be shorter.
    ///
    /// # Panics
    /// If `chunk` is not a power of two of at least 1024.
    pub fn new(specs: &[TensorSpec], chunk: usize) -> Self {
        assert!(chunk.is_power_of_two() && chunk >= 1024, "pieces must be subtrees of BLAKE3");
        let mut tensors: Vec<Tensor> = specs
            .iter()
            .map(|spec| Tensor {
                spec: spec.clone(),
                pieces: (0..spec.numel().div_ceil(chunk)).map(|_| OnceLock::new()).collect(),
            })
            .collect();
        // An empty tensor has no pieces to add, so its hash is set here.
        tensors.iter_mut().filter(|t| t.pieces.is_empty()).for_each(|t| t.pieces.push(OnceLock::from(root(&[]))));
        Self { tensors, chunk }
    }

    /// Hashes the piece of tensor `index` (in the order of the specs) that begins at element
    /// `start`.
    ///
    /// # Panics
    /// If `start` or the length is not that of a piece.
    pub fn add(&self, index: usize, start: usize, bytes: &[u8]) {
        let Tensor { spec, pieces } = &self.tensors[index];
        let (size, numel) = (spec.dtype.size(), spec.numel());
        assert!(start.is_multiple_of(self.chunk), "{}: a piece begins at element {start}", spec.name);
        assert_eq!(bytes.len(), self.chunk.min(numel - start) * size, "{}: a piece of another length", spec.name);
        let hash = if pieces.len() == 1 {
            root(bytes)
        } else {
            let offset = (start * size) as u64;
            blake3::Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
        };
        let _ = pieces[start / self.chunk].set(hash);
    }

    /// Hashes the pieces that have not been added yet, reading them from `checkpoint`, which must
    /// match the specs.
    pub fn add_missing(&self, checkpoint: &Checkpoint) {
        let missing: Vec<(usize, usize)> = self
            .tensors
            .iter()
            .enumerate()
            .flat_map(|(t, tensor)| {
                tensor.pieces.iter().enumerate().filter(|(_, p)| p.get().is_none()).map(move |(p, _)| (t, p))
            })
            .collect();
        missing.into_par_iter().for_each(|(t, piece)| {
            let spec = &self.tensors[t].spec;
            let view = checkpoint.stored_tensor(&spec.name).expect("the specs are those of the checkpoint");
            let (start, size) = (piece * self.chunk, spec.dtype.size());
            let end = spec.numel().min(start + self.chunk);
            self.add(t, start, &view.bytes[start * size..end * size]);
        });
    }

    /// Digest of the bytes of tensor `index` alone. For a file treated as one U8 tensor it equals
    /// [`Digest::of_file`].
    ///
    /// # Panics
    /// If a piece has not been added.
    pub fn tensor(&self, index: usize) -> Digest {
        Digest::of_hash(self.tensors[index].hash(self.chunk))
    }

    /// Digest of the checkpoint, including the side files of `folder`.
    ///
    /// # Errors
    /// If a side file cannot be read.
    ///
    /// # Panics
    /// If a piece has not been added.
    pub fn finish(&self, folder: Option<&Path>) -> Result<Digest> {
        let mut tensors: Vec<&Tensor> = self.tensors.iter().collect();
        tensors.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        let mut hasher = blake3::Hasher::new();
        for tensor in tensors {
            let TensorSpec { name, dtype, shape } = &tensor.spec;
            hasher.update(format!("{name}\0{dtype}\0{shape:?}\0").as_bytes());
            hasher.update(&tensor.hash(self.chunk));
        }
        for name in SIDECAR_FILES.iter().filter(|_| folder.is_some()) {
            let path = folder.unwrap_or(Path::new("")).join(name);
            if path.is_file() {
                let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
                hasher.update(format!("{name}\0{}\0", bytes.len()).as_bytes());
                hasher.update(&bytes);
            }
        }
        Ok(Digest::of_hasher(&hasher))
    }
}

impl Digest {
    /// Digest of a checkpoint: the hash of every tensor in bytewise name order, then the side files
    /// of its directory. It does not depend on the shards or the order of tensors in a file.
    ///
    /// # Errors
    /// If a side file cannot be read.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let specs: Vec<_> = checkpoint.tensors().map(|view| view.spec()).collect();
        let hasher = PieceHasher::new(&specs, PieceHasher::CHUNK);
        hasher.add_missing(checkpoint);
        Ok(checkpoint.with_adapter(hasher.finish(checkpoint.folder())?))
    }
}

impl DigestRecord {
    /// Computes the digest of the checkpoint in `folder` and records the sizes and mtimes of its
    /// files.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn compute(folder: &Path) -> Result<Self> {
        Self::stamp(folder, Digest::of_checkpoint(&Checkpoint::open(folder)?)?)
    }
}

impl Tensor {
    fn hash(&self, chunk: usize) -> ChainingValue {
        let hashes: Vec<ChainingValue> = self
            .pieces
            .iter()
            .map(|p| *p.get().unwrap_or_else(|| panic!("{}: a piece was not hashed", self.spec.name)))
            .collect();
        let [whole] = hashes.as_slice() else {
            let (left, right) = halves(&hashes, self.spec.nbytes(), chunk * self.spec.dtype.size());
            return *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes();
        };
        *whole
    }
}

fn root(bytes: &[u8]) -> ChainingValue {
    *blake3::hash(bytes).as_bytes()
}

/// Chaining values of the left and right subtrees over `bytes` bytes in pieces of `piece` bytes.
fn halves(hashes: &[ChainingValue], bytes: usize, piece: usize) -> (ChainingValue, ChainingValue) {
    let left = left_subtree_len(bytes as u64) as usize;
    let (a, b) = hashes.split_at(left / piece);
    (subtree(a, left, piece), subtree(b, bytes - left, piece))
}

fn subtree(hashes: &[ChainingValue], bytes: usize, piece: usize) -> ChainingValue {
    if let [only] = hashes {
        return *only;
    }
    let (left, right) = halves(hashes, bytes, piece);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::dtype::Dtype;

    #[test]
    fn pieces_in_any_order_give_the_hash_of_the_whole() {
        let bytes: Vec<u8> = (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for (numel, dtype) in [
            (0, Dtype::U8),
            (1, Dtype::F32),
            (1024, Dtype::U8),
            (1025, Dtype::BF16),
            (9_999, Dtype::F32),
            (8_192, Dtype::F32),
            (20_000, Dtype::BF16),
        ] {
            let spec = TensorSpec { name: "w".into(), dtype, shape: vec![numel] };
            let whole = &bytes[..spec.nbytes()];
            let hasher = PieceHasher::new(std::slice::from_ref(&spec), 1024);
            for start in (0..numel).step_by(1024).rev() {
                let end = numel.min(start + 1024);
                hasher.add(0, start, &whole[start * dtype.size()..end * dtype.size()]);
            }
            assert_eq!(hasher.tensors[0].hash(1024), root(whole), "{numel} {dtype}");
        }
    }
}
