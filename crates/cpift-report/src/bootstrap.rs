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
}
