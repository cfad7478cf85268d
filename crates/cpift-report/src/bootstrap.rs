//! The paired bootstrap: how far the mean difference of two runs on the same rows could lie elsewhere.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The share of resamples the interval holds.
pub const LEVEL: f64 = 0.95;

/// Means of `resamples` samples of `differences`, drawn with replacement, in the order they were drawn. Runs compared on one task
/// (`stream`) get the same draws of rows.
///
/// # Panics
/// When there are no differences.
pub fn means(differences: &[f64], resamples: usize, seed: u64, stream: u64) -> Vec<f64> {
    assert!(!differences.is_empty(), "nothing to draw from");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let n = differences.len();
    (0..resamples).map(|_| (0..n).map(|_| differences[rng.random_range(0..n)]).sum::<f64>() / n as f64).collect()
}

/// The stream of the draws of seeds: no task's.
const SEEDS: u64 = u64::MAX;

/// Draws of `seeds` seeds with replacement: for each of `resamples` the share every seed has in it.
pub fn shares(seeds: usize, resamples: usize, seed: u64) -> Vec<Vec<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(SEEDS);
    let mut draw = || {
        let mut counts = vec![0.0; seeds];
        (0..seeds).for_each(|_| counts[rng.random_range(0..seeds)] += 1.0);
        counts.iter().map(|count| count / seeds as f64).collect()
    };
    (0..resamples).map(|_| draw()).collect()
}

/// As [`means`], of differences by row and seed: the seeds as `shares` drew them, and rows drawn anew for each, the same for all
/// seeds. With one seed the draws are those of [`means`].
///
/// # Panics
/// When there are no differences.
pub fn two_way(differences: &[Vec<f64>], shares: &[Vec<f64>], seed: u64, stream: u64) -> Vec<f64> {
    assert!(!differences.is_empty(), "nothing to draw from");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let n = differences.len();
    let mean = |shares: &Vec<f64>| {
        let mut sums = vec![0.0; shares.len()];
        for _ in 0..n {
            let row = &differences[rng.random_range(0..n)];
            sums.iter_mut().zip(row).for_each(|(sum, difference)| *sum += difference);
        }
        sums.iter().zip(shares).map(|(sum, share)| sum * share).sum::<f64>() / n as f64
    };
    shares.iter().map(mean).collect()
}

/// Ratios of two sums over clusters drawn with replacement, each with its share in both; a draw whose lower sum is not below zero
/// has none.
pub fn ratios(clusters: &[(f64, f64)], resamples: usize, seed: u64) -> Vec<Option<f64>> {
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

/// The percentile interval of such means.
///
/// # Panics
/// When there are none.
pub fn interval(mut means: Vec<f64>) -> (f64, f64) {
    means.sort_by(f64::total_cmp);
    let tail = (1.0 - LEVEL) / 2.0;
    (percentile(&means, tail), percentile(&means, 1.0 - tail))
}

/// As `numpy.percentile` does: linear between the two nearest values.
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

    #[test]
    fn the_interval_is_the_normal_one_for_many_rows() {
        // 400 rows, half of them better by one: mean 0.5, standard error 0.025, so about 0.5 ± 0.049.
        let differences: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        let (low, high) = interval(means(&differences, 10_000, 7, 0));
        assert!((low - 0.451).abs() < 0.004 && (high - 0.549).abs() < 0.004, "{low} {high}");
    }

    #[test]
    fn one_seed_gives_one_interval_and_another_seed_another() {
        let differences: Vec<f64> = (0..50).map(|i| f64::from(i % 3)).collect();
        let draw = |seed, stream| interval(means(&differences, 101, seed, stream));
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(2, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert_eq!(interval(means(&[1.0; 9], 100, 1, 0)), (1.0, 1.0), "equal differences leave no doubt");
    }

    #[test]
    fn one_seed_is_the_bootstrap_over_rows() {
        let differences: Vec<f64> = (0..50).map(|i| f64::from(i % 3)).collect();
        let rows: Vec<Vec<f64>> = differences.iter().map(|d| vec![*d]).collect();
        assert_eq!(two_way(&rows, &shares(1, 99, 4), 4, 2), means(&differences, 99, 4, 2));
    }

    #[test]
    fn seeds_and_rows_each_add_their_variance() {
        // Rows alike, two seeds apart by 2: a resample's mean is 0, 1 or 2, with chances 1/4, 1/2, 1/4.
        let draws = shares(2, 8000, 3);
        let drawn = two_way(&[vec![0.0, 2.0], vec![0.0, 2.0]], &draws, 3, 0);
        let near = |value: f64| drawn.iter().filter(|m| (*m - value).abs() < 1e-12).count() as f64 / 8000.0;
        assert!((near(0.0) - 0.25).abs() < 0.02 && (near(1.0) - 0.5).abs() < 0.02, "{} {}", near(0.0), near(1.0));
        assert_eq!(near(0.0) + near(1.0) + near(2.0), 1.0);
        assert!(shares(2, 99, 3) == draws[..99] && shares(2, 99, 4) != draws[..99], "the seed sets them");
        // Seeds alike, rows 0 and 2: the same chances, for the rows are the same for both seeds.
        let drawn = two_way(&[vec![0.0, 0.0], vec![2.0, 2.0]], &draws, 3, 0);
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
