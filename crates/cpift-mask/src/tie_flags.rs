//! Flags of the elements that were chosen among equals: gathered chunk by chunk, written as one
//! tensor of the mask in the order of its bits.

use std::collections::BTreeMap;

use anyhow::Result;
use cpift_core::dispatch;
use cpift_core::format::mask::{BitList, MaskWriter, count_ones};
use rayon::prelude::*;

use crate::part::{CHUNK, Part};
use crate::sweep::ChunkFlags;

/// Flags by tensor and first element of the chunk.
#[derive(Default)]
pub(crate) struct TieFlags<'a>(BTreeMap<(&'a str, usize), Box<[u8]>>);

/// Number of flags after which they are written.
const FLUSH: usize = 1 << 20;

impl<'a> TieFlags<'a> {
    /// Adds the flags of a part.
    pub fn add(&mut self, part: &Part<'a>, flags: Vec<ChunkFlags>) {
        for ChunkFlags { chunk, flags } in flags {
            let chunk = part.chunks[chunk];
            self.0.insert((part.pairs[chunk.pair].base.name, chunk.start), flags);
        }
    }

    /// Writes the flags of all bits of `writer`, whose tensors have the sizes `numel`. Writes
    /// nothing if no element was chosen among equals.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&self, numel: &BTreeMap<String, u64>, writer: &MaskWriter) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let chunks: Vec<(&str, usize, usize)> = numel
            .iter()
            .flat_map(|(name, n)| {
                let n = *n as usize;
                (0..n).step_by(CHUNK).map(move |start| (name.as_str(), start, CHUNK.min(n - start)))
            })
            .collect();
        let count = |bits: &mut Vec<u8>, (name, start, len): &(&str, usize, usize)| {
            bits.resize(len.div_ceil(8), 0);
            writer.read(name, *start as u64 / 8, bits)?;
            Ok(dispatch!(count_ones(bits)))
        };
        let counts: Vec<u64> = chunks.par_iter().map_init(Vec::new, count).collect::<Result<_>>()?;
        let (mut list, mut at) = (BitList::default(), 0);
        for ((name, start, _), n) in chunks.iter().zip(counts) {
            list.extend(self.0.get(&(name, *start)).map_or(&[], |flags| flags), n);
            if list.len() >= FLUSH {
                let bytes = list.take_whole_bytes();
                writer.write_flags(at, &bytes)?;
                at += bytes.len() as u64;
            }
        }
        writer.write_flags(at, &list.into_bytes())
    }
}
