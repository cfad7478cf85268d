//! Writing the bits of a part whose cut is known: the way out where no bracket served.

use anyhow::{Result, ensure};
use cpift_core::mask::{Metric, count_ones};
use cpift_core::select::{Cut, Score, Source};

use crate::parts::Part;
use crate::scores::{Arithmetic, PartScores};
use crate::sweep::{Pass, each};

struct Packer<T> {
    scores: Vec<T>,
    bytes: Vec<u8>,
    selected: u64,
    result: Result<()>,
}

/// Writes the bits of the `k` chosen elements of `part`, all of its bits.
///
/// # Errors
/// I/O errors; the inputs changed under us.
pub fn emit<T: Score + Arithmetic>(part: &Part<'_>, cut: &Cut<T>, k: u64, pass: &Pass<'_>) -> Result<()> {
    let before =
        if cut.ties.decided_by_position > 0 { Some(ties_before(part, pass.metric, cut.threshold)) } else { None };
    let source = PartScores { part, metric: pass.metric };
    let init = || Packer { scores: Vec::<T>::new(), bytes: Vec::new(), selected: 0, result: Ok(()) };
    let packers = each(part.chunks.len(), init, |state, i| {
        if state.result.is_err() {
            return;
        }
        // Ties this chunk may still choose: all of them when position decides nothing.
        let room = before.as_ref().map_or(u64::MAX, |counts| cut.ties.chosen.saturating_sub(counts[i]));
        source.scores(i, &mut state.scores);
        pack(&state.scores, cut.threshold, room, &mut state.bytes);
        let chunk = part.chunks[i];
        state.selected += count_ones(&state.bytes);
        state.result = pass.writer.write(part.pairs[chunk.pair].base.name, chunk.start as u64 / 8, &state.bytes);
        (pass.done)(part.chunk_bytes(chunk));
    });
    let mut selected = 0;
    for packer in packers {
        packer.result?;
        selected += packer.selected;
    }
    ensure!(
        selected == k,
        "chose {selected} elements where {k} were asked for: the checkpoints changed while they were read"
    );
    Ok(())
}

/// For each chunk, how many elements equal to the threshold come before it.
fn ties_before<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric, threshold: T) -> Vec<u64> {
    let source = PartScores { part, metric };
    let counted = each(
        part.chunks.len(),
        || (Vec::<T>::new(), Vec::new()),
        |(scores, counts), i| {
            source.scores(i, scores);
            counts.push((i, scores.iter().filter(|s| **s == threshold).count() as u64));
        },
    );
    let mut counts = vec![0; part.chunks.len()];
    counted.into_iter().flat_map(|(_, list)| list).for_each(|(i, n)| counts[i] = n);
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
