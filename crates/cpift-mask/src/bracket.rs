//! The guess at the threshold of a part, from a sample of its scores.

use cpift_core::dispatch;
use cpift_core::format::mask::Metric;
use cpift_core::stream::guess::Guess;
use cpift_core::stream::random::splitmix64;
use cpift_core::stream::select::Score;
use rayon::prelude::*;

use crate::part::{Arithmetic, Block, Chunk, Part};

/// Consecutive elements per run of the sample.
const RUN: usize = 64;

/// Largest number of runs; a small part has one run per [`SHARE`] elements.
const RUNS: usize = 16 * 1024;
const SHARE: usize = 1024;

/// Parts up to this size are not sampled: all their elements are candidates, if `limit` allows.
const SMALL: u64 = 64 * 1024;

/// Guesses the `k`-th largest score of `part`, 1 ≤ k ≤ its size, leaving at most about `limit`
/// candidates.
pub fn guess<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric, k: u64, limit: usize) -> Guess<T> {
    let n = part.numel();
    if n <= SMALL.min(limit as u64) {
        return Guess::everything();
    }
    Guess::from_sample(sample(part, metric), k, n, limit)
}

/// Scores of runs spread evenly over the part, each at a random offset in its stretch. The same on
/// every machine.
fn sample<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric) -> Vec<T> {
    let runs = (part.numel() as usize / SHARE).clamp(1, RUNS);
    let chunks = part.chunks.len();
    let scores = (0..runs).into_par_iter().with_min_len(256).map_init(Block::<T>::new, |block, run| {
        let (from, to) = (run * chunks / runs, (run + 1) * chunks / runs);
        let random = splitmix64(0, run as u64);
        let Chunk { pair, start, len } = part.chunks[from + random as usize % (to - from).max(1)];
        let offset = (random >> 32) as usize % (len.saturating_sub(RUN) + 1);
        dispatch!(block.scores(part, pair, metric, start + offset, RUN.min(len)).to_vec())
    });
    scores.flatten_iter().collect()
}
