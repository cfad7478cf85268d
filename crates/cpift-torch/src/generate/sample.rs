//! Sampling the next token: temperature, then the nucleus (top-p), by inversion of the cumulative distribution.
//!
//! Suffixes: b batch, v vocabulary.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; above 0.
    pub temperature: f64,
    /// The nucleus: the likeliest tokens, as few as reach this probability (arXiv 1904.09751); 1 keeps all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// The draws of a batch. Each row has a generator of its own, so that its answer does not depend on its neighbours.
pub(super) struct Sampler {
    sampling: Sampling,
    generators: Vec<ChaCha8Rng>,
}

impl Sampler {
    /// For the prompts numbered `places`.
    pub fn new(sampling: &Sampling, places: &[usize]) -> Self {
        let generator = |&place: &usize| {
            let mut generator = ChaCha8Rng::seed_from_u64(sampling.seed);
            generator.set_stream(place as u64);
            generator
        };
        Self { sampling: *sampling, generators: places.iter().map(generator).collect() }
    }

    /// One id for each row of `logits_bv`; `rows` are the generators' numbers.
    pub fn choose(&mut self, logits_bv: &Tensor, rows: &[usize]) -> Tensor {
        let draws: Vec<f32> = rows.iter().map(|&row| self.generators[row].random()).collect();
        let draws_b1 = Tensor::from_slice(&draws).unsqueeze(1).to_device(logits_bv.device());
        let probabilities_bv = (logits_bv / self.sampling.temperature).softmax(-1, Kind::Float);
        if self.sampling.top_p >= 1.0 {
            return invert(&probabilities_bv, &draws_b1);
        }
        // A stable sort: among equals the smaller id comes first, on every device.
        let (sorted_bv, ids_bv) = probabilities_bv.sort_stable(true, -1, true);
        // A token is in the nucleus where those before it do not reach top_p; the first always is.
        let before_bv = sorted_bv.cumsum(-1, Kind::Float) - &sorted_bv;
        let nucleus_bv = sorted_bv.masked_fill(&before_bv.ge(self.sampling.top_p), 0.0);
        let places_b = invert(&nucleus_bv, &draws_b1);
        ids_bv.gather(1, &places_b.unsqueeze(1), false).squeeze_dim(1)
    }
}

/// The first place whose cumulative weight exceeds the draw's share of the whole, [b].
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
        let places: Vec<usize> = (0..rows as usize).collect();
        let mut sampler = Sampler::new(&Sampling { temperature, top_p, seed: 1 }, &places);
        let ids = sampler.choose(&logits_bv, &places);
        (0..5).map(|v| ids.eq(v).sum(Kind::Double).double_value(&[]) / rows as f64).collect()
    }

    #[test]
    fn draws_follow_the_distribution_within_the_nucleus() {
        // numpy: p = [.4 .3 .15 .1 .05]; the nucleus of 0.7 is the first two; of 0.71 the first three.
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
