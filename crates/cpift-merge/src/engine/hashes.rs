//! The digests of inputs that have none recorded, taken in the pass that first reads them.

use std::collections::BTreeMap;

use anyhow::Result;
use cpift_core::TensorView;
use cpift_core::stream::hashing::PieceHasher;

use super::jobs::{CHUNK, Piece};
use crate::plan::Source;

/// A hasher for each source whose digest is not known, in the order of the sources.
pub struct InputHashes<'a> {
    list: Vec<Option<InputHash<'a>>>,
}

struct InputHash<'a> {
    source: &'a Source,
    hasher: PieceHasher,
    index: BTreeMap<&'a str, usize>,
}

impl<'a> InputHashes<'a> {
    /// For `sources`: the operands, then a base that is read apart from them.
    pub fn new(sources: impl Iterator<Item = &'a Source>) -> Self {
        let hash = |source: &'a Source| {
            if source.known_digest().is_some() {
                return None;
            }
            let specs: Vec<_> = source.checkpoint.tensors().map(|view| view.spec()).collect();
            let index = source.checkpoint.tensors().enumerate().map(|(i, view)| (view.name, i)).collect();
            Some(InputHash { source, hasher: PieceHasher::new(&specs, CHUNK), index })
        };
        Self { list: sources.map(hash).collect() }
    }

    /// Adds a piece of `view` of source number `source`.
    pub fn add(&self, source: usize, view: &TensorView<'_>, piece: &Piece) {
        if let Some(hash) = &self.list[source] {
            hash.add(view, piece);
        }
    }

    /// Adds what was not read by the merge and tells each source its digest.
    ///
    /// # Errors
    /// I/O errors on the side files.
    pub fn finish(self) -> Result<()> {
        for InputHash { source, hasher, .. } in self.list.into_iter().flatten() {
            hasher.add_missing(&source.checkpoint);
            source.set_digest(hasher.finish(source.checkpoint.folder())?);
        }
        Ok(())
    }
}

impl InputHash<'_> {
    fn add(&self, view: &TensorView<'_>, piece: &Piece) {
        let size = view.dtype.size();
        let bytes = &view.bytes[piece.elements.start * size..piece.elements.end * size];
        // An output embedding that stands for the input embedding has no tensor of its own.
        if let Some(index) = self.index.get(view.name) {
            self.hasher.add(*index, piece.elements.start, bytes);
        }
    }
}
