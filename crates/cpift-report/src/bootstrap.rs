//! The paired bootstrap: confidence intervals of differences between two runs on the same rows.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Confidence level of the intervals.
pub(crate) const LEVEL: f64 = 0.95;

/// Contribution of one row to a figure of two runs: for each run a sum and a weight. The figure is
/// the total sum divided by the total weight; a score has weight 1, a loss the number of its
/// tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Pair {
    /// Contribution to the baseline's figure.
    pub(crate) base: [f64; 2],
    /// Contribution to the other run's figure.
    pub(crate) run: [f64; 2],
}

impl Pair {
    fn add(&mut self, other: &Self) {
        for (sum, part) in [(&mut self.base, other.base), (&mut self.run, other.run)] {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }

    /// The difference between the two runs' figures over these rows.
    fn difference(&self, difference: Difference) -> f64 {
        difference(self.base[0] / self.base[1], self.run[0] / self.run[1])
    }
}

/// The difference of two figures, the baseline's first.
pub(crate) type Difference = fn(f64, f64) -> f64;

/// The difference over all rows, each with one pair per seed: the mean over the seeds.
pub(crate) fn difference(rows: &[Vec<Pair>], difference: Difference) -> f64 {
    let seeds = rows.first().map_or(0, Vec::len);
    let mut sums = vec![Pair::default(); seeds];
    rows.iter().for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, pair)| sum.add(pair)));
    sums.iter().map(|sum| sum.difference(difference)).sum::<f64>() / seeds as f64
}

/// Random stream for the draws of seeds; tasks use the streams from 0 up.
const SEEDS: u64 = u64::MAX;

/// Draws `seeds` seeds with replacement: for each resample, the share of every seed.
pub(crate) fn shares(seeds: usize, resamples: usize, seed: u64) -> Vec<Vec<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(SEEDS);
    let mut draw = || {
        let mut counts = vec![0.0; seeds];
        (0..seeds).for_each(|_| counts[rng.random_range(0..seeds)] += 1.0);
        counts.iter().map(|count| count / seeds as f64).collect()
    };
    (0..resamples).map(|_| draw()).collect()
}

/// Differences over resamples, in the order they were drawn: the seeds in the given `shares`, and
/// for each resample new rows drawn with replacement, the same rows for all seeds. Runs compared on
/// one task (`stream`) get the same draws of rows.
///
/// # Panics
/// When `rows` is empty.
pub(crate) fn two_way(
    rows: &[Vec<Pair>],
    shares: &[Vec<f64>],
    seed: u64,
    stream: u64,
    difference: Difference,
) -> Vec<f64> {
    assert!(!rows.is_empty(), "nothing to draw from");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let n = rows.len();
    let mut sums = Vec::new();
    let mut draw = |shares: &Vec<f64>| {
        sums.clear();
        sums.resize(shares.len(), Pair::default());
        for _ in 0..n {
            let row = &rows[rng.random_range(0..n)];
            sums.iter_mut().zip(row).for_each(|(sum, pair)| sum.add(pair));
        }
        sums.iter().zip(shares).map(|(sum, share)| sum.difference(difference) * share).sum()
    };
    shares.iter().map(&mut draw).collect()
}

/// Ratios of two sums over clusters drawn with replacement; each cluster adds to both. A draw whose
/// lower sum is not below zero has no ratio.
pub(crate) fn ratios(clusters: &[(f64, f64)], resamples: usize, seed: u64) -> Vec<Option<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n = clusters.len();
    let mut ratio = || {
        let (mut upper, mut lower) = (0.0, 0.0);
        for _ in 0..n {
            let (a, b) = clusters[rng.random_range(0..n)];
            (upper, lower) = (upper + a, lower + b);
        }
        (lower < 0.0).then(|| upper / lower)
    };
    (0..resamples).map(|_| ratio()).collect()
}

/// The percentile interval of resampled values.
///
/// # Panics
/// When `means` is empty.
pub(crate) fn interval(mut means: Vec<f64>) -> (f64, f64) {
    means.sort_by(f64::total_cmp);
    let tail = (1.0 - LEVEL) / 2.0;
    (percentile(&means, tail), percentile(&means, 1.0 - tail))
}

/// Linear between the two nearest values, as `numpy.percentile`.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_numpys() {
        // numpy.percentile([0, 1, 2, 4], [0, 50, 90, 100]) is [0, 1.5, 3.4, 4]
        let values = [0.0, 1.0, 2.0, 4.0];
        let found = [0.0, 0.5, 0.9, 1.0].map(|share| percentile(&values, share));
        found.iter().zip([0.0, 1.5, 3.4, 4.0]).for_each(|(a, b)| assert!((a - b).abs() < 1e-12, "{found:?}"));
    }

    /// Rows of one seed whose scores differ by these.
    fn rows(differences: impl IntoIterator<Item = f64>) -> Vec<Vec<Pair>> {
        differences.into_iter().map(|d| vec![Pair { base: [0.0, 1.0], run: [d, 1.0] }]).collect()
    }

    fn draw(rows: &[Vec<Pair>], resamples: usize, seed: u64, stream: u64) -> Vec<f64> {
        let seeds = rows[0].len();
        two_way(rows, &shares(seeds, resamples, seed), seed, stream, |base, run| run - base)
    }

    #[test]
    fn the_interval_is_the_normal_one_for_many_rows() {
        // 400 rows, half of them better by one: mean 0.5, standard error 0.025, so about 0.5 ±
        // 0.049.
        let (low, high) = interval(draw(&rows((0..400).map(|i| f64::from(i % 2))), 10_000, 7, 0));
        assert!((low - 0.451).abs() < 0.004 && (high - 0.549).abs() < 0.004, "{low} {high}");
    }

    #[test]
    fn the_interval_of_a_loss_is_that_of_a_ratio_of_sums() {
        // 400 rows of 1 and 3 tokens, the long ones better by one nat per token: 0.75 in all. The
        // delta method's standard error of the ratio is sqrt(sum (d - 0.75 w)^2) / sum w = sqrt(200
        // * 0.75^2 * 2) / 800 = 0.01875.
        let row = |w: f64, d: f64| vec![Pair { base: [2.0 * w, w], run: [2.0 * w + d, w] }];
        let rows: Vec<_> = (0..400).map(|i| if i % 2 == 0 { row(1.0, 0.0) } else { row(3.0, 3.0) }).collect();
        assert_eq!(difference(&rows, |base, run| run - base), 0.75);
        let (low, high) = interval(draw(&rows, 10_000, 7, 0));
        assert!((low - 0.713).abs() < 0.004 && (high - 0.787).abs() < 0.004, "{low} {high}");
    }

    #[test]
    fn one_seed_gives_one_interval_and_another_seed_another() {
        let rows_of_three = rows((0..50).map(|i| f64::from(i % 3)));
        let ends = |seed, stream| interval(draw(&rows_of_three, 101, seed, stream));
        assert_eq!(ends(1, 0), ends(1, 0));
        assert_ne!(ends(1, 0), ends(2, 0));
        assert_ne!(ends(1, 0), ends(1, 1));
        assert_eq!(interval(draw(&rows([1.0; 9]), 100, 1, 0)), (1.0, 1.0), "equal differences leave no doubt");
    }

    #[test]
    fn seeds_and_rows_each_add_their_variance() {
        let seeds = |differences: [f64; 2]| differences.map(|d| Pair { base: [0.0, 1.0], run: [d, 1.0] }).to_vec();
        // Rows alike, two seeds apart by 2: a resample's mean is 0, 1 or 2, with chances 1/4, 1/2,
        // 1/4.
        let drawn = draw(&[seeds([0.0, 2.0]), seeds([0.0, 2.0])], 8000, 3, 0);
        let near = |value: f64| drawn.iter().filter(|m| (*m - value).abs() < 1e-12).count() as f64 / 8000.0;
        assert!((near(0.0) - 0.25).abs() < 0.02 && (near(1.0) - 0.5).abs() < 0.02, "{} {}", near(0.0), near(1.0));
        assert_eq!(near(0.0) + near(1.0) + near(2.0), 1.0);
        let draws = shares(2, 8000, 3);
        assert!(shares(2, 99, 3) == draws[..99] && shares(2, 99, 4) != draws[..99], "the seed sets them");
        // SeedScores alike, rows 0 and 2: the same chances, for the rows are the same for both
        // seeds.
        let drawn = draw(&[seeds([0.0, 0.0]), seeds([2.0, 2.0])], 8000, 3, 0);
        let middle = drawn.iter().filter(|m| (*m - 1.0).abs() < 1e-12).count() as f64 / 8000.0;
        assert!((middle - 0.5).abs() < 0.02, "{middle}");
    }

    #[test]
    fn a_ratio_needs_a_loss_below_it() {
        assert_eq!(ratios(&[(-1.0, -2.0), (-2.0, -4.0)], 50, 1), vec![Some(0.5); 50]);
        let some = ratios(&[(-1.0, -2.0), (-1.0, 3.0)], 50, 1);
        assert!(some.contains(&None) && some.contains(&Some(0.5)), "{some:?}");
        let of = |seed| ratios(&[(-1.0, -2.0), (-3.0, -2.0)], 50, seed);
        assert!(of(1) == of(1) && of(1) != of(2));
    }
}
