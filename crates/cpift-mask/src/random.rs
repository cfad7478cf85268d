//! `random`: a control mask with as many elements as another, drawn uniformly at random from the
//! same D.

use std::path::PathBuf;

use anyhow::Result;
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{MaskHeader, Metric, Scope, Ties, count_ones};
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::Recorder;
use cpift_core::{BadInput, Mask};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::output::{clear_padding, write_mask};

/// A checked request for a control mask.
pub(crate) struct Plan {
    /// The mask whose number of elements is drawn.
    pub(crate) like: Mask,
    pub(crate) seed: u64,
    /// Draw each tensor's count, not only the total.
    pub(crate) per_tensor: bool,
    pub(crate) out: PathBuf,
    pub(crate) force: bool,
}

impl Plan {
    /// Writes the mask and its record, or nothing; returns the summary for `--json`.
    ///
    /// # Errors
    /// [`BadInput`] for a mask that is not sound or an output that exists.
    pub(crate) fn run(&self, mut recorder: Recorder) -> Result<Value> {
        let Self { like, seed, per_tensor, out, force } = self;
        like.verify()?;
        let counts = counts(like)?;
        let rng = &mut ChaCha8Rng::seed_from_u64(*seed);
        let bits = if *per_tensor {
            counts.iter().map(|t| (t.name, draw(rng, t.elements, t.selected))).collect()
        } else {
            draw_over_all(rng, &counts)
        };
        let header = MaskHeader {
            scope: if *per_tensor { Scope::Tensor } else { Scope::Global },
            metric: Metric::Random,
            seed: Some(*seed),
            rule: None,
            ties: Ties::default(),
            ..like.header.clone()
        };
        recorder.seed(*seed);
        recorder.input("like", like.path(), Digest::of_file(like.path())?);
        write_mask(out, *force, &header, bits, recorder)?;
        let each = if *per_tensor { ", as many in each tensor" } else { "" };
        log::info!(
            "{}: {} of D = {} elements at random, seed {seed}, as many as {} has{each}",
            out.display(),
            header.selected,
            header.d,
            like.path().display()
        );
        Ok(json!({
            "out": out,
            "like": like.path(),
            "scope": header.scope,
            "metric": header.metric,
            "seed": seed,
            "D": header.d,
            "selected": header.selected,
            "excluded": header.excluded,
        }))
    }
}

/// A tensor of D with the number of its elements that the mask selects.
struct Count<'a> {
    name: &'a str,
    elements: u64,
    selected: u64,
}

/// The tensors of D, in bytewise name order.
fn counts(like: &Mask) -> Result<Vec<Count<'_>>> {
    let bad = |what: &str| BadInput::new(like.path(), what);
    let kinds: Vec<TensorKind> = like
        .header
        .excluded
        .iter()
        .map(|kind| kind.parse())
        .collect::<Result<_, _>>()
        .map_err(|e| bad("unknown kind of excluded tensors").expected("embeddings or norms").found(e))?;
    let mut counts = Vec::new();
    for (name, bits) in like.tensors() {
        let (elements, selected) = (like.header.numel[name], count_ones(bits));
        if !kinds.iter().any(|kind| kind.matches(name)) {
            counts.push(Count { name, elements, selected });
        } else if selected > 0 {
            return Err(bad("elements are selected in a tensor that is excluded from D").tensor(name).into());
        }
    }
    let d: u64 = counts.iter().map(|t| t.elements).sum();
    if d != like.header.d {
        return Err(bad("D differs from the number of elements in the tensors that are not excluded")
            .expected(like.header.d.to_string())
            .found(d.to_string())
            .into());
    }
    Ok(counts)
}

/// Draws over all tensors as if they were one.
fn draw_over_all<'a>(rng: &mut ChaCha8Rng, counts: &[Count<'a>]) -> Vec<(&'a str, Vec<u8>)> {
    let sum = |of: fn(&Count<'_>) -> u64| counts.iter().map(of).sum();
    let all = draw(rng, sum(|t| t.elements), sum(|t| t.selected));
    let mut start = 0;
    let slice = |tensor: &Count<'a>| {
        let bits = slice(&all, start, tensor.elements);
        start += tensor.elements;
        (tensor.name, bits)
    };
    counts.iter().map(slice).collect()
}

/// `k` of `n` bits, every choice equally likely: bits are drawn until as many different ones are
/// found as are set, or as are not, whichever are fewer.
fn draw(rng: &mut ChaCha8Rng, n: u64, k: u64) -> Vec<u8> {
    let mut bits = vec![0u8; n.div_ceil(8) as usize];
    let mut left = k.min(n - k);
    while left > 0 {
        let i = rng.random_range(0..n);
        let (byte, bit) = (&mut bits[(i / 8) as usize], 1 << (i % 8));
        left -= u64::from(*byte & bit == 0);
        *byte |= bit;
    }
    if n - k < k {
        bits.iter_mut().for_each(|byte| *byte = !*byte);
        clear_padding(&mut bits, n);
    }
    bits
}

/// Bits `start..start + n`, from bit 0 on.
fn slice(bits: &[u8], start: u64, n: u64) -> Vec<u8> {
    let (first, shift) = ((start / 8) as usize, start % 8);
    let two = |i: usize| u16::from(bits[first + i]) | u16::from(*bits.get(first + i + 1).unwrap_or(&0)) << 8;
    let mut out: Vec<u8> = (0..n.div_ceil(8) as usize).map(|i| (two(i) >> shift) as u8).collect();
    clear_padding(&mut out, n);
    out
}

#[cfg(test)]
mod tests {
    use cpift_core::format::mask::{bit, indices};

    use super::*;

    #[test]
    fn every_count_is_met_and_every_element_is_as_likely() {
        let rng = &mut ChaCha8Rng::seed_from_u64(1);
        for (n, k) in [(0, 0), (1, 0), (1, 1), (13, 3), (13, 10), (64, 64), (1001, 500)] {
            let bits = draw(rng, n, k);
            assert_eq!(count_ones(&bits), k);
            assert!(indices(&bits).all(|i| i < n as usize));
        }
        // Of 20,000 draws of 5 of 20, or of 15, each element is in a quarter: 5,000 give or take
        // 61.
        for k in [5, 15] {
            let mut seen = [0f64; 20];
            (0..20_000).for_each(|_| indices(&draw(rng, 20, k)).for_each(|i| seen[i] += 1.0));
            assert!(seen.iter().all(|n| (n - 1000.0 * k as f64).abs() < 5.0 * 61.3), "{seen:?}");
        }
    }

    #[test]
    fn a_slice_is_those_bits() {
        let bits = draw(&mut ChaCha8Rng::seed_from_u64(2), 100, 50);
        for (start, n) in [(0, 100), (3, 17), (8, 8), (95, 5), (99, 1), (100, 0)] {
            let part = slice(&bits, start, n);
            assert_eq!(part.len() as u64, n.div_ceil(8));
            let expected: Vec<usize> = (0..n as usize).filter(|i| bit(&bits, start as usize + i)).collect();
            assert_eq!(indices(&part).collect::<Vec<_>>(), expected);
        }
    }
}
