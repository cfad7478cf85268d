//! Rotary position embeddings with the frequency scalings that config.json can ask for ([`cpift_core::format::rope`] reads them).
//!
//! Suffixes: b batch, s sequence, d head width.

use std::f64::consts::PI;

use cpift_core::format::rope::{RopeParameters, RopeScaling};
use tch::{Device, Kind, Tensor};

/// Makes the cosines and sines for positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// d.
    pub head_dim: i64,
    /// Base of the frequencies and their scaling.
    pub parameters: RopeParameters,
}

impl Rope {
    /// cos and sin, [b, 1, s, d] in f32, for integer positions [b, s]. `length` is the longest sequence the positions belong
    /// to; only the dynamic scaling looks at it.
    pub fn cos_sin(&self, positions_bs: &Tensor, length: i64) -> (Tensor, Tensor) {
        let inv_freq = self.inv_freq(length as f64, positions_bs.device());
        let angles_bsd = positions_bs.to_kind(Kind::Float).unsqueeze(-1) * inv_freq;
        let full = Tensor::cat(&[&angles_bsd, &angles_bsd], -1).unsqueeze(1);
        let scale = match self.parameters.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        (full.cos() * scale, full.sin() * scale)
    }

    /// Frequencies of the d/2 pairs, [d/2] in f32, computed in f32 as transformers does.
    fn inv_freq(&self, length: f64, device: Device) -> Tensor {
        let dim = self.head_dim as f64;
        let options = (Kind::Float, device);
        let exponents = Tensor::arange_start_step(0, self.head_dim, 2, options) / dim;
        let plain = |theta: f64| Tensor::full([], f64::from(theta as f32), options).pow(&exponents).reciprocal();
        match self.parameters.scaling {
            RopeScaling::Default => plain(self.parameters.theta),
            RopeScaling::Linear { factor } => plain(self.parameters.theta) / factor,
            RopeScaling::Dynamic { factor, max_positions } => {
                let growth = factor * length.max(max_positions) / max_positions - (factor - 1.0);
                plain(self.parameters.theta * growth.powf(dim / (dim - 2.0)))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let freq = plain(self.parameters.theta);
                let wavelength = freq.reciprocal() * (2.0 * PI);
                let smooth =
                    (wavelength.reciprocal() * original - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let blended = (1.0 - &smooth) * &freq / factor + &smooth * &freq;
                let long = wavelength.gt(original / low_freq_factor);
                let short = wavelength.lt(original / high_freq_factor);
                (&freq / factor).where_self(&long, &freq.where_self(&short, &blended))
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
                let pair = |rotations: f64| {
                    dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.parameters.theta.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = ((Tensor::arange(self.head_dim / 2, options) - low) / (high - low)).clamp(0.0, 1.0);
                let freq = plain(self.parameters.theta);
                &freq / factor * &ramp + &freq * (1.0 - &ramp)
            }
        }
    }
}

/// The different settings among those of the blocks, each once, in the order of the blocks.
pub(super) fn distinct(of_blocks: &[RopeParameters]) -> Vec<&RopeParameters> {
    let mut found: Vec<&RopeParameters> = Vec::new();
    for parameters in of_blocks {
        if !found.contains(&parameters) {
            found.push(parameters);
        }
    }
    found
}

/// Rotates the two halves of each head: x·cos + (−x₂, x₁)·sin; x is [b, h, s, d].
pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let halves = x.chunk(2, -1);
    let turned = Tensor::cat(&[&halves[1].neg(), &halves[0]], -1);
    x * cos + turned * sin
}
