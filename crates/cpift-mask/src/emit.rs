//! Writing the bits of a part whose cut is known: the way out where no bracket served.

use anyhow::{Result, ensure};
use cpift_core::format::mask::{Metric, count_ones};
use cpift_core::stream::select::{Cut, Score, Source};
use rayon::prelude::*;

use crate::parts::Part;
use crate::scores::{Arithmetic, PartScores};
use crate::sweep::Pass;

/// Writes chunks whose threshold is known.
pub struct Packer<T> {
    scores: Vec<T>,
    bytes: Vec<u8>,
}

impl<T: Score + Arithmetic> Packer<T> {
    /// With empty buffers.
    pub fn new() -> Self {
        Self { scores: Vec::new(), bytes: Vec::new() }
    }

    /// Writes the bits of chunk `i`: what is above the threshold and the first `room` elements equal to it; returns their number.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, part: &Part<'_>, i: usize, threshold: T, room: u64, pass: &Pass<'_>) -> Result<u64> {
        let chunk = part.chunks[i];
        PartScores { part, metric: pass.metric }.scores(i, &mut self.scores);
        pack(&self.scores, threshold, room, &mut self.bytes);
        pass.writer.write(part.pairs[chunk.pair].base.name, chunk.start as u64 / 8, &self.bytes)?;
        Ok(count_ones(&self.bytes))
    }
}

impl<T: Score + Arithmetic> Default for Packer<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes the bits of the `k` chosen elements of `part`, all of its bits.
///
/// # Errors
/// I/O errors; the inputs changed under us.
pub fn emit<T: Score + Arithmetic>(part: &Part<'_>, cut: &Cut<T>, k: u64, pass: &Pass<'_>) -> Result<()> {
    let position_decides = cut.ties.decided_by_position > 0;
    let before = position_decides.then(|| ties_before(part, pass.metric, cut.threshold));
    let selected = (0..part.chunks.len())
        .into_par_iter()
        .map_init(Packer::new, |packer, i| {
            // Ties this chunk may still choose: all of them when position decides nothing.
            let room = before.as_ref().map_or(u64::MAX, |counts| cut.ties.chosen.saturating_sub(counts[i]));
            packer.write(part, i, cut.threshold, room, pass)
        })
        .try_reduce(|| 0, |a, b| Ok(a + b))?;
    ensure!(
        selected == k,
        "chose {selected} elements where {k} were asked for: the checkpoints changed while they were read"
    );
    Ok(())
}

/// For each chunk, how many elements equal to the threshold come before it.
fn ties_before<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric, threshold: T) -> Vec<u64> {
    let source = PartScores { part, metric };
    let count = |scores: &mut Vec<T>, i| {
        source.scores(i, scores);
        scores.iter().filter(|s| **s == threshold).count() as u64
    };
    let mut counts: Vec<u64> = (0..part.chunks.len()).into_par_iter().map_init(Vec::new, count).collect();
    let mut before = 0;
    for count in &mut counts {
        before += std::mem::replace(count, before);
    }
    counts
}

/// Packs `score > threshold`, and the first `room` elements equal to it; bit b of byte a is element 8a + b.
fn pack<T: Score>(scores: &[T], threshold: T, mut room: u64, bytes: &mut Vec<u8>) {
    match room {
        0 => pack_where(scores, bytes, |s| s > threshold),
        // More room than elements: no need to count.
        _ if room >= scores.len() as u64 => pack_where(scores, bytes, |s| s >= threshold),
        _ => pack_where(scores, bytes, |s| {
            let tie = s == threshold && room > 0;
            room -= u64::from(tie);
            tie || s > threshold
        }),
    }
}

fn pack_where<T: Copy>(scores: &[T], bytes: &mut Vec<u8>, mut chosen: impl FnMut(T) -> bool) {
    bytes.clear();
    let (eights, rest) = scores.as_chunks::<8>();
    let mut byte = |values: &[T]| (0..).zip(values).fold(0u8, |byte, (b, s)| byte | u8::from(chosen(*s)) << b);
    bytes.extend(eights.iter().map(|eight| byte(eight)));
    if !rest.is_empty() {
        bytes.push(byte(rest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_packed_little_end_first_and_ties_fill_the_room_in_order() {
        let scores = [3f32, 1.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 5.0, 2.0];
        let packed = |room| {
            let mut bytes = Vec::new();
            pack(&scores, 2.0, room, &mut bytes);
            bytes
        };
        assert_eq!(packed(0), [0b0000_0001, 0b01]);
        assert_eq!(packed(2), [0b0000_1101, 0b01]);
        assert_eq!(packed(3), [0b0010_1101, 0b01]);
        assert_eq!(packed(u64::MAX), [0b0010_1101, 0b11]);
    }
}
