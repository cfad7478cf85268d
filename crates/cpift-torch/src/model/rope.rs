//! Rotary position embeddings with the frequency scalings that config.json can ask for.
//!
//! Suffixes: b batch, s sequence, d head width.

use std::f64::consts::PI;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// How the rotary frequencies are stretched beyond the trained context; `rope_type` of config.json.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    Default,
    /// All frequencies divided by `factor` (position interpolation).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// The base grows once a sequence is longer than `max_positions` (NTK-aware).
    Dynamic {
        /// Growth of the context.
        factor: f64,
        /// The trained context.
        max_positions: f64,
    },
    /// High frequencies kept, low ones interpolated, a ramp between, attention sharpened (arXiv 2309.00071).
    Yarn {
        /// Growth of the context.
        factor: f64,
        /// The trained context.
        original: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// What cos and sin are multiplied with.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Long wavelengths divided by `factor`, short ones kept, smooth between (Llama 3.1).
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The trained context.
        original: f64,
    },
}

impl RopeScaling {
    /// Reads `rope_scaling` or `rope_parameters`; `top_original` is the `original_max_position_embeddings` that some
    /// configs keep beside it.
    ///
    /// # Errors
    /// A sentence that names the unknown type or the missing field.
    pub fn from_json(value: &Value, max_positions: f64, top_original: Option<f64>) -> Result<Self, String> {
        let kind = value.get("rope_type").or_else(|| value.get("type")).and_then(Value::as_str).unwrap_or("default");
        let field = |key: &str| value.get(key).and_then(Value::as_f64);
        let need = |key: &str| field(key).ok_or_else(|| format!("rope scaling {kind} needs {key}"));
        let original = top_original.or_else(|| field("original_max_position_embeddings")).unwrap_or(max_positions);
        match kind {
            "default" => Ok(Self::Default),
            "linear" => Ok(Self::Linear { factor: need("factor")? }),
            "dynamic" => Ok(Self::Dynamic { factor: need("factor")?, max_positions }),
            "llama3" => Ok(Self::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original,
            }),
            "yarn" => {
                let factor = field("factor").unwrap_or(max_positions / original);
                let truncate = value.get("truncate").and_then(Value::as_bool).unwrap_or(true);
                Ok(Self::Yarn {
                    factor,
                    original,
                    beta_fast: field("beta_fast").unwrap_or(32.0),
                    beta_slow: field("beta_slow").unwrap_or(1.0),
                    attention_factor: field("attention_factor").unwrap_or_else(|| {
                        match (field("mscale"), field("mscale_all_dim")) {
                            (Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                                yarn_mscale(factor, m) / yarn_mscale(factor, all)
                            }
                            _ => yarn_mscale(factor, 1.0),
                        }
                    }),
                    truncate,
                })
            }
            other => {
                Err(format!("rope scaling {other:?} is not implemented (default, linear, dynamic, yarn, llama3 are)"))
            }
        }
    }
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// Makes the cosines and sines for positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// d.
    pub head_dim: i64,
    /// Base of the frequencies.
    pub theta: f64,
    /// Their scaling.
    pub scaling: RopeScaling,
}

impl Rope {
    /// cos and sin, [b, 1, s, d] in f32, for integer positions [b, s]. `length` is the longest sequence the positions belong
    /// to; only the dynamic scaling looks at it.
    pub fn cos_sin(&self, positions_bs: &Tensor, length: i64) -> (Tensor, Tensor) {
        let inv_freq = self.inv_freq(length as f64, positions_bs.device());
        let angles_bsd = positions_bs.to_kind(Kind::Float).unsqueeze(-1) * inv_freq;
        let full = Tensor::cat(&[&angles_bsd, &angles_bsd], -1).unsqueeze(1);
        let scale = match self.scaling {
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
        match self.scaling {
            RopeScaling::Default => plain(self.theta),
            RopeScaling::Linear { factor } => plain(self.theta) / factor,
            RopeScaling::Dynamic { factor, max_positions } => {
                let growth = factor * length.max(max_positions) / max_positions - (factor - 1.0);
                plain(self.theta * growth.powf(dim / (dim - 2.0)))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let freq = plain(self.theta);
                let wavelength = freq.reciprocal() * (2.0 * PI);
                let smooth =
                    (wavelength.reciprocal() * original - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let blended = (1.0 - &smooth) * &freq / factor + &smooth * &freq;
                let long = wavelength.gt(original / low_freq_factor);
                let short = wavelength.lt(original / high_freq_factor);
                (&freq / factor).where_self(&long, &freq.where_self(&short, &blended))
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
                let pair = |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = ((Tensor::arange(self.head_dim / 2, options) - low) / (high - low)).clamp(0.0, 1.0);
                let freq = plain(self.theta);
                &freq / factor * &ramp + &freq * (1.0 - &ramp)
            }
        }
    }
}

/// Rotates the two halves of each head: x·cos + (−x₂, x₁)·sin; x is [b, h, s, d].
pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let halves = x.chunk(2, -1);
    let turned = Tensor::cat(&[&halves[1].neg(), &halves[0]], -1);
    x * cos + turned * sin
}
