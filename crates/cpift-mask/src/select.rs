//! The exact threshold of a part: radix selection over the distances' bits, pass by pass, without keeping any distance.
//!
//! Non-negative floats order as their bits do. Each pass counts 16 bits of every element that agrees with the threshold
//! so far, and the count tells the next 16 bits of the threshold: two passes for f32, four for f64. Threads take
//! chunks as they come; sums of counts do not depend on who counted what.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use cpift_core::checkpoint::Float;
use cpift_core::mask::Ties;
use cpift_core::{BadInput, TensorView};

use crate::parts::{CHUNK, Chunk, Pair, Part};

const DIGIT: u32 = 16;
const BINS: usize = 1 << DIGIT;

/// The type distances are computed in, with its order-preserving key.
pub trait Magnitude: Float + Default {
    /// Passes of 16 bits that a key takes.
    const PASSES: u32;

    /// |tuned − base|, never −0.0.
    fn distance(tuned: Self, base: Self) -> Self;

    /// The bits of a distance; order-preserving.
    fn key(self) -> u64;

    /// The distance with these bits.
    fn from_key(key: u64) -> Self;
}

macro_rules! magnitude_impl {
    ($float:ty, $bits:ty, $passes:literal) => {
        impl Magnitude for $float {
            const PASSES: u32 = $passes;

            fn distance(tuned: Self, base: Self) -> Self {
                (tuned - base).abs()
            }

            fn key(self) -> u64 {
                self.to_bits().into()
            }

            fn from_key(key: u64) -> Self {
                Self::from_bits(key as $bits)
            }
        }
    };
}

magnitude_impl!(f32, u32, 2);
magnitude_impl!(f64, u64, 4);

/// Where a part is cut: everything above the threshold is chosen, and the first `ties.chosen` elements equal to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut<T> {
    /// The smallest chosen distance.
    pub threshold: T,
    /// How many elements equal it.
    pub ties: Ties,
}

/// A thread's buffers of two chunks.
pub struct Buffers<T> {
    base: Vec<T>,
    tuned: Vec<T>,
}

impl<T: Magnitude> Buffers<T> {
    /// Room for chunks of [`CHUNK`] elements.
    pub fn new() -> Self {
        Self { base: vec![T::default(); CHUNK], tuned: vec![T::default(); CHUNK] }
    }

    /// The distances of a chunk's elements.
    pub fn distances(&mut self, part: &Part<'_>, chunk: Chunk) -> &[T] {
        let pair = &part.pairs[chunk.pair];
        let (base, tuned) = (&mut self.base[..chunk.len], &mut self.tuned[..chunk.len]);
        pair.base.read(chunk.start, base);
        pair.tuned.read(chunk.start, tuned);
        for (t, b) in tuned.iter_mut().zip(base) {
            *t = T::distance(*t, *b);
        }
        tuned
    }
}

impl<T: Magnitude> Default for Buffers<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs `step` on the indices 0..n in no particular order: every thread takes the next one with a state of its own.
pub fn sweep<S: Send>(n: usize, init: impl Fn() -> S + Sync, step: impl Fn(&mut S, usize) + Sync) -> Vec<S> {
    let next = AtomicUsize::new(0);
    rayon::broadcast(|_| {
        let mut state = init();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return state;
            }
            step(&mut state, i);
        }
    })
}

struct Counter<T> {
    buffers: Buffers<T>,
    bins: Vec<u64>,
    /// The first chunk, by position, in which a distance was not finite.
    odd: Option<usize>,
}

/// Counts the digit of every element whose higher digits are `prefix`; `done(bytes)` is told of progress.
///
/// # Errors
/// [`BadInput`] naming the first element, by position, that is NaN or infinite.
fn histogram<T: Magnitude>(part: &Part<'_>, pass: u32, prefix: u64, done: &(dyn Fn(u64) + Sync)) -> Result<Vec<u64>> {
    let shift = DIGIT * (T::PASSES - 1 - pass);
    let init = || Counter { buffers: Buffers::<T>::new(), bins: vec![0; BINS], odd: None };
    let counters = sweep(part.chunks.len(), init, |state, i| {
        let distances = state.buffers.distances(part, part.chunks[i]);
        if pass == 0 {
            if !distances.iter().fold(true, |all, d| all & d.is_finite()) {
                state.odd = Some(state.odd.map_or(i, |o| o.min(i)));
            }
            distances.iter().for_each(|d| state.bins[(d.key() >> shift) as usize] += 1);
        } else {
            for key in distances.iter().map(|d| d.key() >> shift).filter(|key| key >> DIGIT == prefix) {
                state.bins[key as usize % BINS] += 1;
            }
        }
        done(part.chunk_bytes(part.chunks[i]));
    });
    let mut odd: Vec<usize> = counters.iter().filter_map(|c| c.odd).collect();
    odd.sort_unstable();
    if !odd.is_empty() {
        // Distances can overflow although both values are finite, so the chunks from the first odd one on are read again.
        part.chunks[odd[0]..].iter().try_for_each(|chunk| refuse_non_finite::<T>(&part.pairs[chunk.pair], *chunk))?;
    }
    let mut bins = vec![0; BINS];
    counters.iter().for_each(|c| bins.iter_mut().zip(&c.bins).for_each(|(sum, n)| *sum += n));
    Ok(bins)
}

fn refuse_non_finite<T: Magnitude>(pair: &Pair<'_>, chunk: Chunk) -> Result<()> {
    let mut values = vec![T::default(); chunk.len];
    let mut first = |view: &TensorView<'_>| {
        view.read(chunk.start, &mut values);
        values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i].to_f64()))
    };
    let found = [(first(&pair.base), pair.base), (first(&pair.tuned), pair.tuned)];
    let worst = found.into_iter().filter_map(|(found, view)| Some((found?, view))).min_by_key(|((i, _), _)| *i);
    let Some(((i, value), view)) = worst else { return Ok(()) };
    Err(BadInput::new(view.file, format!("a weight is not finite, at flat index {}", chunk.start + i))
        .tensor(view.name)
        .expected("finite numbers")
        .found(value.to_string())
        .hint("the training that made this checkpoint diverged: lower its learning rate or clip its gradients")
        .into())
}

/// Checks that all elements of a part are finite.
///
/// # Errors
/// [`BadInput`] naming the first element, by position, that is not.
pub fn check_finite<T: Magnitude>(part: &Part<'_>, done: &(dyn Fn(u64) + Sync)) -> Result<()> {
    histogram::<T>(part, 0, 0, done).map(drop)
}

/// Finds the cut that chooses exactly `k` elements of `part`, 1 ≤ k ≤ its size.
///
/// # Errors
/// [`BadInput`] naming the first element, by position, that is NaN or infinite.
pub fn find_cut<T: Magnitude>(part: &Part<'_>, k: u64, done: &(dyn Fn(u64) + Sync)) -> Result<Cut<T>> {
    assert!((1..=part.numel()).contains(&k), "{k} of {}", part.numel());
    let (mut prefix, mut remaining, mut at_threshold) = (0u64, k, 0);
    for pass in 0..T::PASSES {
        let bins = histogram::<T>(part, pass, prefix, done)?;
        let mut bin = BINS - 1;
        while bins[bin] < remaining {
            remaining -= bins[bin];
            bin -= 1;
        }
        prefix = prefix << DIGIT | bin as u64;
        at_threshold = bins[bin];
    }
    let decided = if remaining < at_threshold { remaining } else { 0 };
    let ties = Ties { at_threshold, chosen: remaining, decided_by_position: decided };
    Ok(Cut { threshold: T::from_key(prefix), ties })
}
