//! Sampling of tokens by temperature and nucleus (top-p).
//!
//! Shape suffixes: b batch, v vocabulary.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

/// Sampling parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; positive.
    pub temperature: f64,
    /// Nucleus sampling (arXiv 1904.09751): the smallest set of likeliest tokens whose probability
    /// reaches this; 1 keeps all tokens.
    pub top_p: f64,
    /// Random seed.
    pub seed: u64,
}

/// The random numbers of one answer. Each answer has a stream of its own, so that it does not
/// depend on the rows beside it.
pub(crate) struct Draws(ChaCha8Rng);

impl Draws {
    /// The stream of the prompt with index `place`.
    pub fn new(sampling: &Sampling, place: usize) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(sampling.seed);
        generator.set_stream(place as u64);
        Self(generator)
    }

    /// The next number, in [0, 1).
    pub fn next(&mut self) -> f32 {
        self.0.random()
    }
}

impl Sampling {
    /// Chooses one id for each row of `logits_bv` by the row's entry of `draws`, [b].
    pub(crate) fn choose(&self, logits_bv: &Tensor, draws: &[f32]) -> Tensor {
        let draws_b1 = Tensor::from_slice(draws).unsqueeze(1).to_device(logits_bv.device());
        let probabilities_bv = (logits_bv / self.temperature).softmax(-1, Kind::Float);
        if self.top_p >= 1.0 {
            return invert(&probabilities_bv, &draws_b1);
        }
        // A stable sort: of equal probabilities the smaller id comes first, on every device.
        let (sorted_bv, ids_bv) = probabilities_bv.sort_stable(true, -1, true);
        // A token is in the nucleus if the tokens before it do not reach top_p; the first always
        // is.
        let before_bv = sorted_bv.cumsum(-1, Kind::Float) - &sorted_bv;
        let nucleus_bv = sorted_bv.masked_fill(&before_bv.ge(self.top_p), 0.0);
        let places_b = invert(&nucleus_bv, &draws_b1);
        ids_bv.gather(1, &places_b.unsqueeze(1), false).squeeze_dim(1)
    }
}

/// Inverts the cumulative distribution: the first index whose cumulative weight exceeds the draw's
/// share, [b].
fn invert(weights_bv: &Tensor, draws_b1: &Tensor) -> Tensor {
    let cumulative_bv = weights_bv.cumsum(-1, Kind::Double);
    let total_b1 = cumulative_bv.narrow(1, -1, 1);
    let reached_bv = cumulative_bv.gt_tensor(&(draws_b1.to_kind(Kind::Double) * total_b1));
    reached_bv.to_kind(Kind::Int8).argmax(-1, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(top_p: f64, temperature: f64) -> Vec<f64> {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.15, 0.1, 0.05].iter().map(|p| p.ln()).collect();
        let rows = 20_000;
        let logits_bv = Tensor::from_slice(&logits).unsqueeze(0).expand([rows, 5], true);
        let sampling = Sampling { temperature, top_p, seed: 1 };
        let draws: Vec<f32> = (0..rows as usize).map(|place| Draws::new(&sampling, place).next()).collect();
        let ids = sampling.choose(&logits_bv, &draws);
        (0..5).map(|v| ids.eq(v).sum(Kind::Double).double_value(&[]) / rows as f64).collect()
    }

    #[test]
    fn draws_follow_the_distribution_within_the_nucleus() {
        // numpy: p = [.4 .3 .15 .1 .05]; the nucleus of 0.7 is the first two; of 0.71 the first
        // three.
        for (top_p, temperature, expected) in [
            (1.0, 1.0, [0.4, 0.3, 0.15, 0.1, 0.05]),
            (0.69, 1.0, [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0, 0.0]),
            (0.71, 1.0, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0.0, 0.0]),
            (0.01, 1.0, [1.0, 0.0, 0.0, 0.0, 0.0]),
            // p^2 / sum p^2
            (1.0, 0.5, [0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.01 / 0.285, 0.0025 / 0.285]),
        ] {
            let found = counts(top_p, temperature);
            for (found, expected) in found.iter().zip(expected) {
                // Four standard deviations of a share of 20,000 draws.
                let allowed = 4.0 * (expected * (1.0 - expected) / 20_000.0f64).sqrt();
                assert!((found - expected).abs() <= allowed, "top_p {top_p}: {found} where {expected} is due");
            }
        }
    }
}
