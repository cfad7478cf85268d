//! Writing a mask whose bits are known in advance, as `tensors` and `random` do.

use std::path::Path;

use anyhow::Result;
use cpift_core::files::StagedPath;
use cpift_core::format::mask::{MaskHeader, MaskWriter};
use cpift_core::record::provenance::Recorder;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_past_the_end_are_zero() {
        assert_eq!(all_set(11), [255, 0b111]);
        assert_eq!((all_set(16), all_set(1), all_set(0)), (vec![255, 255], vec![1], vec![]));
    }
}
