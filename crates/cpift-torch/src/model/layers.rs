//! The leaves of the model: Linear with its low-rank adapter, RmsNorm, Rope, Mlp; and the loader
//! that takes their tensors by name.
//!
//! Shape suffixes: b batch, s sequence, h heads, d head width; e is the embedding width, f the MLP
//! width.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::f64::consts::PI;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Result, bail};
use cpift_core::BadInput;
use cpift_core::format::rope::{RopeParameters, RopeScaling};
use tch::{Device, Kind, Tensor};

use super::config::{Activation, ModelConfig};
use super::families::NormWeight;
use crate::ffi;
use crate::weights::Parameters;

/// Takes tensors by name and records the names; `path` names the checkpoint in errors.
pub(super) struct Loader<'a> {
    pub parameters: &'a Parameters,
    pub path: &'a Path,
    pub taken: Vec<String>,
    /// Places for adapters of the linear layers, by the name of the weight.
    pub slots: BTreeMap<String, AdapterSlot>,
    /// The linear layers that come next take adapters.
    pub adapters: bool,
}

impl Loader<'_> {
    pub(super) fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.taken.push(name.to_owned());
        take(self.parameters, self.path, name, shape)
    }

    pub(super) fn linear(&mut self, name: &str, shape: [i64; 2], bias: bool) -> Result<Linear> {
        let weight = self.get(&format!("{name}.weight"), &shape)?;
        let bias = if bias { Some(self.get(&format!("{name}.bias"), &shape[..1])?) } else { None };
        let slot = AdapterSlot::default();
        if self.adapters {
            self.slots.insert(format!("{name}.weight"), slot.clone());
        }
        Ok(Linear { weight, bias, slot })
    }

    /// An RMS norm over `width` elements.
    pub(super) fn norm(&mut self, name: &str, width: i64, c: &ModelConfig) -> Result<RmsNorm> {
        let weight = self.get(&format!("{name}.weight"), &[width])?;
        Ok(RmsNorm { weight, eps: c.rms_norm_eps, use_of_weight: c.norm_weight })
    }
}

/// Returns the tensor `name` of shape `shape` of `parameters`, sharing its storage.
fn take(parameters: &Parameters, path: &Path, name: &str, shape: &[i64]) -> Result<Tensor> {
    let Some(tensor) = parameters.get(name) else {
        return Err(BadInput::new(path, "a tensor that config.json asks for is missing").tensor(name).into());
    };
    if tensor.size() != shape {
        return Err(BadInput::new(path, "a tensor's shape disagrees with config.json")
            .tensor(name)
            .expected(format!("{shape:?}"))
            .found(format!("{:?}", tensor.size()))
            .into());
    }
    Ok(tensor.shallow_clone())
}

/// Refuses parameters that are not part of the model: they would be saved untrained.
pub(super) fn check_all_taken(parameters: &Parameters, path: &Path, taken: &[String]) -> Result<()> {
    // Experts have thousands of tensors.
    let known: BTreeSet<&String> = taken.iter().collect();
    match parameters.keys().find(|name| !known.contains(name)) {
        Some(extra) => {
            Err(BadInput::new(path, "a tensor that the model of config.json does not have").tensor(extra).into())
        }
        None if taken.len() != parameters.len() => bail!("a parameter was taken twice"),
        None => Ok(()),
    }
}

/// y = x·Wᵀ + b, computed in the dtype of x: master weights are cast to it. An adapter adds its
/// product.
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    slot: AdapterSlot,
}

impl Linear {
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let bias = self.bias.as_ref().map(|b| b.to_kind(kind));
        self.slot.add_to(ffi::linear(x, &self.weight.to_kind(kind), bias.as_ref()), x)
    }

    /// Returns true if the weight gets a gradient from what is computed now.
    fn is_tracked(&self) -> bool {
        self.weight.alias().requires_grad()
    }
}

/// Factors of a low-rank product beside a linear layer: y = W·x + s·B·(A·x).
pub struct LowRank {
    /// A, [r, i], f32.
    pub a: Tensor,
    /// B, [o, r], f32.
    pub b: Tensor,
    /// s, the scale of the product.
    pub scale: f64,
}

impl LowRank {
    /// A copy that shares storage.
    fn shared(&self) -> Self {
        Self { a: self.a.shallow_clone(), b: self.b.shallow_clone(), scale: self.scale }
    }
}

/// Place for an adapter in a linear layer, which the layer shares with the list of the model.
#[derive(Clone, Default)]
pub(crate) struct AdapterSlot(Rc<RefCell<Option<LowRank>>>);

impl AdapterSlot {
    pub(crate) fn set(&self, adapter: LowRank) {
        *self.0.borrow_mut() = Some(adapter);
    }

    pub(crate) fn get(&self) -> Option<LowRank> {
        self.0.borrow().as_ref().map(LowRank::shared)
    }

    /// Adds the product of the adapter and `x`, if there is one, to the layer's output `y`, in the
    /// dtype of `x`.
    fn add_to(&self, y: Tensor, x: &Tensor) -> Tensor {
        let slot = self.0.borrow();
        let Some(LowRank { a, b, scale }) = slot.as_ref() else { return y };
        let kind = x.kind();
        // Scaled while it is narrow.
        let inner = ffi::linear(x, &a.to_kind(kind), None) * *scale;
        y + ffi::linear(&inner, &b.to_kind(kind), None)
    }
}

/// x / rms(x) · weight over the last dimension, normalised in f32 as in transformers.
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f64,
    use_of_weight: NormWeight,
}

impl RmsNorm {
    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let wide = x.to_kind(Kind::Float);
        let mean_square = wide.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        let normed = wide * (mean_square + self.eps).rsqrt();
        let wide_weight = || self.weight.to_kind(Kind::Float);
        match self.use_of_weight {
            NormWeight::Plain => self.weight.to_kind(kind) * normed.to_kind(kind),
            NormWeight::Wide => (wide_weight() * normed).to_kind(kind),
            NormWeight::PlusOne => (normed * (wide_weight() + 1.0)).to_kind(kind),
        }
    }
}

/// Rotary position embeddings, with the frequency scalings that config.json can request
/// ([`cpift_core::format::rope`] reads them).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// d: rotated elements of a head.
    pub dim: i64,
    /// Base of the frequencies and their scaling.
    pub parameters: RopeParameters,
}

impl Rope {
    /// cos and sin, [b, 1, s, d] in f32, for integer positions [b, s]. `length` is the length of
    /// the longest sequence; only dynamic scaling uses it.
    pub fn cos_sin(&self, positions_bs: &Tensor, length: i64) -> (Tensor, Tensor) {
        let inv_freq = self.inv_freq(length as f64, positions_bs.device());
        let angles_bsd = positions_bs.to_kind(Kind::Float).unsqueeze(-1) * inv_freq;
        let full = Tensor::cat(&[&angles_bsd, &angles_bsd], -1).unsqueeze(1);
        let scale = match self.parameters.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        };
        (full.cos() * scale, full.sin() * scale)
    }

    /// Frequencies of the d/2 pairs, [d/2], computed in f32 as in transformers.
    fn inv_freq(&self, length: f64, device: Device) -> Tensor {
        let dim = self.dim as f64;
        let options = (Kind::Float, device);
        let exponents = Tensor::arange_start_step(0, self.dim, 2, options) / dim;
        let plain = |theta: f64| Tensor::full([], f64::from(theta as f32), options).pow(&exponents).reciprocal();
        match &self.parameters.scaling {
            RopeScaling::Default => plain(self.parameters.theta),
            RopeScaling::Linear { factor } => plain(self.parameters.theta) / *factor,
            RopeScaling::LongRope { short, .. } => {
                let divisors: Vec<f32> = short.iter().map(|factor| *factor as f32).collect();
                let powers = plain(self.parameters.theta).reciprocal();
                (Tensor::from_slice(&divisors).to_device(device) * powers).reciprocal()
            }
            &RopeScaling::Dynamic { factor, max_positions } => {
                let growth = factor * length.max(max_positions) / max_positions - (factor - 1.0);
                plain(self.parameters.theta * growth.powf(dim / (dim - 2.0)))
            }
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let freq = plain(self.parameters.theta);
                let wavelength = freq.reciprocal() * (2.0 * PI);
                let smooth =
                    (wavelength.reciprocal() * original - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let blended = (1.0 - &smooth) * &freq / factor + &smooth * &freq;
                let long = wavelength.gt(original / low_freq_factor);
                let short = wavelength.lt(original / high_freq_factor);
                (&freq / factor).where_self(&long, &freq.where_self(&short, &blended))
            }
            &RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
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
                let ramp = ((Tensor::arange(self.dim / 2, options) - low) / (high - low)).clamp(0.0, 1.0);
                let freq = plain(self.parameters.theta);
                &freq / factor * &ramp + &freq * (1.0 - &ramp)
            }
        }
    }
}

/// The distinct settings among those of the blocks, in the order of the blocks.
pub(super) fn distinct_ropes(of_blocks: &[Option<RopeParameters>]) -> Vec<&RopeParameters> {
    let mut found: Vec<&RopeParameters> = Vec::new();
    for parameters in of_blocks.iter().flatten() {
        if !found.contains(&parameters) {
            found.push(parameters);
        }
    }
    found
}

/// Rotates the two halves of each head: x·cos + (−x₂, x₁)·sin; x is [b, h, s, d]. If cos and sin
/// are narrower, only the first elements of the head.
pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (all, rotated) = (x.size()[3], cos.size()[3]);
    if rotated < all {
        let first = rotate(&x.narrow(3, 0, rotated), cos, sin);
        return Tensor::cat(&[first, x.narrow(3, rotated, all - rotated)], -1);
    }
    let halves = x.chunk(2, -1);
    let turned = Tensor::cat(&[&halves[1].neg(), &halves[0]], -1);
    x * cos + turned * sin
}

/// Gated MLP: down(act(gate(x)) · up(x)).
pub(super) struct Mlp {
    inputs: MlpInputs,
    down_proj: Linear,
    activation: Activation,
}

enum MlpInputs {
    Apart {
        gate_proj: Linear,
        up_proj: Linear,
    },
    /// Rows of gate above those of up.
    Fused {
        gate_up_proj: Linear,
    },
}

impl Mlp {
    /// An MLP of width `f`.
    pub(super) fn load(loader: &mut Loader<'_>, prefix: &str, f: i64, c: &ModelConfig) -> Result<Self> {
        let e = c.hidden_size;
        let inputs = if c.fused {
            MlpInputs::Fused { gate_up_proj: loader.linear(&format!("{prefix}.gate_up_proj"), [2 * f, e], c.mlp_bias)? }
        } else {
            MlpInputs::Apart {
                gate_proj: loader.linear(&format!("{prefix}.gate_proj"), [f, e], c.mlp_bias)?,
                up_proj: loader.linear(&format!("{prefix}.up_proj"), [f, e], c.mlp_bias)?,
            }
        };
        Ok(Self {
            inputs,
            down_proj: loader.linear(&format!("{prefix}.down_proj"), [e, f], c.mlp_bias)?,
            activation: c.activation,
        })
    }

    /// Returns true if the weights get gradients from what is computed now.
    pub(super) fn is_tracked(&self) -> bool {
        self.down_proj.is_tracked()
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let (gate, up) = match &self.inputs {
            MlpInputs::Apart { gate_proj, up_proj } => (gate_proj.forward(x), up_proj.forward(x)),
            MlpInputs::Fused { gate_up_proj } => {
                let mut both = gate_up_proj.forward(x).chunk(2, -1);
                let up = both.pop().expect("two chunks");
                (both.pop().expect("two chunks"), up)
            }
        };
        let gate = match self.activation {
            Activation::Silu => gate.silu(),
            Activation::GeluTanh => gate.gelu("tanh"),
            Activation::Gelu => gate.gelu("none"),
        };
        self.down_proj.forward(&(gate * up))
    }
}
