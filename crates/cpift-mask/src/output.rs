//! Writing masks: whole masks whose bits are known in advance, as those of `tensors`, `random`,
//! `sets` and `convert`; and, for `extract`, the flags of the elements that were chosen among
//! equals, gathered chunk by chunk and written as one tensor of the mask in the order of its bits.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::dispatch;
use cpift_core::files::StagedPath;
use cpift_core::format::mask::{BitList, MaskHeader, MaskWriter, count_ones};
use cpift_core::record::provenance::Recorder;
use rayon::prelude::*;

use crate::part::{CHUNK, Part};
use crate::sweep::ChunkFlags;

/// Writes the mask `out` with `bits` by tensor (all others zero) and the record beside it, or
/// nothing.
///
/// # Errors
/// [`cpift_core::BadInput`] if `out` exists and `force` is false.
pub(crate) fn write_mask<'a>(
    out: &Path,
    force: bool,
    header: &MaskHeader,
    bits: impl IntoIterator<Item = (&'a str, Vec<u8>)>,
    mut recorder: Recorder,
) -> Result<()> {
    let staged = StagedPath::create(out, force)?;
    let writer = MaskWriter::create(&staged.path(), header)?;
    bits.into_iter().try_for_each(|(name, bits)| writer.write(name, 0, &bits))?;
    writer.finish(header)?;
    recorder.fact("D", header.d);
    recorder.fact("selected", header.selected);
    recorder.commit(staged, &[])
}

/// Bits of `n` elements, all set; padding bits are zero.
pub(crate) fn all_set(n: u64) -> Vec<u8> {
    let mut bits = vec![0xff; n.div_ceil(8) as usize];
    clear_padding(&mut bits, n);
    bits
}

/// Clears the padding bits after element `n` in the last byte.
pub(crate) fn clear_padding(bits: &mut [u8], n: u64) {
    if let (used @ 1.., Some(last)) = (n % 8, bits.last_mut()) {
        *last &= (1 << used) - 1;
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_past_the_end_are_zero() {
        assert_eq!(all_set(11), [255, 0b111]);
        assert_eq!((all_set(16), all_set(1), all_set(0)), (vec![255, 255], vec![1], vec![]));
    }
}
