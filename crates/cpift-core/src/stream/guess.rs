//! A guess at the k-th largest of many scores from a sample of them: two scores between which it
//! almost surely lies, or, if very many scores are equal, that score itself.

use crate::stream::select::Score;
use crate::stream::ties::HashBand;

/// Half width of the bracket, in standard errors of the sample's quantile. Neighbours in a matrix
/// row move alike, so a sample of runs tells less than its size says; the width allows for that.
const SPAN: f64 = 12.0;

/// Assumption about the k-th largest score before all scores are read.
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
    pub fn nothing() -> Self {
        Self::Bracket { low: T::from_f64(f64::NAN), high: T::from_f64(f64::INFINITY) }
    }

    /// Keeps everything.
    pub fn everything() -> Self {
        Self::Bracket { low: T::from_f64(0.0), high: T::from_f64(f64::INFINITY) }
    }

    /// Largest number of candidates kept, where `limit` is that of a bracket. A tied candidate is
    /// kept without its score: 2 bytes instead of 6 in f32.
    pub fn limit(&self, limit: usize) -> usize {
        match self {
            Self::Bracket { .. } => limit,
            Self::Tied { .. } => 3 * limit,
        }
    }

    /// Guesses the `k`-th largest of `n` scores, 1 ≤ k ≤ n, from a `sample` that is not empty,
    /// leaving at most about `limit` candidates.
    pub fn from_sample(mut sample: Vec<T>, k: u64, n: u64, limit: usize) -> Self {
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
            return Self::Bracket { low, high };
        }
        let score = at(&mut sample.clone(), rank);
        let tied = count(&|s| *s == score);
        let share = (rank - count(&|s| *s > score)) / tied;
        Self::Tied { score, band: HashBand::around(share, slack / tied) }
    }
}
