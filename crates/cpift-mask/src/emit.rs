//! Writing the bits of a part once its cut is known.

use anyhow::{Result, ensure};
use cpift_core::mask::{MaskWriter, count_ones};

use crate::parts::Part;
use crate::select::{Buffers, Cut, Magnitude, sweep};

struct Packer<T> {
    buffers: Buffers<T>,
    bytes: Vec<u8>,
    selected: u64,
    result: Result<()>,
}

/// Writes the bits of all chosen elements of `part` and returns their number; `done(bytes)` is told of progress.
///
/// # Errors
/// I/O errors; the inputs changed under us.
pub fn emit<T: Magnitude>(
    part: &Part<'_>,
    cut: &Cut<T>,
    writer: &MaskWriter,
    done: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let before = if cut.ties.decided_by_position > 0 { Some(ties_before(part, cut.threshold)) } else { None };
    let init = || Packer { buffers: Buffers::<T>::new(), bytes: Vec::new(), selected: 0, result: Ok(()) };
    let packers = sweep(part.chunks.len(), init, |state, i| {
        if state.result.is_err() {
            return;
        }
        // Ties this chunk may still choose: all of them when position decides nothing.
        let room = before.as_ref().map_or(u64::MAX, |counts| cut.ties.chosen.saturating_sub(counts[i]));
        let chunk = part.chunks[i];
        pack(state.buffers.distances(part, chunk), cut.threshold, room, &mut state.bytes);
        let ones = count_ones(&state.bytes);
        if ones > 0 {
            state.selected += ones;
            state.result = writer.write(part.pairs[chunk.pair].base.name, chunk.start as u64 / 8, &state.bytes);
        }
        done(part.chunk_bytes(chunk));
    });
    let mut selected = 0;
    for packer in packers {
        packer.result?;
        selected += packer.selected;
    }
    Ok(selected)
}

/// For each chunk, how many elements equal to the threshold come before it.
fn ties_before<T: Magnitude>(part: &Part<'_>, threshold: T) -> Vec<u64> {
    let init = || (Buffers::<T>::new(), Vec::new());
    let counted = sweep(part.chunks.len(), init, |(buffers, counts), i| {
        let equal = buffers.distances(part, part.chunks[i]).iter().filter(|d| **d == threshold).count();
        counts.push((i, equal as u64));
    });
    let mut counts = vec![0; part.chunks.len()];
    counted.into_iter().flat_map(|(_, list)| list).for_each(|(i, n)| counts[i] = n);
    let mut before = 0;
    for count in &mut counts {
        before += std::mem::replace(count, before);
    }
    counts
}

/// Packs `distance > threshold`, and the first `room` elements equal to it; bit b of byte a is element 8a + b.
fn pack<T: Magnitude>(distances: &[T], threshold: T, mut room: u64, bytes: &mut Vec<u8>) {
    match room {
        0 => pack_where(distances, bytes, |d| d > threshold),
        // More room than elements: no need to count.
        _ if room >= distances.len() as u64 => pack_where(distances, bytes, |d| d >= threshold),
        _ => pack_where(distances, bytes, |d| {
            let tie = d == threshold && room > 0;
            room -= u64::from(tie);
            tie || d > threshold
        }),
    }
}

fn pack_where<T: Copy>(distances: &[T], bytes: &mut Vec<u8>, mut chosen: impl FnMut(T) -> bool) {
    bytes.clear();
    let (eights, rest) = distances.as_chunks::<8>();
    let mut byte = |values: &[T]| (0..).zip(values).fold(0u8, |byte, (b, d)| byte | u8::from(chosen(*d)) << b);
    bytes.extend(eights.iter().map(|eight| byte(eight)));
    if !rest.is_empty() {
        bytes.push(byte(rest));
    }
}

/// Checks that what was written is what the cuts asked for.
///
/// # Errors
/// When it is not, which only inputs that change while they are read can bring about.
pub fn check_count(expected: u64, written: u64) -> Result<()> {
    ensure!(
        expected == written,
        "chose {written} elements where {expected} were asked for: the checkpoints changed while they were read"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_packed_little_end_first_and_ties_fill_the_room_in_order() {
        let distances = [3f32, 1.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 5.0, 2.0];
        let packed = |room| {
            let mut bytes = Vec::new();
            pack(&distances, 2.0, room, &mut bytes);
            bytes
        };
        assert_eq!(packed(0), [0b0000_0001, 0b01]);
        assert_eq!(packed(2), [0b0000_1101, 0b01]);
        assert_eq!(packed(3), [0b0010_1101, 0b01]);
        assert_eq!(packed(u64::MAX), [0b0010_1101, 0b11]);
    }
}
