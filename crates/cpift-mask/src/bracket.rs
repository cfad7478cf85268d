//! A guess at the threshold of a part from a sample: two scores between which it almost surely
//! lies, or, if very many scores are equal, that score itself.

use cpift_core::dispatch;
use cpift_core::format::mask::Metric;
use cpift_core::stream::random::splitmix64;
use cpift_core::stream::select::Score;
use cpift_core::stream::ties::HashBand;
use rayon::prelude::*;

use crate::part::{Arithmetic, Block, Chunk, Part};

/// Consecutive elements per run of the sample.
const RUN: usize = 64;

/// Largest number of runs; a small part has one run per [`SHARE`] elements.
const RUNS: usize = 16 * 1024;
const SHARE: usize = 1024;

/// Half width of the bracket, in standard errors of the sample's quantile. Neighbours in a matrix
/// row move alike, so a sample of runs tells less than its size says; the width allows for that.
const SPAN: f64 = 12.0;

/// Parts up to this size are not sampled: all their elements are candidates, if `limit` allows.
const SMALL: u64 = 64 * 1024;

/// Assumption about the threshold before the part is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Guess<T> {
    /// Scores above `high` are chosen, scores below `low` are not; scores from `low` to `high` are
    /// candidates.
    Bracket {
        /// Lowest score of a candidate.
        low: T,
        /// Highest score of a candidate.
        high: T,
    },
    /// The threshold is `score`. Of the elements equal to it, those whose tie hashes lie below
    /// `band` are chosen, those above are not; those inside are candidates.
    Tied {
        /// The threshold.
        score: T,
        /// Hashes that the sample leaves open.
        band: HashBand,
    },
}

impl<T: Score> Guess<T> {
    /// Chooses nothing and keeps nothing.
    pub(crate) fn nothing() -> Self {
        Self::Bracket { low: T::from_f64(f64::NAN), high: T::from_f64(f64::INFINITY) }
    }

    /// Largest number of candidates kept, where `limit` is that of a bracket. A tied candidate is
    /// kept without its score: 2 bytes instead of 6 in f32.
    pub(crate) fn limit(&self, limit: usize) -> usize {
        match self {
            Self::Bracket { .. } => limit,
            Self::Tied { .. } => 3 * limit,
        }
    }

    /// Keeps everything.
    fn everything() -> Self {
        Self::Bracket { low: T::from_f64(0.0), high: T::from_f64(f64::INFINITY) }
    }
}

/// Guesses the `k`-th largest score of `part`, 1 ≤ k ≤ its size, leaving at most about `limit`
/// candidates.
pub fn guess<T: Score + Arithmetic>(part: &Part<'_>, metric: Metric, k: u64, limit: usize) -> Guess<T> {
    let n = part.numel();
    if n <= SMALL.min(limit as u64) {
        return Guess::everything();
    }
    let mut sample: Vec<T> = sample(part, metric);
    let size = sample.len() as f64;
    let rank = k as f64 / n as f64 * size;
    let slack = SPAN * (rank * (1.0 - rank / size)).max(1.0).sqrt();
    // Positions in descending order of score.
    let at = |sample: &mut [T], position: f64| {
        let place = sample.len() - 1 - (position as usize).min(sample.len() - 1);
        *sample.select_nth_unstable_by_key(place, |score| score.key()).1
    };
    let high = if rank - slack < 0.0 { T::from_f64(f64::INFINITY) } else { at(&mut sample, rank - slack) };
    let low = if rank + slack > size - 1.0 { T::from_f64(0.0) } else { at(&mut sample, rank + slack) };
    let count = |inside: &dyn Fn(&T) -> bool| sample.iter().filter(|s| inside(s)).count() as f64;
    if count(&|s| (low..=high).contains(s)) / size * n as f64 <= limit as f64 {
        return Guess::Bracket { low, high };
    }
    let score = at(&mut sample.clone(), rank);
    let tied = count(&|s| *s == score);
    let share = (rank - count(&|s| *s > score)) / tied;
    Guess::Tied { score, band: HashBand::around(share, slack / tied) }
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
